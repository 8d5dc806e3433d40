from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastflow.collect import collect, collectable_names, recipe_for
from fastflow.collect.manipulation import ManipulationCollector
from fastflow.collect.parts import Parts
from fastflow.collect.pointmaze import Maze, PointMazeCollector
from fastflow.data import load_dataset
from fastflow.envs import make_core_env
from fastflow.errors import MissingExtra, UserError

ogbench = pytest.importorskip("ogbench")

ROOT = Path(__file__).resolve().parents[1]
ARENA = "pointmaze-arena-navigate-v0"


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def working_folder(folder: Path, dataset: str = ARENA) -> Path:
    return folder / f".{dataset}.collect"


def arena(folder: Path, **kwargs) -> tuple[Path, Path]:
    return collect(ARENA, dataset_dir=folder, progress=False, **{"episodes": 3, "val_episodes": 1, **kwargs})


@pytest.fixture(scope="module")
def three_episodes(tmp_path_factory) -> tuple[Path, Path]:
    return arena(tmp_path_factory.mktemp("arena"))


# Recipes: the settings that OGBench published its data with.


def test_recipes():
    names = collectable_names()
    assert {f"pointmaze-{m}-{k}-v0" for m in ("arena", "giant") for k in ("navigate", "stitch", "explore")} <= set(
        names
    )
    assert {f"{e}-{k}-v0" for e in ("cube-quadruple", "scene", "puzzle-4x6") for k in ("play", "noisy")} <= set(names)
    settings = {name: (r.episodes, r.steps, r.noise, r.random_action) for name in names if (r := recipe_for(name))}
    assert settings["pointmaze-medium-navigate-v0"] == (1000, 1001, 0.5, 0.0)
    assert settings["pointmaze-giant-navigate-v0"] == (500, 2001, 0.5, 0.0)
    assert settings["pointmaze-giant-stitch-v0"] == (5000, 201, 0.5, 0.0)
    assert settings["cube-single-play-v0"] == (1000, 1001, 0.1, 0.0)
    assert settings["cube-triple-noisy-v0"] == (3000, 1001, 0.1, 0.1)
    assert settings["puzzle-4x4-noisy-v0"] == (1000, 1001, 0.1, 0.2)


def test_tasks_of_an_environment_share_a_dataset():
    recipe = recipe_for("cube-single-play-v0")
    assert recipe == recipe_for("cube-single-play-singletask-v0") == recipe_for("cube-single-play-singletask-task3-v0")
    assert recipe_for("cube-single-play-singletask-task9-v0") is None
    assert recipe_for("antmaze-large-navigate-v0") is None


# What is collected


def check_file(path: Path, episodes: int, steps: int, widths: dict[str, int]) -> dict[str, np.ndarray]:
    """The format that OGBench publishes."""
    file = read(path)
    assert {key: (array.shape, array.dtype.name) for key, array in file.items()} == {
        "terminals": ((episodes * steps,), "bool"),
        **{
            key: ((episodes * steps, width), "int64" if key == "button_states" else "float32")
            for key, width in widths.items()
        },
    }
    assert file["terminals"].nonzero()[0].tolist() == [steps * (i + 1) - 1 for i in range(episodes)]
    assert all(np.isfinite(array).all() for array in file.values())
    assert np.abs(file["actions"]).max() <= 1
    return file


def test_pointmaze_navigate(three_episodes):
    widths = {"observations": 2, "actions": 2, "qpos": 2, "qvel": 2}
    train = check_file(three_episodes[0], 3, 1001, widths)
    val = check_file(three_episodes[1], 1, 1001, widths)
    assert not np.array_equal(train["observations"][:1001], val["observations"])
    np.testing.assert_array_equal(train["observations"], train["qpos"])
    # An action moves the point by a fifth of it, where no wall is near.
    inside = (np.abs(train["observations"] - 10) < 8).all(1) & ~train["terminals"]
    moved = np.roll(train["observations"], -1, 0) - train["observations"]
    np.testing.assert_allclose(moved[inside], 0.2 * train["actions"][inside], atol=0.01)
    # It goes from goal to goal all over the room.
    cells = {(int(x) // 4, int(y) // 4) for x, y in train["observations"] + 2}
    assert len(cells) > 20

    facts = json.loads(three_episodes[0].with_name(f"{ARENA}.npz.json").read_text())
    assert (facts["dataset"], facts["seed"], facts["episodes"], facts["val_episodes"]) == (ARENA, 0, 3, 1)
    assert facts["noise"] == 0.5 and facts["versions"]["ogbench"]


@pytest.mark.parametrize(("kind", "steps"), [("stitch", 201), ("explore", 501)])
def test_pointmaze_kinds(tmp_path, kind, steps):
    name = f"pointmaze-medium-{kind}-v0"
    train_path, _ = collect(name, dataset_dir=tmp_path, episodes=2, progress=False)
    train = check_file(train_path, 2, steps, {"observations": 2, "actions": 2, "qpos": 2, "qvel": 2})
    if kind == "stitch":
        # Four cells of four units from the start, then there it stays, up to the noise on start and goal.
        for episode in np.split(train["observations"], 2):
            assert np.abs(episode[-40:] - episode[-1]).max() < 2.5
            assert 5 < np.abs(episode[-1] - episode[0]).sum() < 20


def test_noise_is_what_was_asked_for(tmp_path):
    train = read(arena(tmp_path, episodes=1, noise=0.0)[0])
    np.testing.assert_allclose(np.linalg.norm(train["actions"], axis=1), 1, atol=1e-4)
    assert recipe_for(ARENA).noise == 0.5


@pytest.mark.parametrize("name", ["cube-double-play-v0", "scene-noisy-v0", "puzzle-3x3-noisy-v0"])
def test_manipulation(tmp_path, name):
    train_path, _ = collect(name, dataset_dir=tmp_path, episodes=1, progress=False)
    observations, qpos, qvel, buttons = {"c": (37, 28, 26, 0), "s": (40, 25, 24, 2), "p": (55, 23, 23, 9)}[name[0]]
    widths = {"observations": observations, "actions": 5, "qpos": qpos, "qvel": qvel}
    train = check_file(train_path, 1, 1001, widths | ({"button_states": buttons} if buttons else {}))
    # The policy does its work: blocks are moved, buttons pressed.
    if name.startswith("cube"):
        assert np.ptp(train["qpos"][:, 14:17], axis=0).max() > 0.05
    else:
        assert np.ptp(train["button_states"], axis=0).max() == 1
    if name.endswith("noisy"):
        assert (np.abs(np.diff(train["actions"], axis=0)) > 0.5).mean() > 0.02

    # OGBench's own loader takes the files, and ours gives the same numbers.
    task = name.replace("-v0", "-singletask-task2-v0")
    ours, ours_val = load_dataset(task, dataset_dir=tmp_path)
    _, theirs, theirs_val = ogbench.make_env_and_datasets(task, dataset_dir=str(tmp_path), disable_env_checker=True)
    for ours_split, theirs_split in ((ours, theirs), (ours_val, theirs_val)):
        assert set(theirs_split) == set(ours_split.tensors)
        for key, array in theirs_split.items():
            np.testing.assert_allclose(ours_split.tensors[key].numpy(), array, atol=1.1e-5 if key == "actions" else 0)


@pytest.mark.parametrize("maze", ["arena", "medium", "giant"])
def test_shortest_paths_are_those_of_the_oracle(maze):
    env = make_core_env(f"pointmaze-{maze}-v0")
    ours = Maze(env.maze_map)
    rng = np.random.default_rng(0)
    assert len(ours.cells) == (env.maze_map == 0).sum()
    for _ in range(200):
        start, goal = (ours.cells[rng.integers(len(ours.cells))] for _ in range(2))
        theirs, _ = env.get_oracle_subgoal(np.array(env.ij_to_xy(start)), np.array(env.ij_to_xy(goal)))
        assert env.ij_to_xy(ours.next_cell(start, goal)) == tuple(theirs)


def test_vertices_are_not_in_corridors():
    walls = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 1, 1, 0, 1], [1, 1, 1, 1, 1]])
    maze = Maze(walls)
    assert maze.vertices == [(1, 1), (1, 3), (3, 3)]
    assert maze.cells_at((1, 1), 3) == [(2, 3)]


# Seeds


def test_the_same_seed_gives_the_same_bytes(tmp_path, three_episodes):
    again = arena(tmp_path / "again")
    other = arena(tmp_path / "other", seed=1)
    for path, same, different in zip(three_episodes, again, other):
        assert path.read_bytes() == same.read_bytes()
        assert path.read_bytes() != different.read_bytes()


def test_the_first_episodes_do_not_depend_on_how_many_there_are(tmp_path, three_episodes):
    fewer = read(arena(tmp_path, episodes=2)[0])
    for key, array in read(three_episodes[0]).items():
        np.testing.assert_array_equal(array[: 2 * 1001], fewer[key])


def test_an_episode_does_not_depend_on_the_one_before():
    # Of all environments, the scene is the one that remembers: its locks, and targets that the closed-loop policy sees.
    recipe = replace(recipe_for("scene-noisy-v0"), steps=300)
    one, other = ManipulationCollector(recipe), ManipulationCollector(recipe)
    one.episode(np.random.SeedSequence(0, spawn_key=(0, 1)))
    first, second = (c.episode(np.random.SeedSequence(0, spawn_key=(0, 2))) for c in (one, other))
    for key, array in first.items():
        np.testing.assert_array_equal(array, second[key])
    # What it remembers matters in few episodes, so it is looked at as well, after every kind of target was chosen.
    env = one._env
    for drawer, window in ((0.0, 0.2), (-0.16, 0.0)):
        env.data.joint("drawer_slide").qpos[0], env.data.joint("window_slide").qpos[0] = drawer, window
        for _ in range(20):
            env.set_new_target()
    infos = [collector._env.reset(seed=0)[1] for collector in (one, other)]
    assert {"privileged/target_drawer_handle_pos", "privileged/target_button"} <= set(infos[0])
    for key, value in infos[0].items():
        np.testing.assert_array_equal(value, infos[1][key], err_msg=key)
    np.testing.assert_array_equal(*(collector._env.model.dof_damping for collector in (one, other)))


# Interruptions


def start_collecting(folder: Path, episodes: int) -> subprocess.Popen:
    script = f"""
from fastflow.collect import collect
collect({ARENA!r}, dataset_dir={str(folder)!r}, episodes={episodes}, val_episodes=1)
"""
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for_parts(process: subprocess.Popen, folder: Path, num_parts: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(working_folder(folder).glob("train-*.npz"))) < num_parts:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupted_collection_goes_on_and_gives_the_same_bytes(tmp_path):
    episodes = 30
    whole = arena(tmp_path / "whole", episodes=episodes)
    folder = tmp_path / "interrupted"
    for num_parts, number in ((3, signal.SIGINT), (8, signal.SIGKILL)):
        process = start_collecting(folder, episodes)
        wait_for_parts(process, folder, num_parts)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0
        if number == signal.SIGINT:
            assert "KeyboardInterrupt" in errors
            assert not list(working_folder(folder).glob("*.tmp*"))
        assert not list(folder.glob("*.npz"))
    parts = sorted(working_folder(folder).glob("train-*.npz"))
    assert 8 <= len(parts) < episodes
    # A power failure may have cut one short.
    parts[2].write_bytes(parts[2].read_bytes()[:5000])
    parts[3].write_bytes(b"")
    untouched = parts[0].stat().st_mtime_ns
    with pytest.raises(UserError, match="seed \\(0, now 1\\)"):
        arena(folder, episodes=episodes, seed=1)
    assert parts[0].stat().st_mtime_ns == untouched

    finished = arena(folder, episodes=episodes)
    for path, expected in zip(finished, whole):
        assert path.read_bytes() == expected.read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in whole[0].parent.iterdir())


def test_finished_episodes_are_not_collected_again(tmp_path, three_episodes, monkeypatch):
    collected = []
    episode = PointMazeCollector.episode

    def interrupted(self, seed):
        if len(collected) == 2:
            raise KeyboardInterrupt
        collected.append(seed.spawn_key)
        return episode(self, seed)

    with monkeypatch.context() as patch:
        patch.setattr(PointMazeCollector, "episode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            arena(tmp_path)
        collected.clear()
        arena(tmp_path)
    assert collected == [(0, 2), (1, 0)]
    assert (tmp_path / f"{ARENA}.npz").read_bytes() == three_episodes[0].read_bytes()


def test_other_settings_may_replace_an_unfinished_collection(tmp_path, three_episodes):
    Parts(working_folder(tmp_path), {"dataset": ARENA, "seed": 5}, restart=False)
    with pytest.raises(UserError, match=r"unfinished collection with another .*seed \(5, now 0\)"):
        arena(tmp_path)
    assert arena(tmp_path, overwrite=True)[0].read_bytes() == three_episodes[0].read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="file locks")
def test_two_processes_do_not_collect_the_same(tmp_path):
    settings = {"dataset": ARENA}
    first, second = (Parts(working_folder(tmp_path), settings, restart=False) for _ in range(2))
    with first.lock(), pytest.raises(UserError, match="another process"), second.lock():
        pass
    with second.lock():
        pass


# Bad input


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cube-singel-play-v0", "did you mean cube-single-play-v0?"),
        ("pointmaze-arena-navigate-singletask-task9-v0", "did you mean pointmaze-arena-navigate-v0?"),
        ("antmaze-large-navigate-v0", "no scripted policy"),
        ("antmaze-large-navigate-singletask-v0", "no scripted policy"),
        ("../cube", "can be collected"),
    ],
)
def test_unknown_names(tmp_path, name, message):
    with pytest.raises(UserError) as error:
        collect(name, dataset_dir=tmp_path / "new")
    assert message in str(error.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"episodes": 0},
        {"episodes": -3},
        {"episodes": 2.5},
        {"val_episodes": 0},
        {"seed": -1},
        {"seed": "a"},
        {"noise": -0.1},
        {"noise": float("nan")},
    ],
)
def test_bad_numbers(tmp_path, arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        arena(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("suffix", ["", "-val"])
def test_existing_files_are_kept(tmp_path, suffix, three_episodes):
    path = tmp_path / f"{ARENA}{suffix}.npz"
    path.write_text("precious")
    with pytest.raises(UserError, match=r"exists; pass --overwrite"):
        arena(tmp_path)
    assert path.read_text() == "precious" and len(list(tmp_path.iterdir())) == 1
    arena(tmp_path, overwrite=True)
    assert [p.read_bytes() for p in three_episodes] == [
        (tmp_path / f"{ARENA}.npz").read_bytes(),
        (tmp_path / f"{ARENA}-val.npz").read_bytes(),
    ]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make this folder"):
        arena(tmp_path / "file" / "data")


def test_no_simulator(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(MissingExtra, match="mujoco is not installed"):
        arena(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits")
def test_full_disk(tmp_path, three_episodes):
    import resource

    path = tmp_path / f"{ARENA}.npz"
    path.write_text("old")
    old, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for a part (35 kB), not for the file.
    resource.setrlimit(resource.RLIMIT_FSIZE, (45_000, hard))
    try:
        with pytest.raises(UserError, match=r"disk is full.*old file is intact"):
            arena(tmp_path, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (old, hard))
    assert path.read_text() == "old"
    assert len(list(working_folder(tmp_path).glob("*-*.npz"))) == 4
    assert arena(tmp_path, overwrite=True)[0].read_bytes() == three_episodes[0].read_bytes()
