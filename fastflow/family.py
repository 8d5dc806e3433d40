"""Families of policies that are learnt: their training on a world's data, and the world with such a family."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastflow.agents.forward_backward import ForwardBackwardAgent
from fastflow.errors import UserError
from fastflow.info import versions
from fastflow.planning import play
from fastflow.record import Run, absolute, load_agent, mean_and_std, spread, tensor_fingerprint, write_json
from fastflow.settings import AgentConfig, WorldSettings
from fastflow.task import Task
from fastflow.worlds import World, make_world
from fastflow.worlds.files import transitions_of

__all__ = ["FamilySettings", "FamilyTask", "LearntFamily", "evaluate_runs", "plot_runs"]

_STATES = 10_000  # that rewards are looked at on, to find a task's policy


@dataclasses.dataclass(frozen=True)
class FamilySettings(WorldSettings[AgentConfig]):
    """Trains a family of policies, one for every reward, on a world's transitions without rewards, and leaves a run
    folder (config.json, train.csv, eval.csv, checkpoints).

    `fastflow train td2-cfm --policies RUN --policy all` learns what all of them will visit.
    """

    normalize: bool = True
    """The networks see states centred and scaled by the data's statistics."""
    eval_episodes: int = 20
    """Episodes per task and evaluation."""
    eval_steps: int = 300
    """Steps of an episode."""

    fixed: ClassVar[tuple[str, ...]] = (*WorldSettings.fixed, "normalize")
    least: ClassVar[Mapping[str, int]] = {**WorldSettings.least, "eval_episodes": 1, "eval_steps": 1}


class FamilyTask(Task):
    """What the training loop asks of a task, for a family of policies; see `fastflow.horizon.HorizonTask`."""

    evaluates = True

    def __init__(
        self,
        settings: FamilySettings[Any],
        device: torch.device,
        arguments: dict[str, Any] | None,
        path: Path,
        out: Callable[[str], None],
    ) -> None:
        self.settings, self.device = settings, device
        self.world = make_world(settings.env)
        rows = transitions_of(self.world, settings)
        self.data = {key: rows[key].to(device) for key in ("observations", "actions", "next_observations")}
        self.facts = {
            "name": settings.env,
            "path": absolute(settings.dataset_path),
            "rows": len(self.data["observations"]),
            "bytes": sum(value.nbytes for value in self.data.values()),
            "fingerprint": tensor_fingerprint(self.data),
        }
        self.arguments = self._arguments() if arguments is None else arguments

    @staticmethod
    def check_name(name: str) -> None:
        """Raises UserError for an unknown world."""
        make_world(name)

    def _arguments(self) -> dict[str, Any]:
        statistics = mean_and_std(self.data["observations"]) if self.settings.normalize else None
        sizes = {"obs_dim": self.world.state_dim, "action_dim": self.world.action_dim}
        return {**sizes, "observation_statistics": statistics}

    def sample(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A batch for the agent's `update`, rows drawn uniformly with replacement."""
        index = torch.randint(len(self.data["actions"]), (batch_size,), generator=generator, device=self.device)
        return {key: value.index_select(0, index) for key, value in self.data.items()}

    def samples(self) -> dict[str, Tensor]:
        """States that tasks are told by, which the family needs wherever it goes."""
        rows = spread(len(self.data["actions"]), _STATES).to(self.device)
        return {"observations": self.data["next_observations"][rows]}

    def evaluate(
        self, agent: ForwardBackwardAgent, seed: int, should_stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Returns of each task's policy, and of the behaviour policy, over the same start states."""
        settings = self.settings
        return _returns(
            LearntFamily(self.world, agent, self.samples()["observations"]),
            settings.eval_episodes,
            settings.eval_steps,
            settings.data_seed,
            should_stop,
        )

    def describe(self, metrics: dict[str, float]) -> str:
        """An evaluation in words."""
        return f"return {metrics['return']:.1f}, behaviour {metrics['return.behaviour']:.1f} (means over tasks)"


class LearntFamily(World):
    """A world whose family of policies is an agent's: w is the embedding of a reward, and every task has its own.

    Args:
        world: states, actions, data and rewards.
        agent: whose policies it has.
        observations: states [N, D] of the agent's data, that rewards are looked at on to find a task's w.

    Raises:
        UserError: no task rewards any of these states.
    """

    def __init__(self, world: World, agent: ForwardBackwardAgent, observations: Tensor) -> None:
        self._world, self._agent, self._observations = world, agent, observations
        self.name, self.state_dim, self.action_dim = world.name, world.state_dim, world.action_dim
        self.tasks, self.bounds, self.boxes, self.horizon = world.tasks, world.bounds, world.boxes, world.horizon
        self.deterministic = world.deterministic
        self.policy_dim = agent.policy_dim
        self.policies = {}
        for task in self.tasks:
            rewards = world.reward(task, observations)
            if bool(rewards.any()):  # no policy where no state of the sample is rewarded
                self.policies[task] = tuple(agent.task_embedding(observations, rewards).tolist())
        if not self.policies:
            raise UserError(f"{world.name}: none of {len(observations):,} states is rewarded by any task")

    @classmethod
    def of_run(cls, world: World, run: Run) -> LearntFamily:
        """The world with the policies of a run of agent fb.

        Raises:
            UserError: the run is of another agent or another world, or has no checkpoint.
        """
        agent, env = run.config.get("agent_name"), run.config.get("env")
        if (agent, env) != ("fb", world.name):
            raise UserError(f"{run.path}: expected a run of agent fb on {world.name}, got one of {agent} on {env}")
        return cls(world, load_agent(run, None, "cpu")[0], run.load_samples()["observations"])

    def act(self, state: Tensor, w: Tensor | None = None) -> Tensor:
        embedding = self._embedding(w, state)
        assert embedding is not None
        # The agent may live elsewhere than the states: truth is computed on the CPU, batches where training is.
        device = self._agent.device
        return self._agent.act(state.to(device), embedding.to(device)).to(state.device)

    def behave(self, state: Tensor, memory: Any, generator: torch.Generator) -> tuple[Tensor, Any]:
        return self._world.behave(state, memory, generator)

    def step(self, state: Tensor, action: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return self._world.step(state, action, generator)

    def starts(self, num: int, generator: torch.Generator) -> Tensor:
        return self._world.starts(num, generator)

    def reward(self, task: str, state: Tensor) -> Tensor:
        return self._world.reward(task, state)

    def draw_policies(self, num: int, generator: torch.Generator) -> Tensor:
        """Embeddings [num, W] as in the family's training: uniform on the sphere, or towards a state of the data."""
        if generator.device != self._agent.device:
            # From a generator of the agent's own device, that follows the one that was given.
            seed = torch.randint(2**62, (), generator=generator, device=generator.device)
            own = torch.Generator(self._agent.device).manual_seed(int(seed))
            return self._agent.sample_embeddings(num, own, self._observations).to(generator.device)
        return self._agent.sample_embeddings(num, generator, self._observations)


@torch.no_grad()
def _returns(
    world: LearntFamily, episodes: int, steps: int, seed: int, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    found: dict[str, float] = {}
    for task, w in world.policies.items():
        if should_stop():
            return None
        generator = torch.Generator().manual_seed(seed + 3)
        starts = world.starts(episodes, generator)
        embedding, memory = torch.tensor(w), [None]

        def follow(state: Tensor, w: Tensor = embedding) -> Tensor:
            return world.act(state, w)

        def behave(state: Tensor, memory: list[Any] = memory, source: torch.Generator = generator) -> Tensor:
            action, memory[0] = world.behave(state, memory[0], source)
            return action

        for name, act in (("return", follow), ("return.behaviour", behave)):
            reward = functools.partial(world.reward, task)
            total = play(world, act, reward, starts, horizon=steps, generator=generator)
            found[f"{name}.{task}"] = float(total.mean())
    for name in ("return", "return.behaviour"):
        values = [found[f"{name}.{task}"] for task in world.policies]
        found[name] = sum(values) / len(values)
    return found


def evaluate_runs(
    paths: Sequence[str | Path],
    *,
    episodes: int = 50,
    seed: int = 0,
    checkpoint: int | None = None,
    all_checkpoints: bool = False,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Plays every task with its policy and prints a table; what `fastflow evaluate` does with such runs.

    Args:
        paths: run folders. episodes: per task. seed: of start states. checkpoint, all_checkpoints, device: as for other
            agents.

    Returns:
        One record per evaluated checkpoint, as written to RUN/evaluations/.

    Raises:
        UserError: not a run folder, no such checkpoint, a damaged one.
    """
    records = []
    print(f"{'return':>9} {'behaviour':>9} {'step':>9}  run")
    for run in map(Run.open, paths):
        world, observations = make_world(run.config["env"]), run.load_samples()["observations"]
        for step in (run.checkpoint_steps() if all_checkpoints else [checkpoint]) or [None]:
            agent, saved = load_agent(run, step, "cpu" if device == "auto" else device)
            found = _returns(LearntFamily(world, agent, observations), episodes, run.config["eval_steps"], seed)
            assert found is not None
            print(f"{found['return']:9.1f} {found['return.behaviour']:9.1f} {saved.step:9d}  {run.path}")
            record = {"run": str(run.path), "env": world.name, "step": saved.step, "seed": seed, **found}
            record |= {"episodes": episodes, "versions": versions()}
            write_json(run.path / "evaluations" / f"step_{saved.step:08d}_seed{seed}.json", record)
            records.append(record)
    return records


def plot_runs(
    paths: Sequence[str | Path], *, output: str | Path | None = None, checkpoint: int | None = None
) -> list[Path]:
    """Draws learning_curve.png: returns over updates beside the behaviour's, and losses; what `fastflow plot` does.

    Raises:
        UserError: not a run folder, matplotlib is not installed, a file cannot be written.
    """
    from fastflow.plot import (
        COLORS,
        column,
        draw_losses,
        figure_style,
        labels_of,
        new_figure,
        save_figure,
        updates_axis,
    )

    runs = [Run.open(path) for path in paths]
    if not runs:
        raise UserError("plot: expected at least one run folder")
    folder = runs[0].path / "figures" if output is None else Path(output)
    with figure_style():
        figure, axes = new_figure(2)
        for i, (run, label) in enumerate(zip(runs, labels_of(runs), strict=True)):
            for name, style in (("return", "-"), ("return.behaviour", "--")):
                steps, values = column(run.eval.rows(), f"evaluation/{name}")
                text = label if name == "return" else f"{label}, behaviour"
                axes[0].plot(steps, values, style, color=COLORS[i % len(COLORS)], label=text)
        axes[0].set_title("Return, mean over tasks")
        axes[0].legend(fontsize=8)
        updates_axis(axes[0])
        draw_losses(axes[1], runs)
        return [save_figure(figure, folder / "learning_curve.png")]
