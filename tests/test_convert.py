"""Checkpoints of the JAX code become runs whose networks compute what they computed, and runs become files for JAX.

What they computed is said by NumPy (`flax_trees`), which shares no code with fastflow; JAX itself is not needed.
"""

from __future__ import annotations

import json
import pickle
import re
import shlex
import subprocess
import sys

import flax_trees
import numpy as np
import pytest
import torch
from conftest import HIDE
from flax_trees import A, O, checkpoint, flat, mapped, networks

from fastflow import agents
from fastflow.cli import main
from fastflow.flax_layout import read_layout
from fastflow.jax_checkpoint import read_checkpoint
from fastflow.record import Run, load_agent

pytest.importorskip("tyro")
pytest.importorskip("safetensors")

ENV = "cube-double-play-singletask-v0"
REWARDS = ["--r-min", "-2", "--r-max", "0"]


@pytest.fixture
def save(tmp_path):
    """Write a tree as the published code does; returns the path."""

    def write(tree, name="params_7.pkl"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps(tree))
        return path

    return write


@pytest.fixture
def convert(tmp_path):
    """Run the command; returns the agent of the run that it made."""

    def run(path, *arguments, output="run", rewards=True, env=ENV):
        given = ["--output", str(tmp_path / output), "--device", "cpu", *arguments]
        given += REWARDS if rewards else []
        given += ["--env", env] if env else []
        code = main(["convert", str(path), *given])
        assert code == 0
        return load_agent(Run.open(tmp_path / output), device="cpu")[0]

    return run


def rows(seed=0, count=6):
    rng = np.random.default_rng(seed)
    obs = rng.normal(size=(count, O)).astype(np.float32)
    action = rng.uniform(-1, 1, (count, A)).astype(np.float32)
    noise = rng.normal(size=(count, A)).astype(np.float32)
    u = rng.uniform(size=(count, 3)).astype(np.float32)
    return obs, action, noise, u


def close(found, expected):
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def fourier(t):
    return np.cos(np.pi * t * np.arange(1, 65))


# What the networks compute

FLOQ = {
    "as published": ({}, (), {}),
    "shallow, E 3": ({"depth": 1, "width": 24, "members": 3, "critic_members": 1}, (), {}),
    "fourier": ({"features": 50 + 64}, (), {"time": fourier}),
    "raw time": ({}, ("--agent.time-embedding", "raw"), {"time": lambda t: t}),
    "scalar": ({"features": 2}, (), {"bins": None}),
    "scalar, fourier": ({"features": 65}, (), {"bins": None, "time": fourier}),
    "bins": ({"features": 31}, ("--agent.num-bins", "31", "--agent.sigma", "4"), {"bins": 31, "sigma": 4.0}),
    "no norm": ({"norm": False}, (), {}),
    "actor norm": ({"actor_norm": True}, (), {}),
    "settings": (
        {"depth": 3},
        shlex.split("--agent.discount 0.995 --agent.noise-coverage 0.25 --agent.critic-flow-steps 4"),
        {"gamma": 0.995, "coverage": 0.25, "steps": 4},
    ),
    "residual": ({"blocks": 2, "depth": 2}, (), {}),
    "residual, norm first": (
        {"blocks": 2, "depth": 2},
        ("--no-activate-before-layernorm",),
        {"norm_first": True},
    ),
    "residual, one block": ({"blocks": 1, "depth": 3, "features": 114}, (), {"time": fourier}),
}


@pytest.mark.parametrize("case", FLOQ)
def test_floq_computes_what_the_flax_networks_compute(save, convert, case):
    shape, arguments, how = FLOQ[case]
    params = networks("floq", **shape)
    agent = convert(save(checkpoint(params)), *arguments)
    obs, action, noise, u = rows()
    t_obs, t_action, t_noise, t_u = map(torch.from_numpy, (obs, action, noise, u))
    nets = agent.networks
    close(nets.critic(t_obs, t_action).squeeze(-1), flax_trees.value(params, obs, action))
    close(nets.actor_onestep_flow(t_obs, t_noise), flax_trees.one_step_action(params, obs, noise))
    close(nets.actor_bc_flow(t_obs, t_noise), flax_trees.bc_action(params, obs, noise))
    expected = flax_trees.flow_value(params, obs, action, u, r_min=-2, r_max=0, **how)
    close(nets.floq(t_obs, t_action, t_u).squeeze(-1), expected.mean(-1))
    close(agent.flow_paths(t_obs, t_action, t_u)[..., -1], expected)
    target = flax_trees.flow_value(
        {**params, "modules_floq": params["modules_target_floq"]}, obs, action, u, r_min=-2, r_max=0, **how
    )
    close(nets.target_floq(t_obs, t_action, t_u).squeeze(-1), target.mean(-1))


@pytest.mark.parametrize(
    "shape", [{}, {"norm": False, "critic_members": 5, "value_hidden": (8, 8, 8)}, {"blocks": 2, "depth": 3}]
)
def test_fql_computes_what_the_flax_networks_compute(save, convert, shape):
    if "fql" not in agents.NAMES:
        pytest.skip("there is no agent fql")
    params = networks("fql", **shape)
    nets = convert(save(checkpoint(params)), rewards=False).networks
    obs, action, noise, _ = rows()
    t_obs, t_action, t_noise = map(torch.from_numpy, (obs, action, noise))
    close(nets.critic(t_obs, t_action).squeeze(-1), flax_trees.value(params, obs, action))
    target = flax_trees.value({"modules_critic": params["modules_target_critic"]}, obs, action)
    close(nets.target_critic(t_obs, t_action).squeeze(-1), target)
    close(nets.actor_onestep_flow(t_obs, t_noise), flax_trees.one_step_action(params, obs, noise))
    close(nets.actor_bc_flow(t_obs, t_noise), flax_trees.bc_action(params, obs, noise))


def test_every_array_and_adams_state_arrive_unchanged(save, convert, capsys):
    tree = checkpoint(networks("floq"), updates=123)
    agent = convert(save(tree))
    report = capsys.readouterr().out
    network = tree["agent"]["network"]
    layout = read_layout(flat(network["params"]))
    assert (layout.agent, layout.obs_dim, layout.action_dim, layout.features) == ("floq", O, A, 51)
    parameters = dict(agent.networks.named_parameters())
    assert set(layout.names.values()) == set(parameters)
    for flax, value in flat(network["params"]).items():
        own = layout.names[flax]
        assert np.array_equal(parameters[own].detach().numpy(), value)
        assert f"{flax} " in report and own in report
        if not own.startswith("target_"):
            moments = agent.optimizer.state[parameters[own]]
            for theirs, ours in (("mu", "exp_avg"), ("nu", "exp_avg_sq")):
                assert np.array_equal(moments[ours].numpy(), flat(network["opt_state"]["0"][theirs])[flax])
            assert float(moments["step"]) == 123
    assert agent.step == 123 and "after 123 updates" in report


def test_adam_goes_on_as_optax_would(save, convert):
    """One update whose gradients are known: theta - lr m / (sqrt(v) + eps) with the moments corrected for step 8."""
    tree = checkpoint(networks("floq"), updates=7)
    agent = convert(save(tree), "--agent.lr", "0.001")
    network = tree["agent"]["network"]
    layout = read_layout(flat(network["params"]))
    parameters = dict(agent.networks.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 0.01) if parameter.requires_grad else None
    agent.optimizer.step()
    mu, nu = (flat(network["opt_state"]["0"][name]) for name in ("mu", "nu"))
    for flax, theta in flat(network["params"]).items():
        own = layout.names[flax]
        if own.startswith("target_"):
            continue
        m, v = 0.9 * mu[flax] + 0.001, 0.999 * nu[flax] + 0.001 * 1e-4
        step = 1e-3 * (m / (1 - 0.9**8)) / (np.sqrt(v / (1 - 0.999**8)) + 1e-8)
        close(parameters[own], theta - step)


def test_what_jax_saved_is_converted_without_jax(tmp_path, plain_environment):
    jax = pytest.importorskip("jax")
    params = networks("floq")
    path = tmp_path / "params_7.pkl"
    path.write_bytes(pickle.dumps(mapped(jax.numpy.asarray, checkpoint(params))))
    run = tmp_path / "run"
    command = ["convert", str(path), "--env", ENV, *REWARDS, "--output", str(run), "--device", "cpu"]
    code = HIDE.format(names={"jax", "jaxlib", "flax"}) + f"from fastflow.cli import main; sys.exit(main({command!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=plain_environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = dict(load_agent(Run.open(run), device="cpu")[0].networks.named_parameters())
    for flax, own in read_layout(flat(params)).names.items():
        assert np.array_equal(found[own].detach().numpy(), flat(params)[flax])


# Settings


def test_flags_beside_the_checkpoint_are_read(save, convert, tmp_path):
    path = save(checkpoint(networks("floq")))
    given = {"alpha": 30.0, "discount": 0.995, "q_agg": "min", "noise_coverage": 0.25, "block_depth": 2, "tau": 0.01}
    given |= {"agent_name": "floq", "value_hidden_dims": [12, 11], "encoder": None, "ob_dims": [O], "embed_time": True}
    flags = {"env_name": "puzzle-3x3-play-singletask-v0", "seed": 5, "agent": given}
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    agent = convert(path, "--tau", "0.02", env=None)
    config = Run.open(tmp_path / "run").config
    assert (config["env"], config["seed"], config["preset"]) == ("puzzle-3x3-play-singletask-v0", 5, "puzzle-3x3-play")
    found = agent.config
    assert (found.alpha, found.discount, found.q_agg, found.noise_coverage) == (30.0, 0.995, "min", 0.25)
    assert found.tau == 0.02  # flags on the command line win
    assert (found.block_width, found.value_hidden_dims) == (16, (12, 11))
    assert agent.networks.floq.value_range == pytest.approx((-402, 2))

    del flags["agent"]
    (tmp_path / "others.json").write_text(json.dumps(flags))
    agent = convert(path, "--flags", str(tmp_path / "others.json"), env=None, output="other")
    assert agent.config.alpha == 1000.0  # the preset


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"block_depth": 4}, r"block_depth: expected 2, as modules_floq/mlp has it, got 4"),
        ({"agent_name": "fql"}, r"agent_name: expected 'floq', as the checkpoint has its networks, got 'fql'"),
        ({"encoder": "impala"}, r"encoder: expected None.*got impala"),
        ({"alpha": -1.0}, r"flags: .*alpha must be at least 0"),
    ],
)
def test_flags_that_do_not_fit(save, capsys, tmp_path, changes, says):
    path = save(checkpoint(networks("floq")))
    (tmp_path / "flags.json").write_text(json.dumps({"env_name": ENV, "agent": changes}))
    assert_refused(capsys, tmp_path, path, *REWARDS, says=says)


def assert_refused(capsys, tmp_path, path, *arguments, says):
    """Exit code 2, an error that says so, and nothing written."""
    code = main(["convert", str(path), "--output", str(tmp_path / "run"), *arguments])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ")
    assert re.search(says, error), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--env", ENV], r"r_min, r_max: expected the smallest and the largest reward"),
        (["--env", ENV, "--r-min", "-2"], r"r_min, r_max: expected the smallest"),
        (["--env", ENV, "--r-min", "-2", "--r-max", "-1"], r"r_min <= 0 <= r_max.*got -2.0 and -1.0"),
        (["--env", ENV, "--r-min", "nan", "--r-max", "0"], r"expected finite r_min"),
        (REWARDS, r"env: expected the name of the task"),
        (["--env", "cube-dubble-play-singletask-v0", *REWARDS], r"cube-dubble-play"),
        (["--env", ENV, *REWARDS, "--preset", "nothing"], r"preset nothing: unknown"),
        (["--env", ENV, *REWARDS, "--agent.block-depth", "4"], r"block_depth: expected 2, as modules_floq/mlp.* got 4"),
        (["--env", ENV, *REWARDS, "--agent.num-bins", "31"], r"expected 31 inputs besides.*num_bins 31.*got 51"),
        (["--env", ENV, *REWARDS, "--flags", "nowhere.json"], r"nowhere\.json: not a readable JSON file"),
        (["--env", ENV, *REWARDS, "--checkpoint", "7"], r"checkpoint: only where a run becomes a file"),
        (["--env", ENV, *REWARDS, "--seed", "-1"], r"seed: expected an int of at least 0, got -1"),
    ],
)
def test_arguments_that_cannot_be(save, capsys, tmp_path, arguments, says):
    assert_refused(capsys, tmp_path, save(checkpoint(networks("floq"))), *arguments, says=says)


# Another architecture


def changed(path, change):
    """A floq checkpoint whose parameter at `path` is what `change` makes of it, its moments likewise."""
    tree = checkpoint(networks("floq"))
    network = tree["agent"]["network"]
    for group in (network["params"], network["opt_state"]["0"]["mu"], network["opt_state"]["0"]["nu"]):
        *parents, last = path.split("/")
        for name in parents:
            group = group.setdefault(name, {})
        made = change(group.get(last))
        group.pop(last, None)
        if made is not None:
            group[last] = made
    return tree


def other_module(tree_change):
    params = networks("floq")
    tree_change(params)
    return checkpoint(params)


def uneven():
    tree = flax_trees.stack(np.random.default_rng(0), O + A + 51, (8, 6), 1, members=2, norm=True)
    return {"mlp": mapped(np.float32, tree)}


ANOTHER = {
    "value flows": (
        lambda: other_module(lambda p: p.update(modules_critic_flow1=p.pop("modules_floq"))),
        r"networks of the checkpoint: expected .*\(floq\); or .*\(fql\); got .*critic_flow1",
    ),
    "no networks": (lambda: checkpoint({}), r"networks of the checkpoint: .*got none"),
    "no ensemble axis": (
        lambda: changed("modules_critic/value_net/Dense_0/kernel", lambda a: a[0]),
        r"modules_critic/value_net/Dense_0/kernel: expected \[E, in, out\], got \[7, 12\]",
    ),
    "an ensemble of actors": (
        lambda: changed("modules_actor_bc_flow/mlp/Dense_0/kernel", lambda a: a[None]),
        r"modules_actor_bc_flow/mlp/Dense_0/kernel: expected \[in, out\], got \[1, 8, 10\]",
    ),
    "members differ": (
        lambda: changed("modules_floq/mlp/Dense_1/kernel", lambda a: a[:1]),
        r"modules_floq/mlp/Dense_1/kernel: expected shape \[2, 16, 16\], got \[1, 16, 16\]",
    ),
    "inner width": (
        lambda: changed("modules_floq/mlp/Dense_1/kernel", lambda a: a[:, :9]),
        r"modules_floq/mlp/Dense_1/kernel: expected shape \[2, 16, 16\], got \[2, 9, 16\]",
    ),
    "bias": (
        lambda: changed("modules_critic/value_net/Dense_1/bias", lambda a: a[:, :3]),
        r"modules_critic/value_net/Dense_1/bias: expected shape \[2, 11\], got \[2, 3\]",
    ),
    "widths of the flow critic": (
        lambda: other_module(lambda p: p.update(modules_floq=uneven(), modules_target_floq=uneven())),
        r"modules_floq/mlp: expected \(8, 8\) as the widths of its hidden layers, got \(8, 6\)",
    ),
    "a layer is missing": (
        lambda: changed("modules_floq/mlp/Dense_1/bias", lambda a: None),
        r"modules_floq/mlp/Dense_1/bias: expected among the 3 layers",
    ),
    "a norm is missing": (
        lambda: changed("modules_floq/mlp/LayerNorm_1/scale", lambda a: None),
        r"modules_floq/mlp/LayerNorm_1/scale: expected among",
    ),
    "an encoder": (
        lambda: changed("modules_critic/encoder/Conv_0/kernel", lambda a: np.ones((3, 3, 3, 8), np.float32)),
        r"modules_critic/encoder/Conv_0/kernel: expected .* under modules_critic/value_net, got this name too",
    ),
    "a target of another shape": (
        lambda: other_module(lambda p: p.update(modules_target_floq=networks("floq", width=8)["modules_target_floq"])),
        r"modules_target_floq/mlp/Dense_0/kernel: expected shape \[2, 58, 16\], got \[2, 58, 8\]",
    ),
    "actors differ": (
        lambda: other_module(
            lambda p: p.update(modules_actor_bc_flow=networks("floq", actor_hidden=(8,))["modules_actor_bc_flow"])
        ),
        r"modules_actor_bc_flow/mlp/Dense_0/kernel: expected \(10, 9\) hidden layers.*got \(8,\)",
    ),
    "inputs of the critic": (
        lambda: changed("modules_critic/value_net/Dense_0/kernel", lambda a: a[:, :6]),
        r"modules_critic/value_net/Dense_0/kernel: expected 7 inputs \(5 observations, 2 actions\), got 6",
    ),
    "features": (
        lambda: checkpoint(networks("floq", features=77)),
        r"expected 51 inputs besides observation and action .*got 77; name what it was trained with",
    ),
    "dtype": (
        lambda: changed("modules_floq/mlp/Dense_0/kernel", lambda a: a.astype(np.float16)),
        r"modules_floq/mlp/Dense_0/kernel: expected float32, got float16",
    ),
    "not finite": (
        lambda: changed("modules_floq/mlp/Dense_0/bias", lambda a: np.full_like(a, np.nan)),
        r"modules_floq/mlp/Dense_0/bias: expected finite numbers",
    ),
    "not an array": (
        lambda: changed("modules_floq/mlp/Dense_0/bias", lambda a: "zeros"),
        r"modules_floq/mlp/Dense_0/bias: expected an array, got str",
    ),
}


@pytest.mark.parametrize("case", ANOTHER)
def test_another_architecture_is_refused_by_the_entry_s_name(save, capsys, tmp_path, case):
    make, says = ANOTHER[case]
    assert_refused(capsys, tmp_path, save(make()), "--env", ENV, *REWARDS, says=says)


def test_a_residual_critic_that_the_agent_has_not_is_refused(save, capsys, tmp_path):
    params = networks("floq")
    params["modules_critic"]["value_net"] = mapped(
        np.float32, flax_trees.residual(np.random.default_rng(0), O + A, 8, 2, 2, 2)
    )
    says = r"modules_critic/value_net/Dense_0/kernel: expected among the 6 layers"
    assert_refused(capsys, tmp_path, save(checkpoint(params)), "--env", ENV, *REWARDS, says=says)


def adam(change):
    tree = checkpoint(networks("floq"))
    change(tree["agent"]["network"]["opt_state"])
    return tree


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: [1, 2], r"the file: expected a dict with 'agent'.*got list"),
        (lambda: {"model": {}}, r"the file: expected a dict with 'agent'.*got a dict of model"),
        (lambda: {"agent": {"rng": 0}}, r"the file\['agent'\]: expected a dict with 'network'.*got a dict of rng"),
        (lambda: adam(lambda o: o["0"].pop("count")), r"opt_state/0/count: expected the number of updates"),
        (lambda: adam(lambda o: o["0"].update(count=np.float32(3))), r"opt_state/0/count: .* an integer, got 3.0"),
        (lambda: adam(lambda o: o["0"]["mu"].pop("modules_floq")), r"opt_state/0/mu/modules_floq/.*: expected, as"),
        (lambda: adam(lambda o: o.update({"2": {"trace": np.ones(2)}})), r"opt_state/2/trace: expected parameters and"),
        (
            lambda: adam(lambda o: o["0"]["nu"]["modules_floq"]["mlp"]["Dense_0"].update(bias=np.ones(3, np.float32))),
            r"opt_state/0/nu/modules_floq/mlp/Dense_0/bias: expected \[2, 16\] float32, got \[3\] float32",
        ),
        (
            lambda: adam(
                lambda o: o["0"]["mu"]["modules_target_floq"]["mlp"]["Dense_0"].update(
                    bias=np.ones((2, 16), np.float32)
                )
            ),
            r"opt_state/0/mu/modules_target_floq/mlp/Dense_0/bias: expected zeros",
        ),
    ],
)
def test_a_file_without_the_whole_state_is_refused(save, capsys, tmp_path, make, says):
    assert_refused(capsys, tmp_path, save(make()), "--env", ENV, *REWARDS, says=says)


def test_files_that_are_none(capsys, tmp_path):
    for name, data in (("params.pkl", b"not a pickle"), ("weights.npz", b"not an npz"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(data)
        assert_refused(capsys, tmp_path, tmp_path / name, "--env", ENV, *REWARDS, says=rf"{name}: not a")
    assert_refused(capsys, tmp_path, tmp_path / "absent.pkl", "--env", ENV, *REWARDS, says=r"absent\.pkl: cannot read")
    np.savez(tmp_path / "objects.npz", modules_floq=np.array([{}], dtype=object))
    assert_refused(capsys, tmp_path, tmp_path / "objects.npz", "--env", ENV, *REWARDS, says=r"not an npz of arrays")


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["convert", "--help"])
    printed = capsys.readouterr().out
    assert exit.value.code == 0
    assert "fastflow convert" in printed and "--r-min" in printed


def test_an_existing_run_is_kept(save, convert, capsys, tmp_path):
    path = save(checkpoint(networks("floq")))
    convert(path)
    before = (tmp_path / "run" / "config.json").read_bytes()
    assert main(["convert", str(path), "--env", ENV, *REWARDS, "--output", str(tmp_path / "run")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_bytes() == before


# What a converted run can do


@pytest.fixture
def dataset(tmp_path):
    """Random motion in the arena as a transitions file."""
    rng = np.random.default_rng(0)
    observations = rng.uniform(0, 20, (64, 2)).astype(np.float32)
    actions = rng.uniform(-1, 1, (64, 2)).astype(np.float32)
    np.savez(
        tmp_path / "moves.npz",
        observations=observations,
        actions=actions,
        next_observations=observations + 0.2 * actions,
        rewards=-np.ones(64, np.float32),
        masks=np.ones(64, np.float32),
        terminals=np.zeros(64, np.float32),
    )
    return tmp_path / "moves.npz"


def test_training_goes_on_from_a_converted_run(save, convert, dataset, tmp_path, capsys):
    tree = checkpoint(networks("floq", obs_dim=2), updates=7)
    task = "pointmaze-arena-navigate-singletask-v0"
    before = convert(save(tree), "--preset", "none", "--agent.batch-size", "8", env=task)
    run = Run.open(tmp_path / "run")
    loss = before.validate({name: value[:8] for name, value in moves(dataset).items()})["critic/critic_loss"]
    assert torch.isfinite(loss)
    more = ["--steps", "10", "--no-tensorboard", "--eval-interval", "0", "--dataset-path", str(dataset)]
    assert main(["train", "floq", "--resume", str(run.path), *more]) == 0
    assert run.checkpoint_steps() == [7, 10]
    agent, saved = load_agent(Run.open(run.path), device="cpu")
    assert agent.step == 10 and saved.loop["fingerprint"]
    moved = [not torch.equal(a, b) for a, b in zip(before.networks.parameters(), agent.networks.parameters())]
    assert all(moved)
    assert len(run.load_samples()["observations"]) == 64
    capsys.readouterr()
    # From here on the dataset is the run's.
    with np.load(dataset) as file:
        np.savez(dataset, **{**dict(file), "rewards": np.zeros(64, np.float32)})
    assert main(["train", "floq", "--resume", str(run.path), "--steps", "12", *more[2:]]) == 2
    assert "the dataset is not the one" in capsys.readouterr().err


def moves(path):
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files if name != "terminals"}


def test_a_dataset_of_other_sizes_is_refused(save, convert, dataset, tmp_path, capsys):
    convert(save(checkpoint(networks("floq"))), env="pointmaze-arena-navigate-singletask-v0")
    more = ["--eval-interval", "0", "--no-tensorboard", "--dataset-path", str(dataset)]
    assert main(["train", "floq", "--resume", str(tmp_path / "run"), *more]) == 2
    assert "expected a dataset with obs_dim 5, as its networks have it, got 2" in capsys.readouterr().err


def test_a_converted_run_plays(save, convert, tmp_path, capsys):
    pytest.importorskip("ogbench")
    convert(save(checkpoint(networks("floq", obs_dim=2))), env="pointmaze-arena-navigate-singletask-v0")
    assert main(["evaluate", str(tmp_path / "run"), "--episodes", "1", "--envs", "1", "--device", "cpu"]) == 0
    assert Run.open(tmp_path / "run").eval.steps() == [7]
    assert "success" in capsys.readouterr().out


# And back


def unflatten(arrays):
    tree: dict = {}
    for name, value in arrays.items():
        *parents, last = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


@pytest.mark.parametrize("agent", ["floq", "floq residual", "fql", "fql residual"])
def test_there_and_back_bit_for_bit(save, convert, tmp_path, agent):
    name, _, residual = agent.partition(" ")
    if name not in agents.NAMES:
        pytest.skip(f"there is no agent {name}")
    tree = checkpoint(networks(name, **({"blocks": 2, "depth": 2} if residual else {})))
    convert(save(tree), output="first")
    first = tmp_path / "weights.npz"
    assert main(["convert", str(tmp_path / "first"), "--output", str(first)]) == 0
    convert(first, output="second")
    assert main(["convert", str(tmp_path / "second")]) == 0
    with np.load(first) as a, np.load(tmp_path / "second" / "step_00000007.npz") as b:
        network = tree["agent"]["network"]
        expected = flat({"step": np.int32(8), **network["params"], "opt_state": network["opt_state"]})
        assert set(a.files) == set(b.files) == set(expected)
        for key in a.files:
            assert a[key].dtype == b[key].dtype == expected[key].dtype, key
            assert np.array_equal(a[key], b[key]) and np.array_equal(a[key], expected[key]), key
        params = unflatten({key: a[key] for key in a.files if key.startswith("modules_")})
    obs, action, *_ = rows()
    assert np.array_equal(flax_trees.value(params, obs, action), flax_trees.value(network["params"], obs, action))


def test_an_export_does_not_overwrite(save, convert, capsys, tmp_path):
    convert(save(checkpoint(networks("floq"))))
    run = str(tmp_path / "run")
    (tmp_path / "weights.npz").write_bytes(b"mine")
    for arguments, says in (
        (["--output", str(tmp_path / "weights.npz")], "does not exist yet"),
        (["--output", str(tmp_path / "weights.pkl")], "ends in .npz"),
        (["--checkpoint", "3"], "no checkpoint of step 3; it has 7"),
        (["--env", ENV], "env: only where a file becomes a run"),
        (["--agent.alpha", "3"], "--agent.alpha: only where a file becomes a run"),
    ):
        assert main(["convert", run, *arguments]) == 2
        assert says in capsys.readouterr().err
    assert (tmp_path / "weights.npz").read_bytes() == b"mine"
    assert main(["convert", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_a_checkpoint_is_read_without_a_run(save):
    tree = checkpoint(networks("fql"))
    found = read_checkpoint(save(tree))
    assert found.updates == 7
    layout = read_layout(found.parameters)
    assert layout.agent == "fql" and layout.features is None
    assert layout.names["modules_target_critic/value_net/LayerNorm_1/scale"] == "target_critic.network.norms.1.weight"
    assert layout.settings["num_ensembles"] == (2, "modules_critic/value_net/Dense_0/kernel")
