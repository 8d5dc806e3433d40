"""The K-step walk of a velocity field in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .fold import members, pack, product_dtype
from .launch import interpreted, target
from .tile import activate, add_cond, embed_state, hidden_layers, project_out, row_scale


@triton.jit(do_not_specialize=["M", "samples", "num_steps", "cond_stride_e"])
def integrate_fwd_kernel(
    x_ptr,  # [E, M, D] start
    out_ptr,  # [E, M, D] end
    cond_ptr,  # [1 or E, B, C]
    w_cond_ptr,  # [E, CP, HP]
    w_feat_ptr,  # [E, FP, HP]
    time_ptr,  # [E, K, HP] time features times their weights, plus bias
    w_hidden_ptr,  # [L - 1, E, HP, HP]
    b_hidden_ptr,  # [L - 1, E, HP]
    w_out_ptr,  # [E, HP, DP]
    b_out_ptr,  # [E, DP]
    c_ptr,  # [E, MP, HP] workspace: cond's share of the first layer
    y_ptr,  # [2, E, MP, HP] workspace: activations of this layer and the next
    M,
    MP,
    samples,
    num_steps,
    dt,
    cond_stride_e,
    low,
    high,
    std,
    eps,
    C: tl.constexpr,
    CP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    L: tl.constexpr,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    EMBED: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x <- x + dt v(x, t_k, cond) for k = 0..K-1. One program owns BM rows of one member for the whole walk.

    cond's share of the first layer is computed once, time's share comes from a table; a step multiplies only the
    state's features. Activations pass from layer to layer through a workspace that stays in L2.
    """
    i_b = tl.program_id(0)
    i_e = tl.program_id(1).to(tl.int64)
    n_e = tl.num_programs(1).to(tl.int64)
    DTYPE: tl.constexpr = w_feat_ptr.dtype.element_ty
    o_b = i_b * BM + tl.arange(0, BM)
    m_b = o_b < M
    o_n = tl.arange(0, BN)
    o_f = tl.arange(0, FP)
    o_d = tl.arange(0, DP)

    p_rows = (i_e * MP + o_b)[:, None] * HP
    p_c = c_ptr + p_rows
    p_y = y_ptr + p_rows
    layer_size = n_e * MP * HP

    p_cond = cond_ptr + i_e * cond_stride_e + (o_b // samples)[:, None].to(tl.int64) * C
    for n in tl.range(0, HP, BN, num_stages=1):
        b_acc = tl.zeros([BM, BN], tl.float32)
        b_acc = add_cond(b_acc, p_cond, m_b, w_cond_ptr, i_e, n + o_n, C, CP, HP, BC, PRECISION)
        tl.store(p_c + (n + o_n)[None, :], b_acc.to(DTYPE))

    p_x = (i_e * M + o_b)[:, None] * D + o_d[None, :]
    m_x = m_b[:, None] & (o_d < D)[None, :]
    b_x = tl.load(x_ptr + p_x, mask=m_x, other=0.0).to(tl.float32)
    for k in tl.range(0, num_steps, num_stages=1):
        # Orders this step's stores behind the loads of the step before, and the first step behind cond's share.
        tl.debug_barrier()
        b_f = embed_state(b_x, o_f, low, high, std, EMBED, F).to(DTYPE)
        s1 = tl.zeros([BM], tl.float32)
        s2 = tl.zeros([BM], tl.float32)
        for n in tl.range(0, HP, BN, num_stages=1):
            b_acc = tl.load(p_c + (n + o_n)[None, :]).to(tl.float32)
            b_acc += tl.load(time_ptr + (i_e * num_steps + k) * HP + n + o_n)[None, :]
            b_w = tl.load(w_feat_ptr + (i_e * FP + o_f)[:, None] * HP + (n + o_n)[None, :])
            b_acc = tl.dot(b_f, b_w, b_acc, input_precision=PRECISION)
            b_y = activate(b_acc, ACT, FAST)
            s1 += tl.sum(b_y, 1)
            s2 += tl.sum(b_y * b_y, 1)
            tl.store(p_y + (n + o_n)[None, :], b_y.to(DTYPE))
        s1, s2 = hidden_layers(
            p_y,
            layer_size,
            s1,
            s2,
            w_hidden_ptr,
            b_hidden_ptr,
            p_y,  # nothing is saved
            w_out_ptr,
            i_e,
            n_e,
            MP,
            o_b,
            eps,
            H,
            HP,
            L,
            ACT,
            NORM,
            FAST,
            False,
            PRECISION,
            BM,
            BN,
            STAGES,
        )
        b_v = project_out(p_y + ((L - 1) % 2) * layer_size, w_out_ptr, i_e, o_d, HP, DP, BM, BN, PRECISION)
        if NORM:
            _, r = row_scale(s1, s2, H, eps)
            b_v = b_v * r[:, None]
        b_x += dt * (b_v + tl.load(b_out_ptr + i_e * DP + o_d)[None, :])
    tl.store(out_ptr + p_x, b_x.to(out_ptr.dtype.element_ty), mask=m_x)


def integrate(
    x_0: Tensor, cond: Tensor, fields: list[list[Tensor]], times: Tensor, dt: float, net: plan.Network
) -> Tensor:
    """Walk x_0 [E, B, S, D] under cond [1 or E, B, C] for one step per row of `times` [K, T], the features of each
    step's time.

    `fields` holds each field's parameters (weights and biases, then LayerNorm's), E the sum of their members. Returns
    [E, B, S, D].
    """
    e, b, s, _ = x_0.shape
    m = b * s
    x_0, cond = x_0.contiguous(), cond.contiguous()
    packed = pack(fields, net, time=False)
    num_steps = times.shape[0]
    table = _time_table(fields, packed.bias, times, net)
    mp = plan.padded_rows(m)
    hp, dtype = net.width_padded, product_dtype(net)
    c = torch.empty(e, mp, hp, device=x_0.device, dtype=dtype)
    y = torch.empty(2, e, mp, hp, device=x_0.device, dtype=dtype)
    out = torch.empty_like(x_0)
    arch, sms = target(x_0.device)
    tiles = plan.choose("integrate_fwd", arch, sms, net.precision, hp, e * m)
    integrate_fwd_kernel[(triton.cdiv(m, tiles.rows), e)](
        x_0,
        out,
        cond,
        packed.w_cond,
        packed.w_feat,
        table,
        packed.w_hidden,
        packed.b_hidden,
        packed.w_out,
        packed.b_out,
        c,
        y,
        m,
        mp,
        s,
        num_steps,
        dt,
        0 if cond.shape[0] == 1 else b * net.cond_dim,
        net.low,
        net.high,
        net.std,
        net.eps,
        **constants(net, time=False),
        **tiling(net, tiles),
    )
    return out


def constants(net: plan.Network, time: bool) -> dict[str, int | str | bool]:
    """The constexpr arguments that both kernels take from the network."""
    return dict(
        C=net.cond_dim,
        CP=net.cond_padded,
        D=net.state_dim,
        DP=net.state_padded,
        F=net.state_features,
        FP=net.features_padded(time),
        H=net.width,
        HP=net.width_padded,
        L=net.layers,
        ACT=net.activation,
        NORM=net.norm,
        EMBED=net.state_embedding,
        PRECISION="tf32" if net.precision == "tf32" else "ieee",
        BC=plan.COND_BLOCK,
    )


def tiling(net: plan.Network, tiles: plan.Tiles) -> dict[str, int | bool]:
    """The launch arguments that every kernel takes from the plan."""
    return dict(
        FAST=net.precision == "bf16" and not interpreted(),
        BM=tiles.rows,
        BN=tiles.columns,
        STAGES=tiles.num_stages,
        num_warps=tiles.num_warps,
    )


def _time_table(fields: list[list[Tensor]], bias: Tensor, times: Tensor, net: plan.Network) -> Tensor:
    """times [K, T] through the first layer's time rows, plus its bias: [E, K, HP] float32.

    An elementwise product and a sum, K T H numbers: not a matrix product, whose precision would follow torch's global
    settings.
    """
    first = net.cond_dim + net.state_features
    rows = torch.cat([members(ps)[0] for ps in fields])[:, first:]  # [E, T, H]
    table = (times[:, :, None] * rows[:, None].float()).sum(2)
    return torch.nn.functional.pad(table, (0, net.width_padded - net.width)) + bias.unsqueeze(1)
