"""Every kernel compiles for every arch, fits its shared memory and does not spill where the plan says so: no GPU
needed.

Compiled by the oldest and the newest supported triton, which `make test` puts beside the environment, else by the one
installed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest
from conftest import HAS_GPU

from fastflow.kernels import aot, plan

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(HAS_GPU, reason="on a machine with a GPU the kernels themselves run"),
]

ROOT = pathlib.Path(__file__).parents[1]
TRITONS = sorted(str(p.parent) for p in (ROOT / ".triton").glob("*/.complete")) or [None]
IDS = [pathlib.Path(t).name if t else "installed" for t in TRITONS]


@functools.cache
def compiled(triton: str | None, kernel: str, arch: int, cases: tuple[str, ...]) -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    if triton:
        env["PYTHONPATH"] = triton
    command = [sys.executable, "-m", "fastflow.kernels.aot", "--json", "--jobs", "1"]
    command += ["--kernel", kernel, "--arch", str(arch), "--case", *cases]
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert rows, run.stderr[-2000:]
    return rows


def check(rows: list[dict], triton: str | None, count: int) -> None:
    assert len(rows) == count
    for row in rows:
        assert "error" not in row, row["error"]
        if triton:
            assert row["triton"] == pathlib.Path(triton).name
        precision = aot.CASES[row["case"]].precision
        where = f"{row['kernel']} {row['case']} sm_{row['arch']} {row['tiles']}"
        assert row["shared"] <= plan.SHARED_MEMORY[row["arch"]], f"{where}: shared memory"
        first = row["tiles"] == dataclasses.asdict(aot.entries(row["kernel"], row["case"], row["arch"])[0])
        largest = row["case"] == "floq" and first and row["arch"] < 100
        allowed = 0 if largest else plan.SPILL_BYTES[precision]
        assert row["stack"] <= allowed, f"{where}: {row['stack']} bytes of stack, allowed {allowed}"
        if precision != "fp32":
            assert any(op in row["opcodes"] for op in ("HMMA", "HGMMA", "UTCHMMA")), f"{where}: no tensor cores"


@pytest.mark.parametrize("triton", TRITONS, ids=IDS)
@pytest.mark.parametrize("arch", aot.ARCHES, ids=lambda a: f"sm_{a}")
@pytest.mark.parametrize("kernel", aot.KERNELS)
def test_published_network_on_every_arch(kernel, arch, triton):
    check(compiled(triton, kernel, arch, ("floq",)), triton, len(aot.entries(kernel, "floq", arch)))


@pytest.mark.parametrize("triton", TRITONS, ids=IDS)
@pytest.mark.parametrize("kernel", aot.KERNELS)
@pytest.mark.parametrize("arch", [86, 90], ids=lambda a: f"sm_{a}")
def test_other_widths_and_precisions(kernel, arch, triton):
    cases = ("floq-tf32", "floq-fp32", "floq-1024", "floq-64", "actor")
    check(compiled(triton, kernel, arch, cases), triton, sum(len(aot.entries(kernel, c, arch)) for c in cases))


@pytest.mark.parametrize("triton", TRITONS, ids=IDS)
def test_hopper_multiplies_full_tiles_by_warpgroup(triton):
    rows = compiled(triton, "integrate_fwd", 90, ("floq",))
    assert "HGMMA" in next(row for row in rows if row["tiles"]["rows"] == 64)["opcodes"]


def test_no_kernel_is_compiled_per_number_of_steps_or_rows(plain_environment):
    code = (
        "from fastflow.kernels.integrate import integrate_fwd_kernel as walk\n"
        "from fastflow.kernels.matching import matching_fwd_kernel as loss, matching_bwd_kernel as back\n"
        "for kernel, names in ((walk, 'M samples num_steps'), (loss, 'M samples'), (back, 'M')):\n"
        "    found = {p.name: p for p in kernel.params}\n"
        "    for name in names.split():\n"
        "        assert found[name].do_not_specialize and not found[name].is_constexpr, name\n"
        "print('run-time arguments')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], env=plain_environment, capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "run-time arguments\n", run.stderr[-2000:]


def test_the_plan_covers_every_arch_and_precision():
    for arch in (80, 86, 87, 89, 90, 100, 103, 120, 121):
        for precision in ("bf16", "tf32", "fp32"):
            for width in (16, 64, 128, 512):
                for kernel in aot.KERNELS:
                    entries = plan.candidates(kernel, arch, precision, width)
                    assert entries
                    assert all(plan.ROW_PAD % t.rows == 0 and width % t.columns == 0 for t in entries)
        assert f"sm_{arch}" in plan.describe(arch)


def test_few_rows_get_small_tiles_and_many_rows_large_ones():
    few = plan.choose("integrate_fwd", 90, 132, "bf16", 512, 64)
    many = plan.choose("integrate_fwd", 90, 132, "bf16", 512, 4096)
    assert few.rows == 16
    assert many.rows == 64
