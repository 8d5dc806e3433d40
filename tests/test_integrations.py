"""How far each way of using the modules goes: the table of docs/integrations.md, every cell by a test."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastflow as ff

ROOT = Path(__file__).resolve().parents[1]
OBS, ACTION, ROWS = 4, 2, 6
COLUMNS = ("eager", "compile", "vmap", "CUDA graph", "export")


# What is integrated ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Use:
    """A way to use a module.

    Args:
        module: its forward is what a training loop or a robot calls; it draws nothing at random.
        inputs: of the forward.
        trains: whether the result is a loss.
        vmaps: the forward is under vmap already.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    trains: bool = True
    vmaps: bool = False


def critic(device, **options):
    sizes = dict(obs_dim=OBS, action_dim=ACTION, hidden=(16, 16), num_steps=3, device=device)
    return ff.FlowCritic.for_rewards(**sizes, reward_range=(-1.0, 0.0), discount=0.9, **options)


def rows(device, *widths):
    return tuple(torch.rand(ROWS, width, device=device) for width in widths)


class Calls(nn.Module):
    """A forward from a function of a module and inputs."""

    def __init__(self, inner: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self.inner, *inputs)


def plain_loop(device) -> Use:
    """`critic.loss(...).backward()`: flow matching towards a target."""

    def loss(critic, obs, action, target, noise, t):
        return critic.loss(obs, action, target, noise, t)

    return Use(Calls(critic(device, ensemble=2), loss), rows(device, OBS, ACTION, 1, 1, 1))


def cleanrl(device) -> Use:
    """A mean squared error of `critic(obs, action)`, through the walk."""

    def loss(critic, obs, action, target, noise):
        return (critic(obs, action, noise) - target).square().mean()

    return Use(Calls(critic(device), loss), rows(device, OBS, ACTION, 1, 1))


def leanrl(device) -> Use:
    """Stacked parameters of single critics, put into one by `to_module` under vmap."""
    tensordict = pytest.importorskip("tensordict", reason='needs torchrl: pip install "fastflow[torchrl]"')

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            members = [critic(device), critic(device)]
            self.params = tensordict.from_modules(*members, as_module=True)
            # Out of `parameters()`: its weights are only a place for others.
            self.empty = [copy.deepcopy(members[0]).to("meta")]

        def forward(self, obs, action, target, noise):
            def value(params):
                with params.to_module(self.empty[0]):
                    return self.empty[0](obs, action, noise)

            return (torch.vmap(value)(self.params) - target).square().mean()

    return Use(Stacked(), rows(device, OBS, ACTION, 1, 1), vmaps=True)


def torchrl(device) -> Use:
    """`fastflow.torchrl.FlowMatchingLoss`, whose target is the batch's reward."""
    pytest.importorskip("torchrl", reason='needs torchrl: pip install "fastflow[torchrl]"')
    from tensordict import TensorDict
    from torchrl.modules import Actor, ValueOperator

    import fastflow.torchrl as flow

    actor = Actor(ff.FlowPolicy(OBS, ACTION, hidden=(16,), num_steps=3, device=device), in_keys=["observation"])
    value = ValueOperator(critic(device, ensemble=2), in_keys=["observation", "action"])
    loss = flow.FlowMatchingLoss(actor, value)

    def step(loss, obs, action, reward):
        ended = torch.ones(ROWS, 1, dtype=torch.bool, device=obs.device)
        following = dict(observation=obs, reward=reward, done=ended, terminated=ended)
        data = TensorDict(dict(observation=obs, action=action, next=following), [ROWS])
        return loss(data)["loss_qvalue"]

    return Use(Calls(loss, step), rows(device, OBS, ACTION, 1))


def own_network(device) -> Use:
    """A FlowPolicy around an nn.Sequential that was there before, cloning actions."""
    network = nn.Sequential(nn.Linear(ACTION + OBS + 1, 16), nn.SiLU(), nn.Linear(16, ACTION)).to(device)
    field = ff.VelocityField.from_sequential(
        network, state_dim=ACTION, cond_dim=OBS, inputs=("state", "cond", "time"), time_embedding=ff.RawTime()
    )

    def loss(policy, obs, noise, action):
        return (policy(obs, noise) - action).square().mean()

    return Use(Calls(ff.FlowPolicy.from_field(field, num_steps=3), loss), rows(device, OBS, ACTION, ACTION))


def values(device) -> Use:
    """`critic(obs, action)` without gradient, as a target or a planner calls it."""
    module = critic(device, ensemble=2).requires_grad_(False)
    return Use(module, rows(device, OBS, ACTION, 1), trains=False)


def acting(device) -> Use:
    """`policy(obs, noise)` without gradient."""
    module = ff.FlowPolicy(OBS, ACTION, hidden=(16, 16), num_steps=3, device=device).requires_grad_(False)
    return Use(module, rows(device, OBS, ACTION), trains=False)


def frozen(device) -> Use:
    """`policy.freeze()`: weights packed once, for one process that acts."""
    use = acting(device)
    packed = use.module.freeze()
    return Use(Calls(nn.Identity(), lambda _, *inputs: packed(*inputs)), use.inputs, False)


USES = {
    "plain loop, `critic.loss`": plain_loop,
    "CleanRL style, error of `critic(obs, action)`": cleanrl,
    "LeanRL style, `from_modules(...).to_module`, vmap": leanrl,
    "TorchRL, `FlowMatchingLoss`": torchrl,
    "your `nn.Sequential`, `from_sequential`": own_network,
    "values, `critic(obs, action)`": values,
    "acting, `policy(obs, noise)`": acting,
    "frozen copy, `policy.freeze()`": frozen,
}
# What a cell says other than "yes".
EXCEPT = {
    ("LeanRL style, `from_modules(...).to_module`, vmap", "export"): "no",
    ("TorchRL, `FlowMatchingLoss`", "export"): "no",
    ("TorchRL, `FlowMatchingLoss`", "vmap"): "no",
    ("frozen copy, `policy.freeze()`", "compile"): "no",
    ("frozen copy, `policy.freeze()`", "vmap"): "no",
    ("frozen copy, `policy.freeze()`", "export"): "no: export the policy",
}


# The columns ----------------------------------------------------------------------------------------------------------


def run(use: Use, module: nn.Module | None = None) -> list[Tensor]:
    """The result and, where it is a loss, the gradients."""
    module = use.module if module is None else module
    torch.manual_seed(3)  # of what a loss draws by itself
    out = module(*use.inputs)
    if not use.trains:
        return [out]
    parameters = [p for p in use.module.parameters() if p.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, parameters, materialize_grads=True)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def eager(use: Use) -> None:
    out, *grads = run(use)
    assert torch.isfinite(out).all()
    assert not use.trains or any(grad.abs().max() > 0 for grad in grads)


def compile_(use: Use) -> None:
    torch.compiler.reset()
    try:
        assert_same(run(use, torch.compile(use.module, fullgraph=True, backend="aot_eager")), run(use))
    finally:
        torch.compiler.reset()


def vmap(use: Use) -> None:
    """Over two sets of parameters."""
    if use.vmaps:
        return eager(use)
    other = {name: p.detach() + 0.1 for name, p in use.module.named_parameters()}
    states = [{name: p.detach() for name, p in use.module.named_parameters()}, other]
    assert states[0], "nothing to vmap over"
    stacked = {name: torch.stack([state[name] for state in states]) for name in other}

    def value(state):
        return torch.func.functional_call(use.module, state, use.inputs)

    out = torch.vmap(value, randomness="different")(stacked)
    assert_same(list(out), [value(state) for state in states])


def graph(use: Use) -> None:
    expected = run(use)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(use)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    torch.manual_seed(3)
    with torch.cuda.graph(captured):
        out = use.module(*use.inputs)
        parameters = [p for p in use.module.parameters() if p.requires_grad]
        grads = torch.autograd.grad(out, parameters, materialize_grads=True) if use.trains else ()
    captured.replay()
    torch.cuda.synchronize()
    assert_same([out.detach(), *grads], expected)


def export(use: Use) -> None:
    program = torch.export.export(use.module, use.inputs)
    torch.manual_seed(3)
    found = program.module()(*use.inputs)
    torch.manual_seed(3)
    torch.testing.assert_close(found, use.module(*use.inputs), rtol=1e-4, atol=1e-5)


# Of a loss without an updater, and of tensordict while it is compiled.
OTHERS_WARNINGS = pytest.mark.filterwarnings(
    "ignore:No target network updater:UserWarning",
    "ignore:torch._dynamo.config.inline_inbuilt:FutureWarning",
    "ignore:Using lock_:UserWarning",
)
CHECKS = {"eager": eager, "compile": compile_, "vmap": vmap, "CUDA graph": graph, "export": export}


def cell(use: str, column: str) -> str:
    return EXCEPT.get((use, column), "not run yet" if column == "CUDA graph" else "yes")


@pytest.mark.parametrize("column", [c for c in COLUMNS if c != "CUDA graph"])
@pytest.mark.parametrize("use", USES)
@OTHERS_WARNINGS
def test_cell(use, column):
    made = USES[use](torch.device("cpu"))
    if cell(use, column).startswith("no"):
        with pytest.raises(Exception):  # noqa: B017 - whatever stands in the way
            CHECKS[column](made)
    else:
        CHECKS[column](made)


def test_the_page_has_this_table():
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    lines += [f"| {use} | {' | '.join(cell(use, column) for column in COLUMNS)} |" for use in USES]
    assert "\n".join(lines) in (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")


@pytest.mark.gpu
@pytest.mark.parametrize("use", USES)
@OTHERS_WARNINGS
def test_cuda_graph(use):
    graph(USES[use](torch.device("cuda")))
