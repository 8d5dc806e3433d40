"""python -m benchmarks.deployment: the latency of one call, in and out of a process that trains, microseconds.

A policy and a critic of the papers' sizes and a small policy, each in all the ways to call it: the module, its frozen
copy, the exported program and the compiled package (AOTInductor), with the walk as one operator and unrolled in plain
PyTorch. All are called in turn, round after round; before that they are held against the module. The table gives the
median over rounds and, in brackets, the least: on a machine that others use, what the call takes alone. On a GPU where
there is one. With OMP_NUM_THREADS=1 on one core.

    --rows N        the batch, 1 by default
    --seconds S     of timing per module, 20 by default
    --only NAME     one module alone
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import fastflow as ff
from benchmarks.measure import Entry, Timer
from fastflow.export import export_package, export_program

MODULES: dict[str, Callable[[], ff.FlowPolicy | ff.FlowCritic]] = {
    "policy 4x512, K = 10 (FQL)": lambda: ff.FlowPolicy(37, 5),
    "critic 2 nets of 4x512, K = 8 (floq)": lambda: ff.FlowCritic(37, 5, value_range=(-101.0, 1.0), ensemble=2),
    "policy 4x32, K = 10 (FPO)": lambda: ff.FlowPolicy(17, 6, hidden=(32,) * 4, activation="silu"),
}


def ways(module: ff.FlowPolicy | ff.FlowCritic, folder: Path) -> dict[str, Callable[..., Tensor]]:
    """All ways to call the module; packages are written into the folder."""

    def package(name: str, backend: str | None) -> Callable[..., Tensor]:
        path = export_package(module, folder / f"{name}.pt2", backend=backend)
        run: Callable[..., Tensor] = torch._inductor.aoti_load_package(str(path))
        return run

    return {
        "module, plain PyTorch": _with_backend(module, "reference"),
        "module": module,
        "freeze()": module.freeze(),
        "program": export_program(module).module(),
        "package": package("operator", None),
        "package, plain PyTorch": package("unrolled", "reference"),
    }


def _with_backend(module: nn.Module, backend: str) -> Callable[..., Tensor]:
    """The module's call with its backend exchanged."""

    @functools.wraps(module.forward)
    def call(*inputs: Tensor) -> Tensor:
        kept, module.backend = module.backend, backend
        try:
            out: Tensor = module(*inputs)
        finally:
            module.backend = kept
        return out

    return call


@torch.no_grad()
def measure(name: str, rows: int, seconds: float, device: torch.device) -> dict[str, tuple[float, float]]:
    """The median and the least of each way in microseconds."""
    torch.manual_seed(0)
    module = MODULES[name]().to(device)
    widths = [module.obs_dim, module.action_dim, *([1] if isinstance(module, ff.FlowCritic) else [])]
    inputs = [torch.rand(rows, width, device=device) for width in widths]
    with tempfile.TemporaryDirectory() as folder:
        calls = ways(module, Path(folder))
        expected = module(*inputs)
        for way, call in calls.items():
            torch.testing.assert_close(
                call(*inputs), expected, rtol=2e-3, atol=2e-3, msg=lambda m, way=way: f"{way}: {m}"
            )
        # Short batches, many rounds: on a shared machine most of them are not interrupted.
        timer = Timer(device, batch_seconds=0.001)
        entries = [Entry(way, functools.partial(call, *inputs), timer.finish) for way, call in calls.items()]
        timings = timer.measure(entries, rounds=1000, seconds=seconds)
    return {way: (1e6 * timing.median, 1e6 * min(timing.seconds)) for way, timing in timings.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, a row per module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.deployment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--only", choices=MODULES, help="one module alone")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    header = False
    for name in [given.only] if given.only else MODULES:
        found = measure(name, given.rows, given.seconds, device)
        if not header:
            print("| microseconds |", " | ".join(found), "|")
            print("|---|" + "---|" * len(found))
            header = True
        print(f"| {name} |", " | ".join(f"{round(m)} ({round(least)})" for m, least in found.values()), "|", flush=True)


if __name__ == "__main__":
    main()
