"""The measured shapes, each with its floating-point operations and the fewest bytes it can move.

FLOPs count the multiplications and additions of matrix products that no implementation can avoid: what depends on cond
alone is counted once, not once per step, and activations, norms and embeddings are not counted. Bytes count every
parameter, input, output and gradient once, in float32. The larger of FLOPs over the device's rate and bytes over its
bandwidth is a case's floor.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastflow as ff

# OGBench's cube-double: observations and actions; a value range of rewards in [-1, 0] under a discount of 0.99.
OBS_DIM, ACTION_DIM = 37, 5
VALUE_RANGE = (-101.0, 1.0)

FLOQ = ff.FieldSpec(
    state_dim=1,
    cond_dim=OBS_DIM + ACTION_DIM,
    hidden=(512,) * 4,
    ensemble=2,
    norm="layer",
    state_embedding=ff.HLGauss(*VALUE_RANGE),
    time_embedding=ff.Cosine(),
)
FQL_ACTOR = ff.FieldSpec(state_dim=ACTION_DIM, cond_dim=OBS_DIM, hidden=(512,) * 4)
DEMO_CRITIC = ff.FieldSpec(
    1, 6, (64, 64), 2, norm="layer", state_embedding=ff.HLGauss(*VALUE_RANGE, sigma=3.0), time_embedding=ff.Cosine()
)


@dataclass(frozen=True)
class Case:
    """One operator on one shape.

    Args:
        name: what the results file calls it.
        title: what a reader is told.
        kind: "integrate" (the walk, without gradients) or "matching" (the loss and the gradients of all parameters).
        spec: the velocity network.
        batch: B, rows of cond.
        samples: S, walks or losses per row of cond; None for no such axis.
        num_steps: K of a walk.
    """

    name: str
    title: str
    kind: str
    spec: ff.FieldSpec
    batch: int
    samples: int | None = None
    num_steps: int = 1

    @property
    def rows(self) -> int:
        """Rows that the network sees per step, of one member."""
        return self.batch * (self.samples or 1)

    @property
    def flops(self) -> int:
        """Unavoidable FLOPs of one call."""
        spec, members = self.spec, self.spec.ensemble or 1
        width = spec.hidden[0]
        # In units of one multiplication and addition per row.
        cond, state, time = spec.cond_dim * width, spec.state_features * width, spec.time_features * width
        deeper = sum(i * o for i, o in spec.layer_sizes[1:])
        if self.kind == "integrate":
            total = self.batch * cond + self.num_steps * (time + self.rows * (state + deeper))
        else:
            forward = self.batch * cond + self.rows * (state + time + deeper)
            # Gradients of the weights repeat the forward products, those of the activations all but the first layer's.
            total = 2 * forward + self.rows * deeper
        return 2 * members * total

    @property
    def bytes(self) -> int:
        """Fewest bytes of one call."""
        spec, members = self.spec, self.spec.ensemble or 1
        parameters = members * sum((i + 1) * o for i, o in spec.layer_sizes)
        if spec.norm:
            parameters += members * 2 * sum(spec.hidden)
        cond, state = self.batch * spec.cond_dim, self.rows * spec.state_dim
        if self.kind == "integrate":
            return 4 * (parameters + cond + state + members * state)
        return 4 * (2 * parameters + cond + 2 * state + self.rows)

    def with_batch(self, batch: int) -> Case:
        """The case with other rows of cond."""
        return dataclasses.replace(self, batch=batch)

    def shrunk(self) -> Case:
        """The case small enough for a test: the same options, at most two layers of 32 and eight rows."""
        spec = dataclasses.replace(self.spec, hidden=(32,) * min(2, len(self.spec.hidden)))
        samples = None if self.samples is None else min(2, self.samples)
        return dataclasses.replace(
            self, spec=spec, batch=min(8, self.batch), samples=samples, num_steps=min(3, self.num_steps)
        )

    def build(self, device: torch.device | str, seed: int = 0) -> Problem:
        """The case's network and inputs on a device, the same numbers on every device."""
        return Problem(self, torch.device(device), seed)


class Problem:
    """The network and inputs of one case.

    Attributes:
        field: the VelocityField, float32.
        inputs: x_0 and cond, for a loss also x_1 and t, shaped as the functions of `fastflow` take them.
    """

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case, self.device = case, device
        source = torch.Generator().manual_seed(seed)
        spec = case.spec
        with torch.random.fork_rng(devices=[]):
            self.field = ff.VelocityField(spec)
        self.field.reset_parameters(source)
        with torch.no_grad():
            for p in self.field.parameters():
                # No parameter stays at its special initial value: no zero bias, no unit scale.
                p.add_(0.05 * torch.randn(p.shape, generator=source))
        self.field.to(device)
        rows = (case.batch,) if case.samples is None else (case.batch, case.samples)
        cond = torch.randn(case.batch, spec.cond_dim, generator=source)
        inputs = {"x_0": _states(spec, rows, source, 0.1), "cond": cond}
        if case.kind == "matching":
            inputs["x_1"] = _states(spec, rows, source, 1.0)
            inputs["t"] = torch.rand(rows, generator=source)
        self.inputs: dict[str, Tensor] = {name: x.to(device) for name, x in inputs.items()}
        self._exact: dict[str, Tensor] | None = None

    def results(self, backend: str, precision: str | None) -> dict[str, Tensor]:
        """What `fastflow` returns for this case by one backend: "x_1", or "loss" and a gradient per parameter name."""
        return _results(self.case, self.field, self.inputs, backend, precision)

    def exact(self) -> dict[str, Tensor]:
        """`results` of the reference in float64."""
        if self._exact is None:
            twin = ff.VelocityField(self.case.spec, device=self.device, dtype=torch.float64)
            twin.load_state_dict(self.field.state_dict())
            inputs = {name: x.double() for name, x in self.inputs.items()}
            self._exact = _results(self.case, twin, inputs, "reference", None)
        return self._exact

    def errors(self, results: dict[str, Tensor]) -> dict[str, float]:
        """Root-mean-square errors against float64 relative to the root mean square of what was computed.

        A walk has one, of its displacement x_1 - x_0; a loss has "loss" and "gradients", all parameters' together.

        Raises:
            ValueError: results of other names or shapes.
        """
        exact = self.exact()
        if {name: x.shape for name, x in results.items()} != {name: x.shape for name, x in exact.items()}:
            raise ValueError(f"{self.case.name}: results must be named and shaped as the reference's")
        if self.case.kind == "integrate":
            start = self.inputs["x_0"].double()
            return {"displacement": _relative([results["x_1"]], [exact["x_1"]], [exact["x_1"] - start])}
        names = [name for name in exact if name != "loss"]
        given, expected = [results[name] for name in names], [exact[name] for name in names]
        return {
            "loss": _relative([results["loss"]], [exact["loss"]], [exact["loss"]]),
            "gradients": _relative(given, expected, expected),
        }


def _results(
    case: Case, network: ff.VelocityField, inputs: dict[str, Tensor], backend: str, precision: str | None
) -> dict[str, Tensor]:
    options = {"backend": backend, "precision": precision}
    if case.kind == "integrate":
        with torch.no_grad():
            return {"x_1": ff.integrate(network, **inputs, num_steps=case.num_steps, **options)}
    named = dict(network.named_parameters())
    loss = ff.flow_matching_loss(network, **inputs, **options)
    gradients = torch.autograd.grad(loss, list(named.values()))
    return {"loss": loss.detach(), **dict(zip(named, gradients))}


def _states(spec: ff.FieldSpec, rows: tuple[int, ...], source: torch.Generator, share: float) -> Tensor:
    """Gaussian states; for an embedding with a range uniform ones in its upper `share`, as floq starts its walks."""
    embedding = spec.state_embedding
    if isinstance(embedding, ff.Identity):
        return torch.randn(*rows, spec.state_dim, generator=source)
    width = share * (embedding.high - embedding.low)
    return embedding.high - width * torch.rand(*rows, spec.state_dim, generator=source)


def _relative(given: Sequence[Tensor], exact: Sequence[Tensor], scale: Sequence[Tensor]) -> float:
    error = sum(float((g.to(e.device).double() - e).square().sum()) for g, e in zip(given, exact))
    return math.sqrt(error / sum(float(s.double().square().sum()) for s in scale))


def worst(errors: dict[str, float]) -> float:
    """The largest of a result's errors; infinity where one is NaN, so that every comparison fails."""
    return max(math.inf if math.isnan(e) else e for e in errors.values())


@dataclass(frozen=True)
class UpdateCase:
    """Whole updates of floq on one environment's sizes, with `options` in place of the published defaults."""

    name: str
    title: str
    obs_dim: int
    action_dim: int
    options: dict[str, object] = field(default_factory=dict)

    def config(self, backend: str | None = None, precision: str | None = None):
        """The agent's configuration."""
        from fastflow.agents.floq import FloqConfig

        return FloqConfig(**self.options, backend=backend, precision=precision)

    def agent(self, device: torch.device, backend: str | None = None, precision: str | None = None):
        """A new agent, the same weights and noise for every backend."""
        from fastflow.agents import make

        return make(
            "floq",
            self.config(backend, precision),
            obs_dim=self.obs_dim,
            action_dim=self.action_dim,
            reward_range=(-1.0, 0.0),
            device=device,
            seed=0,
        )

    def batches(self, device: torch.device, count: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
        """Synthetic batches as `fastflow.agents` take them; no dataset is needed to measure an update."""
        source = torch.Generator().manual_seed(seed)
        b = self.config().batch_size

        def batch() -> dict[str, Tensor]:
            rewards = -(torch.rand(b, generator=source) < 0.9).float()
            return {
                "observations": torch.randn(b, self.obs_dim, generator=source),
                "actions": torch.rand(b, self.action_dim, generator=source) * 2 - 1,
                "next_observations": torch.randn(b, self.obs_dim, generator=source),
                "rewards": rewards,
                "masks": -rewards,
                "terminals": 1 + rewards,
            }

        return [{name: x.to(device) for name, x in batch().items()} for _ in range(count)]

    @property
    def flops(self) -> int:
        """Unavoidable FLOPs of one update: matrix products alone, see the module's docstring."""
        c = self.config()
        o, a, b, s = self.obs_dim, self.action_dim, c.batch_size, c.noise_samples
        critic = dataclasses.replace(
            FLOQ, cond_dim=o + a, hidden=(c.block_width,) * c.block_depth, ensemble=c.flow_num_ensembles
        )
        actor = ff.FieldSpec(a, o, c.actor_hidden_dims)
        value = sum(i * j for i, j in _pairs(o + a, *c.value_hidden_dims, 1))
        value_input = value - (o + a) * c.value_hidden_dims[0]
        onestep = sum(i * j for i, j in _pairs(o + a, *c.actor_hidden_dims, a))
        onestep_input = onestep - (o + a) * c.actor_hidden_dims[0]
        operators = [
            # The target walks from a fresh next action per noise sample, the online field from one action per row.
            Case("", "", "integrate", critic, b * s, None, c.critic_flow_steps),
            Case("", "", "integrate", critic, b, s, c.critic_flow_steps),
            Case("", "", "matching", critic, b, s),
            Case("", "", "integrate", actor, b, None, c.flow_steps),
            Case("", "", "matching", actor, b),
        ]
        plain = b * s * onestep + b * (2 * onestep + onestep_input)
        plain += c.num_ensembles * b * (2 * value + value_input)
        # The actor's value term: forward, and back to the action alone.
        plain += c.num_ensembles * b * 2 * value
        return sum(case.flops for case in operators) + 2 * plain

    def shrunk(self) -> UpdateCase:
        """The case small enough for a test."""
        small = {
            "batch_size": 8,
            "noise_samples": 2,
            "critic_flow_steps": 2,
            "flow_steps": 2,
            "block_width": 32,
            "block_depth": 2,
            "value_hidden_dims": (32, 32),
            "actor_hidden_dims": (32, 32),
        }
        return dataclasses.replace(self, options={**self.options, **small})


def _pairs(*widths: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise(widths))


def _floq_walk(batch: int, num_steps: int = 8, name: str | None = None) -> Case:
    title = f"floq walk, 2 nets x {batch} rows, 4x512, HL-Gauss, K={num_steps}"
    return Case(name or f"walk-2x{batch}", title, "integrate", FLOQ, batch, None, num_steps)


NUM_STEPS = (1, 2, 4, 8, 16, 32, 64)

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _floq_walk(2048),
        Case("loss-2x2048", "floq loss with gradients, 2 nets x 256 rows x 8 samples, 4x512", "matching", FLOQ, 256, 8),
        _floq_walk(256),
        _floq_walk(8192),
        Case("actor-walk-256", "FQL actor walk, 256 rows, 4x512, K=10", "integrate", FQL_ACTOR, 256, None, 10),
        Case("actor-loss-256", "FQL actor loss with gradients, 256 rows, 4x512", "matching", FQL_ACTOR, 256),
        Case("one-row", "FQL actor walk of one row, 4x512, K=10", "integrate", FQL_ACTOR, 1, None, 10),
        Case("demo-walk", "demo critic walk, 2 nets x 256 rows, 2x64, K=8", "integrate", DEMO_CRITIC, 256, None, 8),
        Case("demo-loss", "demo critic loss with gradients, 2 nets x 256 rows, 2x64", "matching", DEMO_CRITIC, 256),
        *(_floq_walk(2048, k, f"walk-2x2048-k{k}") for k in NUM_STEPS if k != 8),
    )
}

_CUBE: dict[str, object] = {"alpha": 300.0}
UPDATES: dict[str, UpdateCase] = {
    case.name: case
    for case in (
        UpdateCase(
            "update-cube-double-depth4",
            "whole floq update, cube-double sizes, B=256, r=8, K=8, critic 4x512",
            OBS_DIM,
            ACTION_DIM,
            {**_CUBE, "block_depth": 4},
        ),
        UpdateCase(
            "update-cube-double-depth2",
            "whole floq update, cube-double sizes, B=256, r=8, K=8, critic 2x512 (published)",
            OBS_DIM,
            ACTION_DIM,
            {**_CUBE, "block_depth": 2},
        ),
        UpdateCase(
            "update-demo",
            "whole floq update, demo sizes, B=256, r=1, K=8, critic 2x64",
            4,
            2,
            {
                "noise_samples": 1,
                "block_width": 64,
                "block_depth": 2,
                "sigma": 3.0,
                "value_hidden_dims": (64, 64, 64),
                "actor_hidden_dims": (64, 64, 64),
            },
        ),
    )
}
