"""From the products that reduce over rows to the gradients of a network's parameters, as they are laid out: the way
back through the fold and through the first layer's parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .integrate import stage_time
from .launch import Arithmetic
from .pack import Pairs, net_shape
from .tile import cast, embed_time

# Rows and columns of a program.
_BI, _BN = 16, 64


@dataclass
class Sums:
    """Products that reduce over rows, of all members, float32 and padded."""

    w: list[Tensor]  # [E, KP, HP] of every layer behind the first, [E, HP, DP] of the head
    b: list[Tensor]  # [E, HP], [E, DP] of their biases
    state: Tensor  # [E, FP, HP[0]] of the first layer's rows of the state
    table: Tensor  # [E, N, HP[0]] of Prepared.time
    time: Tensor | None = None  # [E, TP, HP[0]] of the first layer's rows of time, where rows have times of their own
    films: Sequence[Tensor] = ()  # [E, TP, 2 H[l]]
    norm: Tensor | None = None  # [2, E, sum HP] of scales and shifts that are not folded

    def plus(self, other: Sums) -> Sums:
        """Those of more rows."""

        def each(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
            return [x + y for x, y in zip(xs, ys, strict=True)]

        return Sums(
            each(self.w, other.w),
            each(self.b, other.b),
            self.state + other.state,
            self.table + other.table,
            None if self.time is None or other.time is None else self.time + other.time,
            each(self.films, other.films),
            None if self.norm is None or other.norm is None else self.norm + other.norm,
        )


@triton.jit
def unfold_rows(
    p_g,
    p_db,
    p_w,
    p_scale,
    p_shift,
    p_dw,
    p_bias,
    p_dscale,
    p_dshift,
    i_i,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    OUT_P: tl.constexpr,
    NORM: tl.constexpr,
    ROUND: tl.constexpr,
    BI: tl.constexpr,
    BN: tl.constexpr,
):
    """One member's rows from i_i BI on. With G = xhat^T dpre [IN_P, OUT_P] and db = sum of dpre, under NORM

        dW = diag(scale) G + shift db^T,    dscale = rowsum(W o G),    dshift = W db

    else dW = G.
    """
    DTYPE: tl.constexpr = p_dw.dtype.element_ty
    o_i = i_i * BI + tl.arange(0, BI)
    m_i = o_i < IN
    b_dscale = tl.zeros([BI], tl.float32)
    b_dshift = tl.zeros([BI], tl.float32)
    if NORM:
        b_scale = tl.load(p_scale + o_i, mask=m_i, other=0.0).to(tl.float32)
        b_shift = tl.load(p_shift + o_i, mask=m_i, other=0.0).to(tl.float32)
    for n in tl.range(0, OUT, BN):
        o_n = n + tl.arange(0, BN)
        m_n = o_n < OUT
        m = m_i[:, None] & m_n[None, :]
        o = o_i[:, None] * OUT + o_n[None, :]
        b_dw = tl.load(p_g + o_i[:, None] * OUT_P + o_n[None, :], mask=m, other=0.0)
        b_db = tl.load(p_db + o_n, mask=m_n, other=0.0)
        if NORM:
            b_w = tl.load(p_w + o, mask=m, other=0.0).to(tl.float32)
            b_dscale += tl.sum(b_w * b_dw, 1)
            b_dshift += tl.sum(b_w * b_db[None, :], 1)
            b_dw = b_scale[:, None] * b_dw + b_shift[:, None] * b_db[None, :]
        tl.store(p_dw + o, cast(b_dw, DTYPE, ROUND), mask=m)
        tl.store(p_bias + o_n, cast(b_db, DTYPE, ROUND), mask=m_n & (i_i == 0))
    if NORM:
        tl.store(p_dscale + o_i, cast(b_dscale, DTYPE, ROUND), mask=m_i)
        tl.store(p_dshift + o_i, cast(b_dshift, DTYPE, ROUND), mask=m_i)


@triton.jit
def first_rows(
    p_c,
    p_state,
    p_time,
    p_table,
    p_dw,
    p_bias,
    i_i,
    c_stride,
    N,
    num_steps,
    start,
    end,
    C: tl.constexpr,
    NET: tl.constexpr,
    V: tl.constexpr,
    METHOD: tl.constexpr,
    ROUND: tl.constexpr,
    BI: tl.constexpr,
    BN: tl.constexpr,
):
    """Rows of the first layer, whose inputs are cond, state and time side by side: from their products, with TABLE
    features(t)^T d_table for those of time. The bias is the table's sum."""
    DTYPE: tl.constexpr = p_dw.dtype.element_ty
    H: tl.constexpr = NET.H[0]
    HP: tl.constexpr = NET.HP[0]
    F: tl.constexpr = NET.F
    T: tl.constexpr = NET.T
    BK: tl.constexpr = 16
    o_i = i_i * BI + tl.arange(0, BI)
    o_f = o_i - C
    o_t = o_f - F
    m_f = (o_f >= 0) & (o_f < F)
    m_t = (o_t >= 0) & (o_t < T)
    # A table's rows are read where there is anything to be made of them.
    some = tl.where((i_i == 0) | ((i_i + 1) * BI > C + F), N, 0)
    for n in tl.range(0, H, BN):
        o_n = n + tl.arange(0, BN)
        m_n = o_n < H
        b_dw = tl.load(p_state + o_f[:, None] * HP + o_n[None, :], mask=m_f[:, None] & m_n[None, :], other=0.0)
        if NET.COND:
            m_c = (o_i < C)[:, None] & m_n[None, :]
            b_dw += tl.load(p_c + o_i[:, None] * c_stride + o_n[None, :], mask=m_c, other=0.0)
        if not NET.TABLE:
            b_dw += tl.load(p_time + o_t[:, None] * HP + o_n[None, :], mask=m_t[:, None] & m_n[None, :], other=0.0)
        b_bias = tl.zeros([BN], tl.float32)
        for k in tl.range(0, some, BK):
            o_k = k + tl.arange(0, BK)
            m_k = (o_k < N)[:, None] & m_n[None, :]
            b_table = tl.load(p_table + o_k[:, None] * HP + o_n[None, :], mask=m_k, other=0.0)
            b_bias += tl.sum(b_table, 0)
            if NET.TABLE:
                b_part = stage_time(o_k, V, METHOD) / num_steps
                b_t = ((1.0 - b_part) * start + b_part * end)[:, None]
                b_features = tl.where(m_t[None, :], embed_time(b_t, o_t, NET), 0.0)
                b_dw += tl.dot(tl.trans(b_features), b_table, input_precision="ieee")
        m_i = (o_i < C + F + T)[:, None] & m_n[None, :]
        tl.store(p_dw + o_i[:, None] * H + o_n[None, :], cast(b_dw, DTYPE, ROUND), mask=m_i)
        tl.store(p_bias + o_n, cast(b_bias, DTYPE, ROUND), mask=m_n & (i_i == 0))


@triton.jit(do_not_specialize=["first", "c_stride_e", "c_stride", "N", "num_steps"])
def unfold_network_kernel(
    products,  # of the layers behind the first and of the head, see Sums; one pointer each, likewise:
    sums,
    weights,  # [E, H[l - 1], H[l]] the field's own
    scales,  # [E, H[l - 1]] of the norm before the layer, with NORM
    shifts,
    d_weights,  # results, laid out as the field's own
    d_biases,
    d_scales,
    d_shifts,
    c_ptr,  # cond^T d_c of all fields, [E, C, HP[0]] with these strides
    state_ptr,  # see Sums
    time_ptr,
    table_ptr,
    d_first_ptr,  # [E, C + F + T, H[0]] result
    d_first_bias_ptr,  # [E, H[0]] result
    first,  # the field's first member among all
    c_stride_e,
    c_stride,
    N,
    num_steps,
    start,
    end,
    C: tl.constexpr,
    NET: tl.constexpr,
    NORM: tl.constexpr,
    V: tl.constexpr,
    METHOD: tl.constexpr,
    ROUND: tl.constexpr,
    BI: tl.constexpr,
    BN: tl.constexpr,
):
    """All of a field's gradients: program (i_i, l, member) those of some rows of layer l + 1, or of the first."""
    i_i = tl.program_id(0)
    i_l = tl.program_id(1)
    i_e = tl.program_id(2).to(tl.int64)
    at = first + i_e
    L: tl.constexpr = NET.L
    H: tl.constexpr = NET.H[0]
    HP: tl.constexpr = NET.HP[0]
    ROWS: tl.constexpr = C + NET.F + NET.T
    if (i_l == L) & (i_i * BI < ROWS):
        first_rows(
            c_ptr + at * c_stride_e, state_ptr + at * NET.FP * HP, time_ptr + at * NET.TP * HP,
            table_ptr + at * N * HP, d_first_ptr + i_e * ROWS * H, d_first_bias_ptr + i_e * H, i_i, c_stride,
            N, num_steps, start, end, C, NET, V, METHOD, ROUND, BI, BN,
        )  # fmt: skip
    for l in tl.static_range(1, L):
        if (i_l == l - 1) & (i_i * BI < NET.H[l - 1]):
            unfold_layer(
                products[l - 1], sums[l - 1], weights[l - 1], scales[l - 1], shifts[l - 1], d_weights[l - 1],
                d_biases[l - 1], d_scales[l - 1], d_shifts[l - 1], at, i_e, i_i, NET.H[l - 1], NET.HP[l - 1],
                NET.H[l], NET.HP[l], NORM, ROUND, BI, BN,
            )  # fmt: skip
    if (i_l == L - 1) & (i_i * BI < NET.H[L - 1]):
        unfold_layer(
            products[L - 1], sums[L - 1], weights[L - 1], scales[L - 1], shifts[L - 1], d_weights[L - 1],
            d_biases[L - 1], d_scales[L - 1], d_shifts[L - 1], at, i_e, i_i, NET.H[L - 1], NET.HP[L - 1],
            NET.D, NET.DP, NORM, ROUND, BI, 16 if NET.D <= 16 else BN,
        )  # fmt: skip


@triton.jit
def unfold_layer(
    g_ptr,
    db_ptr,
    w_ptr,
    scale_ptr,
    shift_ptr,
    dw_ptr,
    bias_ptr,
    dscale_ptr,
    dshift_ptr,
    at,
    i_e,
    i_i,
    IN: tl.constexpr,
    IN_P: tl.constexpr,
    OUT: tl.constexpr,
    OUT_P: tl.constexpr,
    NORM: tl.constexpr,
    ROUND: tl.constexpr,
    BI: tl.constexpr,
    BN: tl.constexpr,
):
    """`unfold_rows` of member i_e of a field, which is `at` of all fields."""
    unfold_rows(
        g_ptr + at * IN_P * OUT_P, db_ptr + at * OUT_P, w_ptr + i_e * IN * OUT, scale_ptr + i_e * IN,
        shift_ptr + i_e * IN, dw_ptr + i_e * IN * OUT, bias_ptr + i_e * OUT, dscale_ptr + i_e * IN,
        dshift_ptr + i_e * IN, i_i, IN, OUT, OUT_P, NORM, ROUND, BI, BN,
    )  # fmt: skip


def unfold_network(
    sums: Sums,
    cond: Tensor | None,
    layers: Pairs,
    norms: Pairs,
    results: tuple[Pairs, Pairs],
    first: int,
    times: tuple[float, float] | None,
    num_steps: int,
    method: str,
    net: plan.Network,
) -> None:
    """Write the gradients of a field's layers behind the first, head and norms to `results` (layers, norms), those of
    its whole first layer too if `times` or `sums.time` say what its time features were.

    Args:
        sums: of all fields.
        cond: [E, C, HP[0]] float32, cond^T d_c of all fields, its last axis dense; None without.
        layers, norms: the field's parameters, each with its E axis.
        results: contiguous tensors of their shapes and one dtype; the first layer's are not touched where neither
            `times` nor `sums.time` is there.
        first: the field's first member among all.
        times, num_steps, method: of a walk whose rows share their times.
    """
    norm = net.norm == "after"
    behind = [(w.contiguous(), b) for w, b in layers[1:]]
    scaled = [(scale.contiguous(), shift.contiguous()) for scale, shift in norms] if norm else behind
    d_layers, d_norms = results
    d_scaled = d_norms if norm else d_layers[1:]
    whole = times is not None or sums.time is not None
    cond = sums.state if cond is None else cond
    rows = max(*net.hidden, net.cond_dim + net.state_features + net.time_features if whole else 0)
    dtype = d_layers[1][0].dtype
    unfold_network_kernel[(triton.cdiv(rows, _BI), net.layers + whole, layers[1][0].shape[0])](
        tuple(sums.w),
        tuple(sums.b),
        tuple(w for w, _ in behind),
        tuple(scale for scale, _ in scaled),
        tuple(shift for _, shift in scaled),
        tuple(w for w, _ in d_layers[1:]),
        tuple(b for _, b in d_layers[1:]),
        tuple(scale for scale, _ in d_scaled),
        tuple(shift for _, shift in d_scaled),
        cond,
        sums.state,
        sums.state if sums.time is None else sums.time,
        sums.table,
        d_layers[0][0],
        d_layers[0][1],
        first,
        cond.stride(0),
        cond.stride(1),
        sums.table.shape[1],
        num_steps,
        *(times or (0.0, 0.0)),
        C=net.cond_dim,
        NET=net_shape(net, times is not None, plan.Tiles(_BI, _BN, 4, 1)),
        NORM=norm,
        V=plan.evaluations(method),
        METHOD=method,
        ROUND=Arithmetic.of(dtype),
        BI=_BI,
        BN=_BN,
        num_warps=4,
        enable_fp_fusion=True,
    )


def unfolded(sums: Sums, layers: Pairs, norms: Pairs, net: plan.Network) -> tuple[Pairs, Pairs]:
    """(layers, norms): float32 gradients of a folded network's layers behind the first, head and norms; the first
    layer's place holds nothing."""
    d_layers, d_norms = (
        [tuple(torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in pair) for pair in pairs]
        for pairs in (layers[1:], norms)
    )
    results = [(sums.state, sums.state), *((w, b) for w, b in d_layers)], [(w, b) for w, b in d_norms]
    without = Sums(sums.w, sums.b, sums.state, sums.table)
    unfold_network(without, None, layers, norms, results, 0, None, 1, "euler", net)
    return results
