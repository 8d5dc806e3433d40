"""What a world offers: a policy to be evaluated, data from another one, and the truth about the states that follow.

The states that follow (s, a) under a policy have the successor measure m(X | s, a) = (1 - gamma) sum_{k >= 1}
gamma^(k-1) Pr(S_k = X | s, a, then the policy). It starts at S_1. A value is Q(s, a) = E_{X ~ m} r(X) / (1 - gamma): a
reward belongs to the state that is reached.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["World", "from_trajectories", "geometric"]

_TAIL = 1e-4  # of the discounted sum of `World.values` that is left out


class World(abc.ABC):
    """A Markov decision process whose rows (N of them) all step together, with a family of deterministic policies.

    Every method takes states on any device and in any floating dtype, and answers in kind; `starts` and `transitions`
    make float32 on the generator's device. All random numbers come from the generator that is given.
    """

    name: str
    state_dim: int
    """D."""
    action_dim: int
    """A."""
    policy_dim: int = 0
    """W, numbers that say which policy of the family is meant; 0 if there is one policy alone."""
    policies: Mapping[str, tuple[float, ...]]
    """Named policies -> w, the default first."""
    tasks: tuple[str, ...]
    """Names of the reward functions, the default first."""
    bounds: tuple[tuple[float, float], ...] | None = None
    """(low, high) of every state dimension, for pictures."""
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """(left, right, bottom, top) of every wall, for pictures."""
    horizon: int = 1000
    """Steps of a trajectory of `transitions`."""
    deterministic: bool = False
    """Whether `step` and `act` involve no chance, so that one rollout says all."""
    exact: bool = False
    """Whether `log_density`, `velocity`, `moments` and `values` are closed forms."""

    # --- what a world defines -----------------------------------------------------------------------------------------

    @abc.abstractmethod
    def act(self, state: Tensor, w: Tensor | None = None) -> Tensor:
        """Actions [N, A] of the policy w ([N, W] or [W]; None is the default policy) at states [N, D]."""

    @abc.abstractmethod
    def behave(self, state: Tensor, memory: Any, generator: torch.Generator) -> tuple[Tensor, Any]:
        """Actions [N, A] of the policy that collects data, and what it wants to see again at the next step.

        Args:
            state: [N, D].
            memory: None at the start of the trajectories (all start together), then what the last call returned.
            generator: of its noise.
        """

    @abc.abstractmethod
    def step(self, state: Tensor, action: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Next states [N, D], and whether each ended there ([N] bool), after actions [N, A] at states [N, D].

        Raises:
            ValueError: a wrong shape, or a state or action that is not finite; no generator where chance is involved.
        """

    @abc.abstractmethod
    def starts(self, num: int, generator: torch.Generator) -> Tensor:
        """`num` states [num, D] where trajectories and evaluations start."""

    @abc.abstractmethod
    def reward(self, task: str, state: Tensor) -> Tensor:
        """Rewards [...] of `task` for reaching states [..., D].

        Raises:
            ValueError: there is no such task.
        """

    # --- what follows from it -----------------------------------------------------------------------------------------

    def w(self, policy: str | None = None) -> Tensor | None:
        """The embedding [W] of a named policy (None: the default one); None if the world has one policy alone.

        Raises:
            ValueError: there is no such policy.
        """
        if policy is not None and policy not in self.policies:
            raise ValueError(f"policy: expected one of {', '.join(self.policies)}, got {policy!r}")
        if not self.policy_dim:
            return None
        return torch.tensor(self.policies[next(iter(self.policies)) if policy is None else policy])

    def draw_policies(self, num: int, generator: torch.Generator) -> Tensor:
        """Embeddings [num, W] of random policies of the family: the named ones, uniformly.

        Raises:
            ValueError: the world has one policy alone.
        """
        if not self.policy_dim:
            raise ValueError(f"draw_policies: {self.name} has one policy, and no embedding")
        named = torch.tensor(list(self.policies.values()), device=generator.device)
        return named[torch.randint(len(named), (num,), generator=generator, device=generator.device)]

    @torch.no_grad()
    def transitions(self, num: int, generator: torch.Generator, policy: str | None = None) -> dict[str, Tensor]:
        """Collects `num` transitions by `behave`, in trajectories of `horizon` steps that run side by side.

        Args:
            num: rows; the last trajectory is cut off where there are enough.
            generator: of starts, behaviour and transitions.
            policy: name of a target policy to collect with, without noise, in place of `behave`.

        Returns:
            Rows, trajectory by trajectory: observations and next_observations [num, D], actions and next_actions
            [num, A] (what the behaviour did next, or would have done after the last step), rewards of the first task,
            masks (1 - terminated) and terminals (1 at the last row of a trajectory), [num] each; float32.

        Raises:
            ValueError: num < 1, or no such policy.
        """
        if num < 1:
            raise ValueError(f"num: expected at least 1, got {num}")
        w = self.w(policy)
        waves: list[dict[str, Tensor]] = []
        missing = num
        while missing > 0:
            steps = min(self.horizon, missing)
            waves.append(self._trajectories(-(-missing // steps), steps, generator, w, by_policy=policy is not None))
            missing -= len(waves[-1]["masks"])
        rows = {key: torch.cat([wave[key] for wave in waves])[:num] for key in waves[0]}
        rows["terminals"][-1] = 1.0
        return rows

    def _trajectories(
        self, num: int, steps: int, generator: torch.Generator, w: Tensor | None, by_policy: bool
    ) -> dict[str, Tensor]:
        """One trajectory of up to `steps` steps each from `num` starts, end to end."""

        def choose(state: Tensor, memory: Any) -> tuple[Tensor, Any]:
            return (self.act(state, w), None) if by_policy else self.behave(state, memory, generator)

        state = self.starts(num, generator)
        action, memory = choose(state, None)
        alive = torch.ones(num, dtype=torch.bool, device=state.device)
        columns: dict[str, list[Tensor]] = {}
        for i in range(steps):
            next_state, terminated = self.step(state, action, generator)
            next_action, memory = choose(next_state, memory)
            row = {
                "observations": state,
                "actions": action,
                "next_observations": next_state,
                "rewards": self.reward(self.tasks[0], next_state),
                "masks": (~terminated).to(state.dtype),
                "terminals": (terminated | (i == steps - 1)).to(state.dtype),
                "next_actions": next_action,
                "alive": alive,
            }
            for key, value in row.items():
                columns.setdefault(key, []).append(value)
            alive = alive & ~terminated
            state, action = next_state, next_action
            if not alive.any():
                break
        stacked = {key: torch.stack(values, 1).flatten(0, 1) for key, values in columns.items()}
        keep = stacked.pop("alive")
        return {key: value[keep] for key, value in stacked.items()}

    @torch.no_grad()
    def futures(
        self,
        state: Tensor,
        action: Tensor,
        w: Tensor | None,
        gamma: float,
        num: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Draws from the successor measure by rollouts: k ~ Geometric(1 - gamma) on {1, 2, ...}, then S_k.

        A state where the world ended stays where it is for ever after.

        Args:
            state, action: where the futures start, [N, D] and [N, A].
            w: policy from the second step on, [N, W] or [W]; None is the default policy.
            gamma: discount in [0, 1).
            num: draws for every row. They are independent; in a deterministic world they share the row's one path.
            generator: of k and of the transitions.

        Returns:
            [N, num, D].

        Raises:
            ValueError: gamma outside [0, 1), num < 1, a wrong shape, or values that are not finite.
        """
        w = self._check(state, action, w, gamma, num)
        rows = len(state)
        times = geometric((rows, num), gamma, generator, state.device)
        if self.deterministic:
            return self._visit(state, action, w, times, generator)
        state, action = state.repeat_interleave(num, 0), action.repeat_interleave(num, 0)
        w = None if w is None else w.repeat_interleave(num, 0)
        return self._visit(state, action, w, times.view(-1, 1), generator).view(rows, num, self.state_dim)

    def _visit(
        self, state: Tensor, action: Tensor, w: Tensor | None, times: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The states [M, R, D] at `times` [M, R] >= 1 of M walks."""
        draws = times.shape[1]
        # Those that walk longest come first, so that the ones still walking are always the first few.
        last, order = times.amax(1).sort(descending=True)
        state, action, w = state[order], action[order], None if w is None else w[order]
        times_flat = times[order].flatten()
        by_time = times_flat.argsort()
        stops = torch.bincount(times_flat).cumsum(0).tolist()
        walking = (len(last) - torch.bincount(last).cumsum(0)).tolist()
        visited = state.new_empty(len(times_flat), self.state_dim)
        ended = torch.zeros(len(state), dtype=torch.bool, device=state.device)
        for i in range(1, len(stops)):
            moved, terminated = self.step(state, action, generator)
            state = torch.where(ended[:, None], state, moved)
            ended = ended | terminated
            here = by_time[stops[i - 1] : stops[i]]
            visited[here] = state[here // draws]
            count = walking[i]
            if count:
                state, ended, w = state[:count], ended[:count], None if w is None else w[:count]
                action = self.act(state, w)
        result = torch.empty_like(visited).view(len(order), draws, self.state_dim)
        result[order] = visited.view_as(result)
        return result

    @torch.no_grad()
    def values(
        self,
        task: str,
        state: Tensor,
        action: Tensor,
        w: Tensor | None,
        gamma: float,
        generator: torch.Generator | None = None,
        num: int = 64,
    ) -> Tensor:
        """Q(s, a) = E sum_{k >= 1} gamma^(k-1) r(S_k) by discounted rollouts, in float64, which stop when 1e-4 of the
        discounted sum is left.

        Args:
            task: name of the reward.
            state, action, w, gamma: as for `futures`.
            generator: of the transitions; a deterministic world needs none.
            num: rollouts for every row, one if the world is deterministic.

        Returns:
            [N] in the dtype of `state`.

        Raises:
            ValueError: as for `futures`, and no such task.
        """
        w = self._check(state, action, w, gamma, num)
        rows, dtype = len(state), state.dtype
        num = 1 if self.deterministic else num
        state, action = state.repeat_interleave(num, 0), action.repeat_interleave(num, 0)
        w = None if w is None else w.repeat_interleave(num, 0)
        total = torch.zeros(rows * num, dtype=torch.float64, device=state.device)
        ended = torch.zeros(rows * num, dtype=torch.bool, device=state.device)
        for k in range(terms(gamma, _TAIL)):
            if k:
                action = self.act(state, w)
            moved, terminated = self.step(state, action, generator)
            state = torch.where(ended[:, None], state, moved)
            ended = ended | terminated
            total += gamma**k * self.reward(task, state).double()
        return total.view(rows, num).mean(1).to(dtype)

    # --- closed forms, where `exact` ----------------------------------------------------------------------------------

    def log_density(self, x: Tensor, state: Tensor, action: Tensor, gamma: float) -> Tensor:
        """log m(x | s, a), [N] for x [N, D], [N, S] for x [N, S, D]. Only where `exact`."""
        raise NotImplementedError(f"{self.name}: the density of its successor measure has no closed form")

    def velocity(self, x: Tensor, t: Tensor, state: Tensor, action: Tensor, gamma: float) -> Tensor:
        """The velocity field that flow matching to m(. | s, a) aims at, in the shape of x. Only where `exact`."""
        raise NotImplementedError(f"{self.name}: the velocity of its successor measure has no closed form")

    def moments(self, state: Tensor, action: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        """Mean [N, D] and covariance [N, D, D] of m(. | s, a). Only where `exact`."""
        raise NotImplementedError(f"{self.name}: the moments of its successor measure have no closed form")

    # --- checks -------------------------------------------------------------------------------------------------------

    def _check(self, state: Tensor, action: Tensor, w: Tensor | None, gamma: float, num: int = 1) -> Tensor | None:
        """Checks what a future starts from and returns w as [N, W], or None if there is one policy alone."""
        check_gamma(gamma)
        if num < 1:
            raise ValueError(f"num: expected at least 1, got {num}")
        self._check_step(state, action)
        return self._embedding(w, state)

    def _check_state(self, state: Tensor) -> None:
        _check_rows("state", state, self.state_dim)

    def _check_step(self, state: Tensor, action: Tensor) -> None:
        self._check_state(state)
        _check_rows("action", action, self.action_dim)
        if len(action) != len(state):
            raise ValueError(f"action: expected {len(state)} rows as in state, got {len(action)}")

    def _check_task(self, task: str) -> None:
        if task not in self.tasks:
            raise ValueError(f"task: expected one of {', '.join(self.tasks)}, got {task!r}")

    def _embedding(self, w: Tensor | None, state: Tensor) -> Tensor | None:
        """w as [N, W] like `state`; the default policy's for None."""
        if not self.policy_dim:
            if w is not None and w.shape[-1]:
                raise ValueError(f"w: expected None, for {self.name} has one policy, got shape {list(w.shape)}")
            return None
        if w is None:
            w = self.w()
            assert w is not None
        rows = len(state)
        if w.shape not in ((self.policy_dim,), (rows, self.policy_dim)):
            expected = f"[{self.policy_dim}] or [{rows}, {self.policy_dim}]"
            raise ValueError(f"w: expected shape {expected}, got {list(w.shape)}")
        return w.to(state).expand(rows, self.policy_dim)


def _check_rows(name: str, rows: Tensor, dim: int) -> None:
    if rows.dim() != 2 or rows.shape[1] != dim:
        raise ValueError(f"{name}: expected shape [N, {dim}], got {list(rows.shape)}")
    if not rows.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, got {int((~rows.isfinite()).any(1).sum())} rows without")


def check_gamma(gamma: float) -> None:
    """Raises ValueError unless 0 <= gamma < 1."""
    if not 0.0 <= gamma < 1.0:
        raise ValueError(f"gamma: expected a number in [0, 1), got {gamma}")


def terms(gamma: float, tail: float) -> int:
    """How many terms of sum_k (1 - gamma) gamma^(k-1), k >= 1, leave at most `tail`."""
    return 1 if gamma <= tail else math.ceil(math.log(tail) / math.log(gamma))


def geometric(shape: tuple[int, ...], gamma: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """Times k in {1, 2, ...} of probability (1 - gamma) gamma^(k-1) each, int64, by inversion."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
    if gamma == 0.0:
        return torch.ones(shape, dtype=torch.int64, device=device)
    # 1 - uniform is in (0, 1], so that its logarithm is finite.
    return 1 + ((1.0 - uniform).log() / math.log(gamma)).floor().long()


def from_trajectories(observations: Tensor, actions: Tensor, terminals: Tensor) -> dict[str, Tensor]:
    """Transitions from trajectories laid end to end, as in OGBench's dataset files.

    A row of a trajectory is a state and the action taken there. The last one leads to no state that is known and is not
    a transition itself; the action there is the next action of the row before. Rows at the end of the file that no
    terminal closes are kept in the same way.

    Args:
        observations: [T, D].
        actions: [T, A].
        terminals: [T], nonzero at the last row of every trajectory. It marks where a recording ends: no row is taken
            for the end of the world.

    Returns:
        observations and next_observations [N, D], actions and next_actions [N, A], masks (all 1) and terminals (1 at
        the last transition of a trajectory), [N] each, in the dtype of `observations`.

    Raises:
        ValueError: shapes that do not fit together, or not a single transition.
    """
    rows = len(observations)
    if observations.dim() != 2 or actions.dim() != 2 or len(actions) != rows or terminals.shape != (rows,):
        got = f"{list(observations.shape)}, {list(actions.shape)}, {list(terminals.shape)}"
        raise ValueError(f"observations, actions, terminals: expected shapes [T, D], [T, A], [T], got {got}")
    closes = terminals != 0
    if rows:
        closes = torch.cat([closes[:-1], closes.new_ones(1)])
    index = (~closes).nonzero().squeeze(1)
    if not len(index):
        raise ValueError(f"terminals: expected a trajectory of two rows or more, got none in {rows} rows")
    return {
        "observations": observations[index],
        "actions": actions[index],
        "next_observations": observations[index + 1],
        "next_actions": actions[index + 1],
        "masks": torch.ones_like(observations[index, 0]),
        "terminals": closes[index + 1].to(observations.dtype),
    }
