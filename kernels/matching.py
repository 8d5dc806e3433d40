"""The flow-matching loss of a velocity field, forward and backward, one launch each plus the weight gradients' matrix
products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .fold import members, pack, product_dtype, unfold
from .integrate import constants, tiling
from .launch import exact_products, target
from .tile import (
    activate,
    activate_grad,
    add_cond,
    embed_state,
    embed_time,
    hidden_layers,
    project_out,
    row_scale,
    store_stats,
)


@triton.jit(do_not_specialize=["M", "samples", "cond_stride_e"])
def matching_fwd_kernel(
    a_ptr,  # [E, M, D] x_0, or x_t without INTERPOLATE
    b_ptr,  # [E, M, D] x_1, or the target velocity
    t_ptr,  # [E, M]
    cond_ptr,  # [1 or E, B, C]
    w_cond_ptr,  # [E, CP, HP]
    w_feat_ptr,  # [E, FP, HP]
    bias_ptr,  # [E, HP]
    w_hidden_ptr,  # [L - 1, E, HP, HP]
    b_hidden_ptr,  # [L - 1, E, HP]
    w_out_ptr,  # [E, HP, DP]
    b_out_ptr,  # [E, DP]
    y_ptr,  # [2, E, MP, HP] workspace: activations of this layer and the next
    rows_ptr,  # [E, M] result: the loss of each row
    error_ptr,  # [E, M, D] saved: v - target
    feat_ptr,  # [E, MP, FP] saved: state and time features
    pre_ptr,  # [L, E, MP, HP] saved: pre-activations
    stats_ptr,  # [L, 2, E, MP] saved: mean and rsqrt(variance + eps) of the activations
    M,
    MP,
    samples,
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
    T: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    L: tl.constexpr,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    EMBED: tl.constexpr,
    TIME: tl.constexpr,
    INTERPOLATE: tl.constexpr,
    SAVE: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """rows = mean over D of (v(x_t, t, cond) - target)^2 with x_t = (1 - t) x_0 + t x_1, target = x_1 - x_0."""
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
    p_y = y_ptr + p_rows
    layer_size = n_e * MP * HP

    b_t = tl.load(t_ptr + i_e * M + o_b, mask=m_b, other=0.0).to(tl.float32)[:, None]
    # A scalar state is one column; a vector is loaded as wide as the features, to be multiplied as they are.
    if DP == 1:
        o_s = o_d
    else:
        o_s = o_f
    p_s = (i_e * M + o_b)[:, None] * D + o_s[None, :]
    m_s = m_b[:, None] & (o_s < D)[None, :]
    b_x = tl.load(a_ptr + p_s, mask=m_s, other=0.0).to(tl.float32)
    if INTERPOLATE:
        b_x = (1.0 - b_t) * b_x + b_t * tl.load(b_ptr + p_s, mask=m_s, other=0.0).to(tl.float32)
    b_f = embed_state(b_x, o_f, low, high, std, EMBED, F) + embed_time(b_t, o_f, TIME, F, T)
    b_f = b_f.to(DTYPE)
    if SAVE:
        tl.store(feat_ptr + (i_e * MP + o_b)[:, None] * FP + o_f[None, :], b_f)

    p_cond = cond_ptr + i_e * cond_stride_e + (o_b // samples)[:, None].to(tl.int64) * C
    s1 = tl.zeros([BM], tl.float32)
    s2 = tl.zeros([BM], tl.float32)
    for n in tl.range(0, HP, BN, num_stages=1):
        b_w = tl.load(w_feat_ptr + (i_e * FP + o_f)[:, None] * HP + (n + o_n)[None, :])
        b_acc = tl.dot(b_f, b_w, input_precision=PRECISION)
        b_acc = add_cond(b_acc, p_cond, m_b, w_cond_ptr, i_e, n + o_n, C, CP, HP, BC, PRECISION)
        b_acc += tl.load(bias_ptr + i_e * HP + n + o_n)[None, :]
        if SAVE:
            tl.store(pre_ptr + p_rows + (n + o_n)[None, :], b_acc.to(DTYPE))
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
        pre_ptr + layer_size + p_rows,
        stats_ptr,
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
        SAVE,
        PRECISION,
        BM,
        BN,
        STAGES,
    )
    b_v = project_out(p_y + ((L - 1) % 2) * layer_size, w_out_ptr, i_e, o_d, HP, DP, BM, BN, PRECISION)
    if NORM:
        mu, r = row_scale(s1, s2, H, eps)
        b_v = b_v * r[:, None]
        if SAVE:
            store_stats(stats_ptr, L - 1, i_e, n_e, MP, o_b, mu, r)
    b_v += tl.load(b_out_ptr + i_e * DP + o_d)[None, :]
    p_x = (i_e * M + o_b)[:, None] * D + o_d[None, :]
    m_x = m_b[:, None] & (o_d < D)[None, :]
    b_u = tl.load(b_ptr + p_x, mask=m_x, other=0.0).to(tl.float32)
    if INTERPOLATE:
        b_u -= tl.load(a_ptr + p_x, mask=m_x, other=0.0).to(tl.float32)
    b_error = tl.where(m_x, b_v - b_u, 0.0)
    if SAVE:
        tl.store(error_ptr + p_x, b_error, mask=m_x)
    tl.store(rows_ptr + i_e * M + o_b, (tl.sum(b_error * b_error, 1) / D).to(rows_ptr.dtype.element_ty), mask=m_b)


@triton.jit(do_not_specialize=["M"])
def matching_bwd_kernel(
    grad_ptr,  # [E, M] gradient of each row's loss
    error_ptr,  # [E, M, D] saved
    pre_ptr,  # [L, E, MP, HP] saved
    stats_ptr,  # [L, 2, E, MP] saved
    w_hidden_ptr,  # [L - 1, E, HP, HP]
    w_out_ptr,  # [E, HP, DP]
    h_ptr,  # [E, MP, HP] workspace: gradient of the normalised activations, centred over the row
    dv_ptr,  # [E, MP, DP] result: gradient of the velocity
    xhat_ptr,  # [L, E, MP, HP] result: normalised activations
    dpre_ptr,  # [L, E, MP, HP] result: gradient of the pre-activations
    M,
    MP,
    D: tl.constexpr,
    DP: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    L: tl.constexpr,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Walks the layers back. Per layer, with h = dpre_next W''^T (centred, because W'' is) and xhat the normalised
    activations:

        dy = r (h - xhat mean(h o xhat)),    dpre = dy act'(pre)

    The row mean needs all of h, so h passes through a workspace: one loop makes it, a second one finishes the layer.
    """
    i_b = tl.program_id(0)
    i_e = tl.program_id(1).to(tl.int64)
    n_e = tl.num_programs(1).to(tl.int64)
    DTYPE: tl.constexpr = pre_ptr.dtype.element_ty
    o_b = i_b * BM + tl.arange(0, BM)
    m_b = o_b < M
    o_h = tl.arange(0, HP)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, DP)
    p_rows = (i_e * MP + o_b)[:, None] * HP
    layer_size = n_e * MP * HP

    b_g = tl.load(grad_ptr + i_e * M + o_b, mask=m_b, other=0.0).to(tl.float32)
    m_x = m_b[:, None] & (o_d < D)[None, :]
    b_dv = tl.load(error_ptr + (i_e * M + o_b)[:, None] * D + o_d[None, :], mask=m_x, other=0.0)
    b_dv = b_dv * (b_g * (2.0 / D))[:, None]
    tl.store(dv_ptr + (i_e * MP + o_b)[:, None] * DP + o_d[None, :], b_dv)

    s = tl.zeros([BM], tl.float32)
    mu, r = load_stats(stats_ptr, L - 1, i_e, n_e, MP, o_b, NORM, BM)
    for n in tl.range(0, HP, BN, num_stages=1):
        if DP == 1:
            b_h = b_dv * tl.load(w_out_ptr + i_e * HP + n + o_n)[None, :]
        else:
            b_w = tl.load(w_out_ptr + (i_e * HP + n + o_n)[None, :] * DP + o_d[:, None])
            b_h = tl.dot(b_dv.to(DTYPE), b_w.to(DTYPE), input_precision=PRECISION)
        s += store_h(b_h, h_ptr, pre_ptr + (L - 1) * layer_size, p_rows + (n + o_n)[None, :], mu, r, ACT, NORM, FAST)
    for i in tl.range(0, L, num_stages=1):
        l = L - 1 - i
        tl.debug_barrier()
        p_l = l * layer_size + p_rows
        for n in tl.range(0, HP, BN, num_stages=1):
            b_h = tl.load(h_ptr + p_rows + (n + o_n)[None, :]).to(tl.float32)
            b_pre = tl.load(pre_ptr + p_l + (n + o_n)[None, :]).to(tl.float32)
            b_y, b_dy = activate_grad(b_pre, ACT, FAST)
            if NORM:
                b_y = (b_y - mu[:, None]) * r[:, None]
                b_h = r[:, None] * (b_h - b_y * (s / H)[:, None])
            tl.store(xhat_ptr + p_l + (n + o_n)[None, :], b_y.to(DTYPE))
            tl.store(dpre_ptr + p_l + (n + o_n)[None, :], (b_h * b_dy).to(DTYPE))
        if l > 0:
            tl.debug_barrier()
            b_a = tl.load(dpre_ptr + p_l + o_h[None, :])
            s = tl.zeros([BM], tl.float32)
            mu, r = load_stats(stats_ptr, l - 1, i_e, n_e, MP, o_b, NORM, BM)
            p_w = w_hidden_ptr + ((l - 1) * n_e + i_e) * HP * HP
            for n in tl.range(0, HP, BN, num_stages=STAGES):
                b_w = tl.load(p_w + (n + o_n)[None, :] * HP + o_h[:, None])
                b_h = tl.dot(b_a, b_w, input_precision=PRECISION)
                s += store_h(
                    b_h, h_ptr, pre_ptr + (l - 1) * layer_size, p_rows + (n + o_n)[None, :], mu, r, ACT, NORM, FAST
                )


@triton.jit
def load_stats(stats_ptr, l, i_e, n_e, MP, o_b, NORM: tl.constexpr, BM: tl.constexpr):
    """Mean and scale of layer l's activations."""
    if NORM:
        mu = tl.load(stats_ptr + ((2 * l) * n_e + i_e) * MP + o_b)
        r = tl.load(stats_ptr + ((2 * l + 1) * n_e + i_e) * MP + o_b)
    else:
        mu = tl.zeros([BM], tl.float32)
        r = tl.zeros([BM], tl.float32)
    return mu, r


@triton.jit
def store_h(b_h, h_ptr, pre_ptr, offsets, mu, r, ACT: tl.constexpr, NORM: tl.constexpr, FAST: tl.constexpr):
    """Stores a tile of h; returns its share of each row's sum of h o xhat."""
    tl.store(h_ptr + offsets, b_h.to(h_ptr.dtype.element_ty))
    if NORM:
        b_y = activate(tl.load(pre_ptr + offsets).to(tl.float32), ACT, FAST)
        return tl.sum(b_h * ((b_y - mu[:, None]) * r[:, None]), 1)
    else:
        return tl.zeros_like(mu)


def saved_tensors(a: Tensor, net: plan.Network) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors for what the backward kernel reads: error, features, pre-activations, statistics."""
    e, b, s, d = a.shape
    mp = plan.padded_rows(b * s)
    dtype = product_dtype(net)
    return (
        a.new_empty((e, b, s, d), dtype=torch.float32),
        a.new_empty((e, mp, net.features_padded(time=True)), dtype=dtype),
        a.new_empty((net.layers, e, mp, net.width_padded), dtype=dtype),
        a.new_empty((net.layers, 2, e, mp), dtype=torch.float32),
    )


def matching(
    a: Tensor,
    b: Tensor,
    t: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    interpolate: bool,
    save: bool,
    net: plan.Network,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row losses [E, B, S] and, with `save`, what `matching_bwd` needs (else four empty tensors).

    `a`, `b` are [E, B, S, D], `t` [E, B, S], `cond` [1 or E, B, C].
    """
    e, batch, s, _ = a.shape
    m = batch * s
    a, b, t, cond = a.contiguous(), b.contiguous(), t.contiguous(), cond.contiguous()
    packed = pack([parameters], net, time=True)
    mp = plan.padded_rows(m)
    hp = net.width_padded
    y = torch.empty(2, e, mp, hp, device=a.device, dtype=product_dtype(net))
    rows = torch.empty_like(t)
    saved = saved_tensors(a, net) if save else tuple(a.new_empty(0) for _ in range(4))
    error, features, pre, stats = saved
    arch, sms = target(a.device)
    tiles = plan.choose("matching_fwd", arch, sms, net.precision, hp, e * (mp if save else m))
    # The backward pass's products run over all MP rows, so training writes the padding too.
    matching_fwd_kernel[(triton.cdiv(mp if save else m, tiles.rows), e)](
        a,
        b,
        t,
        cond,
        packed.w_cond,
        packed.w_feat,
        packed.bias,
        packed.w_hidden,
        packed.b_hidden,
        packed.w_out,
        packed.b_out,
        y,
        rows,
        error,
        features,
        pre,
        stats,
        m,
        mp,
        s,
        0 if cond.shape[0] == 1 else batch * net.cond_dim,
        net.low,
        net.high,
        net.std,
        net.eps,
        **constants(net, time=True),
        T=net.time_features,
        TIME=net.time_embedding,
        INTERPOLATE=interpolate,
        SAVE=save,
        **tiling(net, tiles),
    )
    return (rows, *saved)


def matching_bwd(
    grad: Tensor, cond: Tensor, parameters: list[Tensor], saved: list[Tensor], net: plan.Network
) -> list[Tensor]:
    """Gradients of cond and of every parameter, in the parameters' order, for the rows' gradient `grad` [E, B, S]."""
    given, parameters = parameters, members(parameters)
    error, features, pre, stats = saved
    e, batch, s = grad.shape
    m, mp = batch * s, features.shape[1]
    hp = net.width_padded
    packed = pack([parameters], net, time=True, inputs=False)
    workspace = torch.empty(e, mp, hp, device=grad.device, dtype=pre.dtype)
    dv = torch.empty(e, mp, net.state_padded, device=grad.device, dtype=torch.float32)
    xhat, dpre = torch.empty_like(pre), torch.empty_like(pre)
    arch, sms = target(grad.device)
    tiles = plan.choose("matching_bwd", arch, sms, net.precision, hp, e * mp)
    constexprs = constants(net, time=True)
    matching_bwd_kernel[(triton.cdiv(mp, tiles.rows), e)](
        grad.contiguous(),
        error,
        pre,
        stats,
        packed.w_hidden,
        packed.w_out,
        workspace,
        dv,
        xhat,
        dpre,
        m,
        mp,
        **{name: constexprs[name] for name in ("D", "DP", "H", "HP", "L", "ACT", "NORM", "PRECISION")},
        **tiling(net, tiles),
    )
    with exact_products(net.precision):
        grads = _weight_gradients(cond, parameters, features, xhat, dpre, dv, s, net)
    d_cond, *d_parameters = grads
    if given[0].dim() == 2:
        d_parameters = [g.squeeze(0) for g in d_parameters]
    return [d_cond.to(cond.dtype), *(g.to(p.dtype) for g, p in zip(d_parameters, given, strict=True))]


def _weight_gradients(
    cond: Tensor,
    parameters: list[Tensor],
    features: Tensor,
    xhat: Tensor,
    dpre: Tensor,
    dv: Tensor,
    samples: int,
    net: plan.Network,
) -> list[Tensor]:
    """The products that reduce over rows: [cond, weights and biases of every layer, scales and shifts], float32.

    They run over the padding as well: dpre and dv are zero there.
    """
    layers, h, c = net.layers, net.width, net.cond_dim
    e, m = dpre.shape[1], cond.shape[1] * samples
    db = dpre.sum(2, dtype=torch.float32)  # [L, E, HP]
    out: list[Tensor] = []
    norms: list[Tensor] = []

    # First layer: its input is [cond, features].
    first = dpre[0, :, :, :h]
    per_cond = first[:, :m]
    if samples > 1:
        per_cond = per_cond.unflatten(1, (-1, samples)).sum(2, dtype=torch.float32).to(dpre.dtype)
    w_cond = parameters[0][:, :c].to(dpre.dtype)
    dw_feat = _product(features[:, :, : net.state_features + net.time_features].mT, first)
    if c:
        rows = cond.to(dpre.dtype).expand(e, -1, -1)
        d_cond = _product(per_cond, w_cond.mT)
        d_cond = d_cond if cond.shape[0] == e else d_cond.sum(0, keepdim=True)
        dw = torch.cat([_product(rows.mT, per_cond), dw_feat], 1)
    else:
        d_cond, dw = torch.zeros_like(cond), dw_feat
    out += [dw, db[0, :, :h]]

    for i in range(1, layers + 1):
        last = i == layers
        inner = dv if last else dpre[i]
        g = _product(xhat[i - 1].mT, inner.to(xhat.dtype))  # [E, HP, HP or DP]
        b = dv.sum(1) if last else db[i]
        width = net.state_dim if last else h
        if net.norm:
            scale, shift = parameters[2 * (layers + i) : 2 * (layers + i) + 2]
            dw, dscale, dshift = unfold(g, b, parameters[2 * i], scale, shift)
            norms += [dscale, dshift]
        else:
            dw = g[:, :h, :width]
        out += [dw, b[:, :width]]
    return [d_cond, *out, *norms]


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Batched x @ y, accumulated and returned in float32 also for bfloat16 operands."""
    if x.dtype == torch.float32:
        return torch.bmm(x, y)
    return torch.bmm(x, y, out_dtype=torch.float32)
