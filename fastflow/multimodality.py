"""How many modes a policy has: where its actions go from a saddle of the grid world, which goals it reaches, and which
bumps of the bandit it has found.

The saddle of the map "two-walls" is the row y = 12, from which both goals are eleven moves away. A policy that learnt
both ways goes up or down there, each with a fair share, and hardly ever stays; noise N(0, 1) that was never trained
does the same with P(up) = P(down) = 0.31, which is why the prior stands beside every measurement.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastflow.atomic import atomic_write
from fastflow.online_envs import bandit
from fastflow.online_envs.gridworld import DEATH, FIGURE_STARTS, GOAL_REWARD, GridWorldMap, grid_map, play
from fastflow.online_envs.gridworld_maps import SIZE
from fastflow.online_envs.names import GRIDWORLDS
from fastflow.record import Run, load_agent, make_agent

__all__ = [
    "PRIOR",
    "SADDLE",
    "TABLE",
    "Bumps",
    "Goals",
    "Moves",
    "acting",
    "actions_at",
    "agents_over_training",
    "bandit_actions",
    "bandit_modes",
    "bumps",
    "entropy",
    "goals_reached",
    "gridworld_goals",
    "gridworld_modes",
    "measure_bandit",
    "measure_saddle",
    "moves",
    "observe",
    "over_training",
    "passes",
    "raw_actions_at",
]

SADDLE = (12, 12)
"""The cell of "two-walls" at which actions are measured: the middle of its saddle row."""

TABLE = "modes.csv"
"""File of a run with what was measured at each of its checkpoints."""

_SAMPLES, _ROW_SAMPLES, _BANDIT_SAMPLES = 2000, 200, 4000
_EPISODES, _CELL_EPISODES = 200, 4
_SEED = 7


class Policy(Protocol):
    """What is measured: any agent."""

    device: torch.device

    def act(
        self, observations: Tensor, generator: torch.Generator | None = None, *, deterministic: bool = False
    ) -> Tensor:
        """Actions [N, A] for observations [N, O]."""
        ...


# Actions at a cell ----------------------------------------------------------------------------------------------------


class Moves(NamedTuple):
    """What the second number of an action does on the grid.

    Attributes:
        up, down, stay: probabilities of the three moves along y.
        std: standard deviation of that number before it is rounded.
    """

    up: float
    down: float
    stay: float
    std: float


def moves(actions: np.ndarray) -> Moves:
    """Moves of actions [..., 2], as the grid world rounds them."""
    y = np.asarray(actions, dtype=np.float64)[..., 1]
    steps = np.rint(np.clip(y, -1.0, 1.0))
    up, down = float((steps > 0).mean()), float((steps < 0).mean())
    return Moves(up, down, 1.0 - up - down, float(y.std()))


_TAIL = 0.5 * math.erfc(0.5 / math.sqrt(2.0))
PRIOR = Moves(_TAIL, _TAIL, 1.0 - 2.0 * _TAIL, 1.0)
"""Moves of standard normal noise, what a flow that has learnt nothing does."""


def passes(at: Moves) -> bool:
    """Whether both ways have at least 0.2 and staying at most 0.2."""
    return min(at.up, at.down) >= 0.2 and at.stay <= 0.2


def observe(cells: Sequence[tuple[int, int]] | np.ndarray) -> np.ndarray:
    """Observations float32 [N, 2] of cells (x, y)."""
    return ((np.asarray(cells) - SIZE // 2) / (SIZE // 2)).astype(np.float32)


def actions_at(agent: Policy, cell: tuple[int, int], samples: int = _SAMPLES, seed: int = _SEED) -> np.ndarray:
    """Actions [S, 2] within bounds that a policy takes at a cell."""
    generator = torch.Generator(agent.device).manual_seed(seed)
    obs = torch.from_numpy(observe([cell])).to(agent.device).expand(samples, 2).contiguous()
    return agent.act(obs, generator).cpu().numpy()


def raw_actions_at(agent: Any, cell: tuple[int, int], samples: int = _SAMPLES, seed: int = _SEED) -> np.ndarray:
    """Actions [S, 2] that a policy explores with at a cell, before they are brought into bounds."""
    generator = torch.Generator(agent.device).manual_seed(seed)
    obs = torch.from_numpy(observe([cell])).to(agent.device).expand(samples, 2).contiguous()
    return agent.explore(obs, generator)[0].cpu().numpy()


# Goals ----------------------------------------------------------------------------------------------------------------


class Goals(NamedTuple):
    """Where episodes end.

    Attributes:
        shares: [starts, goals], of the episodes from each start that end on each goal.
        death: [starts], share that ends in death.
        lengths: [starts], mean length of those that reach a goal; NaN where none does.
    """

    shares: np.ndarray
    death: np.ndarray
    lengths: np.ndarray

    @property
    def reached(self) -> np.ndarray:
        """Share of the episodes from each start that reach any goal, [starts]."""
        return self.shares.sum(-1)

    @property
    def entropy(self) -> np.ndarray:
        """Entropy in nats of which goal is reached from each start, [starts]; 0 where none is."""
        return np.array([entropy(row) for row in self.shares])


def entropy(shares: np.ndarray | Sequence[float]) -> float:
    """Entropy in nats of shares [n], which need not sum to 1; 0 if all of them are 0."""
    p = np.asarray(shares, dtype=np.float64)
    if not p.sum():
        return 0.0
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum()) + 0.0


def goals_reached(
    agent: Policy,
    grid: GridWorldMap,
    starts: Sequence[tuple[int, int]] | np.ndarray,
    episodes: int = _EPISODES,
    seed: int = _SEED,
    *,
    deterministic: bool = False,
) -> Goals:
    """Plays `episodes` episodes from each start cell."""
    cells = np.asarray(starts, dtype=np.int64)
    played = play(grid, acting(agent, seed, deterministic=deterministic), cells.repeat(episodes, axis=0))
    ends = played.ends.reshape(len(cells), episodes)
    shares = np.stack([(ends == goal).mean(1) for goal in range(len(grid.goal_names))], axis=1)
    # The last cell repeats after the end, so an episode is as long as it takes to be where it ends.
    last = (played.trajectories == played.trajectories[:, -1:]).all(-1)
    lengths = (~last).sum(1).reshape(ends.shape).astype(np.float64)
    lengths[ends < 0] = np.nan
    means = np.array([row[~np.isnan(row)].mean() if (~np.isnan(row)).any() else math.nan for row in lengths])
    return Goals(shares, (ends == DEATH).mean(1), means)


def acting(agent: Policy, seed: int = _SEED, *, deterministic: bool = False) -> Any:
    """A policy as `fastflow.online_envs.gridworld.play` asks for it."""
    generator = torch.Generator(agent.device).manual_seed(seed)

    def act(obs: np.ndarray) -> np.ndarray:
        found = agent.act(torch.from_numpy(obs).to(agent.device), generator, deterministic=deterministic)
        return found.cpu().numpy()

    return act


# The bandit -----------------------------------------------------------------------------------------------------------


class Bumps(NamedTuple):
    """What a policy has found of the bandit's two bumps.

    Attributes:
        left, right: shares of actions within two standard deviations of each centre.
        reward: mean reward.
    """

    left: float
    right: float
    reward: float


def bumps(actions: np.ndarray) -> Bumps:
    """Shares of actions [N, 2] within the bumps."""
    distances = np.linalg.norm(np.asarray(actions)[:, None] - np.array(bandit.CENTRES), axis=-1)
    left, right = (distances < 2 * bandit.STD).mean(0)
    return Bumps(float(left), float(right), float(bandit.reward(actions).mean()))


def bandit_actions(agent: Policy, samples: int = _BANDIT_SAMPLES, seed: int = _SEED) -> np.ndarray:
    """Actions [S, 2] within bounds that a policy takes in the bandit."""
    generator = torch.Generator(agent.device).manual_seed(seed)
    return agent.act(torch.zeros(samples, 1, device=agent.device), generator).cpu().numpy()


# Of runs --------------------------------------------------------------------------------------------------------------


def agents_over_training(run: Run) -> Iterator[tuple[int, Any]]:
    """Pairs (environment steps, agent) of a run: as it began, then at every checkpoint that it kept."""
    steps = run.checkpoint_steps()
    saved = run.load(steps[0])
    name, seed = run.config["agent_name"], run.config["seed"]
    yield 0, make_agent(name, saved.config, saved.arguments, device=torch.device("cpu"), seed=seed)
    for step in steps:
        yield step, load_agent(run, step, "cpu")[0]


def over_training(run: Run, measure: Callable[[Any], dict[str, float]]) -> dict[str, float]:
    """Measures a run as it began and at every checkpoint, writes RUN/modes.csv, and returns the last measurement."""
    rows = [{"step": float(step), **measure(agent)} for step, agent in agents_over_training(run)]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "step": int(row["step"])} for row in rows)
    with atomic_write(Path(run.path) / TABLE) as temporary:
        temporary.write_text(buffer.getvalue(), encoding="utf-8")
    return {name: value for name, value in rows[-1].items() if name != "step"}


def measure_saddle(agent: Any) -> dict[str, float]:
    """Moves at the saddle and over its row, and where episodes from there and from the figure's starts end.

    `passes` is 1 where both modes have at least 0.2 and staying at most 0.2. Of `row_...` are means over the 25 cells
    of the row y = 12, entropies in nats, `goal_entropy` from the saddle and `goal_entropy_starts` the mean over the
    figure's starts; `saddle_length` is the mean length of episodes from the saddle, of which 11 is the shortest.
    """
    at = moves(actions_at(agent, SADDLE))
    row = [moves(actions_at(agent, (x, SADDLE[1]), _ROW_SAMPLES)) for x in range(SIZE)]
    goals = goals_reached(agent, grid_map("two-walls"), [SADDLE, *FIGURE_STARTS])
    return {
        "p_up": at.up,
        "p_down": at.down,
        "p_stay": at.stay,
        "both_modes": min(at.up, at.down),
        "passes": float(passes(at)),
        "std": at.std,
        "std_raw": float(raw_actions_at(agent, SADDLE)[:, 1].std()),
        "row_both_modes": float(np.mean([min(m.up, m.down) for m in row])),
        "row_passes": float(np.mean([passes(m) for m in row])),
        "goal_entropy": float(goals.entropy[0]),
        "goal_entropy_starts": float(goals.entropy[1:].mean()),
        "reached": float(goals.reached.mean()),
        "saddle_length": float(goals.lengths[0]),
    }


def measure_bandit(agent: Any) -> dict[str, float]:
    """Shares of both bumps, the smaller of them, and the mean reward."""
    found = bumps(bandit_actions(agent))
    return {
        "left": found.left,
        "right": found.right,
        "both_modes": min(found.left, found.right),
        "outside": 1.0 - found.left - found.right,
        "reward": found.reward,
    }


def gridworld_modes(run: Run) -> dict[str, float]:
    """`Arm.after` on "two-walls": the saddle over training."""
    return over_training(run, measure_saddle)


def bandit_modes(run: Run) -> dict[str, float]:
    """`Arm.after` on the bandit: the bumps over training."""
    return over_training(run, measure_bandit)


def gridworld_goals(run: Run) -> dict[str, float]:
    """`Arm.after` on any map: episodes from every free cell by the last checkpoint, with noise and without.

    `reached` and `reached_zero` are the shares that end on a goal, `death` the share that dies, `steps_to_20` the
    environment steps of the first evaluation of which every episode reached a goal (NaN for never).
    """
    grid = grid_map(GRIDWORLDS[run.config["env"]])
    agent, _ = load_agent(run, None, "cpu")
    noisy = goals_reached(agent, grid, grid.free, _CELL_EPISODES)
    still = goals_reached(agent, grid, grid.free, 1, deterministic=True)
    first = [
        row["step"] for row in run.eval.rows() if row.get("evaluation/episode.return.random", -math.inf) >= GOAL_REWARD
    ]
    return {
        "reached": float(noisy.reached.mean()),
        "reached_zero": float(still.reached.mean()),
        "reached_least": float(noisy.reached.min()),
        "death": float(noisy.death.mean()),
        "steps_to_20": first[0] if first else math.nan,
        "length": float(np.nanmean(noisy.lengths)),
    }
