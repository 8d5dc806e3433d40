"""The measured shapes, each with its floating-point operations and the fewest bytes it can move.

FLOPs count the multiplications and additions of matrix products that no implementation can avoid: what depends on cond
alone is counted once per row of cond and what depends on time alone once per time, not once per row and step, and
activations, norms and embeddings are not counted. Bytes count every parameter, input, output and gradient once, in
float32. The larger of FLOPs over the device's rate and bytes over its bandwidth is a case's floor.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastflow as ff

# OGBench's cube-double: observations and actions; a value range of rewards in [-1, 0] under a discount of 0.99.
OBS_DIM, ACTION_DIM = 37, 5
VALUE_RANGE = (-101.0, 1.0)
PARAMETERS = ("parameters",)

FLOQ = ff.FieldSpec(
    state_dim=1,
    cond_dim=OBS_DIM + ACTION_DIM,
    hidden=(512,) * 4,
    ensemble=2,
    norm="layer",
    state_embedding=ff.HLGauss(*VALUE_RANGE),
    time_embedding=ff.Cosine(),
)
FLOQ_RESNET = dataclasses.replace(FLOQ, hidden=(512,) * 5, architecture=ff.ResidualMLP(2))
FQL_ACTOR = ff.FieldSpec(state_dim=ACTION_DIM, cond_dim=OBS_DIM, hidden=(512,) * 4)
DEMO_CRITIC = ff.FieldSpec(
    1, 6, (64, 64), 2, norm="layer", state_embedding=ff.HLGauss(*VALUE_RANGE, sigma=3.0), time_embedding=ff.Cosine()
)
# FPO on MuJoCo Playground (arXiv:2507.21053) and FPO++ on a quadruped: observations, actions.
FPO = ff.FieldSpec(6, 17, (32,) * 4, activation="silu", time_embedding=ff.PowerFourier(8), output_scale=0.25)
FPO_PLUS = ff.FieldSpec(12, 48, (256,) * 3, activation="elu", time_embedding=ff.PowerFourier(8))
# TD-Flow (arXiv:2503.09817) on a point mass: the state is the observation, cond observation and action.
TD_FLOW = ff.FieldSpec(
    4, 6, (512,) * 3, activation="mish", architecture=ff.FiLMUNet(), time_embedding=ff.Sinusoidal(256, (256, 256))
)


@dataclass(frozen=True)
class Case:
    """One operator on one shape.

    Args:
        name: what the results file calls it.
        title: what a reader is told.
        kind: "integrate" (the walk), "matching" (the flow-matching loss) or "velocity" (the velocity-matching loss).
        spec: the velocity network.
        batch: B, rows of cond.
        samples: S, walks or losses per row of cond; None for no such axis.
        num_steps: K of a walk.
        method: of a walk.
        end_times: each row walks to a time of its own.
        pairs: the loss of every row of every sample, whose x_1 is that of its row of cond; else the mean of them.
        gradient: what is differentiated for besides computing the result: "cond", "parameters". Parameters that are
            not are frozen. A result of many numbers comes back with a given gradient, such as a weight per pair.
    """

    name: str
    title: str
    kind: str
    spec: ff.FieldSpec
    batch: int
    samples: int | None = None
    num_steps: int = 1
    method: str = "euler"
    end_times: bool = False
    pairs: bool = False
    gradient: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Rows that the network sees per evaluation, of one member."""
        return self.batch * (self.samples or 1)

    @property
    def evaluations(self) -> int:
        """Evaluations of the network per row."""
        return self.num_steps * (1 if self.method == "euler" else 2)

    @property
    def output(self) -> str:
        """Name of the result beside the gradients."""
        return "x_1" if self.kind == "integrate" else "loss"

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of that result."""
        spec = self.spec
        rows = (self.batch,) if self.samples is None else (self.batch, self.samples)
        members = () if spec.ensemble is None else (spec.ensemble,)
        if self.kind == "integrate":
            return (*members, *rows, spec.state_dim)
        return (*members, *rows) if self.pairs else ()

    @property
    def flops(self) -> int:
        """Unavoidable FLOPs of one call."""
        spec, rows = self.spec, self.rows
        (state, *deeper), time, cond = self._products()
        n_all = rows * self.evaluations
        n_time = self.evaluations if self.kind == "integrate" and not self.end_times else n_all
        # In units of one multiplication and addition.
        total = forward = self.batch * sum(cond) + n_time * sum(time) + n_all * (state + sum(deeper))
        if self.gradient:
            # Back to the first layer; to the state only where another evaluation led to it.
            total += n_all * sum(deeper) + (n_all - rows) * state
        if "cond" in self.gradient:
            total += self.batch * sum(cond)
        if "parameters" in self.gradient:
            # Gradients of the weights repeat the forward products; cond's and time's go back to their first layers.
            total += forward + n_time * sum(time[1:])
            total += 0 if "cond" in self.gradient else self.batch * sum(cond[1:])
        return 2 * (spec.ensemble or 1) * total

    def _products(self) -> tuple[list[int], list[int], list[int]]:
        """Sizes of the products one behind the other, per row: of the flow state to the head, of time and of cond to
        where they meet it."""
        spec = self.spec
        width = spec.hidden[0]

        def products(sizes: Sequence[tuple[int, int]]) -> list[int]:
            return [i * o for i, o in sizes]

        state = [spec.state_features * width, *products(spec.layer_sizes[1:])]
        time, cond = products(spec.time_sizes), products(spec.encoder_sizes)
        if spec.film:
            scales = sum(o for _, o in spec.film_sizes)
            encoded = spec.encoder_sizes[-1][1] if spec.encoder_sizes else 0
            return state, [*time, spec.time_features * scales], [*cond, encoded * scales]
        return state, [*time, spec.time_features * width], [spec.cond_dim * width]

    @property
    def bytes(self) -> int:
        """Fewest bytes of one call."""
        spec, members, rows = self.spec, self.spec.ensemble or 1, self.rows
        sizes = (*spec.layer_sizes, *spec.time_sizes, *spec.encoder_sizes, *spec.film_sizes)
        parameters = members * sum((i + 1) * o for i, o in sizes)
        if spec.norm:
            parameters += members * 2 * sum(layer.width for layer in spec.trunk)
        cond, state, output = self.batch * spec.cond_dim, rows * spec.state_dim, math.prod(self.output_shape)
        total = parameters + cond + state
        if self.kind == "integrate":
            total += rows * self.end_times
        else:
            total += (self.batch * spec.state_dim if self.pairs else state) + rows
        if self.output_shape:
            # A given gradient is as large as its result; a single number is not counted.
            total += output * (2 if self.gradient else 1)
        total += cond * ("cond" in self.gradient) + parameters * ("parameters" in self.gradient)
        return 4 * total

    def with_batch(self, batch: int) -> Case:
        """The case with other rows of cond."""
        return dataclasses.replace(self, batch=batch)

    def shrunk(self) -> Case:
        """The case small enough for a test: the same options, few layers of 32 and eight rows."""
        spec, layers = self.spec, 2
        architecture, time = spec.architecture, spec.time_embedding
        if isinstance(architecture, ff.ResidualMLP):
            layers = 1 + architecture.depth
        if isinstance(architecture, ff.FiLMUNet):
            architecture = ff.FiLMUNet((32,) * min(2, len(architecture.cond_hidden)))
        if isinstance(time, ff.Sinusoidal):
            time = dataclasses.replace(time, dim=16, hidden=(32,) * min(2, len(time.hidden)))
        spec = dataclasses.replace(
            spec, hidden=(32,) * min(layers, len(spec.hidden)), architecture=architecture, time_embedding=time
        )
        samples = None if self.samples is None else min(2, self.samples)
        return dataclasses.replace(
            self, spec=spec, batch=min(8, self.batch), samples=samples, num_steps=min(3, self.num_steps)
        )

    def build(self, device: torch.device | str, seed: int = 0) -> Problem:
        """The case's network and inputs on a device, the same numbers on every device."""
        return Problem(self, torch.device(device), seed)

    def run(self, network: ff.VelocityField, inputs: dict[str, Tensor], backend: str, precision: str | None) -> Tensor:
        """The result by `fastflow`."""
        options = {"backend": backend, "precision": precision}
        if self.kind == "integrate":
            return ff.integrate(network, **inputs, num_steps=self.num_steps, method=self.method, **options)
        loss = ff.flow_matching_loss if self.kind == "matching" else ff.velocity_matching_loss
        return loss(network, **inputs, reduction="none" if self.pairs else "mean", **options)

    def leaves(self, network: ff.VelocityField, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is differentiated for, by name; marked as such, and nothing else."""
        network.requires_grad_("parameters" in self.gradient)
        inputs["cond"].requires_grad_("cond" in self.gradient)
        named = {"cond": inputs["cond"], **dict(network.named_parameters())}
        return {name: x for name, x in named.items() if x.requires_grad}


class Problem:
    """The network and inputs of one case.

    Attributes:
        field: the VelocityField, float32.
        inputs: x_0 and cond, x_1 and t and so on, named and shaped as the functions of `fastflow` take them.
        leaves: what is differentiated for, by name.
        given: gradient of the result; None where that is a single number, or nothing is differentiated.
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
        start, end = ("x_t", "target_velocity") if case.kind == "velocity" else ("x_0", "x_1")
        inputs = {start: _states(spec, rows, source, 0.1), "cond": cond}
        if case.kind != "integrate":
            inputs[end] = _states(spec, rows[:1] if case.pairs else rows, source, 1.0)
            inputs["t"] = torch.rand(rows, generator=source)
        elif case.end_times:
            inputs["t_1"] = torch.rand(rows, generator=source)
        given = torch.randn(case.output_shape, generator=source) if case.gradient and case.output_shape else None
        self.inputs: dict[str, Tensor] = {name: x.to(device) for name, x in inputs.items()}
        self.given = None if given is None else given.to(device)
        self.leaves = case.leaves(self.field, self.inputs)
        self._exact: dict[str, Tensor] | None = None

    def results(self, backend: str, precision: str | None) -> dict[str, Tensor]:
        """What `fastflow` returns for this case by one backend: "x_1" or "loss", and a gradient per leaf's name."""
        return _results(self.case, self.field, self.inputs, self.given, backend, precision)

    def exact(self) -> dict[str, Tensor]:
        """`results` of the reference in float64."""
        if self._exact is None:
            twin = ff.VelocityField(self.case.spec, device=self.device, dtype=torch.float64)
            twin.load_state_dict(self.field.state_dict())
            inputs = {name: x.detach().double() for name, x in self.inputs.items()}
            given = None if self.given is None else self.given.double()
            self._exact = _results(self.case, twin, inputs, given, "reference", None)
        return self._exact

    def errors(self, results: dict[str, Tensor]) -> dict[str, float]:
        """Root-mean-square errors against float64 relative to the root mean square of what was computed.

        "displacement", a walk's x_1 - x_0, or "loss"; "cond", its gradient; "gradients", all parameters' together.

        Raises:
            ValueError: results of other names or shapes.
        """
        exact = self.exact()
        if {name: x.shape for name, x in results.items()} != {name: x.shape for name, x in exact.items()}:
            raise ValueError(f"{self.case.name}: results must be named and shaped as the reference's")
        value = exact[self.case.output]
        if self.case.kind == "integrate":
            moved = value - self.inputs["x_0"].double()
            errors = {"displacement": _relative([results["x_1"]], [value], [moved])}
        else:
            errors = {"loss": _relative([results["loss"]], [value], [value])}
        parameters = [name for name in exact if name not in (self.case.output, "cond")]
        for name, parts in (("cond", ["cond"] if "cond" in exact else []), ("gradients", parameters)):
            if parts:
                given, expected = [results[part] for part in parts], [exact[part] for part in parts]
                errors[name] = _relative(given, expected, expected)
        return errors


def _results(
    case: Case,
    network: ff.VelocityField,
    inputs: dict[str, Tensor],
    given: Tensor | None,
    backend: str,
    precision: str | None,
) -> dict[str, Tensor]:
    leaves = case.leaves(network, inputs)
    with torch.set_grad_enabled(bool(leaves)):
        out = case.run(network, inputs, backend, precision)
    gradients = torch.autograd.grad(out, list(leaves.values()), given) if leaves else ()
    return {case.output: out.detach(), **dict(zip(leaves, gradients, strict=True))}


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


class PlainPass(NamedTuple):
    """One pass of a plain network, Dense -> activation -> optional LayerNorm, then Dense."""

    widths: tuple[int, ...]
    norm: bool
    members: int
    rows: int
    gradient: tuple[str, ...] = ()


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
    def operators(self) -> list[Case]:
        """The walks and losses of one update."""
        c = self.config()
        o, a, b, s = self.obs_dim, self.action_dim, c.batch_size, c.noise_samples
        critic = dataclasses.replace(
            FLOQ, cond_dim=o + a, hidden=(c.block_width,) * c.block_depth, ensemble=c.flow_num_ensembles
        )
        actor = ff.FieldSpec(a, o, c.actor_hidden_dims)
        return [
            # The target walks from a fresh next action per noise sample, the online field from one action per row.
            Case("", "", "integrate", critic, b * s, None, c.critic_flow_steps),
            Case("", "", "integrate", critic, b, s, c.critic_flow_steps),
            Case("", "", "matching", critic, b, s, gradient=PARAMETERS),
            Case("", "", "integrate", actor, b, None, c.flow_steps),
            Case("", "", "matching", actor, b, gradient=PARAMETERS),
        ]

    @property
    def launched(self) -> list[Case]:
        """The same as they are launched: the critic's two walks are one, of both fields' members."""
        walk, _, *others = self.operators
        members = 2 * (walk.spec.ensemble or 1)
        return [dataclasses.replace(walk, spec=dataclasses.replace(walk.spec, ensemble=members)), *others]

    @property
    def plain(self) -> list[PlainPass]:
        """The passes of its plain networks, the one-step actor and the distilled critic."""
        c = self.config()
        o, a, b, s = self.obs_dim, self.action_dim, c.batch_size, c.noise_samples
        actor, value = (o + a, *c.actor_hidden_dims, a), (o + a, *c.value_hidden_dims, 1)
        return [
            PlainPass(actor, c.actor_layer_norm, 1, b * s),
            PlainPass(actor, c.actor_layer_norm, 1, b, PARAMETERS),
            PlainPass(value, c.layer_norm, c.num_ensembles, b, PARAMETERS),
            PlainPass(value, c.layer_norm, c.num_ensembles, b, ("cond",)),
        ]

    @property
    def parts(self) -> dict[str, tuple[list[Case], list[PlainPass]]]:
        """What is launched and plain by the branch of a captured update that has it (`fastflow.branches`); "" is what
        all others wait for, or what waits for them."""
        walk, loss, flow, bc_flow = self.launched
        next_action, onestep, value, climbed = self.plain
        return {
            "": ([walk, loss], [next_action]),
            "distilled critic": ([], [value]),
            "actor": ([flow], [onestep, climbed]),
            "bc flow": ([bc_flow], []),
        }

    @property
    def plain_flops(self) -> int:
        """FLOPs of its plain networks: the distilled critic and the one-step actor, forward and back."""
        c = self.config()
        o, a, b, s = self.obs_dim, self.action_dim, c.batch_size, c.noise_samples
        value = sum(i * j for i, j in _pairs(o + a, *c.value_hidden_dims, 1))
        value_input = value - (o + a) * c.value_hidden_dims[0]
        onestep = sum(i * j for i, j in _pairs(o + a, *c.actor_hidden_dims, a))
        onestep_input = onestep - (o + a) * c.actor_hidden_dims[0]
        plain = b * s * onestep + b * (2 * onestep + onestep_input)
        plain += c.num_ensembles * b * (2 * value + value_input)
        # The actor's value term: forward, and back to the action alone.
        plain += c.num_ensembles * b * 2 * value
        return 2 * plain

    @property
    def flops(self) -> int:
        """Unavoidable FLOPs of one update: matrix products alone, see the module's docstring."""
        return sum(case.flops for case in self.operators) + self.plain_flops

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


def _loss(name: str, title: str, kind: str, spec: ff.FieldSpec, batch: int, *rest: Any, **options: Any) -> Case:
    return Case(name, title, kind, spec, batch, *rest, gradient=PARAMETERS, **options)


def _named(*cases: Case) -> dict[str, Case]:
    return {case.name: case for case in cases}


NUM_STEPS = (1, 2, 4, 8, 16, 32, 64)
# Rows per net of the figure over rows, those of the cases with a goal among them.
NUM_ROWS = (64, 256, 512, 1024, 2048, 4096, 8192)

# What a floq or FQL update consists of.
FLOQ_CASES = _named(
    _floq_walk(2048),
    _loss("loss-2x2048", "floq loss with gradients, 2 nets x 256 rows x 8 samples, 4x512", "matching", FLOQ, 256, 8),
    _floq_walk(256),
    _floq_walk(8192),
    Case("actor-walk-256", "FQL actor walk, 256 rows, 4x512, K=10", "integrate", FQL_ACTOR, 256, None, 10),
    _loss("actor-loss-256", "FQL actor loss with gradients, 256 rows, 4x512", "matching", FQL_ACTOR, 256),
    Case("one-row", "control by one row: FQL actor walk, 4x512, K=10", "integrate", FQL_ACTOR, 1, None, 10),
    Case("demo-walk", "demo critic walk, 2 nets x 256 rows, 2x64, K=8", "integrate", DEMO_CRITIC, 256, None, 8),
    _loss("demo-loss", "demo critic loss with gradients, 2 nets x 256 rows, 2x64", "matching", DEMO_CRITIC, 256),
    *(_floq_walk(2048, k, f"walk-2x2048-k{k}") for k in NUM_STEPS if k != 8),
    *(_floq_walk(rows) for rows in NUM_ROWS if rows not in (256, 2048, 8192)),
)

# Gradients through walks, and the fields of other papers.
PAPER_CASES = _named(
    dataclasses.replace(
        _floq_walk(2048, name="walk-to-actions-2x2048"),
        title="floq walk and its gradient to cond alone, parameters frozen, 2 nets x 2048 rows, 4x512, K=8",
        gradient=("cond",),
    ),
    dataclasses.replace(
        _floq_walk(2048, name="walk-backward-2x2048"),
        title="floq walk and its gradients to cond and all parameters, 2 nets x 2048 rows, 4x512, K=8",
        gradient=("cond", "parameters"),
    ),
    Case("fpo-walk-2048", "FPO sampler, 2048 environments, 4x32, K=10", "integrate", FPO, 2048, None, 10),
    Case("fpo-plus-walk-4096", "FPO++ sampler, 4096 environments, 3x256, K=64", "integrate", FPO_PLUS, 4096, None, 64),
    _loss(
        "fpo-loss-30720x8",
        "FPO loss of 30720 rows x 8 pairs with gradients by a weight per pair, 4x32",
        "matching",
        FPO,
        30720,
        8,
        pairs=True,
    ),
    Case(
        "td-walk-1024",
        "TD-Flow walk, 1024 rows to end times of their own, FiLM U-Net 3x512, midpoint, K=10",
        "integrate",
        TD_FLOW,
        1024,
        None,
        10,
        method="midpoint",
        end_times=True,
    ),
    _loss("td-loss-1024", "TD-Flow loss with gradients, 1024 rows, FiLM U-Net 3x512", "velocity", TD_FLOW, 1024),
    Case(
        "resnet-walk-2x2048",
        "floq ResNet walk, 2 nets x 2048 rows, 1 + 2x2 layers of 512, HL-Gauss, K=8",
        "integrate",
        FLOQ_RESNET,
        2048,
        None,
        8,
    ),
)

CASES = FLOQ_CASES | PAPER_CASES

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
