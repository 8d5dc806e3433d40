"""Tasks of the DM control suite as Gymnasium environments: the ten of the FPO paper (arXiv:2507.21053, table 1).

dm_control 1.0.50, the newest, does not work with MuJoCo 4 (it asks for `MjModel.flex_vertedge`, which is no more),
hence an extra of its own: `pip install "fastflow[rl,dmc]"`. OGBench and Gymnasium work with its older MuJoCo too.

Source: Tassa et al., DeepMind Control Suite (arXiv:1801.00690).
"""

from __future__ import annotations

import math
import re
from typing import Any

import gymnasium
import numpy as np

from fastflow.errors import MissingExtra, UserError, missing_extra
from fastflow.online_envs.generators import random_state, set_random_state
from fastflow.online_envs.ogbench import quiet_simulator
from fastflow.online_envs.simulator import has_diverged, set_simulator_state, simulator_state

__all__ = ["DmControl", "check_versions", "make_task"]


def check_versions() -> None:
    """Checks that the suite can work, before it fails in the middle of loading a model.

    Raises:
        MissingExtra: MuJoCo or dm_control is not installed, or that MuJoCo is too new.
    """
    try:
        with quiet_simulator():
            import mujoco
    except ImportError as error:
        raise missing_extra("rl,dmc", error.name or "mujoco") from error
    found = re.match(r"(\d+)\.(\d+)", mujoco.__version__)
    if found is None or not (3, 17) <= (int(found[1]), int(found[2])) < (4, 0):
        raise MissingExtra(
            f'dm_control needs mujoco>=3.17,<4, and this is mujoco {mujoco.__version__}: pip install "fastflow[rl,dmc]"'
        )
    try:
        with quiet_simulator():
            import dm_control.suite  # noqa: F401
    except ImportError as error:
        raise missing_extra("rl,dmc", error.name or "dm_control") from error


def make_task(domain: str, task: str, **kwargs: Any) -> DmControl:
    """Makes the environment of a task; `kwargs` are `DmControl`'s.

    Raises:
        MissingExtra: see `check_versions`.
        UserError: the suite has no such task.
    """
    check_versions()
    return DmControl(domain, task, **kwargs)


class DmControl(gymnasium.Env):
    """One task of the suite.

    Observations are the task's arrays in their order, flattened, float32 [O]; actions are float64 [A] within the
    task's bounds; rewards are in [0, 1] per control step. An episode that ends with a discount of 0 has terminated; the
    ten tasks never do that, and are truncated after 1000 steps. Where the physics breaks, the episode ends with
    `info["invalid"]`, the last observation and no reward.

    Args:
        domain, task: such as "cheetah" and "run".
        render_mode: None, or "rgb_array" for pictures uint8 [height, width, 3].
        height, width, camera: of pictures.

    Raises:
        ValueError: another `render_mode`.
        UserError: the suite has no such task.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012 (Gymnasium's)

    def __init__(
        self,
        domain: str,
        task: str,
        render_mode: str | None = None,
        height: int = 240,
        width: int = 320,
        camera: int = 0,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f'render_mode: expected None or "rgb_array", got {render_mode!r}')
        with quiet_simulator():
            from dm_control import suite
        # The task keeps this object and draws from nothing else, so that seeding it seeds the task.
        self._random = np.random.RandomState(0)
        try:
            self._env = suite.load(domain, task, task_kwargs={"random": self._random})
        except ValueError as error:
            raise UserError(f"dmc-{domain}-{task}: {error}") from error
        self._observation = _flat(self._env.reset().observation)
        self._seed(None)
        actions = self._env.action_spec()
        low, high = (np.broadcast_to(bound, actions.shape) for bound in (actions.minimum, actions.maximum))
        self.action_space = gymnasium.spaces.Box(low, high, actions.shape, np.float64)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, self._observation.shape, np.float32)
        self.render_mode = render_mode
        self.metadata = {**self.metadata, "render_fps": round(1 / self._env.control_timestep())}
        self._picture = dict(height=height, width=width, camera_id=camera)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins an episode; `seed` also decides the episodes after it."""
        super().reset(seed=seed)
        if seed is not None:
            self._seed(seed)
        self._observation = _flat(self._env.reset().observation)
        return self._observation, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Applies `action` [A] for one control step."""
        from dm_control.rl.control import PhysicsError

        try:
            step = self._env.step(action)
        except PhysicsError:
            return self._observation, 0.0, True, False, {"invalid": True}
        physics = self._env.physics
        invalid = has_diverged(physics.data.ptr) or not math.isfinite(step.reward)
        if invalid:
            return self._observation, 0.0, True, False, {"invalid": True}
        self._observation = _flat(step.observation)
        terminated = bool(step.last() and step.discount == 0.0)
        return self._observation, float(step.reward), terminated, bool(step.last()) and not terminated, {}

    def render(self) -> np.ndarray | None:
        """A picture, uint8 [height, width, 3], or None without a render mode."""
        return None if self.render_mode is None else self._env.physics.render(**self._picture)

    def close(self) -> None:
        """Frees the simulation."""
        self._env.close()

    def snapshot(self) -> dict[str, np.ndarray]:
        """Everything that decides what follows, as arrays."""
        physics = self._env.physics
        words, gauss = random_state(self._random)
        counters = np.array([self._env._step_count, self._env._reset_next_step], dtype=np.int64)
        state = {"core.random": words, "core.gauss": gauss, "core.counters": counters}
        return {**state, "core.observation": self._observation.copy(), **simulator_state(*_pointers(physics))}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Takes up where `snapshot` was taken."""
        set_random_state(self._random, state["core.random"], state["core.gauss"])
        steps, over = state["core.counters"]
        self._env._step_count, self._env._reset_next_step = int(steps), bool(over)
        self._observation = np.array(state["core.observation"], dtype=np.float32)
        set_simulator_state(*_pointers(self._env.physics), state)

    def _seed(self, seed: int | None) -> None:
        fresh = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
        self._random.set_state(fresh.get_state(legacy=True))


def _flat(observation: Any) -> np.ndarray:
    return np.concatenate([np.ravel(part) for part in observation.values()]).astype(np.float32)


def _pointers(physics: Any) -> tuple[Any, Any]:
    """MuJoCo's own model and data inside dm_control's."""
    return physics.model.ptr, physics.data.ptr
