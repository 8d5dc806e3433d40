"""The DM control suite needs an older MuJoCo than everything else is tested with: these tests run in processes that
import the one in .mujoco/, which the Makefile puts there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastflow.errors import MissingExtra
from fastflow.online_envs import make_envs, make_single

ROOT = Path(__file__).resolve().parents[1]
MUJOCO = ROOT / ".mujoco" / "3.17.0"
mujoco = pytest.importorskip("mujoco")
pytest.importorskip("dm_control")
older = pytest.mark.skipif(not (MUJOCO / ".complete").is_file(), reason="needs .mujoco/3.17.0, which `make test` fills")
SIZES = {
    "ball_in_cup-catch": (8, 2),
    "cartpole-balance": (5, 1),
    "cheetah-run": (17, 6),
    "finger-spin": (9, 2),
    "finger-turn_easy": (12, 2),
    "finger-turn_hard": (12, 2),
    "fish-swim": (24, 5),
    "point_mass-easy": (4, 2),
    "reacher-easy": (6, 2),
    "reacher-hard": (6, 2),
}


@pytest.fixture
def python(tmp_path, plain_environment):
    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "script.py"
        script.write_text(code, encoding="utf-8")
        path = f"{MUJOCO}:{ROOT}"
        return subprocess.run(
            [sys.executable, "-W", "error", str(script)],
            cwd=tmp_path,
            env={**plain_environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


TASKS = """
import numpy as np
from fastflow.online_envs import make_envs, make_single

def same(x, y):
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(vars(x).values(), vars(y).values(), strict=True))

for task, sizes in {sizes!r}.items():
    name = "dmc-" + task
    with make_envs(name, 2) as envs, make_envs(name, 2) as others:
        assert (envs.obs_dim, envs.action_dim) == sizes, (name, envs.obs_dim, envs.action_dim)
        assert (envs.low == -1).all() and (envs.high == 1).all()
        rng = np.random.default_rng(0)
        actions = rng.uniform(-1, 1, (1100, 2, envs.action_dim)).astype(np.float32)
        first = envs.reset(3)
        assert first.dtype == np.float32 and not np.array_equal(first[0], first[1])
        for t in range(950):
            step = envs.step(actions[t])
            assert not (step.terminated | step.truncated | step.invalid).any()
            assert (step.rewards >= 0).all() and (step.rewards <= 1).all() and np.isnan(step.success).all()
        state = envs.snapshot()
        assert all(value.dtype != object for value in state.values())
        expected = [envs.step(actions[t]) for t in range(950, 1100)]
        assert [t for t, step in enumerate(expected) if step.truncated.any()] == [49], name
        assert expected[49].truncated.all() and not expected[49].terminated.any()
        assert not np.array_equal(expected[49].obs, expected[49].final_obs)
        others.reset(4)
        others.restore(state)
        for t, step in enumerate(expected):
            assert same(others.step(actions[950 + t]), step), (name, t)
        # Seeds: the same again, and by hand.
        assert np.array_equal(envs.reset(3), first)
        single = make_single(name)
        seeds = np.random.SeedSequence(3).generate_state(2, np.uint64)
        assert np.array_equal(single.reset(seed=int(seeds[1]))[0], first[1])
        obs, reward, terminated, truncated, info = single.step(actions[0, 1])
        step = envs.step(actions[0])
        assert np.array_equal(obs, step.obs[1]) and np.float32(reward) == step.rewards[1]
        single.close()
print("done")
"""


@older
def test_ten_tasks(python):
    done = python(TASKS.format(sizes=SIZES))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"


OTHERS = """
import numpy as np
import mujoco
from fastflow.errors import UserError
from fastflow.online_envs import make_envs, make_single
from fastflow.online_envs.dm_control import make_task

def main():
    assert mujoco.__version__ == "3.17.0"
    # In a process, and Gymnasium's with this MuJoCo.
    for name in ("dmc-finger-turn_hard", "Hopper-v5"):
        with make_envs(name, 1, asynchronous=True) as envs, make_envs(name, 1) as others:
            envs.reset(1)
            others.restore(envs.snapshot())
            for action in np.random.default_rng(0).uniform(-1, 1, (100, 1, envs.action_dim)):
                assert np.array_equal(envs.step(action).obs, others.step(action).obs)
    # Physics that breaks.
    envs = make_envs("dmc-cheetah-run", 2)
    obs = envs.reset(0)
    envs._guards[1].unwrapped._env.physics.data.qvel[:] = 1e13
    step = envs.step(np.zeros((2, 6)))
    assert step.invalid.tolist() == step.terminated.tolist() == [False, True] and step.rewards[1] == 0
    assert np.array_equal(step.final_obs[1], obs[1]) and np.isfinite(step.obs).all()
    assert not envs.step(np.zeros((2, 6))).invalid.any()
    for call, message in (
        (lambda: make_task("cheetah", "fly"), "dmc-cheetah-fly: "),
        (lambda: make_single("dmc-cheetah-run", render_mode="human"), "render_mode: expected"),
    ):
        try:
            call()
        except (UserError, ValueError) as error:
            assert str(error).startswith(message), error
        else:
            raise AssertionError(message)
    assert make_single("dmc-cheetah-run").render() is None
    print("done")

if __name__ == "__main__":
    main()
"""


@older
def test_processes_failures_and_options(python):
    done = python(OTHERS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"


PICTURE = """
from fastflow.online_envs import make_single
env = make_single("dmc-reacher-easy", render_mode="rgb_array", height=48, width=64)
env.reset(seed=0)
picture = env.render()
assert picture.std() > 0
print(picture.shape, picture.dtype, env.metadata["render_fps"])
"""


@older
def test_pictures(python):
    done = python(PICTURE, MUJOCO_GL="egl")
    if done.returncode:
        assert "GL" in done.stderr, done.stderr
        pytest.skip("needs EGL")
    assert done.stdout.strip() == "(48, 64, 3) uint8 50"


@pytest.mark.skipif(int(mujoco.__version__.split(".")[0]) < 4, reason="needs mujoco 4")
@pytest.mark.parametrize("make", [lambda name: make_envs(name, 1), make_single])
def test_a_mujoco_that_is_too_new(make):
    with pytest.raises(MissingExtra) as error:
        make("dmc-fish-swim")
    assert str(error.value) == (
        f'dm_control needs mujoco>=3.17,<4, and this is mujoco {mujoco.__version__}: pip install "fastflow[rl,dmc]"'
    )
