"""An agent's update as one launch: its gradient step captured as a CUDA graph, its losses compiled.

A gradient step (`gradient_step` of every agent) draws noise, computes losses and gradients, moves the weights by Adam
and the targets by their average. All of that is a few hundred kernels, whose launches take longer than they do
themselves where networks are small; a graph of them is launched at once. What changes over time on the host stays
outside: learning rates are written into the tensors that a graph reads, updates are counted behind it, checks come
before it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow import branches
from fastflow.agents.descent import GradientStep, hold_rates

__all__ = ["GraphedUpdate", "capture_on_cuda", "make_update"]

Capture = Callable[[Callable[[], Tensor], torch.Generator, int], tuple[Callable[[], None], Tensor]]
"""From a function without arguments, the generator that it draws from and how often to run it first, to what runs it
again and the tensor that then holds its result."""


def capture_on_cuda(
    function: Callable[[], Tensor], generator: torch.Generator, warmup: int
) -> tuple[Callable[[], None], Tensor]:
    """Captures `function` as a `torch.cuda.CUDAGraph` on the device of `generator`.

    Args:
        function: what it allocates is made anew at every call, or lives longer than the graph.
        generator: registered with the graph, so that every replay draws new numbers and moves it on.
        warmup: runs before the capture, on a side stream: they compile kernels and make what is made once.

    Returns:
        What replays the graph, and the tensor that holds the result after a replay.
    """
    device = generator.device
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            result = function()
    return graph.replay, result


class _Captured(NamedTuple):
    """A gradient step of one shape: where its batch is put, what runs it, and its metrics with their dtypes."""

    batch: dict[str, Tensor]
    replay: Callable[[], None]
    table: Tensor
    metrics: dict[str, torch.dtype]


class GraphedUpdate:
    """An agent's `update` whose gradient steps are replays of a CUDA graph; equal in result to `agent.update`.

    A step of a shape that was not seen before is captured: it is run a few times and all that it changed (weights,
    moments, targets, step counts, generator) is put back, so those runs leave no trace. Its batch is copied into the
    graph's own tensors at every call. On-policy agents have a graph of their minibatches.

    Besides the shapes of a batch, which parameters learn is part of what was captured: where floq's
    `freeze_features_at` stops some, another graph is made. torch's settings (precision of products, autocast) are those
    of the first call. Between two calls the agent may be used in every other way (`update`, `act`, `validate`,
    `state_dict`, `load_state_dict`), but its tensors must stay where they are: no `networks.to(...)`.

    Args:
        agent: any of fastflow's, on a CUDA device.
        example_batch: as for `agent.update`, to capture its shapes now; the agent is afterwards as it was. None
            captures at the first call.
        step: in place of `agent.gradient_step`, such as with compiled losses (`make_update`).
        warmup: runs before a capture, at least 1.
        max_graphs: most graphs that are kept; each holds the memory of a gradient step.
        branched: what the actor and the critic learn, and other parts that do not need each other, are branches of the
            graph, which a GPU may run side by side (`fastflow.branches`).
        capture: what makes a graph, in place of `capture_on_cuda`; the agent may then be elsewhere.

    Raises:
        ValueError: an agent that is not on CUDA, warmup < 1, max_graphs < 1; a call with a new shape when there are
            `max_graphs` graphs. What `agent.update` raises for a batch that does not fit.
    """

    def __init__(
        self,
        agent: Any,
        example_batch: Mapping[str, Tensor] | None = None,
        *,
        step: GradientStep | None = None,
        warmup: int = 3,
        max_graphs: int = 8,
        branched: bool = True,
        capture: Capture | None = None,
    ) -> None:
        if capture is None and agent.device.type != "cuda":
            raise ValueError(f"GraphedUpdate: agent must be on a CUDA device, got one on {agent.device}")
        for name, value in (("warmup", warmup), ("max_graphs", max_graphs)):
            if value < 1:
                raise ValueError(f"GraphedUpdate: {name} must be at least 1, got {value}")
        self.agent = agent
        self.max_graphs = max_graphs
        self._step: GradientStep = agent.gradient_step if step is None else step
        self._warmup = warmup
        self._branched = branched
        self._capture: Capture = capture_on_cuda if capture is None else capture
        self._graphs: dict[Hashable, _Captured] = {}
        hold_rates(agent.optimizer, agent.device)
        if example_batch is not None:
            before = agent.state_dict()
            agent.update_by(self._replay, example_batch)
            agent.load_state_dict(before)

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One update, as `agent.update(batch)`. The metrics are new tensors, which later calls leave alone."""
        metrics: dict[str, Tensor] = self.agent.update_by(self._replay, batch)
        return metrics

    def _replay(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        learns = tuple(p.requires_grad for group in self.agent.optimizer.param_groups for p in group["params"])
        key = (learns, *((name, x.shape, x.dtype) for name, x in batch.items()))
        captured = self._graphs.get(key)
        if captured is None:
            if len(self._graphs) == self.max_graphs:
                shapes = {name: list(x.shape) for name, x in batch.items()}
                raise ValueError(
                    f"GraphedUpdate: a graph is for one shape of batch, and there are {self.max_graphs} already "
                    f"(max_graphs); got another, {shapes}"
                )
            captured = self._graphs[key] = self._make(batch)
        torch._foreach_copy_(list(captured.batch.values()), list(batch.values()))
        captured.replay()
        # The next replay overwrites the table.
        values = captured.table.clone().unbind()
        return {name: value.to(dtype) for (name, dtype), value in zip(captured.metrics.items(), values, strict=True)}

    def _make(self, batch: Mapping[str, Tensor]) -> _Captured:
        own = {name: x.detach().clone() for name, x in batch.items()}
        metrics: dict[str, torch.dtype] = {}

        def function() -> Tensor:
            found = self._step(own)
            metrics.update((name, value.dtype) for name, value in found.items())
            return torch.stack(list(found.values()))

        with _put_back(self.agent), branches.allowed(self._branched):
            replay, table = self._capture(function, self.agent.generator, self._warmup)
        return _Captured(own, replay, table, metrics)


@contextlib.contextmanager
def _put_back(agent: Any) -> Iterator[None]:
    """Undoes what gradient steps within the block do to an agent: not by its `load_state_dict`, which is for states
    between two updates."""
    tensors = [*agent._tensors().values(), *(moments["step"] for moments in agent.optimizer.state.values())]
    copies = [x.detach().clone() for x in tensors]
    noise = agent.generator.get_state()
    try:
        yield
    finally:
        agent.generator.set_state(noise)
        with torch.no_grad():
            for x, copy in zip(tensors, copies, strict=True):
                x.copy_(copy)


def make_update(
    agent: Any, *, compile: bool = False, cuda_graph: bool = False, backend: str = "inductor"
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """What a training loop calls in place of `agent.update`.

    Args:
        agent: any of fastflow's.
        compile: the losses as one graph of `torch.compile`, with the same noise as without and results that differ by
            rounding alone. Of agents whose losses are one function: floq, fql, fql-iqn, td2-cfm.
        cuda_graph: see `GraphedUpdate`.
        backend: of `torch.compile`.

    Raises:
        ValueError: an agent that cannot be compiled; `cuda_graph` and an agent that is not on CUDA.
    """
    step = agent.gradient_step
    if compile:
        if not getattr(agent, "compiles", False):
            raise ValueError(f"compile: expected an agent whose losses are one function, got a {type(agent).__name__}")
        step = functools.partial(step, losses=torch.compile(agent.losses, fullgraph=True, backend=backend))
    if cuda_graph:
        return GraphedUpdate(agent, step=step)
    if compile:
        return functools.partial(agent.update_by, step)
    update: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = agent.update
    return update
