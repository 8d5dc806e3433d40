"""Kernels that do nothing but what follows or precedes a product, for counting its instructions."""

from __future__ import annotations

import triton
import triton.language as tl

from fastflow.kernels.tile import activate, activate_grad, embed_state


@triton.jit
def activate_kernel(x_ptr, y_ptr, NET: tl.constexpr):
    """64 x 64 activations."""
    o = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(y_ptr + o, activate(tl.load(x_ptr + o), NET))


@triton.jit
def activate_grad_kernel(x_ptr, y_ptr, NET: tl.constexpr):
    """64 x 64 activations and derivatives."""
    o = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    y, dy = activate_grad(tl.load(x_ptr + o), NET)
    tl.store(y_ptr + o, y * dy)


@triton.jit
def embed_kernel(x_ptr, y_ptr, low, high, std, NET: tl.constexpr):
    """64 features of 64 states."""
    o_b = tl.arange(0, 64)
    b_x = tl.load(x_ptr + o_b)[:, None]
    b_f = embed_state(b_x, tl.arange(0, 64), low, high, std, NET)
    tl.store(y_ptr + o_b[:, None] * 64 + tl.arange(0, 64)[None, :], b_f)
