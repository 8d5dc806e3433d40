"""Whole updates on a GPU, each way that its table compares: fastflow's as it is called and as a CUDA graph, eager
PyTorch, torch.compile with CUDA graphs of its own or inside one that holds the whole update, JAX.

All begin at the same weights and, but for JAX, draw the same noise; the losses of the first update are compared with
eager PyTorch's. The clock then sees updates on batches in turn.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.cases import PARAMETERS, TD_FLOW, UPDATES, Case, PlainPass, UpdateCase
from benchmarks.floq_update import update_by
from benchmarks.measure import Entry, ratios
from benchmarks.rivals import Skipped, capture, global_precision, jax_of, needs_compiler, quiet_compiler
from fastflow.agents.td2_cfm import Td2CfmAgent, Td2CfmConfig
from fastflow.graphs import GraphedUpdate

if TYPE_CHECKING:
    from benchmarks.gpu import Run

Batch = Mapping[str, Tensor]
Update = Callable[[Batch], Any]
FIRST_RIVALS = ("fused", "fused + graph", "eager")
COMPILED_RIVALS = ("compile max-autotune", "compile + graph")
JAX_RIVALS = ("jax", "jax unrolled")
# How far the losses of a first update may lie apart, of themselves.
ALLOWED = {"bf16": 0.02, "tf32": 0.005, "fp32": 0.005}


@dataclass(frozen=True)
class Td2UpdateCase:
    """Whole updates of TD²-CFM with the paper's U-Net, on a state and an action of these sizes."""

    name: str = "update-td2-unet"
    title: str = "whole TD²-CFM update, B=1024, FiLM U-Net 3x512, 10 midpoint steps"
    state_dim: int = TD_FLOW.state_dim
    action_dim: int = TD_FLOW.cond_dim - TD_FLOW.state_dim
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    losses = ("direct_loss", "bootstrap_loss")

    def config(self, backend: str | None = None, precision: str | None = None) -> Td2CfmConfig:
        """The agent's configuration."""
        return Td2CfmConfig(**self.options, backend=backend, precision=precision)  # type: ignore[arg-type]

    def agent(self, device: torch.device, backend: str | None = None, precision: str | None = None) -> Td2CfmAgent:
        """A new agent, the same weights for every backend."""
        return Td2CfmAgent(self.config(backend, precision), self.state_dim, self.action_dim, device=device, seed=0)

    def batches(self, device: torch.device, count: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
        """Synthetic transitions."""
        source = torch.Generator().manual_seed(seed)
        b = self.config().batch_size
        sizes = {"observations": self.state_dim, "actions": self.action_dim}
        sizes |= {f"next_{name}": size for name, size in sizes.items()}
        return [
            {name: torch.randn(b, size, generator=source).to(device) for name, size in sizes.items()}
            for _ in range(count)
        ]

    @property
    def operators(self) -> list[Case]:
        """The walks and losses of one update."""
        config, spec = self.config(), self.agent(torch.device("cpu")).online.field.spec
        b, k = config.batch_size, config.num_steps
        walk = Case("", "", "integrate", spec, b, None, k, method=config.method, end_times=True)
        # The target's velocity where its walk has ended, then both terms in one loss.
        return [
            walk,
            Case("", "", "velocity", spec, b),
            Case("", "", "velocity", spec, b, 2, gradient=PARAMETERS),
        ]

    @property
    def launched(self) -> list[Case]:
        """The same as they are launched."""
        return self.operators

    @property
    def parts(self) -> dict[str, tuple[list[Case], list[PlainPass]]]:
        """The same by the branch of a captured update, which has none."""
        return {"": (self.launched, [])}

    @property
    def flops(self) -> int:
        """Unavoidable FLOPs of one update."""
        return sum(case.flops for case in self.operators)

    def shrunk(self) -> Td2UpdateCase:
        """The case small enough for a test."""
        small = {"hidden": (32, 32), "cond_hidden": (32,), "time_hidden": (32,), "batch_size": 8, "num_steps": 2}
        return dataclasses.replace(self, options={**self.options, **small})


GPU_UPDATES: dict[str, UpdateCase | Td2UpdateCase] = {**UPDATES, Td2UpdateCase().name: Td2UpdateCase()}


def checked_losses(case: UpdateCase | Td2UpdateCase) -> tuple[str, ...]:
    """The metrics of an update that all ways have to agree on."""
    return ("critic/critic_loss", "actor/actor_loss") if isinstance(case, UpdateCase) else case.losses


# Ways ---------------------------------------------------------------------------------------------------------------


@dataclass
class Way:
    """One way to update, ready to be timed.

    Args:
        update: takes a batch; may return before it is done.
        batches: as `update` takes them.
        mode: "graph" where a CUDA graph holds the whole update, else "call".
        first: the losses of a first update from the common weights and noise; None where it had to do others before.
        finish: waits for the last update's result; None for torch's own work.
    """

    update: Update
    batches: Sequence[Any]
    mode: str = "call"
    first: dict[str, float] | None = None
    finish: Callable[[Any], Any] | None = None


def td2_update_by(agent: Td2CfmAgent, losses: Callable[..., Any]) -> Update:
    """`Td2CfmAgent.update` with other losses."""
    target: list[Tensor] = list(agent.target.parameters())
    online: list[Tensor] = list(agent.online.parameters())

    def update(batch: Batch) -> dict[str, Tensor]:
        loss, metrics = losses(batch, agent.sample_noise(batch))
        agent.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        agent.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(target, online, agent.config.target_rate)
        found: dict[str, Tensor] = metrics
        return found

    return update


def captured_update(agent: Any, update: Update, example: Batch) -> Update:
    """An update as one CUDA graph: batches are copied in, noise is drawn within.

    Raises:
        Skipped: no GPU.
    """
    if agent.device.type != "cuda":
        raise Skipped("CUDA graphs need CUDA")
    for group in agent.optimizer.param_groups:
        group["capturable"] = True
    static = {name: x.clone() for name, x in example.items()}
    graph, metrics = capture(lambda: update(static), agent.generator)

    def replay(batch: Batch) -> Any:
        for name, x in static.items():
            x.copy_(batch[name])
        graph.replay()
        return metrics

    return replay


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def prepare(case: UpdateCase | Td2UpdateCase, rival: str, precision: str, device: torch.device) -> Way:
    """One way, compiled and with its first update done.

    Raises:
        Skipped: it cannot run here; the message says why.
    """
    batches = case.batches(device)
    if rival in ("fused", "eager", "fused + graph"):
        fused = "fused" if device.type == "cuda" else "auto"
        agent = case.agent(device, "reference" if rival == "eager" else fused, precision)
        if rival != "fused + graph":
            return Way(agent.update, batches, first=_floats(agent.update(batches[0])))
        if device.type != "cuda":
            raise Skipped("CUDA graphs need CUDA")
        step = GraphedUpdate(agent, batches[0])
        step(batches[0])
        return Way(step, batches, "graph")
    if rival.startswith("compile"):
        return _compiled(case, rival, precision, device, batches)
    return _jax(case, rival, precision, device, batches)


def _compiled(
    case: UpdateCase | Td2UpdateCase, rival: str, precision: str, device: torch.device, batches: list[dict[str, Tensor]]
) -> Way:
    """Losses with all walks, forward and backward, by torch.compile; noise, Adam and moving average beside them."""
    if device.type != "cuda":
        raise Skipped("compared on CUDA; benchmarks.cpu has updates by torch.compile on a CPU")
    needs_compiler(device)
    agent = case.agent(device, "reference", precision)
    mode = "max-autotune-no-cudagraphs" if rival == "compile + graph" else "max-autotune"
    losses = torch.compile(agent.losses, fullgraph=True, dynamic=False, mode=mode)
    update = td2_update_by(agent, losses) if isinstance(agent, Td2CfmAgent) else update_by(agent, losses)
    if rival == "compile + graph":
        return Way(captured_update(agent, update, batches[0]), batches, "graph")

    def marked(batch: Batch) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return update(batch)

    return Way(marked, batches, first=_floats(marked(batches[0])))


def _jax(
    case: UpdateCase | Td2UpdateCase, rival: str, precision: str, device: torch.device, batches: list[dict[str, Tensor]]
) -> Way:
    if not isinstance(case, UpdateCase):
        raise Skipped("the JAX rival has no FiLMUNet")
    jax = jax_of(device)
    from benchmarks import jax_floq

    agent = case.agent(device, "reference")
    # On a GPU the plain networks beside the walks multiply in TF32, as everybody's do.
    plain = "fp32" if device.type == "cpu" else "tf32"
    rivals = jax_floq.JaxFloq(agent, precision, unrolled=rival == "jax unrolled", plain=plain)
    arrays = [jax_floq.arrays(batch) for batch in batches]
    first = _floats(rivals.update(arrays[0], jax_floq.arrays(agent.sample_noise(batches[0]))))
    # The clock sees updates that draw their noise, which are compiled anew.
    jax.block_until_ready(rivals.update(arrays[0]))
    return Way(rivals.update, arrays, first=first, finish=jax.block_until_ready)


# The measurement ----------------------------------------------------------------------------------------------------


def measure_update(run: Run, name: str, precision: str, rivals: Sequence[str], seconds_per_rival: float = 60.0) -> None:
    """Whole updates per second by some rivals, interleaved; rows go to the report.

    First losses must agree with eager PyTorch's, once those are known.
    """
    case = GPU_UPDATES[name].shrunk() if run.arguments.small else GPU_UPDATES[name]
    at = run.report["updates"].setdefault(
        name,
        {
            "title": GPU_UPDATES[name].title,
            "flops": case.flops,
            "batch_size": case.config().batch_size,
            "eager_first_losses": {},
            "results": [],
        },
    )
    if any(rival.startswith("compile") for rival in rivals):
        torch.compiler.reset()
    ways: dict[str, Way] = {}

    def get_ready(rival: str) -> None:
        with quiet_compiler():
            ways[rival] = prepare(case, rival, precision, run.device)

    with global_precision(precision):
        for rival in rivals:
            if not run.dead:
                where = f"{name} {precision} {rival}"
                run.attempt(where, functools.partial(get_ready, rival), rival == "fused", seconds_per_rival)
        differences = _agreement(run, name, checked_losses(case), precision, ways)
        if run.dead or not ways:
            return
        timings = run.timer.measure([_entry(rival, way, run) for rival, way in ways.items()], run.rounds)
    fused = {ways[rival].mode: timings[rival] for rival in ("fused", "fused + graph") if rival in timings}
    group = 1 + max((row["group"] for row in at["results"]), default=0)
    for rival, timing in timings.items():
        row = {"group": group, "rival": rival.removesuffix(" + graph") if "fused" in rival else rival}
        row |= {"mode": ways[rival].mode, "precision": precision, **timing.as_json()}
        row |= {"updates_per_second": 1 / timing.median, "tflops": 1e-12 * case.flops / timing.median}
        row["loss_difference"] = differences.get(rival)
        row["vs_fused"] = {mode: ratios(timing, other) for mode, other in fused.items()}
        at["results"].append(row)


def _entry(rival: str, way: Way, run: Run) -> Entry:
    turn = itertools.cycle(way.batches)
    return Entry(rival, lambda: way.update(next(turn)), way.finish or run.timer.finish)


def _agreement(run: Run, name: str, losses: Sequence[str], precision: str, ways: Mapping[str, Way]) -> dict[str, float]:
    """How far each way's first losses lie from eager PyTorch's, of themselves; too far is a failure."""
    firsts = {rival: way.first for rival, way in ways.items() if way.first is not None}
    known = run.report["updates"][name]["eager_first_losses"]
    if "eager" in firsts:
        known[precision] = {key: firsts["eager"][key] for key in losses}
    if precision not in known:
        return {}
    eager, allowed = known[precision], ALLOWED[precision]
    found = {
        rival: max(abs(first[key] - eager[key]) / max(abs(eager[key]), 1e-3) for key in losses)
        for rival, first in firsts.items()
    }
    for rival, difference in found.items():
        if not difference <= allowed:
            error = f"losses of the first update differ by {difference:.2e} of themselves, allowed {allowed}"
            run.fail(f"{name} {precision} {rival}: agreement", f"{error}: {firsts}", grave=rival == "fused")
    return found
