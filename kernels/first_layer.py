"""What of the first layer does not depend on the state, in one launch: cond's share of it, and a table of time's. And
cond's share back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .integrate import stage_time
from .launch import Arithmetic, batched_product, exact_products
from .pack import Parameters, net_shape, of_field, product_dtype
from .tile import cast, embed_time, product

# One size for any number of rows: a row's bits do not depend on how many others there are.
_TILES = plan.Tiles(32, 32, 4, 1)


@triton.jit(do_not_specialize=["B", "N", "cond_stride", "weight_stride", "first", "num_steps"])
def first_layer_kernel(
    cond_ptr,  # [1 or E, B, C]
    weight_ptr,  # [E, C + F + T, H] the first layer
    bias_ptr,  # [E, H]
    c_ptr,  # [E, B, HP] of all fields: cond's share
    table_ptr,  # [E, N, HP] of all fields, float32: bias, with TABLE time's share at every evaluation
    B,
    N,
    cond_stride,  # of members; 0 where they share cond
    weight_stride,
    first,  # the field's first member
    num_steps,
    start,
    end,
    C: tl.constexpr,
    NET: tl.constexpr,
    V: tl.constexpr,
    METHOD: tl.constexpr,
    BK: tl.constexpr,
):
    """c = cond W_c with rounded operands; table = b + features(t) W_t in float32."""
    BM: tl.constexpr = NET.BM
    H: tl.constexpr = NET.H[0]
    HP: tl.constexpr = NET.HP[0]
    BN: tl.constexpr = NET.BN if NET.BN < HP else HP
    i_m = tl.program_id(0)
    i_e = tl.program_id(2).to(tl.int64)
    at = first + i_e
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    m_n = o_n < H
    p_w = weight_ptr + i_e * weight_stride + o_n
    blocks = tl.cdiv(B, BM) if NET.COND else 0
    if i_m < blocks:
        o_m = i_m * BM + tl.arange(0, BM)
        m_m = o_m < B
        b_acc = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, C, BK):
            o_k = k + tl.arange(0, BK)
            m_k = o_k < C
            p_x = cond_ptr + i_e * cond_stride + o_m[:, None].to(tl.int64) * C + o_k[None, :]
            b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0).to(tl.float32)
            b_w = tl.load(p_w[None, :] + o_k[:, None] * H, mask=m_k[:, None] & m_n[None, :], other=0.0).to(tl.float32)
            DTYPE: tl.constexpr = c_ptr.dtype.element_ty
            b_acc += product(cast(b_x, DTYPE, NET), cast(b_w, DTYPE, NET), NET)
        p_c = c_ptr + (at * B + o_m[:, None]) * HP + o_n[None, :]
        tl.store(p_c, cast(b_acc, c_ptr.dtype.element_ty, NET), mask=m_m[:, None] & (o_n < HP)[None, :])
    else:
        o_i = (i_m - blocks) * BM + tl.arange(0, BM)
        b_table = tl.zeros([BM, BN], tl.float32)
        b_table += tl.load(bias_ptr + i_e * H + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        if NET.TABLE:
            b_part = stage_time(o_i, V, METHOD) / num_steps
            b_t = ((1.0 - b_part) * start + b_part * end)[:, None]
            for i in tl.range(0, NET.T):
                b_f = embed_time(b_t, i + tl.arange(0, 1), NET)
                b_wt = tl.load(p_w + (C + NET.F + i) * H, mask=m_n, other=0.0).to(tl.float32)
                b_table += b_f * b_wt[None, :]
        p_table = table_ptr + (at * N + o_i[:, None]) * HP + o_n[None, :]
        tl.store(p_table, b_table, mask=(o_i < N)[:, None] & (o_n < HP)[None, :])


def first_layer(
    fields: Sequence[Parameters],
    cond: Tensor,
    times: tuple[float, float] | None,
    num_steps: int,
    method: str,
    net: plan.Network,
) -> tuple[Tensor | None, Tensor]:
    """(cond's share [E, B, HP[0]] or None, table [E, N, HP[0]]) of several fields; one launch per field.

    Args:
        fields: their parameters, contiguous.
        cond: [1 or E, B, C] of all fields.
        times: start and end that all rows share; None leaves the bias alone, for as many evaluations.
        num_steps, method: of the walk.
        net: the network.
    """
    like, batch = fields[0].layers[0][0], cond.shape[1]
    e, hp = sum(field.layers[0][0].shape[0] for field in fields), net.padded[0]
    n = num_steps * plan.evaluations(method)
    c = like.new_empty((e, batch, hp), dtype=product_dtype(net)) if net.cond_dim else None
    table = like.new_empty((e, n, hp), dtype=torch.float32)
    blocks = (triton.cdiv(batch, _TILES.rows) if c is not None else 0) + triton.cdiv(n, _TILES.rows)
    i_e = 0
    for field in fields:
        weight, bias = field.layers[0]
        some = of_field(cond, i_e, weight.shape[0]).contiguous()
        first_layer_kernel[(blocks, triton.cdiv(hp, _TILES.columns), weight.shape[0])](
            some,
            weight,
            bias,
            table if c is None else c,
            table,
            batch,
            n,
            0 if some.shape[0] == 1 else some.stride(0),
            weight.stride(0),
            i_e,
            num_steps,
            *(times or (0.0, 0.0)),
            C=net.cond_dim,
            NET=net_shape(net, times is not None, _TILES),
            V=plan.evaluations(method),
            METHOD=method,
            BK=32,
            num_warps=4,
            enable_fp_fusion=True,
        )
        i_e += weight.shape[0]
    return c, table


# The way back -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["B", "S", "first", "n_e", "d_stride", "cond_stride", "weight_stride"])
def cond_operands_kernel(
    d_ptr,  # [E, B S or more, HP] float32: gradient of cond's share, of every sample
    cond_ptr,  # [1 or E, B, C], with WEIGHTS
    weight_ptr,  # [E, C + F + T, H] the field's first layer, with DCOND
    d_out_ptr,  # [B, E, HP] result: d summed over samples
    cond_out_ptr,  # [1 or E, B, CP] result with WEIGHTS
    weight_out_ptr,  # [C, E, HP] result with DCOND
    B,
    S,
    first,  # the field's first member among all n_e
    n_e,
    d_stride,  # of members
    cond_stride,  # likewise; 0 where they share cond
    weight_stride,
    C: tl.constexpr,
    CP: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    WEIGHTS: tl.constexpr,
    DCOND: tl.constexpr,
    NET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The operands of the products that take d_c further, rounded and padded with zeros: one program a block of one."""
    DTYPE: tl.constexpr = d_out_ptr.dtype.element_ty
    i = tl.program_id(0).to(tl.int64)
    i_e = tl.program_id(1).to(tl.int64)
    at = first + i_e
    n_d = tl.cdiv(B.to(tl.int64) * HP, BLOCK)
    n_x = tl.cdiv(B.to(tl.int64) * CP, BLOCK) if WEIGHTS else 0
    if i < n_d:
        o = i * BLOCK + tl.arange(0, BLOCK)
        o_b = o // HP
        m_b = o_b < B
        b_d = tl.zeros([BLOCK], tl.float32)
        for s in tl.range(0, S):
            b_d += tl.load(d_ptr + at * d_stride + (o_b * S + s) * HP + o % HP, mask=m_b, other=0.0)
        tl.store(d_out_ptr + (o_b * n_e + at) * HP + o % HP, cast(b_d, DTYPE, NET), mask=m_b)
    elif i < n_d + n_x:
        if WEIGHTS:
            o = (i - n_d) * BLOCK + tl.arange(0, BLOCK)
            o_b = o // CP
            o_c = o % CP
            m_b = o_b < B
            b_x = tl.load(cond_ptr + at * cond_stride + o_b * C + o_c, mask=m_b & (o_c < C), other=0.0)
            # Members that share cond share the copy too.
            own = (cond_stride > 0) | (at == 0)
            row = tl.where(cond_stride > 0, at, 0) * B + o_b
            tl.store(cond_out_ptr + row * CP + o_c, cast(b_x.to(tl.float32), DTYPE, NET), mask=m_b & own)
    elif DCOND:
        o = (i - n_d - n_x) * BLOCK + tl.arange(0, BLOCK)
        o_c = o // HP
        o_h = o % HP
        m_c = o_c < C
        b_w = tl.load(weight_ptr + i_e * weight_stride + o_c * H + o_h, mask=m_c & (o_h < H), other=0.0)
        tl.store(weight_out_ptr + (o_c * n_e + at) * HP + o_h, cast(b_w.to(tl.float32), DTYPE, NET), mask=m_c)


def first_layer_bwd(
    d: Tensor,
    cond: Tensor,
    fields: Sequence[Parameters],
    needs_cond: bool,
    needs_weights: bool,
    net: plan.Network,
) -> tuple[Tensor | None, Tensor | None]:
    """(d_cond [1 or E, B, C], cond^T d [E, C, HP[0]]), float32; None for what is not needed.

    Args:
        d: [E, B S, HP[0]] float32, gradient of cond's share of the first layer for every sample, its rows dense.
        cond: [1 or E, B, C].
        fields: their parameters, contiguous, their members one behind the other.
    """
    cond = cond.contiguous()
    (e, rows, hp), (shares, batch, c) = d.shape, cond.shape
    dtype, cp = product_dtype(net), -(-c // 8) * 8  # rows of 16 bytes suit the product
    block = 1024

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=d.device, dtype=dtype)

    d_out = empty(batch, e, hp)
    cond_out = empty(shares, batch, cp) if needs_weights else d_out
    weight_out = empty(c, e, hp) if needs_cond else d_out
    blocks = triton.cdiv(batch * hp, block)
    blocks += triton.cdiv(batch * cp, block) if needs_weights else 0
    blocks += triton.cdiv(c * hp, block) if needs_cond else 0
    first = 0
    for field in fields:
        weight = field.layers[0][0]
        cond_operands_kernel[(blocks, weight.shape[0])](
            d,
            cond,
            weight,
            d_out,
            cond_out,
            weight_out,
            batch,
            rows // batch,
            first,
            e,
            d.stride(0),
            0 if shares == 1 else cond.stride(0),
            weight.stride(0),
            C=c,
            CP=cp,
            H=net.hidden[0],
            HP=hp,
            WEIGHTS=needs_weights,
            DCOND=needs_cond,
            NET=Arithmetic.of(dtype),
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=True,
        )
        first += weight.shape[0]
    if shares == 1:
        # Members side by side: their sum is the product's.
        d_out, weight_out = d_out.view(1, batch, e * hp), weight_out.view(1, -1, e * hp)
    else:
        d_out, weight_out = d_out.transpose(0, 1), weight_out.transpose(0, 1)
    d_cond = d_weights = None
    with exact_products(net.precision):
        if needs_weights:
            d_weights = batched_product(cond_out[..., :c].mT, d_out)
            d_weights = d_weights.view(c, e, hp).transpose(0, 1) if shares == 1 else d_weights
        if needs_cond:
            d_cond = batched_product(d_out, weight_out.mT)
    return d_cond, d_weights
