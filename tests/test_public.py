"""The public surface: every name of `fastflow.__all__` is there, documented and typed."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastflow as ff

ROOT = Path(__file__).parents[1]
NAMES = [name for name in ff.__all__ if name != "__version__"]


def public_functions():
    """(what it is called, function): the public functions, and methods of the public classes that are ours."""
    for name in NAMES:
        value = getattr(ff, name)
        if inspect.isfunction(value):
            yield name, value
            continue
        for owner in inspect.getmro(value):
            if not owner.__module__.startswith("fastflow"):
                continue
            for attribute, member in vars(owner).items():
                member = getattr(member, "__func__", getattr(member, "fget", member))
                ours = inspect.isfunction(member) and inspect.getfile(member).startswith(inspect.getfile(owner))
                if ours and not attribute.startswith("_"):
                    yield f"{name}.{attribute}", member


FUNCTIONS = dict(public_functions())


def test_the_list_of_names_is_what_the_package_has():
    assert dir(ff) == sorted(set(ff.__all__))
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?(\.dev\d+)?", ff.__version__)
    with pytest.raises(AttributeError, match="module 'fastflow' has no attribute 'nothing'"):
        ff.nothing  # noqa: B018


def test_type_checkers_see_the_names_that_are_imported_late():
    tree = ast.parse((ROOT / "fastflow" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {(node.module, alias.name) for node in block.body for alias in node.names}
    late = {(f"fastflow.{module}", name) for module, names in ff._MODULES.items() for name in names}
    assert seen == late
    assert {name for _, name in seen} == set(NAMES)


def test_every_name_is_documented():
    # A dataclass without a docstring gets its signature for one.
    bare = [name for name in NAMES if (inspect.getdoc(getattr(ff, name)) or f"{name}(").startswith(f"{name}(")]
    bare += [name for name, function in FUNCTIONS.items() if not function.__doc__ and "extra_repr" not in name]
    assert bare == []


def test_every_argument_and_result_is_typed():
    vague = []
    for name, function in FUNCTIONS.items():
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        kinds = [signature.return_annotation, *(p.annotation for p in parameters)]
        vague += [name] if inspect.Signature.empty in kinds else []
    assert len(FUNCTIONS) > 50 and vague == []


def test_a_type_checker_knows_the_type_of_everything_public(tmp_path, plain_environment):
    """`pyright --verifytypes`, as a user's editor sees an installed fastflow: nothing unknown, nothing ambiguous."""
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("needs the extra types: pyright")
    # An installation in place is a hook of the importer, which no type checker follows.
    shutil.copytree(ROOT / "fastflow", tmp_path / "site" / "fastflow", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(
        ROOT / "kernels", tmp_path / "site" / "fastflow" / "kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--verifytypes", "fastflow", "--ignoreexternal", "--outputjson"],
        cwd=tmp_path,
        env={
            **plain_environment,
            "PYTHONPATH": str(tmp_path / "site"),
            # pyright asks the first python that it finds where packages are.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), plain_environment["PATH"]]),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    report = json.loads(done.stdout)["typeCompleteness"]
    homes = {f"{getattr(ff, name).__module__}.{name}" for name in NAMES}
    symbols = {s["name"]: s for s in report["symbols"] if any(f"{s['name']}.".startswith(f"{h}.") for h in homes)}
    assert homes <= set(symbols)
    vague = {
        name: [d["message"] for d in symbol["diagnostics"]]
        for name, symbol in symbols.items()
        if symbol["isTypeAmbiguous"] or not symbol["isTypeKnown"]
    }
    assert vague == {}
