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
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import activate, activate_grad, cast, product, row_scale

# Forward ------------------------------------------------------------------------------------------------------------


@triton.jit
def network_fwd(
    b_f,  # [BM, FP] state features
    b_t,  # [BM, TP] time features, unless they come from a table or FiLM reads them
    p_t,  # to the time features that FiLM reads, rows o_s
    p_c,  # to cond's share of the first layer, rows o_c
    p_time,  # to [HP[0]]: bias, with a table time's share as well
    p_film,  # to cond's share of [scale, shift] of every layer, rows o_c of film_stride_b
    p_film_time,  # to a table's share of them
    w_feat_ptr,  # [E, FP, HP[0]]
    w_time_ptr,  # [E, TP, HP[0]]
    w_film_ptr,  # [E, TP, 2 HP[l]] per layer
    w_hidden_ptr,  # [E, KP[l], HP[l]] per layer
    b_hidden_ptr,  # [E, HP[l]] per layer
    scale_ptr,  # [E, HP[l]] per layer
    shift_ptr,
    w_out_ptr,  # [E, HP[L - 1], DP]
    b_out_ptr,  # [E, DP]
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
    o_c,  # [BM]
    o_s,
    film_stride_b,
    o_d,
    eps,
    H: tl.constexpr,
    HP: tl.constexpr,
    KP: tl.constexpr,
    OFF: tl.constexpr,
    OFF_Y: tl.constexpr,
    OFF_W: tl.constexpr,
    IN: tl.constexpr,
    RES: tl.constexpr,
    L: tl.constexpr,
    FP: tl.constexpr,
    TP: tl.constexpr,
    DP: tl.constexpr,
    COND: tl.constexpr,
    TABLE: tl.constexpr,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    FOLD: tl.constexpr,
    ROLL: tl.constexpr,
    SAVE: tl.constexpr,
    ARITH: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The head's output [BM, DP] float32. SAVE stores pre-activations and statistics; the outputs are in y_ptr."""
    HP0: tl.constexpr = HP[0]
    BN0: tl.constexpr = BN if BN < HP0 else HP0
    DTYPE: tl.constexpr = w_feat_ptr.dtype.element_ty
    o_f = tl.arange(0, FP)
    o_t = tl.arange(0, TP)
    o_b = tl.arange(0, BM)
    p_pre = pre_ptr + r_p * HP0
    p_y = y_ptr + r_y * HP0
    s1 = tl.zeros([BM], tl.float32)
    s2 = tl.zeros([BM], tl.float32)
    for n in tl.range(0, HP0, BN0, num_stages=1):
        o_n = n + tl.arange(0, BN0)
        b_w = tl.load(w_feat_ptr + (i_e * FP + o_f)[:, None] * HP0 + o_n[None, :])
        b_acc = product(b_f, b_w, PRECISION, ARITH)
        b_acc += tl.load(p_time + o_n)[None, :]
        if NORM != "film":
            if not TABLE:
                b_wt = tl.load(w_time_ptr + (i_e * TP + o_t)[:, None] * HP0 + o_n[None, :])
                b_acc += product(b_t, b_wt, PRECISION, ARITH)
            if COND:
                b_acc += tl.load(p_c + o_c[:, None].to(tl.int64) * HP0 + o_n[None, :]).to(tl.float32)
        s1, s2 = epilogue(
            b_acc, o_b[:, None] * HP0 + o_n[None, :], p_pre, p_y, p_y, 0, s1, s2, ACT, NORM, 0, SAVE, ARITH
        )
    r = finish(
        s1,
        s2,
        p_pre,
        p_y,
        stats_ptr + r_p,
        n_e * R_P,
        scale_ptr + i_e * HP0,
        shift_ptr + i_e * HP0,
        p_t,
        p_film,
        p_film_time,
        w_film_ptr + i_e * TP * 2 * HP0,
        o_c,
        o_s,
        film_stride_b,
        p_y,
        0,
        eps,
        H[0],
        HP0,
        TP,
        TABLE,
        ACT,
        NORM,
        FOLD,
        0,
        SAVE,
        ARITH,
        PRECISION,
        BM,
        BN0,
    )
    if ROLL:
        for l in tl.range(1, L, num_stages=1):
            into = l - 1
            if FOLD:
                into = (l - 1) % 2
            out = l
            if FOLD:
                out = l % 2
            p_in = y_ptr + n_e * R_Y * HP0 * into + r_y * HP0
            r = hidden_fwd(
                r,
                p_in,
                p_in,
                y_ptr + n_e * R_Y * HP0 * (l - RES) + r_y * HP0,
                (l % RES) == 0,
                w_hidden_ptr + (n_e * (l - 1) + i_e) * HP0 * HP0,
                b_hidden_ptr + (n_e * l + i_e) * HP0,
                scale_ptr + (n_e * l + i_e) * HP0,
                shift_ptr + (n_e * l + i_e) * HP0,
                p_t,
                p_film + 2 * HP0 * l,
                p_film_time + 2 * HP0 * l,
                w_film_ptr + (n_e * l + i_e) * TP * 2 * HP0,
                o_c,
                o_s,
                film_stride_b,
                pre_ptr + n_e * R_P * HP0 * l + r_p * HP0,
                stats_ptr + 2 * n_e * R_P * l + r_p,
                n_e * R_P,
                y_ptr + n_e * R_Y * HP0 * out + r_y * HP0,
                part_ptr,
                eps,
                H[0],
                HP0,
                HP0,
                0,
                RES if RES < L else 0,
                TP,
                TABLE,
                ACT,
                NORM,
                FOLD,
                SAVE,
                ARITH,
                PRECISION,
                BM,
                BN0,
                STAGES,
            )
    else:
        for l in tl.static_range(1, L):
            r = hidden_fwd(
                r,
                y_ptr + n_e * R_Y * OFF_Y[IN[l][0]] + r_y * HP[IN[l][0]],
                y_ptr + n_e * R_Y * OFF_Y[IN[l][-1]] + r_y * HP[IN[l][-1]],
                y_ptr,
                0,
                w_hidden_ptr + n_e * OFF_W[l] + i_e * KP[l] * HP[l],
                b_hidden_ptr + n_e * OFF[l] + i_e * HP[l],
                scale_ptr + n_e * OFF[l] + i_e * HP[l],
                shift_ptr + n_e * OFF[l] + i_e * HP[l],
                p_t,
                p_film + 2 * OFF[l],
                p_film_time + 2 * OFF[l],
                w_film_ptr + (n_e * OFF[l] + i_e * HP[l]) * TP * 2,
                o_c,
                o_s,
                film_stride_b,
                pre_ptr + n_e * R_P * OFF[l] + r_p * HP[l],
                stats_ptr + 2 * n_e * R_P * l + r_p,
                n_e * R_P,
                y_ptr + n_e * R_Y * OFF_Y[l] + r_y * HP[l],
                part_ptr + r_part * HP[l],
                eps,
                H[l],
                HP[l],
                HP[IN[l][0]],
                HP[IN[l][1]] if len(IN[l]) > 1 else 0,
                0,
                TP,
                TABLE,
                ACT,
                NORM,
                FOLD,
                SAVE,
                ARITH,
                PRECISION,
                BM,
                BN if HP[l] > BN else HP[l],
                STAGES,
            )
    tl.debug_barrier()
    HPL: tl.constexpr = HP[L - 1]
    BNL: tl.constexpr = BN if BN < HPL else HPL
    p_last = y_ptr + n_e * R_Y * OFF_Y[L - 1] + r_y * HPL + o_b[:, None] * HPL
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
            b_v += product(b_y, cast(b_wo, DTYPE, ARITH), PRECISION, ARITH)
    if FOLD and NORM == "after":
        b_v = b_v * r[:, None]
    return b_v + tl.load(b_out_ptr + i_e * DP + o_d)[None, :]


@triton.jit
def hidden_fwd(
    r,  # [BM] what FOLD leaves of the norm of the layer before
    p_in,
    p_in2,
    p_add,
    has_add,
    p_w,
    p_bias,
    p_scale,
    p_shift,
    p_t,
    p_film,
    p_film_time,
    p_w_film,
    o_c,
    o_s,
    film_stride_b,
    p_pre,
    p_stats,
    stats_stride,
    p_y,
    p_part,
    eps,
    H: tl.constexpr,
    HP: tl.constexpr,
    KP: tl.constexpr,
    KP2: tl.constexpr,
    ADD: tl.constexpr,
    TP: tl.constexpr,
    TABLE: tl.constexpr,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    FOLD: tl.constexpr,
    SAVE: tl.constexpr,
    ARITH: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One hidden layer behind the first. Returns the factor r of its own norm.

    Of two inputs the second's product goes first, to memory: one accumulator never collects two chained products, which
    some compilers get wrong, and one input at a time fits in shared memory.
    """
    tl.debug_barrier()
    o_b = tl.arange(0, BM)
    if KP2 > 0:
        o_k2 = tl.arange(0, KP2)
        b_a2 = tl.load(p_in2 + o_b[:, None] * KP2 + o_k2[None, :])
        for n in tl.range(0, HP, BN, num_stages=STAGES):
            o_m = n + tl.arange(0, BN)
            b_w2 = tl.load(p_w + (KP + o_k2)[:, None] * HP + o_m[None, :])
            tl.store(p_part + o_b[:, None] * HP + o_m[None, :], product(b_a2, b_w2, PRECISION, ARITH))
        tl.debug_barrier()
    o_k = tl.arange(0, KP)
    b_a = tl.load(p_in + o_b[:, None] * KP + o_k[None, :])
    s1 = tl.zeros([BM], tl.float32)
    s2 = tl.zeros([BM], tl.float32)
    for n in tl.range(0, HP, BN, num_stages=STAGES):
        o_n = n + tl.arange(0, BN)
        b_w = tl.load(p_w + o_k[:, None] * HP + o_n[None, :])
        b_acc = product(b_a, b_w, PRECISION, ARITH)
        if FOLD and NORM == "after":
            b_acc = b_acc * r[:, None]
        b_acc += tl.load(p_bias + o_n)[None, :]
        if KP2 > 0:
            b_acc += tl.load(p_part + o_b[:, None] * HP + o_n[None, :])
        s1, s2 = epilogue(
            b_acc, o_b[:, None] * HP + o_n[None, :], p_pre, p_y, p_add, has_add, s1, s2, ACT, NORM, ADD, SAVE, ARITH
        )
    return finish(
        s1,
        s2,
        p_pre,
        p_y,
        p_stats,
        stats_stride,
        p_scale,
        p_shift,
        p_t,
        p_film,
        p_film_time,
        p_w_film,
        o_c,
        o_s,
        film_stride_b,
        p_add,
        has_add,
        eps,
        H,
        HP,
        TP,
        TABLE,
        ACT,
        NORM,
        FOLD,
        ADD,
        SAVE,
        ARITH,
        PRECISION,
        BM,
        BN,
    )


@triton.jit
def epilogue(
    b_acc,
    o_y,
    p_pre,
    p_y,
    p_add,
    has_add,
    s1,
    s2,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    SAVE: tl.constexpr,
    ARITH: tl.constexpr,
):
    """Stores a tile of pre-activations, or of what is known of the output; returns the sums of what is normalised."""
    FIRST: tl.constexpr = NORM == "before" or NORM == "film"
    if SAVE or FIRST:
        tl.store(p_pre + o_y, cast(b_acc, p_pre.dtype.element_ty, ARITH))
    if not FIRST:
        b_acc = activate(b_acc, ACT, ARITH)
    if NORM != "none":
        s1 += tl.sum(b_acc, 1)
        s2 += tl.sum(b_acc * b_acc, 1)
    elif ADD > 0:
        b_acc += load_if(p_add + o_y, has_add)
    if not FIRST:
        tl.store(p_y + o_y, cast(b_acc, p_y.dtype.element_ty, ARITH))
    return s1, s2


@triton.jit
def finish(
    s1,
    s2,
    p_pre,
    p_y,
    p_stats,
    stats_stride,
    p_scale,
    p_shift,
    p_t,
    p_film,
    p_film_time,
    p_w_film,
    o_c,
    o_s,
    film_stride_b,
    p_add,
    has_add,
    eps,
    H: tl.constexpr,
    HP: tl.constexpr,
    TP: tl.constexpr,
    TABLE: tl.constexpr,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    FOLD: tl.constexpr,
    ADD: tl.constexpr,
    SAVE: tl.constexpr,
    ARITH: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The statistics of a layer and, without FOLD, the second pass that normalises. Returns r."""
    if NORM == "none":
        r = s1
    else:
        mu, r = row_scale(s1, s2, H, eps)
        if SAVE:
            o_b = tl.arange(0, BM)
            tl.store(p_stats + o_b, mu)
            tl.store(p_stats + stats_stride + o_b, r)
        if not FOLD:
            tl.debug_barrier()
            for n in tl.range(0, HP, BN, num_stages=1):
                o_n = n + tl.arange(0, BN)
                o_y = tl.arange(0, BM)[:, None] * HP + o_n[None, :]
                if NORM == "after":
                    b_y = tl.load(p_y + o_y).to(tl.float32)
                else:
                    b_y = tl.load(p_pre + o_y).to(tl.float32)
                b_y = (b_y - mu[:, None]) * r[:, None]
                b_g, b_s = affine(
                    o_n,
                    p_scale,
                    p_shift,
                    p_t,
                    p_film,
                    p_film_time,
                    p_w_film,
                    o_c,
                    o_s,
                    film_stride_b,
                    HP,
                    TP,
                    TABLE,
                    NORM,
                    ARITH,
                    PRECISION,
                )
                b_y = b_y * b_g + b_s
                if NORM != "after":
                    b_y = activate(b_y, ACT, ARITH)
                if ADD > 0:
                    b_y += load_if(p_add + o_y, has_add)
                tl.store(p_y + o_y, cast(b_y, p_y.dtype.element_ty, ARITH))
    return r


@triton.jit
def affine(
    o_n,
    p_scale,
    p_shift,
    p_t,
    p_film,
    p_film_time,
    p_w_film,
    o_c,
    o_s,
    film_stride_b,
    HP: tl.constexpr,
    TP: tl.constexpr,
    TABLE: tl.constexpr,
    NORM: tl.constexpr,
    ARITH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The factor and the shift behind the norm in columns o_n: [1, BN] of LayerNorm, [BM, BN] of FiLM."""
    if NORM == "film":
        p_f = p_film + o_c[:, None].to(tl.int64) * film_stride_b + o_n[None, :]
        b_g = 1.0 + tl.load(p_f).to(tl.float32)
        b_s = tl.load(p_f + HP).to(tl.float32)
        if TABLE:
            b_g += tl.load(p_film_time + o_n)[None, :]
            b_s += tl.load(p_film_time + HP + o_n)[None, :]
        else:
            # Read again for every tile: kept in registers they would be there all along.
            o_t = tl.arange(0, TP)
            b_t = tl.load(p_t + o_s[:, None] * TP + o_t[None, :])
            p_w = p_w_film + o_t[:, None] * (2 * HP) + o_n[None, :]
            b_g += product(b_t, tl.load(p_w), PRECISION, ARITH)
            b_s += product(b_t, tl.load(p_w + HP), PRECISION, ARITH)
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
    p_t,
    p_film,
    p_film_time,
    w_feat_ptr,
    w_film_ptr,
    w_hidden_ptr,
    scale_ptr,
    shift_ptr,
    w_out_ptr,
    pre_ptr,  # workspace of R_P rows, as network_fwd left it
    stats_ptr,
    h_ptr,  # workspace of MP rows: gradient of the outputs; float32, with FOLD as stored and one layer at a time
    dpre_ptr,  # workspace of R_D rows, result: gradient of the pre-activations
    xhat_ptr,  # workspace of R_D rows, result with FOLD and WEIGHTS: normalised activations
    dfilm_ptr,  # workspace of R_D rows of 2 HP[l], result with WEIGHTS: gradient of FiLM's [scale, shift]
    dcond_ptr,  # [E, MP, HP[0]] float32, added to: gradient of cond's share of the first layer
    dcond_film_ptr,  # [E, MP, 2 sum HP] float32, added to: gradient of cond's share of FiLM
    dnorm_ptr,  # [2, blocks, E, sum HP] float32, added to: gradient of scale and shift, per block of rows
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
    o_c,
    o_s,
    film_stride_b,
    o_d,
    H: tl.constexpr,
    HP: tl.constexpr,
    KP: tl.constexpr,
    OFF: tl.constexpr,
    OFF_W: tl.constexpr,
    IN: tl.constexpr,
    FRESH: tl.constexpr,
    RES: tl.constexpr,
    L: tl.constexpr,
    FP: tl.constexpr,
    TP: tl.constexpr,
    DP: tl.constexpr,
    COND: tl.constexpr,
    TABLE: tl.constexpr,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    FOLD: tl.constexpr,
    ROLL: tl.constexpr,
    WEIGHTS: tl.constexpr,
    DCOND: tl.constexpr,
    ARITH: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient [BM, FP] of the state features. FRESH[l][j]: input j of layer l has no other gradient yet.

    With h = dpre_next W^T and xhat the normalised activations, a layer of FOLD has

        dy = r (h - xhat mean(h o xhat)),    dpre = dy act'(pre)

    where h is centred over the row because W'' is. The row mean needs all of h, so h passes through a workspace: one
    loop makes it, a second one finishes the layer.
    """
    HPL: tl.constexpr = HP[L - 1]
    BNL: tl.constexpr = BN if BN < HPL else HPL
    DTYPE: tl.constexpr = w_feat_ptr.dtype.element_ty
    mu, r = load_stats(stats_ptr + r_p, L - 1, n_e * R_P, NORM, BM)
    p_h = h_ptr + r_m * HPL
    if not FOLD:
        p_h = h_ptr + n_e * MP * OFF[L - 1] + r_m * HPL
    p_pre = pre_ptr + n_e * R_P * OFF[L - 1] + r_p * HPL
    s = tl.zeros([BM], tl.float32)
    for n in tl.range(0, HPL, BNL, num_stages=1):
        o_n = n + tl.arange(0, BNL)
        if DP == 1:
            b_h = b_dout * tl.load(w_out_ptr + i_e * HPL + o_n)[None, :]
        else:
            b_w = tl.load(w_out_ptr + (i_e * HPL + o_n)[None, :] * DP + o_d[:, None])
            b_h = product(cast(b_dout, DTYPE, ARITH), cast(b_w, DTYPE, ARITH), PRECISION, ARITH)
        o_y = tl.arange(0, BM)[:, None] * HPL + o_n[None, :]
        s += store_h(b_h, o_y, p_h, p_pre, mu, r, ACT, NORM, FOLD, ARITH)
    if ROLL:
        for i in tl.range(0, L, num_stages=1):
            l = L - 1 - i
            mu, r = load_stats(stats_ptr + r_p, l, n_e * R_P, NORM, BM)
            at = l
            if FOLD:
                at = l * 0
            p_h = h_ptr + n_e * MP * HPL * at + r_m * HPL
            p_dpre = dpre_ptr + n_e * R_D * HPL * l + r_d * HPL
            has_add = (l % RES == 0) & (l > 0)
            hidden_bwd(
                s,
                mu,
                r,
                p_h,
                h_ptr + n_e * MP * HPL * (l - RES) + r_m * HPL,
                has_add,
                pre_ptr + n_e * R_P * HPL * l + r_p * HPL,
                p_dpre,
                xhat_ptr + n_e * R_D * HPL * l + r_d * HPL,
                scale_ptr + (n_e * l + i_e) * HPL,
                shift_ptr + (n_e * l + i_e) * HPL,
                p_t,
                p_film + 2 * HPL * l,
                p_film_time + 2 * HPL * l,
                w_film_ptr + (n_e * l + i_e) * TP * 2 * HPL,
                o_c,
                o_s,
                film_stride_b,
                dfilm_ptr + (n_e * R_D * HPL * l + r_d * HPL) * 2,
                dcond_film_ptr + r_m * (2 * L * HPL) + 2 * HPL * l,
                2 * L * HPL,
                dnorm_ptr + (i_b * n_e + i_e) * L * HPL + l * HPL,
                n_b * n_e * L * HPL,
                H[0],
                HPL,
                TP,
                TABLE,
                ACT,
                NORM,
                FOLD,
                RES if RES < L else 0,
                WEIGHTS,
                DCOND,
                ARITH,
                PRECISION,
                BM,
                BNL,
            )
            if l > 0:
                below = l - 1
                mu, r = load_stats(stats_ptr + r_p, below, n_e * R_P, NORM, BM)
                at = below
                if FOLD:
                    at = l * 0
                s = input_bwd(
                    mu,
                    r,
                    p_dpre,
                    h_ptr + n_e * MP * HPL * at + r_m * HPL,
                    pre_ptr + n_e * R_P * HPL * below + r_p * HPL,
                    w_hidden_ptr + (n_e * below + i_e) * HPL * HPL,
                    below % RES == 0,
                    HPL,
                    HPL,
                    RES if RES < L else 0,
                    ACT,
                    NORM,
                    FOLD,
                    ARITH,
                    PRECISION,
                    BM,
                    BNL,
                    STAGES,
                )
    else:
        for i in tl.static_range(L):
            s = unrolled_bwd(
                s,
                p_t,
                p_film,
                p_film_time,
                w_film_ptr,
                w_hidden_ptr,
                scale_ptr,
                shift_ptr,
                pre_ptr,
                stats_ptr,
                h_ptr,
                dpre_ptr,
                xhat_ptr,
                dfilm_ptr,
                dcond_film_ptr,
                dnorm_ptr,
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
                o_c,
                o_s,
                film_stride_b,
                L - 1 - i,
                H,
                HP,
                KP,
                OFF,
                OFF_W,
                IN,
                FRESH,
                L,
                TP,
                TABLE,
                ACT,
                NORM,
                FOLD,
                WEIGHTS,
                DCOND,
                ARITH,
                PRECISION,
                BM,
                BN,
                STAGES,
            )
    tl.debug_barrier()
    HP0: tl.constexpr = HP[0]
    BN0: tl.constexpr = BN if BN < HP0 else HP0
    o_f = tl.arange(0, FP)
    b_df = tl.zeros([BM, FP], tl.float32)
    for n in tl.range(0, HP0, BN0, num_stages=1):
        o_k = n + tl.arange(0, BN0)
        o_y = tl.arange(0, BM)[:, None] * HP0 + o_k[None, :]
        b_d = tl.load(dpre_ptr + r_d * HP0 + o_y)
        b_wf = tl.load(w_feat_ptr + (i_e * FP + o_f)[None, :] * HP0 + o_k[:, None])
        b_df += product(b_d, b_wf, PRECISION, ARITH)
        if DCOND and COND and NORM != "film":
            p_dc = dcond_ptr + r_m * HP0 + o_y
            tl.store(p_dc, tl.load(p_dc) + b_d.to(tl.float32))
    return b_df


@triton.jit
def unrolled_bwd(
    s,
    p_t,
    p_film,
    p_film_time,
    w_film_ptr,
    w_hidden_ptr,
    scale_ptr,
    shift_ptr,
    pre_ptr,
    stats_ptr,
    h_ptr,
    dpre_ptr,
    xhat_ptr,
    dfilm_ptr,
    dcond_film_ptr,
    dnorm_ptr,
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
    o_c,
    o_s,
    film_stride_b,
    l: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    KP: tl.constexpr,
    OFF: tl.constexpr,
    OFF_W: tl.constexpr,
    IN: tl.constexpr,
    FRESH: tl.constexpr,
    L: tl.constexpr,
    TP: tl.constexpr,
    TABLE: tl.constexpr,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    FOLD: tl.constexpr,
    WEIGHTS: tl.constexpr,
    DCOND: tl.constexpr,
    ARITH: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Layer l and the gradient of its inputs; returns s of the layer before."""
    HPI: tl.constexpr = HP[l]
    SUM: tl.constexpr = OFF[L - 1] + HP[L - 1]
    mu, r = load_stats(stats_ptr + r_p, l, n_e * R_P, NORM, BM)
    p_dpre = dpre_ptr + n_e * R_D * OFF[l] + r_d * HPI
    hidden_bwd(
        s,
        mu,
        r,
        h_ptr + n_e * MP * (0 if FOLD else OFF[l]) + r_m * HPI,
        h_ptr,
        0,
        pre_ptr + n_e * R_P * OFF[l] + r_p * HPI,
        p_dpre,
        xhat_ptr + n_e * R_D * OFF[l] + r_d * HPI,
        scale_ptr + n_e * OFF[l] + i_e * HPI,
        shift_ptr + n_e * OFF[l] + i_e * HPI,
        p_t,
        p_film + 2 * OFF[l],
        p_film_time + 2 * OFF[l],
        w_film_ptr + (n_e * OFF[l] + i_e * HPI) * TP * 2,
        o_c,
        o_s,
        film_stride_b,
        dfilm_ptr + (n_e * R_D * OFF[l] + r_d * HPI) * 2,
        dcond_film_ptr + r_m * (2 * SUM) + 2 * OFF[l],
        2 * SUM,
        dnorm_ptr + (i_b * n_e + i_e) * SUM + OFF[l],
        n_b * n_e * SUM,
        H[l],
        HPI,
        TP,
        TABLE,
        ACT,
        NORM,
        FOLD,
        0,
        WEIGHTS,
        DCOND,
        ARITH,
        PRECISION,
        BM,
        BN if BN < HPI else HPI,
    )
    p_w = w_hidden_ptr + n_e * OFF_W[l] + i_e * KP[l] * HPI
    if len(IN[l]) > 1:
        input_bwd(
            mu,
            r,
            p_dpre,
            h_ptr + n_e * MP * OFF[IN[l][1]] + r_m * HP[IN[l][1]],
            p_dpre,
            p_w + HP[IN[l][0]] * HPI,
            1,
            HPI,
            HP[IN[l][1]],
            0 if FRESH[l][1] else 1,
            ACT,
            NORM,
            FOLD,
            ARITH,
            PRECISION,
            BM,
            BN if HP[IN[l][1]] > BN else HP[IN[l][1]],
            STAGES,
        )
    if l > 0:
        J: tl.constexpr = IN[l][0]
        mu, r = load_stats(stats_ptr + r_p, J, n_e * R_P, NORM, BM)
        s = input_bwd(
            mu,
            r,
            p_dpre,
            h_ptr + n_e * MP * (0 if FOLD else OFF[J]) + r_m * HP[J],
            pre_ptr + n_e * R_P * OFF[J] + r_p * HP[J],
            p_w,
            1,
            HPI,
            HP[J],
            0 if FRESH[l][0] else 1,
            ACT,
            NORM,
            FOLD,
            ARITH,
            PRECISION,
            BM,
            BN if HP[J] > BN else HP[J],
            STAGES,
        )
    return s


@triton.jit
def hidden_bwd(
    s,
    mu,
    r,
    p_h,
    p_h_add,
    has_add,
    p_pre,
    p_dpre,
    p_xhat,
    p_scale,
    p_shift,
    p_t,
    p_film,
    p_film_time,
    p_w_film,
    o_c,
    o_s,
    film_stride_b,
    p_dfilm,
    p_dcond_film,
    dcond_film_stride,
    p_dnorm,
    dnorm_stride,
    H: tl.constexpr,
    HP: tl.constexpr,
    TP: tl.constexpr,
    TABLE: tl.constexpr,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    FOLD: tl.constexpr,
    ADD: tl.constexpr,
    WEIGHTS: tl.constexpr,
    DCOND: tl.constexpr,
    ARITH: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """From the gradient h of a layer's output to that of its pre-activations."""
    DTYPE: tl.constexpr = p_dpre.dtype.element_ty
    tl.debug_barrier()
    o_b = tl.arange(0, BM)[:, None]
    if FOLD:
        for n in tl.range(0, HP, BN, num_stages=1):
            o_n = n + tl.arange(0, BN)
            o_y = o_b * HP + o_n[None, :]
            b_h = tl.load(p_h + o_y).to(tl.float32)
            b_pre = tl.load(p_pre + o_y).to(tl.float32)
            b_y, b_dy = activate_grad(b_pre, ACT, ARITH)
            if NORM == "after":
                b_y = (b_y - mu[:, None]) * r[:, None]
                b_h = r[:, None] * (b_h - b_y * (s / H)[:, None])
            if WEIGHTS:
                tl.store(p_xhat + o_y, cast(b_y, DTYPE, ARITH))
            tl.store(p_dpre + o_y, cast(b_h * b_dy, DTYPE, ARITH))
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
            if NORM == "none":
                b_y, b_dy = activate_grad(b_pre, ACT, ARITH)
                tl.store(p_dpre + o_y, cast(b_h * b_dy, DTYPE, ARITH))
            else:
                b_g, b_s = affine(
                    o_n,
                    p_scale,
                    p_shift,
                    p_t,
                    p_film,
                    p_film_time,
                    p_w_film,
                    o_c,
                    o_s,
                    film_stride_b,
                    HP,
                    TP,
                    TABLE,
                    NORM,
                    ARITH,
                    PRECISION,
                )
                if NORM == "after":
                    b_x = (activate(b_pre, ACT, ARITH) - mu[:, None]) * r[:, None]
                else:
                    b_x = (b_pre - mu[:, None]) * r[:, None]
                    b_y, b_dy = activate_grad(b_x * b_g + b_s, ACT, ARITH)
                    b_h = b_h * b_dy
                if NORM == "film":
                    if WEIGHTS:
                        tl.store(p_dfilm + o_b * (2 * HP) + o_n[None, :], cast(b_h * b_x, DTYPE, ARITH))
                        tl.store(p_dfilm + HP + o_b * (2 * HP) + o_n[None, :], cast(b_h, DTYPE, ARITH))
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
        if NORM != "none":
            m1 = m1 / H
            m2 = m2 / H
            tl.debug_barrier()
            for n in tl.range(0, HP, BN, num_stages=1):
                o_k = n + tl.arange(0, BN)
                o_z = o_b * HP + o_k[None, :]
                b_dx = tl.load(p_h + o_z).to(tl.float32)
                b_p = tl.load(p_pre + o_z).to(tl.float32)
                b_a = b_p
                b_da = tl.zeros_like(b_p) + 1.0
                if NORM == "after":
                    b_a, b_da = activate_grad(b_p, ACT, ARITH)
                b_xh = (b_a - mu[:, None]) * r[:, None]
                b_dx = r[:, None] * (b_dx - m1[:, None] - b_xh * m2[:, None]) * b_da
                # Padded columns hold (0 - mu) r, not 0.
                b_dx = tl.where((o_k < H)[None, :], b_dx, 0.0)
                tl.store(p_dpre + o_z, cast(b_dx, DTYPE, ARITH))


@triton.jit
def input_bwd(
    mu,
    r,
    p_dpre,
    p_h,
    p_pre,
    p_w,
    has_gradient,
    HP: tl.constexpr,
    KP: tl.constexpr,
    ADD: tl.constexpr,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    FOLD: tl.constexpr,
    ARITH: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h of one of a layer's inputs, dpre W^T; returns its row sums of h o xhat for FOLD."""
    tl.debug_barrier()
    o_h = tl.arange(0, HP)
    o_b = tl.arange(0, BM)[:, None]
    b_a = tl.load(p_dpre + o_b * HP + o_h[None, :])
    s = tl.zeros([BM], tl.float32)
    for n in tl.range(0, KP, BN, num_stages=STAGES):
        o_n = n + tl.arange(0, BN)
        b_w = tl.load(p_w + o_n[None, :] * HP + o_h[:, None])
        b_h = product(b_a, b_w, PRECISION, ARITH)
        o_y = o_b * KP + o_n[None, :]
        if not FOLD and ADD > 0:
            b_h += load_if(p_h + o_y, has_gradient)
        s += store_h(b_h, o_y, p_h, p_pre, mu, r, ACT, NORM, FOLD, ARITH)
    return s


@triton.jit
def load_stats(p_stats, l, stride, NORM: tl.constexpr, BM: tl.constexpr):
    """Mean and scale of layer l's rows."""
    if NORM != "none":
        o_b = tl.arange(0, BM)
        mu = tl.load(p_stats + 2 * l * stride + o_b)
        r = tl.load(p_stats + (2 * l + 1) * stride + o_b)
    else:
        mu = tl.zeros([BM], tl.float32)
        r = tl.zeros([BM], tl.float32)
    return mu, r


@triton.jit
def store_h(
    b_h, o_y, p_h, p_pre, mu, r, ACT: tl.constexpr, NORM: tl.constexpr, FOLD: tl.constexpr, ARITH: tl.constexpr
):
    """Stores a tile of h; returns its share of each row's sum of h o xhat."""
    if FOLD:
        tl.store(p_h + o_y, cast(b_h, p_h.dtype.element_ty, ARITH))
    else:
        tl.store(p_h + o_y, b_h)
    if FOLD and NORM == "after":
        b_y = activate(tl.load(p_pre + o_y).to(tl.float32), ACT, ARITH)
        return tl.sum(b_h * ((b_y - mu[:, None]) * r[:, None]), 1)
    else:
        return tl.zeros_like(mu)
