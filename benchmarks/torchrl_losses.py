"""python -m benchmarks.torchrl_losses: TorchRL's losses on two flow critics, stacked and vmapped or one ensemble.

A call is a loss and its gradients: batch 128, two critics of two layers of 64, K = 4. The two ways take turns; the
ratio is that of their rounds. Needs the extra `torchrl`. One thread; --seconds 8 of each loss.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import Actor, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import IQLLoss, SACLoss, TD3Loss

import fastflow as ff
import fastflow.torchrl as flow
from benchmarks.intervals import median_interval
from benchmarks.measure import Entry, Timer

OBS, ACTION, BATCH = 17, 6, 128
SPEC = Bounded(-torch.ones(ACTION), torch.ones(ACTION), (ACTION,))
Loss = Callable[[], nn.Module]


def _critic(ensemble: int | None = None, action_dim: int = ACTION) -> ValueOperator:
    critic = ff.FlowCritic(OBS, action_dim, value_range=(-100.0, 0.0), hidden=(64, 64), num_steps=4, ensemble=ensemble)
    return ValueOperator(critic, in_keys=["observation", "action"] if action_dim else ["observation"])


def _gaussian() -> ProbabilisticActor:
    network = nn.Sequential(nn.Linear(OBS, 64), nn.ReLU(), nn.Linear(64, 2 * ACTION), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(network, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=SPEC,
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def _flow_actor() -> Actor:
    return Actor(ff.FlowPolicy(OBS, ACTION, hidden=(64, 64), num_steps=4), in_keys=["observation"], spec=SPEC)


_TWO: dict[str, Any] = dict(num_qvalue_nets=2)
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "SAC": (
        lambda: SACLoss(_gaussian(), _critic(), action_spec=SPEC, **_TWO),
        lambda: flow.FlowSACLoss(_gaussian(), _critic(2), action_spec=SPEC, **_TWO),
    ),
    "TD3, flow policy": (
        lambda: TD3Loss(_flow_actor(), _critic(), action_spec=SPEC, **_TWO),
        lambda: flow.FlowTD3Loss(_flow_actor(), _critic(2), action_spec=SPEC, **_TWO),
    ),
    "IQL, flow V": (
        lambda: IQLLoss(_gaussian(), _critic(), _critic(action_dim=0), **_TWO),
        lambda: flow.FlowIQLLoss(_gaussian(), _critic(2), _critic(action_dim=0), **_TWO),
    ),
}


def _data() -> TensorDict:
    torch.manual_seed(0)
    ended = torch.zeros(BATCH, 1, dtype=torch.bool)
    following = dict(observation=torch.randn(BATCH, OBS), reward=-torch.rand(BATCH, 1), done=ended, terminated=ended)
    return TensorDict(dict(observation=torch.randn(BATCH, OBS), action=SPEC.rand((BATCH,)), next=following), [BATCH])


def call(loss: nn.Module, data: TensorDict) -> Callable[[], None]:
    """The loss and its gradients."""

    def once() -> None:
        loss.zero_grad(set_to_none=True)
        out = loss(data.clone())
        sum(value for name, value in out.items() if name.startswith("loss_")).backward()

    return once


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torchrl_losses", description="By vmap or natively.")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each loss")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    # That no updater goes with the target parameters, which are not updated here.
    warnings.filterwarnings("ignore", message="No target network updater")
    timer, data = Timer(torch.device("cpu")), _data()
    print("| | vmap | native axis | vmap / native (95 %) |\n|---|---|---|---|")
    for title, (stacked, native) in LOSSES.items():
        entries = [Entry(name, call(make(), data), timer.finish) for name, make in (("v", stacked), ("n", native))]
        timings = timer.measure(entries, rounds=101, seconds=given.seconds)
        pairs = zip(timings["v"].seconds, timings["n"].seconds, strict=True)
        ratio = median_interval([a / b for a, b in pairs])
        milliseconds = " | ".join(f"{1e3 * timings[name].median:.2f} ms" for name in ("v", "n"))
        print(f"| {title} | {milliseconds} | {ratio} |", flush=True)
    entry = Entry("m", call(flow.FlowMatchingLoss(_gaussian(), _critic(2)), data), timer.finish)
    alone = timer.measure([entry], rounds=31, seconds=given.seconds / 2)["m"]
    print(f"| `FlowMatchingLoss` (critic alone) | | {1e3 * alone.median:.2f} ms | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
