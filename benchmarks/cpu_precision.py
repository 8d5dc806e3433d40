"""python -m benchmarks.cpu_precision: float32 and bfloat16 in native code beside eager PyTorch, milliseconds.

With OMP_NUM_THREADS=1 on one core; `CXX="g++ -mno-amx-tile"` measures bfloat16 without AMX.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch

import fastflow as ff
from fastflow import dense

SECONDS = 0.6
PAIRS = 8
FLOQ = ff.FieldSpec(
    1, 42, (512,) * 4, 2, norm="layer", state_embedding=ff.HLGauss(-101.0, 1.0), time_embedding=ff.Cosine()
)


def best(call: Callable[[], object]) -> float:
    """The fewest milliseconds of a call."""
    call()
    until, least, calls = time.perf_counter() + SECONDS, math.inf, 0
    while time.perf_counter() < until or calls < 3:
        begin = time.perf_counter()
        call()
        least, calls = min(least, time.perf_counter() - begin), calls + 1
    return 1e3 * least


def value(rows: int, *sizes: int) -> Callable[[str, str], object]:
    """Forward and backward of a value network with SiLU."""
    shapes = list(zip(sizes[:-1], sizes[1:], strict=True))
    leaves = [t.requires_grad_() for n, m in shapes for t in (torch.randn(n, m) * n**-0.5, torch.zeros(m))]
    x = torch.randn(rows, sizes[0])

    def call(precision: str, backend: str) -> object:
        y = dense.dense_stack(x, leaves, "silu", None, precision=precision, native=backend == "auto")
        return torch.autograd.grad(y.square().mean(), leaves)

    return call


def loss(spec: ff.FieldSpec, rows: int) -> Callable[[str, str], object]:
    """Forward and backward of the losses of `PAIRS` pairs per row."""
    field = ff.VelocityField(spec)
    x_1, x_0, t = (torch.randn(rows, *shape) for shape in ((spec.state_dim,), (PAIRS, spec.state_dim), (PAIRS,)))
    x_1 = x_1.unsqueeze(1).expand_as(x_0)
    cond, leaves = torch.randn(rows, spec.cond_dim), list(field.parameters())

    def call(precision: str, backend: str) -> object:
        options = dict(precision=precision, backend=backend, reduction="none")
        found = ff.flow_matching_loss(field, x_0, x_1, t.sigmoid(), cond, **options)
        return torch.autograd.grad(found.mean(), leaves)

    return call


def walk(rows: int) -> Callable[[str, str], object]:
    """floq's walk of 8 steps."""
    field, x_0, cond = ff.VelocityField(FLOQ), torch.randn(rows, 1), torch.randn(rows, FLOQ.cond_dim)

    @torch.no_grad()
    def call(precision: str, backend: str) -> object:
        return ff.integrate(field, x_0, cond, num_steps=8, precision=precision, backend=backend)

    return call


def main() -> None:
    """Print a line per network."""
    torch.manual_seed(0)
    widths: tuple[tuple[int, ...], ...] = ((32,) * 4, (64, 64))
    fpo = [ff.FieldSpec(6, 17, h, activation="silu", time_embedding=ff.PowerFourier(8)) for h in widths]
    calls = {
        "value network, 1920 rows, 5x256": value(1920, 17, *[256] * 5, 1),
        "FPO loss, 1920 rows x 8 pairs, 4x32": loss(fpo[0], 1920),
        "FPO loss, 256 rows x 8 pairs, 2x64": loss(fpo[1], 256),
        "floq loss, 2 nets x 256 rows x 8, 4x512": loss(FLOQ, 256),
        "floq walk, 2 nets x 2048 rows, 4x512, K=8": walk(2048),
    }
    kinds = {"eager": ("fp32", "reference"), "fp32": ("fp32", "auto"), "bf16": ("bf16", "auto")}
    for name, call in calls.items():
        found = [f"{kind} {best(partial(call, *how)):8.2f}" for kind, how in kinds.items()]
        print(f"{name:44}", *found, flush=True)


if __name__ == "__main__":
    main()
