"""Device functions that every kernel shares: activations and their derivatives, state and time embeddings, row
statistics."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """1 / (1 + exp(-x)); FAST uses the hardware tanh (relative error 5e-4, below bfloat16 rounding)."""
    if FAST:
        t = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 + 0.5 * t
    else:
        return 1.0 / (1.0 + tl.exp(tl.minimum(-x, 80.0)))


@triton.jit
def activate(x, ACT: tl.constexpr, FAST: tl.constexpr):
    """The activation, float32. tanh-GELU is x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)): the cheap exact form.

    Constants are literals: the interpreter turns a global constexpr times a tensor into something that is neither.
    """
    if ACT == "gelu_tanh":
        return x * sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * x * x), FAST)
    elif ACT == "silu":
        return x * sigmoid(x, FAST)
    else:
        return tl.maximum(x, 0.0)


@triton.jit
def activate_grad(x, ACT: tl.constexpr, FAST: tl.constexpr):
    """The activation and its derivative, float32."""
    if ACT == "gelu_tanh":
        s = sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * x * x), FAST)
        return x * s, s + x * s * (1.0 - s) * (1.5957691216057308 + 0.21406444881780076 * x * x)
    elif ACT == "silu":
        s = sigmoid(x, FAST)
        return x * s, s + x * s * (1.0 - s)
    else:
        return tl.maximum(x, 0.0), tl.where(x > 0.0, 1.0, 0.0)


@triton.jit
def embed_state(b_x, o_f, low, high, std, EMBED: tl.constexpr, F: tl.constexpr):
    """State features [BM, FP] of b_x [BM, 1] or [BM, FP]; columns from F on are zero.

    hl_gauss is evaluated from two erfs per interval in float32; x is clamped to three standard deviations outside the
    range.
    """
    m_f = o_f[None, :] < F
    if EMBED == "hl_gauss":
        width = (high - low) / F
        inv = 0.7071067811865476 / std
        z = tl.minimum(tl.maximum(b_x, low - 3.0 * std), high + 3.0 * std)
        left = low + width * o_f[None, :].to(tl.float32)
        mass = tl.erf((left + width - z) * inv) - tl.erf((left - z) * inv)
        return tl.where(m_f, mass / (tl.erf((high - z) * inv) - tl.erf((low - z) * inv)), 0.0)
    elif EMBED == "scaled":
        return tl.where(m_f, (b_x - low) / (high - low), 0.0)
    else:
        return tl.where(m_f, b_x, 0.0)


@triton.jit
def cosine(turns):
    """cos(2 pi turns), absolute error below 2e-7 for |turns| <= 1.

    sin(pi/2 - 2 pi |r|) for the remainder r in half a turn, by its series to the 13th power. Triton's own cos keeps a
    table for huge arguments on the stack, which would show as a spill in every kernel.
    """
    r = turns - tl.floor(turns + 0.5)
    x = 6.283185307179586 * (0.25 - tl.abs(r))
    z = x * x
    p = 1.6059043836821613e-10
    p = p * z - 2.505210838544172e-08
    p = p * z + 2.7557319223985893e-06
    p = p * z - 1.984126984126984e-04
    p = p * z + 8.333333333333333e-03
    p = p * z - 1.6666666666666666e-01
    return x + x * z * p


@triton.jit
def embed_time(b_t, o_f, EMBED: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Time features of b_t [BM, 1] in columns FIRST..FIRST+COUNT-1 of [BM, FP]; zero elsewhere."""
    j = o_f[None, :] - FIRST
    m_f = (j >= 0) & (j < COUNT)
    if EMBED == "raw":
        return tl.where(m_f, b_t, 0.0)
    elif EMBED == "cosine":
        return tl.where(m_f, cosine(0.15915494309189535 * b_t), 0.0)
    else:
        return tl.where(m_f, cosine((j + 1).to(tl.float32) * 0.5 * b_t), 0.0)


@triton.jit
def add_cond(
    b_acc,
    p_cond,
    m_b,
    w_cond_ptr,
    i_e,
    o_n,
    C: tl.constexpr,
    CP: tl.constexpr,
    HP: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """b_acc [BM, BN] plus cond's share of the first layer in columns o_n; p_cond [BM, 1] points to each row's cond."""
    DTYPE: tl.constexpr = w_cond_ptr.dtype.element_ty
    for c in tl.range(0, CP, BC, num_stages=1):
        o_c = c + tl.arange(0, BC)
        b_c = tl.load(p_cond + o_c[None, :], mask=m_b[:, None] & (o_c < C)[None, :], other=0.0).to(tl.float32)
        b_w = tl.load(w_cond_ptr + (i_e * CP + o_c)[:, None] * HP + o_n[None, :])
        b_acc = tl.dot(b_c.to(DTYPE), b_w, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit
def hidden_layers(
    p_y,
    layer_size,
    s1,
    s2,
    w_hidden_ptr,
    b_hidden_ptr,
    p_pre,
    stats_ptr,
    i_e,
    n_e,
    MP,
    o_b,
    eps,
    H: tl.constexpr,
    HP: tl.constexpr,
    L: tl.constexpr,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    FAST: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Layers 1..L-1. Activations go back and forth between the two halves of p_y's workspace; half (L - 1) % 2 is last.

    s1, s2 [BM] are the sum and sum of squares of the activations so far; returns those of the last layer. With SAVE the
    pre-activations go to p_pre (layer 1 first) and the statistics of layers 0..L-2 to stats_ptr.
    """
    o_h = tl.arange(0, HP)
    for l in tl.range(0, L - 1, num_stages=1):
        tl.debug_barrier()
        b_a = tl.load(p_y + (l % 2) * layer_size + o_h[None, :])
        mu, r = row_scale(s1, s2, H, eps)
        if SAVE:
            store_stats(stats_ptr, l, i_e, n_e, MP, o_b, mu, r)
        s1 = tl.zeros([BM], tl.float32)
        s2 = tl.zeros([BM], tl.float32)
        p_w = w_hidden_ptr + (l * n_e + i_e) * HP * HP
        for n in tl.range(0, HP, BN, num_stages=STAGES):
            o_n = n + tl.arange(0, BN)
            b_w = tl.load(p_w + o_h[:, None] * HP + o_n[None, :])
            b_acc = tl.dot(b_a, b_w, input_precision=PRECISION)
            if NORM:
                b_acc = b_acc * r[:, None]
            b_acc += tl.load(b_hidden_ptr + (l * n_e + i_e) * HP + o_n)[None, :]
            if SAVE:
                tl.store(p_pre + l * layer_size + o_n[None, :], b_acc.to(p_pre.dtype.element_ty))
            b_y = activate(b_acc, ACT, FAST)
            s1 += tl.sum(b_y, 1)
            s2 += tl.sum(b_y * b_y, 1)
            tl.store(p_y + ((l + 1) % 2) * layer_size + o_n[None, :], b_y.to(p_y.dtype.element_ty))
    tl.debug_barrier()
    return s1, s2


@triton.jit
def store_stats(stats_ptr, l, i_e, n_e, MP, o_b, mu, r):
    """Mean and scale of layer l's activations into [L, 2, E, MP]."""
    tl.store(stats_ptr + ((2 * l) * n_e + i_e) * MP + o_b, mu)
    tl.store(stats_ptr + ((2 * l + 1) * n_e + i_e) * MP + o_b, r)


@triton.jit
def project_out(
    p_y,
    w_out_ptr,
    i_e,
    o_d,
    HP: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The head: activations y [BM, HP] at p_y times w_out [HP, DP] of member i_e, as [BM, DP] float32."""
    DTYPE: tl.constexpr = p_y.dtype.element_ty
    if DP == 1:
        o_h = tl.arange(0, HP)
        b_w = tl.load(w_out_ptr + i_e * HP + o_h)
        return tl.sum(tl.load(p_y + o_h[None, :]).to(tl.float32) * b_w[None, :], 1)[:, None]
    else:
        o_n = tl.arange(0, BN)
        b_v = tl.zeros([BM, DP], tl.float32)
        for n in tl.range(0, HP, BN, num_stages=1):
            b_y = tl.load(p_y + (n + o_n)[None, :])
            b_w = tl.load(w_out_ptr + (i_e * HP + n + o_n)[:, None] * DP + o_d[None, :])
            b_v = tl.dot(b_y, b_w.to(DTYPE), b_v, input_precision=PRECISION)
        return b_v


@triton.jit
def row_scale(s1, s2, H: tl.constexpr, eps):
    """Mean and rsqrt(variance + eps) of rows from their sum and sum of squares."""
    mu = s1 / H
    return mu, tl.rsqrt(tl.maximum(s2 / H - mu * mu, 0.0) + eps)
