"""What all agents with FQL's actor do alike: state, acting, noise, waiting for nothing, and bad input."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fql_statement import SMALL, A, O, disturb, equal_states, random_batch
from torch.utils._python_dispatch import TorchDispatchMode

from fastflow import agents
from fastflow.agents.checks import ready_moments
from fastflow.agents.descent import Descent
from fastflow.flops import SIZES
from fastflow.kernels import cpu

# Every agent of the offline task, whatever will be added.
NAMES = [name for name, entry in agents.NAMES.items() if entry.task == ("fastflow.offline", "OfflineTask")]
OWN = {
    "floq": {"block_width": 8, "block_depth": 2, "noise_samples": 2},
    "value-flows": {"critic_flow_steps": 3, "num_samples": 3},
    "fql-iqn": {"num_quantiles": 3},
}
STATISTICS = (torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.5, 3.0]))


def make(name, seed=3, statistics=None, reward_range=(-2.0, 0.0), dtype=torch.float32, **settings):
    config = agents.config_class(name)(**{**SMALL, **OWN.get(name, {}), **settings})
    return agents.make(
        name,
        config,
        obs_dim=O,
        action_dim=A,
        reward_range=reward_range,
        seed=seed,
        observation_statistics=statistics,
        dtype=dtype,
    )


def test_names():
    assert NAMES == ["floq", "fql", "fql-iqn", "value-flows"]
    for name in NAMES:
        assert isinstance(make(name), agents.agent_class(name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [{}, {"lr_decay_steps": 6, "q_agg": "min", "normalize_q_loss": True}])
def test_state_round_trip_continues_bit_for_bit(name, settings):
    agent = make(name, statistics=STATISTICS, **settings)
    for i in range(3):
        agent.update(random_batch(seed=i))
    state = agent.state_dict()
    kept = {key: value.clone() for key, value in state.items()}
    other = make(name, seed=99, statistics=(torch.zeros(O), torch.ones(O)), **settings)
    other.load_state_dict(state)
    assert other.step == 3 and equal_states(state, other.state_dict())
    for i in range(3, 6):
        ours, theirs = agent.update(random_batch(seed=i)), other.update(random_batch(seed=i))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert equal_states(agent.state_dict(), other.state_dict())
    assert equal_states(state, kept)  # a state is a copy
    obs = random_batch()["observations"]
    assert torch.equal(agent.act(obs), other.act(obs))


@pytest.mark.parametrize("name", NAMES)
def test_seed_fixes_weights_and_noise(name):
    before = torch.random.get_rng_state()
    a, b, other, double = make(name), make(name), make(name, seed=4), make(name, dtype=torch.float64)
    batch = random_batch()
    noise = [agent.sample_noise(batch) for agent in (a, b, other)]
    assert torch.equal(before, torch.random.get_rng_state())
    for field in dataclasses.fields(noise[0]):
        drawn = [getattr(n, field.name) for n in noise]
        if drawn[0] is None:
            continue  # drawn for an option
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2]), field.name
    assert equal_states(a.state_dict(), b.state_dict())
    for (key, x), y in zip(a.networks.named_parameters(), double.networks.parameters(), strict=True):
        assert torch.equal(x.double(), y), key


@pytest.mark.parametrize("name", NAMES)
def test_each_network_gets_its_gradient_from_one_loss(name):
    agent = make(name)
    batch = random_batch()
    critic_loss, actor_loss, _ = agent.losses(batch, agent.sample_noise(batch))
    reached = {}
    for loss in (critic_loss, actor_loss):
        for parameter in agent.networks.parameters():
            parameter.grad = None
        loss.backward()
        for child, network in agent.networks.named_children():
            grads = [p.grad is not None for p in network.parameters()]
            assert all(grads) or not any(grads)
            reached.setdefault(child, []).append(all(grads))
    for child, found in reached.items():
        target, actor = child.startswith("target_"), child.startswith("actor_")
        assert found == [not target and not actor, actor], child


needs_native = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=f"no native code: {cpu.why_unavailable()}")


@needs_native
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [{}, {"normalize_q_loss": True, "q_agg": "min", "actor_layer_norm": True}])
def test_an_update_has_the_gradients_of_its_losses(name, settings):
    """What native code differentiates along with the losses, against autograd through plain PyTorch in float64."""
    agents_ = [make(name, dtype=dtype, backend=backend, **settings) for dtype, backend in VERSIONS]
    disturb(agents_[0])
    for agent in agents_[1:]:
        agent.networks.load_state_dict(agents_[0].networks.state_dict())
    batch = random_batch(rows=200)
    noise = agents_[0].sample_noise(batch)
    found = []
    for agent in agents_:
        given = [{key: x.to(agent.dtype) for key, x in some.items() if x is not None} for some in (batch, vars(noise))]
        losses = agent._losses(given[0], type(noise)(**given[1]), direct=agent is agents_[0])
        if agent is agents_[0]:
            assert not losses[1].requires_grad  # the actor's are known
            assert losses[0].requires_grad == (name in ("fql-iqn", "value-flows"))
        loss = losses[0] + losses[1]
        if loss.requires_grad:
            loss.backward()
        grads = {key: p.grad.double() for key, p in agent.networks.trained().items()}
        found.append((grads, {key: value.double() for key, value in losses[2].items()}))
    (mine, told), (eager, _), (exact, expected) = found
    for network in agents_[0].networks.stacks():
        names = [key for key in exact if key.startswith(f"{network}.")]
        a, b, truth = (torch.cat([grads[key].flatten() for key in names]) for grads in (mine, eager, exact))
        error, other, scale = ((x - truth).norm() if x is not truth else truth.norm() for x in (a, b, truth))
        assert error <= 2 * other + 5e-7 * scale, f"{network}: {error / scale:.2e} against {other / scale:.2e}"
    for key, value in expected.items():
        torch.testing.assert_close(told[key], value, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frozen", ["actor_onestep_flow", "actor_bc_flow", "critic"])
def test_what_wants_no_gradient_is_not_trained(name, frozen):
    agent = make(name)
    frozen = "critic_flow" if name == "value-flows" and frozen == "critic" else frozen
    network = getattr(agent.networks, frozen).requires_grad_(False)
    before = {key: value.clone() for key, value in agent.state_dict().items()}
    for _ in range(2):
        agent.update(random_batch())
    assert all(p.grad is None for p in network.parameters())
    for key, value in agent.networks.trained().items():
        assert torch.equal(before[key], value) == key.startswith(f"{frozen}."), key


# Native code, eager PyTorch and the truth.
VERSIONS = [(torch.float32, "auto"), (torch.float32, "reference"), (torch.float64, "reference")]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_a_descent_is_the_optimizers_step(kind):
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(n, 3)) for n in (4, 1, 7)] for _ in range(2))
    optimizers = []
    for parameters in (ours, theirs):
        optimizers.append(kind([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 1e-2}], fused=True))
        ready_moments(optimizers[-1], torch.device("cpu"))
    descent = Descent(optimizers[0])
    for i in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine) if i != 2 or len(mine) > 1 else None  # one that no loss reaches
            other.grad = mine.grad
        if i == 3:  # another state
            optimizers[0].load_state_dict(optimizers[0].state_dict())
            optimizers[0].param_groups[0]["weight_decay"] = optimizers[1].param_groups[0]["weight_decay"] = 0.1
        descent.step()
        optimizers[1].step()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)
            for key, value in optimizers[1].state[other].items():
                assert torch.equal(optimizers[0].state[mine][key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_act_and_validate_change_no_weight(name):
    agent = make(name)
    disturb(agent)
    batch = random_batch()
    agent.update(batch)
    before = agent.state_dict()
    first, second = agent.validate(batch), agent.validate(batch)
    obs = 10 * torch.randn(50, O)
    actions = agent.act(obs, torch.Generator().manual_seed(1))
    assert torch.equal(actions, agent.act(obs, torch.Generator().manual_seed(1)))
    assert equal_states(before, agent.state_dict())
    assert not torch.equal(actions, agent.act(obs))
    assert actions.shape == (50, A) and not actions.requires_grad and actions.abs().max() <= 1
    assert agent.act(obs[:0]).shape == (0, A)
    assert first.keys() >= agent.update(batch).keys()  # validation may measure more
    assert all(torch.equal(first[key], second[key]) for key in first)


class NoSync(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if any(word in name for word in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal.default")):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_update_never_waits_for_the_device(name):
    with pytest.raises(AssertionError, match="waits"), NoSync():
        float(torch.ones(()) + 1)
    agent = make(name, backend="reference", q_agg="min", normalize_q_loss=True, lr_decay_steps=10)
    batch = random_batch()
    with NoSync():
        agent.update(batch)
        agent.update(batch)


@pytest.mark.parametrize("name", NAMES)
def test_bad_input(name):
    owner = agents.agent_class(name).__name__
    agent = make(name)
    before = agent.state_dict()
    for change, error, message in (
        (lambda b: b.pop("masks"), ValueError, f"{owner}: batch must have .* masks missing"),
        (lambda b: b.update(rewards=b["rewards"][:, None]), ValueError, r"rewards must be \[5\], got \[5, 1\]"),
        (lambda b: b.update(observations=b["observations"].double()), TypeError, "observations must be"),
        (lambda b: b.update({k: v[:0] for k, v in b.items()}), ValueError, "at least one row"),
    ):
        batch = random_batch()
        change(batch)
        for call in (agent.update, agent.validate):
            with pytest.raises(error, match=message):
                call(batch)
    with pytest.raises(ValueError, match=r"observations must be \[N, 3\], got \[3\]"):
        agent.act(torch.zeros(O))
    with pytest.raises(ValueError, match=f"{owner}.load_state_dict: missing .*; unexpected nothing"):
        agent.load_state_dict({key: value for key, value in before.items() if "exp_avg_sq" not in key})
    with pytest.raises(ValueError, match="reward_range must be"):
        agent.load_state_dict(make(name, reward_range=(-3.0, 0.0)).state_dict())
    assert equal_states(before, agent.state_dict())
    with pytest.raises(ValueError, match="every std positive"):
        make(name, statistics=(torch.zeros(O), torch.zeros(O)))
    with pytest.raises(ValueError, match="r_min <= r_max"):
        make(name, reward_range=(0.0, -1.0))
    wrong = agents.config_class("fql" if name != "fql" else "fql-iqn")()
    with pytest.raises(TypeError, match=f"{owner}: config must be a {agents.config_class(name).__name__}, got Fql"):
        agents.make(name, wrong, obs_dim=O, action_dim=A, reward_range=(-1.0, 0.0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"lr": 0.0}, ValueError, "lr must be a positive number"),
        ({"alpha": -1.0}, ValueError, "alpha must be at least 0"),
        ({"discount": 1.0}, ValueError, r"discount must be in \[0, 1\)"),
        ({"q_agg": "max"}, ValueError, "q_agg must be one of"),
        ({"flow_steps": 0}, ValueError, "flow_steps must be at least 1"),
        ({"actor_hidden_dims": ()}, ValueError, "actor_hidden_dims must name"),
        ({"backend": "triton"}, ValueError, "backend must be one of"),
    ],
)
def test_config_errors(name, settings, error, message):
    with pytest.raises(error, match=f"{agents.config_class(name).__name__}: {message}"):
        agents.config_class(name)(**settings)


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_a_configuration(name):
    module = agents.module(name)
    for preset, settings in module.PRESETS.items():
        agents.config_class(name)(**settings)
        assert preset in module.LOOP_PRESETS or not preset.startswith("pointmaze")
    assert module.LOOP_PRESETS["pointmaze-arena-demo"]["steps"] == 15_000


@pytest.mark.parametrize(
    "name, preset",
    [
        ("fql", "humanoidmaze-large-navigate"),
        ("fql", "humanoidmaze-large-navigate/resnet-published"),
        ("fql", "cube-single-play/resnet"),
        ("fql", "cube-single-play/ensemble"),
        ("fql-iqn", "antmaze-giant-navigate"),
        ("value-flows", "puzzle-4x4-play"),
        ("value-flows", "antmaze-giant-navigate"),
    ],
)
def test_published_settings_train(name, preset):
    """At full width, on few rows with the shapes of the environment."""
    obs_dim, action_dim = SIZES[preset.partition("/")[0]]
    config = dataclasses.replace(
        agents.config_class(name)(**agents.module(name).PRESETS[preset]), flow_steps=2, precision="bf16"
    )
    agent = agents.make(name, config, obs_dim=obs_dim, action_dim=action_dim, reward_range=(-1.0, 0.0))
    g = torch.Generator().manual_seed(0)
    batch = {
        "observations": torch.randn(4, obs_dim, generator=g),
        "actions": torch.rand(4, action_dim, generator=g) * 2 - 1,
        "next_observations": torch.randn(4, obs_dim, generator=g),
        "rewards": -torch.ones(4),
        "masks": torch.ones(4),
    }
    before = [p.detach().clone() for p in agent.networks.trained().values()]
    for _ in range(2):
        metrics = agent.update(batch)
    assert all(value.isfinite() for value in metrics.values()), metrics
    for old, parameter in zip(before, agent.networks.trained().values(), strict=True):
        assert parameter.isfinite().all() and not torch.equal(old, parameter)
