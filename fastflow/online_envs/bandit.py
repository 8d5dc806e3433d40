"""A bandit with two equally good actions: the smallest task on which a policy can keep, or lose, a mode.

One state, observed as 0; an action in [-1, 1]^2, clipped; every episode is one step, and its reward is the sum of two
Gaussian bumps of height 1 and standard deviation 0.15 at (-0.5, 0) and (0.5, 0).
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from fastflow.online_envs.vector import OnlineEnvs, Step

__all__ = ["CENTRES", "STD", "Bandit", "Bandits", "reward"]

CENTRES = ((-0.5, 0.0), (0.5, 0.0))
STD = 0.15


def reward(actions: np.ndarray) -> np.ndarray:
    """Rewards float32 [...] of actions [..., 2]."""
    actions = np.clip(np.asarray(actions, dtype=np.float64), -1.0, 1.0)
    squares = ((actions[..., None, :] - np.array(CENTRES)) ** 2).sum(axis=-1)
    return np.exp(squares / (-2.0 * STD**2)).sum(axis=-1).astype(np.float32)


class Bandits(OnlineEnvs):
    """N bandits in arrays; nothing about them is random."""

    def __init__(self, num_envs: int, name: str = "bandit-two-modes") -> None:
        super().__init__(name, num_envs, 1, -np.ones(2), np.ones(2))
        self._steps = 0

    def close(self) -> None:
        """Does nothing: there is nothing to close."""

    def _reset(self, seeds: np.random.SeedSequence) -> np.ndarray:
        self._steps = 0
        return self._obs()

    def _step(self, actions: np.ndarray) -> Step:
        self._steps += 1
        no, yes = np.zeros(self.num_envs, dtype=bool), np.ones(self.num_envs, dtype=bool)
        success = np.full(self.num_envs, np.nan, dtype=np.float32)
        return Step(self._obs(), reward(actions), yes, no, self._obs(), success, no.copy())

    def _obs(self) -> np.ndarray:
        return np.zeros((self.num_envs, 1), dtype=np.float32)

    def _snapshot(self) -> dict[str, np.ndarray] | None:
        return {"steps": np.full(self.num_envs, self._steps, dtype=np.int64)}

    def _restore(self, state: dict[str, np.ndarray]) -> np.ndarray:
        self._steps = int(state["steps"][0])
        return self._obs()


class Bandit(gymnasium.Env):
    """One bandit."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Box(0.0, 0.0, (1,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins an episode."""
        super().reset(seed=seed)
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Rewards `action` [2] and ends the episode."""
        return np.zeros(1, dtype=np.float32), float(reward(action)), True, False, {}
