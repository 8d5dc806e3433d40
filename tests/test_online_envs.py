from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import HIDE

from fastflow.errors import UserError
from fastflow.online_envs import EnvironmentFailed, OnlineEnvs, Step, check_name, known_names, make_envs, make_single

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")

GYMNASIUM = ["Pendulum-v1", "Reacher-v5", "Hopper-v5", "HalfCheetah-v5", "Walker2d-v5"]
NATIVE = ["gridworld-two-walls", "gridworld-three-goals", "gridworld-cshape", "bandit-two-modes"]


class Faulty(gymnasium.Env):
    """Does what `fault` says at its third step, and has the spaces it is given."""

    def __init__(self, fault: str = "", observations=None, actions=None):
        self.observation_space = observations or gymnasium.spaces.Box(-1, 1, (2,), np.float64)
        self.action_space = actions or gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        self.fault = fault
        self.steps = 0
        self.closed = False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.fault == "reset" or (self.fault == "second reset" and self.steps):
            raise OSError("no new episode")
        self.steps = 0
        return np.full(2, np.nan if self.fault == "nan at reset" else 0.0), {}

    def step(self, action):
        self.steps += 1
        observation, reward, info = np.full(2, self.steps / 10), 1.0, {}
        if self.steps == 3:
            if self.fault == "raise":
                raise ZeroDivisionError("three is too many")
            if self.fault == "exit":
                os._exit(7)
            observation[1] = {"nan observation": np.nan, "huge observation": 1e300}.get(self.fault, 0.3)
            reward = {"nan reward": np.nan, "infinite reward": -np.inf}.get(self.fault, 1.0)
            info = {"invalid": True} if self.fault == "says so" else {"success": True}
        over = self.steps == 3 and self.fault == "second reset"
        return observation, reward, over, over, info

    def close(self):
        if self.fault == "raise" and self.steps == 3:
            raise RuntimeError("cannot close either")
        self.closed = True


def register(**kwargs) -> str:
    """Registers a faulty environment and returns its name."""
    name = f"Faulty{len(gymnasium.registry)}-v0"
    gymnasium.register(name, Faulty, kwargs=kwargs)
    return name


def actions_for(envs: OnlineEnvs, steps: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.uniform(envs.low, envs.high, (steps, envs.num_envs, envs.action_dim)).astype(np.float32)


def assert_same(actual: Step, expected: Step) -> None:
    for field, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(actual, field), value, err_msg=field)


def processes() -> set[int | None]:
    return {process.pid for process in multiprocessing.active_children()}


# --- names ------------------------------------------------------------------------------------------------------------


def test_known_names():
    names = known_names()
    assert names == sorted(set(names))
    assert {*GYMNASIUM, *NATIVE, "dmc-ball_in_cup-catch", "online-ant-v0", "pointmaze-arena-singletask-v0"} <= set(
        names
    )
    assert sum(name.startswith("dmc-") for name in names) == 10
    assert sum(name.startswith("gridworld-") for name in names) == 5
    # With the type of a dataset, and what only Gymnasium knows.
    for name in [*names, "pointmaze-arena-navigate-singletask-task2-v0", "Swimmer-v5"]:
        check_name(name)
    check_name("gymnasium.envs.mujoco:Hopper-v5")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Hoper-v5", "Hoper-v5: unknown environment; did you mean Hopper-v5?"),
        ("gridworld-two_walls", "did you mean gridworld-two-walls?"),
        ("dmc-reacher-eazy", "did you mean dmc-reacher-easy?"),
        ("bandit-three-modes", "did you mean bandit-two-modes?"),
        ("pointmaze-arena-singletask-v1", "did you mean pointmaze-arena-singletask-v0?"),
        ("no_such_module:Hopper-v5", "the module no_such_module cannot be imported"),
        ("zzz", "unknown environment (known are"),
    ],
)
def test_unknown_names(name, message):
    for call in (check_name, make_single, lambda name: make_envs(name, 1)):
        with pytest.raises(UserError) as error:
            call(name)
        assert message in str(error.value)


@pytest.mark.parametrize("num_envs", [0, -1])
def test_num_envs(num_envs):
    with pytest.raises(ValueError, match=f"num_envs: expected at least 1, got {num_envs}"):
        make_envs("Pendulum-v1", num_envs)


@pytest.mark.parametrize("hidden", ["gymnasium", "mujoco"])
def test_without_the_extra(hidden, plain_environment, tmp_path):
    code = (
        "from fastflow.errors import MissingExtra\n"
        "from fastflow.online_envs import check_name, known_names, make_envs\n"
        "assert known_names()\n"
        "check_name('gridworld-two-walls')\n"
        "try:\n"
        "    make_envs('Hopper-v5', 1)\n"
        "except MissingExtra as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", HIDE.format(names={hidden}) + code],
        cwd=tmp_path,
        env={**plain_environment, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f'{hidden} is not installed, and this needs it: pip install "fastflow[rl]"'


# --- stepping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "obs_dim", "action_dim"),
    [
        ("Pendulum-v1", 3, 1),
        ("Reacher-v5", 10, 2),
        ("Hopper-v5", 11, 3),
        ("HalfCheetah-v5", 17, 6),
        ("Walker2d-v5", 17, 6),
        ("online-ant-v0", 27, 8),
        ("online-humanoid-v0", 67, 21),
        ("pointmaze-arena-singletask-v0", 2, 2),
        ("pointmaze-teleport-stitch-singletask-task2-v0", 2, 2),
        ("gridworld-tree-in-the-middle", 2, 2),
        ("gridworld-two-slits", 2, 2),
        ("bandit-two-modes", 1, 2),
    ],
)
def test_shapes_and_types(name, obs_dim, action_dim):
    if name.startswith(("online-", "pointmaze-")):
        pytest.importorskip("ogbench")
    for num_envs in (1, 3):
        with make_envs(name, num_envs) as envs:
            assert (envs.name, envs.num_envs, envs.obs_dim, envs.action_dim) == (name, num_envs, obs_dim, action_dim)
            assert envs.low.shape == envs.high.shape == (action_dim,)
            assert envs.low.dtype == envs.high.dtype == np.float32
            assert (envs.low < envs.high).all()
            obs = envs.reset(5)
            assert obs.shape == (num_envs, obs_dim)
            assert obs.dtype == np.float32
            for actions in actions_for(envs, 4):
                step = envs.step(actions)
                assert step.obs.shape == step.final_obs.shape == (num_envs, obs_dim)
                assert step.obs.dtype == step.final_obs.dtype == step.rewards.dtype == step.success.dtype == np.float32
                for flags in (step.terminated, step.truncated, step.invalid):
                    assert flags.shape == (num_envs,)
                    assert flags.dtype == bool
                assert not step.invalid.any()
                assert np.isnan(step.success).all() == (not name.startswith(("pointmaze", "gridworld")))


@pytest.mark.parametrize("name", [*GYMNASIUM, "gridworld-two-walls", "pointmaze-arena-singletask-v0"])
def test_seeds(name):
    if name.startswith("pointmaze-"):
        pytest.importorskip("ogbench")
    with make_envs(name, 3) as envs, make_envs(name, 3) as others:
        actions = actions_for(envs, 60)
        first = [envs.reset(7), *map(envs.step, actions)]
        again = [envs.reset(7), *map(envs.step, actions)]
        elsewhere = [others.reset(7), *map(others.step, actions)]
        for trajectory in (again, elsewhere):
            np.testing.assert_array_equal(trajectory[0], first[0])
            for actual, expected in zip(trajectory[1:], first[1:]):
                assert_same(actual, expected)
        if name.startswith("gridworld"):
            return
        # Neither within a run nor between runs whose seeds are neighbours does an environment occur twice.
        starts = np.concatenate([envs.reset(seed) for seed in range(7, 12)])
        assert len(np.unique(starts, axis=0)) == len(starts)
        with pytest.raises(ValueError, match="seed: expected a non-negative integer, got -1"):
            envs.reset(-1)


@pytest.mark.parametrize("name", ["Pendulum-v1", "Reacher-v5", "Hopper-v5"])
def test_the_same_as_single_environments_by_hand(name):
    num_envs, steps = 3, 220
    seeds = np.random.SeedSequence(3).generate_state(num_envs, np.uint64)
    singles = [make_single(name) for _ in range(num_envs)]
    ended = 0
    with make_envs(name, num_envs) as envs:
        obs = envs.reset(3)
        for i, single in enumerate(singles):
            np.testing.assert_array_equal(obs[i], single.reset(seed=int(seeds[i]))[0].astype(np.float32))
        for actions in actions_for(envs, steps):
            step = envs.step(actions)
            for i, single in enumerate(singles):
                final_obs, reward, terminated, truncated, _ = single.step(actions[i])
                assert (step.terminated[i], step.truncated[i]) == (terminated, truncated and not terminated)
                assert step.rewards[i] == np.float32(reward)
                np.testing.assert_array_equal(step.final_obs[i], final_obs.astype(np.float32))
                obs = single.reset()[0] if terminated or truncated else final_obs
                np.testing.assert_array_equal(step.obs[i], obs.astype(np.float32))
                ended += terminated or truncated
    assert ended >= num_envs
    for single in singles:
        single.close()


def test_results_are_the_callers():
    with make_envs("Pendulum-v1", 2) as envs, make_envs("Pendulum-v1", 2) as others:
        envs.reset(0)[:] = 9
        others.reset(0)
        for actions in actions_for(envs, 5):
            step, expected = envs.step(actions), others.step(actions)
            assert_same(step, expected)
            for value in vars(step).values():
                value[:] = 1


@pytest.mark.parametrize("name", ["Pendulum-v1", "gridworld-cshape", "bandit-two-modes"])
def test_wrong_calls(name):
    with make_envs(name, 3) as envs:
        actions = np.zeros((3, envs.action_dim), dtype=np.float32)
        for call in (lambda: envs.step(actions), envs.snapshot):
            with pytest.raises(ValueError, match=r"expected reset\(seed\) or restore\(state\) before it"):
                call()
        envs.reset(0)
        for wrong in (actions[:2], actions[:, :-1], actions[0]):
            with pytest.raises(ValueError, match="actions: expected shape"):
                envs.step(wrong)
        for value in (np.nan, np.inf):
            wrong = actions.copy()
            wrong[1, 0] = value
            with pytest.raises(ValueError, match=r"actions: expected finite numbers, got .* for environment 1"):
                envs.step(wrong)
        envs.step(actions)
    envs.close()


# --- snapshots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("Pendulum-v1", 130),
        ("Reacher-v5", 33),
        ("Hopper-v5", 70),
        # Never ends by itself: the limit of 1000 steps comes after the snapshot.
        ("HalfCheetah-v5", 900),
        ("Walker2d-v5", 70),
        # Reads the pose of the step before.
        ("Ant-v5", 40),
        ("Humanoid-v5", 40),
        ("online-ant-v0", 900),
        ("online-humanoid-v0", 900),
        ("pointmaze-arena-singletask-v0", 900),
        ("antmaze-medium-singletask-v0", 900),
        *((name, 30) for name in NATIVE),
    ],
)
def test_snapshots_are_exact(name, before, tmp_path):
    if name.startswith(("online-", "pointmaze-", "antmaze-")):
        pytest.importorskip("ogbench")
    safetensors = pytest.importorskip("safetensors.numpy")
    num_envs = 1 if before == 900 else 3
    with make_envs(name, num_envs) as envs, make_envs(name, num_envs) as others:
        obs = envs.reset(1)
        for actions in actions_for(envs, before):
            obs = envs.step(actions).obs
        state = envs.snapshot()
        safetensors.save_file(state, tmp_path / "state.safetensors")
        loaded = safetensors.load_file(tmp_path / "state.safetensors")
        following = actions_for(envs, 200, seed=1)
        expected = [envs.step(actions) for actions in following]
        assert sum((step.terminated | step.truncated).sum() for step in expected) > 0

        # Others that were never reset, and the same after more has happened to them.
        envs.reset(2)
        for target in (others, envs):
            np.testing.assert_array_equal(target.restore(loaded), obs)
            again = target.snapshot()
            assert again.keys() == state.keys()
            for key in state:
                np.testing.assert_array_equal(again[key], state[key], err_msg=key)
            for actions, step in zip(following, expected):
                assert_same(target.step(actions), step)


def press(core) -> np.ndarray:
    """An action of the robot towards its first button: over it, then down."""
    way = core._data.site_xpos[core._button_site_ids[0]] - core._data.site_xpos[core._pinch_site_id]
    sideways = np.clip(way[:2] / 0.05, -1, 1)
    down = -1.0 if np.linalg.norm(way[:2]) < 0.02 else np.clip((way[2] + 0.08) / 0.05, -1, 1)
    return np.array([[*sideways, down, 0.0, 1.0]], dtype=np.float32)


@pytest.mark.parametrize(("name", "before", "after"), [("cube-single-singletask-v0", 150, 60), ("scene", 10, 60)])
def test_snapshots_of_manipulation(name, before, after):
    """A cube's episode ends on the way; in the scene a button is pressed, which locks the drawer."""
    pytest.importorskip("ogbench")
    name = "scene-singletask-v0" if name == "scene" else name
    with make_envs(name, 1) as envs, make_envs(name, 1) as others:
        obs = envs.reset(3)
        core = envs._guards[0].unwrapped
        sampled = actions_for(envs, before + after)
        for action in sampled[:before]:
            obs = envs.step(action).obs
        state = envs.snapshot()
        locked = core.model.dof_damping.sum()
        actions, expected = [], []
        for action in sampled[before:]:
            actions.append(press(core) if name.startswith("scene") else action)
            expected.append(envs.step(actions[-1]))
        if name.startswith("scene"):
            assert core.model.dof_damping.sum() != locked
            state_after = envs.snapshot()
        else:
            assert sum(step.truncated.sum() for step in expected) == 1
        np.testing.assert_array_equal(others.restore(state), obs)
        for action, step in zip(actions, expected):
            assert_same(others.step(action), step)
        if name.startswith("scene"):
            # Also into an environment whose locks are others.
            others.restore(state)
            others.restore(state_after)
            assert_same(others.step(actions[0]), envs.step(actions[0]))


@pytest.mark.parametrize("moment", ["reset", "first step"])
@pytest.mark.parametrize("name", GYMNASIUM)
def test_snapshots_at_the_beginning(name, moment):
    with make_envs(name, 1) as envs, make_envs(name, 1) as others:
        envs.reset(1)
        actions = actions_for(envs, 20)
        if moment == "first step":
            envs.step(actions[0])
        state = envs.snapshot()
        expected = [envs.step(action) for action in actions]
        others.restore(state)
        for action, step in zip(actions, expected):
            assert_same(others.step(action), step)


def test_snapshots_that_do_not_fit():
    with make_envs("Hopper-v5", 2) as two, make_envs("Hopper-v5", 3) as three, make_envs("Walker2d-v5", 2) as other:
        two.reset(0)
        for envs in (three, other):
            with pytest.raises(ValueError, match=r"state: not a snapshot of .*: expected shape"):
                envs.restore(two.snapshot())
        with pytest.raises(ValueError, match=r"generator: expected shape \(2, 6\), got nothing"):
            two.restore({key: value for key, value in two.snapshot().items() if key != "generator"})


def test_no_snapshot_where_state_is_unknown():
    pytest.importorskip("ogbench")
    for name in (register(), "MountainCarContinuous-v0", "pointmaze-teleport-singletask-v0"):
        with make_envs(name, 2) as envs:
            envs.reset(0)
            assert envs.snapshot() is None
            with pytest.raises(ValueError, match="cannot be restored"):
                envs.restore({})


# --- processes --------------------------------------------------------------------------------------------------------


def test_processes_do_the_same():
    before = processes()
    with make_envs("Hopper-v5", 3, asynchronous=True) as envs, make_envs("Hopper-v5", 3) as others:
        assert len(processes() - before) == 3
        np.testing.assert_array_equal(envs.reset(4), others.reset(4))
        for actions in actions_for(envs, 50):
            assert_same(envs.step(actions), others.step(actions))
        # From one kind to the other and back.
        state = envs.snapshot()
        others.reset(5)
        np.testing.assert_array_equal(others.restore(state), envs.restore(state))
        for i, actions in enumerate(actions_for(envs, 200, seed=1)):
            if i == 100:
                envs.restore(others.snapshot())
            assert_same(envs.step(actions), others.step(actions))
    assert processes() == before
    envs.close()
    with pytest.raises(UserError, match="the environments are closed"):
        envs.reset(0)


def test_processes_do_not_hear_ctrl_c():
    before = processes()
    with make_envs("Pendulum-v1", 1, asynchronous=True) as envs:
        envs.reset(0)
        (pid,) = processes() - before
        os.kill(pid, signal.SIGINT)
        envs.step(np.zeros((1, 1)))


def test_a_script_that_every_process_would_run(plain_environment, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from fastflow.errors import UserError\n"
        "from fastflow.online_envs import make_envs\n"
        "try:\n"
        "    make_envs('Pendulum-v1', 1, asynchronous=True)\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**plain_environment, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert 'belongs under `if __name__ == "__main__":`' in done.stdout


def test_native_environments_need_no_processes():
    before = processes()
    with make_envs("gridworld-two-walls", 2, asynchronous=True) as envs:
        envs.reset(0)
        assert processes() == before


# --- guards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(actions=gymnasium.spaces.Discrete(2)), "expected continuous actions .*, got Discrete"),
        (dict(actions=gymnasium.spaces.Box(-1, 1, (2, 2))), "expected continuous actions .*one dimension.*, got Box"),
        (dict(actions=gymnasium.spaces.Box(-np.inf, 1, (2,))), "expected bounded actions, got Box"),
        (
            dict(observations=gymnasium.spaces.Dict(x=gymnasium.spaces.Discrete(2))),
            "expected observations .*, got Dict",
        ),
        (dict(observations=gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)), "expected observations .*, got Box"),
    ],
)
def test_spaces(kwargs, message, asynchronous):
    before = processes()
    name = register(**kwargs)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        make_envs(name, 2, asynchronous=asynchronous)
    assert processes() == before


def test_cannot_be_made():
    name = register(no_such_argument=1)
    with pytest.raises(UserError, match=f"{name} cannot be made: TypeError: .*no_such_argument"):
        make_envs(name, 1)
    with pytest.raises(UserError, match=r"Hopper-v5 cannot be made: .*no_such_argument"):
        make_single("Hopper-v5", no_such_argument=1)


@pytest.mark.parametrize("fault", ["nan observation", "huge observation", "nan reward", "infinite reward", "says so"])
def test_what_is_not_finite_ends_the_episode(fault):
    with make_envs(register(fault=fault), 1) as envs:
        envs.reset(0)
        actions = np.zeros((1, 1))
        for _ in range(2):
            for i in (1, 2):
                step = envs.step(actions)
                assert (step.obs == np.float32(i / 10)).all()
                assert not (step.invalid | step.terminated).any()
            step = envs.step(actions)
            assert (step.invalid & step.terminated & ~step.truncated).all()
            assert step.rewards == 0
            assert (step.final_obs == np.float32(0.2)).all()
            assert (step.obs == 0).all()


def test_a_simulation_that_breaks_is_invalid(tmp_path, monkeypatch, capfd, caplog):
    # MuJoCo writes a log to where it is.
    monkeypatch.chdir(tmp_path)
    with make_envs("Hopper-v5", 3) as envs:
        obs = envs.reset(0)
        envs._guards[1].unwrapped.data.qvel[:] = 1e13
        step = envs.step(np.zeros((3, 3)))
        assert step.invalid.tolist() == step.terminated.tolist() == [False, True, False]
        assert step.rewards[1] == 0
        np.testing.assert_array_equal(step.final_obs[1], obs[1])
        assert not envs.step(np.zeros((3, 3))).invalid.any()
        # Where dm_control has been imported, it logs what MuJoCo would print.
        assert "unstable" in capfd.readouterr().err + caplog.text


def test_no_warning_about_gymnasiums_models(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    make_envs("HalfCheetah-v5", 1).close()
    assert not list(tmp_path.iterdir())
    assert not capfd.readouterr().err


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("fault", "steps", "message"),
    [
        ("raise", 3, r"failed in its step 3 \(step 3 of the episode\): ZeroDivisionError: three is too many"),
        ("second reset", 3, "failed in its step 3 .*: OSError: no new episode"),
        ("reset", 0, "failed in its step 0 .*: OSError: no new episode"),
        ("nan at reset", 0, "failed in its step 0 .*: ValueError: the first observation of an episode is not finite"),
    ],
)
def test_failures(fault, steps, message, asynchronous):
    before = processes()
    name = register(fault=fault)
    envs = make_envs(name, 2, asynchronous=asynchronous)
    guards = list(getattr(envs, "_guards", []))
    with pytest.raises(EnvironmentFailed, match=f"{name}: environment 0 {message}") as error:
        envs.reset(0)
        for _ in range(4):
            envs.step(np.zeros((2, 1)))
    assert (error.value.index, error.value.steps) == (0, steps)
    cause = error.value.__cause__
    assert type(cause).__name__ in str(error.value) or "Traceback" in str(cause)
    assert processes() == before
    # One that cannot be closed does not keep the others open.
    assert [guard.unwrapped.closed for guard in guards] == [fault != "raise"] * len(guards)
    for call in (lambda: envs.step(np.zeros((2, 1))), lambda: envs.reset(0)):
        with pytest.raises((UserError, ValueError)):
            call()


@pytest.mark.parametrize("kill", [False, True])
def test_a_process_that_ends_is_a_failure(kill):
    before = processes()
    envs = make_envs(register(fault="" if kill else "exit"), 2, asynchronous=True)
    envs.reset(0)
    envs.step(np.zeros((2, 1)))
    if kill:
        os.kill(envs._vector.processes[1].pid, signal.SIGKILL)
        message = r"the process of environment 1 has ended \(exit code -9\)"
    else:
        message = r"the process of environment [01] has ended \(exit code 7\)"
    with pytest.raises(EnvironmentFailed, match=message):
        for _ in range(3):
            envs.step(np.zeros((2, 1)))
    assert processes() == before
