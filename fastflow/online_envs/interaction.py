"""Environments under way: what is acted on next, what the episodes came to, and how all of it is saved."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fastflow.errors import UserError
from fastflow.online_envs.vector import OnlineEnvs, Step

__all__ = ["Interaction"]


class _Episodes:
    """What the environments' episodes came to: those under way, and those that ended since they were last told."""

    def __init__(self, num_envs: int) -> None:
        self.returns = np.zeros(num_envs)
        self.lengths = np.zeros(num_envs, dtype=np.int64)
        self.ended: list[tuple[float, float, float]] = []
        self.invalid = 0

    def add(self, rewards: np.ndarray, ended: np.ndarray, success: np.ndarray, invalid: np.ndarray) -> None:
        self.returns += rewards
        self.lengths += 1
        self.invalid += int(invalid.sum())
        for i in np.flatnonzero(ended):
            self.ended.append((float(self.returns[i]), float(self.lengths[i]), float(success[i])))
            self.returns[i] = self.lengths[i] = 0

    def tell(self) -> dict[str, float]:
        """Means over the episodes that ended since the last call."""
        row: dict[str, float] = {"rollout/episodes": float(len(self.ended)), "rollout/invalid": float(self.invalid)}
        if self.ended:
            returns, lengths, success = np.array(self.ended).T
            row |= {"rollout/episode.return": float(returns.mean()), "rollout/episode.length": float(lengths.mean())}
            if not np.isnan(success).any():
                row["rollout/success"] = float(success.mean())
        self.ended.clear()
        self.invalid = 0
        return row

    def tensors(self) -> dict[str, Tensor]:
        """All of it, for a checkpoint; an unknown success is -1 there, because checkpoints hold finite numbers."""
        ended = np.array(self.ended, dtype=np.float64).reshape(-1, 3)
        return {
            "returns": torch.from_numpy(self.returns.copy()),
            "lengths": torch.from_numpy(self.lengths.copy()),
            "ended": torch.from_numpy(np.where(np.isnan(ended), -1.0, ended)) if len(ended) else torch.zeros(0, 3),
            "invalid": torch.tensor(self.invalid),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `tensors` gave."""
        self.returns[:] = state["returns"].numpy()
        self.lengths[:] = state["lengths"].numpy()
        rows = state["ended"].tolist()
        self.ended = [(returns, length, math.nan if success < 0 else success) for returns, length, success in rows]
        self.invalid = int(state["invalid"])


class Interaction:
    """N environments in which episodes have begun.

    Args:
        envs: the environments; they are reset.
        seed: of the reset.

    Attributes:
        obs: what to act on next, float32 [N, O].
        lengths: steps of the episodes under way, int64 [N].
    """

    def __init__(self, envs: OnlineEnvs, seed: int) -> None:
        self.envs = envs
        self.obs = envs.reset(seed)
        self._episodes = _Episodes(envs.num_envs)
        self._failed = False

    @property
    def lengths(self) -> np.ndarray:
        return self._episodes.lengths

    def step(self, actions: np.ndarray) -> Step:
        """Acts once in every environment, actions [N, A] in the environments' own units.

        Raises:
            UserError: an environment raised, or an action is not finite.
        """
        finite = np.isfinite(actions).all(-1)
        if not finite.all():
            i = int(np.flatnonzero(~finite)[0])
            raise UserError(
                f"the policy's action is not finite, {actions[i].tolist()} in environment {i} of {self.envs.name} at "
                f"step {int(self.lengths[i])} of its episode: the policy has diverged. A smaller learning rate may "
                "help (--agent.lr)"
            )
        try:
            step = self.envs.step(actions)
        except UserError:
            self._failed = True
            raise
        self.obs = step.obs
        self._episodes.add(step.rewards, step.terminated | step.truncated, step.success, step.invalid)
        return step

    def tell(self) -> dict[str, float]:
        """Numbers about the episodes that ended since the last call, for a row of train.csv."""
        return self._episodes.tell()

    def state_dict(self) -> dict[str, Tensor]:
        """Environments, where they can be saved, and the episodes under way; nothing where they cannot."""
        # After a failure there is nothing to be saved of environments that are closed.
        snapshot = None if self._failed else self.envs.snapshot()
        if snapshot is None:
            return {}
        state = {f"envs/{name}": torch.from_numpy(_signed(array)) for name, array in snapshot.items()}
        return state | self._episodes.tensors()

    def load_state_dict(self, state: Mapping[str, Tensor], seed: int) -> bool:
        """Takes up the episodes under way, or begins new ones from `seed` where the environments could not be saved.

        Returns:
            Whether they were saved.
        """
        if not state:
            self.obs = self.envs.reset(seed)
            return False
        expected = self.envs.snapshot()
        assert expected is not None
        arrays = {
            name.removeprefix("envs/"): value.numpy() for name, value in state.items() if name.startswith("envs/")
        }
        self.obs = self.envs.restore(
            {name: array.view(expected[name].dtype) if name in expected else array for name, array in arrays.items()}
        )
        self._episodes.load(state)
        return True


def _signed(array: np.ndarray) -> np.ndarray:
    """An array of a dtype that every version of torch and safetensors knows, same bits; contiguous."""
    array = np.array(array, order="C")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        return array.view(f"i{array.dtype.itemsize}")
    return array
