"""What of the first layer does not depend on the state, in one launch: cond's share of it, and a table of time's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .integrate import stage_time
from .pack import Prepared, net_shape, product_dtype
from .tile import cast, embed_time, product

# One size for any number of rows: a row's bits do not depend on how many others there are.
_TILES = plan.Tiles(32, 32, 4, 1)


@triton.jit(do_not_specialize=["B", "N", "cond_stride", "weight_stride", "first", "num_steps"])
def prepare_kernel(
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


def covers(net: plan.Network) -> bool:
    """Whether `prepare` has all that a network's first layer needs: time features without an MLP, and frequencies that
    float32 times are exact enough for."""
    fastest = {"power_fourier": 2.0 ** (net.time_features // 2), "cosine_fourier": net.time_features}
    return net.norm != "film" and net.time_embedding != "given" and fastest.get(net.time_embedding, 1.0) <= 256


def prepare(
    conds: list[Tensor],
    firsts: list[tuple[Tensor, Tensor]],
    times: tuple[float, float] | None,
    num_steps: int,
    method: str,
    net: plan.Network,
) -> Prepared:
    """Of several fields, their members one behind the other; one launch per field.

    Args:
        conds: [1 or E, B, C] of each.
        firsts: weights [E, C + F + T, H] and biases [E, H] of the first layers.
        times: start and end that all rows share; None where rows have times of their own.
        num_steps, method: of the walk.
        net: the network.
    """
    like, batch = firsts[0][0], conds[0].shape[1]
    e, hp = sum(w.shape[0] for w, _ in firsts), net.padded[0]
    n = 1 if times is None else num_steps * plan.evaluations(method)
    c = like.new_empty((e, batch, hp), dtype=product_dtype(net)) if net.cond_dim else None
    table = like.new_empty((e, n, hp), dtype=torch.float32)
    blocks = (triton.cdiv(batch, _TILES.rows) if c is not None else 0) + triton.cdiv(n, _TILES.rows)
    i_e = 0
    for cond, (weight, bias) in zip(conds, firsts, strict=True):
        cond, weight, bias = cond.contiguous(), weight.contiguous(), bias.contiguous()
        prepare_kernel[(blocks, triton.cdiv(hp, _TILES.columns), weight.shape[0])](
            cond,
            weight,
            bias,
            table if c is None else c,
            table,
            batch,
            n,
            0 if cond.shape[0] == 1 else cond.stride(0),
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
    return Prepared(cond=c, time=table, features=None, film=None, film_time=None)
