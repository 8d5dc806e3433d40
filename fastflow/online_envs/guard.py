"""One environment of several: checks what it is, begins a new episode where one ends, and lets nothing broken out."""

from __future__ import annotations

import math
import traceback
from typing import Any

import gymnasium
import numpy as np

from fastflow.errors import UserError
from fastflow.online_envs.simulator import has_diverged
from fastflow.online_envs.snapshot import capture, reinstate
from fastflow.online_envs.vector import Step

__all__ = ["Failure", "Guard", "unpack"]

# After the two observations of a row: reward, terminated, truncated, success, invalid, failed.
_EXTRAS = 6


class Failure:
    """What went wrong in an environment, in a form that crosses process borders.

    Attributes:
        steps, episode_steps: steps begun since the environment was made, and in the episode.
        summary: type and message of the error.
        trace: the traceback as text.
        error: the error itself, None after a process border.
    """

    def __init__(self, steps: int, episode_steps: int, error: Exception) -> None:
        self.steps = steps
        self.episode_steps = episode_steps
        self.summary = f"{type(error).__name__}: {error}"
        self.trace = "".join(traceback.format_exception(error))
        self.error: Exception | None = error

    def __getstate__(self) -> dict[str, Any]:
        # An exception need not survive pickling.
        return {**vars(self), "error": None}


class Guard(gymnasium.Wrapper):
    """Turns each reset and step of an environment into a row of numbers, which `unpack` reads.

    - An episode that ends is followed by the next one in the same step.
    - A reward or observation that is not finite, or a simulator that found its state to be so and began anew, ends the
      episode as invalid: reward 0, terminated, and the last finite observation as its final one.
    - An error is kept as `failure` and told by a flag in the row, so that a process that runs this goes on to answer.

    Args:
        env: the environment.
        name: of the environment, for messages.

    Raises:
        UserError: observations are not vectors of numbers, or actions not bounded ones.
    """

    def __init__(self, env: gymnasium.Env, name: str) -> None:
        super().__init__(env)
        self.name = name
        observations, actions = env.observation_space, env.action_space
        try:
            if not isinstance(actions, gymnasium.spaces.Box) or len(actions.shape) != 1:
                raise UserError(f"{name}: expected continuous actions (a Box of one dimension), got {actions}")
            if not actions.is_bounded() or not np.all(actions.low < actions.high):
                raise UserError(f"{name}: expected bounded actions, got {actions}")
            if not isinstance(observations, gymnasium.spaces.Box) or len(observations.shape) != 1:
                raise UserError(
                    f"{name}: expected observations in vectors (a Box of one dimension), got {observations}"
                )
        except UserError:
            env.close()
            raise
        self.obs_dim = int(observations.shape[0])
        self.low, self.high = actions.low.astype(np.float32), actions.high.astype(np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2 * self.obs_dim + _EXTRAS,), np.float32)
        self.failure: Failure | None = None
        self._dtype = actions.dtype
        self._obs = self._zeros = np.zeros(self.obs_dim, dtype=np.float32)
        self._finite = True  # what `_vector` last gave
        self._core = env.unwrapped
        self._steps = 0
        self._episode_steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """A row whose final observation is the first one too."""
        try:
            self._begin(seed)
        except Exception as error:
            return self._failed(error), {}
        return self._row(self._obs, 0.0, False, False, np.nan, False), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """A row, and nothing else: the episode's end is in the row, and the next one has begun."""
        self._steps += 1
        self._episode_steps += 1
        try:
            # A copy, because an environment may keep what it is given.
            obs, reward, terminated, truncated, info = self.env.step(np.array(action, dtype=self._dtype))
            final_obs = self._vector(obs)
            reward = float(np.float32(reward))
            invalid = bool(info.get("invalid", False)) or not math.isfinite(reward) or not self._finite
            if invalid or has_diverged(getattr(self._core, "data", None)):
                invalid, reward, terminated, final_obs = True, 0.0, True, self._obs
            self._obs = final_obs
            if terminated or truncated:
                self._begin()
        except Exception as error:
            return self._failed(error), 0.0, False, False, {}
        success = float(info.get("success", np.nan))
        row = self._row(final_obs, reward, bool(terminated), bool(truncated and not terminated), success, invalid)
        return row, 0.0, False, False, {}

    def snapshot(self) -> dict[str, np.ndarray] | None:
        """State of the environment and of this guard, or None if the environment does not tell all of its own."""
        state = capture(self.env)
        if state is None:
            return None
        steps = np.array([self._steps, self._episode_steps], dtype=np.int64)
        return {**state, "guard.obs": self._obs.copy(), "guard.steps": steps}

    @property
    def restored(self) -> None:
        """Assigning a snapshot restores it: an attribute is what a vector environment can set for one environment."""

    @restored.setter
    def restored(self, state: dict[str, np.ndarray]) -> None:
        reinstate(self.env, state)
        self._obs = np.array(state["guard.obs"], dtype=np.float32)
        self._steps, self._episode_steps = (int(count) for count in state["guard.steps"])

    def _begin(self, seed: int | None = None) -> None:
        obs, _ = self.env.reset(seed=seed)
        self._episode_steps = 0
        self._obs = self._vector(obs)
        if not self._finite:
            raise ValueError(f"the first observation of an episode is not finite: {self._obs.tolist()}")

    def _vector(self, obs: Any) -> np.ndarray:
        # Beyond the range of float32 is as good as infinite.
        with np.errstate(over="ignore", invalid="ignore"):
            vector = np.array(obs, dtype=np.float32)
            # Zero times a number is zero where that is finite: this is asked at every step, and asking each number and
            # then for all of them takes several times as long.
            self._finite = vector.shape == self._zeros.shape and vector.dot(self._zeros) == 0.0
        if vector.shape != (self.obs_dim,):
            raise ValueError(f"expected an observation of shape {(self.obs_dim,)}, got {vector.shape}")
        return vector

    def _failed(self, error: Exception) -> np.ndarray:
        self.failure = Failure(self._steps, self._episode_steps, error)
        row = np.zeros(2 * self.obs_dim + _EXTRAS, dtype=np.float32)
        row[-1] = 1.0
        return row

    def _row(
        self, final_obs: np.ndarray, reward: float, terminated: bool, truncated: bool, success: float, invalid: bool
    ) -> np.ndarray:
        row = np.empty(2 * self.obs_dim + _EXTRAS, dtype=np.float32)
        row[: self.obs_dim] = self._obs
        row[self.obs_dim : -_EXTRAS] = final_obs
        row[-_EXTRAS:] = (reward, terminated, truncated, success, invalid, False)
        return row


def unpack(rows: np.ndarray) -> tuple[Step, np.ndarray]:
    """Reads rows [N, 2 O + 6]: what happened, and which environments failed (indices)."""
    obs_dim = (rows.shape[1] - _EXTRAS) // 2
    rewards, terminated, truncated, success, invalid, failed = rows[:, -_EXTRAS:].T
    step = Step(
        rows[:, :obs_dim].copy(),
        rewards.copy(),
        terminated != 0.0,
        truncated != 0.0,
        rows[:, obs_dim:-_EXTRAS].copy(),
        success.copy(),
        invalid != 0.0,
    )
    return step, np.flatnonzero(failed)
