"""Where a launch runs: the device's arch and multiprocessors, or the interpreter."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether triton is installed."""


def _switch(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {value!r}")
    return value == "1"


RING = _switch("FASTFLOW_RING")
"""Whether walks of many rows go by kernels/ring.py where it covers them: the environment variable FASTFLOW_RING, which
is 0 until the kernel has been measured on a GPU."""


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (it knows neither inline assembly nor bfloat16 products)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def rings() -> bool:
    """Whether kernels/ring.py may be launched: Triton's interpreter does not know Gluon."""
    return RING and not interpreted()


class Arithmetic(NamedTuple):
    """How a kernel multiplies: see kernels/tile.py."""

    PRECISION: str
    ARITH: str

    @classmethod
    def of(cls, stored: torch.dtype, precision: str = "ieee") -> Arithmetic:
        """That of operands stored as `stored`; `precision` is triton's name for that of float32 products."""
        return cls(precision, arith(stored))


def arith(stored: torch.dtype) -> str:
    """How kernels compute with what they store as `stored`: ARITH of kernels/tile.py."""
    if stored != torch.bfloat16:
        return "exact"
    if interpreted():
        return "emulate"
    return "exact" if torch.version.hip else "fast"


def target(device: torch.device | int) -> tuple[int, int]:
    """(arch, multiprocessors) of a GPU; sm_90 for CPU tensors under the interpreter.

    The arch is major * 10 + minor of the compute capability, or on AMD the number of its gfx name (942).
    """
    if isinstance(device, torch.device):
        if device.type != "cuda":
            return 90, 1  # few, large programs: the interpreter runs one after another
        device = torch.cuda.current_device() if device.index is None else device.index
    if device not in _targets:
        properties = torch.cuda.get_device_properties(device)
        arch = properties.major * 10 + properties.minor
        if torch.version.hip:
            arch = int(properties.gcnArchName.partition(":")[0].removeprefix("gfx"), 16)
            arch = 942 if arch == 0x942 else 0
        _targets[device] = arch, properties.multi_processor_count
    return _targets[device]


# Asked of the driver once per device: not while a call is traced or captured.
_targets: dict[int, tuple[int, int]] = {}


def product_precision() -> str:
    """torch's setting for float32 products on CUDA: "fp32", "tf32" or "bf16"."""
    try:
        return {"highest": "fp32", "high": "tf32", "medium": "bf16"}[torch.get_float32_matmul_precision()]
    except RuntimeError:
        # The older call refuses to answer where the newer setting was used.
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"


@contextlib.contextmanager
def exact_products(precision: str) -> Iterator[None]:
    """torch's own float32 products at the asked precision ("fp32" or "tf32"), whatever the global setting says."""
    if precision == "bf16" or not torch.cuda.is_available():
        yield
        return
    # torch keeps two settings and refuses products where they disagree: the older call sets both, so both are restored.
    newer = torch.backends.cuda.matmul.fp32_precision
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "highest"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        if torch.backends.cuda.matmul.fp32_precision != newer:
            torch.backends.cuda.matmul.fp32_precision = newer


def batched_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Batched x @ y, accumulated and returned in float32 also for bfloat16 operands."""
    if x.dtype == torch.float32:
        return torch.bmm(x, y)
    return torch.bmm(x, y, out_dtype=torch.float32) if x.is_cuda else _widened_product(x, y)


def _widened_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Where products of bfloat16 give nothing wider."""
    return torch.bmm(x.float(), y.float())
