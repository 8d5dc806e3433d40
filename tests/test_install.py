"""What a user gets after installation, seen from processes that know nothing of the checkout."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import HIDE
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ["gymnasium", "matplotlib", "ogbench", "safetensors", "tensorboard", "tqdm", "tyro"]
USE_EVERYTHING = """
import fastflow
for name in fastflow.__all__:
    getattr(fastflow, name)
"""


@pytest.fixture
def python(tmp_path, plain_environment):
    """Run code in a new process whose working directory is not the checkout; returns what it printed."""

    def run(code: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            cwd=tmp_path,
            env={**plain_environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture
def make(tmp_path, plain_environment):
    """Run make without what an enclosing make hands down; returns the finished process."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    inherited = {
        key: value for key, value in plain_environment.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }

    def run(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", *arguments],
            cwd=cwd,
            env={**inherited, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def test_import_from_another_directory(python):
    printed = python("import fastflow, fastflow.kernels; print(fastflow.__version__)")
    assert printed == importlib.metadata.version("fastflow")


def test_changelog_names_the_version():
    assert f"## [{importlib.metadata.version('fastflow')}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_every_kernel_module_imports_from_another_directory(python):
    python(
        "import importlib, pkgutil, fastflow.kernels\n"
        "for module in pkgutil.walk_packages(fastflow.kernels.__path__, 'fastflow.kernels.'):\n"
        "    importlib.import_module(module.name)"
    )


def test_import_without_triton(python):
    python(HIDE.format(names={"triton"}) + USE_EVERYTHING + "assert 'triton' not in sys.modules")


def test_import_without_extras(python):
    python(HIDE.format(names=EXTRAS) + USE_EVERYTHING)


def test_no_top_level_kernels(python):
    # The Hugging Face Kernel Hub's client has that name and may be installed beside us.
    origin = python("import importlib.util; s = importlib.util.find_spec('kernels'); print(s.origin if s else '')")
    assert not origin.startswith(str(ROOT / "kernels"))


def test_help_does_not_import_torch(python):
    printed = python(
        "import runpy, sys\n"
        "sys.argv = ['fastflow', '--help']\n"
        "try:\n"
        "    runpy.run_module('fastflow', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as exit:\n"
        "    assert not exit.code, exit.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    assert "train" in printed
    assert "collect" in printed


def test_wheel_holds_every_module_and_works(python, tmp_path):
    # Built from a copy, since setuptools leaves build/ and the egg-info where it builds.
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("fastflow", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for path in (*ROOT.glob("*.md"), ROOT / "LICENSE", ROOT / "setup.py", ROOT / "pyproject.toml"):
        shutil.copy(path, source)
    wheels = tmp_path / "wheels"
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert built.returncode == 0, built.stdout + built.stderr

    (wheel,) = wheels.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (top_level,) = (name for name in archive.namelist() if name.endswith("top_level.txt"))
        assert archive.read(top_level).decode().split() == ["fastflow"]
        archive.extractall(tmp_path / "site")
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastflow").rglob("*.py")}
    sources = [path for suffix in ("py", "cpp", "h") for path in (ROOT / "kernels").rglob(f"*.{suffix}")]
    expected |= {"fastflow/" + path.relative_to(ROOT).as_posix() for path in sources}
    assert names == {*expected, "fastflow/py.typed"}
    assert "fastflow/agents/__init__.py" in names

    location = python(
        "import fastflow, fastflow.kernels; print(fastflow.__file__, fastflow.kernels.__file__, sep='\\n')",
        PYTHONPATH=str(tmp_path / "site"),
    )
    assert [Path(line).relative_to(tmp_path / "site").parts[0] for line in location.splitlines()] == ["fastflow"] * 2


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_pin_every_requirement_once(version):
    environment = {"python_version": version, "python_full_version": version + ".0"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = [Requirement(line) for line in lines if not line.startswith("#")]
    pins: dict[str, str] = {}
    for constraint in constraints:
        if constraint.marker is None or constraint.marker.evaluate(environment):
            (specifier,) = constraint.specifier
            assert specifier.operator == "=="
            assert constraint.name not in pins, f"{constraint.name} is pinned twice"
            pins[canonicalize_name(constraint.name)] = specifier.version

    for requirement in map(Requirement, importlib.metadata.requires("fastflow") or []):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in ("", "dev")):
            pin = pins.get(canonicalize_name(requirement.name))
            assert pin is not None, f"{requirement.name} is not in constraints.txt"
            assert requirement.specifier.contains(pin), f"{requirement} does not allow {pin}"


def test_make_gpu_without_cuda_says_so(make):
    done = make("gpu", f"PYTHON={sys.executable}", CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    assert "no CUDA GPU found" in done.stderr
    assert not done.stdout


def test_make_without_a_supported_python_says_so(make, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("setup.py", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    done = make("demo", "PYTHON=python0.0", cwd=tmp_path)
    assert done.returncode != 0
    assert "no Python 3.10 to 3.13 among python0.0" in done.stderr


def test_failed_installation_leaves_no_stamp(make, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "setup.py").write_text("raise SystemExit('broken')")
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    done = make("demo", f"PYTHON={os.path.realpath(sys.executable)}", cwd=tmp_path, PIP_NO_INDEX="1")
    assert done.returncode != 0
    assert (tmp_path / ".venv" / ".created").is_file()
    assert not (tmp_path / ".venv" / ".installed-demo").exists()
