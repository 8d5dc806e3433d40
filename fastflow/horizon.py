"""Learning what a policy will visit: the data of a world, and the truth about its futures as the test."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from fastflow.distances import MAX_EMD_SAMPLES, emd, mmd, sliced_wasserstein
from fastflow.errors import UserError
from fastflow.info import versions
from fastflow.record import Run, absolute, load_agent, mean_and_std, spread, tensor_fingerprint, write_json
from fastflow.settings import AgentConfig, WorldSettings
from fastflow.successor import SuccessorFlow
from fastflow.task import Task
from fastflow.worlds import World, make_world
from fastflow.worlds.files import transitions_of

__all__ = ["HorizonSettings", "HorizonTask", "Truth", "compare", "evaluate_runs", "make_truth"]

_SAMPLES = 64
_CHUNK = 65_536  # rows whose next actions are computed together
# Rows with futures by rollout for Monte-Carlo training, and how many each has.
_POOL, _POOL_FUTURES = 20_000, 32
_NLL_SAMPLES = 256
_EXACT_DIM = 8  # up to here a likelihood takes the exact trace
_PROJECTIONS = 128
# The velocity of the straight path is compared up to here: towards t = 1 the closed form is that of almost a point.
_LATEST = 0.98


@dataclasses.dataclass(frozen=True)
class HorizonSettings(WorldSettings[AgentConfig]):
    """Trains a model of all states that a policy will visit, and leaves a run folder (config.json, train.csv, eval.csv,
    checkpoints).

    The env is one of fastflow's worlds: linear-gaussian, circle, pointmaze-arena, -medium, -large, -giant or
    pointmass-maze. Ctrl-C saves a checkpoint and prints the command that goes on from it, bit for bit.
    """

    policies: Path | None = None
    """Run folder of agent fb, whose policies are the family instead of the world's own (the paper's planning)."""
    eval_states: int = 8
    """States at which an evaluation compares samples with true futures (the paper: 64)."""
    eval_samples: int = 1024
    """Samples per state (the paper: 2048)."""

    fixed: ClassVar[tuple[str, ...]] = (*WorldSettings.fixed, "policies")
    least: ClassVar[Mapping[str, int]] = {**WorldSettings.least, "eval_states": 1, "eval_samples": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.eval_samples, int) and self.eval_samples > MAX_EMD_SAMPLES:
            raise ValueError(
                f"eval_samples: expected at most {MAX_EMD_SAMPLES}, got {self.eval_samples}: the costs of an exact "
                f"assignment would take {8 * self.eval_samples**2:,} bytes"
            )


class HorizonModel(Protocol):
    """What an evaluation needs of an agent."""

    device: torch.device

    @property
    def model(self) -> SuccessorFlow: ...


@dataclasses.dataclass(frozen=True)
class Truth:
    """What an evaluation compares with, for N pairs of a state and the target policy's action there.

    Attributes:
        states [N, D], actions [N, A], policies [N, W] or None: where futures start.
        futures, second [N, n, D]: two independent draws of n true futures each.
        values: Q [N] by task. floor: EMD [N] between the two draws, below which no model can be expected.
    """

    states: Tensor
    actions: Tensor
    policies: Tensor | None
    futures: Tensor
    second: Tensor
    values: dict[str, Tensor]
    floor: Tensor


class HorizonTask(Task):
    """What the training loop asks of a task, for a world and a target policy.

    Args:
        settings: of the run.
        device: where batches are made.
        arguments: of the agent as a checkpoint holds them; None computes them from the data.
        path: the run folder, for messages. out: called with lines of text.

    Attributes:
        world: the world. data: transitions by key, on `device`.
        facts: about the data, for config.json; `fingerprint` tells one dataset from another.
        arguments: what the agent is made with besides its configuration, as JSON values.

    Raises:
        UserError: an unknown world or policy, data that do not fit, a policy that lacks what the variant needs.
    """

    def __init__(
        self,
        settings: HorizonSettings[Any],
        device: torch.device,
        arguments: dict[str, Any] | None,
        path: Path,
        out: Callable[[str], None],
    ) -> None:
        self.settings, self.device = settings, device
        self.world = world_of(settings.env, settings.policies)
        self.policy = self._policy()
        self.family = self.policy == "all"
        if self.policy == "behaviour" and settings.agent.variant == "mc-cfm":
            raise UserError("variant mc-cfm needs rollouts under the target policy; policy behaviour has no act")
        self.data = {key: value.to(device) for key, value in self._load().items()}
        self.facts = {
            "name": settings.env,
            "path": absolute(settings.dataset_path),
            "rows": len(self.data["observations"]),
            "bytes": sum(value.nbytes for value in self.data.values()),
            "policy": self.policy,
            "fingerprint": tensor_fingerprint({**self.data, "policies": torch.tensor([*self.world.policies.values()])}),
        }
        self.arguments = self._arguments() if arguments is None else arguments
        self._target_actions()
        if self.policy == "behaviour":
            out("evaluation is skipped: policy behaviour cannot be asked for actions, so there are no true futures")

    @staticmethod
    def check_name(name: str) -> None:
        """Raises UserError for an unknown world."""
        make_world(name)

    def _policy(self) -> str:
        """The configured policy, by name."""
        asked, world = self.settings.agent.policy, self.world
        named = list(world.policies)
        if asked == "auto":
            return named[0]
        if asked == "all" and not world.policy_dim:
            raise UserError(
                f"policy all: {world.name} has one policy, {named[0]}, and nothing to tell policies apart by"
            )
        if asked not in ("all", "behaviour") and asked not in named:
            raise UserError(f"policy {asked}: unknown; {world.name} has auto, behaviour, all, {', '.join(named)}")
        return asked

    # Data -----------------------------------------------------------------------------------------------------------

    def _load(self) -> dict[str, Tensor]:
        settings = self.settings
        data = transitions_of(self.world, settings)
        keys = ["observations", "actions", "next_observations", "masks"]
        if self.policy == "behaviour":
            if "next_actions" not in data:
                raise UserError(
                    f"{settings.dataset_path}: policy behaviour needs 'next_actions', the data's own actions at the "
                    "next observations; this file has none"
                )
            keys.append("next_actions")
        return {key: data[key] for key in keys}

    def _arguments(self) -> dict[str, Any]:
        normalize = self.settings.agent.normalize
        arguments = {
            "obs_dim": self.world.state_dim,
            "action_dim": self.world.action_dim,
            "policy_dim": self.world.policy_dim if self.family else 0,
            "state_statistics": mean_and_std(self.data["next_observations"]) if normalize else None,
        }
        if self.family and normalize:
            draws = self.world.draw_policies(_CHUNK, torch.Generator().manual_seed(self.settings.data_seed))
            arguments["policy_statistics"] = mean_and_std(draws)
        return arguments

    def _target_actions(self) -> None:
        """The target policy's actions at all next states, once, where there is one policy."""
        if self.family or self.policy == "behaviour":
            return
        w = self.world.w(self.policy)
        rows = self.data["next_observations"].split(_CHUNK)
        self.data["next_actions"] = torch.cat([self.world.act(state, w) for state in rows])

    def sample(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A batch for the agent's `update`, rows drawn uniformly with replacement."""
        monte_carlo = self.settings.agent.variant == "mc-cfm"
        source = self._pool if monte_carlo and not self._draws_futures else self.data
        rows = len(source["observations"])
        index = torch.randint(rows, (batch_size,), generator=generator, device=self.device)
        batch = {key: value.index_select(0, index) for key, value in source.items() if key != "futures"}
        if self.family:
            if "policies" not in batch:
                batch["policies"] = self.world.draw_policies(batch_size, generator)
            batch["next_actions"] = self.world.act(batch["next_observations"], batch["policies"])
        if monte_carlo:
            batch["futures"] = self._futures(batch, source, index, generator)
        return batch

    @functools.cached_property
    def _draws_futures(self) -> bool:
        """Whether the world draws futures at once, without rollouts."""
        return type(self.world).futures is not World.futures

    def _futures(
        self, batch: dict[str, Tensor], source: dict[str, Tensor], index: Tensor, generator: torch.Generator
    ) -> Tensor:
        if self._draws_futures:
            w = batch.get("policies", self.world.w(self.policy) if not self.family else None)
            gamma = self.settings.agent.gamma
            return self.world.futures(batch["observations"], batch["actions"], w, gamma, 1, generator).squeeze(1)
        pick = torch.randint(_POOL_FUTURES, (len(index),), generator=generator, device=self.device)
        return source["futures"][index, pick]

    @functools.cached_property
    def _pool(self) -> dict[str, Tensor]:
        """Some of the rows, each with futures by rollout under the target policy."""
        generator = torch.Generator(self.device).manual_seed(self.settings.data_seed + 1)
        rows = spread(len(self.data["observations"]), _POOL).to(self.device)
        pool = {key: value[rows] for key, value in self.data.items()}
        w = None if self.family else self.world.w(self.policy)
        if self.family:
            w = pool["policies"] = self.world.draw_policies(len(rows), generator)
        gamma = self.settings.agent.gamma
        pool["futures"] = self.world.futures(pool["observations"], pool["actions"], w, gamma, _POOL_FUTURES, generator)
        return pool

    def samples(self) -> dict[str, Tensor]:
        """A few rows for figures."""
        rows = spread(len(self.data["observations"]), _SAMPLES).to(self.device)
        return {name: self.data[name][rows] for name in ("observations", "actions")}

    # Evaluation -----------------------------------------------------------------------------------------------------

    @property
    def evaluates(self) -> bool:
        """Whether the target policy can be rolled out."""
        return self.policy != "behaviour"

    @functools.cached_property
    def truth(self) -> Truth:
        """What evaluations compare with; the same for every run on this world, policy, gamma and data seed."""
        settings = self.settings
        w = policies_of(self.world, self.policy, settings.eval_states)
        return make_truth(
            self.world, w, settings.agent.gamma, settings.eval_states, settings.eval_samples, settings.data_seed
        )

    def evaluate(self, agent: HorizonModel, seed: int, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Metrics of samples against the truth (see `compare`); None if `should_stop` said so."""
        metrics = compare(agent.model, self.world, self.truth, seed, agent.device, should_stop)
        if metrics is not None and self.settings.agent.path != "straight":
            metrics.pop("velocity_mse", None)  # the closed form is that of the straight path
        return metrics

    def describe(self, metrics: dict[str, float]) -> str:
        """An evaluation in words."""
        text = f"EMD {metrics['emd']:.4f} (two true samples: {metrics['emd_floor']:.4f})"
        text += f", MSE(V) {metrics['value_mse']:.4g}, NLL/d {metrics['nll']:.3f}"
        return text + (f", velocity MSE {metrics['velocity_mse']:.4f}" if "velocity_mse" in metrics else "")


@torch.no_grad()
def make_truth(world: World, w: Tensor | None, gamma: float, num_states: int, num_samples: int, seed: int = 0) -> Truth:
    """True futures and values of a world's policies, at states where trajectories start, on the CPU.

    Args:
        world: the world.
        w: policies, [W] or [num_states, W]; None is the default one.
        gamma: discount.
        num_states: N. num_samples: n, futures per state. seed: of states and futures.
    """
    generator = torch.Generator().manual_seed(seed + 2)
    states = world.starts(num_states, generator)
    w = None if w is None else w.expand(num_states, -1)
    actions = world.act(states, w)
    futures, second = world.futures(states, actions, w, gamma, 2 * num_samples, generator).split(num_samples, 1)
    return Truth(
        states,
        actions,
        w,
        futures,
        second,
        {task: world.values(task, states, actions, w, gamma, generator) for task in world.tasks},
        torch.tensor([emd(a, b) for a, b in zip(second, futures)], dtype=torch.float64),
    )


@torch.no_grad()
def compare(
    model: SuccessorFlow,
    world: World,
    truth: Truth,
    seed: int,
    device: torch.device | str = "cpu",
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """A model's samples against true futures; every number is a mean over states.

    Returns:
        None if `should_stop`, asked once per state, said so. Else
        emd: earth mover's distance with Euclidean cost, exactly solved; emd_floor: that of two true samples;
        sliced_w1, mmd: cheaper distances; nll: negative log-likelihood of true futures per dimension, in nats;
        value_mse and value_mse.<task>: squared error of Q by the mean reward of the samples;
        velocity_mse: squared error of the field on the true straight path, mean over D, where the world knows it
        exactly and the model does not scale states.
    """
    generator = torch.Generator(device).manual_seed(seed)
    states, actions, futures = (x.to(device) for x in (truth.states, truth.actions, truth.futures))
    w = None if truth.policies is None or not model.policy_dim else truth.policies.to(device)
    n = futures.shape[1]
    samples = torch.cat(
        [
            model.sample(s, a, n, w=None if w is None else w[i : i + 1], generator=generator)
            for i, (s, a) in enumerate(zip(states.split(1), actions.split(1)))
        ]
    )
    per_state: dict[str, list[float]] = {"emd": [], "sliced_w1": [], "mmd": []}
    for mine, true in zip(samples.cpu(), truth.futures):
        if should_stop():
            return None
        directions = torch.Generator().manual_seed(seed)
        per_state["emd"].append(emd(mine, true))
        per_state["sliced_w1"].append(
            sliced_wasserstein(mine, true, num_projections=_PROJECTIONS, generator=directions)
        )
        per_state["mmd"].append(mmd(mine, true))
    metrics = {name: float(np.mean(values)) for name, values in per_state.items()}
    metrics["emd_floor"] = float(truth.floor.mean())
    errors = {}
    for task, value in truth.values.items():
        mine = world.reward(task, samples).mean(-1) / (1 - model.gamma)
        errors[task] = float((mine.cpu() - value).double().square().mean())
    metrics["value_mse"] = float(np.mean(list(errors.values())))
    metrics |= {f"value_mse.{task}": error for task, error in errors.items()}
    few = min(n, _NLL_SAMPLES)
    rows = [x.repeat_interleave(few, 0) for x in (states, actions)]
    own = None if w is None else w.repeat_interleave(few, 0)
    kind: dict[str, Any] = {} if model.state_dim <= _EXACT_DIM else {"divergence": "hutchinson", "probes": 8}
    log_prob = model.log_prob(futures[:, :few].flatten(0, 1), *rows, w=own, generator=generator, **kind)
    metrics["nll"] = -float(log_prob.double().mean()) / model.state_dim
    # The closed form is that of noise N(0, I) in raw coordinates; a model that scales states has another path.
    raw = not bool((model.state_mean != 0).any() or (model.state_std != 1).any())
    if world.exact and raw and type(model) is SuccessorFlow:
        metrics["velocity_mse"] = velocity_error(model, world, states, actions, futures, generator)
    return metrics


@torch.no_grad()
def velocity_error(
    model: SuccessorFlow, world: World, states: Tensor, actions: Tensor, futures: Tensor, generator: torch.Generator
) -> float:
    """Squared error of the velocity against the world's closed form, mean over D, on points of the true path with t
    uniform in (0, 0.98), of a model that does not scale states.

    TD-CFM(C) couples noise and data by its own flow: its velocity is another one, also where its samples are right.
    """
    shape = futures.shape
    x_0 = torch.randn(shape, generator=generator, device=futures.device, dtype=futures.dtype)
    t = _LATEST * torch.rand(shape[:2], generator=generator, device=futures.device, dtype=futures.dtype)
    x = t.unsqueeze(-1) * futures + (1 - t.unsqueeze(-1)) * x_0
    exact = world.velocity(x.cpu(), t.cpu(), states.cpu(), actions.cpu(), model.gamma).to(x)
    mine = model.velocity(x, t, model.cond(states, actions))
    return float((mine - exact).double().square().mean())


def evaluate_runs(
    paths: Sequence[str | Path],
    *,
    states: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    checkpoint: int | None = None,
    all_checkpoints: bool = False,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Compares saved models with true futures and prints a table; what `fastflow evaluate` does with such runs.

    Each result is written to RUN/evaluations/, and to RUN/eval.csv where that step has no row yet.

    Args:
        paths: run folders.
        states, samples: states and samples per state; None takes the run's own.
        seed: of the samples, and (as data seed) of states and true futures.
        checkpoint: step of the checkpoint; None takes the newest.
        all_checkpoints: every checkpoint of the run instead.
        device: "auto", "cpu" or "cuda".

    Returns:
        One record per evaluated checkpoint, as written.

    Raises:
        UserError: not a run folder, no such checkpoint, a damaged one, a run whose policy cannot be rolled out.
    """
    records = []
    print(f"{'EMD':>8} {'floor':>8} {'MSE(V)':>10} {'NLL/d':>8} {'step':>9}  run")
    for run in map(Run.open, paths):
        name, family = run.config["dataset"]["policy"], run.config["policies"]
        world = world_of(run.config["env"], None if family is None else Path(family))
        if name == "behaviour":
            raise UserError(f"{run.path}: policy behaviour cannot be asked for actions, so there are no true futures")
        truth = None
        for step in (run.checkpoint_steps() if all_checkpoints else [checkpoint]) or [None]:
            agent, saved = load_agent(run, step, device)
            if truth is None:
                n, m = states or run.config["eval_states"], samples or run.config["eval_samples"]
                truth = make_truth(world, policies_of(world, name, n), agent.config.gamma, n, m, seed)
            metrics = compare(agent.model, world, truth, seed, agent.device)
            assert metrics is not None
            print(
                f"{metrics['emd']:8.4f} {metrics['emd_floor']:8.4f} {metrics['value_mse']:10.4g} "
                f"{metrics['nll']:8.3f} {saved.step:9d}  {run.path}"
            )
            if saved.step not in run.eval.steps():
                run.eval.insert(saved.step, {f"evaluation/{key}": value for key, value in metrics.items()})
            record = {"run": str(run.path), "env": world.name, "step": saved.step, "seed": seed, **metrics}
            record |= {"states": len(truth.states), "samples": truth.futures.shape[1], "versions": versions()}
            write_json(run.path / "evaluations" / f"step_{saved.step:08d}_seed{seed}.json", record)
            records.append(record)
    return records


def world_of(name: str, policies: Path | None) -> World:
    """The world of a name, with the policies of an agent's run folder in place of its own if there is one."""
    world = make_world(name)
    if policies is None:
        return world
    from fastflow.family import LearntFamily

    return LearntFamily.of_run(world, Run.open(policies))


def policies_of(world: World, name: str, count: int) -> Tensor | None:
    """Embeddings [count, W] of a named policy, or for "all" of the named ones in turn; None in a world of one."""
    if not world.policy_dim:
        return None
    names = list(world.policies) if name == "all" else [name]
    return torch.tensor([world.policies[names[i % len(names)]] for i in range(count)])
