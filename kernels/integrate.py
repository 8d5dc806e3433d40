"""The K-step walk of a velocity field in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, plan
from .group import integrate_by_groups
from .launch import target
from .narrow import narrow_cond, narrow_fwd, narrow_weights
from .network import network_fwd
from .pack import Packed, Prepared, Saved, net_shape, options, partial_sums, scalars, turns
from .tile import cast, embed_state, embed_time, read_velocity


@triton.jit(
    do_not_specialize=["M", "MP", "samples", "num_steps", "evaluations", "film_stride_e", "film_stride_b", "R_P"]
)
def integrate_fwd_kernel(
    x_ptr,  # [E, M, D] start
    out_ptr,  # [E, M, D] end
    path_ptr,  # [K, E, M, D] every step's start, with KEEP
    stages_ptr,  # [K, E, M, D] every step's second point, with KEEP
    noise_ptr,  # [K, E, M, D] added behind each step, with NOISE
    t_0_ptr,  # [E, M] start and end times, without TABLE
    t_1_ptr,
    c_ptr,  # [E, B, HP[0]] cond's share of the first layer
    time_ptr,  # [E, V K, HP[0]] time's share of it plus bias, or [E, 1, HP[0]] the bias alone
    feat_ptr,  # [V K, E, M, TP] time features where TIME is "given"
    film_ptr,  # [E, B, 2 sum HP] cond's share of FiLM
    film_time_ptr,  # [E, V K, 2 sum HP] time's share of FiLM; [E, V K, M, 2 sum HP] all of it where TIME is "rows"
    w_feat_ptr,  # see network_fwd
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
    M,
    MP,
    samples,
    num_steps,
    evaluations,  # V K
    start,
    end,
    film_stride_e,
    film_stride_b,
    low,
    high,
    std,
    eps,
    output_scale,
    R_P,
    NET: tl.constexpr,
    V: tl.constexpr,
    METHOD: tl.constexpr,
    NOISE: tl.constexpr,
    KEEP: tl.constexpr,
    SAVE: tl.constexpr,
    NARROW: tl.constexpr,
):
    """x <- x + h v(x, t_k, cond) for k = 0..K-1, or the two-stage schemes. One program owns BM rows of one member for
    the whole walk.

    cond's share of the first layer is computed once per call, time's share too where all rows share their times: a step
    multiplies only the state's features.
    """
    i_b = tl.program_id(0)
    i_e = tl.program_id(1).to(tl.int64)
    n_e = tl.num_programs(1).to(tl.int64)
    DTYPE: tl.constexpr = w_feat_ptr.dtype.element_ty
    BM: tl.constexpr = NET.BM
    D: tl.constexpr = NET.D
    DP: tl.constexpr = NET.DP
    HP: tl.constexpr = NET.HP[0]
    SUM: tl.constexpr = NET.OFF[NET.L - 1] + NET.HP[NET.L - 1]
    o_b = i_b * BM + tl.arange(0, BM)
    m_b = o_b < M
    o_f = tl.arange(0, NET.FP)
    o_d = tl.arange(0, DP)
    o_t = tl.arange(0, NET.TP)
    o_s = tl.minimum(o_b, M - 1)
    o_c = o_s // samples
    r_m = i_e * MP + i_b * BM

    weights = (
        w_feat_ptr, w_time_ptr, w_film_ptr, w_hidden_ptr, b_hidden_ptr, scale_ptr, shift_ptr, w_out_ptr, b_out_ptr
    )  # fmt: skip
    o_x = (i_e * M + o_b)[:, None] * D + o_d[None, :]
    m_x = m_b[:, None] & (o_d < D)[None, :]
    b_x = tl.load(x_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_p = b_x
    b_v1 = tl.zeros([BM, DP], tl.float32)
    b_start = start
    b_end = end
    if not NET.TABLE:
        b_start = tl.load(t_0_ptr + i_e * M + o_b, mask=m_b, other=0.0).to(tl.float32)[:, None]
        b_end = tl.load(t_1_ptr + i_e * M + o_b, mask=m_b, other=0.0).to(tl.float32)[:, None]
    b_h = (b_end - b_start) / num_steps
    if NARROW:
        tiles = narrow_weights(weights, i_e, n_e, NET)
        b_c = narrow_cond(c_ptr + i_e * (M // samples) * HP, o_c, NET)
    for i in tl.range(0, evaluations, num_stages=1, disable_licm=True):
        if not NARROW:
            # Orders this step's stores behind the loads of the step before.
            tl.debug_barrier()
        k = i // V
        first = (i % V) == 0
        o_k = k * n_e * M * D
        b_part = stage_time(i, V, METHOD) / num_steps
        b_t = (1.0 - b_part) * b_start + b_part * b_end
        if KEEP:
            tl.store(path_ptr + o_k + o_x, b_x, mask=m_x & first)
            if V == 2:
                tl.store(stages_ptr + o_k + o_x, b_p, mask=m_x & (i % V == 1))
        b_f = cast(embed_state(b_p, o_f, low, high, std, NET), DTYPE, NET)
        p_t = feat_ptr + (i * n_e * M + i_e * M) * NET.TP
        b_tf = time_features(b_t, p_t, o_s, o_t, DTYPE, NET)
        p_time = time_ptr + i_e * HP
        p_film_time = film_time_ptr
        if NET.TABLE:
            p_time = time_ptr + (i_e * evaluations + i) * HP
            p_film_time = film_time_ptr + (i_e * evaluations + i) * (2 * SUM)
        elif NET.TIME == "rows":
            p_film_time = film_time_ptr + (i_e * evaluations + i) * M * (2 * SUM)
        r_p = r_m
        if SAVE:
            r_p = i_e * R_P + i * MP + i_b * BM
        r_y = r_m
        if SAVE and not NET.FOLD:
            r_y = r_p
        inputs = (
            b_tf,
            p_t,
            c_ptr + i_e * (M // samples) * HP,
            p_time,
            film_ptr + i_e * film_stride_e,
            p_film_time,
            o_c,
            o_s,
            film_stride_b,
        )
        if NARROW:
            b_out = narrow_fwd(b_f, b_c, inputs, tiles, pre_ptr, stats_ptr, n_e, R_P, r_p, eps, NET, SAVE)
        else:
            b_out = network_fwd(
                b_f, inputs, weights, pre_ptr, stats_ptr, y_ptr, part_ptr, i_e, n_e, R_P,
                R_P if SAVE and not NET.FOLD else MP, r_p, r_y, r_m, eps, NET, SAVE,
            )  # fmt: skip
        b_v = read_velocity(b_out, b_p, b_t, output_scale, NET)
        if V == 1:
            b_x += b_h * b_v
        else:
            if METHOD == "midpoint":
                b_new = b_x + b_h * b_v
                b_mid = b_x + (0.5 * b_h) * b_v
            else:
                b_new = b_x + (0.5 * b_h) * (b_v1 + b_v)
                b_mid = b_x + b_h * b_v
            b_x = tl.where(first, b_x, b_new)
            b_v1 = b_v
        if NOISE:
            b_x += tl.load(noise_ptr + o_k + o_x, mask=m_x & (i % V == V - 1), other=0.0).to(tl.float32)
        if V == 1:
            b_p = b_x
        else:
            b_p = tl.where(first, b_mid, b_x)
    tl.store(out_ptr + o_x, b_x.to(out_ptr.dtype.element_ty), mask=m_x)


@triton.jit
def stage_time(i, V: tl.constexpr, METHOD: tl.constexpr):
    """Evaluation i's time in steps."""
    if METHOD == "midpoint":
        return 0.5 * i
    elif METHOD == "heun":
        # The second evaluation of a step is at its end.
        return 1.0 * (i // 2 + i % 2)
    else:
        return 1.0 * i


@triton.jit
def time_features(b_t, p_t, o_s, o_t, DTYPE: tl.constexpr, NET: tl.constexpr):
    """Each row's time features [BM, TP]; zeros that nobody reads with TABLE, or where FiLM has had them already."""
    BM: tl.constexpr = NET.BM
    TP: tl.constexpr = NET.TP
    if NET.TABLE or NET.TIME == "rows":
        return tl.zeros([BM, TP], DTYPE)
    elif NET.TIME == "given":
        return tl.load(p_t + o_s[:, None] * TP + o_t[None, :])
    else:
        return cast(embed_time(b_t, o_t, NET), DTYPE, NET)


def integrate(
    x_0: Tensor,
    inputs: Prepared,
    packed: Packed,
    times: tuple[Tensor, Tensor] | tuple[float, float],
    step_noise: Tensor | None,
    num_steps: int,
    method: str,
    keep: bool,
    saved: Saved | None,
    net: plan.Network,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_K, path, stages) of the walk from x_0 [E, B, S, D]; path and stages [K, E, B, S, D] with `keep`, else empty.

    `times` are start and end as numbers, or as tensors [E, B, S]; with `saved` the activations of every evaluation go
    there.
    """
    e, b, s, d = x_0.shape
    m = b * s
    x_0 = x_0.contiguous()
    mp = plan.padded_rows(m)
    out = torch.empty_like(x_0)
    two = plan.evaluations(method) == 2
    path = x_0.new_empty((num_steps, e, b, s, d) if keep else (0,), dtype=torch.float32)
    stages = x_0.new_empty((num_steps, e, b, s, d) if keep and two else (0,), dtype=torch.float32)
    shared = not isinstance(times[0], Tensor)
    arch, sms = target(x_0.device)
    if shared and method == "euler" and step_noise is None and not keep and saved is None:
        ring = plan.ring(arch, net) if launch.rings() else None
        groups = plan.groups(arch, sms, net, e, m, ring is not None)
        if groups is not None:
            return integrate_by_groups(x_0, inputs, packed, times, num_steps, groups, net), path, stages
        if ring is not None:
            # Gluon is imported where it is used: not every triton has what this asks of it.
            from .ring import integrate_by_ring

            return integrate_by_ring(x_0, inputs, packed, times, num_steps, ring, net), path, stages
    y = turns(x_0, e, mp, net) if saved is None or net.fold else saved.out
    tiles = plan.choose("integrate_fwd", arch, sms, net, e * m)
    # The backward pass reads the padding too.
    integrate_fwd_kernel[(triton.cdiv(m if saved is None else mp, tiles.rows), e)](
        x_0,
        out,
        path,
        stages,
        x_0 if step_noise is None else step_noise.contiguous(),
        *((x_0, x_0) if shared else (t.contiguous() for t in times)),
        *inputs.pointers(out),
        *packed,
        y if saved is None else saved.pre,
        x_0 if saved is None else saved.stats,
        y,
        partial_sums(x_0, e, mp, net),
        m,
        mp,
        s,
        num_steps,
        num_steps * plan.evaluations(method),
        *(times if shared else (0.0, 0.0)),
        *inputs.film_strides(),
        *scalars(net),
        mp if saved is None else saved.rows,
        NET=net_shape(net, shared, tiles),
        V=plan.evaluations(method),
        METHOD=method,
        NOISE=step_noise is not None,
        KEEP=keep,
        SAVE=saved is not None,
        NARROW=plan.narrow(net),
        **options(tiles),
    )
    return out, path, stages
