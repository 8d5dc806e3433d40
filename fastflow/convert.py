"""Checkpoints of the published JAX code of floq and FQL as run folders of fastflow, and runs as files for JAX.

JAX is not needed. The files are those of `fastflow.jax_checkpoint`; names and architecture come from
`fastflow.flax_layout`. Adam's moments and step count come along, so that training goes on.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor

from fastflow import agents
from fastflow.errors import UserError, missing_extra
from fastflow.flax_layout import AGENTS, Layout, export_names, read_layout
from fastflow.info import resolve_device, versions
from fastflow.jax_checkpoint import JaxCheckpoint, read_checkpoint, write_checkpoint
from fastflow.record import Checkpoint, Run, check_available, load_agent, load_agent_state, make_agent, to_json
from fastflow.settings import AgentConfig
from fastflow.train import full_names, preset_config

__all__ = ["export_run", "import_checkpoint", "jax_checkpoint"]

# To a run -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Chosen(Generic[AgentConfig]):
    """Settings of the agent: those that the file tells by its shapes, the rest as published."""

    agent: AgentConfig


def import_checkpoint(
    path: str | os.PathLike[str],
    *,
    env: str | None = None,
    preset: str = "auto",
    r_min: float | None = None,
    r_max: float | None = None,
    flags: Path | None = None,
    seed: int | None = None,
    output: Path | None = None,
    device: str = "auto",
    agent_flags: Sequence[str] = (),
) -> tuple[Run, list[str]]:
    """Writes a run folder with the state that a checkpoint of the published code holds.

    What the file lacks comes, the later the stronger, from the preset, from the published code's `flags.json` and from
    the arguments.

    Args:
        path: see `read_checkpoint`.
        env: task; by default the one in the flags.
        preset: as in `fastflow train`.
        r_min, r_max: smallest and largest reward of the dataset, at most and at least 0, from which floq's ranges of
            values and noise follow. FQL needs neither.
        flags: a `flags.json`; by default the one beside the checkpoint, if there is one.
        seed: of the noise and batches from here on; by default the one in the flags, or 0.
        output: folder to make; by default runs/ENV__AGENT__seedN.
        device: where training is to go on. Evaluation runs anywhere.
        agent_flags: further settings as flags, such as ("--alpha", "300").

    Returns:
        The run and a report, line by line: what was read, and each entry with the name that it has now.

    Raises:
        UserError: a damaged or unsafe file, another architecture, a setting that is missing or contradicts the file,
            an output that exists.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    layout = read_layout(checkpoint.parameters)
    name = layout.agent
    _check_target_moments(checkpoint)
    if name not in agents.NAMES:
        raise UserError(f"{path} is a checkpoint of {name}, an agent that this version does not have")
    given = _read_flags(path, flags, name)
    env = env or given.get("env_name")
    if not env:
        raise UserError("env: expected the name of the task (--env), as there is no flags.json that tells it")
    agents.task_class(name).check_name(env)
    seed = given.get("seed", 0) if seed is None else seed
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed: expected an int of at least 0, got {seed}")
    # FQL's values have no range.
    reward_range = [0.0, 0.0] if name == "fql" and r_min is r_max is None else _reward_range(r_min, r_max)
    preset, config = preset_config(name, env, preset)
    config = _config(config, layout, given.get("agent", {}), agent_flags)
    output = output or Path("runs") / f"{env}__{name}__seed{seed}"
    check_available(output)

    target = resolve_device(device)
    arguments = {
        "obs_dim": layout.obs_dim,
        "action_dim": layout.action_dim,
        "reward_range": reward_range,
        "observation_statistics": None,
    }
    agent = make_agent(name, to_json(config), arguments, device=target, seed=seed)
    own = agent.state_dict()
    state = {key: own[key] for key in ("generator", "reward_range") if key in own}
    load_agent_state(agent, state | _agent_state(checkpoint, layout), path)
    settings = agents.settings_class(name)(env=env, agent=config, preset=preset, seed=seed, run_dir=output)
    run = Run.create(
        output,
        {
            "agent_name": name,
            **{key: value for key, value in to_json(settings).items() if key != "resume"},
            "arguments": arguments,
            "dataset": {"rows": 0, "path": None, "fingerprint": None},
            "versions": versions(),
            "converted_from": path.name,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "resumed": [],
        },
    )
    run.save(
        Checkpoint(
            step=checkpoint.updates,
            agent=name,
            config=to_json(config),
            arguments=arguments,
            # A fingerprint of None: the dataset is whichever the run goes on with.
            loop={
                "env": env,
                "seed": seed,
                "device": target.type,
                "fingerprint": None,
                "metrics": [],
                "seconds": 0.0,
            },
            tensors={
                **{f"agent/{key}": value for key, value in agent.state_dict().items()},
                "loop/metric_sums": torch.zeros(0, dtype=torch.float64),
                "loop/metric_count": torch.tensor(0),
                "loop/batches_generator": torch.Generator(target).manual_seed(seed).get_state(),
            },
        )
    )
    return run, _report(checkpoint, layout, config, arguments)


def _read_flags(path: Path, flags: Path | None, agent: str) -> dict[str, Any]:
    """What a flags.json says; nothing if none was named and none lies beside the checkpoint."""
    file = flags or path.with_name("flags.json")
    if flags is None and not file.is_file():
        return {}
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable JSON file ({error})") from error
    if not isinstance(given, dict) or not isinstance(given.get("agent", {}), dict):
        raise UserError(f"{file}: expected the flags of the published code, an object with an object 'agent' in it")
    came = given.get("agent", {}).get("agent_name", agent)
    if came != agent:
        raise UserError(f"{file}: agent_name: expected {agent!r}, as the checkpoint has its networks, got {came!r}")
    return given


def _reward_range(r_min: float | None, r_max: float | None) -> list[float]:
    if r_min is None or r_max is None:
        raise UserError(
            "r_min, r_max: expected the smallest and the largest reward of the dataset (--r-min, --r-max), which the "
            "file does not hold"
        )
    # The agent would widen the range, and walk from other starts to other features than those it was trained with.
    if not (-float("inf") < r_min <= 0 <= r_max < float("inf")):
        raise UserError(
            f"r_min, r_max: expected finite r_min <= 0 <= r_max, as fastflow's ranges contain 0, got {r_min} and "
            f"{r_max}"
        )
    return [float(r_min), float(r_max)]


def _config(config: Any, layout: Layout, flags: Mapping[str, Any], agent_flags: Sequence[str]) -> Any:
    """The agent's configuration, which the checkpoint's shapes must agree with."""
    try:
        import tyro
    except ImportError as error:
        raise missing_extra("rl", "tyro") from error

    fields = {field.name for field in dataclasses.fields(config)}
    for name, published in (("activate_before_layernorm", True), ("encoder", None)):
        if name in flags and name not in fields and flags[name] != published:
            raise UserError(f"flags: {name}: expected {published}, which is all that fastflow has, got {flags[name]}")
    told = {name: tuple(v) if isinstance(v, list) else v for name, v in flags.items() if name in fields}
    if layout.features is not None and flags.get("embed_time") is False:
        told["time_embedding"] = "raw"
    try:
        config = dataclasses.replace(config, **told)
    except (TypeError, ValueError) as error:
        raise UserError(f"flags: {error}") from error
    found = {name: value for name, (value, _) in layout.settings.items()}
    for name in found.keys() & told.keys():
        if told[name] != found[name]:
            value, entry = layout.settings[name]
            raise UserError(f"flags: {name}: expected {value}, as {entry} has it, got {told[name]}")
    config = dataclasses.replace(config, **found)
    if layout.features is not None:
        config = _with_features(config, layout.features)
    try:
        kind: Any = _Chosen
        chosen = tyro.cli(
            kind[type(config)],
            args=full_names(agent_flags, _Chosen, type(config)),
            default=_Chosen(config),
            prog="fastflow convert",
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    _check_config(chosen.agent, layout)
    return chosen.agent


def _feature_width(config: Any) -> int:
    state = config.num_bins - 1 if config.use_prob_embed else 1
    return state + (config.time_embed_dim if config.time_embedding == "fourier" else 1)


def _with_features(config: Any, width: int) -> Any:
    """The embeddings of state and time that together are `width` wide, first as configured."""
    for prob in (config.use_prob_embed, not config.use_prob_embed):
        for time in (config.time_embedding, "cosine", "fourier"):
            changed = dataclasses.replace(config, use_prob_embed=prob, time_embedding=time)
            if _feature_width(changed) == width:
                return changed
    return config


def _check_config(config: Any, layout: Layout) -> None:
    for name, (value, entry) in layout.settings.items():
        came = getattr(config, name)
        if came != value:
            raise UserError(f"{name}: expected {value}, as {entry} has it, got {came}")
    if layout.features is not None and _feature_width(config) != layout.features:
        raise UserError(
            f"modules_floq/mlp, first kernel: expected {_feature_width(config)} inputs besides observation and action "
            f"(use_prob_embed {config.use_prob_embed}, num_bins {config.num_bins}, time_embedding "
            f"{config.time_embedding}, time_embed_dim {config.time_embed_dim}), got {layout.features}; name what it "
            "was trained with, such as --num-bins 101"
        )


def _check_target_moments(checkpoint: JaxCheckpoint) -> None:
    """A target is not trained; fastflow keeps no moments for it."""
    for group, moments in (("mu", checkpoint.mu), ("nu", checkpoint.nu)):
        for name, value in moments.items():
            if name.startswith("modules_target_") and value.any():
                raise UserError(f"opt_state/0/{group}/{name}: expected zeros, as no gradient reaches a target network")


def _agent_state(checkpoint: JaxCheckpoint, layout: Layout) -> dict[str, Tensor]:
    """The state under fastflow's names."""
    state = {"step": torch.tensor(checkpoint.updates, dtype=torch.int64)}
    for flax, own in layout.names.items():
        state[own] = torch.from_numpy(checkpoint.parameters[flax])
        if not own.startswith("target_"):
            state[f"adam/exp_avg/{own}"] = torch.from_numpy(checkpoint.mu[flax])
            state[f"adam/exp_avg_sq/{own}"] = torch.from_numpy(checkpoint.nu[flax])
    return state


def _report(checkpoint: JaxCheckpoint, layout: Layout, config: Any, arguments: Mapping[str, Any]) -> list[str]:
    """What was found and where it went."""
    width = max(map(len, layout.names))
    shapes = {name: str(list(checkpoint.parameters[name].shape)) for name in layout.names}
    middle = max(map(len, shapes.values()))
    sizes = ", ".join(f"{name} {value}" for name, (value, _) in layout.settings.items())
    others = {"reward_range": arguments["reward_range"], **to_json(config)}
    return [
        f"{layout.agent} after {checkpoint.updates:,} updates: {layout.obs_dim} observations, {layout.action_dim} "
        f"actions, {sizes}",
        *(f"{name:{width}}  {shapes[name]:{middle}}  {own}" for name, own in layout.names.items()),
        f"Adam's mu and nu of the trained networks, count {checkpoint.updates:,}: taken over",
        "rng: left out, as fastflow draws from a generator of its own",
        "not in the file, hence as published or given: "
        + ", ".join(
            f"{name} {value}" for name, value in others.items() if name not in layout.settings and value is not None
        ),
    ]


# From a run ---------------------------------------------------------------------------------------------------------


def export_run(
    path: str | os.PathLike[str], output: str | os.PathLike[str] | None = None, checkpoint: int | None = None
) -> Path:
    """Writes the networks and Adam's state of a run as an npz with flax's names, see `fastflow.jax_checkpoint`.

    Args:
        path: the run folder, of floq or fql.
        output: file to write, which must not exist yet; its suffix is .npz. By default step_N.npz in the run folder.
        checkpoint: step of the checkpoint; by default the newest.

    Returns:
        The file.

    Raises:
        UserError: no such run or checkpoint, an agent without a JAX counterpart, observations that were scaled (the
            published networks take them as they are), an output that exists or cannot be written.
    """
    run = Run.open(Path(path))
    output = None if output is None else Path(output)
    if output is not None and output.suffix != ".npz":
        raise UserError(f"output: expected a file that ends in .npz, got {output}")
    name = run.config["agent_name"]
    if name not in AGENTS:
        raise UserError(f"{path} is a run of {name}; expected one of {', '.join(AGENTS)}, whose JAX code is published")
    agent, saved = load_agent(run, checkpoint, "cpu")
    output = output or run.path / f"step_{saved.step:08d}.npz"
    if output.exists():
        raise UserError(f"output: expected a file that does not exist yet, got {output}")
    write_checkpoint(output, jax_checkpoint(name, agent))
    return output


def jax_checkpoint(agent_name: str, agent: Any) -> JaxCheckpoint:
    """The state of an agent under flax's names: `write_checkpoint` makes a file of it.

    Args:
        agent_name: "floq" or "fql".
        agent: of that algorithm.

    Raises:
        UserError: an agent that scales observations, which the published networks take as they are.
    """
    state = {name: tensor.cpu() for name, tensor in agent.state_dict().items()}
    if "observation_mean" in state:
        raise UserError(
            "observation_statistics: expected none, as the published networks take observations as they are"
        )
    depth = agent.config.block_depth if agent.config.use_resnets else None
    names = export_names(agent_name, dict(agent.networks.named_parameters()), depth)

    def moments(which: str) -> dict[str, np.ndarray]:
        # optax keeps them for a target too.
        return {
            flax: state.get(f"adam/{which}/{own}", torch.zeros_like(state[own])).numpy() for flax, own in names.items()
        }

    parameters = {flax: state[own].numpy() for flax, own in names.items()}
    return JaxCheckpoint(agent.step, parameters, moments("exp_avg"), moments("exp_avg_sq"))
