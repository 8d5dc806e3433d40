"""Acting with a geometric horizon model: at every state, follow the policy of a family that promises most.

Generalised policy improvement (Barreto et al., 2017; TD-Flow, section 5.2): for each policy pi_i the model samples the
states that pi_i would visit from here, a reward function turns them into Q_i, and the action of the best policy is
taken. No policy is trained for the reward, and the planner can be better than every policy of the family.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastflow.successor import SuccessorFlow
from fastflow.worlds import World

__all__ = ["PolicyImprovement", "play"]

Policy = Callable[[Tensor, Tensor], Tensor]
Reward = Callable[[Tensor], Tensor]


class PolicyImprovement:
    """Generalised policy improvement over a family of policies.

    Args:
        model: a `SuccessorFlow` that is conditioned on the policy's embedding w.
        act: the family, (states [N, D], w [N, W]) -> actions [N, A].
        policies: embeddings of the P policies to choose from, [P, W] (the paper: 256).
        reward_fn: states [..., D] -> rewards [...], of the state that is reached.
        num_samples: states sampled per policy and decision (the paper: 128).
        num_steps: K of the walks; None takes the model's.
        temperature: 0 takes the best policy; above, a policy is drawn with probability softmax(Q / temperature).
        generator: of all noise, on the model's device.

    Attributes:
        chosen: indices of the policies that the last call of `act` followed, [N].

    Raises:
        ValueError: a model without w, embeddings of another width, num_samples < 1, a negative temperature.
    """

    def __init__(
        self,
        model: SuccessorFlow,
        act: Policy,
        policies: Tensor,
        reward_fn: Reward,
        *,
        num_samples: int = 128,
        num_steps: int | None = None,
        temperature: float = 0.0,
        generator: torch.Generator,
    ) -> None:
        if not model.policy_dim:
            raise ValueError("PolicyImprovement: model must be conditioned on the policy (policy_dim > 0), got none")
        if policies.dim() != 2 or policies.shape[1] != model.policy_dim or not len(policies):
            raise ValueError(f"PolicyImprovement: policies must be [P, {model.policy_dim}], got {list(policies.shape)}")
        if num_samples < 1:
            raise ValueError(f"PolicyImprovement: num_samples must be at least 1, got {num_samples}")
        if not temperature >= 0:
            raise ValueError(f"PolicyImprovement: temperature must be at least 0, got {temperature}")
        self.model, self.policy, self.policies, self.reward_fn = model, act, policies, reward_fn
        self.num_samples, self.num_steps, self.temperature = num_samples, num_steps, temperature
        self.generator = generator
        self.chosen: Tensor | None = None

    @torch.no_grad()
    def values(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Q of every policy at every state, and the policies' actions: [N, P] and [N, P, A] for obs [N, D].

        All N x P x num_samples walks are one operation, and they start from the same noise: what differs between two
        policies is then not the luck of the draw.
        """
        n, p = len(obs), len(self.policies)
        obs = obs.repeat_interleave(p, 0)
        w = self.policies.repeat(n, 1)
        actions = self.policy(obs, w)
        shape = (self.num_samples, self.model.state_dim)
        noise = torch.randn(shape, dtype=obs.dtype, device=obs.device, generator=self.generator)
        options: dict[str, Any] = {"w": w, "noise": noise, "num_steps": self.num_steps}
        q = self.model.value(self.reward_fn, obs, actions, self.num_samples, **options)
        return q.view(n, p), actions.view(n, p, -1)

    @torch.no_grad()
    def act(self, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Actions [N, A] for states [N, D]; `generator` draws among policies where there is a temperature."""
        q, actions = self.values(obs)
        if self.temperature:
            source = self.generator if generator is None else generator
            share = (q / self.temperature).softmax(1)
            self.chosen = torch.multinomial(share, 1, generator=source).squeeze(1)
        else:
            self.chosen = q.argmax(1)
        return actions[torch.arange(len(obs), device=obs.device), self.chosen]


@torch.no_grad()
def play(
    world: World,
    act: Callable[[Tensor], Tensor],
    reward_fn: Reward,
    states: Tensor,
    *,
    horizon: int,
    gamma: float = 1.0,
    generator: torch.Generator,
) -> Tensor:
    """Returns [N] of a policy from start states [N, D]: the sum over `horizon` steps of gamma^(k-1) r(S_k).

    Args:
        world: where it plays; all rows step together. A row that terminated stays where it is.
        act: states [N, D] -> actions [N, A], such as `PolicyImprovement.act`.
        reward_fn: as for `PolicyImprovement`.
        generator: of the transitions.
    """
    total = torch.zeros(len(states), dtype=torch.float64, device=states.device)
    ended = torch.zeros(len(states), dtype=torch.bool, device=states.device)
    for k in range(horizon):
        moved, terminated = world.step(states, act(states), generator)
        states = torch.where(ended.unsqueeze(1), states, moved)
        ended = ended | terminated
        total += gamma**k * reward_fn(states).double()
    return total
