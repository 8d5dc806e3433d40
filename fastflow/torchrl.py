"""Flow critics and policies in TorchRL's losses.

Most of it needs nothing from here: `ValueOperator(FlowCritic(...), in_keys=["observation", "action"])` is a critic and
`Actor(FlowPolicy(...), in_keys=["observation", "noise"])` an actor. Here is what they do not give: losses that take the
members of one ensemble critic as they are, without vmap, and losses that train by flow matching.

Importing this module tells TorchRL that a FlowCritic draws random numbers (`add_random_module`), as it does for
dropout: its losses then vmap one without `set_vmap_randomness("different")`.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.errors import missing_extra
from fastflow.fields import VelocityField
from fastflow.modules import FlowCritic, FlowPolicy

try:
    from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
    from tensordict.nn import TensorDictModule, dispatch
    from torchrl.envs.utils import ExplorationType, set_exploration_type
    from torchrl.objectives import IQLLoss, LossModule, SACLoss, TD3Loss, ValueEstimators
    from torchrl.objectives.common import add_random_module
    from torchrl.objectives.utils import dispatch_value_estimator
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("tensordict", "torchrl"):
        raise
    raise missing_extra("torchrl", "torchrl") from error

__all__ = ["FlowBCLoss", "FlowIQLLoss", "FlowMatchingLoss", "FlowSACLoss", "FlowTD3Loss", "members"]

add_random_module(FlowCritic)


def members(critic: FlowCritic) -> list[FlowCritic]:
    """The E members of an ensemble critic as critics of their own, with copies of its weights.

    TorchRL's losses stack the parameters of a list of networks, so `[ValueOperator(m, ...) for m in members(critic)]`
    gives them `critic`'s weights, where one network would be drawn anew `num_qvalue_nets` times.

    Raises:
        ValueError: a critic without an ensemble.
    """
    spec = critic.field.spec
    if spec.ensemble is None:
        raise ValueError("members: critic must be a FlowCritic with an ensemble, got ensemble=None")
    alone = dataclasses.replace(spec, ensemble=None)
    out = []
    for e in range(spec.ensemble):
        member = copy.copy(critic)
        member._modules = dict(critic._modules)
        weights = {name: p.detach()[e] for name, p in critic.field.named_parameters()}
        like = next(iter(weights.values()))
        member.field = VelocityField(alone, like.device, like.dtype)
        member.field.load_state_dict(weights)
        out.append(member)
    return out


# One critic whose E axis holds the members ------------------------------------------------------------------------


class _OneCritic:
    """Before a loss: its Q networks are the members of one FlowCritic, whose parameters stay [E, in, out] and which one
    call walks all, where TorchRL would stack networks and vmap."""

    qvalue_network: TensorDictModule

    def convert_to_functional(
        self, module: nn.Module, module_name: str, expand_dim: int | None = None, *args: Any, **kwargs: Any
    ) -> None:
        if module_name == "qvalue_network":
            members = _flow_critic(type(self).__name__, module).field.spec.ensemble
            if members is None or members != expand_dim:
                raise ValueError(
                    f"{type(self).__name__}: qvalue_network must be a FlowCritic with ensemble={expand_dim}, the "
                    f"number of its num_qvalue_nets, got ensemble={members}"
                )
            expand_dim = None
        super().convert_to_functional(module, module_name, expand_dim, *args, **kwargs)  # type: ignore[misc]

    def _values(self, tensordict: TensorDictBase, params: TensorDictParams) -> TensorDictBase:
        """What the vmapped call would give: a tensordict [E, *batch] with the members' values."""
        operator = self.qvalue_network
        with params.to_module(operator, preserve_module_state=False):
            q = operator.module(*(tensordict.get(key, None) for key in operator.in_keys))
        return TensorDict({operator.out_keys[0]: q}, [q.shape[0], *tensordict.batch_size])


class FlowSACLoss(_OneCritic, SACLoss):
    """TorchRL's `SACLoss` with one `FlowCritic(ensemble=num_qvalue_nets)`, in a ValueOperator, for its Q networks.

    Arguments and results are those of `torchrl.objectives.SACLoss`, without its first version's `value_network`. The
    members of a row share the start of their walk, where vmap draws one for each.

    Raises:
        TypeError: a `qvalue_network` that is no TensorDictModule around a FlowCritic.
        ValueError: an ensemble of another size than `num_qvalue_nets`, or a `value_network`.
    """

    def __init__(self, actor_network: TensorDictModule, qvalue_network: TensorDictModule, **options: Any) -> None:
        if options.get("value_network") is not None:
            raise ValueError("FlowSACLoss: value_network must be None; SACLoss with one splits the batch over critics")
        super().__init__(actor_network, qvalue_network, **options)

    def _make_vmap(self) -> None:
        self._vmap_qnetworkN0 = self._values


class FlowTD3Loss(_OneCritic, TD3Loss):
    """TorchRL's `TD3Loss` with one `FlowCritic(ensemble=num_qvalue_nets)`, in a ValueOperator, for its Q networks.

    Arguments and results are those of `torchrl.objectives.TD3Loss`. The members of a row share the start of their walk,
    where vmap draws one for each.

    Raises:
        TypeError: a `qvalue_network` that is no TensorDictModule around a FlowCritic.
        ValueError: an ensemble of another size than `num_qvalue_nets`.
    """

    def _make_vmap(self) -> None:
        self._vmap_qvalue_network00 = self._shared_values

    def _shared_values(self, tensordict: TensorDictBase, params: TensorDictParams) -> TensorDictBase:
        # TD3Loss expands one batch over its networks.
        return self._values(tensordict[0], params)


class FlowIQLLoss(_OneCritic, IQLLoss):
    """TorchRL's `IQLLoss` with one `FlowCritic(ensemble=num_qvalue_nets)`, in a ValueOperator, for its Q networks.

    Arguments and results are those of `torchrl.objectives.IQLLoss`; `value_network` may be a ValueOperator around a
    `FlowCritic(action_dim=0)` or any other. The members of a row share the start of their walk, where vmap draws one
    for each.

    Raises:
        TypeError: a `qvalue_network` that is no TensorDictModule around a FlowCritic.
        ValueError: an ensemble of another size than `num_qvalue_nets`.
    """

    def _make_vmap(self) -> None:
        self._vmap_qvalue_networkN0 = self._values


# Flow matching ------------------------------------------------------------------------------------------------------


class FlowMatchingLoss(LossModule):
    """floq's critic loss (arXiv:2509.06863): conditional flow matching towards TD targets from a target critic.

    For each row, with S next actions a'_s ~ actor and S walks of the target critic, one per action,
        Q' = mean_s agg_e Q_target,e(s', a'_s),    target = the value estimator's, r + gamma (1 - terminated) Q' for TD0
        loss = sum_e mean_s (v_e(z_t, t | s, a) - (target - z_0))^2,    z_t = (1 - t) z_0 + t target
    floq's own is S / E times that. Nothing walks for the gradient: an update costs one evaluation of the velocity per
    row and the target's walk, where regression on a walk's end would differentiate K of them. The target has no entropy
    term.

    Args:
        actor_network: policy that writes the action; it is sampled. Any TensorDictModule, a FlowPolicy's among them.
        qvalue_network: TensorDictModule around a FlowCritic, with an ensemble or without. It keeps its parameters:
            another loss that is given the same module (`FlowSACLoss` for the actor, say) shares them.
        num_samples: S; default the critic's own.
        q_agg: "mean" or "min" over the members in the target.
        delay_actor, delay_qvalue: whether to keep target parameters for a `TargetNetUpdater`.
        reduction: "mean", "sum" or "none" over rows.

    Keys (`set_keys`): `action`, `state_action_value`, `reward`, `done`, `terminated`, `priority` ("td_error", where the
    row's loss is written), `priority_weight` (read if it is there).

    Input: the critic's in_keys, `("next", ...)` the actor's in_keys, the critic's observation, `reward`, `done` and
    `terminated` [*batch, 1].

    Returns:
        A tensordict with `loss_qvalue`, 0-d ([*batch] with "none"), with a gradient for the critic alone, and
        `target_value` [*batch, 1] without one.

    Raises:
        TypeError: a `qvalue_network` that is no TensorDictModule around a FlowCritic.
        ValueError: a FlowCritic without actions, `num_samples` below 1, an unknown `q_agg` or `reduction`.
    """

    @dataclasses.dataclass
    class _AcceptedKeys:
        action: NestedKey = "action"
        state_action_value: NestedKey = "state_action_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"

    default_keys = _AcceptedKeys
    default_value_estimator = ValueEstimators.TD0
    out_keys = ["loss_qvalue", "target_value"]  # noqa: RUF012 (TorchRL's losses state theirs so)

    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: TensorDictModule,
        qvalue_network: TensorDictModule,
        *,
        num_samples: int | None = None,
        q_agg: str = "mean",
        delay_actor: bool = False,
        delay_qvalue: bool = True,
        reduction: str = "mean",
    ) -> None:
        critic = _flow_critic("FlowMatchingLoss", qvalue_network)
        if not critic.action_dim:
            raise ValueError("FlowMatchingLoss: qvalue_network must be a FlowCritic with actions, got action_dim=0")
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"FlowMatchingLoss: num_samples must be at least 1, got {num_samples}")
        if q_agg not in ("mean", "min"):
            raise ValueError(f"FlowMatchingLoss: q_agg must be 'mean' or 'min', got {q_agg!r}")
        _check_reduction("FlowMatchingLoss", reduction)
        super().__init__()
        self.num_samples = critic.num_samples if num_samples is None else num_samples
        self.q_agg, self.reduction = q_agg, reduction
        self.delay_actor, self.delay_qvalue = delay_actor, delay_qvalue
        self.convert_to_functional(actor_network, "actor_network", create_target_params=delay_actor)
        self.convert_to_functional(qvalue_network, "qvalue_network", create_target_params=delay_qvalue)

    @property
    def in_keys(self) -> list[NestedKey]:
        """What a call reads."""
        keys = self.tensor_keys
        following = [*self.actor_network.in_keys, self.qvalue_network.in_keys[0]]
        following += [keys.reward, keys.done, keys.terminated]
        # A key may be a tuple of names itself.
        nested = [("next", *((key,) if isinstance(key, str) else key)) for key in following]
        return list(dict.fromkeys([*self.qvalue_network.in_keys[:2], *nested]))

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> None:
        """As for every TorchRL loss, with `gamma`, `lmbda` ...: TD0 (default), TD1 or TDLambda."""
        value_type = self.default_value_estimator if value_type is None else value_type
        dispatch_value_estimator(
            self,
            value_type,
            supported=(ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda),
            tensor_keys=self._estimator_keys(),
            value_network=None,
            **hyperparams,
        )

    def _estimator_keys(self) -> dict[str, NestedKey]:
        keys = self.tensor_keys
        return dict(value=keys.state_action_value, reward=keys.reward, done=keys.done, terminated=keys.terminated)

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        if self._value_estimator is not None:
            self._value_estimator.set_keys(**self._estimator_keys())

    @torch.no_grad()
    def target_value(self, tensordict: TensorDictBase) -> Tensor:
        """The TD target [*batch, 1], from the value estimator and the target critic."""
        critic, (obs_key, *_) = self.qvalue_network.module, self.qvalue_network.in_keys
        following = tensordict.get("next").select(*self.actor_network.in_keys, obs_key, strict=False)
        # An action for every walk, as in floq.
        following = following.unsqueeze(-1).expand(*following.batch_size, self.num_samples)
        with (
            set_exploration_type(ExplorationType.RANDOM),
            self.target_actor_network_params.to_module(self.actor_network, preserve_module_state=False),
        ):
            following = self.actor_network(following)
        obs, action = following.get(obs_key), following.get(self.tensor_keys.action)
        with self.target_qvalue_network_params.to_module(self.qvalue_network, preserve_module_state=False):
            q = critic(obs, action, torch.rand(*obs.shape[:-1], 1, dtype=obs.dtype, device=obs.device))
        if critic.field.spec.ensemble is not None:
            q = q.amin(0) if self.q_agg == "min" else q.mean(0)
        tensordict = tensordict.clone(False)
        tensordict.set(("next", self.tensor_keys.state_action_value), q.mean(-2))
        return self.value_estimator.value_estimate(tensordict)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        weights = self._maybe_get_priority_weight(tensordict)
        target = self.target_value(tensordict)
        critic, (obs_key, action_key, *_) = self.qvalue_network.module, self.qvalue_network.in_keys
        obs, action = tensordict.get(obs_key), tensordict.get(action_key)
        noise = torch.rand(*obs.shape[:-1], self.num_samples, dtype=obs.dtype, device=obs.device)
        with self.qvalue_network_params.to_module(self.qvalue_network, preserve_module_state=False):
            rows = critic.loss(obs, action, target, noise, reduction="none").mean(-1)
        if critic.field.spec.ensemble is not None:
            rows = rows.sum(0)
        tensordict.set(self.tensor_keys.priority, rows.detach())
        loss = self._reduce_loss(rows, tensordict=tensordict, weights=weights)
        out = TensorDict({"loss_qvalue": loss, "target_value": target})
        names = ("actor_network_params", "qvalue_network_params")
        self._clear_weakrefs(tensordict, out, *names, *(f"target_{name}" for name in names))
        return out


class FlowBCLoss(LossModule):
    """Behaviour cloning of a `FlowPolicy` by conditional flow matching: v(x_t, t | obs) regressed on action - noise, as
    `FlowPolicy.loss`.

    Args:
        actor_network: TensorDictModule around a FlowPolicy; the first of its in_keys is the observation.
        reduction: "mean", "sum" or "none" over rows.

    Keys (`set_keys`): `action`, the demonstrated one.

    Returns:
        A tensordict with `loss_bc`, 0-d ([*batch] with "none").

    Raises:
        TypeError: an `actor_network` that is no TensorDictModule around a FlowPolicy. ValueError: an unknown reduction.
    """

    @dataclasses.dataclass
    class _AcceptedKeys:
        action: NestedKey = "action"

    default_keys = _AcceptedKeys
    out_keys = ["loss_bc"]  # noqa: RUF012 (TorchRL's losses state theirs so)

    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams

    def __init__(self, actor_network: TensorDictModule, *, reduction: str = "mean") -> None:
        policy = getattr(actor_network, "module", None)
        if not isinstance(policy, FlowPolicy):
            raise TypeError(f"FlowBCLoss: actor_network must hold a FlowPolicy, got {_kind(actor_network)}")
        _check_reduction("FlowBCLoss", reduction)
        super().__init__()
        self.reduction = reduction
        self.convert_to_functional(actor_network, "actor_network")

    @property
    def in_keys(self) -> list[NestedKey]:
        """What a call reads."""
        return [self.actor_network.in_keys[0], self.tensor_keys.action]

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        """There is no value estimator."""

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        obs, action = (tensordict.get(key) for key in self.in_keys)
        with self.actor_network_params.to_module(self.actor_network, preserve_module_state=False):
            rows = self.actor_network.module.loss(obs, action, reduction="none")
        out = TensorDict({"loss_bc": self._reduce_loss(rows, tensordict=tensordict)})
        self._clear_weakrefs(tensordict, out, "actor_network_params", "target_actor_network_params")
        return out


# Checks -------------------------------------------------------------------------------------------------------------


def _flow_critic(name: str, operator: nn.Module) -> FlowCritic:
    critic = getattr(operator, "module", None)
    if not isinstance(operator, TensorDictModule) or not isinstance(critic, FlowCritic):
        raise TypeError(f"{name}: qvalue_network must be a ValueOperator around a FlowCritic, got {_kind(operator)}")
    return critic


def _kind(module: object) -> str:
    inner = getattr(module, "module", None)
    return type(module).__name__ + ("" if inner is None else f" around {type(inner).__name__}")


def _check_reduction(name: str, reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
