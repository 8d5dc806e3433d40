"""LayerNorm folded into the Dense layer behind it where it can be, and all layers padded and cast for the kernels.
`unfold` is the way back."""

from __future__ import annotations

import triton
import triton.language as tl

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
    STRIDE_OUT: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    NET: tl.constexpr,
    BI: tl.constexpr,
    BN: tl.constexpr,
):
    """One member's columns from i_n BN on: W'' = diag(scale) W minus its column means (W itself without NORM) as [IN_P,
    OUT_P] with rows STRIDE_OUT apart, b' = b + shift W as [OUT_P]."""
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
            p_w_out + o_i[:, None] * STRIDE_OUT + o_n[None, :],
            cast(b_w, p_w_out.dtype.element_ty, NET),
            mask=(o_i < IN_P)[:, None] & (o_n < OUT_P)[None, :],
        )


@triton.jit(do_not_specialize=["weight_stride", "first", "n_e"])
def fold_network_kernel(
    weight_ptr,  # [E, C + F + T, H[0]] the first layer, whose rows of cond are left out
    weights,  # of the layers behind the first and of the head, [E, H[l - 1], H[l]], one pointer each; likewise:
    biases,
    scales,  # [E, H[l]] of every norm, with NORM
    shifts,
    films,  # [E, FILM, 2 H[l]] of which the last T rows count, with FILM
    w_feat_ptr,  # of all fields, see pack.Packed
    w_time_ptr,
    w_film_ptr,
    w_hidden_ptr,
    b_hidden_ptr,
    scale_ptr,
    shift_ptr,
    w_out_ptr,
    b_out_ptr,
    weight_stride,
    first,  # the field's first member among all n_e
    n_e,
    C: tl.constexpr,
    NET: tl.constexpr,
    ROW: tl.constexpr,  # of every layer and input: rows of its weights before those of the input
    ROW_P: tl.constexpr,  # the same, padded
    NORM: tl.constexpr,  # "fold", "keep" or "none"
    TIME: tl.constexpr,
    FILM: tl.constexpr,
    BI: tl.constexpr,
    BN: tl.constexpr,
):
    """All of a field's layers: program (i_n, l, member) folds some columns of layer l, or pads them where its norm
    cannot be folded."""
    i_n = tl.program_id(0)
    i_l = tl.program_id(1)
    i_e = tl.program_id(2).to(tl.int64)
    at = first + i_e
    L: tl.constexpr = NET.L
    FOLD: tl.constexpr = NORM == "fold"
    if i_l == 0:
        H: tl.constexpr = NET.H[0]
        HP: tl.constexpr = NET.HP[0]
        BN0: tl.constexpr = BN if BN < HP else HP
        if i_n * BN0 < HP:
            p = weight_ptr + i_e * weight_stride + C * H
            p_out = w_feat_ptr + at * NET.FP * HP
            fold_columns(p, p, p, p, p_out, p, i_n, H, NET.F, H, NET.FP, HP, HP, False, False, NET, BI, BN0)
            if TIME:
                p_t = p + NET.F * H
                p_t_out = w_time_ptr + at * NET.TP * HP
                fold_columns(
                    p_t, p_t, p_t, p_t, p_t_out, p_t, i_n, H, NET.T, H, NET.TP, HP, HP, False, False, NET, BI, BN0
                )
    for l in tl.static_range(1, L):
        if (i_l == l) & (i_n * BN < NET.HP[l]):
            p_w_out = w_hidden_ptr + n_e * NET.OFF_W[l] + at * NET.KP[l] * NET.HP[l]
            for j in tl.static_range(len(NET.IN[l])):
                fold_layer(
                    weights[l - 1], biases[l - 1], scales[l - 1], shifts[l - 1],
                    p_w_out + ROW_P[l][j] * NET.HP[l], b_hidden_ptr + n_e * NET.OFF[l] + at * NET.HP[l], i_n, i_e,
                    ROW[l][j], ROW[l][-1] + NET.H[NET.IN[l][-1]], NET.H[NET.IN[l][j]], NET.H[l],
                    NET.HP[NET.IN[l][j]], NET.HP[l], FOLD, j == 0, NET, BI, BN if NET.HP[l] > BN else NET.HP[l],
                )  # fmt: skip
    if (i_l == L) & (i_n * BN < NET.DP):
        p_h_out = w_out_ptr + at * NET.HP[L - 1] * NET.DP
        fold_layer(
            weights[L - 1], biases[L - 1], scales[L - 1], shifts[L - 1], p_h_out, b_out_ptr + at * NET.DP, i_n, i_e,
            0, NET.H[L - 1], NET.H[L - 1], NET.D, NET.HP[L - 1], NET.DP, FOLD, True, NET, BI,
            BN if BN < NET.DP else NET.DP,
        )  # fmt: skip
    if NORM == "keep":
        for l in tl.static_range(L):
            if (i_l == l) & (i_n * BN < NET.HP[l]):
                o_p = n_e * NET.OFF[l] + at * NET.HP[l]
                pad_columns(scales[l] + i_e * NET.H[l], scale_ptr + o_p, i_n, NET.H[l], NET.HP[l], BN)
                pad_columns(shifts[l] + i_e * NET.H[l], shift_ptr + o_p, i_n, NET.H[l], NET.HP[l], BN)
    if FILM > 0:
        for l in tl.static_range(L):
            if (i_l == l) & (i_n * BN < NET.HP[l]):
                p_f = films[l] + ((i_e + 1) * FILM - NET.T) * 2 * NET.H[l]
                p_f_out = w_film_ptr + (n_e * NET.OFF[l] + at * NET.HP[l]) * NET.TP * 2
                BNF: tl.constexpr = BN if NET.HP[l] > BN else NET.HP[l]
                for half in tl.static_range(2):
                    fold_columns(
                        p_f + half * NET.H[l], p_f, p_f, p_f, p_f_out + half * NET.HP[l], p_f, i_n, 2 * NET.H[l],
                        NET.T, NET.H[l], NET.TP, NET.HP[l], 2 * NET.HP[l], False, False, NET, BI, BNF,
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
    ROW: tl.constexpr,
    ROWS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    IN_P: tl.constexpr,
    OUT_P: tl.constexpr,
    FOLD: tl.constexpr,
    BIAS: tl.constexpr,
    NET: tl.constexpr,
    BI: tl.constexpr,
    BN: tl.constexpr,
):
    """`fold_columns` of member i_e of a layer, of the IN of its ROWS rows from ROW on."""
    fold_columns(
        w_ptr + (i_e * ROWS + ROW) * OUT, scale_ptr + i_e * IN, shift_ptr + i_e * IN, b_ptr + i_e * OUT, p_w_out,
        p_b_out, i_n, OUT, IN, OUT, IN_P, OUT_P, OUT_P, FOLD, BIAS, NET, BI, BN,
    )  # fmt: skip


@triton.jit
def pad_columns(p_x, p_out, i_n, H: tl.constexpr, HP: tl.constexpr, BN: tl.constexpr):
    """A vector's columns from i_n BN on, padded with zeros."""
    o_n = i_n * BN + tl.arange(0, BN)
    tl.store(p_out + o_n, tl.load(p_x + o_n, mask=o_n < H, other=0.0).to(tl.float32), mask=o_n < HP)
