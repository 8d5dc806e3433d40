"""Whole updates of floq, each way that the CPU table compares: fastflow, eager PyTorch, torch.compile, JAX.

Every way starts from the same weights and does its first updates on the same batches and noise; its losses there are
compared with those of the reference in float64. The clock then sees updates that draw their noise themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import UpdateCase
from benchmarks.entrants import CPU, Entrant, Ready, bound, native
from benchmarks.measure import Timer
from benchmarks.rivals import jax_of, needs_compiler
from fastflow.agents.floq import FloqAgent, FloqNoise

# The first loss tells of the forward pass, the next ones of gradients and Adam.
CHECKED_UPDATES = 3
CHECKED = ("critic/critic_loss", "actor/actor_loss")
# Adam's first steps are signs: a gradient rounded to the other side of zero moves its weight by twice the step.
ALLOWED = {"fp32": 0.005, "bf16": 0.03}

Losses = list[dict[str, float]]


class GivenNoise(FloqAgent):
    """An agent whose updates take the noise that they are given, in its own dtype."""

    noises: Iterator[FloqNoise] = iter(())

    def sample_noise(self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> FloqNoise:
        """The next noise."""
        noise = next(self.noises)
        given = {name: value for name, value in vars(noise).items() if value is not None}
        return FloqNoise(**{name: value.to(self.dtype) for name, value in given.items()})


def entrants(case: UpdateCase, ways: Sequence[tuple[str, str, str]]) -> Iterator[Entrant]:
    """Entrants for (rival, variant, precision)."""
    batches = case.batches(CPU)
    noises = first_noises(case, batches)
    exact: Losses = []
    eager: dict[str, dict[str, float]] = {}

    def checked(losses: Losses, precision: str) -> tuple[dict[str, float], dict[str, float], bool]:
        if not exact:
            exact.extend(exact_losses(case, batches, noises))
        if precision not in eager:
            agent = case.agent(CPU, "reference", precision)
            eager[precision] = errors(_first(agent.update, batches), exact)
        found = errors(losses, exact)
        return found, eager[precision], max(found.values()) <= ALLOWED[precision]

    def prepare(rival: str, variant: str, precision: str) -> Ready:
        turn, finish, note = itertools.cycle(batches), Timer(CPU).finish, ""
        if rival == "jax":
            jax = jax_of(CPU)
            from benchmarks import jax_floq

            agent = jax_floq.JaxFloq(case.agent(CPU, "reference"), precision, unrolled=variant == "unrolled")
            given = [(jax_floq.arrays(batch), jax_floq.arrays(noise)) for batch, noise in zip(batches, noises)]
            losses = [_floats(agent.update(batch, noise)) for batch, noise in given]
            turn = itertools.cycle([jax_floq.arrays(batch) for batch in batches])
            update, finish = agent.update, jax.block_until_ready
        else:
            agent = case.agent(CPU, "auto" if rival == "fastflow" else "reference", precision)
            update = agent.update
            if rival == "compile":
                update, note = compiled_update(agent)
            elif rival == "fastflow":
                fused = case.agent(CPU, "fused", precision)
                note = native(lambda: fused.losses(batches[0], noises[0]))
            losses = _first(update, batches)
        ready = checked(losses, precision)
        return Ready(lambda: update(next(turn)), finish, *ready, note)

    return bound(prepare, ways)


def compiled_update(agent: FloqAgent) -> tuple[Callable[[Mapping[str, Tensor]], Any], str]:
    """The update with its losses, forward and backward, by torch.compile, and words that say what was compiled.

    The noise, Adam's fused kernel and the moving average stay as they are in the agent.

    Raises:
        Skipped: no C++ compiler.
    """
    needs_compiler(CPU)
    note = "compiled: both losses with all walks, forward and backward, as one graph; fused Adam beside it"
    return update_by(agent, torch.compile(agent.losses, fullgraph=True, dynamic=False)), note


def update_by(agent: FloqAgent, losses: Callable[..., Any]) -> Callable[[Mapping[str, Tensor]], Any]:
    """`FloqAgent.update` with other losses."""

    def update(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        critic_loss, actor_loss, metrics = losses(batch, agent.sample_noise(batch))
        agent.optimizer.zero_grad(set_to_none=True)
        (critic_loss + actor_loss).backward()
        networks = agent.networks
        target, online = list(networks.target_floq.parameters()), list(networks.floq.parameters())
        with torch.no_grad():
            torch._foreach_lerp_(target, online, agent.config.tau)
        agent.optimizer.step()
        return metrics

    return update


# The check ----------------------------------------------------------------------------------------------------------


def first_noises(case: UpdateCase, batches: list[dict[str, Tensor]]) -> list[FloqNoise]:
    """The noise that every agent of the case draws for its first updates."""
    agent = case.agent(CPU, "reference")
    return [agent.sample_noise(batch) for batch in batches[:CHECKED_UPDATES]]


def exact_losses(case: UpdateCase, batches: list[dict[str, Tensor]], noises: list[FloqNoise]) -> Losses:
    """The losses of the first updates by the reference in float64."""
    agent = GivenNoise(
        case.config("reference"), case.obs_dim, case.action_dim, (-1.0, 0.0), seed=0, dtype=torch.float64
    )
    agent.noises = iter(noises)
    return _first(agent.update, [{name: x.double() for name, x in batch.items()} for batch in batches])


def errors(losses: Losses, exact: Losses) -> dict[str, float]:
    """The largest relative error of each checked loss over the first updates."""
    return {
        name: max(abs(a[name] - b[name]) / max(abs(b[name]), 1e-3) for a, b in zip(losses, exact, strict=True))
        for name in CHECKED
    }


def _first(update: Callable[[Mapping[str, Tensor]], Any], batches: list[dict[str, Tensor]]) -> Losses:
    return [_floats(update(batch)) for batch in batches[:CHECKED_UPDATES]]


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
