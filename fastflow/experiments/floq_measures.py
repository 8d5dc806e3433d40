"""What is measured of floq's runs after training: values against returns, walks, and walks that begin with stale
weights.

Everything is measured in the simulator, on the states that the run's own policy visits, so that the truth of a value is
the discounted return that followed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastflow import agents, ops
from fastflow.data import load_dataset, returns_to_go
from fastflow.envs import make_env
from fastflow.errors import UserError
from fastflow.evaluate import Policy, Rollouts
from fastflow.features import features
from fastflow.record import Run, load_agent
from fastflow.worlds.pointmaze import PointMaze

__all__ = ["critic", "maze", "recovery"]

_EPISODES, _ENVS, _SEED = 20, 10, 77
_ROWS = 2_000
_STARTS = 32
_NEAR, _GOAL = 0.5, 1.0


def critic(run: Run) -> dict[str, float]:
    """Success over all evaluations, the critics' errors on the policy's own path, and the flow critic's walks.

    Returns:
        `success`: the mean over all evaluations behind the first update. `q_error`, `q_bias`, `q_correlation`,
        `q_mean` of the flow critic against the discounted return that followed, over the states and actions of 20
        episodes; `critic_error` of the distilled critic. `var_z`, `curvature`, `outside_range`: of walks, see
        `FloqAgent.flow_statistics`, over the same states. `feature_norm`, `feature_norm.growth`: of the flow critic's
        last hidden layer, and how many times that of fresh weights; `critic_feature_norm` and its growth likewise of
        the distilled critic.
    """
    agent, saved = load_agent(run, None, "cpu")
    return _critic(run, agent, saved.arguments, _play(run, agent))


def _critic(run: Run, agent: Any, arguments: Mapping[str, Any], path: _Path) -> dict[str, float]:
    q, plain = _values(agent, path.observations, path.actions), _distilled(agent, path.observations, path.actions)
    rows = slice(None, None, max(len(path.returns) // 64, 1))
    observations, actions = path.observations[rows], path.actions[rows]
    walks = agent.flow_statistics(observations, actions, _starts(len(observations)))
    fresh = agents.make(run.config["agent_name"], agent.config, **arguments, device="cpu", seed=agent.seed)
    norm = float(walks["flow/feature_norm"])
    fresh_norm = float(fresh.flow_statistics(observations, actions, _starts(len(observations)))["flow/feature_norm"])
    plain_norm, fresh_plain_norm = (_critic_feature_norm(a, observations, actions) for a in (agent, fresh))
    return {
        **_success(run),
        **_errors(q, path.returns),
        "critic_error": _errors(plain, path.returns)["q_error"],
        "var_z": float(walks["flow/variance"]),
        "curvature": float(walks["flow/curvature"]),
        "outside_range": float(walks["flow/outside_range"]),
        "feature_norm": norm,
        "feature_norm.growth": norm / fresh_norm,
        "critic_feature_norm": plain_norm,
        "critic_feature_norm.growth": plain_norm / fresh_plain_norm,
    }


def maze(run: Run) -> dict[str, float]:
    """What `critic` returns, and where a policy in a point maze gets lost.

    Returns:
        Besides: `lost`, the share of the 20 episodes that do not reach the goal; `lost.rows`, how many of 100,000 rows
        of the dataset are within 0.5 of where such an episode ends, and `lost.excess`, by how much the distilled critic
        values the policy there above what the scripted policy makes of the place, each the median over them, not a
        number if there are none.
    """
    agent, saved = load_agent(run, None, "cpu")
    path = _play(run, agent)
    found = {"lost": len(path.lost) / _EPISODES, "lost.rows": math.nan, "lost.excess": math.nan}
    if len(path.lost):
        name = run.config["env"]
        env: Any = make_env(name).unwrapped
        env.reset(seed=_SEED)
        goal = torch.tensor(env.cur_goal_xy, dtype=torch.float32)
        env.close()
        sources = {key: run.config[key] for key in ("dataset_dir", "dataset_path")}
        states = load_dataset(name, **sources)[0].tensors["observations"]
        near = torch.stack([((states - place).norm(dim=1) <= _NEAR).sum() for place in path.lost])
        found["lost.rows"] = float((1e5 * near / len(states)).median())
        rows = path.lost.repeat_interleave(_STARTS, 0)
        actions = agent.act(rows, torch.Generator().manual_seed(_SEED))
        value = _distilled(agent, rows, actions).view(-1, _STARTS).mean(1)
        truth = _scripted(PointMaze(name.split("-")[1]), path.lost, goal, run.config["agent"]["discount"])
        found["lost.excess"] = float((value - truth).median())
    return _critic(run, agent, saved.arguments, path) | found


def _scripted(world: PointMaze, state: Tensor, goal: Tensor, discount: float) -> Tensor:
    """Values [N] of the scripted policy at states that it reaches the goal from."""
    steps = torch.zeros(len(state))
    for _ in range(world.horizon):
        far = (state - goal).norm(dim=1) > _GOAL
        if not far.any():
            break
        steps += far
        state = torch.where(far[:, None], world.step(state, world.act(state, goal))[0], state)
    return (discount**steps - 1) / (1 - discount)


_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_CANDIDATES = 8


def recovery(run: Run) -> dict[str, float]:
    """Test-time recovery: walks whose first steps are those of a stale critic, the run's oldest kept checkpoint.

    Returns:
        For shares of 0, 25, 50, 75 and 100 % stale steps: `q_error.<percent>` as in `critic`, and
        `success.<percent>` of the policy that takes, of 8 actions of the one-step policy, the one whose value is the
        largest, over 20 episodes.

    Raises:
        UserError: the run kept one checkpoint only.
    """
    steps = run.checkpoint_steps()
    if len(steps) < 2:
        raise UserError(f"{run.path}: expected at least two checkpoints, got {len(steps)} (keep_checkpoints=0)")
    agent, _ = load_agent(run, steps[-1], "cpu")
    stale, _ = load_agent(run, steps[0], "cpu")
    path = _play(run, agent)
    found = _success(run)
    for share in _SHARES:
        name = f"{100 * share:.0f}"
        q = _values(agent, path.observations, path.actions, stale, share)
        found |= {f"q_error.{name}": _errors(q, path.returns)["q_error"]}
        chosen = _play(run, _BestOf(agent, stale, share))
        found |= {f"success.{name}": chosen.success, f"length.{name}": chosen.length}
    return found


# Playing --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Path:
    """What happened in some episodes: observations [N, O], actions [N, A], discounted returns [N]; `lost`, the last
    states [M, O] of those that were not solved."""

    observations: Tensor
    actions: Tensor
    returns: Tensor
    success: float
    length: float
    lost: Tensor


class _Recorder:
    """An environment that keeps what happens in it."""

    def __init__(self, env: Any) -> None:
        self.env = env
        self.rows: list[tuple[np.ndarray, np.ndarray, float, bool]] = []
        self.ends: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def reset(self, **options: Any) -> Any:
        self.observation, info = self.env.reset(**options)
        return self.observation, info

    def step(self, action: np.ndarray) -> Any:
        out = self.env.step(action)
        self.rows.append((self.observation, action.copy(), float(out[1]), bool(out[2])))
        if out[2] or out[3]:
            self.ends.append(len(self.rows) - 1)
        self.observation = out[0]
        return out


def _play(run: Run, policy: Policy) -> _Path:
    """Episodes of a policy on the run's task, of which at most `_ROWS` rows, evenly spread, are kept."""
    recorders: list[_Recorder] = []

    def make(name: str) -> _Recorder:
        recorders.append(_Recorder(make_env(name)))
        return recorders[-1]

    rollouts = Rollouts(run.config["env"], _ENVS, make)
    try:
        episodes = rollouts.run(policy, episodes=_EPISODES, seed=_SEED)
    finally:
        rollouts.close()
    assert episodes is not None
    columns: list[list[np.ndarray]] = [[], [], []]
    lost = [row for recorder in recorders for row in (recorder.rows[end] for end in recorder.ends) if not row[3]]
    for recorder in recorders:
        seen, taken, rewards, terminated = (np.array(column) for column in zip(*recorder.rows, strict=True))
        ends = np.isin(np.arange(len(rewards)), recorder.ends)
        followed = returns_to_go(rewards, ~terminated, ends, run.config["agent"]["discount"])
        for column, values in zip(columns, (seen, taken, followed), strict=True):
            column.append(values)
    observations, actions, returns = (torch.from_numpy(np.concatenate(column).astype(np.float32)) for column in columns)
    rows = torch.arange(0, len(returns), max(len(returns) // _ROWS, 1))
    metrics = episodes.metrics()
    last = torch.from_numpy(np.array([row[0] for row in lost], np.float32).reshape(len(lost), observations.shape[1]))
    return _Path(observations[rows], actions[rows], returns[rows], metrics["success"], metrics["episode.length"], last)


class _BestOf:
    """Takes, of several actions of the one-step policy, the one that walks with stale first steps value most."""

    def __init__(self, agent: Any, stale: Any, share: float) -> None:
        self.agent, self.stale, self.share = agent, stale, share
        self.device = agent.device

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator | None = None) -> Tensor:
        rows = observations.repeat_interleave(_CANDIDATES, 0)
        actions = self.agent.act(rows, generator)
        q = _values(self.agent, rows, actions, self.stale, self.share, starts=2).view(-1, _CANDIDATES)
        chosen = q.argmax(1, keepdim=True).unsqueeze(-1).expand(-1, 1, actions.shape[-1])
        return actions.view(len(observations), _CANDIDATES, -1).gather(1, chosen).squeeze(1)


# Values ---------------------------------------------------------------------------------------------------------------


def _starts(rows: int, count: int = _STARTS) -> Tensor:
    """The same starts for every row, evenly spread: [rows, count]."""
    return ((torch.arange(count) + 0.5) / count).expand(rows, count)


@torch.no_grad()
def _values(
    agent: Any, observations: Tensor, actions: Tensor, stale: Any = None, share: float = 0.0, starts: int = 8
) -> Tensor:
    """Q [N] by the flow critic, the first `share` of whose steps are those of `stale`."""
    floq, steps = agent.networks.floq, agent.config.critic_flow_steps
    first = round(share * steps)
    cond = torch.cat((agent._normalize(observations), actions), -1)
    z = floq.start(_starts(len(cond), starts)).unsqueeze(-1)
    z = z.expand(agent.config.flow_num_ensembles, *z.shape)
    for owner, begin, end in ((stale, 0, first), (agent, first, steps)):
        if end > begin:
            z = ops.integrate(
                owner.networks.floq.field,
                z,
                cond,
                num_steps=end - begin,
                t_0=begin / steps,
                t_1=end / steps,
                backend=agent.config.backend,
                precision=agent.config.precision,
            )
    return z.mean((0, 2, 3))


@torch.no_grad()
def _distilled(agent: Any, observations: Tensor, actions: Tensor) -> Tensor:
    return agent.networks.critic(agent._normalize(observations), actions).mean(0).squeeze(-1)


def _errors(q: Tensor, returns: Tensor) -> dict[str, float]:
    error = q - returns
    pair = torch.stack((q, returns)).double()
    return {
        "q_error": float(error.square().mean().sqrt()),
        "q_mean": float(q.mean()),
        "q_bias": float(error.mean()),
        "q_correlation": float(torch.corrcoef(pair)[0, 1]),
    }


@torch.no_grad()
def _critic_feature_norm(agent: Any, observations: Tensor, actions: Tensor) -> float:
    x = torch.cat((agent._normalize(observations), actions), -1)
    network = agent.networks.critic
    x = x.expand(agent.config.num_ensembles, *x.shape)
    return float(features(network.network, x, norm=network.norm).norm(dim=-1).mean())


def _success(run: Run) -> dict[str, float]:
    return {"success": float(np.mean([row["evaluation/success"] for row in run.eval.rows() if row["step"]]))}
