"""python -m benchmarks.counts: what each tracked call does, in numbers that no machine's speed changes.

    operators   calls of torch's operators in one call, those that operators call themselves included
    native      calls of fastflow's own native code (on CUDA `kernels`: everything that was launched on the GPU)
    allocated   bytes that torch's allocator gave out, whether or not they were freed within the call

They are counted by torch's profiler in the second call, behind what only the first one does. `counts.json` holds what
they were on a CPU when they were last looked at; a test fails where they differ. They depend on torch's version, which
is recorded too. --record writes the file anew; --device cuda counts there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.tracked import TRACKED

PATH = Path(__file__).with_name("counts.json")


def torch_version() -> str:
    """Major and minor: what the counts depend on."""
    return ".".join(torch.__version__.split(".")[:2])


@contextlib.contextmanager
def _native_calls() -> Iterator[list[str]]:
    """Names of the operators of the native code that are called within."""
    from fastflow.kernels import cpu

    called: list[str] = []
    call, walk = cpu.Prepared.__call__, cpu.PackedWalk.__call__

    def counted_call(self: Any, *arguments: Any) -> None:
        called.append(self.name)
        call(self, *arguments)

    def counted_walk(self: Any, *arguments: Any) -> Any:
        called.append("walk_frozen")
        return walk(self, *arguments)

    counted = mock.patch.object(cpu.Prepared, "__call__", counted_call)
    with counted, mock.patch.object(cpu.PackedWalk, "__call__", counted_walk):
        yield called


def count(call: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """The counts of the second call."""
    # Else the profiler tells the terminal whenever it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with _native_calls() as native, torch.profiler.profile(activities=activities, profile_memory=True) as profiled:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = profiled.events() or []
    on_cpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    found = {"operators": sum(event.name.startswith(("aten::", "fastflow::")) for event in on_cpu)}
    if device.type == "cuda":
        found["kernels"] = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
    else:
        found["native"] = len(native)
    memory = profiled.profiler.kineto_results.events() if profiled.profiler is not None else []
    found["allocated"] = sum(max(event.nbytes(), 0) for event in memory if event.name() == "[memory]")
    return found


def count_all(device: torch.device, names: Sequence[str] | None = None) -> dict[str, dict[str, int]]:
    """By name of the tracked case; one thread, because a thread may need memory of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: count(TRACKED[name].prepare(device), device) for name in names or TRACKED}
    finally:
        torch.set_num_threads(threads)


def read() -> dict[str, Any]:
    """What is recorded: "torch" and "cases"."""
    recorded: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return recorded


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description="Operators, calls and bytes.")
    parser.add_argument("--record", action="store_true", help=f"write {PATH.name} anew")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    if given.record and given.device != "cpu":
        parser.error("--record is for the CPU's counts")
    found = count_all(torch.device(given.device))
    for name, counts in found.items():
        print(f"{name:<28}", "  ".join(f"{key} {value:>9,}" for key, value in counts.items()))
    if given.record:
        from fastflow.atomic import atomic_write

        with atomic_write(PATH) as temporary:
            text = json.dumps({"torch": torch_version(), "cases": found}, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
