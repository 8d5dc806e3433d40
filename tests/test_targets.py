"""Targets as CleanRL and LeanRL keep them: every update is seen by the next call, and none compiles anything again."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from conftest import assert_close_rms

import fastflow as ff

OBS, ACTION, ROWS, TAU = 4, 2, 5, 0.3


def critic(device, **options):
    sizes = dict(obs_dim=OBS, action_dim=ACTION, hidden=(16, 16), num_steps=3, device=device)
    return ff.FlowCritic.for_rewards(**sizes, reward_range=(-1.0, 0.0), discount=0.9, **options)


def twins(device):
    return critic(device, ensemble=2)


def policy(device):
    return ff.FlowPolicy(OBS, ACTION, hidden=(16, 16), num_steps=3, device=device)


def inputs(network, rows=ROWS):
    """What a call takes, noise included, so that two calls differ by their weights alone."""
    device = next(network.parameters()).device
    obs, action = torch.randn(rows, OBS, device=device), torch.randn(rows, ACTION, device=device)
    return (obs, action) if isinstance(network, ff.FlowPolicy) else (obs, action, torch.rand(rows, 1, device=device))


def followed(network):
    """Another network of its kind, with other weights, for the target to follow."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return other


class ByData:
    """CleanRL: a copy whose `.data` is written in a loop, which no version counter counts."""

    def __init__(self, network):
        self.network, self.target = followed(network), network

    def __call__(self, *args):
        return self.target(*args)

    def parameters(self):
        return dict(self.target.named_parameters())

    def update(self):
        for p, target_p in zip(self.network.parameters(), self.target.parameters()):
            target_p.data.copy_(TAU * p.data + (1 - TAU) * target_p.data)


class ByLerp(ByData):
    """All parameters in one call, in place."""

    def update(self):
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.network.parameters()), TAU)


class ByCopy(ByLerp):
    """Another module after every update."""

    def update(self):
        self.target = copy.deepcopy(self.target)
        super().update()


class ByCall(ByData):
    """Tensors, new ones after every update, that stand in for a module's parameters during the call."""

    def __init__(self, network):
        super().__init__(network)
        self.stand_ins = {name: p.detach().clone() for name, p in network.named_parameters()}

    def __call__(self, *args):
        return torch.func.functional_call(self.network, self.stand_ins, args)

    def parameters(self):
        return self.stand_ins

    def update(self):
        source = dict(self.network.named_parameters())
        self.stand_ins = {name: torch.lerp(p, source[name].detach(), TAU) for name, p in self.stand_ins.items()}


WAYS = {"data": ByData, "lerp": ByLerp, "deepcopy": ByCopy, "functional_call": ByCall}
"""The four ways to update a target."""


@contextlib.contextmanager
def no_recompilation() -> Iterator[None]:
    torch.compiler.set_stance("fail_on_recompile")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


def expected(make, device, parameters, args):
    """The value of a network that was never anything but these parameters."""
    fresh = make(device)
    fresh.load_state_dict(parameters)
    return fresh(*args).detach()


@pytest.mark.parametrize("make", [critic, twins, policy])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_next_call_has_the_new_weights(way, make, device):
    target = way(make(device))
    args, before = inputs(target.network), None
    for _ in range(3):
        value = target(*args)
        assert before is None or not torch.allclose(value, before, atol=1e-3)
        weights = {name: p.detach().clone() for name, p in target.parameters().items()}
        assert torch.equal(value, expected(make, device, weights, args))
        target.update()
        source = dict(target.network.named_parameters())
        for name, p in target.parameters().items():
            torch.testing.assert_close(p, torch.lerp(weights[name], source[name], TAU))
        before = value


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize(
    "make, backend",
    [(twins, "aot_eager"), (policy, "aot_eager"), pytest.param(twins, "inductor", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_no_update_of_a_target_compiles_anything_again(way, make, backend, device):
    target = way(make(device))
    args = inputs(target.network)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: target(*args), fullgraph=True, backend=backend)
    compiled(*args)
    with no_recompilation():
        for _ in range(3):
            target.update()
            value = expected(make, device, target.parameters(), args)
            assert_close_rms("value", compiled(*args).detach(), value, 1e-5)
        # What would be raised if it did.
        with pytest.raises(RuntimeError, match="fail_on_recompile"):
            compiled(*inputs(target.network, ROWS + 1))


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_compiled_critic_loss_bootstraps_from_the_updated_target(way, device):
    """The bootstrapped loss and its gradients in one graph, between updates of the critic and of its target."""
    target = way(twins(device))
    network = target.network
    obs, action, noise = inputs(network)
    t = torch.rand(ROWS, 1, device=device)

    def loss(obs, action, noise, t):
        with torch.no_grad():
            bootstrapped = -1 + 0.9 * target(obs, action, noise).amin(0)
        return network.loss(obs, action, bootstrapped, noise, t)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    compiled(obs, action, noise, t).backward()
    with no_recompilation():
        for _ in range(3):
            optimizer.step()
            target.update()
            results = []
            for function in (compiled, loss):
                optimizer.zero_grad()
                value = function(obs, action, noise, t)
                value.backward()
                results.append([value.detach(), *(p.grad for p in network.parameters())])
            for i, (a, b) in enumerate(zip(*results)):
                assert_close_rms(f"{i}", a, b, 1e-5, floor=1e-7)


class Stacked:
    """LeanRL: two single critics as one TensorDict of parameters, evaluated by vmap through an empty module."""

    def __init__(self, device):
        tensordict = pytest.importorskip("tensordict", reason="tensordict, part of the extra torchrl, is not installed")
        self.critics = [critic(device) for _ in range(2)]
        self.parameters = tensordict.from_modules(*self.critics, as_module=True)
        self.target = self.parameters.data.clone()
        # The flag is guarded, and to_module hands a module back without it.
        self.empty = critic("meta").requires_grad_(False)

    def one(self, parameters, obs, action, noise):
        with parameters.to_module(self.empty):
            return self.empty(obs, action, noise)

    def both(self, parameters, *args):
        return torch.vmap(self.one, (0, None, None, None))(parameters, *args)

    def values_of(self, parameters, args):
        """The same from critics that hold the parameters as their own."""
        return torch.stack([self._alone(parameters[i], args) for i in range(2)])

    def _alone(self, parameters, args):
        alone = critic(args[0].device)
        parameters.data.to_module(alone)
        return alone(*args).detach()


def test_stacked_critics_are_the_critics(device):
    stacked = Stacked(device)
    args = inputs(stacked.critics[0])
    q = stacked.both(stacked.parameters, *args)
    assert q.shape == (2, ROWS, 1)
    assert_close_rms("q", q.detach(), torch.stack([one(*args) for one in stacked.critics]).detach(), 1e-5)
    q.square().mean().backward()
    apart = torch.stack([one(*args) for one in stacked.critics]).square().mean()
    apart.backward()
    for name in ("weight", "bias"):
        grad = torch.stack([one.field.layers[0].get_parameter(name).grad for one in stacked.critics])
        assert_close_rms(name, stacked.parameters["field", "layers", "0", name].grad, grad, 1e-4)
    assert all(p.is_meta for p in stacked.empty.parameters())


def test_noise_drawn_inside_vmap_follows_its_randomness(device):
    stacked = Stacked(device)
    same = stacked.parameters.data[0].expand(2)
    obs, action, _ = inputs(stacked.critics[0])

    def one(parameters):
        with parameters.to_module(stacked.empty):
            return stacked.empty(obs, action)

    q = torch.vmap(one, randomness="same")(same)
    assert torch.equal(q[0], q[1])
    q = torch.vmap(one, randomness="different")(same)
    assert not torch.allclose(q[0], q[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(one)(same)


@pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt_nn_modules is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_stacked_targets_are_followed_without_compiling_again(backend, device):
    stacked = Stacked(device)
    args = inputs(stacked.critics[0])
    with torch.no_grad():
        for p in stacked.parameters.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    torch._dynamo.reset()
    evaluate = stacked.both
    if backend is not None:
        evaluate = torch.compile(evaluate, fullgraph=True, backend=backend)
    before = evaluate(stacked.target, *args)
    with no_recompilation():
        for _ in range(3):
            stacked.target.lerp_(stacked.parameters.data, TAU)
            value = evaluate(stacked.target, *args)
            assert_close_rms("value", value, stacked.values_of(stacked.target, args), 1e-5)
            assert not torch.allclose(value, before, atol=1e-3)
            before = value


@pytest.mark.gpu
@pytest.mark.parametrize("way", [ByData, ByLerp])
def test_a_captured_call_has_the_new_weights(way, device):
    """A CUDA graph reads parameters where they lie: updates in place reach its replays."""
    target = way(twins(device))
    args = inputs(target.network)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            target(*args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        value = target(*args)
    for _ in range(3):
        target.update()
        graph.replay()
        assert torch.equal(value, expected(twins, device, target.parameters(), args))
