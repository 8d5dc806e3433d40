"""From the products that reduce over rows to the gradients of a network's parameters, as they are laid out: the way
back through the fold and through the first layer's parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .integrate import stage_time
from .launch import Arithmetic
from .pack import Parameters, input_rows, net_shape
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
    films: Sequence[Tensor] = ()  # [E, TP, 2 HP[l]] of FiLM's rows of time, likewise
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


@dataclass
class Given:
    """What came back through the preparation of one field, float32; None or nothing where that has no such part."""

    cond: Tensor | None = None  # [E, C, HP[0]] of the first layer's rows of cond, padded; likewise:
    time: Tensor | None = None  # [E, >= T, HP[0]] of time, where the kernels do not embed times that all rows share
    film_cond: Tensor | None = None  # [E, K, 2 sum HP] of FiLM's rows of encoded cond
    film_bias: Tensor | None = None  # [E, 2 sum HP]
    film_time: Sequence[Tensor] = ()  # [E, >= T, 2 HP[l]] of time
    encoder: Sequence[Tensor] = ()  # weights and biases in turns, as they are: of the MLP that cond goes through
    mlp: Sequence[Tensor] = ()  # and of the one behind the time embedding


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
    BIAS: tl.constexpr,
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
        tl.store(p_bias + o_n, cast(b_db, DTYPE, ROUND), mask=m_n & (i_i == 0) & BIAS)
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


@triton.jit(
    do_not_specialize=["first", "n_e", "c_stride_e", "c_stride", "time_stride", "film_cond_stride", "N", "num_steps"]
)
def unfold_network_kernel(
    products,  # of the layers behind the first and of the head, see Sums; one pointer each, likewise:
    sums,
    weights,  # [E, H[l - 1], H[l]] the field's own
    scales,  # [E, H[l]] of every norm, with NORM
    shifts,
    d_weights,  # results, laid out as the field's own
    d_biases,
    d_scales,
    d_shifts,
    d_films,
    d_film_biases,
    film_times,  # see Given
    c_ptr,
    state_ptr,  # see Sums
    time_ptr,  # see Given
    table_ptr,  # see Sums
    norm_ptr,
    film_cond_ptr,  # see Given
    film_bias_ptr,
    d_first_ptr,  # [E, C + F + T, H[0]] result
    d_first_bias_ptr,  # [E, H[0]] result
    first,  # the field's first member among all n_e
    n_e,
    c_stride_e,
    c_stride,
    time_stride,
    film_cond_stride,
    N,
    num_steps,
    start,
    end,
    C: tl.constexpr,
    NET: tl.constexpr,
    ROW: tl.constexpr,  # of every layer and input: rows of its weights before those of the input
    ROW_P: tl.constexpr,  # the same, padded
    NORM: tl.constexpr,  # "fold", "keep" or "none"
    FILM: tl.constexpr,  # rows of FiLM's weights
    FILM_C: tl.constexpr,  # and of cond among them
    FILM_TIME: tl.constexpr,  # strides of members and rows of every layer's film_times
    V: tl.constexpr,
    METHOD: tl.constexpr,
    ROUND: tl.constexpr,
    BI: tl.constexpr,
    BN: tl.constexpr,
):
    """All of a field's gradients but those of MLPs before it: program (i_i, l, member) those of some rows of layer
    l + 1, or of the first, and of layer l's norm."""
    i_i = tl.program_id(0)
    i_l = tl.program_id(1)
    i_e = tl.program_id(2).to(tl.int64)
    at = first + i_e
    L: tl.constexpr = NET.L
    H: tl.constexpr = NET.H[0]
    HP: tl.constexpr = NET.HP[0]
    ROWS: tl.constexpr = C + NET.F + NET.T
    SUM: tl.constexpr = NET.OFF[L - 1] + NET.HP[L - 1]
    FOLD: tl.constexpr = NORM == "fold"
    if (i_l == L) & (i_i * BI < ROWS):
        first_rows(
            c_ptr + i_e * c_stride_e, state_ptr + at * NET.FP * HP, time_ptr + i_e * time_stride,
            table_ptr + at * N * HP, d_first_ptr + i_e * ROWS * H, d_first_bias_ptr + i_e * H, i_i, c_stride,
            N, num_steps, start, end, C, NET, V, METHOD, ROUND, BI, BN,
        )  # fmt: skip
    for l in tl.static_range(1, L):
        if i_l == l - 1:
            for j in tl.static_range(len(NET.IN[l])):
                unfold_layer(
                    products[l - 1], sums[l - 1], weights[l - 1], scales[l - 1], shifts[l - 1], d_weights[l - 1],
                    d_biases[l - 1], d_scales[l - 1], d_shifts[l - 1], at, i_e, i_i, ROW[l][j], ROW_P[l][j],
                    ROW[l][-1] + NET.H[NET.IN[l][-1]], NET.KP[l], NET.H[NET.IN[l][j]], NET.H[l], NET.HP[l], FOLD,
                    j == 0, ROUND, BI, BN,
                )  # fmt: skip
    if i_l == L - 1:
        unfold_layer(
            products[L - 1], sums[L - 1], weights[L - 1], scales[L - 1], shifts[L - 1], d_weights[L - 1],
            d_biases[L - 1], d_scales[L - 1], d_shifts[L - 1], at, i_e, i_i, 0, 0, NET.H[L - 1], NET.HP[L - 1],
            NET.H[L - 1], NET.D, NET.DP, FOLD, True, ROUND, BI, 16 if NET.D <= 16 else BN,
        )  # fmt: skip
    if NORM == "keep":
        for l in tl.static_range(L):
            if i_l == l:
                p_norm = norm_ptr + at * SUM + NET.OFF[l]
                crop(p_norm, d_scales[l] + i_e * NET.H[l], i_i, NET.H[l], ROUND, BI)
                crop(p_norm + n_e.to(tl.int64) * SUM, d_shifts[l] + i_e * NET.H[l], i_i, NET.H[l], ROUND, BI)
    if FILM > 0:
        for l in tl.static_range(L):
            if (i_l == l) & (i_i * BI < FILM):
                for half in tl.static_range(2):
                    o_out = half * NET.H[l]
                    film_rows(
                        film_cond_ptr + i_e * film_cond_stride + 2 * NET.OFF[l] + half * NET.HP[l],
                        film_times[l] + i_e * FILM_TIME[l][0] + half * NET.HP[l],
                        film_bias_ptr + i_e * 2 * SUM + 2 * NET.OFF[l] + half * NET.HP[l],
                        d_films[l] + i_e * FILM * 2 * NET.H[l] + o_out,
                        d_film_biases[l] + i_e * 2 * NET.H[l] + o_out, i_i, 2 * SUM, FILM_TIME[l][1], NET.H[l], FILM,
                        FILM_C, ROUND, BI, BN,
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
    ROW: tl.constexpr,
    ROW_P: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_P: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    OUT_P: tl.constexpr,
    FOLD: tl.constexpr,
    BIAS: tl.constexpr,
    ROUND: tl.constexpr,
    BI: tl.constexpr,
    BN: tl.constexpr,
):
    """`unfold_rows` of member i_e of a field, which is `at` of all fields, of the IN of a layer's ROWS rows from ROW
    on."""
    if i_i * BI < IN:
        o_w = (i_e * ROWS + ROW) * OUT
        unfold_rows(
            g_ptr + (at * ROWS_P + ROW_P) * OUT_P, db_ptr + at * OUT_P, w_ptr + o_w, scale_ptr + i_e * IN,
            shift_ptr + i_e * IN, dw_ptr + o_w, bias_ptr + i_e * OUT, dscale_ptr + i_e * IN, dshift_ptr + i_e * IN,
            i_i, IN, OUT, OUT_P, FOLD, BIAS, ROUND, BI, BN,
        )  # fmt: skip


@triton.jit
def crop(p_x, p_out, i_i, H: tl.constexpr, ROUND: tl.constexpr, BI: tl.constexpr):
    """A vector's columns from i_i BI on, without padding."""
    o = i_i * BI + tl.arange(0, BI)
    b_x = tl.load(p_x + o, mask=o < H, other=0.0)
    tl.store(p_out + o, cast(b_x, p_out.dtype.element_ty, ROUND), mask=o < H)


@triton.jit
def film_rows(
    p_cond,
    p_time,
    p_bias,
    p_dw,
    p_dbias,
    i_i,
    COND_ROW: tl.constexpr,
    TIME_ROW: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    ROUND: tl.constexpr,
    BI: tl.constexpr,
    BN: tl.constexpr,
):
    """Rows of one half, scale or shift, of a layer's FiLM, whose inputs are cond and time side by side."""
    DTYPE: tl.constexpr = p_dw.dtype.element_ty
    o_i = i_i * BI + tl.arange(0, BI)
    for n in tl.range(0, H, BN):
        o_n = n + tl.arange(0, BN)
        m_n = o_n < H
        m_c = (o_i < C)[:, None] & m_n[None, :]
        m_t = ((o_i >= C) & (o_i < ROWS))[:, None] & m_n[None, :]
        b_dw = tl.load(p_time + (o_i - C)[:, None] * TIME_ROW + o_n[None, :], mask=m_t, other=0.0)
        if C > 0:
            b_dw += tl.load(p_cond + o_i[:, None] * COND_ROW + o_n[None, :], mask=m_c, other=0.0)
        tl.store(p_dw + o_i[:, None] * (2 * H) + o_n[None, :], cast(b_dw, DTYPE, ROUND), mask=m_c | m_t)
        b_bias = tl.load(p_bias + o_n, mask=m_n, other=0.0)
        tl.store(p_dbias + o_n, cast(b_bias, DTYPE, ROUND), mask=m_n & (i_i == 0))


def unfold_network(
    sums: Sums,
    given: Given,
    field: Parameters,
    results: Parameters,
    first: int,
    times: tuple[float, float] | None,
    num_steps: int,
    method: str,
    net: plan.Network,
) -> None:
    """Write the gradients of a field's layers, norms and FiLM to `results`.

    Args:
        sums: of all fields.
        given: of the field.
        field: the field's parameters, contiguous.
        results: contiguous tensors of their shapes and one dtype.
        first: the field's first member among all.
        times, num_steps, method: of a walk whose rows share their times; they count where `given` has nothing of time.
    """
    film, normed = net.norm == "film", net.norm in ("after", "before")
    table = times is not None and not film and given.time is None
    behind = field.layers[1:]
    norms, d_norms = (field.norms, results.norms) if normed else (behind, results.layers[1:])
    films = results.films if film else results.layers[1:]
    film_times = given.film_time if film else [sums.state]
    cond, time = (sums.state if x is None else x for x in (given.cond, given.time))
    film_cond, film_bias, norm = (sums.state if x is None else x for x in (given.film_cond, given.film_bias, sums.norm))
    # FiLM's first layer takes the state alone.
    plain = dataclasses.replace(net, cond_dim=0, time_features=0) if film else net
    film_width = films[0][0].shape[1] if film else 0
    rows = max(*net.hidden, plain.cond_dim + plain.state_features + plain.time_features, film_width)
    w, b = zip(*results.layers[1:], strict=True)
    unfold_network_kernel[(triton.cdiv(rows, _BI), net.layers + 1, behind[0][0].shape[0])](
        tuple(sums.w),
        tuple(sums.b),
        tuple(weight for weight, _ in behind),
        tuple(scale for scale, _ in norms),
        tuple(shift for _, shift in norms),
        w,
        b,
        tuple(scale for scale, _ in d_norms),
        tuple(shift for _, shift in d_norms),
        tuple(w for w, _ in films),
        tuple(b for _, b in films),
        tuple(film_times),
        cond,
        sums.state,
        time,
        sums.table,
        norm,
        film_cond,
        film_bias,
        *results.layers[0],
        first,
        sums.state.shape[0],
        cond.stride(0),
        cond.stride(1),
        time.stride(0),
        film_cond.stride(0),
        sums.table.shape[1],
        num_steps,
        *((times if table else None) or (0.0, 0.0)),
        C=plain.cond_dim,
        NET=net_shape(plain, table, plan.Tiles(_BI, _BN, 4, 1)),
        **input_rows(net),
        NORM=("fold" if net.fold else "keep") if normed else "none",
        FILM=film_width,
        FILM_C=film_width - net.time_features if film else 0,
        FILM_TIME=tuple(x.stride()[:2] for x in film_times),
        V=plan.evaluations(method),
        METHOD=method,
        ROUND=Arithmetic.of(results.layers[0][0].dtype),
        BI=_BI,
        BN=_BN,
        num_warps=4,
        enable_fp_fusion=True,
    )
