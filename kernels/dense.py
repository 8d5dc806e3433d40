"""A plain batched product with tiles of one size: rows whose bits do not depend on how many others there are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Arithmetic
from .tile import cast, product


@triton.jit(do_not_specialize=["M", "K", "N", "stride_x"])
def dense_kernel(
    x_ptr,  # [1 or E, M, K]
    w_ptr,  # [E, K, N]
    b_ptr,  # [E, N]
    y_ptr,  # [E, M, N]
    M,
    K,
    N,
    stride_x,
    stored_ptr,  # of the type that operands are rounded to
    NET: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y = x @ w + b."""
    i_m = tl.program_id(0)
    i_n = tl.program_id(1)
    i_e = tl.program_id(2).to(tl.int64)
    DTYPE: tl.constexpr = stored_ptr.dtype.element_ty
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    m_m = (o_m < M)[:, None]
    m_n = (o_n < N)[None, :]
    b_acc = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        b_x = tl.load(
            x_ptr + i_e * stride_x + o_m[:, None].to(tl.int64) * K + o_k[None, :],
            mask=m_m & (o_k < K)[None, :],
            other=0.0,
        ).to(tl.float32)
        b_w = tl.load(w_ptr + (i_e * K + o_k[:, None]) * N + o_n[None, :], mask=(o_k < K)[:, None] & m_n, other=0.0).to(
            tl.float32
        )
        b_acc += product(cast(b_x, DTYPE, NET), cast(b_w, DTYPE, NET), NET)
    b_acc += tl.load(b_ptr + i_e * N + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    p_y = y_ptr + (i_e * M + o_m[:, None]) * N + o_n[None, :]
    tl.store(p_y, b_acc.to(y_ptr.dtype.element_ty), mask=m_m & m_n)


def dense(x: Tensor, weight: Tensor, bias: Tensor, precision: str) -> Tensor:
    """x [1 or E, ..., K] @ weight [E, K, N] + bias [E, N], in x's dtype: `fastflow.reference.dense`,
    batch-invariant."""
    e, k, n = weight.shape
    rows = x.reshape(x.shape[0], -1, k).contiguous()
    m = rows.shape[1]
    out = x.new_empty((e, m, n))
    stored = torch.bfloat16 if precision == "bf16" else torch.float32
    bm, bn = 32, 32
    dense_kernel[(triton.cdiv(m, bm), triton.cdiv(n, bn), e)](
        rows,
        weight.contiguous(),
        bias.contiguous(),
        out,
        m,
        k,
        n,
        0 if rows.shape[0] == 1 else rows.stride(0),
        x.new_empty(0, dtype=stored),
        NET=Arithmetic.of(stored, "tf32" if precision == "tf32" else "ieee"),
        BM=bm,
        BN=bn,
        BK=32,
        num_warps=4,
    )
    return out.reshape(e, *x.shape[1:-1], n)
