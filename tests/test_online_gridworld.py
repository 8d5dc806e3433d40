from __future__ import annotations

import time

import numpy as np
import pytest

from fastflow.online_envs import make_envs, make_single
from fastflow.online_envs.gridworld_maps import MAP_NAMES, GridWorldMap, grid_map

pytest.importorskip("gymnasium")
from fastflow.online_envs.bandit import CENTRES, STD, reward
from fastflow.online_envs.gridworld import DEATH, FIGURE_STARTS, NO_END, GridWorlds, play


def cells(array: np.ndarray) -> set[tuple[int, int]]:
    return {(int(x), int(y)) for x, y in np.argwhere(array)}


def block(x: range, y: range) -> set[tuple[int, int]]:
    return {(i, j) for i in x for j in y}


def test_maps():
    every = range(25)
    found = {name: grid_map(name) for name in MAP_NAMES}
    goals = {name: cells(grid.goals >= 0) for name, grid in found.items()}
    assert goals["two-walls"] == {(x, y) for x in every for y in (0, 1, 23, 24)}
    assert goals["three-goals"] == {
        (x + i, y + j) for x, y in ((12, 18), (7, 7), (17, 7)) for i in (-1, 0, 1) for j in (-1, 0, 1)
    }
    assert goals["tree-in-the-middle"] == block(range(23, 25), range(10, 15))
    assert goals["two-slits"] == block(range(24, 25), every)
    assert goals["cshape"] == block(range(10, 15), range(10, 15))
    deaths = {name: cells(grid.deaths) for name, grid in found.items() if grid.deaths.any()}
    assert deaths == {
        "three-goals": block(range(11, 14), range(11, 14)),
        "tree-in-the-middle": block(range(13, 18), range(10, 15)),
    }
    walls = {name: cells(grid.walls) for name, grid in found.items() if grid.walls.any()}
    assert walls == {
        "two-slits": {(15, y) for y in every if y not in (4, 5, 6, 7, 17, 18, 19, 20)},
        "cshape": {(x, y) for x in range(7, 18) for y in range(7, 18) if y in (7, 17) or x == 17},
    }
    assert found["two-walls"].goal_names == ("bottom", "top")
    assert found["two-walls"].goals[3, 0] == 0
    assert found["two-walls"].goals[3, 24] == 1
    for name, grid in found.items():
        assert grid.name == name
        assert len(grid.free) == 625 - len(goals[name]) - len(deaths.get(name, ())) - len(walls.get(name, ()))
        assert set(np.unique(grid.goals)) == {-1, *range(len(grid.goal_names))}
    with pytest.raises(ValueError, match=r"name: expected one of two-walls, .*, got 'two_walls'"):
        grid_map("two_walls")


def test_maps_of_ones_own():
    no = np.zeros((25, 25), dtype=bool)
    goals = np.full((25, 25), -1)
    goals[3, 4] = 0
    there = goals >= 0
    grid = GridWorldMap("mine", no, no, goals, ("here",))
    worlds = GridWorlds(grid, 2)
    assert worlds.name == "gridworld-mine"
    worlds.reset(0)
    for arguments, message in [
        ((no[1:], no, goals, ("here",)), "walls: expected shape"),
        ((there, no, goals, ("here",)), r"expected one kind per cell, got several at \(3, 4\)"),
        ((no, no, goals, ()), "goal_names: expected 1 names, got 0"),
        ((~there, no, goals, ("here",)), "expected at least one free cell"),
    ]:
        with pytest.raises(ValueError, match=message):
            GridWorldMap("wrong", *arguments)


def walk(name: str, start: tuple[int, int], *actions: tuple[float, float]) -> list[tuple[int, int]]:
    """Cells that a single world goes through."""
    env = make_single(f"gridworld-{name}")
    obs, info = env.reset(options={"cell": start})
    visited = [info["cell"]]
    np.testing.assert_array_equal(obs, ((np.array(start) - 12) / 12).astype(np.float32))
    for action in actions:
        obs, _, _, _, info = env.step(np.array(action, dtype=np.float32))
        visited.append(info["cell"])
        np.testing.assert_array_equal(obs, ((np.array(info["cell"]) - 12) / 12).astype(np.float32))
    assert visited[0] == start
    return visited[1:]


def test_moves():
    # Beyond one half moves one cell, however far; one half does not.
    assert walk("two-walls", (12, 12), (0.51, -0.51), (0.5, 0.5), (-0.5, 9.0), (-7.0, 0.49)) == [
        (13, 11),
        (13, 11),
        (13, 12),
        (12, 12),
    ]
    # The border stops one axis.
    assert walk("two-walls", (0, 12), (-1, 1), (-1, 0)) == [(0, 13), (0, 13)]
    # A wall stops the whole move, unless one comes by between two corners or through an opening.
    assert walk("two-slits", (14, 10), (1, 0), (1, 1), (0, 1)) == [(14, 10), (14, 10), (14, 11)]
    assert walk("two-slits", (14, 8), (1, -1), (1, 1)) == [(15, 7), (16, 8)]
    assert walk("cshape", (12, 8), (0, -1), (1, -1), (0, 1)) == [(12, 8), (12, 8), (12, 9)]


@pytest.mark.parametrize(
    ("name", "start", "action", "reward", "goal"),
    [
        ("two-walls", (3, 2), (0, -1), 20, 0),
        ("two-walls", (3, 22), (0, 1), 20, 1),
        ("three-goals", (12, 14), (0, -1), -10, DEATH),
        ("three-goals", (9, 9), (-1, -1), 20, 1),
        ("tree-in-the-middle", (12, 12), (1, 0), -10, DEATH),
        ("cshape", (9, 12), (1, 0), 20, 0),
    ],
)
def test_ends(name, start, action, reward, goal):
    env = make_single(f"gridworld-{name}")
    _, info = env.reset(options={"cell": start})
    assert (info["goal"], info["success"]) == (NO_END, False)
    _, *rest, info = env.step(np.array(action))
    assert rest == [reward, True, False]
    assert (info["goal"], info["success"]) == (goal, goal >= 0)


def test_start_cells():
    env = make_single("gridworld-two-slits")
    for cell in [(15, 0), (24, 3), (25, 0), (-1, 5)]:
        with pytest.raises(ValueError, match="cell: expected free cells of two-slits, got"):
            env.reset(options={"cell": cell})
    with pytest.raises(ValueError, match="cell: expected integer cells"):
        env.reset(options={"cell": (1.0, 2.0)})
    starts = {env.reset(seed=i)[1]["cell"] for i in range(50)}
    assert len(starts) > 30
    assert env.reset(seed=3)[1] == env.reset(seed=3)[1]
    # All free cells and no other, about equally often.
    worlds = make_envs("gridworld-two-slits", 60_000)
    worlds.reset(0)
    drawn, counts = np.unique(worlds.cells, axis=0, return_counts=True)
    np.testing.assert_array_equal(drawn, grid_map("two-slits").free)
    expected = counts.sum() / len(counts)
    assert abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_many_are_like_one():
    num_envs = 5
    for name in MAP_NAMES:
        worlds = make_envs(f"gridworld-{name}", num_envs)
        single = make_single(f"gridworld-{name}")
        worlds.reset(2)
        rng = np.random.default_rng(0)
        lengths = np.zeros(num_envs, dtype=int)
        ended = 0
        for _ in range(300):
            before, actions = worlds.cells, rng.uniform(-1, 1, (num_envs, 2)).astype(np.float32)
            step = worlds.step(actions)
            lengths += 1
            for i in range(num_envs):
                single.reset(options={"cell": tuple(before[i].tolist())})
                obs, reward, terminated, _, info = single.step(actions[i])
                np.testing.assert_array_equal(step.final_obs[i], obs)
                assert (step.rewards[i], step.terminated[i], step.success[i]) == (reward, terminated, info["success"])
                assert step.truncated[i] == (lengths[i] == 100 and not terminated)
                if terminated or step.truncated[i]:
                    lengths[i] = 0
                    ended += 1
                else:
                    np.testing.assert_array_equal(step.obs[i], obs)
            np.testing.assert_array_equal(step.obs, ((worlds.cells - 12) / 12).astype(np.float32))
        assert ended >= num_envs


def test_truncation():
    env = make_single("gridworld-two-walls")
    env.reset(options={"cell": (12, 12)})
    ends = [env.step(np.zeros(2))[2:4] for _ in range(100)]
    assert ends == [(False, False)] * 99 + [(False, True)]


def test_play():
    grid = grid_map("two-walls")

    def away(observations: np.ndarray) -> np.ndarray:
        """To the nearer of the two goals; nowhere from halfway."""
        assert observations.dtype == np.float32
        return np.stack((np.zeros(len(observations)), np.sign(observations[:, 1])), axis=1)

    starts = np.array([*FIGURE_STARTS, (4, 2)])
    ends, trajectories = play(grid, away, starts)
    assert ends.tolist() == [NO_END, 1, 0, 1, 0]
    assert trajectories.shape == (5, 101, 2)
    np.testing.assert_array_equal(trajectories[:, 0], starts)
    np.testing.assert_array_equal(trajectories[1, :11], [(11, y) for y in range(13, 24)])
    assert (trajectories[1, 10:] == (11, 23)).all()
    assert play(grid, away, starts, steps=1).ends.tolist() == [NO_END, NO_END, NO_END, NO_END, 0]
    dead = play(grid_map("three-goals"), lambda obs: -np.sign(obs), np.array([(20, 12), (12, 5)]))
    assert dead.ends.tolist() == [DEATH, DEATH]
    with pytest.raises(ValueError, match=r"starts: expected free cells of two-walls, got \(4, 1\)"):
        play(grid, away, np.array([(4, 1)]))
    with pytest.raises(ValueError, match=r"act: expected actions of shape \(1, 2\), got \(2,\)"):
        play(grid, lambda obs: np.zeros(2), np.array([(4, 4)]))


def test_pictures():
    env = make_single("gridworld-cshape", render_mode="rgb_array")
    env.reset(options={"cell": (0, 24)})
    picture = env.render()
    assert picture.shape == (400, 400, 3)
    assert picture.dtype == np.uint8
    # Of each cell the middle; rows go downwards.
    colours = picture[8::16, 8::16][::-1].transpose(1, 0, 2)
    agent, free, wall, goal = (colours[cell].tolist() for cell in ((0, 24), (0, 0), (17, 9), (12, 12)))
    assert len({tuple(colour) for colour in (agent, free, wall, goal)}) == 4
    assert cells((colours == agent).all(-1)) == {(0, 24)}
    assert cells((colours == wall).all(-1)) == cells(grid_map("cshape").walls)
    assert cells((colours == goal).all(-1)) == cells(grid_map("cshape").goals >= 0)
    assert make_single("gridworld-cshape").render() is None
    with pytest.raises(ValueError, match="render_mode: expected None"):
        make_single("gridworld-cshape", render_mode="human")


def test_fast_enough():
    worlds = make_envs("gridworld-two-walls", 64)
    worlds.reset(0)
    actions = np.random.default_rng(0).uniform(-1, 1, (200, 64, 2)).astype(np.float32)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        for action in actions:
            worlds.step(action)
        times.append(time.perf_counter() - began)
    assert 200 * 64 / min(times) > 300_000


def test_bandit():
    envs = make_envs("bandit-two-modes", 6)
    assert (envs.reset(0) == 0).all()
    actions = np.array([(-0.5, 0), (0.5, 0), (0, 0), (0.5, 0.15), (-3, 0), (1, 1)], dtype=np.float32)
    step = envs.step(actions)
    middle = 2 * np.exp(-0.5 * (0.5 / 0.15) ** 2)
    expected = [1, 1, middle, np.exp(-0.5), np.exp(-0.5 * (0.5 / 0.15) ** 2), reward(np.array([1.0, 1.0]))]
    np.testing.assert_allclose(step.rewards, expected, rtol=1e-6)
    assert step.terminated.all()
    assert not step.truncated.any()
    assert (step.obs == 0).all()
    assert (step.final_obs == 0).all()
    assert np.isnan(step.success).all()
    assert (CENTRES, STD) == (((-0.5, 0.0), (0.5, 0.0)), 0.15)
    single = make_single("bandit-two-modes")
    single.reset(seed=0)
    assert single.step(actions[3])[1:4] == (pytest.approx(np.exp(-0.5)), True, False)
