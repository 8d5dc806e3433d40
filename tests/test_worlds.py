from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastflow.errors import UserError
from fastflow.worlds import WORLDS, World, from_trajectories, make_world
from fastflow.worlds.base import geometric
from fastflow.worlds.pointmaze import MAZES

BUMP = 0.3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bumps(x: Tensor) -> Tensor:
    """Test functions [..., 5] of x [..., 2]."""
    centres = x.new_tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.5], [-0.4, 0.3], [0.2, -0.6]])
    return torch.exp((x[..., None, :] - centres).square().sum(-1) / (-2 * BUMP**2))


def covariance(x: Tensor) -> Tensor:
    """[N, S, D] -> [N, D, D]."""
    x = x - x.mean(1, keepdim=True)
    return x.mT @ x / (x.shape[1] - 1)


class Counter(World):
    """Counts steps; ends at `end`."""

    name, state_dim, action_dim = "counter", 1, 1
    policies, tasks = {"count": ()}, ("number",)
    horizon = 10

    def __init__(self, end: float = math.inf) -> None:
        self.end = end

    def act(self, state, w=None):
        return torch.ones_like(state)

    def behave(self, state, memory, generator):
        memory = 0 if memory is None else memory + 1
        return torch.full_like(state, 1.0 + memory / 100), memory

    def step(self, state, action, generator=None):
        self._check_step(state, action)
        state = state + action.floor()
        return state, state[:, 0] >= self.end

    def starts(self, num, generator):
        return torch.arange(num, dtype=torch.float32)[:, None]

    def reward(self, task, state):
        self._check_task(task)
        return state[..., 0]


class CertainCounter(Counter):
    deterministic = True


# --- the base class ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Counter, CertainCounter])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9])
def test_futures_are_geometric(kind, gamma):
    world = kind()
    state = torch.tensor([[0.0], [100.0], [-7.0]])
    num = 20_000
    futures = world.futures(state, torch.ones(3, 1), None, gamma, num, seeded())
    assert futures.shape == (3, num, 1) and futures.dtype == torch.float32
    k = (futures - state[:, None])[..., 0]
    for row in k:
        for step in range(1, 8):
            chance = (1 - gamma) * gamma ** (step - 1)
            share = (row == step).double().mean()
            assert abs(share - chance) <= 4.5 * math.sqrt(chance * (1 - chance) / num)
        assert abs(row.double().mean() - 1 / (1 - gamma)) <= 4.5 * math.sqrt(gamma) / (1 - gamma) / math.sqrt(num)
    # Draws of one row, and rows, are independent.
    if gamma:
        assert torch.corrcoef(k.double())[0, 1:].abs().max() < 0.03
        assert abs(torch.corrcoef(torch.stack([k[0, :-1], k[0, 1:]]).double())[0, 1]) < 0.03


def test_ends_absorb():
    world = Counter(end=3.0)
    state, action = torch.tensor([[0.0], [2.0]]), torch.ones(2, 1)
    futures = world.futures(state, action, None, 0.9, 4000, seeded())
    assert futures.max() == 3.0 and (futures[1] == 3.0).all()
    assert abs((futures[0] == 3.0).double().mean() - 0.81) < 0.03
    # 1 + .9 * 2 + .81 * 3 / .1, and 3 / .1; one in 10,000 of the discounted sum is left out.
    values = world.values("number", state, action, None, 0.9, None, num=2)
    torch.testing.assert_close(values, torch.tensor([1 + 1.8 + 24.3, 30.0]), rtol=2e-4, atol=0.0)


def test_transitions():
    rows = Counter().transitions(25, seeded())
    observations = torch.cat([torch.arange(10.0), 1 + torch.arange(10.0), 2 + torch.arange(5.0)])[:, None]
    torch.testing.assert_close(rows["observations"], observations)
    torch.testing.assert_close(rows["next_observations"], observations + 1)
    torch.testing.assert_close(rows["rewards"], observations[:, 0] + 1)
    assert rows["terminals"].nonzero()[:, 0].tolist() == [9, 19, 24] and rows["masks"].all()
    # The behaviour's memory starts anew with every trajectory; the action after its end is what it would have done.
    time = torch.arange(25.0)[:, None] % 10
    torch.testing.assert_close(rows["actions"], 1 + time / 100)
    torch.testing.assert_close(rows["next_actions"], 1 + (time + 1) / 100)

    rows = Counter().transitions(25, seeded(), policy="count")
    assert (rows["actions"] == 1).all() and (rows["next_actions"] == 1).all()
    rows = Counter(end=4.0).transitions(25, seeded())
    assert len(rows["masks"]) == 25
    ends = rows["next_observations"][:, 0] >= 4
    assert torch.equal(rows["masks"] == 0, ends) and (rows["terminals"][ends] == 1).all()
    linked = ~rows["terminals"][:-1].bool()
    assert torch.equal(rows["observations"][1:][linked], rows["next_observations"][:-1][linked])
    assert (rows["observations"][1:][~linked] != rows["next_observations"][:-1][~linked]).all()


def test_from_trajectories():
    observations, actions = torch.arange(14.0).view(7, 2), -torch.arange(7.0)[:, None]
    rows = from_trajectories(observations, actions, torch.tensor([0, 0, 1, 1, 0, 0, 0]))
    index = torch.tensor([0, 1, 4, 5])
    assert torch.equal(rows["observations"], observations[index])
    assert torch.equal(rows["next_observations"], observations[index + 1])
    assert torch.equal(rows["actions"], actions[index])
    assert torch.equal(rows["next_actions"], actions[index + 1])
    assert rows["terminals"].tolist() == [0, 1, 0, 1] and rows["masks"].tolist() == [1] * 4

    with pytest.raises(ValueError, match=r"terminals: expected a trajectory of two rows or more, got none in 2 rows"):
        from_trajectories(observations[:2], actions[:2], torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"got none in 0 rows"):
        from_trajectories(observations[:0], actions[:0], torch.zeros(0))
    with pytest.raises(ValueError, match=r"expected shapes \[T, D\], \[T, A\], \[T\], got \[7, 2\], \[6, 1\], \[7\]"):
        from_trajectories(observations, actions[:6], torch.zeros(7))


def test_geometric_times_are_finite():
    times = geometric((200_000,), 0.99, seeded(), torch.device("cpu"))
    assert times.min() == 1 and 600 < times.max() < 4000


# --- every world ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
def test_every_world(name):
    world = make_world(name)
    assert world.name == name and world.bounds is not None and len(world.bounds) == world.state_dim
    assert all(len(w) == world.policy_dim for w in world.policies.values())
    generator = seeded(1)
    rows = world.transitions(300, generator)
    shapes = {"observations": world.state_dim, "next_observations": world.state_dim}
    shapes |= {"actions": world.action_dim, "next_actions": world.action_dim}
    for key, value in rows.items():
        assert value.shape == ((300, shapes[key]) if key in shapes else (300,)) and value.dtype == torch.float32
        assert value.isfinite().all()
    if world.deterministic:
        moved, _ = world.step(rows["observations"], rows["actions"])
        assert torch.equal(moved, rows["next_observations"])
    linked = ~rows["terminals"][:-1].bool()
    assert torch.equal(rows["next_observations"][:-1][linked], rows["observations"][1:][linked])
    assert torch.equal(rows["next_actions"][:-1][linked], rows["actions"][1:][linked])
    assert torch.equal(rows["rewards"], world.reward(world.tasks[0], rows["next_observations"]))
    again = world.transitions(300, seeded(1))
    assert all(torch.equal(rows[key], again[key]) for key in rows)
    assert not torch.equal(rows["actions"], world.transitions(300, seeded(2))["actions"])

    state = world.starts(5, generator)
    action = world.act(state)
    for dtype in (torch.float32, torch.float64):
        futures = world.futures(state.to(dtype), action.to(dtype), None, 0.7, 7, seeded(3))
        assert futures.shape == (5, 7, world.state_dim) and futures.dtype == dtype
        assert torch.equal(futures, world.futures(state.to(dtype), action.to(dtype), None, 0.7, 7, seeded(3)))
        assert not torch.equal(futures, world.futures(state.to(dtype), action.to(dtype), None, 0.7, 7, seeded(4)))
        for task in world.tasks:
            assert world.reward(task, futures).shape == (5, 7)
            values = world.values(task, state.to(dtype), action.to(dtype), None, 0.7, seeded(5))
            assert values.shape == (5,) and values.dtype == dtype and values.isfinite().all()
    # At gamma = 0 the only future is the next state.
    if world.deterministic:
        moved, _ = world.step(state, action)
        nearest = world.futures(state, action, None, 0.0, 3, generator)
        torch.testing.assert_close(nearest, moved[:, None].expand(-1, 3, -1))
        for task in world.tasks:
            torch.testing.assert_close(world.values(task, state, action, None, 0.0), world.reward(task, moved))
    if world.policy_dim:
        ws = torch.tensor(list(world.policies.values()))[torch.arange(5) % len(world.policies)]
        rowwise = torch.cat([world.act(state[i : i + 1], ws[i]) for i in range(5)])
        torch.testing.assert_close(world.act(state, ws), rowwise)
        one = world.futures(state[:1], action[:1], ws[1], 0.7, 4, seeded(6))
        torch.testing.assert_close(one, world.futures(state[:1], action[:1], ws[1:2], 0.7, 4, seeded(6)))


@pytest.mark.parametrize("name", ["circle", "pointmaze-arena", "pointmass-maze"])
def test_each_row_follows_its_own_policy(name):
    world = make_world(name)
    names = [list(world.policies)[i] for i in (0, -1, 1)]
    state = world.starts(3, seeded())
    w = torch.stack([world.w(policy) for policy in names])
    action = world.act(state, w)
    # Rows finish at different times and are put back in order.
    mean = world.futures(state, action, w, 0.95, 3000, seeded(1)).mean(1)
    for i in range(3):
        alone = world.futures(state[i : i + 1], action[i : i + 1], w[i], 0.95, 3000, seeded(2))
        error = 5 * math.sqrt(2 / 3000) * alone.std(1)
        assert ((alone.mean(1) - mean[i]).abs() <= error + 1e-6).all()
    values = world.values(world.tasks[0], state, action, w, 0.95)
    by_futures = world.reward(world.tasks[0], world.futures(state, action, w, 0.95, 20_000, seeded(3))).mean(1) / 0.05
    torch.testing.assert_close(values, by_futures, rtol=0.02, atol=0.2)


def test_errors():
    with pytest.raises(UserError, match=r"pointmaze-mediun: unknown world; did you mean pointmaze-medium\? \(known: "):
        make_world("pointmaze-mediun")
    world = make_world("circle")
    state, action = world.starts(4, seeded()), torch.zeros(4, 1)
    for gamma in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"gamma: expected a number in \[0, 1\)"):
            world.futures(state, action, None, gamma, 1, seeded())
        with pytest.raises(ValueError, match="gamma"):
            world.values("near-east", state, action, None, gamma)
    with pytest.raises(ValueError, match=r"state: expected shape \[N, 2\], got \[4, 3\]"):
        world.futures(torch.zeros(4, 3), action, None, 0.5, 1, seeded())
    with pytest.raises(ValueError, match=r"action: expected shape \[N, 1\], got \[4\]"):
        world.step(state, action[:, 0])
    with pytest.raises(ValueError, match=r"action: expected 4 rows as in state, got 3"):
        world.step(state, action[:3])
    with pytest.raises(ValueError, match=r"w: expected shape \[1\] or \[4, 1\], got \[3, 1\]"):
        world.act(state, torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"num: expected at least 1, got 0"):
        world.futures(state, action, None, 0.5, 0, seeded())
    with pytest.raises(ValueError, match=r"num: expected at least 1, got 0"):
        world.transitions(0, seeded())
    with pytest.raises(ValueError, match=r"task: expected one of near-east, near-north, got 'west'"):
        world.reward("west", state)
    with pytest.raises(ValueError, match=r"policy: expected one of forward, backward, fast, got 'slow'"):
        world.w("slow")
    state[2, 0] = math.nan
    with pytest.raises(ValueError, match=r"state: expected finite numbers, got 1 rows without"):
        world.futures(state, action, None, 0.5, 1, seeded())
    with pytest.raises(NotImplementedError, match="circle: the density"):
        world.log_density(state, state, action, 0.5)
    linear = make_world("linear-gaussian")
    assert linear.w() is None
    with pytest.raises(ValueError, match=r"w: expected None, for linear-gaussian has one policy, got shape \[2\]"):
        linear.act(torch.zeros(1, 2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"generator: expected a torch.Generator, for linear-gaussian is stochastic"):
        linear.step(torch.zeros(1, 2), torch.zeros(1, 2))


# --- linear-gaussian --------------------------------------------------------------------------------------------------


def linear_rows(num: int) -> tuple[World, Tensor, Tensor]:
    world = make_world("linear-gaussian")
    generator = seeded(10)
    state = world.starts(num, generator).double()
    return world, state, world.behave(state, None, generator)[0]


def test_closed_loop_is_a_spiral():
    world, state, _ = linear_rows(200)
    moved = torch.stack([world.step(state, world.act(state), seeded(i))[0] for i in range(400)])
    mean = 0.98 * torch.stack(
        [
            math.cos(0.15) * state[:, 0] - math.sin(0.15) * state[:, 1],
            math.sin(0.15) * state[:, 0] + math.cos(0.15) * state[:, 1],
        ],
        1,
    )
    assert (moved.mean(0) - mean).abs().max() < 5 * 0.05 / math.sqrt(400)
    assert abs((moved - mean).std() - 0.05) < 0.001
    rows = world.transitions(50_000, seeded())
    assert rows["terminals"].all() and (rows["observations"].std(0) - 0.7).abs().max() < 0.01
    assert ((rows["actions"] - world.act(rows["observations"])).std(0) - 0.3).abs().max() < 0.01
    assert ((rows["next_actions"] - world.act(rows["next_observations"])).std(0) - 0.3).abs().max() < 0.01


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.99])
def test_futures_and_moments(gamma):
    world, state, action = linear_rows(4)
    mean, spread = world.moments(state, action, gamma)
    closed = world.futures(state, action, None, gamma, 50_000, seeded(1))
    rolled = World.futures(world, state, action, None, gamma, 4000, seeded(2))
    for draws in (closed, rolled):
        error = (spread.diagonal(dim1=1, dim2=2) / draws.shape[1]).sqrt()
        assert ((draws.mean(1) - mean).abs() <= 4.5 * error).all()
        torch.testing.assert_close(covariance(draws), spread, rtol=0.1, atol=0.1 * spread.abs().max().item())


@pytest.mark.parametrize("gamma", [0.0, 0.8, 0.97])
def test_density(gamma):
    world, state, action = linear_rows(2)
    axis = torch.arange(-1.8, 1.8, 0.02, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(1, -1, 2).expand(2, -1, -1)
    density = world.log_density(grid, state, action, gamma).exp() * 0.02**2
    torch.testing.assert_close(density.sum(1), torch.ones(2, dtype=torch.float64), rtol=1e-5, atol=0.0)
    mean, spread = world.moments(state, action, gamma)
    torch.testing.assert_close((density[..., None] * grid).sum(1), mean, rtol=1e-4, atol=1e-5)
    off = grid - mean[:, None]
    torch.testing.assert_close((density[..., None] * off).mT @ off, spread, rtol=1e-3, atol=1e-5)
    # One point per row is the same as several.
    torch.testing.assert_close(
        world.log_density(grid[:, 77], state, action, gamma), world.log_density(grid, state, action, gamma)[:, 77]
    )
    # Values are integrals of the reward against it.
    for task in world.tasks:
        value = (density * world.reward(task, grid)).sum(1) / (1 - gamma)
        torch.testing.assert_close(world.values(task, state, action, None, gamma), value, rtol=1e-4, atol=1e-6)


def test_values_by_rollouts():
    world, state, action = linear_rows(6)
    for task in world.tasks:
        closed = world.values(task, state, action, None, 0.9)
        rolled = World.values(world, task, state, action, None, 0.9, seeded(3), num=2000)
        torch.testing.assert_close(closed, rolled, rtol=0.01, atol=0.03)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.99])
def test_velocity_at_the_ends(gamma):
    world, state, action = linear_rows(50)
    x = torch.randn(50, 3, 2, dtype=torch.float64, generator=seeded(4))
    at_noise = world.velocity(x, torch.zeros(()), state, action, gamma)
    torch.testing.assert_close(at_noise, world.moments(state, action, gamma)[0][:, None] - x)
    # E[X_1 - X_0 | X_1 = x] = x, far from all mass as well.
    torch.testing.assert_close(world.velocity(30 * x, torch.ones(50, 1), state, action, gamma), 30 * x)
    t = torch.rand(50, 3, generator=seeded(5), dtype=torch.float64)
    together = world.velocity(x, t, state, action, gamma)
    torch.testing.assert_close(world.velocity(x[:, 1], t[:, 1], state, action, gamma), together[:, 1])
    assert world.velocity(x.float(), t.float(), state.float(), action.float(), gamma).dtype == torch.float32
    with pytest.raises(ValueError, match=r"t: expected a shape that broadcasts to \[50, 3\], got \[4\]"):
        world.velocity(x, torch.zeros(4), state, action, gamma)
    with pytest.raises(ValueError, match=r"x: expected shape \[50, 2\] or \[50, S, 2\], got \[49, 2\]"):
        world.velocity(x[:49, 0], t[:49, 0], state, action, gamma)


@pytest.mark.parametrize("t", [0.2, 0.6, 0.95])
def test_velocity_is_the_conditional_mean(t):
    """E[f(X_t) (X_1 - X_0)] = E[f(X_t) v*_t(X_t)] for any f."""
    world, state, action = linear_rows(3)
    generator = seeded(6)
    x_1 = world.futures(state, action, None, 0.9, 30_000, generator)
    x_0 = torch.randn(x_1.shape, generator=generator, dtype=torch.float64)
    x_t = t * x_1 + (1 - t) * x_0
    error = x_1 - x_0 - world.velocity(x_t, torch.tensor(t), state, action, 0.9)
    weighted = bumps(x_t)[..., None] * error[..., None, :]
    assert (weighted.mean(1).abs() <= 4.5 * weighted.std(1) / math.sqrt(30_000)).all()


@pytest.mark.parametrize("t", [0.3, 0.8])
def test_bellman_identity(t):
    """p_t v*_t = (1 - gamma) p->_t v->_t + gamma E_{s'}[p_t v*_t (. | s', pi(s'))], against test functions."""
    world, state, action = linear_rows(1)
    gamma, num, generator = 0.9, 30_000, seeded(7)

    def blurred(x_1: Tensor) -> tuple[Tensor, Tensor]:
        x_0 = torch.randn(x_1.shape, generator=generator, dtype=torch.float64)
        return t * x_1 + (1 - t) * x_0, x_1 - x_0

    def mean(x_t: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        terms = (bumps(x_t)[..., None] * velocity[..., None, :]).view(num, -1)
        return terms.mean(0), terms.var(0) / num

    x_t, _ = blurred(world.futures(state, action, None, gamma, num, generator)[0])
    left, left_error = mean(x_t, world.velocity(x_t[None], torch.tensor(t), state, action, gamma)[0])
    after, _ = world.step(state.expand(num, -1), action.expand(num, -1), generator)
    direct, direct_error = mean(*blurred(after))
    x_t, _ = blurred(world.futures(after, world.act(after), None, gamma, 1, generator)[:, 0])
    later, later_error = mean(x_t, world.velocity(x_t, torch.tensor(t), after, world.act(after), gamma))
    right = (1 - gamma) * direct + gamma * later
    error = (left_error + (1 - gamma) ** 2 * direct_error + gamma**2 * later_error).sqrt()
    assert ((left - right).abs() <= 4.5 * error).all() and error.max() < 0.01


def test_velocity_carries_noise_to_the_measure():
    world, state, action = linear_rows(2)
    gamma, num, steps = 0.8, 3000, 50
    x = torch.randn(2, num, 2, generator=seeded(8), dtype=torch.float64)
    for i in range(steps):
        middle = x + 0.5 / steps * world.velocity(x, torch.tensor(i / steps), state, action, gamma)
        x = x + world.velocity(middle, torch.tensor((i + 0.5) / steps), state, action, gamma) / steps
    mean, spread = world.moments(state, action, gamma)
    assert ((x.mean(1) - mean).abs() <= 4.5 * (spread.diagonal(dim1=1, dim2=2) / num).sqrt()).all()
    torch.testing.assert_close(covariance(x), spread, rtol=0.1, atol=0.1 * spread.abs().max().item())


def test_closed_forms_are_differentiable():
    world, state, action = linear_rows(3)
    x = torch.randn(3, 2, generator=seeded(9), dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: world.velocity(x, t, state, action, 0.9), x)
    assert torch.autograd.gradcheck(lambda x: world.log_density(x, state, action, 0.9), x)


# --- circle -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["forward", "backward", "fast"])
def test_circle_futures(policy):
    world = make_world("circle")
    state = world.starts(5, seeded()).double()
    action = 0.25 * torch.ones(5, 1, dtype=torch.float64)
    w = world.w(policy)
    closed = world.futures(state, action, w, 0.97, 500, seeded(1))
    torch.testing.assert_close(closed, World.futures(world, state, action, w, 0.97, 500, seeded(1)))
    torch.testing.assert_close(closed.norm(dim=2), torch.ones(5, 500, dtype=torch.float64))
    # The same draws, spelled out.
    k = geometric((5, 500), 0.97, seeded(1), torch.device("cpu"))
    angle = torch.atan2(state[:, 1], state[:, 0])[:, None] + 0.25 + (k - 1) * world.policies[policy][0]
    torch.testing.assert_close(closed, torch.stack([angle.cos(), angle.sin()], 2), rtol=0.0, atol=1e-5)


# --- point mazes ------------------------------------------------------------------------------------------------------


def maze_states(world: World, num: int, rng: np.random.Generator) -> np.ndarray:
    """Points all over the free cells, so that many overlap walls."""
    free = np.argwhere(~world.walls)
    cells = free[rng.integers(len(free), size=num)]
    return 4.0 * cells[:, ::-1] - 4.0 + rng.uniform(-2.0, 2.0, (num, 2))


@pytest.mark.parametrize("size", MAZES)
def test_pointmaze_is_as_mujoco(size):
    mujoco = pytest.importorskip("mujoco")
    pytest.importorskip("ogbench")
    from fastflow.envs import make_core_env

    env = make_core_env(f"pointmaze-{size}-v0", terminate_at_goal=False)
    world = make_world(f"pointmaze-{size}")
    assert np.array_equal(world.walls, env.maze_map == 1)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    state = maze_states(world, 1500, rng)
    action = rng.uniform(-1.0, 1.0, state.shape)
    expected = np.empty_like(state)
    for i in range(len(state)):
        mujoco.mj_resetData(env.model, env.data)
        env.data.qpos[:] = state[i]
        expected[i] = env.step(action[i])[0]
    moved, ended = world.step(torch.from_numpy(state), torch.from_numpy(action))
    assert not ended.any()
    free = np.abs(expected - state - 0.2 * action).max(1) < 1e-12
    assert 100 < (~free).sum() < 1400
    np.testing.assert_allclose(moved.numpy()[free], expected[free], rtol=0, atol=1e-12)
    np.testing.assert_allclose(moved.numpy()[~free], expected[~free], rtol=0, atol=1e-7)
    single, _ = world.step(torch.from_numpy(state).float(), torch.from_numpy(action).float())
    # At the edge of a soft contact, rounding decides little.
    np.testing.assert_allclose(single.numpy(), expected, rtol=0, atol=2e-5)


def test_pointmaze_tasks_are_ogbenchs():
    pytest.importorskip("mujoco")
    pytest.importorskip("ogbench")
    from fastflow.envs import make_env

    for size in MAZES:
        env = make_env(f"pointmaze-{size}-navigate-singletask-v0").unwrapped
        world = make_world(f"pointmaze-{size}")
        for i, task in enumerate(env.task_infos):
            goal = torch.tensor(task["goal_xy"], dtype=torch.float64)
            ring = torch.tensor([[0.0, 0.0], [0.999, 0.0], [0.0, -0.999], [1.001, 0.0], [0.8, 0.8]]).double()
            assert world.reward(f"reach-task{i + 1}", goal + ring).tolist() == [1, 1, 1, 0, 0]
        env.close()


def test_collected_trajectories_replay(tmp_path):
    pytest.importorskip("mujoco")
    pytest.importorskip("ogbench")
    from fastflow.collect import collect

    train, _ = collect("pointmaze-medium-navigate-v0", dataset_dir=tmp_path, episodes=1, val_episodes=1, progress=False)
    with np.load(train) as file:
        data = {key: torch.from_numpy(file[key]) for key in ("observations", "actions", "terminals")}
    rows = from_trajectories(**data)
    assert len(rows["masks"]) == len(data["terminals"]) - 1
    moved, _ = make_world("pointmaze-medium").step(rows["observations"], rows["actions"])
    # Observations were rounded to float32.
    torch.testing.assert_close(moved, rows["next_observations"], rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("size", MAZES)
def test_pointmaze_policies_reach_their_goals(size):
    world = make_world(f"pointmaze-{size}")
    assert len(world.policies) >= 16
    each = 10
    w = torch.tensor(list(world.policies.values())).repeat_interleave(each, 0)
    state = torch.from_numpy(maze_states(world, len(w), np.random.default_rng(1))).float()
    cells = len(np.argwhere(~world.walls))
    for _ in range(20 * cells):
        state, _ = world.step(state, world.act(state, w))
        if ((state - w).norm(dim=1) < 1e-4).all():
            break
    assert ((state - w).norm(dim=1) < 1e-4).all()
    after, _ = world.step(state, world.act(state, w))
    assert ((after - w).norm(dim=1) < 1e-4).all()
    # A goal off the centre, and a state in a wall: there is an answer.
    places = torch.tensor([[0.7, -0.9], [-4.0, -4.0], [1e3, -1e3]])
    assert world.act(places, torch.tensor([0.7, -0.9])).isfinite().all()
    assert world.act(places[:1], torch.tensor([0.7, -0.9])).abs().max() < 1e-6


def test_pointmaze_behaviour_goes_everywhere():
    world = make_world("pointmaze-medium")
    world.horizon = 300
    rows = world.transitions(15_000, seeded())
    free = torch.from_numpy(~world.walls).flatten().nonzero()[:, 0]
    assert torch.equal(world._cell(rows["observations"]).unique(), free)
    assert rows["actions"].abs().max() <= 1.0
    starts = world.starts(2000, seeded())
    assert torch.equal(world._cell(starts).unique(), free)
    # Starts are clear of walls.
    still, _ = world.step(starts, torch.zeros_like(starts))
    assert torch.equal(still, starts)
    # No named policy stays where a "near" task rewards most.
    for task in world.tasks:
        if task.startswith("near"):
            assert world.reward(task, torch.tensor(list(world.policies.values()))).max() < 0.2
    assert world.reward("patrol", rows["observations"]).min() < -0.9


# --- point mass -------------------------------------------------------------------------------------------------------


def test_pointmass_is_as_mujoco_away_from_walls():
    mujoco = pytest.importorskip("mujoco")
    common = pytest.importorskip("dm_control.suite.common")
    model = mujoco.MjModel.from_xml_string(common.read_model("point_mass.xml").decode(), common.ASSETS)
    data = mujoco.MjData(model)
    world = make_world("pointmass-maze")
    rng = np.random.default_rng(0)
    state = np.concatenate([rng.uniform(0.1, 0.15, (300, 2)), rng.uniform(-0.1, 0.1, (300, 2))], 1)
    action = rng.uniform(-1.0, 1.0, (300, 2))
    expected = np.empty_like(state)
    for i in range(len(state)):
        data.qpos[:], data.qvel[:], data.ctrl[:] = state[i, :2], state[i, 2:], action[i]
        mujoco.mj_step(model, data)
        expected[i] = np.concatenate([data.qpos, data.qvel])
    moved, _ = world.step(torch.from_numpy(state), torch.from_numpy(action))
    np.testing.assert_allclose(moved.numpy(), expected, rtol=0, atol=1e-12)


def in_wall(place: Tensor) -> Tensor:
    across = (place[:, 0].abs() < 0.19 - 1e-6) & (place[:, 1].abs() < 0.03 - 1e-6)
    upright = (place[:, 1].abs() < 0.19 - 1e-6) & (place[:, 0].abs() < 0.03 - 1e-6)
    return across | upright | (place.abs() > 0.29 + 1e-6).any(1)


@pytest.fixture(scope="module")
def pointmass_rows() -> dict[str, Tensor]:
    return make_world("pointmass-maze").transitions(40_000, seeded())


def test_pointmass_stays_out_of_walls(pointmass_rows):
    world, rows = make_world("pointmass-maze"), pointmass_rows
    place = rows["observations"][:, :2]
    assert not in_wall(place).any() and rows["observations"][:, 2:].abs().max() <= 0.1
    rooms = torch.stack([((place[:, 0] < 0) == left) & ((place[:, 1] < 0) == low) for left in (0, 1) for low in (0, 1)])
    assert (rooms.double().mean(1) > 0.02).all()
    # It does touch them, and stops there.
    assert (place.abs().amax(1) == 0.29).any() and ((place.abs() - 0.03).abs() < 1e-6).any()
    # From anywhere at all it is set back at once.
    state = torch.rand(5000, 4, generator=seeded(1)) - 0.5
    moved, _ = world.step(state, torch.zeros(5000, 2))
    assert not in_wall(moved[:, :2]).any()


def test_pointmass_tolerance_is_dm_controls():
    rewards = pytest.importorskip("dm_control.utils.rewards")
    world = make_world("pointmass-maze")
    place = world.starts(500, seeded()).double()
    place[:, :2] = torch.tensor([-0.15, 0.15]) + 0.06 * (torch.rand(500, 2, generator=seeded()) - 0.5)
    distance = (place[:, :2] - torch.tensor([-0.15, 0.15])).norm(dim=1).numpy()
    expected = rewards.tolerance(distance, bounds=(0, 0.015), margin=0.015)
    # The corner is a float32 number above.
    np.testing.assert_allclose(world.reward("reach_top_left", place).numpy(), expected, rtol=1e-4, atol=1e-6)


def test_pointmass_policies_reach_their_goals(pointmass_rows):
    world = make_world("pointmass-maze")
    corners = list(world.policies)[:4]
    w = torch.tensor([world.policies[policy] for policy in corners]).repeat_interleave(100, 0)
    state = pointmass_rows["next_observations"][::400].repeat(4, 1)
    for _ in range(800):
        state, _ = world.step(state, world.act(state, w))
    for policy, rows in zip(corners, state.split(100), strict=True):
        assert (world.reward(policy, rows) == 1.0).all()
    assert (state - torch.nn.functional.pad(w[:, :2], (0, 2))).abs().max() < 1e-4


def test_pointmass_loop(pointmass_rows):
    world = make_world("pointmass-maze")
    state = pointmass_rows["next_observations"][::400]
    rewards, angle = [], torch.zeros(len(state))
    for i in range(1000):
        moved, _ = world.step(state, world.act(state, world.w("loop")))
        if i >= 400:
            cross = state[:, 0] * moved[:, 1] - state[:, 1] * moved[:, 0]
            angle += torch.atan2(cross, (state[:, :2] * moved[:, :2]).sum(1))
            rewards.append(world.reward("loop", moved))
        state = moved
    # A round is 4 * 0.24 * sqrt(2) = 1.36 long, at speed 0.1 about 14 s; clockwise is negative.
    assert (angle < -0.75 * 2 * math.pi * 12.0 / 13.6).all()
    assert torch.stack(rewards).mean() > 0.85
