from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from fastflow import envs
from fastflow.errors import MissingExtra, UserError

ROOT = Path(__file__).resolve().parents[1]
simulator = pytest.mark.usefixtures("_ogbench")
FAMILIES = [
    "pointmaze-arena-navigate-singletask-v0",
    "pointmaze-teleport-navigate-singletask-task2-v0",
    "antmaze-medium-stitch-singletask-v0",
    "antsoccer-arena-navigate-singletask-v0",
    "cube-double-play-singletask-v0",
    "scene-noisy-singletask-task2-v0",
    "puzzle-3x3-play-singletask-v0",
]


@pytest.fixture
def _ogbench():
    pytest.importorskip("ogbench")


def rollout(env, seed: int, num_steps: int = 30) -> np.ndarray:
    rng = np.random.default_rng(seed)
    observations = [env.reset(seed=seed)[0]]
    for _ in range(num_steps):
        observations.append(env.step(rng.uniform(-1, 1, env.action_space.shape))[0])
    return np.stack(observations)


def test_names():
    names = envs.known_names()
    assert names == sorted(set(names))
    assert {
        "pointmaze-arena-navigate-singletask-v0",
        "pointmaze-arena-explore-singletask-task5-v0",
        "antmaze-giant-navigate-singletask-task1-v0",
        "scene-play-singletask-v0",
        "puzzle-4x6-noisy-singletask-task3-v0",
    } <= set(names)
    for name in names:
        envs.check_name(name)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("pointmaze-arena-navigat-singletask-v0", "did you mean pointmaze-arena-navigate-singletask-v0?"),
        ("cube-single-play-v0", "did you mean cube-single-play-singletask-v0?"),
        ("scene-play-singletask-task9-v0", "did you mean scene-play-singletask-task"),
        ("visual-scene-play-singletask-v0", "image observations are not supported; did you mean scene-play-singletask"),
        ("CartPole-v1", "unknown environment (names are"),
        ("", "unknown environment"),
    ],
)
def test_unknown_names_are_reported_with_the_nearest(name, suggestion):
    with pytest.raises(UserError) as error:
        envs.check_name(name)
    assert suggestion in str(error.value)
    with pytest.raises(UserError):
        envs.make_env(name)


def test_dataset_names():
    assert envs.dataset_name("cube-single-play-singletask-v0") == "cube-single-play-v0"
    assert envs.dataset_name("cube-single-play-singletask-task4-v0") == "cube-single-play-v0"
    assert envs.dataset_name("cube-single-play-v0") == "cube-single-play-v0"
    assert envs.is_published("cube-single-play-singletask-task4-v0")
    assert not envs.is_published("pointmaze-arena-navigate-singletask-v0")


@simulator
def test_every_name_is_an_environment_that_gymnasium_knows():
    envs.import_ogbench()
    import gymnasium

    for name in envs.known_names():
        splits = name.split("-")
        del splits[splits.index("singletask") - 1]
        assert "-".join(splits) in gymnasium.registry


@simulator
def test_arena_tasks():
    starts_and_goals = set()
    for task in range(1, 6):
        env = envs.make_env(f"pointmaze-arena-navigate-singletask-task{task}-v0")
        core = env.unwrapped
        assert core.num_tasks == 5 and core.cur_task_id == task
        start, _ = env.reset(seed=0)
        info = core.cur_task_info
        starts_and_goals.add((info["init_ij"], info["goal_ij"]))
        assert all(core.maze_map[ij] == 0 for ij in (info["init_ij"], info["goal_ij"]))
        assert tuple(core.cur_goal_xy) == core.ij_to_xy(info["goal_ij"])  # no noise on the goal
        assert np.abs(start - core.ij_to_xy(info["init_ij"])).max() <= 1.0
        assert env.spec.max_episode_steps == 1000
    assert len(starts_and_goals) == 5


@simulator
def test_default_task_of_the_arena_is_the_first_and_can_be_solved():
    env = envs.make_env("pointmaze-arena-navigate-singletask-v0")
    core = env.unwrapped
    xy, _ = env.reset(seed=3)
    length = 0
    assert (core.cur_task_info["init_ij"], core.cur_task_info["goal_ij"]) == ((1, 1), (6, 6))
    for _ in range(1000):
        length += 1
        distance = np.linalg.norm(core.cur_goal_xy - xy)
        direction = (core.cur_goal_xy - xy) / distance
        xy, reward, terminated, truncated, info = env.step(direction)
        # Success is judged before the step, as in OGBench's singletask environments; a point's tolerance is 1.
        assert (reward, terminated, info["success"]) == ((0.0, True, 1.0) if distance <= 1.0 else (-1.0, False, 0.0))
        assert not truncated
        if terminated:
            break
    assert terminated and 100 < length < 200


@simulator
@pytest.mark.parametrize("name", FAMILIES)
def test_a_seed_decides_the_episode(name):
    one, other = envs.make_env(name), envs.make_env(name)
    state = np.random.get_state()  # noqa: NPY002
    first = rollout(one, 0)
    different = rollout(one, 1)
    np.testing.assert_array_equal(rollout(one, 0), first)
    # Another process's environment, with another past.
    np.testing.assert_array_equal(rollout(other, 1), different)
    np.testing.assert_array_equal(rollout(other, 0), first)
    assert not np.array_equal(first[0], different[0])
    assert not np.array_equal(one.reset()[0], one.reset()[0])
    # Nobody else's random numbers are used.
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002
    assert first.dtype == np.float64 and one.action_space.dtype == np.float32
    one.close()
    other.close()


@simulator
def test_unseeded_environments_differ():
    name = "cube-single-play-singletask-v0"
    starts = [envs.make_env(name).reset()[0] for _ in range(2)]
    assert not np.array_equal(*starts)


@simulator
def test_no_files_are_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    env = envs.make_env("pointmaze-arena-navigate-singletask-v0")
    env.reset(seed=0)
    env.step(np.zeros(2, np.float32))
    assert not list(tmp_path.iterdir())


@simulator
def test_options_reach_the_environment():
    env = envs.make_env("pointmaze-arena-navigate-singletask-v0", max_episode_steps=3)
    env.reset(seed=0)
    assert [env.step(np.zeros(2))[3] for _ in range(3)] == [False, False, True]


@simulator
def test_no_display_and_warnings_as_errors():
    script = """
import warnings; warnings.simplefilter("error")
from fastflow.envs import make_env
for name in ("cube-single-play-singletask-v0", "pointmaze-arena-navigate-singletask-v0"):
    env = make_env(name); env.reset(seed=0); env.step(env.action_space.sample())
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("absent", ["gymnasium", "mujoco", "ogbench"])
def test_missing_extra_is_named(monkeypatch, absent):
    # Python's own way of saying that a module cannot be imported.
    monkeypatch.setitem(sys.modules, absent, None)
    envs.register()
    envs.check_name("pointmaze-arena-navigate-singletask-v0")
    with pytest.raises(MissingExtra) as error:
        envs.make_env("pointmaze-arena-navigate-singletask-v0")
    assert "is not installed" in str(error.value) and 'pip install "fastflow[rl]"' in str(error.value)
