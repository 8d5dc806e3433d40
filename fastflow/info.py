"""What a bug report needs: versions, devices, and which kernels would run here. Also the choice of a device by name."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from typing import TYPE_CHECKING

from fastflow._version import __version__
from fastflow.errors import UserError

if TYPE_CHECKING:
    import torch

__all__ = ["describe", "resolve_device", "versions"]

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "ogbench",
    "mujoco",
    "dm_control",
    "gymnasium",
    "safetensors",
    "tyro",
    "tensorboard",
    "matplotlib",
)


def versions() -> dict[str, str]:
    """Versions of fastflow and of the packages it may use; absent ones are left out."""
    found = {"fastflow": __version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def resolve_device(name: str) -> torch.device:
    """The torch device of "cpu", "cuda", "cuda:1" or "auto" (CUDA where there is a GPU, else the CPU).

    Raises:
        UserError: CUDA asked for and absent, no such GPU, or another name.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, got {name}")
    if kind == "cuda":
        if torch.version.cuda is None:
            raise UserError(f"device {name} asked for, but this torch ({torch.__version__}) is built without CUDA")
        if not torch.cuda.is_available():
            raise UserError(f"device {name} asked for, but torch {torch.__version__} sees no GPU here")
        if index and int(index) >= torch.cuda.device_count():
            raise UserError(f"device {name} asked for, but there are {torch.cuda.device_count()} GPUs, counted from 0")
    return torch.device(name)


def describe() -> str:
    """A page of text: versions, machine, native code, GPUs, and the plan of kernels for each."""
    import torch

    from fastflow.kernels import cpu as native

    found = versions()
    lines = [
        *(f"{name:<12} {version}" for name, version in found.items()),
        *(f"{name:<12} not installed" for name in _PACKAGES if name not in found),
        f"{'python':<12} {platform.python_version()} ({sys.executable})",
        f"{'system':<12} {platform.platform()}",
        f"{'cpu':<12} {_cpu_name()}, {os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads",
        f"{'native code':<12} {native.features()} (kept in {native.cache_directory()})",
        f"{'backend':<12} FASTFLOW_BACKEND={os.environ.get('FASTFLOW_BACKEND', '(not set: auto)')}",
    ]
    if not torch.cuda.is_available():
        why = "torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        return "\n".join([*lines, f"{'gpu':<12} none ({why})", "", _plan(None)])
    if torch.version.hip:
        lines.append(f"{'rocm':<12} {torch.version.hip} (torch)")
    else:
        lines.append(f"{'cuda':<12} {torch.version.cuda} (torch), driver {_driver_version()}")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        optin = getattr(gpu, "shared_memory_per_block_optin", None)
        kind = gpu.gcnArchName if torch.version.hip else f"compute capability {gpu.major}.{gpu.minor}"
        lines += [
            f"{f'gpu {index}':<12} {gpu.name}, {kind}, "
            f"{gpu.total_memory / 2**30:.1f} GiB, {gpu.multi_processor_count} multiprocessors, "
            f"{optin if optin is not None else 'unknown'} bytes of shared memory per block (opt-in)",
            "",
            _plan(index),
            "",
        ]
    return "\n".join(lines).rstrip()


def _plan(index: int | None) -> str:
    """Of a GPU by its index; None: where there is none."""
    if importlib.util.find_spec("triton") is None:
        return "kernels      not available here: triton is not installed; the PyTorch reference works without it"
    from fastflow.kernels import launch, plan

    return plan.describe(None if index is None else launch.target(index)[0])


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown (nvidia-smi did not answer)"
    return answer.stdout.strip()
