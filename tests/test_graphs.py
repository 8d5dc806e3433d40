"""Graphed updates against plain ones, bit for bit. Without a GPU a graph is a tape: the operators of a gradient step
with the tensors they were called with, run again on those same tensors. Like a CUDA graph it knows nothing of the host,
so whatever an update reads there that changes, it would miss."""

from __future__ import annotations

import copy
import dataclasses
from unittest import mock

import pytest
import test_floq
import test_forward_backward
import test_fpo
import test_fql_actor
import test_td2_cfm
import torch
from conftest import HAS_GPU, assert_close_rms
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from fastflow import fused, graphs
from fastflow.agents.descent import hold_rates, set_rate
from fastflow.agents.forward_backward import ForwardBackwardAgent
from fastflow.data import KEYS, Dataset
from fastflow.graphs import GraphedUpdate, make_update
from fastflow.kernels import launch
from fastflow.replay import ReplayBuffer

# Of these the host waits for the device, or copies to it from memory that is not pinned.
REFUSED = ("_local_scalar_dense", "item", "nonzero", "equal.default", "masked_select", "_unique", "lift_fresh")


def tensors(tree):
    return [x for x in tree_iter(tree) if isinstance(x, torch.Tensor)]


class Refusing(TorchDispatchMode):
    """Refuses what cannot be captured in a CUDA graph."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        by_mask = "index" in str(func) and any(x.dtype == torch.bool for x in tensors(args[1:]))
        if by_mask or any(word in str(func) for word in REFUSED):
            raise AssertionError(f"{func} cannot be captured")
        devices = {x.device.type for x in tensors((args, kwargs))}
        out = self.run(func, args, kwargs)
        devices |= {x.device.type for x in tensors(out)}
        if len(devices) > 1:
            raise AssertionError(f"{func} cannot be captured: between {devices}")
        return out

    def run(self, func, args, kwargs):
        return func(*args, **kwargs)


class Tape(Refusing):
    """Records operators with their tensors, and runs them again on these."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def run(self, func, args, kwargs):
        out = func(*args, **kwargs)
        if func.namespace != "profiler":
            # Lists may change after the call.
            self.calls.append((func, *tree_map(lambda x: x, (args, kwargs)), out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, before in self.calls:
            out = func(*args, **kwargs)
            for returned, old, new in zip(func._schema.returns, *map(as_returns, (before, out)), strict=True):
                if returned.alias_info is None:  # else it is one of the arguments, or a view of it
                    for a, b in zip(tree_iter(old), tree_iter(new), strict=True):
                        if a is not None:  # a gradient that was not asked for
                            a.detach().copy_(b)


def as_returns(out):
    return () if out is None else out if isinstance(out, tuple) else (out,)


def on_tape(function, generator, warmup):
    for _ in range(warmup):
        function()
    tape = Tape()
    with tape:
        result = function()
    return tape.replay, result


def graphed(agent, *args, **options):
    return GraphedUpdate(agent, *args, capture=on_tape, **options)


# Agents -------------------------------------------------------------------------------------------------------------


def offline(name, **settings):
    def make(**more):
        return test_fql_actor.make(name, **{"backend": "reference", "lr_decay_steps": 4, **settings, **more})

    return make, lambda agent, i: test_floq.random_batch(seed=i)


def td2(**settings):
    def make(**more):
        return test_td2_cfm.make_agent(**{"backend": "reference", "lr_decay_steps": 4, **settings, **more})

    return make, lambda agent, i: test_td2_cfm.random_batch(seed=i)


def forward_backward(**more):
    more.pop("backend", None)
    return ForwardBackwardAgent(dataclasses.replace(test_forward_backward.TINY, **more), 2, 2, seed=1)


def on_policy(name, **settings):
    def make(**more):
        # Five steps of two environments are minibatches of 4, 3 and 3 rows.
        options = {"backend": "reference", "lr_decay_updates": 4, "num_minibatches": 3, **settings, **more}
        return test_fpo.make(name, **options)

    return make, lambda agent, i: test_fpo.rollout(agent, steps=5, seed=i)


CASES = {
    "floq": offline("floq"),
    "floq, min": offline("floq", q_agg="min", normalize_q_loss=True, target_noise=0.1),
    "floq, candidates": offline("floq", num_candidates=2, clip_values=True),
    "floq, frozen features": offline("floq", freeze_features_at=2),
    "floq, returns": offline("floq", critic_target="returns", use_resnets=True, prediction="endpoint"),
    "fql": offline("fql"),
    "fql_iqn": offline("fql-iqn"),
    "value_flows": offline("value-flows"),
    "value_flows, rpg": offline("value-flows", policy_extraction="rpg"),
    "td2_cfm": td2(),
    "td2_cfm, all discounts": td2(gamma_low=0.5, mixture="bernoulli", terminals="absorb", path="curved"),
    "td2_cfm, rollouts": td2(variant="mc-cfm"),
    "td2_cfm, diffusion": td2(variant="td2-dd", ddim_steps=2),
    "fb": (forward_backward, lambda agent, i: test_forward_backward.room(6, seed=i)),
    "fpo": on_policy("fpo"),
    "fpo, regenerated": on_policy("fpo", noise="regenerated", recompute_advantages=True),
    "fpo, per pair": on_policy("fpo", ratio="pair", negative="aspo", entropy_coef=0.1, adaptive_kl=1e-3),
    "fpo, averaged": on_policy("fpo", actor_ema=0.9, normalize_rewards=True, value_clip=0.2, weight_decay=0.1),
    "dppo": on_policy("dppo", normalize_advantages="minibatch"),
    "ppo": on_policy("ppo", target_kl=1e-6, entropy_coef=0.01, max_grad_norm=0.0),
}
every_case = pytest.mark.parametrize("case", CASES)
one_of_a_kind = pytest.mark.parametrize("case", ["floq", "td2_cfm", "fb", "fpo, regenerated"])


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


# Equal in result ----------------------------------------------------------------------------------------------------


@every_case
def test_graphed_updates_are_the_plain_ones(case):
    make, batch = CASES[case]
    plain, agent = make(), make()
    update = graphed(agent)
    for i in range(5):
        given = batch(plain, i)
        assert_same(plain.update(given), update(given))
        assert_same(plain.state_dict(), agent.state_dict())
    # Minibatches have two sizes, and where features freeze other parameters learn.
    assert len(update._graphs) == (2 if hasattr(agent, "num_envs") or "frozen" in case else 1)


@one_of_a_kind
def test_an_example_leaves_no_trace(case):
    make, batch = CASES[case]
    agent = make()
    before = agent.state_dict()
    update = graphed(agent, batch(agent, 0))
    assert_same(before, agent.state_dict())
    made = dict(update._graphs)
    assert made
    plain = make()
    assert_same(plain.update(batch(plain, 1)), update(batch(agent, 1)))
    assert update._graphs == made


@one_of_a_kind
def test_metrics_outlive_the_next_update(case):
    make, batch = CASES[case]
    agent = make()
    update = graphed(agent)
    first = update(batch(agent, 0))
    kept = {name: value.clone() for name, value in first.items()}
    second = update(batch(agent, 1))
    assert_same(first, kept)
    assert all(value.dim() == 0 and not value.requires_grad for value in first.values())
    assert any(not torch.equal(first[name], second[name]) for name in first)


@one_of_a_kind
def test_a_state_goes_on_bit_for_bit(case):
    """In a new agent, whose graph is captured then; and, back in time, in the agent that has its graph already."""
    make, batch = CASES[case]
    agent = make()
    update = graphed(agent)
    for i in range(2):
        update(batch(agent, i))
    state = agent.state_dict()
    given = [batch(agent, i) for i in (2, 3)]
    metrics = [update(each) for each in given]
    after = agent.state_dict()
    other = make(seed=7) if case != "fb" else make()
    other.load_state_dict(state)
    agent.load_state_dict(state)
    for resumed, step in ((other, graphed(other)), (agent, update)):
        for wanted, each in zip(metrics, given, strict=True):
            assert_same(wanted, step(each))
        assert_same(after, resumed.state_dict())


def test_back_to_before_features_froze():
    make, batch = CASES["floq, frozen features"]
    agent = make()
    update = graphed(agent)
    state, given = agent.state_dict(), batch(agent, 0)
    first = [update(given) for _ in range(4)]
    agent.load_state_dict(state)
    for wanted in first:
        assert_same(wanted, update(given))


@one_of_a_kind
def test_other_uses_in_between(case):
    make, batch = CASES[case]
    plain, agent = make(), make()
    update = graphed(agent)
    for i in range(4):
        given = batch(plain, i)
        step = agent.update if i % 2 else update
        assert_same(plain.update(given), step(given))
        for each in (plain, agent):
            if case == "floq":
                each.act(given["observations"])  # draws from the agent's own generator
                each.validate(given)
    assert_same(plain.state_dict(), agent.state_dict())


def test_double_precision():
    plain, agent = (test_floq.make_agent(torch.float64, backend="reference") for _ in range(2))
    update, batch = graphed(agent), test_floq.random_batch(torch.float64)
    for _ in range(3):
        assert_same(plain.update(batch), update(batch))


# What a tape must not miss ------------------------------------------------------------------------------------------


def test_a_rate_that_is_a_number_would_be_captured_as_it_is():
    """That these tests see what a graph would miss."""
    make, batch = CASES["floq"]
    plain, agent = make(), make()
    with mock.patch.object(graphs, "hold_rates"):
        update = graphed(agent)
    for i in range(4):
        plain.update(batch(plain, i))
        update(batch(agent, i))
    before, after = plain.state_dict(), agent.state_dict()
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_rates():
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.Adam([parameter], lr=1e-3, fused=True)
    (group,) = optimizer.param_groups
    set_rate(group, 2e-3)
    assert group["lr"] == 2e-3
    hold_rates(optimizer, torch.device("cpu"))
    held = group["lr"]
    assert held.dtype == torch.float64 and float(held) == 2e-3
    set_rate(group, 3e-3)
    hold_rates(optimizer, torch.device("cpu"))
    assert group["lr"] is held and float(held) == 3e-3


@pytest.mark.parametrize(
    "call",
    [
        lambda x: float(x.sum()),
        lambda x: x[x > 0],
        lambda x: x + torch.tensor(1.0),
        lambda x: x + torch.zeros(3, device="meta"),
    ],
)
def test_what_cannot_be_captured_is_refused(call):
    with pytest.raises((AssertionError, RuntimeError), match=r"cannot be captured|device"), Refusing():
        call(torch.ones(3))


@pytest.mark.skipif(HAS_GPU, reason="pretends that there is a GPU")
@pytest.mark.parametrize(
    "case", ["floq", "floq, min", "floq, candidates", "fql", "fql_iqn", "td2_cfm", "td2_cfm, rollouts"]
)
def test_losses_on_a_gpu_take_nothing_from_the_cpu(case, monkeypatch):
    """With fake tensors of CUDA, so that the kernels' operators are called; without gradients, for which autograd asks
    a real device, and so without the cases that index."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setitem(launch._targets, 0, (90, 132))
    make, batch = CASES[case]
    agent, mode = make(backend="auto"), FakeTensorMode()
    given = {name: on_fake_gpu(x, {}, mode) for name, x in batch(agent, 0).items()}

    def __deepcopy__(self, memo):
        return on_fake_gpu(self, memo, mode)

    monkeypatch.setattr(torch.Tensor, "__deepcopy__", __deepcopy__)
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", __deepcopy__)
    agent = copy.deepcopy(agent, {id(agent.generator): agent.generator})
    agent.device = torch.device("cuda")
    with mode, Refusing(), torch.no_grad():
        *losses, metrics = agent.losses(given, agent.sample_noise(given))
    assert all(x.device.type == "cuda" and x.dim() == 0 for x in (*losses, *metrics.values()))


@pytest.mark.interpreter
@pytest.mark.parametrize("case", ["floq", "td2_cfm", "fpo, regenerated"])
def test_what_surrounds_the_kernels_can_be_captured(case, monkeypatch):
    """What an operator does around its kernels, which a tape does not see. The interpreter runs them."""
    entered = []

    def refusing(name, function):
        def call(*args, **kwargs):
            entered.append(name)
            with Refusing():
                return function(*args, **kwargs)

        return call

    make, batch = CASES[case]
    agent = make(backend="fused", precision="tf32")
    given = batch(agent, 0)
    for name in ("walk", "walk_bwd", "loss", "loss_bwd"):
        monkeypatch.setattr(fused, name, refusing(name, getattr(fused, name)))
    metrics = agent.update(given)
    assert all(value.isfinite() for value in metrics.values())
    assert {"loss", "loss_bwd"} <= set(entered)


def on_fake_gpu(x, memo, mode):
    if id(x) not in memo:
        with mode:
            fake = torch.empty(x.shape, dtype=x.dtype, device="cuda")
            memo[id(x)] = torch.nn.Parameter(fake, x.requires_grad) if isinstance(x, torch.nn.Parameter) else fake
    return memo[id(x)]


def test_batches_are_drawn_without_waiting():
    generator = torch.Generator().manual_seed(0)
    batch = test_floq.random_batch(rows=20)
    data = Dataset("moves", {name: batch[name] for name in KEYS})
    buffer = ReplayBuffer(data, 30)
    balanced = ReplayBuffer(data, 30, balanced=True)
    for each in (buffer, balanced):
        each.add({name: batch[name][0] for name in KEYS})
    with Refusing():
        for source in (data, buffer, balanced):
            assert len(source.sample(6, generator)["rewards"]) == 6


# Shapes and errors --------------------------------------------------------------------------------------------------


def test_a_graph_for_each_shape():
    plain, agent = (test_floq.make_agent(backend="reference") for _ in range(2))
    update = graphed(agent, max_graphs=2)
    for rows in (5, 3, 5, 3):
        batch = test_floq.random_batch(rows=rows)
        assert_same(plain.update(batch), update(batch))
    before = agent.state_dict()
    with pytest.raises(ValueError, match=r"there are 2 already \(max_graphs\); got another, .*'rewards': \[4\]"):
        update(test_floq.random_batch(rows=4))
    assert_same(before, agent.state_dict())
    assert_same(plain.update(batch), update(batch))


def test_a_batch_that_does_not_fit_is_named_and_changes_nothing():
    agent = test_floq.make_agent(backend="reference")
    update, batch = graphed(agent), test_floq.random_batch()
    before = agent.state_dict()
    with pytest.raises(ValueError, match="masks missing"):
        update({name: x for name, x in batch.items() if name != "masks"})
    assert_same(before, agent.state_dict())
    assert not update._graphs


def test_a_failed_capture_leaves_no_trace():
    agent = test_floq.make_agent(backend="reference")
    before = agent.state_dict()

    def failing(function, generator, warmup):
        function()
        raise RuntimeError("not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="capturing"):
        GraphedUpdate(agent, test_floq.random_batch(), capture=failing)
    assert_same(before, agent.state_dict())


def test_arguments_that_cannot_be():
    agent = test_floq.make_agent()
    with pytest.raises(ValueError, match="GraphedUpdate: agent must be on a CUDA device, got one on cpu"):
        GraphedUpdate(agent, test_floq.random_batch())
    with pytest.raises(ValueError, match="agent must be on a CUDA device"):
        make_update(agent, cuda_graph=True)
    with pytest.raises(ValueError, match="warmup must be at least 1, got 0"):
        graphed(agent, warmup=0)
    with pytest.raises(ValueError, match="max_graphs must be at least 1, got 0"):
        graphed(agent, max_graphs=0)


# Compiled losses ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["floq", "fql", "fql_iqn", "td2_cfm"])
def test_compiled_updates_are_the_plain_ones_within_rounding(case, backend):
    make, batch = CASES[case]
    plain, agent = (make(backend=None) for _ in range(2))
    torch._dynamo.reset()
    update = make_update(agent, compile=True, backend=backend)
    try:
        for i in range(3):
            found, wanted = update(batch(agent, i)), plain.update(batch(plain, i))
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                assert_close_rms(name, found[name], value, 1e-4, floor=1e-5)
            torch.compiler.set_stance("fail_on_recompile")  # from the second update on
    finally:
        torch.compiler.set_stance("default")
    before, after = plain.state_dict(), agent.state_dict()
    assert torch.equal(before["generator"], after["generator"]) and agent.step == 3
    for name, value in before.items():
        assert_close_rms(name, after[name].double(), value.double(), 1e-3, floor=1e-5)


@pytest.mark.parametrize("case", ["value_flows", "fb", "fpo", "dppo", "ppo"])
def test_agents_that_are_not_compiled_say_so(case):
    agent = CASES[case][0]()
    with pytest.raises(ValueError, match=f"losses are one function, got a {type(agent).__name__}"):
        make_update(agent, compile=True)


def test_without_either_it_is_the_agents_update():
    agent = test_floq.make_agent()
    assert make_update(agent) == agent.update


# On a GPU -----------------------------------------------------------------------------------------------------------


def moved(agent, device):
    """A new agent on the device, of the same kind, settings and sizes."""
    kind = type(agent)
    if isinstance(agent, ForwardBackwardAgent):
        return kind(agent.config, 2, 2, seed=1, device=device)
    if hasattr(agent, "num_envs"):
        bounds = agent._low.tolist(), agent._high.tolist()
        return kind(agent.config, agent.obs_dim, agent.action_dim, *bounds, agent.num_envs, seed=1, device=device)
    if hasattr(agent, "reward_range"):
        return kind(agent.config, agent.obs_dim, agent.action_dim, agent.reward_range, seed=3, device=device)
    return kind(agent.config, agent.obs_dim, agent.action_dim, seed=1, device=device)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "branched"), [("auto", True), ("auto", False), ("reference", True)])
@every_case
def test_replays_on_a_gpu_are_plain_updates(case, backend, branched, device):
    make, batch = CASES[case]
    here = make(backend=backend)
    plain, agent = moved(here, device), moved(here, device)
    example = {name: x.to(device) for name, x in batch(here, 9).items()}
    update = GraphedUpdate(agent, example, branched=branched)
    assert agent.step == 0
    for i in range(5):
        given = {name: x.to(device) for name, x in batch(here, i).items()}
        wanted, found = plain.update(given), update(given)
        assert wanted.keys() == found.keys()
        assert torch.equal(plain.generator.get_state(), agent.generator.get_state())
        for name, value in wanted.items():
            # Sums by atomics may come in another order.
            assert_close_rms(name, found[name], value, 1e-4, floor=1e-5)
    before, after = plain.state_dict(), agent.state_dict()
    for name, value in before.items():
        assert_close_rms(name, after[name].double(), value.double(), 1e-3, floor=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["floq", "td2_cfm"])
def test_compiled_updates_in_a_graph_on_a_gpu(case, device):
    make, batch = CASES[case]
    here = make(backend="auto")
    plain, agent = moved(here, device), moved(here, device)
    torch._dynamo.reset()
    update = make_update(agent, compile=True, cuda_graph=True)
    for i in range(3):
        given = {name: x.to(device) for name, x in batch(here, i).items()}
        wanted, found = plain.update(given), update(given)
        for name, value in wanted.items():
            assert_close_rms(name, found[name], value, 1e-3, floor=1e-4)
