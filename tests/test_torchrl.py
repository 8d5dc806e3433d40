"""Flow critics and policies in TorchRL's losses: one optimisation step each, by vmap and by the native axis alike."""

from __future__ import annotations

import copy
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastflow as ff
from fastflow.errors import MissingExtra

pytest.importorskip("torchrl", reason='needs torchrl: pip install "fastflow[torchrl]"')

from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded
from torchrl.envs import ExplorationType, set_exploration_type
from torchrl.modules import Actor, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import DDPGLoss, IQLLoss, SACLoss, SoftUpdate, TD3Loss

import fastflow.torchrl as flow

ROOT = Path(__file__).resolve().parents[1]
OBS, ACTION, BATCH = 4, 2, 6
KEYS = ["observation", "action"]
SPEC = Bounded(-torch.ones(ACTION), torch.ones(ACTION), (ACTION,))
# Losses warn as long as no updater goes with their target parameters.
pytestmark = pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")


def critic(ensemble=None, **options):
    options = dict(hidden=(16, 16), num_steps=3, num_samples=2, value_range=(-10.0, 10.0)) | options
    return ff.FlowCritic(OBS, options.pop("action_dim", ACTION), ensemble=ensemble, **options)


def qvalue(ensemble=None, **options):
    return ValueOperator(critic(ensemble, **options), in_keys=KEYS)


def gaussian():
    network = nn.Sequential(nn.Linear(OBS, 2 * ACTION), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=SPEC,
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def flow_actor():
    return Actor(ff.FlowPolicy(OBS, ACTION, hidden=(16,), num_steps=3), in_keys=["observation", "noise"], spec=SPEC)


def state_value():
    return ValueOperator(critic(action_dim=0), in_keys=["observation"])


def batch(*lead):
    lead = lead or (BATCH,)
    following = dict(
        observation=torch.randn(*lead, OBS),
        reward=torch.randn(*lead, 1),
        done=torch.zeros(*lead, 1, dtype=torch.bool),
        terminated=torch.rand(*lead, 1) < 0.3,
    )
    data = dict(observation=torch.randn(*lead, OBS), action=2 * torch.rand(*lead, ACTION) - 1, next=following)
    return TensorDict(data, lead)


def total(out):
    return sum(value for name, value in out.items() if name.startswith("loss_"))


def gradients(loss, data, seed=1):
    torch.manual_seed(seed)
    loss.zero_grad()
    total(loss(data.clone())).backward()
    return {name: p.grad for name, p in loss.named_parameters() if p.grad is not None}


LOSSES = {
    "sac": lambda: SACLoss(gaussian(), qvalue(), num_qvalue_nets=2, action_spec=SPEC),
    "sac, native axis": lambda: flow.FlowSACLoss(gaussian(), qvalue(2), num_qvalue_nets=2, action_spec=SPEC),
    "td3": lambda: TD3Loss(flow_actor(), qvalue(), num_qvalue_nets=2, action_spec=SPEC),
    "td3, native axis": lambda: flow.FlowTD3Loss(flow_actor(), qvalue(2), num_qvalue_nets=2, action_spec=SPEC),
    "iql": lambda: IQLLoss(gaussian(), qvalue(), state_value(), num_qvalue_nets=2),
    "iql, native axis": lambda: flow.FlowIQLLoss(gaussian(), qvalue(2), state_value(), num_qvalue_nets=2),
    "ddpg": lambda: DDPGLoss(flow_actor(), qvalue()),
    "flow matching": lambda: flow.FlowMatchingLoss(gaussian(), qvalue(2)),
    "flow matching, one member": lambda: flow.FlowMatchingLoss(flow_actor(), qvalue(), num_samples=3, q_agg="min"),
    "behaviour cloning": lambda: flow.FlowBCLoss(flow_actor()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_one_step_trains_every_network_and_the_target_follows(name):
    loss, data = LOSSES[name](), batch()
    updater = None if name == "behaviour cloning" else SoftUpdate(loss, tau=0.1)
    grads = gradients(loss, data)
    trained = {n: p for n, p in loss.named_parameters() if not (name.startswith("flow m") and n.startswith("actor"))}
    assert grads.keys() == trained.keys()
    for key, grad in grads.items():
        assert grad.isfinite().all(), key
        assert grad.abs().max() > 0, key
    assert any("field.layers" in key for key in grads)
    before = {key: p.detach().clone() for key, p in trained.items()}
    torch.optim.Adam(loss.parameters(), 1e-2).step()
    assert all(not torch.equal(p, before[key]) for key, p in trained.items())
    if updater is not None:
        network = "value_network" if name == "ddpg" else "qvalue_network"
        old = getattr(loss, f"target_{network}_params").clone()
        updater.step()
        online, target = getattr(loss, f"{network}_params"), getattr(loss, f"target_{network}_params")
        expected = old.data.lerp(online.data, torch.tensor(0.1))
        for key, value in target.items(True, True):
            torch.testing.assert_close(value.data, expected[key])
        assert not torch.equal(next(iter(target.values(True, True))), next(iter(old.values(True, True))))


PAIRS = {
    "sac": (SACLoss, flow.FlowSACLoss, lambda: dict(actor_network=gaussian(), action_spec=SPEC)),
    "td3": (TD3Loss, flow.FlowTD3Loss, lambda: dict(actor_network=flow_actor(), action_spec=SPEC)),
    "iql": (IQLLoss, flow.FlowIQLLoss, lambda: dict(actor_network=gaussian(), value_network=state_value())),
}


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("name", PAIRS)
def test_the_native_axis_is_what_vmap_is_at_the_same_parameters(name, members):
    """Losses and gradients; "same" gives vmapped members one noise, as the native axis does."""
    by_vmap, native, others = PAIRS[name]
    q, networks = critic(members), others()
    operators = [ValueOperator(member, in_keys=KEYS) for member in flow.members(q)]
    a = by_vmap(qvalue_network=operators, num_qvalue_nets=members, **copy.deepcopy(networks))
    a.set_vmap_randomness("same")
    b = native(qvalue_network=ValueOperator(q, in_keys=KEYS), num_qvalue_nets=members, **copy.deepcopy(networks))
    data, grads, outputs = batch(), [], []
    for loss in (a, b):
        grads.append(gradients(loss, data))
        torch.manual_seed(1)
        outputs.append(loss(data.clone()).detach())
    assert outputs[0].keys() == outputs[1].keys()
    for key, value in outputs[0].items():
        torch.testing.assert_close(outputs[1][key], value, msg=lambda m, key=key: f"{key}: {m}")
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, atol=1e-5, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def test_stacked_parameters_are_those_of_a_native_ensemble():
    """What vmap trained, one native critic takes, by to_module and by load_state_dict."""
    loss = SACLoss(gaussian(), qvalue(), num_qvalue_nets=2, action_spec=SPEC)
    native, data, noise = qvalue(2), batch(), torch.rand(BATCH, 2)
    with loss.qvalue_network_params.to_module(native):
        swapped = native.module(data["observation"], data["action"], noise)
    assert not torch.equal(swapped, native.module(data["observation"], data["action"], noise))
    weights = loss.qvalue_network_params["module"].flatten_keys(".")
    native.module.load_state_dict({name: p.detach() for name, p in weights.items()})
    q = native.module(data["observation"], data["action"], noise)
    assert torch.equal(swapped, q)
    alone = torch.stack([m(data["observation"], data["action"], noise) for m in flow.members(native.module)])
    torch.testing.assert_close(alone, q)


def test_members_are_copies():
    q = critic(3)
    first, *_ = parts = flow.members(q)
    assert len(parts) == 3
    assert first.field.spec.ensemble is None
    with torch.no_grad():
        first.field.layers[0].weight.add_(1.0)
    assert not torch.equal(first.field.layers[0].weight, q.field.layers[0].weight[0])
    assert q.field.spec.ensemble == 3
    with pytest.raises(ValueError, match="members: critic must be a FlowCritic with an ensemble, got ensemble=None"):
        flow.members(critic())


def test_vmap_draws_a_start_for_each_member():
    loss = SACLoss(gaussian(), qvalue(), num_qvalue_nets=2, action_spec=SPEC)
    assert loss.vmap_randomness == "different"
    with torch.no_grad():
        for p in loss.qvalue_network_params.values(True, True):
            p[1].copy_(p[0])
    q = torch.vmap(
        lambda data, params: _call(loss.qvalue_network, data, params), (None, 0), randomness=loss.vmap_randomness
    )(batch(), loss.qvalue_network_params)
    assert not torch.equal(*q["state_action_value"])


def _call(module, data, params):
    with params.to_module(module, preserve_module_state=False):
        return module(data)


def test_an_actor_takes_its_noise_from_the_key_if_it_is_there():
    actor, data = flow_actor(), batch()
    policy = actor.module
    noise = torch.randn(BATCH, ACTION)
    assert torch.equal(actor(data.clone().set("noise", noise))["action"], policy(data["observation"], noise))
    torch.manual_seed(3)
    drawn = actor(data.clone())["action"]
    torch.manual_seed(3)
    assert torch.equal(drawn, policy(data["observation"]))


# Flow matching ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q_agg", ["mean", "min"])
@pytest.mark.parametrize("ensemble", [None, 2])
@pytest.mark.parametrize("lead", [(5,), (2, 3)])
def test_flow_matching_is_floq_s_loss(ensemble, q_agg, lead):
    """Target, walks and loss written out with the same draws."""
    loss = flow.FlowMatchingLoss(gaussian(), qvalue(ensemble), num_samples=3, q_agg=q_agg)
    loss.make_value_estimator(gamma=0.9)
    with torch.no_grad():
        for p in loss.target_qvalue_network_params.values(True, True):
            p.add_(0.1 * torch.randn_like(p))
    data = batch(*lead)
    torch.manual_seed(5)
    out = loss(data)
    torch.manual_seed(5)
    q, actor = loss.qvalue_network.module, loss.actor_network
    following = TensorDict({"observation": data["next", "observation"].unsqueeze(-2).expand(*lead, 3, OBS)}, (*lead, 3))
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        action = actor(following)["action"]
        weights = {
            n.replace("/", "."): p for n, p in loss.target_qvalue_network_params["module"].flatten_keys("/").items()
        }
        u = torch.rand(*lead, 3, 1)
        z = torch.func.functional_call(q, weights, (following["observation"], action, u))
        if ensemble is not None:
            z = z.mean(0) if q_agg == "mean" else z.amin(0)
        target = data["next", "reward"] + 0.9 * ~data["next", "terminated"] * z.mean(-2)
    torch.testing.assert_close(out["target_value"], target)
    u = torch.rand(*lead, 3)
    rows = q.loss(data["observation"], data["action"], target, u, reduction="none").mean(-1)
    rows = rows if ensemble is None else rows.sum(0)
    torch.testing.assert_close(out["loss_qvalue"], rows.mean())
    torch.testing.assert_close(data["td_error"], rows.detach())


def test_flow_matching_sees_its_target_alone_and_updates_of_it():
    loss, data = flow.FlowMatchingLoss(flow_actor(), qvalue(2)), batch()
    updater = SoftUpdate(loss, tau=0.5)

    def target():
        torch.manual_seed(2)
        return loss.target_value(data)

    before = target()
    with torch.no_grad():
        for p in loss.qvalue_network_params.values(True, True):
            p.add_(0.1)
    assert torch.equal(target(), before)
    updater.step()
    assert not torch.equal(target(), before)


def test_flow_matching_shares_its_parameters_with_a_native_loss():
    actor, q = gaussian(), qvalue(2)
    matching = flow.FlowMatchingLoss(actor, q)
    sac = flow.FlowSACLoss(actor, q, num_qvalue_nets=2, action_spec=SPEC, delay_qvalue=False)
    shared = dict(q.module.field.named_parameters())
    for loss in (matching, sac):
        of_loss = loss.qvalue_network_params["module", "field"].flatten_keys(".")
        assert all(p is shared[name] for name, p in of_loss.items())
    data = batch()
    torch.manual_seed(0)
    before = sac.actor_loss(data)[0]
    matching(data)["loss_qvalue"].backward()
    torch.optim.SGD(q.parameters(), 1.0).step()
    torch.manual_seed(0)
    assert not torch.equal(sac.actor_loss(data)[0], before)


def test_flow_matching_reads_other_keys_weights_and_keyword_arguments():
    data = batch()
    following = data["next"]
    q = ValueOperator(critic(2), in_keys=["obs", "act"])
    policy = Actor(ff.FlowPolicy(OBS, ACTION, hidden=(16,)), in_keys=["obs"], out_keys=["act"])
    loss = flow.FlowMatchingLoss(policy, q, reduction="none")
    loss.set_keys(action="act", reward="r", priority="p", terminated=("end", "terminated"), done=("end", "done"))
    end = following.select("done", "terminated")
    renamed = TensorDict(
        {
            "obs": data["observation"],
            "act": data["action"],
            "next": {"obs": following["observation"], "r": following["reward"], "end": end},
            "priority_weight": torch.zeros(BATCH),
        },
        [BATCH],
    )
    assert all(key in renamed.keys(True) for key in loss.in_keys)
    out = loss(renamed)
    assert torch.equal(out["loss_qvalue"], torch.zeros(BATCH))
    assert (renamed["p"] > 0).all()
    loss = flow.FlowMatchingLoss(gaussian(), qvalue(2))
    assert {*loss.in_keys} == {*KEYS, *(("next", k) for k in ("observation", "reward", "done", "terminated"))}
    loss_qvalue, target = loss(
        observation=data["observation"],
        action=data["action"],
        **{f"next_{key}": value for key, value in following.items()},
    )
    assert loss_qvalue.dim() == 0
    assert target.shape == (BATCH, 1)


@pytest.mark.parametrize("kind", ["td0", "td1", "td_lambda"])
def test_flow_matching_takes_every_value_estimator_of_a_value(kind):
    from torchrl.objectives import ValueEstimators

    loss = flow.FlowMatchingLoss(gaussian(), qvalue(2))
    kinds = dict(td0=ValueEstimators.TD0, td1=ValueEstimators.TD1, td_lambda=ValueEstimators.TDLambda)
    loss.make_value_estimator(kinds[kind], gamma=0.5)
    out = loss(batch(2, 4))
    assert out["target_value"].shape == (2, 4, 1)
    assert out["loss_qvalue"].isfinite()


def test_flow_matching_learns_a_reward():
    """Every row ends, so the walk goes to its reward."""
    loss = flow.FlowMatchingLoss(
        gaussian(), qvalue(2, hidden=(32, 32), num_samples=4, sigma=3.0, value_range=(-3.0, 3.0))
    )
    SoftUpdate(loss, tau=0.1)
    optimizer, data = torch.optim.Adam(loss.parameters(), 1e-2), batch(64)
    data["next", "terminated"] = torch.ones(64, 1, dtype=torch.bool)
    data["next", "reward"] = data["observation"][:, :1].tanh()
    q = loss.qvalue_network.module
    error = []
    for step in range(101):
        if step % 100 == 0:
            with torch.no_grad():
                error.append((q(data["observation"], data["action"]) - data["next", "reward"]).abs().mean())
        optimizer.zero_grad()
        loss(data)["loss_qvalue"].backward()
        optimizer.step()
    assert error[1] < 0.3 < error[0]


def test_behaviour_cloning_is_the_policy_s_loss():
    loss, data = flow.FlowBCLoss(flow_actor(), reduction="none"), batch()
    torch.manual_seed(4)
    out = loss(data)["loss_bc"]
    torch.manual_seed(4)
    policy = loss.actor_network.module
    assert torch.equal(out, policy.loss(data["observation"], data["action"], reduction="none"))
    loss.set_keys(action="expert")
    assert loss.in_keys == ["observation", "expert"]
    assert loss(data.rename_key_("action", "expert"))["loss_bc"].shape == (BATCH,)


# Compiled -----------------------------------------------------------------------------------------------------------


# Not the others: each takes seconds.
@pytest.mark.parametrize("name", ["sac, native axis", "td3", "flow matching", "behaviour cloning"])
# torch 2.13 on tensordict's and TorchRL's own code.
@pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt_nn_modules is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_losses_compile_without_a_break(name):
    torch._dynamo.reset()
    loss, data = LOSSES[name](), batch()
    if "matching" not in name and "cloning" not in name:
        loss.make_value_estimator(gamma=0.9)
    if "sac" in name:
        assert loss.target_entropy is not None  # registered as a buffer when it is first read
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    out = compiled(data.clone())
    total(out).backward()
    grads = {key: p.grad.clone() for key, p in loss.named_parameters() if p.grad is not None}
    expected = gradients(loss, data)
    assert grads.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(grads[key], grad, atol=1e-5, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sac, native axis", "td3, native axis", "flow matching"])
def test_updates_run_as_a_cuda_graph(name, device):
    from tensordict.nn import CudaGraphModule

    torch.set_default_device(device)
    try:
        loss, data = LOSSES[name]().to(device), batch().to(device)
    finally:
        torch.set_default_device("cpu")
    loss.make_value_estimator(gamma=0.9)
    if "sac" in name:
        assert loss.target_entropy is not None
    updater, optimizer = SoftUpdate(loss, tau=0.1), torch.optim.Adam(loss.parameters(), 1e-2, capturable=True)

    def update(data):
        out = loss(data)
        total(out).backward()
        optimizer.step()
        optimizer.zero_grad()
        updater.step()
        return out.detach()

    graph = CudaGraphModule(update)
    seen = []
    for _ in range(8):
        out = graph(data)
        assert total(out).isfinite()
        seen.append(loss.target_qvalue_network_params["module", "field", "layers", "0", "weight"].clone())
    assert all(not torch.equal(a, b) for a, b in zip(seen[:-1], seen[1:]))


# Errors, example, page ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: flow.FlowSACLoss(gaussian(), qvalue(3), num_qvalue_nets=2, action_spec=SPEC),
            ValueError,
            "FlowSACLoss: qvalue_network must be a FlowCritic with ensemble=2, the number of its num_qvalue_nets, got "
            "ensemble=3",
        ),
        (
            lambda: flow.FlowTD3Loss(flow_actor(), qvalue(), action_spec=SPEC),
            ValueError,
            "FlowTD3Loss: qvalue_network must be a FlowCritic with ensemble=2, .* got ensemble=None",
        ),
        (
            lambda: flow.FlowIQLLoss(gaussian(), ValueOperator(nn.Linear(4, 1), in_keys=KEYS), state_value()),
            TypeError,
            "FlowIQLLoss: qvalue_network must be a ValueOperator around a FlowCritic, got ValueOperator around Linear",
        ),
        (
            lambda: flow.FlowSACLoss(gaussian(), qvalue(2), value_network=state_value()),
            ValueError,
            "FlowSACLoss: value_network must be None",
        ),
        (lambda: flow.FlowMatchingLoss(gaussian(), critic(2)), TypeError, "around a FlowCritic, got FlowCritic"),
        (lambda: flow.FlowMatchingLoss(gaussian(), state_value()), ValueError, "with actions, got action_dim=0"),
        (lambda: flow.FlowMatchingLoss(gaussian(), qvalue(), num_samples=0), ValueError, "at least 1, got 0"),
        (lambda: flow.FlowMatchingLoss(gaussian(), qvalue(), q_agg="max"), ValueError, "'mean' or 'min', got 'max'"),
        (lambda: flow.FlowMatchingLoss(gaussian(), qvalue(), reduction="avg"), ValueError, "'none', got 'avg'"),
        (lambda: flow.FlowBCLoss(gaussian()), TypeError, "must hold a FlowPolicy, got ProbabilisticActor"),
        (lambda: flow.FlowBCLoss(flow_actor(), reduction="avg"), ValueError, "'none', got 'avg'"),
    ],
)  # fmt: skip
def test_losses_name_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_without_torchrl_the_extra_is_named(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchrl"]:
        monkeypatch.setitem(sys.modules, name, None)  # an import then raises
    spec = importlib.util.spec_from_file_location("again", flow.__file__)
    with pytest.raises(MissingExtra, match=re.escape('pip install "fastflow[torchrl]"')):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("critic", ["value", "flow-matching"])
def test_the_example_runs(critic, plain_environment, tmp_path):
    pytest.importorskip("gymnasium", reason='needs gymnasium: pip install "fastflow[rl]"')
    command = [sys.executable, ROOT / "docs/examples/torchrl_sac.py", "--steps", "520", "--critic", critic]
    done = subprocess.run(command, cwd=tmp_path, env=plain_environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert -2000 < float(re.fullmatch(r"return=(-\d+)", done.stdout.splitlines()[-1])[1]) < 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_example_says_that_a_graph_needs_a_gpu(plain_environment, tmp_path):
    command = [sys.executable, ROOT / "docs/examples/torchrl_sac.py", "--mode", "cudagraph"]
    done = subprocess.run(command, cwd=tmp_path, env=plain_environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--mode cudagraph needs a CUDA GPU, and torch sees none; use eager or compile" in done.stderr
