"""Times drawn by a loss's kernel, once more for its way back: one launch for what is a hundred operators of torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .noise import philox_uniform


@triton.jit(do_not_specialize=["N", "samples"])
def draw_times_kernel(seed_ptr, ids_ptr, t_ptr, N, samples, BLOCK: tl.constexpr):
    """t [B, S] float32, see `philox_uniform`."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    seed = tl.load(seed_ptr)
    b_id = tl.load(ids_ptr + o // samples, mask=m, other=0)
    tl.store(t_ptr + o, philox_uniform(seed, b_id, o % samples), mask=m)


def draw_times(seed: Tensor, ids: Tensor, samples: int) -> Tensor:
    """`PhiloxNoise(seed, ids, samples).t()`, [B, S] float32, to the bit."""
    t = torch.empty((ids.shape[0], samples), dtype=torch.float32, device=ids.device)
    block = 256
    draw_times_kernel[(triton.cdiv(t.numel(), block),)](
        seed, ids.contiguous(), t, t.numel(), samples, BLOCK=block, num_warps=4
    )
    return t
