"""What is tracked from one version of fastflow to the next: small calls that users make, a name each.

The definitions are those of the tree that asks, for old and new code alike (`benchmarks.compare` copies them beside
both), so they call what fastflow has had all along, and import it only where it is used: a version that lacks something
loses one case by name.

A case is a function that prepares whatever it needs and returns the call. To add one, write such a function under
`@tracked("what a reader is told")`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import CASES, FLOQ, UPDATES, Case

Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Tracked:
    """A call that is tracked.

    Args:
        name: its key, the same over versions.
        title: what a reader is told.
        prepare: given the device, makes the call.
    """

    name: str
    title: str
    prepare: Callable[[torch.device], Call]


TRACKED: dict[str, Tracked] = {}


def tracked(title: str) -> Callable[[Callable[[torch.device], Call]], Callable[[torch.device], Call]]:
    """Adds a case named after its function."""

    def add(prepare: Callable[[torch.device], Call]) -> Callable[[torch.device], Call]:
        name = prepare.__name__.replace("_", "-")
        TRACKED[name] = Tracked(name, title, prepare)
        return prepare

    return add


# Operators ------------------------------------------------------------------------------------------------------------


class Inaccurate(Exception):
    """A result that is further from float64 than it may be."""


def _operator(case: Case, precision: str) -> Callable[[torch.device], Call]:
    def prepare(device: torch.device) -> Call:
        from benchmarks.rivals import FUSED_TIMES, check, torch_variant

        problem = case.build(device)

        def run(**inputs: torch.Tensor) -> torch.Tensor:
            return case.run(problem.field, inputs, "auto", precision)

        variant = torch_variant("fastflow", problem, run)
        verdict = check(problem, variant, precision)
        if not verdict.within(FUSED_TIMES):
            raise Inaccurate(f"{case.name}: errors {verdict.errors}, of eager PyTorch {verdict.eager}")
        return variant.call

    return prepare


_OPERATORS = (
    *(
        Case(
            f"walk-256-k{steps}", f"floq walk, 2 nets x 256 rows, 4x512, K={steps}", "integrate", FLOQ, 256, None, steps
        )
        for steps in (1, 8)
    ),
    CASES["demo-walk"],
    CASES["demo-loss"],
    CASES["actor-walk-256"],
    dataclasses.replace(CASES["loss-2x2048"].with_batch(64), name="loss-2x512"),
    dataclasses.replace(CASES["walk-to-actions-2x2048"].with_batch(128), name="walk-to-actions-2x128"),
    CASES["fpo-walk-2048"],
    dataclasses.replace(CASES["fpo-loss-30720x8"].with_batch(960), name="fpo-loss-960x8"),
    dataclasses.replace(CASES["td-walk-1024"].with_batch(16), name="td-walk-16"),
    dataclasses.replace(CASES["td-loss-1024"].with_batch(64), name="td-loss-64"),
    CASES["one-row"],
)
for _case in _OPERATORS:
    for _precision in ("fp32", "bf16"):
        _name = f"{_case.name}-{_precision}"
        TRACKED[_name] = Tracked(_name, f"{_case.title}, {_precision}", _operator(_case, _precision))


# Modules --------------------------------------------------------------------------------------------------------------


def _critic(device: torch.device) -> Any:
    import fastflow as ff

    torch.manual_seed(0)
    ranges: Any = dict(reward_range=(-1.0, 0.0), discount=0.99)
    return ff.FlowCritic.for_rewards(37, 5, hidden=(64, 64), ensemble=2, num_steps=8, device=device, **ranges)


def _policy(device: torch.device) -> Any:
    import fastflow as ff

    torch.manual_seed(0)
    return ff.FlowPolicy(17, 6, hidden=(32,) * 4, activation="silu", num_steps=10, device=device)


def _without_gradient(function: Callable[..., Any], *inputs: torch.Tensor) -> Call:
    def call() -> Any:
        with torch.no_grad():
            return function(*inputs)

    return call


@tracked("FlowCritic, one row, 2 nets of 2x64, K=8")
def critic_call(device: torch.device) -> Call:
    return _without_gradient(_critic(device), torch.randn(1, 37, device=device), torch.randn(1, 5, device=device))


@tracked("FlowPolicy, one row, 4x32, K=10")
def policy_call(device: torch.device) -> Call:
    return _without_gradient(_policy(device), torch.randn(1, 17, device=device))


@tracked("FlowPolicy, one row, 4x32, K=10, frozen copy")
def policy_frozen(device: torch.device) -> Call:
    return _without_gradient(_policy(device).freeze(), torch.randn(1, 17, device=device))


@tracked("FlowCritic's loss and its gradients, 256 rows, 2 nets of 2x64")
def critic_loss(device: torch.device) -> Call:
    critic = _critic(device)
    obs, action, target = (torch.randn(256, width, device=device) for width in (37, 5, 1))

    def call() -> None:
        critic.zero_grad(set_to_none=True)
        critic.loss(obs, action, target).backward()

    return call


# Whole updates --------------------------------------------------------------------------------------------------------


@tracked("whole floq update at the demo's sizes")
def update_floq(device: torch.device) -> Call:
    case = UPDATES["update-demo"]
    agent, batches = case.agent(device), itertools.cycle(case.batches(device))
    return lambda: agent.update(next(batches))


@tracked("whole TD2-CFM update, preset linear-gaussian, B=256")
def update_td2(device: torch.device) -> Call:
    from fastflow.agents import make
    from fastflow.agents.td2_cfm import PRESETS, Td2CfmConfig

    config = Td2CfmConfig(**PRESETS["linear-gaussian"])
    agent = make("td2-cfm", config, obs_dim=4, action_dim=2, device=device, seed=0)
    source = torch.Generator().manual_seed(0)
    widths = dict(observations=4, actions=2, next_observations=4, next_actions=2)
    batch = {name: torch.randn(config.batch_size, width, generator=source).to(device) for name, width in widths.items()}
    return lambda: agent.update(batch)


@tracked("FPO's loss of a minibatch and its gradients, 256 actions x 8 pairs, 2x64")
def fpo_minibatch(device: torch.device) -> Call:
    import fastflow as ff

    torch.manual_seed(0)
    spec = ff.FieldSpec(3, 11, (64, 64), activation="silu", time_embedding=ff.PowerFourier(8))
    field = ff.VelocityField(spec, device=device)
    x_0, t = torch.randn(256, 8, 3, device=device), torch.rand(256, 8, device=device)
    action, obs, advantages = (torch.randn(256, *width, device=device) for width in ((3,), (11,), ()))
    with torch.no_grad():
        old = ff.pair_losses(field, x_0, action, t, obs)

    def call() -> None:
        field.zero_grad(set_to_none=True)
        loss = ff.flow_policy_loss(field, x_0, action, t, obs, old, advantages, clip=0.2)
        loss.loss.backward()

    return call
