"""One evaluation of a narrow network for a block of rows without workspaces: device functions of walk and loss.

Every layer's product takes whole rows of the layer before, so activations go from product to product in registers, and
the weights of all layers are read once per program, before the steps. For networks whose layers follow each other, with
LayerNorm behind the activation (folded, see kernels/network.py) or none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import activate, cast, product, row_scale


@triton.jit
def narrow_weights(weights, i_e, n_e, NET: tl.constexpr):
    """Tiles of all weights: of state and time features, of the hidden layers behind the first with their biases, of the
    head."""
    w_feat_ptr, w_time_ptr, _, w_hidden_ptr, b_hidden_ptr, _, _, w_out_ptr, b_out_ptr = weights
    L: tl.constexpr = NET.L
    HPL: tl.constexpr = NET.HP[L - 1]
    DTYPE: tl.constexpr = w_feat_ptr.dtype.element_ty
    o_h = tl.arange(0, NET.HP[0])
    o_l = tl.arange(0, HPL)
    o_d = tl.arange(0, NET.DP)
    b_wf = tl.load(w_feat_ptr + (i_e * NET.FP + tl.arange(0, NET.FP))[:, None] * NET.HP[0] + o_h[None, :])
    b_wt = b_wf
    if not NET.TABLE:
        b_wt = tl.load(w_time_ptr + (i_e * NET.TP + tl.arange(0, NET.TP))[:, None] * NET.HP[0] + o_h[None, :])
    hidden = ()
    biases = ()
    for l in tl.static_range(1, L):
        p_w = w_hidden_ptr + n_e * NET.OFF_W[l] + i_e * NET.KP[l] * NET.HP[l]
        o_k = tl.arange(0, NET.KP[l])
        o_n = tl.arange(0, NET.HP[l])
        hidden = hidden + (tl.load(p_w + o_k[:, None] * NET.HP[l] + o_n[None, :]),)  # noqa: RUF005 - triton has no stars
        biases = biases + (tl.load(b_hidden_ptr + n_e * NET.OFF[l] + i_e * NET.HP[l] + o_n),)  # noqa: RUF005
    if NET.DP == 1:
        b_wo = tl.load(w_out_ptr + i_e * HPL + o_l)
    else:
        b_wo = cast(tl.load(w_out_ptr + (i_e * HPL + o_l)[:, None] * NET.DP + o_d[None, :]), DTYPE, NET)
    return b_wf, b_wt, hidden, biases, b_wo, tl.load(b_out_ptr + i_e * NET.DP + o_d)


@triton.jit
def narrow_fwd(
    b_f,  # [BM, FP] state features
    b_c,  # [BM, HP[0]] cond's share of the first layer; anything without cond
    inputs,  # of network_fwd
    tiles,  # of narrow_weights
    pre_ptr,  # with SAVE: workspace of pre-activations and statistics, see network_fwd
    stats_ptr,
    n_e,
    R_P,
    r_p,
    eps,
    NET: tl.constexpr,
    SAVE: tl.constexpr,
):
    """The head's output [BM, DP] float32, as `network_fwd`'s."""
    b_t, _, _, p_time, _, _, _, _, _ = inputs
    b_wf, b_wt, hidden, biases, b_wo, b_bo = tiles
    L: tl.constexpr = NET.L
    DTYPE: tl.constexpr = b_wf.dtype
    b_acc = product(b_f, b_wf, NET)
    b_acc += tl.load(p_time + tl.arange(0, NET.HP[0]))[None, :]
    if not NET.TABLE:
        # Subtracted: see network_fwd.
        b_acc -= product(b_t, b_wt, NET) * -1.0
    if NET.COND:
        b_acc += b_c
    b_y, r = narrow_layer(b_acc, pre_ptr, stats_ptr, n_e, R_P, r_p, eps, 0, NET, SAVE)
    for l in tl.static_range(1, L):
        b_acc = product(cast(b_y, DTYPE, NET), hidden[l - 1], NET)
        if NET.NORM == "after":
            b_acc = b_acc * r[:, None]
        b_acc += biases[l - 1][None, :]
        b_y, r = narrow_layer(b_acc, pre_ptr, stats_ptr, n_e, R_P, r_p, eps, l, NET, SAVE)
    # What other programs would read back is rounded as it is stored.
    b_y = cast(b_y, DTYPE, NET)
    if NET.DP == 1:
        b_v = tl.sum(b_y.to(tl.float32) * b_wo[None, :], 1)[:, None]
    else:
        b_v = product(b_y, b_wo, NET)
    if NET.NORM == "after":
        b_v = b_v * r[:, None]
    return b_v + b_bo[None, :]


@triton.jit
def narrow_layer(b_acc, pre_ptr, stats_ptr, n_e, R_P, r_p, eps, l: tl.constexpr, NET: tl.constexpr, SAVE: tl.constexpr):
    """Output [BM, HP[l]] of layer l, not normalised, from its pre-activations, and the factor of its norm."""
    BM: tl.constexpr = NET.BM
    HP: tl.constexpr = NET.HP[l]
    o_b = tl.arange(0, BM)
    if SAVE:
        p_pre = pre_ptr + n_e * R_P * NET.OFF[l] + r_p * HP
        tl.store(p_pre + o_b[:, None] * HP + tl.arange(0, HP)[None, :], cast(b_acc, pre_ptr.dtype.element_ty, NET))
    b_y = activate(b_acc, NET)
    if NET.NORM == "after":
        mu, r = row_scale(tl.sum(b_y, 1), tl.sum(b_y * b_y, 1), NET.H[l], eps)
        if SAVE:
            p_stats = stats_ptr + 2 * l * n_e * R_P + r_p + o_b
            tl.store(p_stats, mu)
            tl.store(p_stats + n_e * R_P, r)
    else:
        r = tl.zeros([BM], tl.float32)
    return b_y, r


@triton.jit
def narrow_cond(p_c, o_c, NET: tl.constexpr):
    """cond's share of the first layer, rows o_c, float32 [BM, HP[0]]; zeros that nobody reads without cond."""
    BM: tl.constexpr = NET.BM
    HP: tl.constexpr = NET.HP[0]
    if NET.COND:
        return tl.load(p_c + o_c[:, None].to(tl.int64) * HP + tl.arange(0, HP)[None, :]).to(tl.float32)
    else:
        return tl.zeros([BM, HP], tl.float32)
