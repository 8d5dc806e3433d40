"""The Hub's kernel: assembled here, loaded from its folder by the `kernels` client, beside fastflow and without it.

The client is loaded in processes that do not start in the checkout, whose folder kernels/ would be taken for it.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastflow
from fastflow import hub
from fastflow.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {"torch", "triton"}

# Loads the folder argv[1] as `kernel`, by the client or as the client does.
BY_CLIENT = """
import pathlib, sys, torch
from kernels import get_local_kernel, get_loaded_kernels
kernel = get_local_kernel(pathlib.Path(sys.argv[1]))
assert get_loaded_kernels()[-1].metadata.id == kernel.__name__
"""
BY_PATH = """
import importlib.util, json, pathlib, sys, torch
root = pathlib.Path(sys.argv[1]) / "build" / f"torch-{'cuda' if torch.cuda.is_available() else 'cpu'}"
name = json.loads((root / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, root / "__init__.py")
kernel = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
"""
# What the operators give, through the functions and the modules, with gradients.
USE = """
def use(package, device="cpu", **options):
    torch.manual_seed(0)
    field = package.VelocityField(package.FieldSpec(2, 3, (32, 32), 2, norm="layer"), device)
    rows = [torch.randn(8, width, device=device) for width in (2, 2, 3)]
    x_1 = package.integrate(field, rows[0], rows[2], num_steps=4, **options)
    t = torch.rand(8, device=device)
    loss = package.flow_matching_loss(field, *rows[:2], t, rows[2], **options)
    loss.backward()
    return [x_1, loss, *(p.grad for p in field.parameters())]
"""
ALONE = """
assert not [m for m in sys.modules if m.partition(".")[0] in ("fastflow", "gymnasium", "tyro")]
assert len(use(kernel)) > 4
policy = kernel.FlowPolicy(7, 2, hidden=(16, 16))
frozen, inputs = policy.freeze(), (torch.randn(3, 7), torch.randn(3, 2))
assert torch.equal(frozen(*inputs), policy(*inputs))
assert not hasattr(torch.ops.fastflow, "integrate")
assert not [m for m in sys.modules if m.partition(".")[0] == "fastflow"]
"""
BESIDE = """
import fastflow
for found, expected in zip(use(kernel), use(fastflow), strict=True):
    assert torch.equal(found, expected)
assert kernel.VelocityField is not fastflow.VelocityField
assert getattr(torch.ops, kernel.__name__).integrate is not torch.ops.fastflow.integrate

class Walk(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.field = kernel.VelocityField(kernel.FieldSpec(2, 3, (32, 32)))

    def forward(self, x_0, cond):
        return kernel.integrate(self.field, x_0, cond, num_steps=4)

inputs = torch.randn(4, 2), torch.randn(4, 3)
program = torch.export.export(Walk(), inputs)
(name,) = [str(n.target) for n in program.graph.nodes if "integrate" in str(n.target)]
assert name == f"{kernel.__name__}.integrate.default", name
"""
# Another version in the same process.
TWICE = """
first = kernel
sys.argv[1] = sys.argv[2]
exec(load)
assert kernel.__name__ != first.__name__
for found, expected in zip(use(kernel), use(first), strict=True):
    assert torch.equal(found, expected)
"""
INTERPRETED = """
for found, expected in zip(use(kernel, backend="fused"), use(kernel, backend="reference"), strict=True):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
assert f"{kernel.__name__}.kernels.integrate" in sys.modules
"""
ON_CUDA = """
for found, expected in zip(use(kernel, "cuda", backend="fused"), use(kernel, "cuda", backend="reference"), strict=True):
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """The assembled folder."""
    return hub.assemble(tmp_path_factory.mktemp("hub") / "fastflow")


def has_client() -> bool:
    """Whether the client is installed; the checkout's folder kernels/, which may stand in its way, is not it."""
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    return importlib.machinery.PathFinder.find_spec("kernels", elsewhere) is not None


@pytest.fixture
def run(tmp_path, plain_environment):
    """Run code in a process outside the checkout that cannot reach the network."""

    def run(code: str, *arguments: Path, **environment: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=tmp_path,
            env={**plain_environment, "HF_HUB_OFFLINE": "1", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr

    return run


def imports_of(path: Path) -> set[str]:
    """The top-level packages that a module names, relative imports left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names)


def test_the_kernels_folder_needs_torch_and_triton_alone():
    paths = list((ROOT / "kernels").rglob("*.py"))
    assert len(paths) > 10
    for path in paths:
        assert imports_of(path) <= ALLOWED, path


def test_the_package_needs_torch_and_triton_alone(kernel):
    for backend in hub.BACKENDS:
        root = kernel / "build" / f"torch-{backend}"
        paths = list(root.rglob("*.py"))
        assert {path.stem for path in paths} >= {*hub.MODULES, "integrate", "matching", "plan"}
        for path in paths:
            assert imports_of(path) <= ALLOWED, path
            # Names of modules in text would escape the search above.
            assert not re.search(r"import_module\(\"fastflow|^\s*(from|import) fastflow", path.read_text(), re.M), path
        assert {path.name for path in root.rglob("*.[ch]*")} >= {"operators.cpp", "network.h"}
        assert not list(root.rglob("aot.py"))


def test_metadata_and_identifiers(kernel):
    ids = set()
    for backend in hub.BACKENDS:
        metadata = json.loads((kernel / "build" / f"torch-{backend}" / "metadata.json").read_text())
        assert metadata["name"] == "fastflow"
        assert metadata["backend"] == {"type": backend}
        assert re.fullmatch(rf"_fastflow_{backend}_[0-9a-f]{{10}}", metadata["id"])
        ids.add(metadata["id"])
    assert len(ids) == 2
    assert (kernel / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert fastflow.__version__ in (kernel / "README.md").read_text()


def test_the_same_sources_give_the_same_identifier(kernel, tmp_path):
    again = hub.assemble(tmp_path / "again")
    files = sorted(path.relative_to(kernel) for path in kernel.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((kernel / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_an_existing_folder_and_a_missing_one_are_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="exists already"):
        hub.assemble(tmp_path)
    assert hub.main([str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"cannot write \(No such file or directory\); nothing was written"):
        hub.assemble(tmp_path / "no" / "such")
    assert os.listdir(tmp_path) == []


def test_the_command_prints_the_folder(tmp_path, capsys):
    assert hub.main([str(tmp_path / "fastflow")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "fastflow")
    assert (tmp_path / "fastflow" / "build" / "torch-cpu" / "__init__.py").is_file()


def test_without_fastflow(kernel, run):
    run(BY_PATH + USE + ALONE, kernel)


@pytest.mark.skipif(not has_client(), reason="needs the kernels client: pip install 'fastflow[hub]'")
def test_the_client_loads_it_beside_fastflow_and_another_version(kernel, run, tmp_path):
    other = hub.assemble(tmp_path / "other")
    for backend in hub.BACKENDS:
        path = other / "build" / f"torch-{backend}" / "metadata.json"
        path.write_text(re.sub(r"(_[0-9a-f]{9})[0-9a-f]\"", r'\1x"', path.read_text()))
    run(BY_CLIENT + USE + BESIDE + f"load = {BY_CLIENT!r}\n" + TWICE, kernel, other)


@pytest.mark.interpreter
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_its_triton_kernels(kernel, run):
    run(BY_PATH + USE + INTERPRETED, kernel, TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_on_cuda(kernel, run):
    run(BY_PATH + USE + ON_CUDA, kernel)
