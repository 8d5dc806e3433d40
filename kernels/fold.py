"""LayerNorm folded into the Dense layer behind it, padded and cast for the kernels. `unfold` is the way back."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Arithmetic
from .tile import cast


@triton.jit
def fold_columns(
    p_w,
    p_scale,
    p_shift,
    p_b,
    p_w_out,
    p_b_out,
    i_n,
    stride_in,
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
    """One member's columns from i_n BN on: W'' = diag(scale) W minus its column means (W itself without NORM) as [IN_P,
    OUT_P], b' = b + shift W as [OUT_P]."""
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < OUT
    b_mean = tl.zeros([BN], tl.float32)
    b_bias = tl.zeros([BN], tl.float32)
    if NORM:
        for i in tl.range(0, IN, BI):
            o_i = i + tl.arange(0, BI)
            m_i = o_i < IN
            b_w = tl.load(
                p_w + o_i[:, None] * stride_in + o_n[None, :], mask=m_i[:, None] & m_n[None, :], other=0.0
            ).to(tl.float32)
            b_g = tl.load(p_scale + o_i, mask=m_i, other=0.0).to(tl.float32)
            b_s = tl.load(p_shift + o_i, mask=m_i, other=0.0).to(tl.float32)
            b_mean += tl.sum(b_g[:, None] * b_w, 0)
            b_bias += tl.sum(b_s[:, None] * b_w, 0)
        b_mean = b_mean / IN
    if BIAS:
        b_bias += tl.load(p_b + o_n, mask=m_n, other=0.0).to(tl.float32)
        tl.store(p_b_out + o_n, b_bias, mask=o_n < OUT_P)
    for i in tl.range(0, IN_P, BI):
        o_i = i + tl.arange(0, BI)
        m = (o_i < IN)[:, None] & m_n[None, :]
        b_w = tl.load(p_w + o_i[:, None] * stride_in + o_n[None, :], mask=m, other=0.0).to(tl.float32)
        if NORM:
            b_g = tl.load(p_scale + o_i, mask=o_i < IN, other=0.0).to(tl.float32)
            b_w = tl.where(m, b_g[:, None] * b_w - b_mean[None, :], 0.0)
        tl.store(
            p_w_out + o_i[:, None] * OUT_P + o_n[None, :],
            cast(b_w, p_w_out.dtype.element_ty, NET),
            mask=(o_i < IN_P)[:, None] & (o_n < OUT_P)[None, :],
        )


@triton.jit
def fold_kernel(
    w_ptr,
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
    BIAS: tl.constexpr,
    NET: tl.constexpr,
    BI: tl.constexpr,
    BN: tl.constexpr,
):
    """`fold_columns` of all members' columns of one layer, without a norm."""
    i_e = tl.program_id(1).to(tl.int64)
    p_w = w_ptr + i_e * stride_e
    fold_columns(
        p_w, p_w, p_w, b_ptr + i_e * OUT, w_out_ptr + i_e * stride_out, b_out_ptr + i_e * OUT_P, tl.program_id(0),
        stride_in, IN, OUT, IN_P, OUT_P, False, BIAS, NET, BI, BN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["state_stride", "time_stride", "first", "n_e"])
def fold_network_kernel(
    state_ptr,  # [E, F, H[0]] the first layer's rows of the state, members state_stride apart
    time_ptr,  # [E, T, H[0]] and of time, with TIME
    weights,  # of the layers behind the first and of the head, [E, H[l - 1], H[l]], one pointer each; likewise:
    biases,
    scales,  # [E, H[l - 1]] of the norm before the layer, with NORM
    shifts,
    w_feat_ptr,  # of all fields, see pack.Packed
    w_time_ptr,
    w_hidden_ptr,
    b_hidden_ptr,
    w_out_ptr,
    b_out_ptr,
    state_stride,
    time_stride,
    first,  # the field's first member among all n_e
    n_e,
    NET: tl.constexpr,
    NORM: tl.constexpr,
    TIME: tl.constexpr,
    BI: tl.constexpr,
    BN: tl.constexpr,
):
    """All of a field's layers: program (i_n, l, member) folds some columns of layer l."""
    i_n = tl.program_id(0)
    i_l = tl.program_id(1)
    i_e = tl.program_id(2).to(tl.int64)
    at = first + i_e
    L: tl.constexpr = NET.L
    if i_l == 0:
        H: tl.constexpr = NET.H[0]
        HP: tl.constexpr = NET.HP[0]
        BN0: tl.constexpr = BN if BN < HP else HP
        if i_n * BN0 < HP:
            p = state_ptr + i_e * state_stride
            fold_columns(
                p, p, p, p, w_feat_ptr + at * NET.FP * HP, p, i_n, H, NET.F, H, NET.FP, HP, False, False, NET, BI, BN0
            )
            if TIME:
                p_t = time_ptr + i_e * time_stride
                p_out = w_time_ptr + at * NET.TP * HP
                fold_columns(p_t, p_t, p_t, p_t, p_out, p_t, i_n, H, NET.T, H, NET.TP, HP, False, False, NET, BI, BN0)
    for l in tl.static_range(1, L):
        if (i_l == l) & (i_n * BN < NET.HP[l]):
            p_w_out = w_hidden_ptr + n_e * NET.OFF_W[l] + at * NET.KP[l] * NET.HP[l]
            p_b_out = b_hidden_ptr + n_e * NET.OFF[l] + at * NET.HP[l]
            fold_layer(
                weights[l - 1], biases[l - 1], scales[l - 1], shifts[l - 1], p_w_out, p_b_out, i_n, i_e,
                NET.H[l - 1], NET.H[l], NET.KP[l], NET.HP[l], NORM, NET, BI, BN if NET.HP[l] > BN else NET.HP[l],
            )  # fmt: skip
    if (i_l == L) & (i_n * BN < NET.DP):
        p_h_out = w_out_ptr + at * NET.HP[L - 1] * NET.DP
        fold_layer(
            weights[L - 1], biases[L - 1], scales[L - 1], shifts[L - 1], p_h_out, b_out_ptr + at * NET.DP, i_n, i_e,
            NET.H[L - 1], NET.D, NET.HP[L - 1], NET.DP, NORM, NET, BI, BN if BN < NET.DP else NET.DP,
        )  # fmt: skip


@triton.jit
def fold_layer(
    w_ptr,
    b_ptr,
    scale_ptr,
    shift_ptr,
    p_w_out,
    p_b_out,
    i_n,
    i_e,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    IN_P: tl.constexpr,
    OUT_P: tl.constexpr,
    NORM: tl.constexpr,
    NET: tl.constexpr,
    BI: tl.constexpr,
    BN: tl.constexpr,
):
    """`fold_columns` of member i_e of a layer whose rows are dense."""
    fold_columns(
        w_ptr + i_e * IN * OUT, scale_ptr + i_e * IN, shift_ptr + i_e * IN, b_ptr + i_e * OUT, p_w_out, p_b_out, i_n,
        OUT, IN, OUT, IN_P, OUT_P, NORM, True, NET, BI, BN,
    )  # fmt: skip


def fold(w: Tensor, b: Tensor | None, w_out: Tensor, b_out: Tensor | None) -> None:
    """Write W to w_out [E, IN_P, OUT_P], padded and cast, and b to b_out [E, OUT_P]; None for no bias.

    w_out may be rows of a larger packed matrix; its rows are dense.
    """
    if w.stride(-1) != 1:
        w = w.contiguous()
    e, n_in, n_out = w.shape
    in_p, out_p = w_out.shape[1:]
    bn = min(32, out_p)
    fold_kernel[(triton.cdiv(out_p, bn), e)](
        w,
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
        BIAS=b is not None,
        NET=Arithmetic.of(w_out.dtype),
        BI=64,
        BN=bn,
        num_warps=4,
    )
