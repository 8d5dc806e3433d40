"""What a device can do at best, measured: the rates that a case's floor follows from."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.measure import Entry, Timer


class Rates(NamedTuple):
    """FLOP/s of matrix products, and bytes/s of a copy, read and written."""

    flops: float
    bytes: float

    def seconds(self, flops: int, moved: int) -> float:
        """The least time that so many FLOPs and bytes leave: the larger of the two."""
        return max(flops / self.flops, moved / self.bytes)


def product_rate(timer: Timer, n: int, dtype: torch.dtype) -> float:
    """FLOP/s of the product of two square matrices of n."""
    # Random numbers: the power drawn, and so the clock, depends on them.
    a, b = (torch.randn(n, n, device=timer.device, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    entry = Entry("product", lambda: torch.matmul(a, b, out=out), timer.finish, events=True)
    return 2 * n**3 / timer.measure([entry], 9, 2.0)["product"].median


def copy_rate(timer: Timer, n: int) -> float:
    """Bytes/s of a copy of n x n float32 numbers."""
    source = torch.randn(n * n, device=timer.device)
    target = torch.empty_like(source)
    entry = Entry("copy", lambda: target.copy_(source), timer.finish, events=True)
    return 2 * source.nbytes / timer.measure([entry], 9, 2.0)["copy"].median


def rates(device: torch.device, precision: str) -> Rates:
    """The device's rates for products in a precision of `fastflow.integrate`, under torch's settings as they are."""
    timer = Timer(device)
    products, copies = (8192, 8192) if device.type == "cuda" else (2048, 4096)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Rates(product_rate(timer, products, dtype), copy_rate(timer, copies))
