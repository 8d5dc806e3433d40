"""OGBench's scripted policies for its manipulation environments, which ship in its package as "oracles"."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastflow.collect.recipes import Recipe
from fastflow.envs import NumpyStream, make_core_env

__all__ = ["ManipulationCollector"]

# Range of an episode's probability of stacking, by environment (OGBench, data_gen_scripts/generate_manipspace.py).
_STACKING = {
    "cube-single-v0": (0.0, 0.0),
    "cube-double-v0": (0.0, 0.25),
    "cube-triple-v0": (0.05, 0.35),
    "cube-quadruple-v0": (0.1, 0.5),
    "cube-octuple-v0": (0.0, 0.35),
}
_DEFAULT_STACKING = (0.5, 0.5)
_MIN_NORM = 0.4  # of a Markov oracle's motion
# Noise of "noisy" episodes relative to their level, per action: x, y, z, yaw, gripper.
_NOISE_SCALE = np.array([1.0, 1.0, 1.0, 3.0, 10.0])


class ManipulationCollector:
    """Collects episodes of cube, scene and puzzle environments as OGBench does
    (data_gen_scripts/generate_manipspace.py).

    play: an oracle that follows a noisy plan, one random target after another. noisy: a closed-loop oracle with
    Gaussian noise on its action, of a level drawn per episode, and now and then a random action.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._env: Any = make_core_env(recipe.env_id, terminate_at_goal=False, mode="data_collection")
        self._oracles = _make_oracles(recipe, self._env)

    def episode(self, seed: np.random.SeedSequence) -> dict[str, np.ndarray]:
        """One episode of T rows: observations [T, O], actions [T, 5], qpos [T, Q], qvel [T, V] float32, terminals [T]
        bool, and with buttons their states, button_states [T, N] int64."""
        while True:
            seed_of_attempt = seed.spawn(1)[0]
            rows = self._attempt(seed_of_attempt)
            if not self._recipe.env_id.startswith("scene") or _cube_stays_visible(rows["qpos"]):
                return rows

    def _attempt(self, seed: np.random.SeedSequence) -> dict[str, np.ndarray]:
        recipe, env = self._recipe, self._env
        choices_seed, stream_seed, env_seed = seed.spawn(3)
        rng = np.random.default_rng(choices_seed)
        observation, info = env.reset(seed=int(env_seed.generate_state(1)[0]))
        p_stack = rng.uniform(*_STACKING.get(recipe.env_id, _DEFAULT_STACKING))
        level = rng.uniform(0.0, recipe.noise)

        steps, has_buttons = recipe.steps, hasattr(env, "_cur_button_states")
        rows: dict[str, np.ndarray] = {
            "observations": np.empty((steps, observation.shape[0]), np.float32),
            "actions": np.empty((steps, 5), np.float32),
            "terminals": np.zeros(steps, bool),
            "qpos": np.empty((steps, env.model.nq), np.float32),
            "qvel": np.empty((steps, env.model.nv), np.float32),
        }
        if has_buttons:
            rows["button_states"] = np.empty((steps, len(env._cur_button_states)), np.int64)
        rows["terminals"][-1] = True
        # The oracles draw from NumPy's global generator.
        with NumpyStream(stream_seed):
            oracle = self._oracles[info["privileged/target_task"]]
            oracle.reset(observation, info)
            for i in range(steps):
                if rng.random() < recipe.random_action:
                    action = rng.uniform(-1.0, 1.0, 5)
                else:
                    action = np.array(oracle.select_action(observation, info))
                    if recipe.kind == "noisy":
                        action = action + rng.normal(0.0, level * _NOISE_SCALE)
                action = action.clip(-1.0, 1.0)
                rows["observations"][i] = observation
                rows["actions"][i] = action
                observation, _, _, _, info = env.step(action)
                if oracle.done:
                    # The step's own info is kept for the next action, as when OGBench's data were made.
                    target_observation, target_info = env.set_new_target(p_stack=p_stack)
                    oracle = self._oracles[target_info["privileged/target_task"]]
                    oracle.reset(target_observation, target_info)
                rows["qpos"][i] = info["prev_qpos"]
                rows["qvel"][i] = info["prev_qvel"]
                if has_buttons:
                    rows["button_states"][i] = info["prev_button_states"]
        return rows


def _make_oracles(recipe: Recipe, env: Any) -> dict[str, Any]:
    """The oracle of each kind of target in the environment."""
    names = {"cube": ("cube",), "puzzle": ("button",), "scene": ("cube", "button", "drawer", "window")}
    family = recipe.env_id.split("-")[0]
    options: dict[str, Any]
    if recipe.kind == "noisy":
        from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
        from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
        from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
        from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle

        classes = {
            "cube": CubeMarkovOracle,
            "button": ButtonMarkovOracle,
            "drawer": DrawerMarkovOracle,
            "window": WindowMarkovOracle,
        }
        options = {"min_norm": _MIN_NORM}
    else:
        from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
        from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
        from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
        from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

        classes = {
            "cube": CubePlanOracle,
            "button": ButtonPlanOracle,
            "drawer": DrawerPlanOracle,
            "window": WindowPlanOracle,
        }
        options = {"noise": recipe.noise, "noise_smoothing": 0.5}
    if family == "puzzle":
        options["gripper_always_closed"] = True
    return {name: classes[name](env=env, **options) for name in names[family]}


def _cube_stays_visible(qpos: np.ndarray) -> bool:
    """Whether the scene's cube never goes too far to one side, except into the drawer: goals would become ambiguous."""
    y, z = qpos[:, 15], qpos[:, 16]
    outside_drawer = (z < 0.06) | (z > 0.08)
    return not ((y >= 0.29).any() or ((y <= -0.3) & outside_drawer).any())
