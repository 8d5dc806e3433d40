"""What NVIDIA's profiler tells of a case: how busy the tensor pipes are, and what L2 delivers.

    python -m benchmarks.ncu NAME PRECISION     computes a case, its last call between the profiler's marks

`profile` runs that under `ncu` and reads its CSV. A case's figures are those of its launches, weighted by their time.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TIME, L2 = "gpu__time_duration.sum", "lts__t_bytes.sum.per_second"
# By the name that the GPU has: cycles in which the pipes are busy, or instructions issued to them.
TENSOR = (
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_elapsed",
)
# What ncu says of a name that the GPU does not have; it then measures nothing.
UNKNOWN = "Failed to find metric"
SECONDS = 60.0


class Unavailable(Exception):
    """No profiler, or one that does not work here; the message says why."""


def parse(text: str) -> list[dict[str, Any]]:
    """Launches from ncu's CSV (`--csv --print-units base`), in order: `kernel`, and by metric its number.

    What is not a number, such as "n/a" for a metric that the GPU lacks, is left out.

    Raises:
        ValueError: no table in it.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError(f"no table in ncu's output: {_first_words(text)}")
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(line for line in lines[start:] if line.startswith('"')))):
        found = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        try:
            found[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
        except ValueError:
            continue
    return list(launches.values())


def _first_words(text: str) -> str:
    errors = [line for line in text.splitlines() if "ERROR" in line] or text.splitlines()
    return (errors[0] if errors else "nothing")[:200]


def summarize(launches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`seconds`, `tensor_percent`, `l2_tbytes_per_s` of all launches together, and of fastflow's own by name.

    Raises:
        ValueError: no launch has the metrics.
    """
    measured = []
    for launch in launches:
        tensor = next((launch[name] for name in TENSOR if name in launch), None)
        if tensor is not None and TIME in launch and L2 in launch:
            # Base units: nanoseconds, bytes per second, percent.
            numbers = {"seconds": 1e-9 * launch[TIME], "tensor_percent": tensor}
            measured.append({"kernel": launch["kernel"], **numbers, "l2_tbytes_per_s": 1e-12 * launch[L2]})
    if not measured:
        raise ValueError("no launch has time, tensor pipes and L2")
    own: dict[str, list[dict[str, Any]]] = {}
    for found in measured:
        name = found["kernel"].split("(")[0]
        if name.endswith("_kernel"):
            own.setdefault(name, []).append(found)
    kernels = {name: _weighted(found) for name, found in own.items()}
    return {**_weighted(measured), "launches": len(measured), "kernels": kernels}


def _weighted(launches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    seconds = sum(found["seconds"] for found in launches)
    means = {
        key: sum(found["seconds"] * found[key] for found in launches) / seconds
        for key in ("tensor_percent", "l2_tbytes_per_s")
    }
    return {"seconds": seconds, **means}


def profile(name: str, precision: str, seconds: float = SECONDS, small: bool = False) -> dict[str, Any]:
    """A case's figures.

    Raises:
        Unavailable: no ncu, none that may read the counters, nothing within `seconds`.
    """
    program = shutil.which("ncu")
    if program is None:
        raise Unavailable("not available: no ncu on PATH")
    until, output = time.monotonic() + seconds, ""
    for tensor in TENSOR:
        command = [
            program,
            "--csv",
            "--print-units",
            "base",
            "--profile-from-start",
            "off",
            "--target-processes",
            "all",
        ]
        command += ["--metrics", ",".join((TIME, L2, tensor)), sys.executable, "-m", "benchmarks.ncu", name, precision]
        output = _run([*command, "small"] if small else command, until)
        if UNKNOWN not in output:
            break
    try:
        return summarize(parse(output))
    except ValueError as error:
        raise Unavailable(f"not available: {error}") from error


def _run(command: Sequence[str], until: float) -> str:
    """What a command prints.

    Raises:
        Unavailable: it did not end in time.
    """
    options: dict[str, Any] = {"cwd": ROOT, "stdin": subprocess.DEVNULL, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    # In a session of its own: ncu's children are ended with it.
    with subprocess.Popen(command, start_new_session=os.name == "posix", **options) as process:
        try:
            return str(process.communicate(timeout=max(until - time.monotonic(), 0.0))[0])
        except BaseException as error:
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise Unavailable("not available: not done in the time it was given") from error
            raise


def main(arguments: Sequence[str]) -> int:
    """Compute a case a few times, the last time between the profiler's marks."""
    import torch

    from benchmarks.cases import CASES
    from benchmarks.rivals import fused, global_precision

    name, precision, *small = arguments
    case = CASES[name].shrunk() if small else CASES[name]
    with global_precision(precision):
        call = fused(case.build("cuda"), precision).call
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
