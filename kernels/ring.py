"""The K-step walk by two groups of warps that take turns at the tensor cores: many rows of a wide network on Hopper.

A program owns 64 rows of one member for the whole walk. Activations never leave its shared memory: two buffers take
turns from layer to layer. One warp loads weights, tile after tile in the order in which they are multiplied, into a
ring of places in shared memory. Two consumers of four warps each multiply every other tile of columns, and what one
does behind its products (bias, activation, sums, rounding) hides behind the other's products. Nobody waits for anything
but data: a tile of weights, a chunk of the layer before, a free place in the ring.

Barriers. Each consumer waits for every phase of what it waits for, or is held back by another barrier in between, so a
parity tells phases apart:

    full[c, s]    a tile for consumer c is in place s of the ring; consumer c counts the phases in a number of bits
    empty[s]      what was in place s has been multiplied
    ready[g, n]   columns n of a layer are stored, the rows' sums with the last; layers take turns, so that nobody gets
                  to a barrier's next phase before all have seen the present one
    begun         the state's features are stored, where the last layer's output was

A scalar state's head is part of the last layer's epilogue, and each consumer has half of the rows' states. A state of
several dimensions has a product of its own as its head, and the first consumer has all of it.

Written in Gluon, where places, copies and barriers are explicit. `tests/kernel_machine.py` runs it without a GPU.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import plan
from .pack import Packed, Prepared, net_shape, options, scalars
from .tile import activate, embed_state, read_velocity, row_scale

# Their names change between versions of triton.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
meet = getattr(gl, "barrier", None) or gl.thread_barrier

BK = gl.constexpr(plan.RING_TILE)


# The warp that loads -------------------------------------------------------------------------------------------------


@gluon.jit
def load_weights(first, hidden, ring, full, empty, i_e, n_e, num_steps, NET: gl.constexpr, PLACES: gl.constexpr):
    """Every tile of weights in the order in which they are multiplied, each as soon as its place is free."""
    HP: gl.constexpr = NET.HP[0]
    BN: gl.constexpr = NET.BN
    at = 0
    for _ in range(num_steps):
        for n in gl.static_range(HP // BN):
            # Rows beyond the member's own are not multiplied.
            at = load_next(first, i_e * NET.FP, n, consumer_of(n, True), ring, full, empty, at, NET, PLACES)
        for l in range(1, NET.L):
            row = ((l - 1) * n_e + i_e) * HP
            for n in gl.static_range(HP // BN):
                for k in range(0, HP, BK):
                    at = load_next(hidden, row + k, n, consumer_of(n, False), ring, full, empty, at, NET, PLACES)


@gluon.constexpr_function
def consumer_of(n, first):
    """Who multiplies tile n of a layer's columns. Of the first layer, where there is next to nothing to multiply, the
    second consumer takes all but one: the first goes on to the layer behind it while chunks come in."""
    return min(n, 1) if first else n % 2


@gluon.jit
def load_next(
    weights,
    row,
    n: gl.constexpr,
    C: gl.constexpr,
    ring,
    full,
    empty,
    at,
    NET: gl.constexpr,
    PLACES: gl.constexpr,
):
    """Starts the load of tile number `at`, for consumer C; returns the number of the next."""
    place = at % PLACES
    bar = full.index(C * PLACES + place)
    mbarrier.wait(empty.index(place), ((at // PLACES) & 1) ^ 1)
    mbarrier.expect(bar, BK * NET.BN * 2)
    load_tile(weights, [row, n * NET.BN], bar, ring.index(place))
    return at + 1


# The warps that multiply ---------------------------------------------------------------------------------------------


@gluon.jit
def walk_columns(
    C: gl.constexpr,  # this consumer
    pointers,
    numbers,
    buffers,
    barriers,
    i_e,
    n_e,
    r_0,
    NET: gl.constexpr,
    PLACES: gl.constexpr,
):
    """A consumer's columns of every layer of every step, and its part of the state."""
    x_ptr, out_ptr, c_ptr, time_ptr, b_hidden_ptr, w_out_ptr, b_out_ptr = pointers
    M, samples, num_steps, start, end, low, high, std, eps, output_scale = numbers
    act, _, stats, head = buffers
    _, _, ready, begun = barriers
    L: gl.constexpr = NET.L
    HP: gl.constexpr = NET.HP[0]
    BM: gl.constexpr = NET.BM
    NC: gl.constexpr = HP // NET.BN
    OWNER: gl.constexpr = C == 0 or NET.DP == 1
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, NET.BN, 16])
    STATE: gl.constexpr = state_layout(NET.DP, NET.FP)
    b_h = (end - start) / num_steps
    o_c = gl.minimum(r_0 + gl.arange(0, BM, layout=gl.SliceLayout(1, MMA)), M - 1) // samples
    p_c = c_ptr + (i_e * (M // samples) + o_c.to(gl.int64)) * HP
    p_out = w_out_ptr + i_e * HP * NET.DP
    if OWNER:
        o_x, m_x = state_rows(C, i_e, r_0, M, STATE, NET)
        b_x = gl.load(x_ptr + o_x, mask=m_x, other=0.0).to(gl.float32)
        begin_step(C, b_x, act, begun, 1, low, high, std, STATE, NET)
    phases = 0  # bit s: parity of the next phase of full[C, s]
    at = 0
    for i in range(num_steps):
        g = i * L
        mbarrier.wait(begun, i & 1)
        p_time = time_ptr + (i_e * num_steps + i) * HP
        phases = layer(C, phases, at, g, p_time, p_c, p_out, buffers, barriers, eps, NET, PLACES, MMA, True, L == 1)
        at += NC
        for l in range(1, L - 1):
            p_bias = b_hidden_ptr + (n_e * l + i_e) * HP
            phases = layer(
                C, phases, at, g + l, p_bias, p_c, p_out, buffers, barriers, eps, NET, PLACES, MMA, False, False
            )
            at += NC * (HP // BK)
        if L > 1:
            p_last = b_hidden_ptr + (n_e * (L - 1) + i_e) * HP
            phases = layer(
                C, phases, at, g + L - 1, p_last, p_c, p_out, buffers, barriers, eps, NET, PLACES, MMA, False, True
            )
            at += NC * (HP // BK)
        if OWNER:
            last = g + L - 1
            for n in gl.static_range(NC):
                mbarrier.wait(ready.index((last % 2) * NC + n), (last // 2) & 1)
            b_v = read_head(C, act, stats, head, b_out_ptr + i_e * NET.DP, last % 2, eps, STATE, NET)
            part = i * 1.0 / num_steps
            b_x += b_h * read_velocity(b_v, b_x, (1.0 - part) * start + part * end, output_scale, NET)
            if i + 1 < num_steps:
                begin_step(C, b_x, act, begun, last % 2, low, high, std, STATE, NET)
    if OWNER:
        gl.store(out_ptr + o_x, b_x.to(out_ptr.dtype.element_ty), mask=m_x)


@gluon.jit
def layer(
    C: gl.constexpr,
    phases,
    at,  # number of the layer's first tile
    g,  # of the layer itself, counted over all steps
    p_bias,  # of the first layer the table's row, time's share included
    p_c,
    p_out,
    buffers,
    barriers,
    eps,
    NET: gl.constexpr,
    PLACES: gl.constexpr,
    MMA: gl.constexpr,
    FIRST: gl.constexpr,
    LAST: gl.constexpr,
):
    """A consumer's columns of one layer; returns `phases`."""
    act, ring, stats, head = buffers
    full, empty, ready, _ = barriers
    HP: gl.constexpr = NET.HP[0]
    BM: gl.constexpr = NET.BM
    BN: gl.constexpr = NET.BN
    NC: gl.constexpr = HP // BN
    KC: gl.constexpr = 1 if FIRST else HP // BK
    PER: gl.constexpr = BN // BK
    # This consumer's tiles, see `consumer_of`.
    STRIDE: gl.constexpr = 1 if FIRST and C == 1 else 2
    END: gl.constexpr = 1 if FIRST and C == 0 else NC
    NORM: gl.constexpr = NET.NORM == "after"
    ROWS: gl.constexpr = gl.SliceLayout(1, MMA)
    turn = g % 2
    before = (g + 1) % 2
    o_n = gl.arange(0, BN, layout=gl.SliceLayout(0, MMA))
    s1 = gl.zeros([BM], gl.float32, layout=ROWS)
    s2 = gl.zeros([BM], gl.float32, layout=ROWS)
    s_v = gl.zeros([BM], gl.float32, layout=ROWS)
    r = s1
    for n in gl.static_range(C, END, STRIDE):
        # On their way while products run.
        b_bias = gl.load(p_bias + n * BN + o_n)
        if FIRST and NET.COND:
            b_c = gl.load(p_c[:, None] + (n * BN + o_n)[None, :])
        b_acc = gl.zeros([BM, BN], gl.float32, layout=MMA)
        first = at + n * KC
        for k in range(KC):
            if not FIRST and n == C:
                mbarrier.wait(ready.index(before * NC + k // PER), ((g - 1) // 2) & 1, pred=k % PER == 0)
            place = (first + k) % PLACES
            mbarrier.wait(full.index(C * PLACES + place), (phases >> place) & 1)
            phases = phases ^ (1 << place)
            b_a = act.index(before * (HP // BK) + k)
            b_w = ring.index(place)
            if FIRST and NET.FP < BK:
                b_a = b_a.slice(0, NET.FP, dim=1)
                b_w = b_w.slice(0, NET.FP, dim=0)
            b_acc = warpgroup_mma(b_a, b_w, b_acc, use_acc=k > 0, is_async=True)
            # The product before has ended, so its place is free.
            b_acc = warpgroup_mma_wait(num_outstanding=1, deps=(b_acc,))
            mbarrier.arrive(empty.index((first + k + PLACES - 1) % PLACES), count=1, pred=k > 0)
        b_acc = warpgroup_mma_wait(num_outstanding=0, deps=(b_acc,))
        mbarrier.arrive(empty.index((first + KC - 1) % PLACES), count=1)
        if not FIRST and NORM:
            if n == C:
                s_1, s_2 = row_sums(stats, before, 0, BM, ROWS)
                _, r = row_scale(s_1, s_2, NET.H[0], eps)
            b_acc = b_acc * r[:, None]
        b_acc += b_bias[None, :]
        if FIRST and NET.COND:
            b_acc += b_c.to(gl.float32)
        b_y = activate(b_acc, NET)
        if NORM:
            s1 += gl.sum(b_y, 1)
            s2 += gl.sum(b_y * b_y, 1)
        if LAST and NET.DP == 1:
            s_v += gl.sum(b_y * gl.load(p_out + n * BN + o_n)[None, :], 1)
        else:
            store_chunk(act, turn * (HP // BK) + n * PER, b_y.to(gl.bfloat16), NET)
        if n + STRIDE >= END:
            if NORM:
                stats.index(turn * 4 + C * 2).store(s1)
                stats.index(turn * 4 + C * 2 + 1).store(s2)
            if LAST and NET.DP == 1:
                head.index(C).store(s_v)
        fence_async_shared()
        meet()
        mbarrier.arrive(ready.index(turn * NC + n), count=1)
    return phases


@gluon.jit
def store_chunk(act, first, b_y, NET: gl.constexpr):
    """A tile of columns, as tiles of BK."""
    if NET.BN == BK:
        act.index(first).store(b_y)
    else:
        left, right = gl.split(b_y.reshape([NET.BM, 2, BK]).permute([0, 2, 1]))
        act.index(first).store(left)
        act.index(first + 1).store(right)


@gluon.jit
def row_sums(stats, turn, low: gl.constexpr, count: gl.constexpr, ROWS: gl.constexpr):
    """Sum and sum of squares of some rows, of both consumers' columns."""
    s1 = stats.index(turn * 4).slice(low, count).load(ROWS) + stats.index(turn * 4 + 2).slice(low, count).load(ROWS)
    s2 = stats.index(turn * 4 + 1).slice(low, count).load(ROWS) + stats.index(turn * 4 + 3).slice(low, count).load(ROWS)
    return s1, s2


# The state -----------------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def state_layout(DP, FP):
    """Of the state of a consumer's rows: [BM, DP] as products leave it, or [BM / 2, FP] of a scalar's features."""
    if DP > 1:
        return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DP, 16])
    columns = 8 if FP >= 32 else 4
    return gl.BlockedLayout([1, columns], [32 * columns // FP, FP // columns], [4, 1], [1, 0])


@gluon.jit
def state_rows(C: gl.constexpr, i_e, r_0, M, STATE: gl.constexpr, NET: gl.constexpr):
    """Offsets of a consumer's part of the state, and which of it there is."""
    if NET.DP == 1:
        HALF: gl.constexpr = NET.BM // 2
        r_b = r_0 + C * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, STATE))
        return i_e * M + r_b, r_b < M
    else:
        r_b = r_0 + gl.arange(0, NET.BM, layout=gl.SliceLayout(1, STATE))
        o_d = gl.arange(0, NET.DP, layout=gl.SliceLayout(0, STATE))
        return (i_e * M + r_b)[:, None] * NET.D + o_d[None, :], (r_b < M)[:, None] & (o_d < NET.D)[None, :]


@gluon.jit
def begin_step(C: gl.constexpr, b_x, act, begun, turn, low, high, std, STATE: gl.constexpr, NET: gl.constexpr):
    """The state's features to where the first layer reads them."""
    o_f = gl.arange(0, NET.FP, layout=gl.SliceLayout(0, STATE))
    place = act.index(turn * (NET.HP[0] // BK))
    if NET.FP < BK:
        place = place.slice(0, NET.FP, dim=1)
    if NET.DP == 1:
        HALF: gl.constexpr = NET.BM // 2
        b_f = embed_state(b_x[:, None], o_f, low, high, std, NET)
        place.slice(C * HALF, HALF, dim=0).store(b_f.to(gl.bfloat16))
    else:
        place.store(embed_state(b_x, o_f, low, high, std, NET).to(gl.bfloat16))
    fence_async_shared()
    meet()
    mbarrier.arrive(begun, count=1)


@gluon.jit
def read_head(C: gl.constexpr, act, stats, head, p_b_out, turn, eps, STATE: gl.constexpr, NET: gl.constexpr):
    """What the head makes of the last layer for a consumer's part of the state."""
    NORM: gl.constexpr = NET.NORM == "after"
    ROWS: gl.constexpr = gl.SliceLayout(1, STATE)
    if NET.DP == 1:
        HALF: gl.constexpr = NET.BM // 2
        b_v = head.index(0).slice(C * HALF, HALF).load(ROWS) + head.index(1).slice(C * HALF, HALF).load(ROWS)
        if NORM:
            s1, s2 = row_sums(stats, turn, C * HALF, HALF, ROWS)
            _, r = row_scale(s1, s2, NET.H[0], eps)
            b_v = b_v * r
        return b_v + gl.load(p_b_out)
    else:
        KC: gl.constexpr = NET.HP[0] // BK
        BM: gl.constexpr = NET.BM
        DP: gl.constexpr = NET.DP
        b_acc = gl.zeros([BM, DP], gl.float32, layout=STATE)
        for k in range(KC):
            b_acc = warpgroup_mma(act.index(turn * KC + k), head.index(k), b_acc, use_acc=k > 0, is_async=True)
            b_acc = warpgroup_mma_wait(num_outstanding=1, deps=(b_acc,))
        b_acc = warpgroup_mma_wait(num_outstanding=0, deps=(b_acc,))
        if NORM:
            s1, s2 = row_sums(stats, turn, 0, NET.BM, ROWS)
            _, r = row_scale(s1, s2, NET.H[0], eps)
            b_acc = b_acc * r[:, None]
        return b_acc + gl.load(p_b_out + gl.arange(0, NET.DP, layout=gl.SliceLayout(0, STATE)))[None, :]


# The kernel ----------------------------------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=["M", "samples", "num_steps"])
def walk_ring_kernel(
    x_ptr,  # [E, M, D] start
    out_ptr,  # [E, M, D] end
    c_ptr,  # [E, B, HP] cond's share of the first layer
    time_ptr,  # [E, K, HP] time's share of it, bias included
    first,  # [E FP, HP] the state's weights, in tiles
    hidden,  # [(L - 1) E HP, HP] those of the layers behind it
    b_hidden_ptr,
    w_out_ptr,
    b_out_ptr,
    M,
    samples,
    num_steps,
    start,
    end,
    low,
    high,
    std,
    eps,
    output_scale,
    NET: gl.constexpr,
    PLACES: gl.constexpr,
):
    """x <- x + h v(x, t_k, cond) for k = 0..K-1."""
    HP: gl.constexpr = NET.HP[0]
    DP: gl.constexpr = NET.DP
    BM: gl.constexpr = NET.BM
    NC: gl.constexpr = HP // NET.BN
    i_e = gl.program_id(1)
    n_e = gl.num_programs(1)
    r_0 = gl.program_id(0) * BM
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ROWS_OF_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], gl.bfloat16)
    act = gl.allocate_shared_memory(gl.bfloat16, [2 * (HP // BK), BM, BK], ROWS_OF_TILE)
    ring = gl.allocate_shared_memory(gl.bfloat16, [PLACES, BK, NET.BN], hidden.layout)
    stats = gl.allocate_shared_memory(gl.float32, [8, BM], FLAT)
    if DP == 1:
        head = gl.allocate_shared_memory(gl.float32, [2, BM], FLAT)
    else:
        HEAD: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, DP], gl.bfloat16)
        head = gl.allocate_shared_memory(gl.bfloat16, [HP // BK, BK, DP], HEAD)
        FEW: gl.constexpr = gl.BlockedLayout([1, 4], [128 // DP, DP // 4], [4, 1], [1, 0])
        o_k = gl.arange(0, BK, layout=gl.SliceLayout(1, FEW))
        o_d = gl.arange(0, DP, layout=gl.SliceLayout(0, FEW))
        for k in gl.static_range(HP // BK):
            b_w = gl.load(w_out_ptr + (i_e * HP + k * BK + o_k)[:, None] * DP + o_d[None, :])
            head.index(k).store(b_w.to(gl.bfloat16))
    full = gl.allocate_shared_memory(gl.int64, [2 * PLACES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2 * NC, 1], mbarrier.MBarrierLayout())
    begun = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for s in gl.static_range(2 * PLACES):
        mbarrier.init(full.index(s), count=1)
    for s in gl.static_range(PLACES):
        mbarrier.init(empty.index(s), count=1)
    for s in gl.static_range(2 * NC):
        mbarrier.init(ready.index(s), count=1)
    mbarrier.init(begun, count=2 if DP == 1 else 1)
    fence_async_shared()
    meet()
    pointers = (x_ptr, out_ptr, c_ptr, time_ptr, b_hidden_ptr, w_out_ptr, b_out_ptr)
    numbers = (M, samples, num_steps, start, end, low, high, std, eps, output_scale)
    buffers = (act, ring, stats, head)
    barriers = (full, empty, ready, begun)
    gl.warp_specialize(
        [
            (walk_columns, (0, pointers, numbers, buffers, barriers, i_e, n_e, r_0, NET, PLACES)),
            (walk_columns, (1, pointers, numbers, buffers, barriers, i_e, n_e, r_0, NET, PLACES)),
            (load_weights, (first, hidden, ring, full, empty, i_e, n_e, num_steps, NET, PLACES)),
        ],
        [4, 1],
        [216, 40],
    )


def tile_layout(tiles: plan.Tiles) -> gl.NVMMASharedLayout:
    """How a tile of weights is laid out in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([plan.RING_TILE, tiles.columns], gl.bfloat16)


def integrate_by_ring(
    x_0: Tensor,
    inputs: Prepared,
    packed: Packed,
    times: tuple[float, float],
    num_steps: int,
    ring: plan.Ring,
    net: plan.Network,
) -> Tensor:
    """x_K of the Euler walk from x_0 [E, B, S, D] between two times that all rows share."""
    e, b, s, _ = x_0.shape
    m, width, tiles = b * s, net.padded[0], ring.tiles
    x_0 = x_0.contiguous()
    out = torch.empty_like(x_0)
    block, layout = [plan.RING_TILE, tiles.columns], tile_layout(tiles)
    first, hidden = (
        TensorDescriptor.from_tensor(x.view(-1, width), block, layout)
        for x in (packed.w_feat, packed.w_hidden if net.layers > 1 else packed.w_feat)
    )
    walk_ring_kernel[(triton.cdiv(m, tiles.rows), e)](
        x_0,
        out,
        out if inputs.cond is None else inputs.cond,
        inputs.time,
        first,
        hidden,
        packed.b_hidden,
        packed.w_out,
        packed.b_out,
        m,
        s,
        num_steps,
        *times,
        *scalars(net),
        NET=net_shape(net, True, tiles),
        PLACES=ring.places,
        **options(tiles),
    )
    return out
