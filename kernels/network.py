"""One evaluation of a velocity network for a block of rows, and its way back: device functions of every kernel.

Activations pass from layer to layer through workspaces that stay in L2. A workspace with R rows per member holds layer
l in [n_e, R, HP[l]] at n_e * R * OFF[l], where OFF counts the padded widths before it. A block of rows begins at row
`r_` of it, a scalar, and pointers `p_` are scalars too: offsets within a tile are then the same small numbers
everywhere, which cost no registers. Rows of cond and of time features are the exception; `o_c` and `o_s` are theirs.

Two ways to treat LayerNorm. FOLD, for layers one behind the other with the norm behind the activation or none: the
scale and shift are folded into the next layer's weights, whose columns are centred, so that all that is left of the
norm is one factor r per row. Otherwise the norm (before or behind the activation, or FiLM) is a second pass over the
row.

ROLL loops over hidden layers of one width; else the loop is unrolled and every layer has its own sizes.

Arguments come in groups. NET is a `pack.Shape`, all that is fixed when a kernel is compiled. `weights` are the pointers
of `pack.Packed`, in its order. `inputs` are what an evaluation adds to the state's features:

    b_t            [BM, TP] time features, unless they come from a table or FiLM reads them
    p_t            to the time features that FiLM reads, rows o_s
    p_c            to cond's share of the first layer, rows o_c
    p_time         to [HP[0]]: bias, with a table time's share as well
    p_film         to cond's share of [scale, shift] of every layer, rows o_c of film_stride
    p_film_time    to a table's share of them; or to all of them, every row's, where TIME is "rows"
    o_c, o_s       [BM] rows of cond and of time features
    film_stride
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import activate, activate_grad, cast, product, row_scale

# Forward ------------------------------------------------------------------------------------------------------------


@triton.jit
def network_fwd(
    b_f,  # [BM, FP] state features
    inputs,
    weights,
    pre_ptr,  # workspace of R_P rows: pre-activations
    stats_ptr,  # [L, 2, E, R_P] mean and rsqrt(variance + eps)
    y_ptr,  # workspace of R_Y rows: outputs; with FOLD two layers take turns
    part_ptr,  # [E, MP, max HP] partial sums of layers with two inputs
    i_e,
    n_e,
    R_P,
    R_Y,
    r_p,  # the block's first row in the workspaces
    r_y,
    r_part,
    eps,
    NET: tl.constexpr,
    SAVE: tl.constexpr,
):
    """The head's output [BM, DP] float32. SAVE stores pre-activations and statistics; the outputs are in y_ptr."""
    b_t, _, p_c, p_time, p_film, p_film_time, o_c, _, _ = inputs
    w_feat_ptr, w_time_ptr, w_film_ptr, w_hidden_ptr, b_hidden_ptr, scale_ptr, shift_ptr, w_out_ptr, b_out_ptr = weights
    BM: tl.constexpr = NET.BM
    L: tl.constexpr = NET.L
    FP: tl.constexpr = NET.FP
    TP: tl.constexpr = NET.TP
    DP: tl.constexpr = NET.DP
    HP: tl.constexpr = NET.HP[0]
    BN: tl.constexpr = NET.BN if NET.BN < HP else HP
    FOLD: tl.constexpr = NET.FOLD
    RES: tl.constexpr = NET.RES
    DTYPE: tl.constexpr = w_feat_ptr.dtype.element_ty
    o_b = tl.arange(0, BM)
    o_f = tl.arange(0, FP)
    o_t = tl.arange(0, TP)
    o_d = tl.arange(0, DP)
    p_pre = pre_ptr + r_p * HP
    p_y = y_ptr + r_y * HP
    s1 = no_sums(BN, NET)
    s2 = s1
    for n in tl.range(0, HP, BN, num_stages=1):
        o_n = n + tl.arange(0, BN)
        b_w = tl.load(w_feat_ptr + (i_e * FP + o_f)[:, None] * HP + o_n[None, :])
        b_acc = product(b_f, b_w, NET)
        b_acc += tl.load(p_time + o_n)[None, :]
        if NET.NORM != "film":
            if not NET.TABLE:
                b_wt = tl.load(w_time_ptr + (i_e * TP + o_t)[:, None] * HP + o_n[None, :])
                # Subtracted: triton makes a sum of two products one chain in one accumulator, which some versions of it
                # get wrong.
                b_acc -= product(b_t, b_wt, NET) * -1.0
            if NET.COND:
                b_acc += tl.load(p_c + o_c[:, None].to(tl.int64) * HP + o_n[None, :]).to(tl.float32)
        s1, s2 = epilogue(b_acc, o_b[:, None] * HP + o_n[None, :], p_pre, p_y, p_y, 0, s1, s2, NET, 0, SAVE)
    # Named apart from those below: what a loop assigns again it would carry.
    first_norm = (scale_ptr + i_e * HP, shift_ptr + i_e * HP, p_film, p_film_time, w_film_ptr + i_e * TP * 2 * HP)
    first = (p_pre, stats_ptr + r_p, n_e * R_P, p_y, p_y, 0)
    r = finish(s1, s2, first_norm, first, inputs, eps, NET, NET.H[0], HP, 0, SAVE)
    if NET.ROLL:
        ADD: tl.constexpr = RES if RES < L else 0
        for l in tl.range(1, L, num_stages=1):
            into = l - 1
            out = l
            if FOLD:
                into = (l - 1) % 2
                out = l % 2
            p_in = y_ptr + n_e * R_Y * HP * into + r_y * HP
            at = n_e * l + i_e
            dense = (w_hidden_ptr + (at - n_e) * HP * HP, b_hidden_ptr + at * HP, part_ptr)
            norm = (
                scale_ptr + at * HP,
                shift_ptr + at * HP,
                p_film + 2 * HP * l,
                p_film_time + 2 * HP * l,
                w_film_ptr + at * TP * 2 * HP,
            )
            where = (
                pre_ptr + n_e * R_P * HP * l + r_p * HP,
                stats_ptr + 2 * n_e * R_P * l + r_p,
                n_e * R_P,
                y_ptr + n_e * R_Y * HP * out + r_y * HP,
                y_ptr + n_e * R_Y * HP * (l - RES) + r_y * HP,
                (l % RES) == 0,
            )
            r = hidden_fwd(r, p_in, p_in, dense, norm, where, inputs, eps, NET, NET.H[0], HP, HP, 0, ADD, SAVE)
    else:
        for l in tl.static_range(1, L):
            r = unrolled_fwd(
                r, inputs, weights, pre_ptr, stats_ptr, y_ptr, part_ptr, i_e, n_e, R_P, R_Y, r_p, r_y, r_part, eps,
                l, NET, SAVE,
            )  # fmt: skip
    tl.debug_barrier()
    HPL: tl.constexpr = NET.HP[L - 1]
    BNL: tl.constexpr = NET.BN if NET.BN < HPL else HPL
    p_last = y_ptr + n_e * R_Y * NET.OFF_Y[L - 1] + r_y * HPL + o_b[:, None] * HPL
    b_v = tl.zeros([BM, DP], tl.float32)
    for n in tl.range(0, HPL, BNL, num_stages=1):
        o_k = n + tl.arange(0, BNL)
        b_y = tl.load(p_last + o_k[None, :])
        if DP == 1:
            # In tiles as well: the layout of a whole row's sum would spread to the embedding, which needs far more.
            b_wo = tl.load(w_out_ptr + i_e * HPL + o_k)
            b_v += tl.sum(b_y.to(tl.float32) * b_wo[None, :], 1)[:, None]
        else:
            b_wo = tl.load(w_out_ptr + (i_e * HPL + o_k)[:, None] * DP + o_d[None, :])
            b_v += product(b_y, cast(b_wo, DTYPE, NET), NET)
    if FOLD and NET.NORM == "after":
        b_v = b_v * r[:, None]
    return b_v + tl.load(b_out_ptr + i_e * DP + o_d)[None, :]


@triton.jit
def unrolled_fwd(
    r,
    inputs,
    weights,
    pre_ptr,
    stats_ptr,
    y_ptr,
    part_ptr,
    i_e,
    n_e,
    R_P,
    R_Y,
    r_p,
    r_y,
    r_part,
    eps,
    l: tl.constexpr,
    NET: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Hidden layer l, where every layer has its own sizes and inputs."""
    _, _, _, _, p_film, p_film_time, _, _, _ = inputs
    _, _, w_film_ptr, w_hidden_ptr, b_hidden_ptr, scale_ptr, shift_ptr, _, _ = weights
    HP: tl.constexpr = NET.HP[l]
    OFF: tl.constexpr = NET.OFF[l]
    J: tl.constexpr = NET.IN[l][0]
    J2: tl.constexpr = NET.IN[l][-1]
    KP: tl.constexpr = NET.HP[J]
    KP2: tl.constexpr = NET.HP[J2] if len(NET.IN[l]) > 1 else 0
    at = n_e * OFF + i_e * HP
    dense = (w_hidden_ptr + n_e * NET.OFF_W[l] + i_e * NET.KP[l] * HP, b_hidden_ptr + at, part_ptr + r_part * HP)
    norm = (
        scale_ptr + at,
        shift_ptr + at,
        p_film + 2 * OFF,
        p_film_time + 2 * OFF,
        w_film_ptr + at * NET.TP * 2,
    )
    where = (
        pre_ptr + n_e * R_P * OFF + r_p * HP,
        stats_ptr + 2 * n_e * R_P * l + r_p,
        n_e * R_P,
        y_ptr + n_e * R_Y * NET.OFF_Y[l] + r_y * HP,
        y_ptr,
        0,
    )
    p_in = y_ptr + n_e * R_Y * NET.OFF_Y[J] + r_y * KP
    p_in2 = y_ptr + n_e * R_Y * NET.OFF_Y[J2] + r_y * NET.HP[J2]
    return hidden_fwd(r, p_in, p_in2, dense, norm, where, inputs, eps, NET, NET.H[l], HP, KP, KP2, 0, SAVE)


@triton.jit
def hidden_fwd(
    r,  # [BM] what FOLD leaves of the norm of the layer before
    p_in,
    p_in2,
    dense,  # pointers to weights, bias and partial sums
    norm,  # to scale, shift, FiLM by cond, FiLM by time, FiLM's weights
    where,  # to pre-activations, statistics (mean; r stats_stride behind), output, what is added, and if it is
    inputs,
    eps,
    NET: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    KP: tl.constexpr,
    KP2: tl.constexpr,
    ADD: tl.constexpr,
    SAVE: tl.constexpr,
):
    """One hidden layer behind the first. Returns the factor r of its own norm.

    Of two inputs the second's product goes first, to memory: one accumulator never collects two chained products, which
    some compilers get wrong, and one input at a time fits in shared memory.
    """
    p_w, p_bias, p_part = dense
    p_pre, _, _, p_y, p_add, has_add = where
    BM: tl.constexpr = NET.BM
    BN: tl.constexpr = NET.BN if NET.BN < HP else HP
    tl.debug_barrier()
    o_b = tl.arange(0, BM)
    if KP2 > 0:
        o_k2 = tl.arange(0, KP2)
        b_a2 = tl.load(p_in2 + o_b[:, None] * KP2 + o_k2[None, :])
        for n in tl.range(0, HP, BN, num_stages=NET.STAGES):
            o_m = n + tl.arange(0, BN)
            b_w2 = tl.load(p_w + (KP + o_k2)[:, None] * HP + o_m[None, :])
            tl.store(p_part + o_b[:, None] * HP + o_m[None, :], product(b_a2, b_w2, NET))
        tl.debug_barrier()
    o_k = tl.arange(0, KP)
    b_a = tl.load(p_in + o_b[:, None] * KP + o_k[None, :])
    s1 = no_sums(BN, NET)
    s2 = s1
    for n in tl.range(0, HP, BN, num_stages=NET.STAGES):
        o_n = n + tl.arange(0, BN)
        b_w = tl.load(p_w + o_k[:, None] * HP + o_n[None, :])
        b_acc = product(b_a, b_w, NET)
        if NET.FOLD and NET.NORM == "after":
            b_acc = b_acc * r[:, None]
        b_acc += tl.load(p_bias + o_n)[None, :]
        o_y = o_b[:, None] * HP + o_n[None, :]
        if KP2 > 0:
            b_acc += tl.load(p_part + o_y)
        s1, s2 = epilogue(b_acc, o_y, p_pre, p_y, p_add, has_add, s1, s2, NET, ADD, SAVE)
    return finish(s1, s2, norm, where, inputs, eps, NET, H, HP, ADD, SAVE)


@triton.jit
def epilogue(b_acc, o_y, p_pre, p_y, p_add, has_add, s1, s2, NET: tl.constexpr, ADD: tl.constexpr, SAVE: tl.constexpr):
    """Stores a tile of pre-activations, or of what is known of the output; returns the sums of what is normalised."""
    FIRST: tl.constexpr = NET.NORM == "before" or NET.NORM == "film"
    if SAVE or FIRST:
        tl.store(p_pre + o_y, cast(b_acc, p_pre.dtype.element_ty, NET))
    if not FIRST:
        b_acc = activate(b_acc, NET)
    if NET.NORM != "none":
        s1 = add_sums(s1, b_acc)
        s2 = add_sums(s2, b_acc * b_acc)
    elif ADD > 0:
        b_acc += load_if(p_add + o_y, has_add)
    if not FIRST:
        tl.store(p_y + o_y, cast(b_acc, p_y.dtype.element_ty, NET))
    return s1, s2


@triton.jit
def no_sums(BN: tl.constexpr, NET: tl.constexpr):
    """Where sums over rows begin: a number per row; or, where registers allow, one per element of a tile, so that its
    columns are added up once per layer and not once per tile, which takes shuffles and barriers."""
    BM: tl.constexpr = NET.BM
    if NET.FOLD and NET.NORM == "after" and NET.ARITH != "exact" and NET.STAGES > 1:
        return tl.zeros([BM, BN], tl.float32)
    else:
        return tl.zeros([BM], tl.float32)


@triton.jit
def add_sums(s, b_x):
    """Sums over rows with a tile more."""
    if len(s.shape) == 2:
        return s + b_x
    else:
        return s + tl.sum(b_x, 1)


@triton.jit
def row_sums(s):
    """[BM] of what `add_sums` has collected."""
    if len(s.shape) == 2:
        return tl.sum(s, 1)
    else:
        return s


@triton.jit
def finish(
    s1,
    s2,
    norm,
    where,
    inputs,
    eps,
    NET: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    ADD: tl.constexpr,
    SAVE: tl.constexpr,
):
    """The statistics of a layer and, without FOLD, the second pass that normalises. Returns r."""
    p_pre, p_stats, stats_stride, p_y, p_add, has_add = where
    BM: tl.constexpr = NET.BM
    BN: tl.constexpr = NET.BN if NET.BN < HP else HP
    if NET.NORM == "none":
        r = s1
    else:
        mu, r = row_scale(row_sums(s1), row_sums(s2), H, eps)
        o_b = tl.arange(0, BM)
        if SAVE:
            tl.store(p_stats + o_b, mu)
            tl.store(p_stats + stats_stride + o_b, r)
        if not NET.FOLD:
            tl.debug_barrier()
            for n in tl.range(0, HP, BN, num_stages=1):
                o_n = n + tl.arange(0, BN)
                o_y = o_b[:, None] * HP + o_n[None, :]
                if NET.NORM == "after":
                    b_y = tl.load(p_y + o_y).to(tl.float32)
                else:
                    b_y = tl.load(p_pre + o_y).to(tl.float32)
                b_g, b_s = affine(o_n, norm, inputs, NET, HP)
                b_y = (b_y - mu[:, None]) * r[:, None] * b_g + b_s
                if NET.NORM != "after":
                    b_y = activate(b_y, NET)
                if ADD > 0:
                    b_y += load_if(p_add + o_y, has_add)
                tl.store(p_y + o_y, cast(b_y, p_y.dtype.element_ty, NET))
    return r


@triton.jit
def affine(o_n, norm, inputs, NET: tl.constexpr, HP: tl.constexpr):
    """The factor and the shift behind the norm in columns o_n: [1, BN] of LayerNorm, [BM, BN] of FiLM."""
    p_scale, p_shift, p_film, p_film_time, p_w_film = norm
    _, p_t, _, _, _, _, o_c, o_s, film_stride = inputs
    TP: tl.constexpr = NET.TP
    if NET.NORM == "film" and NET.TIME == "rows":
        SUM: tl.constexpr = NET.OFF[NET.L - 1] + NET.HP[NET.L - 1]
        p_f = p_film_time + o_s[:, None].to(tl.int64) * (2 * SUM) + o_n[None, :]
        b_g = 1.0 + tl.load(p_f).to(tl.float32)
        b_s = tl.load(p_f + HP).to(tl.float32)
    elif NET.NORM == "film":
        p_f = p_film + o_c[:, None].to(tl.int64) * film_stride + o_n[None, :]
        b_g = 1.0 + tl.load(p_f).to(tl.float32)
        b_s = tl.load(p_f + HP).to(tl.float32)
        if NET.TABLE:
            b_g += tl.load(p_film_time + o_n)[None, :]
            b_s += tl.load(p_film_time + HP + o_n)[None, :]
        else:
            # Read again for every tile: kept in registers they would be there all along.
            o_t = tl.arange(0, TP)
            b_t = tl.load(p_t + o_s[:, None] * TP + o_t[None, :])
            p_w = p_w_film + o_t[:, None] * (2 * HP) + o_n[None, :]
            b_g += product(b_t, tl.load(p_w), NET)
            b_s += product(b_t, tl.load(p_w + HP), NET)
    else:
        b_g = tl.load(p_scale + o_n)[None, :]
        b_s = tl.load(p_shift + o_n)[None, :]
    return b_g, b_s


@triton.jit
def load_if(p, condition):
    """A tile in float32, 0 unless the condition holds."""
    return tl.load(p, mask=tl.full(p.shape, 1, tl.int1) & (condition != 0), other=0.0).to(tl.float32)


# Backward -----------------------------------------------------------------------------------------------------------


@triton.jit
def network_bwd(
    b_dout,  # [BM, DP] gradient of the head's output
    inputs,
    weights,
    pre_ptr,  # workspace of R_P rows, as network_fwd left it
    stats_ptr,
    h_ptr,  # workspace of MP rows: gradient of the outputs; float32, with FOLD as stored and one layer at a time
    dpre_ptr,  # workspace of R_D rows, result: gradient of the pre-activations
    results,  # see `backward_kernel`: xhat, dfilm, dcond, dcond_film, dnorm
    i_b,
    i_e,
    n_b,
    n_e,
    MP,
    R_P,
    R_D,
    r_p,  # the block's first row in the workspaces of R_P rows
    r_m,  # of MP rows
    r_d,  # of R_D rows
    NET: tl.constexpr,
    WEIGHTS: tl.constexpr,
    DCOND: tl.constexpr,
):
    """The gradient [BM, FP] of the state features.

    With h = dpre_next W^T and xhat the normalised activations, a layer of FOLD has

        dy = r (h - xhat mean(h o xhat)),    dpre = dy act'(pre)

    where h is centred over the row because W'' is. The row mean needs all of h, so h passes through a workspace: one
    loop makes it, a second one finishes the layer.
    """
    w_feat_ptr, _, w_film_ptr, w_hidden_ptr, _, scale_ptr, shift_ptr, w_out_ptr, _ = weights
    xhat_ptr, dfilm_ptr, dcond_ptr, dcond_film_ptr, dnorm_ptr = results
    _, _, _, _, p_film, p_film_time, _, _, _ = inputs
    BM: tl.constexpr = NET.BM
    L: tl.constexpr = NET.L
    FP: tl.constexpr = NET.FP
    TP: tl.constexpr = NET.TP
    DP: tl.constexpr = NET.DP
    FOLD: tl.constexpr = NET.FOLD
    RES: tl.constexpr = NET.RES
    HPL: tl.constexpr = NET.HP[L - 1]
    BNL: tl.constexpr = NET.BN if NET.BN < HPL else HPL
    OFFL: tl.constexpr = NET.OFF[L - 1]
    DTYPE: tl.constexpr = w_feat_ptr.dtype.element_ty
    o_b = tl.arange(0, BM)
    o_d = tl.arange(0, DP)
    mu, r = load_stats(stats_ptr + r_p, L - 1, n_e * R_P, NET)
    p_h = h_ptr + r_m * HPL
    if not FOLD:
        p_h = h_ptr + n_e * MP * OFFL + r_m * HPL
    p_pre = pre_ptr + n_e * R_P * OFFL + r_p * HPL
    s = no_sums(BNL, NET)
    for n in tl.range(0, HPL, BNL, num_stages=1):
        o_n = n + tl.arange(0, BNL)
        if DP == 1:
            b_h = b_dout * tl.load(w_out_ptr + i_e * HPL + o_n)[None, :]
        else:
            b_w = tl.load(w_out_ptr + (i_e * HPL + o_n)[None, :] * DP + o_d[:, None])
            b_h = product(cast(b_dout, DTYPE, NET), cast(b_w, DTYPE, NET), NET)
        s = store_h(s, b_h, o_b[:, None] * HPL + o_n[None, :], p_h, p_pre, mu, NET)
    s = row_sums(s) * r
    if NET.ROLL:
        ADD: tl.constexpr = RES if RES < L else 0
        for i in tl.range(0, L, num_stages=1):
            l = L - 1 - i
            at = n_e * l + i_e
            mu, r = load_stats(stats_ptr + r_p, l, n_e * R_P, NET)
            slot = l
            if FOLD:
                slot = l * 0
            p_dpre = dpre_ptr + n_e * R_D * HPL * l + r_d * HPL
            norm = (
                scale_ptr + at * HPL,
                shift_ptr + at * HPL,
                p_film + 2 * HPL * l,
                p_film_time + 2 * HPL * l,
                w_film_ptr + at * TP * 2 * HPL,
            )
            gradients = (
                h_ptr + n_e * MP * HPL * slot + r_m * HPL,
                h_ptr + n_e * MP * HPL * (l - RES) + r_m * HPL,
                (l % RES == 0) & (l > 0),
                pre_ptr + n_e * R_P * HPL * l + r_p * HPL,
                p_dpre,
                xhat_ptr + n_e * R_D * HPL * l + r_d * HPL,
                dfilm_ptr + (n_e * R_D * HPL * l + r_d * HPL) * 2,
                dcond_film_ptr + r_m * (2 * L * HPL) + 2 * HPL * l,
                2 * L * HPL,
                dnorm_ptr + (i_b * n_e + i_e) * L * HPL + l * HPL,
                n_b * n_e * L * HPL,
            )
            hidden_bwd(s, mu, r, gradients, norm, inputs, NET, NET.H[0], HPL, ADD, WEIGHTS, DCOND)
            if l > 0:
                below = l - 1
                mu, r = load_stats(stats_ptr + r_p, below, n_e * R_P, NET)
                slot = below
                if FOLD:
                    slot = l * 0
                s = input_bwd(
                    mu,
                    r,
                    p_dpre,
                    h_ptr + n_e * MP * HPL * slot + r_m * HPL,
                    pre_ptr + n_e * R_P * HPL * below + r_p * HPL,
                    w_hidden_ptr + (n_e * below + i_e) * HPL * HPL,
                    below % RES == 0,
                    NET,
                    HPL,
                    HPL,
                    ADD,
                )
    else:
        for i in tl.static_range(L):
            s = unrolled_bwd(
                s, inputs, weights, pre_ptr, stats_ptr, h_ptr, dpre_ptr, results, i_b, i_e, n_b, n_e, MP, R_P, R_D,
                r_p, r_m, r_d, L - 1 - i, NET, WEIGHTS, DCOND,
            )  # fmt: skip
    tl.debug_barrier()
    HP: tl.constexpr = NET.HP[0]
    BN: tl.constexpr = NET.BN if NET.BN < HP else HP
    o_f = tl.arange(0, FP)
    b_df = tl.zeros([BM, FP], tl.float32)
    for n in tl.range(0, HP, BN, num_stages=1):
        o_k = n + tl.arange(0, BN)
        o_y = o_b[:, None] * HP + o_k[None, :]
        b_d = tl.load(dpre_ptr + r_d * HP + o_y)
        b_wf = tl.load(w_feat_ptr + (i_e * FP + o_f)[None, :] * HP + o_k[:, None])
        b_df += product(b_d, b_wf, NET)
        if DCOND and NET.COND and NET.NORM != "film":
            p_dc = dcond_ptr + r_m * HP + o_y
            tl.store(p_dc, tl.load(p_dc) + b_d.to(tl.float32))
    return b_df


@triton.jit
def unrolled_bwd(
    s,
    inputs,
    weights,
    pre_ptr,
    stats_ptr,
    h_ptr,
    dpre_ptr,
    results,
    i_b,
    i_e,
    n_b,
    n_e,
    MP,
    R_P,
    R_D,
    r_p,
    r_m,
    r_d,
    l: tl.constexpr,
    NET: tl.constexpr,
    WEIGHTS: tl.constexpr,
    DCOND: tl.constexpr,
):
    """Layer l and the gradient of its inputs; returns s of the layer before."""
    _, _, w_film_ptr, w_hidden_ptr, _, scale_ptr, shift_ptr, _, _ = weights
    xhat_ptr, dfilm_ptr, _, dcond_film_ptr, dnorm_ptr = results
    _, _, _, _, p_film, p_film_time, _, _, _ = inputs
    HP: tl.constexpr = NET.HP[l]
    OFF: tl.constexpr = NET.OFF[l]
    SUM: tl.constexpr = NET.OFF[NET.L - 1] + NET.HP[NET.L - 1]
    FOLD: tl.constexpr = NET.FOLD
    at = n_e * OFF + i_e * HP
    mu, r = load_stats(stats_ptr + r_p, l, n_e * R_P, NET)
    p_dpre = dpre_ptr + n_e * R_D * OFF + r_d * HP
    norm = (
        scale_ptr + at,
        shift_ptr + at,
        p_film + 2 * OFF,
        p_film_time + 2 * OFF,
        w_film_ptr + at * NET.TP * 2,
    )
    gradients = (
        h_ptr + n_e * MP * (0 if FOLD else OFF) + r_m * HP,
        h_ptr,
        0,
        pre_ptr + n_e * R_P * OFF + r_p * HP,
        p_dpre,
        xhat_ptr + n_e * R_D * OFF + r_d * HP,
        dfilm_ptr + (n_e * R_D * OFF + r_d * HP) * 2,
        dcond_film_ptr + r_m * (2 * SUM) + 2 * OFF,
        2 * SUM,
        dnorm_ptr + (i_b * n_e + i_e) * SUM + OFF,
        n_b * n_e * SUM,
    )
    hidden_bwd(s, mu, r, gradients, norm, inputs, NET, NET.H[l], HP, 0, WEIGHTS, DCOND)
    p_w = w_hidden_ptr + n_e * NET.OFF_W[l] + i_e * NET.KP[l] * HP
    if len(NET.IN[l]) > 1:
        J2: tl.constexpr = NET.IN[l][1]
        KP2: tl.constexpr = NET.HP[J2]
        p_h2 = h_ptr + n_e * MP * NET.OFF[J2] + r_m * KP2
        MORE2: tl.constexpr = 0 if NET.FRESH[l][1] else 1
        input_bwd(mu, r, p_dpre, p_h2, p_dpre, p_w + NET.HP[NET.IN[l][0]] * HP, 1, NET, HP, KP2, MORE2)
    if l > 0:
        J: tl.constexpr = NET.IN[l][0]
        KP: tl.constexpr = NET.HP[J]
        mu, r = load_stats(stats_ptr + r_p, J, n_e * R_P, NET)
        p_h = h_ptr + n_e * MP * (0 if FOLD else NET.OFF[J]) + r_m * KP
        p_pre = pre_ptr + n_e * R_P * NET.OFF[J] + r_p * KP
        MORE: tl.constexpr = 0 if NET.FRESH[l][0] else 1
        s = input_bwd(mu, r, p_dpre, p_h, p_pre, p_w, 1, NET, HP, KP, MORE)
    return s


@triton.jit
def hidden_bwd(
    s,
    mu,
    r,
    gradients,
    norm,
    inputs,
    NET: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    ADD: tl.constexpr,
    WEIGHTS: tl.constexpr,
    DCOND: tl.constexpr,
):
    """From the gradient h of a layer's output to that of its pre-activations."""
    p_h, p_h_add, has_add, p_pre, p_dpre, p_xhat, p_dfilm, p_dcond_film, dcond_film_stride, p_dnorm, dnorm_stride = (
        gradients
    )
    BM: tl.constexpr = NET.BM
    BN: tl.constexpr = NET.BN if NET.BN < HP else HP
    DTYPE: tl.constexpr = p_dpre.dtype.element_ty
    tl.debug_barrier()
    o_b = tl.arange(0, BM)[:, None]
    if NET.FOLD:
        for n in tl.range(0, HP, BN, num_stages=1):
            o_n = n + tl.arange(0, BN)
            o_y = o_b * HP + o_n[None, :]
            b_h = tl.load(p_h + o_y).to(tl.float32)
            b_pre = tl.load(p_pre + o_y).to(tl.float32)
            b_y, b_dy = activate_grad(b_pre, NET)
            if NET.NORM == "after":
                b_y = (b_y - mu[:, None]) * r[:, None]
                b_h = r[:, None] * (b_h - b_y * (s / H)[:, None])
            if WEIGHTS:
                tl.store(p_xhat + o_y, cast(b_y, DTYPE, NET))
            tl.store(p_dpre + o_y, cast(b_h * b_dy, DTYPE, NET))
    else:
        m1 = tl.zeros([BM], tl.float32)
        m2 = tl.zeros([BM], tl.float32)
        for n in tl.range(0, HP, BN, num_stages=1):
            o_n = n + tl.arange(0, BN)
            o_y = o_b * HP + o_n[None, :]
            b_h = tl.load(p_h + o_y).to(tl.float32)
            b_pre = tl.load(p_pre + o_y).to(tl.float32)
            if ADD > 0:
                # What is added passes its gradient on as it is, and is the first to give one to that layer.
                tl.store(p_h_add + o_y, b_h, mask=(o_y >= 0) & (has_add != 0))
            if NET.NORM == "none":
                b_y, b_dy = activate_grad(b_pre, NET)
                tl.store(p_dpre + o_y, cast(b_h * b_dy, DTYPE, NET))
            else:
                b_g, b_s = affine(o_n, norm, inputs, NET, HP)
                if NET.NORM == "after":
                    b_x = (activate(b_pre, NET) - mu[:, None]) * r[:, None]
                else:
                    b_x = (b_pre - mu[:, None]) * r[:, None]
                    b_y, b_dy = activate_grad(b_x * b_g + b_s, NET)
                    b_h = b_h * b_dy
                if NET.NORM == "film":
                    if WEIGHTS:
                        p_df = p_dfilm + o_b * (2 * HP) + o_n[None, :]
                        tl.store(p_df, cast(b_h * b_x, DTYPE, NET))
                        tl.store(p_df + HP, cast(b_h, DTYPE, NET))
                    if DCOND:
                        p_dc = p_dcond_film + o_b * dcond_film_stride + o_n[None, :]
                        tl.store(p_dc, tl.load(p_dc) + b_h * b_x)
                        tl.store(p_dc + HP, tl.load(p_dc + HP) + b_h)
                elif WEIGHTS:
                    p_dn = p_dnorm + o_n
                    tl.store(p_dn, tl.load(p_dn) + tl.sum(b_h * b_x, 0))
                    tl.store(p_dn + dnorm_stride, tl.load(p_dn + dnorm_stride) + tl.sum(b_h, 0))
                b_h = b_h * b_g
                m1 += tl.sum(b_h, 1)
                m2 += tl.sum(b_h * b_x, 1)
                tl.store(p_h + o_y, b_h)
        if NET.NORM != "none":
            m1 = m1 / H
            m2 = m2 / H
            tl.debug_barrier()
            for n in tl.range(0, HP, BN, num_stages=1):
                o_k = n + tl.arange(0, BN)
                o_z = o_b * HP + o_k[None, :]
                b_dx = tl.load(p_h + o_z).to(tl.float32)
                b_a = tl.load(p_pre + o_z).to(tl.float32)
                if NET.NORM == "after":
                    b_a, b_da = activate_grad(b_a, NET)
                b_xh = (b_a - mu[:, None]) * r[:, None]
                b_dx = r[:, None] * (b_dx - m1[:, None] - b_xh * m2[:, None])
                if NET.NORM == "after":
                    b_dx = b_dx * b_da
                # Padded columns hold (0 - mu) r, not 0.
                b_dx = tl.where((o_k < H)[None, :], b_dx, 0.0)
                tl.store(p_dpre + o_z, cast(b_dx, DTYPE, NET))


@triton.jit
def input_bwd(
    mu,
    r,
    p_dpre,
    p_h,
    p_pre,
    p_w,
    has_gradient,
    NET: tl.constexpr,
    HP: tl.constexpr,
    KP: tl.constexpr,
    MORE: tl.constexpr,
):
    """h of one of a layer's inputs, dpre W^T, with MORE added to what is there; returns its row sums of h o xhat."""
    BM: tl.constexpr = NET.BM
    BN: tl.constexpr = NET.BN if NET.BN < KP else KP
    tl.debug_barrier()
    o_h = tl.arange(0, HP)
    o_b = tl.arange(0, BM)[:, None]
    b_a = tl.load(p_dpre + o_b * HP + o_h[None, :])
    s = no_sums(BN, NET)
    for n in tl.range(0, KP, BN, num_stages=NET.STAGES):
        o_n = n + tl.arange(0, BN)
        b_w = tl.load(p_w + o_n[None, :] * HP + o_h[:, None])
        b_h = product(b_a, b_w, NET)
        o_y = o_b * KP + o_n[None, :]
        if not NET.FOLD and MORE > 0:
            b_h += load_if(p_h + o_y, has_gradient)
        s = store_h(s, b_h, o_y, p_h, p_pre, mu, NET)
    return row_sums(s) * r


@triton.jit
def load_stats(p_stats, l, stride, NET: tl.constexpr):
    """Mean and scale of layer l's rows."""
    BM: tl.constexpr = NET.BM
    if NET.NORM != "none":
        o_b = tl.arange(0, BM)
        mu = tl.load(p_stats + 2 * l * stride + o_b)
        r = tl.load(p_stats + (2 * l + 1) * stride + o_b)
    else:
        mu = tl.zeros([BM], tl.float32)
        r = tl.zeros([BM], tl.float32)
    return mu, r


@triton.jit
def store_h(s, b_h, o_y, p_h, p_pre, mu, NET: tl.constexpr):
    """Stores a tile of h; returns the sums over rows of h o xhat / r with it."""
    if NET.FOLD:
        tl.store(p_h + o_y, cast(b_h, p_h.dtype.element_ty, NET))
    else:
        tl.store(p_h + o_y, b_h)
    if NET.FOLD and NET.NORM == "after":
        b_y = activate(tl.load(p_pre + o_y).to(tl.float32), NET)
        return add_sums(s, b_h * (b_y - mu[:, None]))
    else:
        return s
