"""The K-step walk by two groups of warps that take turns at the tensor cores: for many rows of a wide network on Hopper.

A program owns 64 rows of one member for the whole walk. Activations never leave its shared memory: two buffers take
turns from layer to layer. One warp loads weights, tile after tile in the order in which they are multiplied, into a ring
of shared memory; two groups of four warps each multiply every other tile of columns, and what one does behind its
products (bias, activation, sums, rounding) hides behind the other's products. Everybody waits for data alone: a tile of
weights, a chunk of the layer before, a free place in the ring.

It is written in Gluon, in which places in memory, copies and barriers are explicit; see tests/gluon_machine.py for how
it runs without a GPU.

Barriers, each waited for once per phase or more rarely, never by somebody who is a whole phase behind or ahead:

    full[c, s]    a tile for consumer c lies in place s of the ring; each consumer counts its own phases
    empty[s]      what lay in place s has been multiplied
    ready[g, n]   columns n of a layer's output are stored, and its rows' sums with the last of them; layers take turns
    begun         the state's features are stored, in place of the last layer's output, which nobody multiplies
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

BK = gl.constexpr(64)


@gluon.jit
def load_weights(
    feat, hidden, ring, full, empty, i_e, n_e, num_steps, NET: gl.constexpr, PLACES: gl.constexpr
):
    """One warp: every tile of weights in the order in which they are multiplied."""
    HP: gl.constexpr = NET.HP[0]
    BN: gl.constexpr = NET.BN
    at = 0
    for _ in range(num_steps):
        for n in gl.static_range(HP // BN):
            at = load_next(feat, i_e * NET.FP, n, ring, full, empty, at, NET, PLACES)
        for l in range(1, NET.L):
            row = ((l - 1) * n_e + i_e) * HP
            for n in gl.static_range(HP // BN):
                for k in range(0, HP, BK):
                    at = load_next(hidden, row + k, n, ring, full, empty, at, NET, PLACES)


@gluon.jit
def load_next(weights, row, n: gl.constexpr, ring, full, empty, at, NET: gl.constexpr, PLACES: gl.constexpr):
    """Starts the load of one tile as soon as its place is free; returns the number of the next."""
    BN: gl.constexpr = NET.BN
    place = at % PLACES
    bar = full.index((n % 2) * PLACES + place)
    mbarrier.wait(empty.index(place), ((at // PLACES) & 1) ^ 1)
    mbarrier.expect(bar, BK * BN * 2)
    load_tile(weights, [row, n * BN], bar, ring.index(place))
    return at + 1


@gluon.jit
def walk_columns(
    C: gl.constexpr,  # this consumer: it has tiles C, C + 2, ... of every layer's columns
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
    """Four warps: their columns of every layer of every step; consumer 0 has the state as well."""
    x_ptr, out_ptr, c_ptr, time_ptr, b_hidden_ptr, w_out_ptr, b_out_ptr = pointers
    M, samples, num_steps, start, end, low, high, std, eps, output_scale = numbers
    act, ring, stats, head = buffers
    full, empty, ready, begun = barriers
    L: gl.constexpr = NET.L
    HP: gl.constexpr = NET.HP[0]
    BM: gl.constexpr = NET.BM
    BN: gl.constexpr = NET.BN
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, MMA)
    TILE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    STATE: gl.constexpr = gl.SliceLayout(1, TILE)
    PER_STEP: gl.constexpr = (HP // BN) * (1 + (L - 1) * (HP // BK))
    b_h = (end - start) / num_steps
    r_s = r_0 + gl.arange(0, BM, layout=STATE)
    if C == 0:
        b_x = gl.load(x_ptr + i_e * M + r_s, mask=r_s < M, other=0.0).to(gl.float32)
        begin_step(b_x, act, begun, low, high, std, 1, TILE, NET)
    r_b = r_0 + gl.arange(0, BM, layout=ROWS)
    o_c = gl.minimum(r_b, M - 1) // samples
    p_c = c_ptr + (i_e * (M // samples) + o_c.to(gl.int64)) * HP
    phases = 0  # bit s: parity of the next phase of full[C, s]
    for i in range(num_steps):
        at = i * PER_STEP
        g = i * L
        mbarrier.wait(begun, i & 1)
        p_bias = time_ptr + (i_e * num_steps + i) * HP
        phases = layer(
            C, phases, at, g, p_bias, p_c, w_out_ptr + i_e * HP, buffers, barriers, eps, NET, PLACES, MMA, True, L == 1
        )
        at += HP // BN
        for l in range(1, L - 1):
            p_bias = b_hidden_ptr + (n_e * l + i_e) * HP
            phases = layer(
                C, phases, at, g + l, p_bias, p_c, w_out_ptr, buffers, barriers, eps, NET, PLACES, MMA, False, False
            )
            at += (HP // BN) * (HP // BK)
        if L > 1:
            p_bias = b_hidden_ptr + (n_e * (L - 1) + i_e) * HP
            phases = layer(
                C, phases, at, g + L - 1, p_bias, p_c, w_out_ptr + i_e * HP, buffers, barriers, eps, NET, PLACES, MMA,
                False, True,
            )
        if C == 0:
            last = g + L - 1
            for n in gl.static_range(HP // BN):
                mbarrier.wait(ready.index((last % 2) * (HP // BN) + n), (last // 2) & 1)
            b_v = head.index(0).load(STATE) + head.index(1).load(STATE)
            if NET.NORM == "after":
                b_v = b_v * norm_of(stats, last % 2, STATE, eps, NET)
            b_v += gl.load(b_out_ptr + i_e)
            part = i * 1.0 / num_steps
            b_x += b_h * read_velocity(b_v, b_x, (1.0 - part) * start + part * end, output_scale, NET)
            if i + 1 < num_steps:
                begin_step(b_x, act, begun, low, high, std, last % 2, TILE, NET)
    if C == 0:
        gl.store(out_ptr + i_e * M + r_s, b_x.to(out_ptr.dtype.element_ty), mask=r_s < M)


@gluon.jit
def begin_step(b_x, act, begun, low, high, std, turn, TILE: gl.constexpr, NET: gl.constexpr):
    """The state's features to where the first layer reads them."""
    o_f = gl.arange(0, BK, layout=gl.SliceLayout(0, TILE))
    b_f = embed_state(b_x[:, None], o_f, low, high, std, NET)
    act.index(turn * (NET.HP[0] // BK)).store(b_f.to(gl.bfloat16))
    fence_async_shared()
    meet()
    mbarrier.arrive(begun, count=1)


@gluon.jit
def norm_of(stats, turn, ROWS: gl.constexpr, eps, NET: gl.constexpr):
    """The factor of every row's norm, from both consumers' sums."""
    s1 = stats.index(turn * 4).load(ROWS) + stats.index(turn * 4 + 2).load(ROWS)
    s2 = stats.index(turn * 4 + 1).load(ROWS) + stats.index(turn * 4 + 3).load(ROWS)
    _, r = row_scale(s1, s2, NET.H[0], eps)
    return r


@gluon.jit
def layer(
    C: gl.constexpr,
    phases,
    at,  # number of the layer's first tile
    g,  # of the layer itself, counted over all steps
    p_bias,  # of the first layer the table's row, time's share included
    p_c,
    p_w_out,
    buffers,
    barriers,
    eps,
    NET: gl.constexpr,
    PLACES: gl.constexpr,
    MMA: gl.constexpr,
    FIRST: gl.constexpr,
    LAST: gl.constexpr,
):
    """This consumer's columns of one layer."""
    act, ring, stats, head = buffers
    full, empty, ready, begun = barriers
    HP: gl.constexpr = NET.HP[0]
    BM: gl.constexpr = NET.BM
    BN: gl.constexpr = NET.BN
    NC: gl.constexpr = HP // BN
    KC: gl.constexpr = 1 if FIRST else HP // BK
    ROWS: gl.constexpr = gl.SliceLayout(1, MMA)
    turn = g % 2
    before = (g + 1) % 2
    o_n = gl.arange(0, BN, layout=gl.SliceLayout(0, MMA))
    s1 = gl.zeros([BM], gl.float32, layout=ROWS)
    s2 = gl.zeros([BM], gl.float32, layout=ROWS)
    s_v = gl.zeros([BM], gl.float32, layout=ROWS)
    r = s1
    for n in gl.static_range(C, NC, 2):
        b_bias = gl.load(p_bias + n * BN + o_n)
        if FIRST and NET.COND:
            b_c = gl.load(p_c[:, None] + (n * BN + o_n)[None, :])
        b_acc = gl.zeros([BM, BN], gl.float32, layout=MMA)
        for k in range(KC):
            if not FIRST and n == C:
                mbarrier.wait(ready.index(before * NC + k // (BN // BK)), ((g - 1) // 2) & 1, pred=k % (BN // BK) == 0)
            place = (at + n * KC + k) % PLACES
            mbarrier.wait(full.index(C * PLACES + place), (phases >> place) & 1)
            phases = phases ^ (1 << place)
            b_acc = warpgroup_mma(
                act.index(before * (HP // BK) + k), ring.index(place), b_acc, use_acc=k > 0, is_async=True
            )
            b_acc = warpgroup_mma_wait(num_outstanding=1, deps=(b_acc,))
            mbarrier.arrive(empty.index((at + n * KC + k + PLACES - 1) % PLACES), count=1, pred=k > 0)
        b_acc = warpgroup_mma_wait(num_outstanding=0, deps=(b_acc,))
        mbarrier.arrive(empty.index((at + n * KC + KC - 1) % PLACES), count=1)
        if not FIRST and NET.NORM == "after":
            if n == C:
                r = norm_of(stats, before, ROWS, eps, NET)
            b_acc = b_acc * r[:, None]
        b_acc += b_bias[None, :]
        if FIRST and NET.COND:
            b_acc += b_c.to(gl.float32)
        b_y = activate(b_acc, NET)
        if NET.NORM == "after":
            s1 += gl.sum(b_y, 1)
            s2 += gl.sum(b_y * b_y, 1)
        if LAST:
            s_v += gl.sum(b_y * gl.load(p_w_out + n * BN + o_n)[None, :], 1)
        else:
            store_chunk(act, turn * (HP // BK) + n * (BN // BK), b_y.to(gl.bfloat16), NET)
        if n + 2 >= NC:
            if NET.NORM == "after":
                stats.index(turn * 4 + C * 2).store(s1)
                stats.index(turn * 4 + C * 2 + 1).store(s2)
            if LAST:
                head.index(C).store(s_v)
        fence_async_shared()
        meet()
        mbarrier.arrive(ready.index(turn * NC + n), count=1)
    return phases


@gluon.jit
def store_chunk(act, first, b_y, NET: gl.constexpr):
    """A tile of columns, as tiles of BK."""
    BM: gl.constexpr = NET.BM
    if NET.BN == BK:
        act.index(first).store(b_y)
    else:
        left, right = gl.split(b_y.reshape([BM, 2, BK]).permute([0, 2, 1]))
        act.index(first).store(left)
        act.index(first + 1).store(right)


@gluon.jit(do_not_specialize=["M", "samples", "num_steps"])
def walk_ring_kernel(
    x_ptr,  # [E, M, 1] start
    out_ptr,  # [E, M, 1] end
    c_ptr,  # [E, B, HP] cond's share of the first layer
    time_ptr,  # [E, K, HP] time's share of it, bias included
    feat,  # [E FP, HP] the state's weights
    hidden,  # [(L - 1) E HP, HP] those of the other layers
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
    """x <- x + h v(x, t_k, cond) for k = 0..K-1 of a scalar state."""
    HP: gl.constexpr = NET.HP[0]
    BM: gl.constexpr = NET.BM
    BN: gl.constexpr = NET.BN
    i_e = gl.program_id(1)
    n_e = gl.num_programs(1)
    r_0 = gl.program_id(0) * BM
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    act = gl.allocate_shared_memory(
        gl.bfloat16, [2 * (HP // BK), BM, BK], gl.NVMMASharedLayout.get_default_for([BM, BK], gl.bfloat16)
    )
    ring = gl.allocate_shared_memory(gl.bfloat16, [PLACES, BK, BN], hidden.layout)
    stats = gl.allocate_shared_memory(gl.float32, [8, BM], FLAT)
    head = gl.allocate_shared_memory(gl.float32, [2, BM], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [2 * PLACES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2 * (HP // BN), 1], mbarrier.MBarrierLayout())
    begun = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for s in gl.static_range(2 * PLACES):
        mbarrier.init(full.index(s), count=1)
    for s in gl.static_range(PLACES):
        mbarrier.init(empty.index(s), count=1)
    for s in gl.static_range(2 * (HP // BN)):
        mbarrier.init(ready.index(s), count=1)
    mbarrier.init(begun, count=1)
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
            (load_weights, (feat, hidden, ring, full, empty, i_e, n_e, num_steps, NET, PLACES)),
        ],
        [4, 1],
        [216, 40],
    )


def integrate_by_ring(
    x_0: Tensor,
    inputs: Prepared,
    packed: Packed,
    times: tuple[float, float],
    num_steps: int,
    net: plan.Network,
) -> Tensor:
    """x_K of the Euler walk from x_0 [E, B, S, 1] between two times that all rows share."""
    e, b, s, _ = x_0.shape
    m, width = b * s, net.padded[0]
    x_0 = x_0.contiguous()
    out = torch.empty_like(x_0)
    tiles, places = plan.ring(net)
    block = [BK.value, tiles.columns]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)

    def tiled(x: Tensor) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x.view(-1, width), block, layout)

    walk_ring_kernel[(triton.cdiv(m, tiles.rows), e)](
        x_0,
        out,
        out if inputs.cond is None else inputs.cond,
        inputs.time,
        tiled(packed.w_feat),
        tiled(packed.w_hidden) if net.layers > 1 else tiled(packed.w_feat),
        packed.b_hidden,
        packed.w_out,
        packed.b_out,
        m,
        s,
        num_steps,
        *times,
        *scalars(net),
        NET=net_shape(net, True, tiles),
        PLACES=places,
        **options(tiles),
    )
    return out
