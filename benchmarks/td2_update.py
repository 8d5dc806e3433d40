"""One whole update of TD^2-CFM, each way that the CPU table compares: fastflow, eager PyTorch, torch.compile, JAX.

TD^2-CFM (Farebrother et al., arXiv:2503.09817) learns the discounted distribution of future states: with weight 1 -
gamma the flow regresses on the straight path to the next state, with weight gamma on the velocity of its own moving
average, at a point where that walked from the next state and action. Here it is a plain MLP on the state and action
sizes of a linear-Gaussian chain: the update of `fastflow train td2-cfm --env linear-gaussian`. fastflow runs its agent;
the rivals run `Td2Learner`, which states the same update on its own, from the same weights, batches and noise.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastflow as ff
from benchmarks.entrants import CPU, Entrant, Ready, bound, native
from benchmarks.measure import Timer
from benchmarks.rivals import jax_of, needs_compiler
from fastflow.agents.td2_cfm import Td2CfmAgent, Td2CfmConfig, Td2CfmNoise

CHECKED_UPDATES = 3
# Adam's first steps are signs: a gradient rounded to the other side of zero moves its weight by twice the step.
ALLOWED = {"fp32": 0.002, "bf16": 0.03}

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Td2Case:
    """Sizes and hyperparameters; D is the state's, the condition is state and action."""

    name: str = "update-td2"
    title: str = "whole TD^2-CFM update, state 2, action 2, 4x128, B=256, midpoint K=10"
    state_dim: int = 2
    action_dim: int = 2
    hidden: tuple[int, ...] = (128,) * 4
    batch_size: int = 256
    num_steps: int = 10
    gamma: float = 0.95
    tau: float = 0.01
    lr: float = 1e-3
    weight_decay: float = 0.01

    @property
    def spec(self) -> ff.FieldSpec:
        """The velocity network."""
        return ff.FieldSpec(
            self.state_dim,
            self.state_dim + self.action_dim,
            self.hidden,
            activation="silu",
            time_embedding=ff.PowerFourier(16),
        )

    def shrunk(self) -> Td2Case:
        """The case small enough for a test."""
        return dataclasses.replace(self, hidden=(16, 16), batch_size=8, num_steps=2)

    def batches(self, count: int = 8) -> list[dict[str, Tensor]]:
        """Transitions s' = 0.9 s + 0.1 a + noise: `cond` [B, C] of now, `next_state` [B, D], `next_cond` [B, C]."""
        source = torch.Generator().manual_seed(0)
        b, d, a = self.batch_size, self.state_dim, self.action_dim

        def batch() -> dict[str, Tensor]:
            state, action, next_action = (torch.randn(b, n, generator=source) for n in (d, a, a))
            drift = 0.1 * action[:, :d] if a >= d else 0.0
            next_state = 0.9 * state + drift + 0.1 * torch.randn(b, d, generator=source)
            cond, next_cond = torch.cat([state, action], -1), torch.cat([next_state, next_action], -1)
            return {"cond": cond, "next_state": next_state, "next_cond": next_cond}

        return [batch() for _ in range(count)]


class Td2Learner:
    """The field, its moving average and AdamW.

    Args:
        case: sizes and hyperparameters.
        backend, precision: see `fastflow.integrate`.
        dtype: of everything.
    """

    def __init__(self, case: Td2Case, backend: str, precision: str | None, dtype: torch.dtype = torch.float32) -> None:
        self.case, self.dtype = case, dtype
        self.options: dict[str, Any] = {"backend": backend, "precision": precision}
        self.field = ff.VelocityField(case.spec)
        # In float32 whatever the dtype, so that all begin alike.
        self.field.reset_parameters(torch.Generator().manual_seed(0))
        self.field.to(dtype)
        self.target = copy.deepcopy(self.field).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.field.parameters(), lr=case.lr, weight_decay=case.weight_decay, fused=True
        )
        self.generator = torch.Generator().manual_seed(1)
        self.losses: Callable[..., tuple[Tensor, Tensor]] = self.plain_losses

    def noise(self) -> tuple[Tensor, Tensor]:
        """x_0 [B, D] from N(0, I) and t [B] from U(0, 1)."""
        b, d = self.case.batch_size, self.case.state_dim
        x_0 = torch.randn(b, d, generator=self.generator)
        return x_0.to(self.dtype), torch.rand(b, generator=self.generator).to(self.dtype)

    def plain_losses(self, batch: Batch, x_0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The direct and the bootstrapped loss, summed over D and averaged over rows, without their weights."""
        options = {"dim_reduction": "sum", **self.options}
        direct = ff.flow_matching_loss(self.field, x_0, batch["next_state"], t, batch["cond"], **options)
        with torch.no_grad():
            steps = {"num_steps": self.case.num_steps, "method": "midpoint", "t_1": t}
            x_t = ff.integrate(self.target, x_0, batch["next_cond"], **steps, **self.options)
            velocity = self.target(x_t, t, batch["next_cond"])
        return direct, ff.velocity_matching_loss(self.field, x_t, t, velocity, batch["cond"], **options)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One update; the two losses and their weighted sum."""
        gamma = self.case.gamma
        direct, bootstrap = self.losses(batch, *self.noise())
        loss = (1 - gamma) * direct + gamma * bootstrap
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.field.parameters()), self.case.tau)
        return {"direct": direct.detach(), "bootstrap": bootstrap.detach(), "loss": loss.detach()}


class Td2Agent(Td2CfmAgent):
    """fastflow's agent in a learner's place: its weights, and for the updates that are checked its noise.

    Args:
        learner: sizes, hyperparameters, weights and noise.
    """

    def __init__(self, learner: Td2Learner) -> None:
        case = learner.case
        names = ("hidden", "batch_size", "num_steps", "gamma", "tau", "lr", "weight_decay")
        given: dict[str, Any] = {name: getattr(case, name) for name in names} | learner.options
        config = Td2CfmConfig(architecture="mlp", activation="silu", adam_eps=1e-8, **given)
        super().__init__(config, case.state_dim, case.action_dim, dtype=learner.dtype)
        self.online.field.load_state_dict(learner.field.state_dict())
        self.target.field.load_state_dict(learner.target.state_dict())
        self.noises = iter([learner.noise() for _ in range(CHECKED_UPDATES)])

    def sample_noise(self, batch: Batch, generator: torch.Generator | None = None) -> Td2CfmNoise:
        """The learner's noise, then the agent's own."""
        given = next(self.noises, None)
        if given is None:
            return super().sample_noise(batch, generator)
        x_0, t = given
        return Td2CfmNoise(source=x_0, fresh=x_0, time=t, mixture=t, horizon=t)

    def batch(self, batch: Batch) -> dict[str, Tensor]:
        """A learner's batch as agents take it."""
        sizes = (self.obs_dim, self.action_dim)
        (state, action), (next_state, next_action) = (batch[key].split(sizes, -1) for key in ("cond", "next_cond"))
        found = {"observations": state, "actions": action, "next_observations": next_state}
        return {name: x.contiguous() for name, x in (*found.items(), ("next_actions", next_action))}


def entrants(case: Td2Case, ways: Sequence[tuple[str, str, str]]) -> Iterator[Entrant]:
    """Entrants for (rival, variant, precision)."""
    batches = case.batches()
    exact: list[dict[str, float]] = []
    eager: dict[str, dict[str, float]] = {}

    def prepare(rival: str, variant: str, precision: str) -> Ready:
        turn, finish, note = itertools.cycle(batches), Timer(CPU).finish, ""
        if not exact:
            doubled = [{name: x.double() for name, x in batch.items()} for batch in batches]
            exact.extend(_first(Td2Learner(case, "reference", None, torch.float64).update, doubled))
        if precision not in eager:
            eager[precision] = _errors(_first(Td2Learner(case, "reference", precision).update, batches), exact)
        learner = Td2Learner(case, "auto" if rival == "fastflow" else "reference", precision)
        update: Callable[..., Any] = learner.update
        given = batches
        if rival == "jax":
            jax = jax_of(CPU)
            from benchmarks.jax_network import array
            from benchmarks.jax_td2 import JaxTd2

            noises = [tuple(map(array, learner.noise())) for _ in range(CHECKED_UPDATES)]
            update, finish = JaxTd2(learner, precision, variant == "unrolled").update, jax.block_until_ready
            arrays = [{name: array(x) for name, x in batch.items()} for batch in batches]
            losses = [_floats(update(*pair)) for pair in zip(arrays, noises)]
            turn = itertools.cycle(arrays)
        else:
            if rival == "compile":
                needs_compiler(CPU)
                learner.losses = torch.compile(learner.plain_losses, fullgraph=True, dynamic=False)
                note = "compiled: both losses with the target's walk, forward and backward, as one graph"
            elif rival == "fastflow":
                fused = Td2Learner(case, "fused", precision)
                note = native(lambda: fused.losses(batches[0], *fused.noise()))
                agent = Td2Agent(learner)
                update, given = agent.update, [agent.batch(batch) for batch in batches]
                turn = itertools.cycle(given)
            losses = _first(update, given)
        found = _errors(losses, exact)
        accurate = max(found.values()) <= ALLOWED[precision]
        return Ready(lambda: update(next(turn)), finish, found, eager[precision], accurate, note)

    return bound(prepare, ways)


def _first(update: Callable[[Batch], Any], batches: list[dict[str, Tensor]]) -> list[dict[str, float]]:
    return [_floats(update(batch)) for batch in batches[:CHECKED_UPDATES]]


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name.removesuffix("_loss"): float(value) for name, value in metrics.items()}


def _errors(losses: list[dict[str, float]], exact: list[dict[str, float]]) -> dict[str, float]:
    """The largest relative error of each loss over the first updates."""
    pairs = list(zip(losses, exact, strict=True))
    return {name: max(abs(a[name] - b[name]) / abs(b[name]) for a, b in pairs) for name in ("direct", "bootstrap")}
