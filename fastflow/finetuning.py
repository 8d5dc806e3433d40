"""Online fine-tuning of an agent that learns from a dataset: it acts in one environment, and what happens comes to the
replay buffer that its batches are drawn from.

The protocol is that of FQL's code (arXiv:2502.02538), as floq has it: one step of the policy as it is, noise included
and none added, before the updates that belong to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastflow.data import ACTION_LIMIT, Dataset
from fastflow.errors import UserError
from fastflow.online_envs import make_envs
from fastflow.online_envs.interaction import Interaction
from fastflow.replay import ReplayBuffer, ReplayFiles

__all__ = ["FineTuning"]

# What must not change once online learning has begun, in the order of the saved tensor.
_RULES = ("steps", "utd_ratio", "balanced_sampling", "buffer_size")


class FineTuning:
    """The online part of a run.

    Args:
        settings: `fastflow.offline.TrainSettings`.
        data: the offline data.
        reward_range: (low, high) that rewards are expected in.
        path: the run folder. out: called with lines of text.

    Attributes:
        buffer: the replay buffer, None before the first step.

    Raises:
        UserError: the environment cannot be made, or it is not that of the data.
    """

    def __init__(
        self, settings: Any, data: Dataset, reward_range: tuple[float, float], path: Path, out: Callable[[str], None]
    ) -> None:
        self.settings, self.data, self.out = settings, data, out
        self.low, self.high = reward_range
        self.buffer: ReplayBuffer | None = None
        self.files = ReplayFiles(path / "replay")
        envs = make_envs(settings.env, 1)
        if (data.obs_dim, data.action_dim) != (envs.obs_dim, envs.action_dim):
            envs.close()
            raise UserError(
                f"the dataset has {data.obs_dim} observations and {data.action_dim} actions per row, but "
                f"{settings.env} has {envs.obs_dim} and {envs.action_dim}: is it the dataset of another task?"
            )
        self.envs = envs
        self._interaction = Interaction(envs, self._seed())
        self._outside = [0, 0]  # in all, and since the last row of train.csv

    def _seed(self, *path: int) -> int:
        # 1 is that of on-policy agents.
        return int(np.random.SeedSequence([self.settings.seed, 2, *path]).generate_state(1)[0])

    def _begin(self) -> ReplayBuffer:
        settings = self.settings
        return ReplayBuffer(self.data, settings.buffer_size, balanced=settings.balanced_sampling)

    def step(self, agent: Any, generator: torch.Generator) -> None:
        """One step of the environment, which goes to the buffer.

        Raises:
            UserError: the environment raised, or the policy's action is not finite.
        """
        if self.buffer is None:
            self.buffer = self._begin()
        obs = torch.from_numpy(self._interaction.obs)
        actions = agent.act(obs.to(self.data.device), generator).cpu()
        step = self._interaction.step(actions.numpy())
        if step.invalid[0]:
            # Where the simulation broke there is nothing to be learnt.
            return
        terminated, ended = float(step.terminated[0]), float(step.terminated[0] | step.truncated[0])
        self.buffer.add(
            {
                "observations": obs[0],
                "actions": actions[0].clamp(-ACTION_LIMIT, ACTION_LIMIT),
                "next_observations": torch.from_numpy(step.final_obs[0]),
                "rewards": torch.tensor(step.rewards[0]),
                # The value of a state at which the episode was merely cut off is used.
                "masks": torch.tensor(1.0 - terminated),
                "terminals": torch.tensor(ended),
            }
        )
        self._check(float(step.rewards[0]))

    def _check(self, reward: float) -> None:
        if self.low <= reward <= self.high:
            return
        if not self._outside[0]:
            self.out(
                f"warning: a reward of {reward:g} online is outside the range [{self.low:g}, {self.high:g}] that the "
                "critic's values are made for; rollout/outside_range in train.csv counts such rewards"
            )
        self._outside = [count + 1 for count in self._outside]

    def report(self) -> dict[str, float]:
        """Numbers for a row of train.csv: episodes that ended, and the buffer."""
        if self.buffer is None:
            return {}
        row = self._interaction.tell()
        row |= {"rollout/transitions": float(self.buffer.added), "rollout/outside_range": float(self._outside[1])}
        self._outside[1] = 0
        return row

    # State ----------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes new transitions to the run folder."""
        if self.buffer is not None:
            self.files.save(self.buffer)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds; nothing before the first step."""
        if self.buffer is None:
            return {}
        return {
            "online/rules": torch.tensor(self._rules()),
            "online/transitions": torch.tensor(self.buffer.added),
            "online/outside": torch.tensor(self._outside),
            **self._interaction.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a checkpoint that was made online, with the transitions in the run folder.

        Raises:
            UserError: transitions are missing, or settings have changed that define what is in the buffer.
        """
        saved = dict(zip(_RULES, state["online/rules"].tolist(), strict=True))
        asked = dict(zip(_RULES, self._rules(), strict=True))
        lines = [f"{name}: {saved[name]} there, {asked[name]} here" for name in _RULES if saved[name] != asked[name]]
        if lines:
            raise UserError("online learning began with other settings:\n  " + "\n  ".join(lines))
        added = int(state["online/transitions"])
        buffer = self._begin()
        self.files.load(buffer, added)
        self._outside = state["online/outside"].tolist()
        rest = {name: value for name, value in state.items() if not name.startswith("online/")}
        if not self._interaction.load_state_dict(rest, self._seed(added)):
            self.out(
                f"{self.envs.name}: the environment's state could not be saved; its episode under way begins anew, at "
                "a start that seed and step decide, so the run does not go on as if it had not stopped"
            )
        self.buffer = buffer

    def _rules(self) -> list[int]:
        return [int(getattr(self.settings, name)) for name in _RULES]

    def close(self) -> None:
        """Closes the environment."""
        self.envs.close()
