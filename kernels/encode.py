"""Networks that prepare a walk or a loss: time features, the MLPs that time and cond go through, and the weights that
take them to all hidden layers. And their way back."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .integrate import stage_time
from .launch import Arithmetic, batched_product, exact_products
from .pack import Pairs, stored_as
from .tile import activate, activate_grad, cast, embed_time, product

# One size for any number of rows: a row's bits do not depend on how many others there are.
_BM, _BN, _BK = 64, 64, 32


class Times(NamedTuple):
    """A time embedding in front of its MLP."""

    TIME: str  # raw | cosine | cosine_fourier | power_fourier | sinusoidal
    T: int
    SCALE: float = 1.0  # of sinusoidal: times are multiplied by it
    LOG_PERIOD: float = 1.0  # and its longest period's logarithm

    @property
    def exact(self) -> bool:
        """Whether float32 times are exact enough for its frequencies."""
        fastest = {"power_fourier": 2.0 ** (self.T // 2), "cosine_fourier": self.T, "sinusoidal": abs(self.SCALE) / 8}
        return fastest.get(self.TIME, 1.0) <= 256


@triton.jit(do_not_specialize=["M", "R", "num_steps", "start_stride", "end_stride", "out_stride_n", "out_stride"])
def features_kernel(
    start_ptr,  # [1 or E, M] each row's first and last time, unless SHARED
    end_ptr,
    out_ptr,  # [N, E, M, OUT], evaluations and members these strides apart
    M,
    R,  # N M
    num_steps,
    start_stride,  # of members; 0 where they share their times
    end_stride,
    out_stride_n,
    out_stride,
    start,  # with SHARED; each with what float32 leaves of it
    start_rest,
    end,
    end_rest,
    NET: tl.constexpr,
    V: tl.constexpr,
    METHOD: tl.constexpr,
    SHARED: tl.constexpr,
    OUT: tl.constexpr,
    ROUND: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
):
    """Time features of every evaluation and row; columns from T on are zero."""
    i_e = tl.program_id(2).to(tl.int64)
    o_r = tl.program_id(0) * BM + tl.arange(0, BM)
    o_t = tl.program_id(1) * BT + tl.arange(0, BT)
    m_r = o_r < R
    i_n = o_r // M
    if SHARED:
        # Rounded once: sinusoids of a thousand times t show every bit.
        b_part = stage_time(i_n, V, METHOD).to(tl.float64) / num_steps
        b_start = tl.zeros([BM], tl.float64) + start + start_rest
        b_end = tl.zeros([BM], tl.float64) + end + end_rest
    else:
        b_part = stage_time(i_n, V, METHOD) / num_steps
        b_start = tl.load(start_ptr + i_e * start_stride + o_r % M, mask=m_r, other=0.0).to(tl.float32)
        b_end = tl.load(end_ptr + i_e * end_stride + o_r % M, mask=m_r, other=0.0).to(tl.float32)
    b_t = ((1.0 - b_part) * b_start + b_part * b_end).to(tl.float32)[:, None]
    if NET.TIME == "sinusoidal":
        half: tl.constexpr = NET.T // 2
        k = (tl.minimum(o_t, NET.T - 1) % half).to(tl.float32)
        angle = (NET.SCALE * b_t) * tl.exp(k * (-NET.LOG_PERIOD / half))[None, :]
        b_f = tl.where((o_t < half)[None, :], tl.cos(angle), tl.sin(angle))
    else:
        b_f = embed_time(b_t, tl.minimum(o_t, NET.T - 1), NET)
    b_f = tl.where((o_t < NET.T)[None, :], b_f, 0.0)
    o_out = i_n.to(tl.int64) * out_stride_n + i_e * out_stride + (o_r % M) * OUT
    p_out = out_ptr + o_out[:, None] + o_t[None, :]
    tl.store(p_out, cast(b_f, out_ptr.dtype.element_ty, ROUND), mask=m_r[:, None] & (o_t < OUT)[None, :])


class Dense(NamedTuple):
    """Some rows of one weight, or of several with the same inputs whose columns come to stand side by side: constexpr
    argument NET of both kernels below."""

    PRECISION: str
    ARITH: str
    ACT: str  # the activation behind it, or the one whose derivative the way back meets; "" for none
    K: int  # inputs
    ROW: int  # rows of the weights before theirs
    ROWS: int  # and all in all
    COPIES: int  # blocks of columns of a weight, each padded on its own
    H: tuple[int, ...]  # columns of each weight's blocks
    HP: tuple[int, ...]  # the same, padded
    OFF: tuple[int, ...]  # padded columns of a block before the weight's own


@triton.jit(do_not_specialize=["M", "R", "samples", "x_stride", "y_stride_n", "y_stride", "add_stride"])
def dense_kernel(
    x_ptr,  # [1 or E, R, K] for R rows (evaluation, row)
    weights,  # [E, ROWS, COPIES H]
    biases,  # [E, COPIES H], with BIAS
    y_ptr,  # [N, E, M, COPIES sum HP], evaluations and members these strides apart
    pre_ptr,  # [E, R, COPIES sum HP] the same before the activation, with SAVE
    add_ptr,  # [E, M / samples, COPIES sum HP] float32, added to every evaluation with ADD
    stored_ptr,  # of the type that operands are rounded to
    M,
    R,  # N M
    samples,
    x_stride,
    y_stride_n,
    y_stride,
    add_stride,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    SAVE: tl.constexpr,
    NET: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y = activation(x W + b): program (i_m, i_n, member and weight)."""
    P: tl.constexpr = len(NET.H)
    DTYPE: tl.constexpr = stored_ptr.dtype.element_ty
    K: tl.constexpr = NET.K
    i_n = tl.program_id(1)
    i_e = (tl.program_id(2) // P).to(tl.int64)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = (o_m < R)[:, None]
    p_x = x_ptr + i_e * x_stride + o_m[:, None].to(tl.int64) * K
    for p in tl.static_range(P):
        if (tl.program_id(2) % P == p) & (i_n * BN < NET.COPIES * NET.HP[p]):
            HP: tl.constexpr = NET.HP[p]
            COLUMNS: tl.constexpr = NET.COPIES * NET.H[p]
            o_y = i_n * BN + tl.arange(0, BN)
            o_n = o_y // HP * NET.H[p] + o_y % HP
            m_n = (o_y % HP < NET.H[p]) & (o_y < NET.COPIES * HP)
            p_w = weights[p] + (i_e * NET.ROWS + NET.ROW) * COLUMNS + o_n[None, :]
            b_acc = tl.zeros([BM, BN], tl.float32)
            for k in tl.range(0, K, BK):
                o_k = k + tl.arange(0, BK)
                b_x = tl.load(p_x + o_k[None, :], mask=m_m & (o_k < K)[None, :], other=0.0).to(tl.float32)
                m_w = (o_k < K)[:, None] & m_n[None, :]
                b_w = tl.load(p_w + o_k[:, None] * COLUMNS, mask=m_w, other=0.0).to(tl.float32)
                b_acc += product(cast(b_x, DTYPE, NET), cast(b_w, DTYPE, NET), NET)
            if BIAS:
                b_acc += tl.load(biases[p] + i_e * COLUMNS + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
            SUM: tl.constexpr = NET.COPIES * (NET.OFF[P - 1] + NET.HP[P - 1])
            o_column = (NET.COPIES * NET.OFF[p] + o_y)[None, :]
            m_y = m_m & (o_y < NET.COPIES * HP)[None, :]
            if ADD:
                p_add = add_ptr + i_e * add_stride + (o_m % M // samples)[:, None].to(tl.int64) * SUM + o_column
                b_acc += tl.load(p_add, mask=m_y, other=0.0)
            o_out = (o_m // M).to(tl.int64) * y_stride_n + i_e * y_stride
            o_out = (o_out + (o_m % M).to(tl.int64) * SUM)[:, None] + o_column
            if SAVE:
                p_pre = pre_ptr + (i_e * R + o_m[:, None]) * SUM + o_column
                tl.store(p_pre, cast(b_acc, pre_ptr.dtype.element_ty, NET), mask=m_y)
            if NET.ACT != "":
                b_acc = activate(b_acc, NET)
            tl.store(y_ptr + o_out, cast(b_acc, y_ptr.dtype.element_ty, NET), mask=m_y)


@triton.jit
def through_weight(
    b_acc,
    p_d,
    p_w,
    m_m,
    m_k,
    H: tl.constexpr,
    HP: tl.constexpr,
    COPIES: tl.constexpr,
    DTYPE: tl.constexpr,
    NET: tl.constexpr,
    BK: tl.constexpr,
):
    """b_acc + d W^T of one weight's blocks of columns."""
    for copy in tl.static_range(COPIES):
        for n in tl.range(0, H, BK):
            o_n = n + tl.arange(0, BK)[None, :]
            m_n = o_n < H
            b_d = tl.load(p_d + copy * HP + o_n, mask=m_m & m_n, other=0.0).to(tl.float32)
            b_w = tl.load(p_w + copy * H + o_n, mask=m_k[:, None] & m_n, other=0.0).to(tl.float32)
            b_acc += product(cast(b_d, DTYPE, NET), tl.trans(cast(b_w, DTYPE, NET)), NET)
    return b_acc


@triton.jit(do_not_specialize=["M", "R", "first", "n_e", "d_rows", "d_all", "pre_stride", "dx_stride"])
def dense_bwd_kernel(
    d_ptr,  # [n_e, d_all, COPIES sum HP], or with STACKED one weight's [n_e, d_all, COPIES HP] behind the other's
    weights,  # see `dense_kernel`
    pre_ptr,  # [E, R, K] what the activation in front took, with ACT
    dx_ptr,  # [E, R, K] result for R rows (evaluation, row)
    stored_ptr,  # of the type that operands are rounded to
    M,
    R,  # N M
    first,  # the field's first member among all n_e of d
    n_e,
    d_rows,  # of d per evaluation, of which M count
    d_all,
    pre_stride,  # of members
    dx_stride,
    STACKED: tl.constexpr,
    NET: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """dx = sum of d W^T over all weights, times the derivative of the activation in front."""
    P: tl.constexpr = len(NET.H)
    K: tl.constexpr = NET.K
    SUM: tl.constexpr = NET.COPIES * (NET.OFF[P - 1] + NET.HP[P - 1])
    i_e = tl.program_id(2).to(tl.int64)
    at = first + i_e
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_k = tl.program_id(1) * BN + tl.arange(0, BN)
    m_m = (o_m < R)[:, None]
    m_k = o_k < K
    o_d = (o_m // M * d_rows + o_m % M)[:, None].to(tl.int64)
    b_acc = tl.zeros([BM, BN], tl.float32)
    for p in tl.static_range(P):
        if STACKED:
            p_d = d_ptr + (n_e * d_all * NET.OFF[p] + (at * d_all + o_d) * NET.HP[p]) * NET.COPIES
        else:
            p_d = d_ptr + (at * d_all + o_d) * SUM + NET.COPIES * NET.OFF[p]
        p_w = weights[p] + (i_e * NET.ROWS + NET.ROW + o_k[:, None]) * (NET.COPIES * NET.H[p])
        b_acc = through_weight(
            b_acc, p_d, p_w, m_m, m_k, NET.H[p], NET.HP[p], NET.COPIES, stored_ptr.dtype.element_ty, NET, BK
        )
    m_x = m_m & m_k[None, :]
    if NET.ACT != "":
        b_pre = tl.load(pre_ptr + i_e * pre_stride + o_m[:, None].to(tl.int64) * K + o_k[None, :], mask=m_x, other=0.0)
        b_acc = b_acc * activate_grad(b_pre.to(tl.float32), NET)[1]
    o_x = i_e * dx_stride + o_m[:, None].to(tl.int64) * K + o_k[None, :]
    tl.store(dx_ptr + o_x, cast(b_acc, dx_ptr.dtype.element_ty, NET), mask=m_x)


def _dense_net(
    inputs: Pairs, precision: str, activation: str, rows: tuple[int, int] | None, copies: int, padded: Sequence[int]
) -> Dense:
    height = inputs[0][0].shape[1]
    first, last = rows or (0, height)
    return Dense(
        *Arithmetic.of(stored_as(precision), "tf32" if precision == "tf32" else "ieee"),
        ACT=activation,
        K=last - first,
        ROW=first,
        ROWS=height,
        COPIES=copies,
        H=tuple(w.shape[2] // copies for w, _ in inputs),
        HP=tuple(padded),
        OFF=(0, *itertools.accumulate(padded))[:-1],
    )


def dense(
    x: Tensor,
    layers: Pairs,
    y: Tensor,
    precision: str,
    activation: str = "",
    bias: bool = True,
    rows: tuple[int, int] | None = None,
    copies: int = 1,
    padded: Sequence[int] = (),
    pre: Tensor | None = None,
    add: Tensor | None = None,
) -> None:
    """y = activation(x W + b + add), of several layers side by side.

    Args:
        x: [1 or E, N M, K], contiguous.
        layers: weights [E, I, copies H] and biases [E, copies H], contiguous; the biases count with `bias`.
        y: [N, E, M, copies sum padded] result, its last two axes dense.
        rows: the weights' first and last row that count; None for all.
        copies, padded: a weight's blocks of columns and the widths they are padded to.
        pre: [E, N M, copies sum padded] result before the activation.
        add: [E, B, copies sum padded] float32, its last two axes dense; M is B or, of samples, a multiple of it.
    """
    n, e, m, _ = y.shape
    net = _dense_net(layers, precision, activation, rows, copies, padded)
    dense_kernel[(triton.cdiv(n * m, _BM), triton.cdiv(copies * max(padded), _BN), e * len(layers))](
        x,
        tuple(w for w, _ in layers),
        tuple(b for _, b in layers),
        y,
        y if pre is None else pre,
        y if add is None else add,
        x.new_empty(0, dtype=stored_as(precision)),
        m,
        n * m,
        1 if add is None else m // add.shape[1],
        0 if x.shape[0] == 1 else x.stride(0),
        y.stride(0),
        y.stride(1),
        0 if add is None else add.stride(0),
        BIAS=bias,
        ADD=add is not None,
        SAVE=pre is not None,
        NET=net,
        BM=_BM,
        BN=_BN,
        BK=_BK,
        num_warps=4,
        enable_fp_fusion=True,
    )


def dense_bwd(
    d: Tensor,
    layers: Pairs,
    dx: Tensor,
    precision: str,
    activation: str = "",
    rows: tuple[int, int] | None = None,
    copies: int = 1,
    padded: Sequence[int] = (),
    pre: Tensor | None = None,
    of: Rows | None = None,
) -> None:
    """dx = sum of d W^T over the layers, times the derivative of the activation in front of them.

    Args:
        d: [E, R, copies sum padded], members any number of rows apart; or the workspace of `backward` that `of`
            describes.
        layers, rows, copies, padded: as for `dense`.
        dx: [E, R, K] result, its last two axes dense.
        pre: [E, R, K] what the activation in front took, likewise.
    """
    e, r, k = dx.shape
    net = _dense_net(layers, precision, activation if pre is not None else "", rows, copies, padded)
    dense_bwd_kernel[(triton.cdiv(r, _BM), triton.cdiv(k, _BN), e)](
        d,
        tuple(w for w, _ in layers),
        dx if pre is None else pre,
        dx,
        dx.new_empty(0, dtype=stored_as(precision)),
        *(
            (r, r, 0, e, r, d.stride(0) // d.stride(1))
            if of is None
            else (of.count, r, of.first, of.members, of.padded, of.rows)
        ),
        0 if pre is None else pre.stride(0),
        dx.stride(0),
        STACKED=of is not None,
        NET=net,
        BM=_BM,
        BN=_BN,
        BK=_BK,
        num_warps=4,
        enable_fp_fusion=True,
    )


class Rows(NamedTuple):
    """How `backward` lays out gradients of hidden layers: one layer's [E, rows, copies HP] behind the other's."""

    first: int  # the field's first member
    members: int  # E of all fields
    count: int  # rows per evaluation, of `padded`
    padded: int
    rows: int  # all in all


def time_rows(inputs: Pairs, net: plan.Network) -> dict[str, Any]:
    """The rows of time of the first layer, or of FiLM: in both the last ones."""
    last = inputs[0][0].shape[1]
    copies = 2 if net.norm == "film" else 1
    return {"rows": (last - net.time_features, last), "copies": copies, "padded": net.padded[: len(inputs)]}


def _split(x: float) -> tuple[float, float]:
    """What float32 holds of x, and the rest."""
    held = struct.unpack("f", struct.pack("f", x))[0]
    return held, x - held


def embed_times(
    times: tuple[Tensor, Tensor] | tuple[float, float], num_steps: int, method: str, embedding: Times, out: Tensor
) -> None:
    """Features of every evaluation's times into out [N, E, M, >= T], its last two axes dense; padding becomes zero.

    `times` are start and end [1 or E, M] of every row's own, or numbers that all share, then E = M = 1.
    """
    n, e, m, width = out.shape
    shared = not isinstance(times[0], Tensor)
    start, end = (out, out) if shared else (t.contiguous() for t in times)  # type: ignore[union-attr]
    bm, bt = 16, 64
    features_kernel[(triton.cdiv(n * m, bm), triton.cdiv(width, bt), e)](
        start,
        end,
        out,
        m,
        n * m,
        num_steps,
        0 if shared or start.shape[0] == 1 else start.stride(0),
        0 if shared or end.shape[0] == 1 else end.stride(0),
        out.stride(0),
        out.stride(1),
        *(_split(times[0]) + _split(times[1]) if shared else (0.0,) * 4),
        NET=embedding,
        V=plan.evaluations(method),
        METHOD=method,
        SHARED=shared,
        OUT=width,
        ROUND=Arithmetic.of(out.dtype),
        BM=bm,
        BT=bt,
        num_warps=4,
        enable_fp_fusion=False,  # rounded as torch rounds
    )


@dataclass
class Chain:
    """Dense -> activation, one layer behind the other, of one field."""

    layers: Pairs  # [E, K, H], [E, H], contiguous
    activation: str
    precision: str
    inputs: list[Tensor] = field(default_factory=list)  # of every layer, [1 or E, R, K]
    pres: list[Tensor] = field(default_factory=list)  # what every activation took, [E, R, H]

    def forward(self, x: Tensor, pre: Tensor | None = None, keep: bool = False) -> Tensor:
        """x [1 or E, R, K] through all layers, [E, R, H].

        Args:
            pre: [E, R, H] where what the last activation took goes.
            keep: keeps what the way back needs.
        """
        for i, (w, b) in enumerate(self.layers):
            e, _, h = w.shape
            y = x.new_empty((1, e, x.shape[1], h), dtype=stored_as(self.precision))
            last = i == len(self.layers) - 1
            before = pre if last and pre is not None else torch.empty_like(y[0]) if keep else None
            dense(x, [(w, b)], y, self.precision, self.activation, padded=(h,), pre=before)
            if keep and before is not None:
                self.inputs.append(x)
                self.pres.append(before)
            x = y[0]
        return x

    def backward(self, d: Tensor, needs_weights: bool, needs_input: bool) -> tuple[list[Tensor], Tensor | None]:
        """(gradients of weights and biases in turns, [E, R, K] of the input or None) from d [E, R, H], that of what the
        last activation took; float32."""
        found: list[tuple[Tensor, Tensor]] = []
        d_x = None
        for i in range(len(self.layers) - 1, -1, -1):
            x, (w, b) = self.inputs[i], self.layers[i]
            e, k, h = w.shape
            if needs_weights:
                with exact_products(self.precision):
                    x = x.to(d.dtype).expand(e, -1, -1)
                    found.append((batched_product(x.mT, d), d.sum(1, dtype=torch.float32)))
            if i:
                before, d_pre = self.pres[i - 1], d.new_empty((e, d.shape[1], k))
                dense_bwd(d, [(w, b)], d_pre, self.precision, self.activation, padded=(h,), pre=before)
                d = d_pre
            elif needs_input:
                d_x = torch.empty((e, d.shape[1], k), device=d.device)
                dense_bwd(d, [(w, b)], d_x, self.precision, padded=(h,))
        return [grad for pair in reversed(found) for grad in pair], d_x
