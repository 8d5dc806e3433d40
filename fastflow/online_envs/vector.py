"""What every group of environments offers, and the checks that they share."""

from __future__ import annotations

import abc
import dataclasses
from types import TracebackType

import numpy as np

from fastflow.errors import UserError

__all__ = ["EnvironmentFailed", "OnlineEnvs", "Step"]


class EnvironmentFailed(UserError):
    """An environment raised, or its process ended. The original error is the cause (`__cause__`), in words if it was
    raised in another process.

    Attributes:
        index: which of the environments.
        steps: how many steps it had begun since it was made.
    """

    def __init__(self, message: str, index: int, steps: int) -> None:
        super().__init__(message)
        self.index = index
        self.steps = steps


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of N environments, each of which begins a new episode in the step that ends one.

    Attributes:
        obs: float32 [N, O], what to act on next: the first observation of the new episode where one ended.
        rewards: float32 [N].
        terminated: bool [N], the episode ended in a state without a future.
        truncated: bool [N], the episode was cut off, its last state has a future; never together with `terminated`.
        final_obs: float32 [N, O], where this step led: the ended episode's last observation, else equal to `obs`.
        success: float32 [N], `info["success"]` of this step; NaN where the environment reports none.
        invalid: bool [N], the simulation broke (see `guard.Guard`): the reward is 0, `terminated` is True and
            `final_obs` is the last finite observation, so that nothing non-finite comes from here.
    """

    obs: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    final_obs: np.ndarray
    success: np.ndarray
    invalid: np.ndarray


class OnlineEnvs(abc.ABC):
    """N environments of one kind that step together. A context manager that closes them.

    Attributes:
        name: as given to `make_envs`.
        num_envs, obs_dim, action_dim: N, O, A.
        low, high: bounds of the actions, float32 [A].
    """

    def __init__(self, name: str, num_envs: int, obs_dim: int, low: np.ndarray, high: np.ndarray) -> None:
        self.name = name
        self.num_envs = num_envs
        self.obs_dim = obs_dim
        self.low = np.array(low, dtype=np.float32)
        self.high = np.array(high, dtype=np.float32)
        self.action_dim = len(self.low)
        self._started = False

    def reset(self, seed: int) -> np.ndarray:
        """Begins an episode in every environment. Everything random that follows is fixed by `seed`; runs whose seeds
        differ, by as little as 1, have no environment in common.

        Returns:
            First observations, float32 [N, O].

        Raises:
            ValueError: `seed` is negative.
            EnvironmentFailed: an environment raised; all of them are closed.
        """
        if seed < 0:
            raise ValueError(f"seed: expected a non-negative integer, got {seed}")
        obs = self._reset(np.random.SeedSequence(seed))
        self._started = True
        return obs

    def step(self, actions: np.ndarray) -> Step:
        """Acts once in every environment.

        Args:
            actions: float32 [N, A] in the environment's own units; passed on as they are, so what an action outside
                `low` and `high` does is the environment's affair.

        Raises:
            ValueError: another shape, numbers that are not finite, or no `reset` before.
            EnvironmentFailed: an environment raised; all of them are closed.
        """
        self._check_started("step")
        actions = np.asarray(actions, dtype=np.float32)
        if actions.shape != (self.num_envs, self.action_dim):
            raise ValueError(f"actions: expected shape {(self.num_envs, self.action_dim)}, got {actions.shape}")
        if not np.isfinite(actions).all():
            i = int(np.flatnonzero(~np.isfinite(actions).all(axis=1))[0])
            raise ValueError(f"actions: expected finite numbers, got {actions[i].tolist()} for environment {i}")
        return self._step(actions)

    def snapshot(self) -> dict[str, np.ndarray] | None:
        """Everything that decides what follows: simulators, random generators, step counters.

        Returns:
            Plain numeric arrays, or None if these environments cannot tell all of their state.

        Raises:
            ValueError: no `reset` before.
        """
        self._check_started("snapshot")
        return self._snapshot()

    def restore(self, state: dict[str, np.ndarray]) -> np.ndarray:
        """Takes up where `snapshot` was taken, in these or in other environments of the same name and number: the
        steps that follow are the same bit for bit (on the same machine with the same packages).

        Returns:
            The current observations, float32 [N, O]: those that the last `reset` or `step` before the snapshot
            returned.

        Raises:
            ValueError: these environments have no snapshots, or `state` is not one of theirs.
        """
        if not self._started:
            # A simulator that was never reset has no state to be replaced.
            self.reset(0)
        expected = self._snapshot()
        if expected is None:
            raise ValueError(f"state: {self.name} cannot be restored, its environments do not tell all of their state")
        want = {key: value.shape for key, value in expected.items()}
        got = {key: np.shape(value) for key, value in state.items()}
        if want != got:
            different = sorted(key for key in want.keys() | got.keys() if want.get(key) != got.get(key))
            key = different[0]
            raise ValueError(
                f"state: not a snapshot of {self.num_envs} x {self.name}: "
                f"{key}: expected shape {want.get(key, 'nothing')}, got {got.get(key, 'nothing')}"
            )
        return self._restore(state)

    @abc.abstractmethod
    def close(self) -> None:
        """Closes the environments and ends their processes; may be called again."""

    def __enter__(self) -> OnlineEnvs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_started(self, what: str) -> None:
        if not self._started:
            raise ValueError(f"{what}: expected reset(seed) or restore(state) before it")

    @abc.abstractmethod
    def _reset(self, seeds: np.random.SeedSequence) -> np.ndarray: ...

    @abc.abstractmethod
    def _step(self, actions: np.ndarray) -> Step: ...

    @abc.abstractmethod
    def _snapshot(self) -> dict[str, np.ndarray] | None: ...

    @abc.abstractmethod
    def _restore(self, state: dict[str, np.ndarray]) -> np.ndarray: ...
