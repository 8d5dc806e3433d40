"""LayerNorm folded into the Dense layer behind it, padded and cast for the kernels; and the way back for gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .launch import Arithmetic
from .tile import cast


@triton.jit
def fold_kernel(
    w_ptr,
    scale_ptr,
    shift_ptr,
    b_ptr,
    w_out_ptr,
    b_out_ptr,
    stride_e,
    stride_in,
    stride_out,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    IN_P: tl.constexpr,
    OUT_P: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    NET: tl.constexpr,
    BI: tl.constexpr,
    BN: tl.constexpr,
):
    """W'' = diag(scale) W minus its column means (W itself without NORM) as [E, IN_P, OUT_P], b' = b + shift W as [E,
    OUT_P]."""
    i_n = tl.program_id(0)
    i_e = tl.program_id(1).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < OUT
    b_mean = tl.zeros([BN], tl.float32)
    b_bias = tl.zeros([BN], tl.float32)
    if NORM:
        for i in tl.range(0, IN, BI):
            o_i = i + tl.arange(0, BI)
            m_i = o_i < IN
            b_w = tl.load(
                w_ptr + i_e * stride_e + o_i[:, None] * stride_in + o_n[None, :],
                mask=m_i[:, None] & m_n[None, :],
                other=0.0,
            ).to(tl.float32)
            b_g = tl.load(scale_ptr + i_e * IN + o_i, mask=m_i, other=0.0).to(tl.float32)
            b_s = tl.load(shift_ptr + i_e * IN + o_i, mask=m_i, other=0.0).to(tl.float32)
            b_mean += tl.sum(b_g[:, None] * b_w, 0)
            b_bias += tl.sum(b_s[:, None] * b_w, 0)
        b_mean = b_mean / IN
    if BIAS:
        b_bias += tl.load(b_ptr + i_e * OUT + o_n, mask=m_n, other=0.0).to(tl.float32)
        tl.store(b_out_ptr + i_e * OUT_P + o_n, b_bias, mask=o_n < OUT_P)
    for i in tl.range(0, IN_P, BI):
        o_i = i + tl.arange(0, BI)
        m = (o_i < IN)[:, None] & m_n[None, :]
        b_w = tl.load(w_ptr + i_e * stride_e + o_i[:, None] * stride_in + o_n[None, :], mask=m, other=0.0).to(
            tl.float32
        )
        if NORM:
            b_g = tl.load(scale_ptr + i_e * IN + o_i, mask=o_i < IN, other=0.0).to(tl.float32)
            b_w = tl.where(m, b_g[:, None] * b_w - b_mean[None, :], 0.0)
        tl.store(
            w_out_ptr + i_e * stride_out + o_i[:, None] * OUT_P + o_n[None, :],
            cast(b_w, w_out_ptr.dtype.element_ty, NET),
            mask=(o_i < IN_P)[:, None] & (o_n < OUT_P)[None, :],
        )


@triton.jit
def unfold_kernel(
    g_ptr,
    db_ptr,
    w_ptr,
    scale_ptr,
    shift_ptr,
    dw_ptr,
    dscale_ptr,
    dshift_ptr,
    stride_g,
    stride_db,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    OUT_P: tl.constexpr,
    BI: tl.constexpr,
    BN: tl.constexpr,
):
    """Gradients through the fold. With G = xhat^T dpre [E, IN_P, OUT_P] and db = sum of dpre:

    dW = diag(scale) G + shift db^T,    dscale = rowsum(W o G),    dshift = W db.
    """
    i_i = tl.program_id(0)
    i_e = tl.program_id(1).to(tl.int64)
    o_i = i_i * BI + tl.arange(0, BI)
    m_i = o_i < IN
    b_scale = tl.load(scale_ptr + i_e * IN + o_i, mask=m_i, other=0.0).to(tl.float32)
    b_shift = tl.load(shift_ptr + i_e * IN + o_i, mask=m_i, other=0.0).to(tl.float32)
    b_dscale = tl.zeros([BI], tl.float32)
    b_dshift = tl.zeros([BI], tl.float32)
    for n in tl.range(0, OUT, BN):
        o_n = n + tl.arange(0, BN)
        m = m_i[:, None] & (o_n < OUT)[None, :]
        b_g = tl.load(g_ptr + i_e * stride_g + o_i[:, None] * OUT_P + o_n[None, :], mask=m, other=0.0).to(tl.float32)
        b_w = tl.load(w_ptr + i_e * IN * OUT + o_i[:, None] * OUT + o_n[None, :], mask=m, other=0.0).to(tl.float32)
        b_db = tl.load(db_ptr + i_e * stride_db + o_n, mask=o_n < OUT, other=0.0)
        b_dscale += tl.sum(b_w * b_g, 1)
        b_dshift += tl.sum(b_w * b_db[None, :], 1)
        b_dw = b_scale[:, None] * b_g + b_shift[:, None] * b_db[None, :]
        tl.store(dw_ptr + i_e * IN * OUT + o_i[:, None] * OUT + o_n[None, :], b_dw, mask=m)
    tl.store(dscale_ptr + i_e * IN + o_i, b_dscale, mask=m_i)
    tl.store(dshift_ptr + i_e * IN + o_i, b_dshift, mask=m_i)


def fold(
    w: Tensor, b: Tensor | None, scale: Tensor | None, shift: Tensor | None, w_out: Tensor, b_out: Tensor | None
) -> None:
    """Write diag(scale) W, centred, to w_out [E, IN_P, OUT_P] and b + shift W to b_out [E, OUT_P]; None for neither.

    w_out may be rows of a larger packed matrix; its rows are dense.
    """
    if w.stride(-1) != 1:
        w = w.contiguous()
    e, n_in, n_out = w.shape
    in_p, out_p = w_out.shape[1:]
    bn = min(32, out_p)
    fold_kernel[(triton.cdiv(out_p, bn), e)](
        w,
        w if scale is None else scale.contiguous(),
        w if shift is None else shift.contiguous(),
        w if b is None else b.contiguous(),
        w_out,
        w_out if b_out is None else b_out,
        w.stride(0),
        w.stride(1),
        w_out.stride(0),
        IN=n_in,
        OUT=n_out,
        IN_P=in_p,
        OUT_P=out_p,
        NORM=scale is not None,
        BIAS=b is not None,
        NET=Arithmetic.of(w_out.dtype),
        BI=64,
        BN=bn,
        num_warps=4,
    )


def unfold(g: Tensor, db: Tensor, w: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dW, dscale, dshift) from G [E, IN_P, OUT_P] (inner two axes contiguous) and db [E, OUT_P], all float32."""
    w, scale, shift = w.contiguous(), scale.contiguous(), shift.contiguous()
    e, n_in, n_out = w.shape
    dw = torch.empty_like(w, dtype=torch.float32)
    dscale = torch.empty_like(scale, dtype=torch.float32)
    dshift = torch.empty_like(shift, dtype=torch.float32)
    bi = 16
    unfold_kernel[(triton.cdiv(n_in, bi), e)](
        g,
        db,
        w,
        scale,
        shift,
        dw,
        dscale,
        dshift,
        g.stride(0),
        db.stride(0),
        IN=n_in,
        OUT=n_out,
        OUT_P=g.shape[-1],
        BI=bi,
        BN=max(16, min(64, plan.power_of_2(n_out))),
        num_warps=4,
    )
    return dw, dscale, dshift
