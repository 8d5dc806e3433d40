"""Fields from networks that users have: the same function in float64, the same walk in the fused one, and every layer
that does not fit refused by its name."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from conftest import assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastflow as ff

ACTIVATIONS = {
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "mish": nn.Mish,
    "tanh": nn.Tanh,
}
IDENTITY, RAW = ff.Identity(), ff.RawTime()
TIMES = [RAW, ff.Cosine(), ff.CosineFourier(3), ff.PowerFourier(4), ff.Sinusoidal(6, ())]
ORDERS = [("state", "time", "cond"), ("cond", "state", "time"), ("time", "cond", "state"), ("cond", "time", "state")]
SIZES = dict(state_dim=3, cond_dim=4, inputs=("cond", "state", "time"))


def own_field(network, x_t, t, cond, inputs, state=IDENTITY, time=RAW, time_network=None):
    """The network as its owner calls it."""
    t = time.features(t.expand(x_t.shape[:-1]))
    features = {"state": state.features(x_t), "time": t if time_network is None else time_network(t), "cond": cond}
    return network(torch.cat([features[name] for name in inputs], dim=-1))


def randomised(network):
    """With no parameter at its special initial value."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return network


def mlp(inputs=8, hidden=(6, 5), outputs=3, activation=nn.SiLU, norm=None):
    """A stack with LayerNorm "before" the activation, "behind" it, or none."""
    layers = []
    for width in hidden:
        layers.append(nn.Linear(inputs, width))
        layers += [nn.LayerNorm(width)] if norm == "before" else []
        layers.append(activation())
        layers += [nn.LayerNorm(width)] if norm == "behind" else []
        inputs = width
    return randomised(nn.Sequential(*layers, nn.Linear(inputs, outputs)))


@st.composite
def stacks(draw):
    """(networks, what from_sequential is told): every option, layers nested, without bias, affine or effect."""
    state = draw(st.sampled_from([IDENTITY, ff.Scaled(-3.0, 2.0), ff.HLGauss(-3.0, 2.0, 6, 2.0)]))
    state_dim = 1 if isinstance(state, ff.HLGauss) else draw(st.integers(1, 4))
    cond_dim = draw(st.integers(0, 4))
    time = draw(st.sampled_from(TIMES))
    hidden = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    activation = ACTIVATIONS[draw(st.sampled_from(list(ACTIVATIONS)))]
    norm = draw(st.sampled_from([None, "before", "behind"]))
    eps = draw(st.sampled_from([1e-5, 1e-6, 0.1]))
    affine = draw(st.sampled_from([{}, {"bias": False}, {"elementwise_affine": False}]))
    biases = draw(st.lists(st.booleans(), min_size=len(hidden) + 1, max_size=len(hidden) + 1))
    nested = draw(st.booleans())
    members = draw(st.sampled_from([None, 1, 3]))

    def network():
        width = state.width(state_dim) + cond_dim + time.width()
        blocks, shared = [], activation()  # one activation module in many places, as users have it
        for out, bias in zip(hidden, biases):
            block = [nn.Linear(width, out, bias=bias), shared]
            if norm:
                block.insert(1 if norm == "before" else 2, nn.LayerNorm(out, eps, **affine))
            block += [nn.Dropout(0.5), nn.Identity()]
            blocks += [nn.Sequential(*block)] if nested else block
            width = out
        whole = nn.Sequential(*blocks, nn.Linear(width, state_dim, bias=biases[-1]))
        return randomised(whole).double().eval()

    told = dict(
        state_dim=state_dim,
        cond_dim=cond_dim,
        inputs=draw(st.permutations(["state", "time", "cond"])),
        state_embedding=state,
        time_embedding=time,
    )
    return (network() if members is None else [network() for _ in range(members)]), told


def values(networks, told, x_t, t, cond):
    """What the networks give, with an E axis if they are an ensemble."""
    options = (told["inputs"], told["state_embedding"], told["time_embedding"])
    if isinstance(networks, list):
        return torch.stack([own_field(n, x_t, t, cond, *options) for n in networks])
    return own_field(networks, x_t, t, cond, *options)


def points(told, dtype=torch.float64, batch=5):
    x_t, t = torch.randn(batch, told["state_dim"], dtype=dtype), torch.rand(batch, dtype=dtype)
    return x_t, t, torch.randn(batch, told["cond_dim"], dtype=dtype)


def written(field, inputs):
    """The field as its networks: one, or a list if it is an ensemble."""
    if field.spec.ensemble is None:
        return field.to_sequential(inputs)
    return [field.to_sequential(inputs, member=e) for e in range(field.spec.ensemble)]


@settings(max_examples=60)
@given(stacks())
def test_the_field_is_the_network_and_the_way_back_too(case):
    networks, told = case
    field = ff.VelocityField.from_sequential(networks, **told)
    x_t, t, cond = points(told)
    expected = values(networks, told, x_t, t, cond)
    torch.testing.assert_close(field(x_t, t, cond), expected, rtol=1e-12, atol=1e-12)
    assert all(p.requires_grad and p.is_leaf and p.dtype == torch.float64 for p in field.parameters())
    back = written(field, told["inputs"])
    torch.testing.assert_close(values(back, told, x_t, t, cond), expected, rtol=1e-12, atol=1e-12)
    again = ff.VelocityField.from_sequential(back, **told)
    assert again.spec == field.spec
    assert all(torch.equal(a, b) for a, b in zip(again.parameter_list(), field.parameter_list()))


@settings(max_examples=30)
@given(stacks(), st.sampled_from(["", "actor.net."]))
def test_a_state_dict_gives_the_same_field(case, prefix):
    networks, told = case
    expected = ff.VelocityField.from_sequential(networks, **told)
    # A LayerNorm without scale or shift is not in a state_dict, or not to be told from an RMSNorm: written out.
    plain = written(expected, told["inputs"])
    dicts = [n.state_dict(prefix=prefix) for n in (plain if isinstance(plain, list) else [plain])]
    if prefix:
        dicts = [{"critic.0.weight": torch.ones(1), **d} for d in dicts]
    spec = expected.spec
    field = ff.VelocityField.from_state_dict(
        dicts if spec.ensemble else dicts[0],
        activation=spec.activation,
        norm_first=spec.norm_first if spec.norm else None,
        norm_eps=spec.norm_eps,
        prefix=prefix,
        **told,
    )
    assert field.spec == spec
    assert all(torch.equal(a, b) for a, b in zip(field.parameter_list(), expected.parameter_list()))


@pytest.mark.parametrize("members", [None, 2])
@pytest.mark.parametrize("norm", [None, "before", "behind"])
@pytest.mark.parametrize("inputs", ORDERS)
def test_the_fused_walk_is_the_owner_s_euler_loop(inputs, norm, members):
    networks = [mlp(hidden=(24, 16), norm=norm) for _ in range(members or 1)]
    field = ff.VelocityField.from_sequential(networks if members else networks[0], **(SIZES | {"inputs": inputs}))
    x_0, cond = torch.randn(7, 3), torch.randn(7, 4)

    def loop(network, x, cond):
        for k in range(5):
            t = torch.full(x.shape[:1], k / 5, dtype=x.dtype)
            x = x + own_field(network, x, t, cond, inputs) / 5
        return x

    with torch.no_grad():
        eager = torch.stack([loop(n, x_0, cond) for n in networks])
        exact = torch.stack([loop(copy.deepcopy(n).double(), x_0.double(), cond.double()) for n in networks])
        walked = ff.integrate(field, x_0, cond, num_steps=5, precision="fp32")
        frozen = ff.FrozenWalk(field, num_steps=5, precision="fp32")(x_0, cond)
    for found in (walked, frozen):
        assert_as_accurate("walk", found if members else found[None], eager, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [None, "before", "behind"])
def test_the_fused_walk_on_a_gpu(norm):
    network = mlp(hidden=(64, 32), norm=norm).cuda()
    field = ff.VelocityField.from_sequential(network, **SIZES)
    assert all(p.is_cuda for p in field.parameters())
    x_0, cond = torch.randn(130, 3, device="cuda"), torch.randn(130, 4, device="cuda")
    walks = []
    for n, x, c in ((network, x_0, cond), (copy.deepcopy(network).double(), x_0.double(), cond.double())):
        for k in range(5):
            x = (
                x
                + own_field(n, x, torch.full(x.shape[:1], k / 5, dtype=x.dtype, device="cuda"), c, SIZES["inputs"]) / 5
            )
        walks.append(x.detach())
    found = ff.integrate(field, x_0, cond, num_steps=5, precision="fp32", backend="fused")
    assert_as_accurate("walk", found, *walks)


def test_gradients_are_the_network_s():
    network = mlp(norm="behind").double()
    field = ff.VelocityField.from_sequential(network, **SIZES)
    x_t, t, cond = points(SIZES)
    own_field(network, x_t, t, cond, SIZES["inputs"]).square().sum().backward()
    field(x_t, t, cond).square().sum().backward()
    torch.testing.assert_close(field.layers[1].weight.grad, network[3].weight.grad.mT)
    torch.testing.assert_close(field.layers[0].weight.grad, network[0].weight.grad.mT)
    torch.testing.assert_close(field.norms[1].weight.grad, network[5].weight.grad)


def test_the_weights_are_a_copy():
    network = mlp()
    field = ff.VelocityField.from_sequential(network, **SIZES)
    before = copy.deepcopy(field.state_dict())
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1.0)
    back = field.to_sequential()
    with torch.no_grad():
        for p in back.parameters():
            p.add_(1.0)
    assert all(torch.equal(before[name], value) for name, value in field.state_dict().items())


def test_a_module_list_is_a_stack_and_a_subclass_of_sequential_too():
    class Named(nn.Sequential):
        """A name alone."""

    network = mlp()
    fields = [
        ff.VelocityField.from_sequential(n, **SIZES)
        for n in (network, nn.ModuleList(network), Named(*network), Named(nn.ModuleList(network[:2]), network[2:]))
    ]
    for field in fields[1:]:
        assert all(torch.equal(a, b) for a, b in zip(fields[0].parameter_list(), field.parameter_list()))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("members", [None, 2])
def test_time_s_own_network(members, head):
    """With an activation behind its last layer or, as in most diffusion models, none: then two layers become one."""
    time = ff.Sinusoidal(6, (7, 5))
    told = SIZES | dict(time_embedding=time, inputs=("time", "state", "cond"))

    def pair():
        timer = nn.Sequential(nn.Linear(6, 7), nn.Mish(), nn.Linear(7, 5, bias=False), nn.Mish())
        if head:
            timer.append(nn.Linear(5, 4))
        return mlp(11 if head else 12, activation=nn.Mish).double(), randomised(timer).double()

    pairs = [pair() for _ in range(members or 1)]
    networks, timers = map(list, zip(*pairs))
    if members is None:
        field = ff.VelocityField.from_sequential(networks[0], time_network=timers[0], **told)
    else:
        field = ff.VelocityField.from_sequential(networks, time_network=timers, **told)
    x_t, t, cond = points(SIZES)
    own = [own_field(n, x_t, t, cond, told["inputs"], time=time, time_network=m) for n, m in pairs]
    expected = own[0] if members is None else torch.stack(own)
    torch.testing.assert_close(field(x_t, t, cond), expected, rtol=1e-12, atol=1e-12)
    holders = [nn.ModuleDict({"net": n, "time": m}).state_dict() for n, m in pairs]
    again = ff.VelocityField.from_state_dict(
        holders if members else holders[0], prefix="net.", time_prefix="time.", activation="mish", **told
    )
    assert again.spec == field.spec
    assert all(torch.equal(a, b) for a, b in zip(again.parameter_list(), field.parameter_list()))
    with pytest.raises(ValueError, match=r"to_sequential: the MLP that Sinusoidal\(.* has of its own"):
        field.to_sequential()


def test_the_sinusoids_of_diffusion_models():
    """Sines before cosines, and frequencies whose last is 1 / 10,000."""
    half = 4
    frequencies = 10_000 ** (-torch.arange(half, dtype=torch.float64) / (half - 1))
    network = mlp(3 + 2 * half + 4).double()
    x_t, t, cond = points(SIZES)
    angles = 100 * t[:, None] * frequencies
    expected = network(torch.cat([cond, x_t, angles.sin(), angles.cos()], -1))
    with torch.no_grad():
        network[0].weight[:, 7:] = network[0].weight[:, 7:].roll(half, 1)
    time = ff.Sinusoidal(2 * half, (), max_period=10_000 ** (half / (half - 1)), scale=100)
    field = ff.VelocityField.from_sequential(network, time_embedding=time, **SIZES)
    torch.testing.assert_close(field(x_t, t, cond), expected)


def test_layers_that_are_registered_apart_are_read_in_order():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 3)])
            self.ln = nn.ModuleList([nn.LayerNorm(6), nn.LayerNorm(5)])

        def forward(self, x):
            for linear, norm in zip(self.fc, self.ln):
                x = norm(linear(x).relu())
            return self.fc[-1](x)

    network = randomised(Net()).double()
    field = ff.VelocityField.from_state_dict(network.state_dict(), activation="relu", norm_first=False, **SIZES)
    x_t, t, cond = points(SIZES)
    torch.testing.assert_close(field(x_t, t, cond), own_field(network, x_t, t, cond, SIZES["inputs"]))


@pytest.mark.parametrize("prediction", ["velocity", "endpoint", "noise"])
def test_scale_and_prediction_are_the_spec_s(prediction):
    network = mlp().double()
    field = ff.VelocityField.from_sequential(network, output_scale=0.25, prediction=prediction, **SIZES)
    x_t, t, cond = points(SIZES)
    out, t_ = 0.25 * own_field(network, x_t, t, cond, SIZES["inputs"]), t[:, None]
    expected = {"velocity": out, "endpoint": (out - x_t) / (1 - t_), "noise": (x_t - out) / t_}[prediction]
    torch.testing.assert_close(field(x_t, t, cond), expected)
    scaled = own_field(field.to_sequential(), x_t, t, cond, SIZES["inputs"])
    torch.testing.assert_close(scaled, out)


def test_a_network_wider_than_the_kernels_is_a_field_of_the_reference():
    network = mlp(hidden=(1100,))
    field = ff.VelocityField.from_sequential(network, **SIZES)
    x_0, cond = torch.randn(2, 3), torch.randn(2, 4)
    found = ff.integrate(field, x_0, cond, num_steps=1, backend="reference")
    torch.testing.assert_close(found, x_0 + own_field(network, x_0, torch.zeros(2), cond, SIZES["inputs"]))


def test_a_policy_and_a_critic_of_a_field():
    network, obs = mlp(8, outputs=3), torch.randn(2, 5, 4)
    policy = ff.FlowPolicy.from_field(ff.VelocityField.from_sequential(network, **SIZES), num_steps=1, clip=0.5)
    assert (policy.obs_dim, policy.action_dim) == (4, 3)
    noise = torch.randn(2, 5, 3)
    expected = noise + own_field(network, noise, torch.zeros(2, 5), obs, SIZES["inputs"])
    torch.testing.assert_close(policy(obs, noise), expected.clamp(-0.5, 0.5))
    assert policy.freeze()(obs, noise).shape == noise.shape
    critics, told = [mlp(8, outputs=1) for _ in range(2)], dict(state_dim=1, cond_dim=6, inputs=SIZES["inputs"])
    field = ff.VelocityField.from_sequential(critics, **told)
    critic = ff.FlowCritic.from_field(field, 2, value_range=(-10.0, 0.0), noise_range=(-1.0, 0.0), num_steps=1)
    assert (critic.obs_dim, critic.action_dim, critic.noise_range) == (4, 2, (-1.0, 0.0))
    assert critic.field is field and [*critic.parameters()] == [*field.parameters()]
    action, u = torch.randn(2, 5, 2), torch.rand(2, 5, 1)
    z_0, cond = u - 1, torch.cat([obs, action], -1)
    own = torch.stack([z_0 + own_field(n, z_0, torch.zeros(2, 5), cond, told["inputs"]) for n in critics])
    torch.testing.assert_close(critic(obs, action, u), own)
    critic.loss(obs, action, torch.zeros(2, 5)).backward()
    assert field.layers[0].weight.grad is not None
    with pytest.raises(ValueError, match=r"FlowPolicy.from_field: field must have ensemble None, got 2"):
        ff.FlowPolicy.from_field(field)
    with pytest.raises(ValueError, match=r"FlowCritic.from_field: field must have state_dim 1, got 3"):
        ff.FlowCritic.from_field(policy.field, 2, value_range=(-1.0, 0.0))
    with pytest.raises(ValueError, match=r"action_dim must be in \[0, 6\], the field's cond_dim, got 7"):
        ff.FlowCritic.from_field(field, 7, value_range=(-1.0, 0.0))


# Refusals -----------------------------------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Skipping(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def hooked():
    layer = nn.Linear(8, 6)
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


def same_twice():
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(8, 3))


L, N = nn.Linear, nn.LayerNorm
REFUSED = {
    "dropout in training": (
        lambda: nn.Sequential(L(8, 6), nn.Dropout(0.1), nn.ReLU(), L(6, 3)),
        r"layer '1' \(Dropout\(p=0.1, inplace=False\)\) does not fit: a field has no dropout; call eval\(\)",
    ),
    "batch norm": (
        lambda: nn.Sequential(L(8, 6), nn.BatchNorm1d(6), nn.ReLU(), L(6, 3)).eval(),
        r"layer '1' \(BatchNorm1d\(.*\) does not fit: a field has no BatchNorm",
    ),
    "an unknown layer": (
        lambda: nn.Sequential(L(8, 6), nn.Softplus(), L(6, 3)),
        r"layer '1' \(Softplus.* does not fit: Linear, LayerNorm, GELU, SiLU, ReLU, ELU, Mish and Tanh fit",
    ),
    "a convolution inside": (
        lambda: nn.Sequential(nn.Sequential(L(8, 6), nn.ReLU()), nn.Sequential(nn.Conv1d(1, 1, 1)), L(6, 3)),
        r"layer '1.0' \(Conv1d",
    ),
    "a subclass": (lambda: nn.Sequential(Doubled(8, 6), nn.ReLU(), L(6, 3)), r"layer '0' \(Doubled.*a subclass may"),
    "a sequence with a skip": (
        lambda: nn.Sequential(L(8, 6), nn.ReLU(), Skipping(L(6, 6), nn.ReLU()), L(6, 3)),
        r"layer '2' \(Skipping\) does not fit: its forward is not that of nn.Sequential",
    ),
    "a hook": (lambda: nn.Sequential(hooked(), nn.ReLU(), L(6, 3)), r"layer '0' .*its hooks are not copied"),
    "a parametrized weight": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(L(8, 6)), nn.ReLU(), L(6, 3)),
        r"layer '0' .*does not fit: its weight is parametrized; call .*remove_parametrizations first",
    ),
    "a shared layer": (same_twice, r"layer '2' .*it is layer '0' again; the layers of a field share no weights"),
    "no activation": (
        lambda: nn.Sequential(L(8, 6), L(6, 6), nn.ReLU(), L(6, 3)),
        r"layer '1' \(Linear.*no activation stands between it and the Linear before it, layer '0'",
    ),
    "a norm alone": (
        lambda: nn.Sequential(L(8, 6), N(6), L(6, 3)),
        r"layer '2' .*no activation stands between it and the Linear before it, layer '0'",
    ),
    "two activations": (
        lambda: nn.Sequential(L(8, 6), nn.ReLU(), nn.Tanh(), L(6, 3)),
        r"layer '2' \(Tanh\(\)\) does not fit: it is the second activation behind layer '0'",
    ),
    "two norms": (
        lambda: nn.Sequential(L(8, 6), N(6), nn.ReLU(), N(6), L(6, 3)),
        r"layer '3' \(LayerNorm.*it is the second LayerNorm behind layer '0'",
    ),
    "another activation": (
        lambda: nn.Sequential(L(8, 6), nn.ReLU(), L(6, 6), nn.Tanh(), L(6, 3)),
        r"layer '3' \(Tanh\(\)\) does not fit: the first hidden layer's activation is ReLU\(\)",
    ),
    "the other GELU": (
        lambda: nn.Sequential(L(8, 6), nn.GELU(), L(6, 6), nn.GELU("tanh"), L(6, 3)),
        r"layer '3' \(GELU\(approximate='tanh'\)\) does not fit",
    ),
    "ELU with another alpha": (
        lambda: nn.Sequential(L(8, 6), nn.ELU(0.5), L(6, 3)),
        r"layer '1' \(ELU\(alpha=0.5\)\) does not fit: alpha must be 1",
    ),
    "an activation at the end": (
        lambda: nn.Sequential(L(8, 6), nn.ReLU(), L(6, 3), nn.Tanh()),
        r"layer '3' \(Tanh\(\)\) does not fit: it stands behind the last Linear",
    ),
    "a norm of the inputs": (
        lambda: nn.Sequential(N(8), L(8, 6), nn.ReLU(), L(6, 3)),
        r"layer '0' \(LayerNorm.*it stands before the first Linear",
    ),
    "a norm at times": (
        lambda: nn.Sequential(L(8, 6), N(6), nn.ReLU(), L(6, 6), nn.ReLU(), L(6, 3)),
        r"layer '3' \(Linear.*no LayerNorm follows it, but one follows the first Linear",
    ),
    "a norm late": (
        lambda: nn.Sequential(L(8, 6), nn.ReLU(), L(6, 6), N(6), nn.ReLU(), L(6, 3)),
        r"layer '3' \(LayerNorm.*the first hidden layer has no LayerNorm; a field has one in each or none",
    ),
    "a norm in another place": (
        lambda: nn.Sequential(L(8, 6), N(6), nn.ReLU(), L(6, 6), nn.ReLU(), N(6), L(6, 3)),
        r"layer '5' \(LayerNorm.*the first hidden layer's LayerNorm stands before the activation",
    ),
    "another eps": (
        lambda: nn.Sequential(L(8, 6), N(6), nn.ReLU(), L(6, 6), N(6, eps=1e-3), nn.ReLU(), L(6, 3)),
        r"layer '4' \(LayerNorm.*its eps is 0.001, the first LayerNorm's 1e-05",
    ),
    "a norm of two axes": (
        lambda: nn.Sequential(L(8, 6), N((5, 6)), nn.ReLU(), L(6, 3)),
        r"layer '1' \(LayerNorm.*it normalises over 2 axes, a field over the last",
    ),
    "a norm of another width": (
        lambda: nn.Sequential(L(8, 6), N(5, elementwise_affine=False), nn.ReLU(), L(6, 3)),
        r"layer '1' \(LayerNorm.*it normalises 5 units and the layer before it gives 6",
    ),
    "widths that do not meet": (
        lambda: nn.ModuleList([L(8, 6), nn.ReLU(), L(5, 3)]),
        r"layer '2' \(Linear.*it takes 5 inputs and the layer before it gives 6",
    ),
    "another dtype": (
        lambda: nn.Sequential(L(8, 6), nn.ReLU(), L(6, 3).double()),
        r"layer '2' \(Linear.*it is torch.float64 on cpu, the first layer torch.float32 on cpu",
    ),
    "one layer": (lambda: nn.Sequential(L(8, 3)), r"layer '0' .*it is the only Linear; there must be a hidden layer"),
    "no layer": (lambda: nn.Sequential(), r"the network has no Linear"),
    "features too few": (
        lambda: nn.Sequential(L(7, 6), nn.ReLU(), L(6, 3)),
        r"the first Linear must take cond 4 \+ state 3 \+ time 1 = 8 features, got 7",
    ),
    "another output": (
        lambda: nn.Sequential(L(8, 6), nn.ReLU(), L(6, 2)),
        r"the last Linear must give state_dim = 3 outputs, got 2",
    ),
    "members of other widths": (
        lambda: [mlp(), mlp(hidden=(6, 4))],
        r"members must differ in their weights alone; widths: \(8, 6, 5, 3\) and, of member 1, \(8, 6, 4, 3\)",
    ),
    "members of other activations": (
        lambda: [mlp(), mlp(activation=nn.ReLU)],
        r"members must differ .* activation: silu and, of member 1, relu",
    ),
    "members of other norms": (lambda: [mlp(norm="before"), mlp()], r"place of LayerNorm \(norm_first\): True and"),
    "no members": (list, r"an ensemble must have at least one network, got none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=r"^VelocityField.from_sequential: .*" + message):
        ff.VelocityField.from_sequential(make(), **SIZES)


@pytest.mark.parametrize("network", [L(8, 3), [L(8, 6), nn.ReLU(), L(6, 3)], "mlp", mlp])
def test_what_is_no_network_is_refused(network):
    with pytest.raises(TypeError, match=r"network must be an nn.Sequential or nn.ModuleList, got"):
        ff.VelocityField.from_sequential(network, **SIZES)


@pytest.mark.parametrize("inputs", [(), ("state", "time"), ("cond", "state", "state"), ("cond", "state", "t"), "state"])
def test_inputs_name_each_kind_once(inputs):
    with pytest.raises(
        ValueError, match=r"inputs must name 'state', 'time' and 'cond' .*, got " + re.escape(repr(inputs))
    ):
        ff.VelocityField.from_sequential(mlp(), **(SIZES | {"inputs": inputs}))


def test_without_cond_it_need_not_be_named():
    network = mlp(4).double()
    field = ff.VelocityField.from_sequential(network, state_dim=3, cond_dim=0, inputs=("time", "state"))
    x_t, t, _ = points(SIZES)
    torch.testing.assert_close(field(x_t, t), network(torch.cat([t[:, None], x_t], -1)))


def test_a_time_network_that_does_not_fit_is_named():
    told = SIZES | dict(time_embedding=ff.Sinusoidal(6, (5,)))
    good = nn.Sequential(L(6, 5), nn.SiLU())
    for timer, message in (
        (None, r"has an MLP of its own, 1 with this network; got 0 \(time_network, or time_prefix\)"),
        ([good, good], r"1 with this network; got 2"),
        (nn.Sequential(L(6, 5)), r"time_network: layer '0' .*the only Linear; there must be a hidden layer before it"),
        (nn.Sequential(L(6, 5), nn.SiLU(), L(5, 4)), r"must take cond 4 \+ state 3 \+ time 4 = 11 features, got 12"),
        (nn.Sequential(L(6, 5), nn.ReLU()), r"must have the field's activation silu, got relu"),
        (nn.Sequential(L(6, 5), N(5), nn.SiLU()), r"activation silu, got silu and LayerNorm"),
        (nn.Sequential(L(6, 4), nn.SiLU()), r"must have \(in, out\) \[\(6, 5\)\] in .*, got \[\(6, 4\)\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ff.VelocityField.from_sequential(mlp(12), time_network=timer, **told)
    with pytest.raises(ValueError, match=r"a network of time's own fits Sinusoidal with hidden, got RawTime\(\)"):
        ff.VelocityField.from_sequential(mlp(), time_network=good, **SIZES)


def test_a_state_dict_that_does_not_fit_is_named():
    def read(state_dict, **told):
        return ff.VelocityField.from_state_dict(state_dict, **(SIZES | dict(activation="relu") | told))

    plain, normed = mlp().state_dict(), mlp(norm="before").state_dict()
    batch = nn.Sequential(L(8, 6), nn.BatchNorm1d(6), nn.ReLU(), L(6, 3)).state_dict()
    for state_dict, told, message in (
        (batch, {}, r"'1.running_mean' does not fit: a Linear and a LayerNorm have a weight and a bias alone"),
        ({**plain, "5.weight": torch.ones(6)}, {}, r"layer '5' \(weight \[6\]\) does not fit: a Linear has weight"),
        ({**plain, "5.bias": torch.ones(6)}, {}, r"layer '5' \(bias \[6\]\) does not fit"),
        ({**plain, "5.weight": torch.ones(1, 2, 3)}, {}, r"layer '5' \(weight \[1, 2, 3\]\) does not fit"),
        (plain, {"prefix": "net."}, r"no Linear's weight begins with prefix 'net.'; state_dict holds 0.weight, 0.bias"),
        (normed, {}, r"norm_first must say whether the LayerNorms stand before the activation, got None"),
        (plain, {"norm_first": True}, r"norm_first must be None, as there is no LayerNorm, got True"),
        ({k: v for k, v in normed.items() if k[0] != "1"}, {}, r"1 LayerNorms \(4\) for 2 hidden layers"),
        (plain, {"cond_dim": 5}, r"the first Linear must take cond 5 \+ state 3 \+ time 1 = 9 features, got 8"),
        (plain, {"activation": "swish"}, r"activation must be one of .*, got 'swish'"),
        ([], {}, r"an ensemble must have at least one network, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            read(state_dict, **told)
    with pytest.raises(TypeError, match=r"state_dict must map names to tensors, got Sequential"):
        read(mlp())
    with pytest.raises(TypeError, match=r"state_dict\['0.bias'\] must be a Tensor, got list"):
        read({**plain, "0.bias": [0.0]})


def test_a_field_of_another_architecture_is_no_sequence():
    field = ff.VelocityField(ff.FieldSpec(3, 4, (6, 6, 6), architecture=ff.ResidualMLP(2)))
    with pytest.raises(
        ValueError, match=r"to_sequential: architecture must be MLP\(\), .*, got ResidualMLP\(depth=2\)"
    ):
        field.to_sequential()


def test_a_member_that_is_not_there_is_named():
    one = ff.VelocityField.from_sequential(mlp(), **SIZES)
    two = ff.VelocityField.from_sequential([mlp(), mlp()], **SIZES)
    with pytest.raises(ValueError, match=r"to_sequential: member must be None, got 0"):
        one.to_sequential(member=0)
    for member in (None, 2, -1):
        with pytest.raises(ValueError, match=rf"member must be in \[0, 2\), the ensemble, got {member}"):
            two.to_sequential(member=member)
