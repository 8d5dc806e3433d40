"""The flow-matching loss of a velocity field in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .integrate import time_features
from .launch import target
from .narrow import narrow_cond, narrow_fwd, narrow_weights
from .network import network_fwd
from .noise import philox_normal, philox_uniform
from .pack import Packed, Prepared, Saved, net_shape, options, partial_sums, scalars, turns
from .tile import cast, embed_state, read_velocity


@triton.jit(
    do_not_specialize=[
        *("M", "MP", "samples", "film_stride_e", "film_stride_b"),
        *(f"{tensor}_stride_{axis}" for tensor in "abt" for axis in "ebs"),
    ]
)
def matching_fwd_kernel(
    a_ptr,  # [E, B, S, D] x_0, or x_t without INTERPOLATE
    b_ptr,  # [E, B, S, D] x_1, or the target velocity
    t_ptr,  # [E, B, S]
    seed_ptr,  # int64, with DRAW: x_0 is drawn here
    ids_ptr,  # int64 [B], with DRAW: one per row of cond
    c_ptr,  # see integrate_fwd_kernel
    time_ptr,
    feat_ptr,  # [1, E, M, TP]
    film_ptr,
    film_time_ptr,
    w_feat_ptr,
    w_time_ptr,
    w_film_ptr,
    w_hidden_ptr,
    b_hidden_ptr,
    scale_ptr,
    shift_ptr,
    w_out_ptr,
    b_out_ptr,
    pre_ptr,
    stats_ptr,
    y_ptr,
    part_ptr,
    rows_ptr,  # [E, M] result: the loss of each row
    error_ptr,  # [E, M, D] v - target, with KEEP
    point_ptr,  # [E, M, D] x_t, with KEEP
    M,
    MP,
    samples,
    keep_start,  # 1 - sigma_min
    a_stride_e,  # of members, rows and samples: what they share is not copied
    a_stride_b,
    a_stride_s,
    b_stride_e,
    b_stride_b,
    b_stride_s,
    t_stride_e,
    t_stride_b,
    t_stride_s,
    film_stride_e,
    film_stride_b,
    low,
    high,
    std,
    eps,
    output_scale,
    NET: tl.constexpr,
    INTERPOLATE: tl.constexpr,
    DRAW: tl.constexpr,
    DRAW_TIME: tl.constexpr,
    KEEP: tl.constexpr,
    SAVE: tl.constexpr,
    NARROW: tl.constexpr,
):
    """rows = mean over D of (v(x_t, t, cond) - target)^2 with x_t = (1 - s t) x_0 + t x_1, target = x_1 - s x_0, where
    s = 1 - sigma_min."""
    i_b = tl.program_id(0)
    i_e = tl.program_id(1).to(tl.int64)
    n_e = tl.num_programs(1).to(tl.int64)
    DTYPE: tl.constexpr = w_feat_ptr.dtype.element_ty
    BM: tl.constexpr = NET.BM
    D: tl.constexpr = NET.D
    HP: tl.constexpr = NET.HP[0]
    o_b = i_b * BM + tl.arange(0, BM)
    m_b = o_b < M
    o_f = tl.arange(0, NET.FP)
    o_d = tl.arange(0, NET.DP)
    o_t = tl.arange(0, NET.TP)
    o_s = tl.minimum(o_b, M - 1)
    o_c = o_s // samples
    r_m = i_e * MP + i_b * BM
    o_x = (i_e * M + o_b)[:, None] * D + o_d[None, :]
    m_x = m_b[:, None] & (o_d < D)[None, :]

    o_k = o_s % samples
    p_b = b_ptr + i_e * b_stride_e + (o_c.to(tl.int64) * b_stride_b + o_k * b_stride_s)[:, None]
    b_y = tl.load(p_b + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    if DRAW:
        seed = tl.load(seed_ptr)
        b_id = tl.load(ids_ptr + o_c)
        b_x = philox_normal(seed, b_id[:, None], o_k[:, None], o_d[None, :])
        b_x = tl.where(m_x, b_x, 0.0)
    else:
        p_a = a_ptr + i_e * a_stride_e + (o_c.to(tl.int64) * a_stride_b + o_k * a_stride_s)[:, None]
        b_x = tl.load(p_a + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    if DRAW_TIME:
        b_t = philox_uniform(seed, b_id, o_k)[:, None]
    else:
        p_t = t_ptr + i_e * t_stride_e + o_c.to(tl.int64) * t_stride_b + o_k * t_stride_s
        b_t = tl.load(p_t, mask=m_b, other=0.0).to(tl.float32)[:, None]
    b_u = b_y
    if INTERPOLATE:
        b_u = b_y - keep_start * b_x
        b_x = (1.0 - keep_start * b_t) * b_x + b_t * b_y
    if KEEP:
        tl.store(point_ptr + o_x, b_x, mask=m_x)
    b_f = cast(embed_state(b_x, o_f, low, high, std, NET), DTYPE, NET)
    p_f = feat_ptr + i_e * M * NET.TP
    b_tf = time_features(b_t, p_f, o_s, o_t, DTYPE, NET)
    p_film_time = film_time_ptr
    if NET.TIME == "rows":
        p_film_time = film_time_ptr + i_e * M * (2 * (NET.OFF[NET.L - 1] + NET.HP[NET.L - 1]))
    inputs = (
        b_tf,
        p_f,
        c_ptr + i_e * (M // samples) * HP,
        time_ptr + i_e * HP,
        film_ptr + i_e * film_stride_e,
        p_film_time,
        o_c,
        o_s,
        film_stride_b,
    )
    weights = (
        w_feat_ptr, w_time_ptr, w_film_ptr, w_hidden_ptr, b_hidden_ptr, scale_ptr, shift_ptr, w_out_ptr, b_out_ptr
    )  # fmt: skip
    if NARROW:
        b_c = narrow_cond(c_ptr + i_e * (M // samples) * HP, o_c, NET)
        tiles = narrow_weights(weights, i_e, n_e, NET)
        b_out = narrow_fwd(b_f, b_c, inputs, tiles, pre_ptr, stats_ptr, n_e, MP, r_m, eps, NET, SAVE)
    else:
        b_out = network_fwd(
            b_f, inputs, weights, pre_ptr, stats_ptr, y_ptr, part_ptr, i_e, n_e, MP, MP, r_m, r_m, r_m, eps, NET, SAVE
        )  # fmt: skip
    b_error = tl.where(m_x, read_velocity(b_out, b_x, b_t, output_scale, NET) - b_u, 0.0)
    if KEEP:
        tl.store(error_ptr + o_x, b_error, mask=m_x)
    tl.store(rows_ptr + i_e * M + o_b, (tl.sum(b_error * b_error, 1) / D).to(rows_ptr.dtype.element_ty), mask=m_b)


def matching(
    a: Tensor,
    b: Tensor,
    t: Tensor,
    seed: Tensor | None,
    ids: Tensor | None,
    inputs: Prepared,
    packed: Packed,
    interpolate: bool,
    sigma_min: float,
    keep: bool,
    saved: Saved | None,
    invariant: bool,
    net: plan.Network,
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows [E, B, S], error, x_t) for a (x_0 or x_t), b (x_1 or target) [E, B, S, D] and t [E, B, S].

    error and x_t are [E, B, S, D] float32 with `keep`, else empty. With `seed` and `ids` x_0 is drawn in the kernel,
    and t too if it is empty. `invariant`: the same tiles whatever the number of rows.
    """
    e, batch, s, _ = b.shape
    m = batch * s
    draw_time = t.numel() == 0
    b = b if b.stride(-1) == 1 else b.contiguous()
    a = b if seed is not None else a if a.stride(-1) == 1 else a.contiguous()
    t = t if t.numel() else b[..., 0]  # drawn in the kernel
    mp = plan.padded_rows(m)
    rows = b.new_empty((e, batch, s))
    error, point = (b.new_empty(b.shape if keep else (0,), dtype=torch.float32) for _ in range(2))
    y = turns(b, e, mp, net) if saved is None or net.fold else saved.out
    arch, sms = target(b.device)
    tiles = plan.choose("matching_fwd", arch, sms, net, None if invariant else e * m)
    # The backward pass's products run over all MP rows, so training writes the padding too.
    matching_fwd_kernel[(triton.cdiv(m if saved is None else mp, tiles.rows), e)](
        a,
        b,
        t,
        b if seed is None else seed,
        b if ids is None else ids.contiguous(),
        *inputs.pointers(b),
        *packed,
        y if saved is None else saved.pre,
        b if saved is None else saved.stats,
        y,
        partial_sums(b, e, mp, net),
        rows,
        error,
        point,
        m,
        mp,
        s,
        1.0 - sigma_min,
        *(stride for x in (a, b, t) for stride in x.stride()[:3]),
        *inputs.film_strides(),
        *scalars(net),
        NET=net_shape(net, False, tiles),
        INTERPOLATE=interpolate,
        DRAW=seed is not None,
        DRAW_TIME=draw_time,
        KEEP=keep,
        SAVE=saved is not None,
        NARROW=plan.narrow(net),
        **options(tiles),
    )
    return rows, error, point
