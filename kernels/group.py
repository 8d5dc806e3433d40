"""The K-step walk by groups of programs that share their rows: for few rows of a wide network.

Of every layer each of a group's G programs computes BN columns, whose weights it keeps in shared memory for the whole
walk; behind each layer the group's programs meet at a counter. Nothing but activations moves then, and a walk's time
is that of K L meetings in place of K L times all weights through one multiprocessor. The same kernel, launched once per
layer, needs no counter and no programs that run at the same time: K L launches that a CUDA graph replays, and what the
interpreter runs.

Layers pass on what they store un-normalised, and each program's share of the rows' sums, [G, 2] numbers a row: the norm
is folded (see kernels/network.py). Nothing is added atomically, so bits do not depend on who comes first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, plan
from .pack import Packed, Prepared, net_shape, options, product_dtype, scalars
from .tile import activate, cast, embed_state, product, read_velocity, row_scale


@triton.jit
def meet(p_count, arrivals):
    """Waits until the group's programs have come here so often that the counter is at `arrivals`.

    What they stored before it is what loads behind it find.
    """
    tl.debug_barrier()
    tl.atomic_add(p_count, 1, sem="release", scope="gpu")
    while tl.atomic_add(p_count, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def load_shared(p):
    """Of what other programs store while this one runs: not from the cache of one multiprocessor."""
    return tl.load(p, cache_modifier=".cg")


@triton.jit
def norm_of(p_stats, r_b, eps, MP, NET: tl.constexpr, G: tl.constexpr):
    """The factor of rows r_b's norm, from the shares of all programs of the group."""
    o_g = tl.arange(0, G)
    p = p_stats + o_g[:, None] * (2 * MP) + r_b[None, :]
    _, r = row_scale(tl.sum(load_shared(p), 0), tl.sum(load_shared(p + MP), 0), NET.H[0], eps)
    return r


@triton.jit(do_not_specialize=["M", "MP", "R", "samples", "num_steps", "first_step", "steps"])
def walk_group_kernel(
    x_ptr,  # [E, M, D] start
    out_ptr,  # [E, M, D] end
    state_ptr,  # [2, E, MP, DP] float32: the state, two steps take turns
    y_ptr,  # [2, E, MP, HP] activations, two layers take turns
    stats_ptr,  # [2, E, G, 2, MP] float32: each program's sum and sum of squares, likewise
    count_ptr,  # [E, groups] int32 zeros
    c_ptr,  # [E, B, HP] cond's share of the first layer
    time_ptr,  # [E, K, HP] time's share of it, bias included
    w_feat_ptr,  # see network_fwd
    w_hidden_ptr,
    b_hidden_ptr,
    w_out_ptr,
    b_out_ptr,
    M,
    MP,
    R,  # rows of a group, a multiple of BM
    samples,
    num_steps,
    first_step,
    steps,
    start,
    end,
    low,
    high,
    std,
    eps,
    output_scale,
    NET: tl.constexpr,
    LAYER: tl.constexpr,  # -1: the whole walk; else this layer of step `first_step` alone, L: the last state
    G: tl.constexpr,
):
    """x <- x + h v(x, t_k, cond) for k = 0..K-1."""
    i_g = tl.program_id(0) // G
    i_n = tl.program_id(0) % G
    i_e = tl.program_id(1).to(tl.int64)
    n_e = tl.num_programs(1).to(tl.int64)
    L: tl.constexpr = NET.L
    HP: tl.constexpr = NET.HP[0]
    BN: tl.constexpr = NET.BN
    o_n = i_n * BN + tl.arange(0, BN)
    o_h = tl.arange(0, HP)
    r_0 = i_g * R
    b_h = (end - start) / num_steps
    # Read before the steps: the compiler leaves them in shared memory.
    b_wf = tl.load(w_feat_ptr + (i_e * NET.FP + tl.arange(0, NET.FP))[:, None] * HP + o_n[None, :])
    hidden = ()
    for l in tl.static_range(1, L):
        p_w = w_hidden_ptr + (n_e * (l - 1) + i_e) * HP * HP
        if LAYER < 0 or l == LAYER:
            hidden = hidden + (tl.load(p_w + o_h[:, None] * HP + o_n[None, :]),)  # noqa: RUF005 - triton has no stars
        else:
            hidden = hidden + (0,)  # noqa: RUF005
    b_wo = head_weights(w_out_ptr + i_e * HP * NET.DP, w_feat_ptr.dtype.element_ty, NET)
    p_count = count_ptr + i_e * (tl.num_programs(0) // G) + i_g
    met = 0
    for i in tl.range(0, steps, num_stages=1):
        k = first_step + i
        for l in tl.static_range(L):
            if LAYER < 0 or l == LAYER:
                turn = (k * L + l) % 2
                p_in = y_ptr + ((1 - turn) * n_e + i_e) * MP * HP
                p_out = y_ptr + (turn * n_e + i_e) * MP * HP
                p_stats_in = stats_ptr + ((1 - turn) * n_e + i_e) * (2 * G) * MP
                p_stats_out = stats_ptr + ((turn * n_e + i_e) * G + i_n) * 2 * MP
                for j in tl.range(0, R, NET.BM, num_stages=1):
                    r_b = r_0 + j + tl.arange(0, NET.BM)
                    if l == 0:
                        b_x = next_state(
                            x_ptr, state_ptr, p_in, p_stats_in, b_wo, b_out_ptr, r_b, i_n, i_e, n_e, M, MP, k,
                            num_steps, start, end, b_h, eps, output_scale, NET, G,
                        )  # fmt: skip
                        b_f = embed_state(b_x, tl.arange(0, NET.FP), low, high, std, NET)
                        b_acc = product(cast(b_f, w_feat_ptr.dtype.element_ty, NET), b_wf, NET)
                        b_acc += tl.load(time_ptr + (i_e * num_steps + k) * HP + o_n)[None, :]
                        if NET.COND:
                            o_c = tl.minimum(r_b, M - 1) // samples
                            p_c = c_ptr + (i_e * (M // samples) + o_c.to(tl.int64))[:, None] * HP + o_n[None, :]
                            b_acc += tl.load(p_c).to(tl.float32)
                    else:
                        b_a = load_shared(p_in + r_b[:, None] * HP + o_h[None, :])
                        b_acc = product(b_a, hidden[l - 1], NET)
                        if NET.NORM == "after":
                            b_acc = b_acc * norm_of(p_stats_in, r_b, eps, MP, NET, G)[:, None]
                        b_acc += tl.load(b_hidden_ptr + (n_e * l + i_e) * HP + o_n)[None, :]
                    b_y = activate(b_acc, NET)
                    tl.store(p_out + r_b[:, None] * HP + o_n[None, :], cast(b_y, y_ptr.dtype.element_ty, NET))
                    if NET.NORM == "after":
                        tl.store(p_stats_out + r_b, tl.sum(b_y, 1))
                        tl.store(p_stats_out + MP + r_b, tl.sum(b_y * b_y, 1))
                if LAYER < 0:
                    met += G
                    meet(p_count, met)
    if LAYER < 0 or LAYER == L:
        # The last state takes little: the group's rows are shared out by tiles.
        turn_out = (num_steps * L) % 2
        p_last = y_ptr + ((1 - turn_out) * n_e + i_e) * MP * HP
        p_stats_last = stats_ptr + ((1 - turn_out) * n_e + i_e) * (2 * G) * MP
        for j in tl.range(i_n * NET.BM, R, G * NET.BM, num_stages=1):
            r_last = r_0 + j + tl.arange(0, NET.BM)
            b_end = next_state(
                x_ptr, state_ptr, p_last, p_stats_last, b_wo, b_out_ptr, r_last, 1, i_e, n_e, M, MP, num_steps,
                num_steps, start, end, b_h, eps, output_scale, NET, G,
            )  # fmt: skip
            o_d = tl.arange(0, NET.DP)
            m_x = (r_last < M)[:, None] & (o_d < NET.D)[None, :]
            p_x = out_ptr + (i_e * M + r_last)[:, None] * NET.D + o_d[None, :]
            tl.store(p_x, b_end.to(out_ptr.dtype.element_ty), mask=m_x)


@triton.jit
def head_weights(p_w, DTYPE: tl.constexpr, NET: tl.constexpr):
    """The head's weights: [HP] float32 of a scalar, else [HP, DP]."""
    o_h = tl.arange(0, NET.HP[0])
    if NET.DP == 1:
        return tl.load(p_w + o_h)
    else:
        return cast(tl.load(p_w + o_h[:, None] * NET.DP + tl.arange(0, NET.DP)[None, :]), DTYPE, NET)


@triton.jit
def next_state(
    x_ptr,
    state_ptr,
    p_y,  # the last layer's activations of step k - 1
    p_stats,
    b_wo,
    b_out_ptr,
    r_b,
    i_n,
    i_e,
    n_e,
    M,
    MP,
    k,
    num_steps,
    start,
    end,
    b_h,
    eps,
    output_scale,
    NET: tl.constexpr,
    G: tl.constexpr,
):
    """Rows r_b's state at step k, [BM, DP]: every program of the group works it out, the first stores it."""
    HP: tl.constexpr = NET.HP[0]
    DP: tl.constexpr = NET.DP
    o_d = tl.arange(0, DP)
    o_h = tl.arange(0, HP)
    m_x = (r_b < M)[:, None] & (o_d < NET.D)[None, :]
    b_x = tl.load(x_ptr + (i_e * M + r_b)[:, None] * NET.D + o_d[None, :], mask=m_x & (k == 0), other=0.0).to(
        tl.float32
    )
    o_s = r_b[:, None] * DP + o_d[None, :]
    if k > 0:
        b_a = load_shared(p_y + r_b[:, None] * HP + o_h[None, :])
        if DP == 1:
            b_v = tl.sum(b_a.to(tl.float32) * b_wo[None, :], 1)[:, None]
        else:
            b_v = product(b_a, b_wo, NET)
        if NET.NORM == "after":
            b_v = b_v * norm_of(p_stats, r_b, eps, MP, NET, G)[:, None]
        b_v += tl.load(b_out_ptr + i_e * DP + o_d)[None, :]
        b_x += load_shared(state_ptr + (((k + 1) % 2) * n_e + i_e) * MP * DP + o_s)
        b_part = (k - 1) * 1.0 / num_steps
        b_t = (1.0 - b_part) * start + b_part * end
        b_x += b_h * read_velocity(b_v, b_x, b_t, output_scale, NET)
    tl.store(state_ptr + ((k % 2) * n_e + i_e) * MP * DP + o_s, b_x, mask=(o_s >= 0) & (i_n == 0))
    return b_x


def integrate_by_groups(
    x_0: Tensor,
    inputs: Prepared,
    packed: Packed,
    times: tuple[float, float],
    num_steps: int,
    groups: plan.Groups,
    net: plan.Network,
) -> Tensor:
    """x_K of the Euler walk from x_0 [E, B, S, D] between two times that all rows share."""
    e, b, s, _ = x_0.shape
    m = b * s
    x_0 = x_0.contiguous()
    tiles, width, dp = groups.tiles, net.padded[0], net.state_padded
    rows = triton.cdiv(m, groups.count * tiles.rows) * tiles.rows
    mp, g = groups.count * rows, width // tiles.columns
    out = torch.empty_like(x_0)
    count = x_0.new_zeros(e * groups.count, dtype=torch.int32)
    state = x_0.new_empty(2 * e * mp * dp, dtype=torch.float32)
    y = x_0.new_empty(2 * e * mp * width, dtype=product_dtype(net))
    stats = x_0.new_empty(4 * e * g * mp, dtype=torch.float32)

    def call(layer: int, step: int, steps: int) -> None:
        walk_group_kernel[(groups.count * g, e)](
            x_0,
            out,
            state,
            y,
            stats,
            count,
            out if inputs.cond is None else inputs.cond,
            inputs.time,
            packed.w_feat,
            packed.w_hidden,
            packed.b_hidden,
            packed.w_out,
            packed.b_out,
            m,
            mp,
            rows,
            s,
            num_steps,
            step,
            steps,
            *times,
            *scalars(net),
            NET=net_shape(net, True, tiles),
            LAYER=layer,
            G=g,
            **options(tiles),
            **({"launch_cooperative_grid": True} if layer < 0 else {}),
        )

    if groups.meets and not launch.interpreted():
        call(-1, 0, num_steps)
        return out
    for step in range(num_steps):
        for layer in range(net.layers):
            call(layer, step, 1)
    call(net.layers, num_steps, 0)
    return out
