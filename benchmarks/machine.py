"""Where a result was made: GPU, driver, clocks, versions, commit. What cannot be found out is None, never an error."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
_QUERY = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw")


def facts(device: torch.device) -> dict[str, Any]:
    """Everything that does not change while measuring."""
    return {
        "hardware": hardware(device),
        "software": {
            "python": platform.python_version(),
            "executable": sys.executable,
            "system": platform.platform(),
            "cuda": torch.version.cuda,
            "torch": str(torch.__version__),
            **{name: version(name) for name in ("fastflow", "triton", "numpy", "jax")},
        },
        "repository": repository(),
    }


def public_facts(device: torch.device) -> dict[str, Any]:
    """The facts for a file that others read: paths say nothing of a measurement."""
    found = facts(device)
    found["software"].pop("executable")
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """The GPU and the CPU beside it, or the CPU alone."""
    out: dict[str, Any] = {"device": device.type, "cpu": _cpu_name(), "cpu_cores": os.cpu_count()}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        out |= {
            "gpu": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
            "shared_memory_per_block_optin": getattr(gpu, "shared_memory_per_block_optin", None),
            "driver": clocks(device).get("driver_version"),
        }
    return out


def name_of(hardware: Mapping[str, Any]) -> str:
    """A name for files, such as "amd-epyc-2-cores" or "nvidia-h200"."""
    if "gpu" in hardware:
        return re.sub(r"[^a-z0-9]+", "-", hardware["gpu"].lower()).strip("-")
    name = re.sub(r"\(.*?\)|processor|cpu|@.*", " ", hardware["cpu"].lower())
    slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown"
    return f"{slug}-{hardware['cpu_cores']}-cores"


def clocks(device: torch.device) -> dict[str, str]:
    """Driver, clocks, temperature and power as nvidia-smi gives them at this moment; empty without it."""
    if device.type != "cuda":
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    index = torch.cuda.current_device() if device.index is None else device.index
    # nvidia-smi counts all GPUs, torch the visible ones: the name that both know is the UUID.
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    answer = (run([*command, f"--id=GPU-{uuid}"]) if uuid else None) or run(command)
    lines = (answer or "").splitlines()
    if not lines:
        return {}
    line = lines[0] if len(lines) == 1 else lines[min(index, len(lines) - 1)]
    values = [value.strip() for value in line.split(",")]
    return dict(zip(_QUERY, values)) if len(values) == len(_QUERY) else {}


def repository() -> dict[str, Any]:
    """Commit, whether tracked files differ from it, and a digest of the sources, which is there also without git."""
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]
    top = run([*git, "rev-parse", "--show-toplevel"])
    inside = top is not None and Path(top).resolve() == ROOT
    commit = run([*git, "rev-parse", "--short=12", "HEAD"]) if inside else None
    status = run([*git, "status", "--porcelain", "--untracked-files=no"]) if inside else None
    return {"commit": commit, "dirty": None if status is None else bool(status), "sources": sources_digest()}


def sources_digest() -> str:
    """SHA-256 over the Python files of fastflow/ and kernels/, shortened."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "fastflow").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def version(package: str) -> str | None:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_flags() -> dict[str, bool]:
    """Which of the instructions that decide over matrix products the CPU has, by Linux's names; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    found = {flag for line in text.splitlines() if line.startswith(("flags", "Features")) for flag in line.split()}
    return {name: name in found for name in CPU_FLAGS} if found else {}


def busy_seconds() -> float | None:
    """Processor seconds that all processes of this machine have used since it started, and its host's besides."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
        user, nice, system, _, _, interrupts, soft_interrupts, stolen = map(int, fields[:8])
        return (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def compiler() -> str | None:
    """First line of what the C++ compiler says of itself."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        answer = run([name, "--version"]) if name else None
        if answer:
            return answer.splitlines()[0]
    return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def run(command: list[str]) -> str | None:
    """A command's output without surrounding blanks, or None if it fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
