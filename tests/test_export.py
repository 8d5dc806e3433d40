"""Exported programs and compiled packages: what the module gives, to the last bit, where none of its code is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastflow as ff
from fastflow.errors import UserError
from fastflow.export import export_package, export_program

pytestmark = [
    # torch 2.13: pytree's specs, copied by Inductor.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning"),
]

ROOT = Path(__file__).resolve().parents[1]
RANGE = (-1.0, 1.0)
MODULES = {
    "policy": lambda: ff.FlowPolicy(7, 2, hidden=(16, 16)),
    "policy-heun-bf16": lambda: ff.FlowPolicy(7, 2, hidden=(16, 16), method="heun", precision="bf16"),
    "policy-film": lambda: ff.FlowPolicy(
        7, 2, hidden=(24, 24), architecture=ff.FiLMUNet((12,)), time_embedding=ff.Sinusoidal(8, (12,))
    ),
    "policy-float64": lambda: ff.FlowPolicy(7, 2, hidden=(16, 16), dtype=torch.float64),
    "critic": lambda: ff.FlowCritic(7, 2, value_range=RANGE, hidden=(16, 16)),
    "critic-ensemble-samples": lambda: ff.FlowCritic(
        7, 2, value_range=RANGE, hidden=(16, 16), ensemble=2, num_samples=2
    ),
    "value": lambda: ff.FlowCritic(7, 0, value_range=RANGE, hidden=(16, 16), num_samples=3),
    "one-step": lambda: ff.OneStepPolicy(7, 2, hidden=(16, 16)),
    "q": lambda: ff.ValueNetwork(7, 2, hidden=(16, 16)),
}


def make(name: str) -> nn.Module:
    """The module with weights that an output sees."""
    torch.manual_seed(0)
    module = MODULES[name]()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0.0, 0.3)
    return module


def inputs_of(module: nn.Module, rows: int, device: str = "cpu") -> tuple[torch.Tensor | None, ...]:
    """obs, action (None for a state value) or noise, and a critic's noise."""
    dtype = next(module.parameters()).dtype
    widths = [module.obs_dim, module.action_dim, *([module.num_samples] if isinstance(module, ff.FlowCritic) else [])]
    made = [torch.rand(rows, width, dtype=dtype, device=device) if width else None for width in widths]
    return tuple(made)


def operators_of(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if "fastflow" in str(node.target)]


@pytest.mark.parametrize("name", MODULES)
def test_a_program_is_the_module_for_every_batch(name):
    module = make(name)
    program = export_program(module)
    (operator,) = operators_of(program)
    assert str(operator.target) in ("fastflow.integrate.default", "fastflow.dense_stack.default")
    run = program.module()
    for rows in (1, 2, 3, 7, 200):
        inputs = inputs_of(module, rows)
        with torch.no_grad():
            expected = module(*inputs)
        found = run(*inputs)
        assert torch.equal(found, expected), f"{rows} rows"
        assert not found.requires_grad


@pytest.mark.parametrize("num_steps", [1, 40])
def test_the_walk_is_one_operator_that_keeps_nothing(num_steps):
    program = export_program(make("critic"), num_steps=num_steps)
    (operator,) = operators_of(program)
    arguments = {a.name: value for a, value in zip(operator.target._schema.arguments, operator.args, strict=True)}
    assert arguments["num_steps"] == num_steps
    assert arguments["keep"] is False
    assert len(program.graph.nodes) == len(export_program(make("critic")).graph.nodes)


def test_a_program_owns_its_weights():
    module = make("policy")
    inputs = inputs_of(module, 3)
    with torch.no_grad():
        expected = module(*inputs)
        run = export_program(module).module()
        for p in module.parameters():
            p.add_(1.0)
        assert torch.equal(run(*inputs), expected)
        assert not torch.equal(module(*inputs), expected)
    assert all(p.requires_grad for p in module.parameters())


def test_steps_and_backend_of_a_program():
    module = make("critic-ensemble-samples")
    program = export_program(module, num_steps=3, backend="reference")
    assert not operators_of(program)
    assert module.num_steps == 8
    assert module.backend is None
    inputs = inputs_of(module, 5)
    with torch.no_grad():
        expected = module(*inputs, num_steps=3)
    torch.testing.assert_close(program.module()(*inputs), expected)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            lambda: export_program(make("policy").freeze()),
            TypeError,
            "got FrozenFlowPolicy; export the FlowPolicy that",
        ),
        (lambda: export_program(nn.Linear(2, 2)), TypeError, "must be a FlowPolicy, .* or ValueNetwork, got Linear"),
        (lambda: export_program(make("policy"), num_steps=0), ValueError, "num_steps must be at least 1, got 0"),
        (lambda: export_program(make("policy"), num_steps=2.0), TypeError, "num_steps must be an int, got float"),
        (lambda: export_program(make("q"), num_steps=2), TypeError, "must be None for a ValueNetwork, got 2"),
        (lambda: export_program(make("policy"), backend="onnx"), ValueError, "backend must be one of .*, got 'onnx'"),
        (lambda: export_package(make("policy"), "policy.so"), ValueError, "must end in .pt2, got 'policy.so'"),
        (lambda: export_package(make("policy"), "no/such/policy.pt2"), UserError, "cannot write"),
    ],
)
def test_refuses(given, error, message):
    with pytest.raises(error, match=message):
        given()


def test_a_program_refuses_another_width():
    run = export_program(make("policy")).module()
    with pytest.raises(AssertionError, match=re.escape("obs.size()[1] == 7")):
        run(torch.zeros(2, 6), torch.zeros(2, 2))


def test_a_failed_export_leaves_the_old_package(tmp_path):
    path = tmp_path / "policy.pt2"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="num_steps"):
        export_package(make("policy"), path, num_steps=0)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


# Without fastflow's training code -------------------------------------------------------------------------------------

RUN = """
import sys, torch
folder = sys.argv[1]
cases = torch.load(f"{folder}/cases.pt")
plain = torch.export.load(f"{folder}/plain.pt2").module()
for inputs, expected in cases["policy"]:
    torch.testing.assert_close(plain(*inputs), expected)
assert not [m for m in sys.modules if m.partition(".")[0] == "fastflow"]
import fastflow.ops
package = torch._inductor.aoti_load_package(f"{folder}/policy.pt2")
program = torch.export.load(f"{folder}/critic.pt2").module()
for run, name in ((package, "policy"), (program, "critic")):
    for inputs, expected in cases[name]:
        found = run(*inputs)
        assert torch.equal(found, expected), (name, len(inputs[0]), (found - expected).abs().max())
wrong = [m for m in sys.modules if m.split(".")[0] in ("gymnasium", "ogbench", "mujoco", "tyro", "tensorboard")]
wrong += [m for m in sys.modules if m.startswith(("fastflow.agents", "fastflow.train", "fastflow.modules"))]
assert not wrong, wrong
print(sum(map(len, cases.values())), "equal")
"""


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """A folder with a policy, packaged and unrolled, a critic, and what they should give."""
    folder = tmp_path_factory.mktemp("deployed")
    policy, critic = make("policy"), make("critic-ensemble-samples")
    export_package(policy, folder / "policy.pt2")
    torch.export.save(export_program(critic), folder / "critic.pt2")
    torch.export.save(export_program(policy, backend="reference"), folder / "plain.pt2")
    cases = {}
    for name, module in (("policy", policy), ("critic", critic)):
        given = [inputs_of(module, rows) for rows in (1, 2, 5, 300)]
        with torch.no_grad():
            cases[name] = [(inputs, module(*inputs)) for inputs in given]
    torch.save(cases, folder / "cases.pt")
    return folder


@pytest.mark.slow
def test_a_process_with_the_operators_alone_runs_both(deployed, tmp_path, plain_environment):
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(deployed)],
        cwd=tmp_path,
        env=plain_environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "8 equal"


@pytest.mark.slow
def test_the_package_is_one_file_that_its_folder_s_readers_may_read(deployed):
    assert sorted(os.listdir(deployed)) == ["cases.pt", "critic.pt2", "plain.pt2", "policy.pt2"]
    modes = {name: (deployed / name).stat().st_mode for name in ("policy.pt2", "cases.pt")}
    assert modes["policy.pt2"] == modes["cases.pt"]


def test_the_page_s_example_runs():
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    names: dict = {}
    exec(block, names)
    assert names["action"].shape == (32, 6)
    assert os.listdir(names["folder"]) == ["policy.pt2"]


@pytest.mark.gpu
def test_a_package_on_cuda(tmp_path):
    for name in ("policy", "critic-ensemble-samples"):
        module = make(name).cuda()
        run = torch._inductor.aoti_load_package(str(export_package(module, tmp_path / f"{name}.pt2")))
        for rows in (1, 2, 5, 300):
            inputs = inputs_of(module, rows, "cuda")
            with torch.no_grad():
                assert torch.equal(run(*inputs), module(*inputs)), f"{name}, {rows} rows"


# TorchScript ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["policy", "critic-ensemble-samples", "one-step"])
def test_a_trace_holds_the_operator(name):
    """Eager calls go past the operator; a trace of one that did would hold its uninitialised output."""
    module = make(name)
    with torch.no_grad():
        traced = torch.jit.trace(module, inputs_of(module, 3))
        for rows in (1, 3, 7):
            inputs = inputs_of(module, rows)
            assert torch.equal(traced(*inputs), module(*inputs))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_frozen_copy_refuses_to_be_traced():
    policy = make("policy")
    frozen = policy.freeze()
    with pytest.raises(RuntimeError, match="cannot be traced; trace the module that it was made from"):
        torch.jit.trace(lambda *inputs: frozen(*inputs), inputs_of(policy, 3))
