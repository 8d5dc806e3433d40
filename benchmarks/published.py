"""The shapes of the papers' published settings, as cases: `floq/cube-double-play/walk`, `fpo/playground/loss`, ...

They follow from the presets of `fastflow.agents`, so that a benchmark is of what `fastflow train --preset` runs, and
from the sizes of the environments. `python -m benchmarks.scaling --list` prints them with their FLOPs and bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import fastflow as ff
from benchmarks.cases import PARAMETERS, Case, UpdateCase
from fastflow import flops
from fastflow.agents import floq, fpo, td2_cfm
from fastflow.agents.floq import FloqConfig
from fastflow.agents.fpo import FpoConfig
from fastflow.agents.td2_cfm import Td2CfmConfig
from fastflow.modules import value_ranges

# Observations and actions of OGBench's environments.
SIZES = {name: sizes for name, sizes in flops.SIZES.items() if not name.endswith("-demo")}

# By preset of FPO: observations, actions, environments. Playground is CheetahRun; locomotion a quadruped (Go2) and a
# humanoid (G1), tracking a humanoid.
_FPO = {
    "gridworld": ("gridworld", 2, 2, 1),
    "playground": ("playground", 17, 6, 2048),
    "fpo++-go2": ("fpo++/locomotion", 48, 12, 4096),
    "fpo++-g1": ("fpo++/locomotion", 123, 37, 4096),
    "fpo++-tracking": ("fpo++/tracking", 160, 29, 4096),
}
# Numbers of a policy's embedding w in TD-Flow's families (arXiv:2503.09817, Table 8).
_POLICY = 100


def critic_of(config: FloqConfig, obs_dim: int, action_dim: int) -> ff.FieldSpec:
    """floq's velocity network under a configuration, for rewards in [-1, 0]."""
    value_range, _ = value_ranges((-1.0, 0.0), config.discount, config.noise_coverage, config.reward_offset)
    return ff.FieldSpec(
        state_dim=1,
        cond_dim=obs_dim + action_dim,
        hidden=(config.block_width,) * config.block_depth,
        ensemble=config.flow_num_ensembles,
        norm="layer" if config.layer_norm else None,
        state_embedding=ff.HLGauss(*value_range, config.num_bins, config.sigma),
        time_embedding=ff.Cosine(),
    )


def _settings(environment: str) -> tuple[str, ...]:
    """Endings of the presets that differ in what they compute: not in the width of the noise, for one."""
    default, best = (FloqConfig(**floq.PRESETS[environment + suffix]) for suffix in ("", "/best"))
    same = dataclasses.replace(best, noise_coverage=default.noise_coverage) == default
    return ("",) if same else ("", "/best")


def _floq() -> Iterator[Case]:
    for environment, (obs_dim, action_dim) in SIZES.items():
        for suffix in _settings(environment):
            config = FloqConfig(**floq.PRESETS[environment + suffix])
            critic = critic_of(config, obs_dim, action_dim)
            name, b, s = f"floq/{environment}{suffix}", config.batch_size, config.noise_samples
            k = config.critic_flow_steps
            shape = f"{critic.ensemble} nets of {config.block_depth}x{config.block_width}"
            title = f"target walk, {shape}, {b * s} rows, K={k}"
            yield Case(f"{name}/walk", title, "integrate", critic, b * s, None, k)
            title = f"critic loss with gradients, {shape}, {b} rows x {s} samples"
            yield Case(f"{name}/loss", title, "matching", critic, b, s, gradient=PARAMETERS)


def _fql() -> Iterator[Case]:
    for environment, (obs_dim, action_dim) in SIZES.items():
        config = FloqConfig(**floq.PRESETS[environment])
        actor = ff.FieldSpec(action_dim, obs_dim, config.actor_hidden_dims)
        b, k = config.batch_size, config.flow_steps
        walk = Case(f"fql/{environment}/actor-walk", f"{b} rows, 4x512, K={k}", "integrate", actor, b, None, k)
        yield walk
        loss = f"fql/{environment}/actor-loss"
        yield Case(loss, f"{b} rows, 4x512, with gradients", "matching", actor, b, gradient=PARAMETERS)
        title = f"control: one row, 4x512, K={k}"
        yield dataclasses.replace(walk.with_batch(1), name=f"fql/{environment}/one-row", title=title)


def _fpo() -> Iterator[Case]:
    for name, (preset, obs_dim, action_dim, num_envs) in _FPO.items():
        config = FpoConfig(**fpo.PRESETS[preset])
        time = ff.PowerFourier(config.time_embed_dim) if config.time_embed_dim else ff.RawTime()
        scale = config.output_scale
        spec = ff.FieldSpec(
            action_dim,
            obs_dim,
            config.actor_hidden,
            activation=config.activation,
            time_embedding=time,
            output_scale=scale,
        )
        hidden, k = "-".join(map(str, config.actor_hidden)), config.num_steps
        walk = Case(f"fpo/{name}/walk", f"{num_envs} rows, {hidden}, K={k}", "integrate", spec, num_envs, num_steps=k)
        yield walk
        title = f"control: one row, {hidden}, K={k}"
        yield dataclasses.replace(walk.with_batch(1), name=f"fpo/{name}/one-row", title=title)
        rows, pairs = num_envs * config.rollout_steps // config.num_minibatches, config.num_pairs
        title = f"minibatch of {rows} rows x {pairs} pairs with gradients, {hidden}"
        yield Case(f"fpo/{name}/loss", title, "matching", spec, rows, pairs, pairs=True, gradient=PARAMETERS)


def _td_flow() -> Iterator[Case]:
    for preset in ("single-policy", "multi-policy"):
        config = Td2CfmConfig(**td2_cfm.PRESETS[preset])
        spec = ff.FieldSpec(
            4,
            6 + (_POLICY if config.policy == "all" else 0),
            config.hidden,
            activation="mish",
            architecture=ff.FiLMUNet(config.cond_hidden),
            time_embedding=ff.Sinusoidal(256, (256, 256)),
        )
        b, k = config.batch_size, config.num_steps
        title = f"target walk to end times of their own, {b} rows, U-Net of {config.hidden[0]}, midpoint K={k}"
        options = {"method": config.method, "end_times": True}
        yield Case(f"td-flow/{preset}/walk", title, "integrate", spec, b, None, k, **options)  # type: ignore[arg-type]
        title = f"loss with gradients, {b} rows, U-Net of {config.hidden[0]}"
        yield Case(f"td-flow/{preset}/loss", title, "velocity", spec, b, gradient=PARAMETERS)


PUBLISHED: dict[str, Case] = {case.name: case for make in (_floq, _fql, _fpo, _td_flow) for case in make()}

UPDATES: dict[str, UpdateCase] = {
    f"floq/{preset}/update": UpdateCase(
        f"floq/{preset}/update", f"whole floq update, preset {preset}", *SIZES[environment], floq.PRESETS[preset]
    )
    for environment in SIZES
    for preset in (environment + suffix for suffix in _settings(environment))
}


# Sweeps -------------------------------------------------------------------------------------------------------------

AXES = {
    "steps": (1, 2, 4, 8, 16, 32, 64),
    "rows": (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536),
    "width": (32, 64, 128, 256, 512, 1024),
}


def along(case: Case, axis: str, n: int) -> Case:
    """The case with n steps, n rows of cond, or hidden layers of n.

    Raises:
        ValueError: an axis that there is none of, or steps of a loss.
    """
    if axis not in AXES:
        raise ValueError(f"axis: expected one of {', '.join(AXES)}, got {axis!r}")
    name = f"{case.name} {axis}={n}"
    if axis == "rows":
        return dataclasses.replace(case.with_batch(n), name=name)
    if axis == "width":
        return dataclasses.replace(case, name=name, spec=_widened(case.spec, n))
    if case.kind != "integrate":
        raise ValueError(f"axis: {case.name} is a loss, which has no steps")
    return dataclasses.replace(case, name=name, num_steps=n)


def _widened(spec: ff.FieldSpec, width: int) -> ff.FieldSpec:
    architecture = spec.architecture
    if isinstance(architecture, ff.FiLMUNet):
        architecture = ff.FiLMUNet((width,) * len(architecture.cond_hidden))
    return dataclasses.replace(spec, hidden=(width,) * len(spec.hidden), architecture=architecture)
