"""Device functions that every kernel shares: casts and products, activations and their derivatives, embeddings."""

from __future__ import annotations

import triton
import triton.language as tl

# NET, a constexpr of every kernel, is a `pack.Shape` (or a `launch.Arithmetic` where only products and casts matter).
# Its ARITH says how float32 numbers are computed with and stored as bfloat16:
#   "fast"     hardware tanh, casts and products as they are: bfloat16 products on NVIDIA GPUs
#   "exact"    the same without inline assembly: float32 and tf32 products, other GPUs
#   "emulate"  bfloat16 in the interpreter, which truncates and cannot multiply it: rounds by hand, multiplies in
# float32


@triton.jit
def cast(b_x, DTYPE: tl.constexpr, NET: tl.constexpr):
    """float32 as DTYPE, rounded to nearest even."""
    if NET.ARITH == "emulate":
        bits = b_x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        b_x = bits.to(tl.float32, bitcast=True)
    return b_x.to(DTYPE)


@triton.jit
def product(b_x, b_w, NET: tl.constexpr):
    """b_x @ b_w in float32."""
    if NET.ARITH == "emulate":
        return tl.dot(b_x.to(tl.float32), b_w.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(b_x, b_w, input_precision=NET.PRECISION)


@triton.jit
def tanh(x, NET: tl.constexpr):
    """tanh(x); "fast" is the hardware's (relative error 5e-4, below bfloat16 rounding)."""
    if NET.ARITH == "fast":
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 2.0 / (1.0 + tl.exp(tl.minimum(-2.0 * x, 80.0))) - 1.0


@triton.jit
def sigmoid(x, NET: tl.constexpr):
    """1 / (1 + exp(-x))."""
    if NET.ARITH == "fast":
        return 0.5 + 0.5 * tanh(0.5 * x, NET)
    else:
        return 1.0 / (1.0 + tl.exp(tl.minimum(-x, 80.0)))


@triton.jit
def reciprocal(x, NET: tl.constexpr):
    """1 / x; "fast" is the hardware's (relative error 1e-7)."""
    if NET.ARITH == "fast":
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def erf(x, NET: tl.constexpr):
    """erf(x); with bfloat16 products by Abramowitz and Stegun 7.1.26 (error 1.5e-7) in a third of the instructions."""
    if NET.ARITH == "exact":
        return tl.erf(x)
    else:
        u = tl.abs(x)
        t = reciprocal(1.0 + 0.3275911 * u, NET)
        p = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
        y = 1.0 - p * tl.exp(-u * u)
        return tl.where(x < 0.0, -y, y)


@triton.jit
def activate(x, NET: tl.constexpr):
    """The activation, float32; every one maps 0 to 0, so padded columns stay 0.

    Constants are literals: the interpreter turns a global constexpr times a tensor into something that is neither.
    """
    if NET.ACT == "gelu_tanh":
        if NET.ARITH == "fast":
            h = 0.5 * x
            return h + h * tanh(x * (0.7978845608028654 + 0.03567740813630012 * x * x), NET)
        else:
            return x * gelu_gate(x, NET)
    elif NET.ACT == "gelu":
        return x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    elif NET.ACT == "silu":
        if NET.ARITH == "fast":
            h = 0.5 * x
            return h + h * tanh(h, NET)
        else:
            return x * sigmoid(x, NET)
    elif NET.ACT == "elu":
        return tl.where(x > 0.0, x, tl.exp(tl.minimum(x, 0.0)) - 1.0)
    elif NET.ACT == "mish":
        # tanh(log(1 + e)) = n / (n + 2) with n = e (e + 2).
        e = tl.exp(tl.minimum(x, 20.0))
        n = e * (e + 2.0)
        return x * (n / (n + 2.0))
    elif NET.ACT == "tanh":
        return tanh(x, NET)
    else:
        return tl.maximum(x, 0.0)


@triton.jit
def gelu_gate(x, NET: tl.constexpr):
    """gelu_tanh(x) / x: sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)) is the cheap exact form."""
    if NET.ARITH == "fast":
        return 0.5 + 0.5 * tanh(x * (0.7978845608028654 + 0.03567740813630012 * x * x), NET)
    else:
        return sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * x * x), NET)


@triton.jit
def activate_grad(x, NET: tl.constexpr):
    """The activation and its derivative, float32."""
    if NET.ACT == "gelu_tanh":
        s = gelu_gate(x, NET)
        return x * s, s + x * s * (1.0 - s) * (1.5957691216057308 + 0.21406444881780076 * x * x)
    elif NET.ACT == "gelu":
        s = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * s, s + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif NET.ACT == "silu":
        s = sigmoid(x, NET)
        return x * s, s + x * s * (1.0 - s)
    elif NET.ACT == "elu":
        e = tl.exp(tl.minimum(x, 0.0))
        return tl.where(x > 0.0, x, e - 1.0), tl.where(x > 0.0, 1.0, e)
    elif NET.ACT == "mish":
        e = tl.exp(tl.minimum(x, 20.0))
        n = e * (e + 2.0)
        s = n / (n + 2.0)
        return x * s, s + x * (4.0 * e * (e + 1.0) / ((n + 2.0) * (n + 2.0)))
    elif NET.ACT == "tanh":
        s = tanh(x, NET)
        return s, 1.0 - s * s
    else:
        return tl.maximum(x, 0.0), tl.where(x > 0.0, 1.0, 0.0)


@triton.jit
def embed_state(b_x, o_f, low, high, std, NET: tl.constexpr):
    """State features [BM, FP] of b_x [BM, 1] or [BM, FP]; columns from F on are zero.

    hl_gauss is evaluated from two erfs per interval in float32, hl_gauss_smooth from the density and its curvature in
    the middle of it; x is clamped to three standard deviations outside the range.
    """
    F: tl.constexpr = NET.F
    m_f = o_f[None, :] < F
    if NET.EMBED == "hl_gauss":
        width = (high - low) / F
        inv = 0.7071067811865476 / std
        z = tl.minimum(tl.maximum(b_x, low - 3.0 * std), high + 3.0 * std)
        left = low + width * o_f[None, :].to(tl.float32)
        mass = erf((left + width - z) * inv, NET) - erf((left - z) * inv, NET)
        return tl.where(m_f, mass / gauss_total(z, low, high, inv, NET), 0.0)
    elif NET.EMBED == "hl_gauss_smooth":
        inv = 0.7071067811865476 / std
        z = tl.minimum(tl.maximum(b_x, low - 3.0 * std), high + 3.0 * std)
        u, density, curvature = gauss_density(z, o_f, low, high, std, NET)
        mass = density * (1.0 + curvature * (u * u - 1.0))
        return tl.where(m_f, mass * (1.0 / gauss_total(z, low, high, inv, NET)), 0.0)
    elif NET.EMBED == "scaled":
        return tl.where(m_f, (b_x - low) / (high - low), 0.0)
    else:
        return tl.where(m_f, b_x, 0.0)


@triton.jit
def gauss_total(z, low, high, inv, NET: tl.constexpr):
    """The mass of the whole range, [BM, 1], in units of erf."""
    return erf((high - z) * inv, NET) - erf((low - z) * inv, NET)


@triton.jit
def gauss_density(z, o_f, low, high, std, NET: tl.constexpr):
    """Distance of the intervals' middles from z in standard deviations, width times density there in units of erf, and
    the factor of its second-order correction: a mass is density (1 + curvature (u^2 - 1)) up to the fourth order."""
    width = (high - low) / NET.F
    u = (low + width * (o_f[None, :].to(tl.float32) + 0.5) - z) * (1.0 / std)
    ratio = width / std
    return u, (0.7978845608028654 * ratio) * tl.exp(-0.5 * u * u), ratio * ratio * 0.041666666666666664


@triton.jit
def embed_state_grad(b_df, b_x, o_f, low, high, std, NET: tl.constexpr):
    """Gradient of the state, [BM, 1] or [BM, FP], from that of its features b_df [BM, FP]."""
    F: tl.constexpr = NET.F
    m_f = o_f[None, :] < F
    if NET.EMBED == "hl_gauss":
        width = (high - low) / F
        inv = 0.7071067811865476 / std
        z = tl.minimum(tl.maximum(b_x, low - 3.0 * std), high + 3.0 * std)
        left = (low + width * o_f[None, :].to(tl.float32) - z) * inv
        right = left + width * inv
        first = (low - z) * inv
        last = (high - z) * inv
        total = erf(last, NET) - erf(first, NET)
        share = (erf(right, NET) - erf(left, NET)) / total
        # d erf(u)/dz = -2/sqrt(pi) inv exp(-u^2)
        slope = tl.exp(-right * right) - tl.exp(-left * left)
        slope_total = tl.exp(-last * last) - tl.exp(-first * first)
        grad = (-1.1283791670955126 * inv) * (slope - share * slope_total) / total
        b_dx = tl.sum(tl.where(m_f, b_df * grad, 0.0), 1)[:, None]
        return tl.where((b_x >= low - 3.0 * std) & (b_x <= high + 3.0 * std), b_dx, 0.0)
    elif NET.EMBED == "hl_gauss_smooth":
        inv = 0.7071067811865476 / std
        z = tl.minimum(tl.maximum(b_x, low - 3.0 * std), high + 3.0 * std)
        u, density, curvature = gauss_density(z, o_f, low, high, std, NET)
        mass = density * (1.0 + curvature * (u * u - 1.0))
        slope = density * u * (1.0 + curvature * (u * u - 3.0)) * (1.0 / std)
        first = (low - z) * inv
        last = (high - z) * inv
        slope_total = (tl.exp(-last * last) - tl.exp(-first * first)) * (-1.1283791670955126 * inv)
        total = 1.0 / gauss_total(z, low, high, inv, NET)
        grad = (slope - mass * total * slope_total) * total
        b_dx = tl.sum(tl.where(m_f, b_df * grad, 0.0), 1)[:, None]
        return tl.where((b_x >= low - 3.0 * std) & (b_x <= high + 3.0 * std), b_dx, 0.0)
    else:
        b_dx = tl.where(m_f, b_df, 0.0)
        if NET.EMBED == "scaled":
            b_dx = b_dx / (high - low)
        if NET.D == 1:
            return tl.sum(b_dx, 1)[:, None]
        else:
            return b_dx


@triton.jit
def cosine_of_turns(turns):
    """cos(2 pi turns), absolute error below 2e-7 for |turns| <= 1.

    sin(pi/2 - 2 pi |r|) for the remainder r in half a turn, by its series to the 13th power. Triton's own cos keeps a
    table for huge arguments on the stack, which would show as a spill in every kernel.
    """
    r = turns - tl.floor(turns + 0.5)
    return sine_series(6.283185307179586 * (0.25 - tl.abs(r)))


@triton.jit
def cosine_of_radians(x):
    """cos(x), absolute error below 2e-7 up to a thousand turns: whole turns are taken off in two parts of 2 pi."""
    n = tl.floor(x * 0.15915494309189535 + 0.5)
    r = (x - n * 6.28125) - n * 1.9353071795864769e-3
    return sine_series(1.5707963267948966 - tl.abs(r))


@triton.jit
def sine_series(x):
    """sin(x) for |x| <= pi/2."""
    z = x * x
    p = 1.6059043836821613e-10
    p = p * z - 2.505210838544172e-08
    p = p * z + 2.7557319223985893e-06
    p = p * z - 1.984126984126984e-04
    p = p * z + 8.333333333333333e-03
    p = p * z - 1.6666666666666666e-01
    return x + x * z * p


@triton.jit
def embed_time(b_t, o_t, NET: tl.constexpr):
    """Time features [BM, TP] of b_t [BM, 1]; columns from T on are zero."""
    T: tl.constexpr = NET.T
    m_t = o_t[None, :] < T
    if NET.TIME == "raw":
        return tl.where(m_t, b_t, 0.0)
    elif NET.TIME == "cosine":
        return tl.where(m_t, cosine_of_turns(0.15915494309189535 * b_t), 0.0)
    elif NET.TIME == "power_fourier":
        half: tl.constexpr = T // 2
        k = tl.where(o_t < half, o_t, o_t - half)
        angle = b_t * tl.exp2(k.to(tl.float32))[None, :]
        # sin(x) = cos(x - pi/2)
        shift = tl.where(o_t < half, 0.0, 1.5707963267948966)[None, :]
        return tl.where(m_t, cosine_of_radians(angle - shift), 0.0)
    else:
        return tl.where(m_t, cosine_of_turns((o_t[None, :] + 1).to(tl.float32) * 0.5 * b_t), 0.0)


@triton.jit
def row_scale(s1, s2, H: tl.constexpr, eps):
    """Mean and rsqrt(variance + eps) of rows from their sum and sum of squares."""
    mu = s1 / H
    return mu, tl.rsqrt(tl.maximum(s2 / H - mu * mu, 0.0) + eps)


@triton.jit
def read_velocity(b_out, b_x, b_t, output_scale, NET: tl.constexpr):
    """The velocity at b_x, where the head's output predicts it, the end point or the noise.

    Denominators are at least 1e-3, as in the reference.
    """
    if NET.PREDICTION == "endpoint":
        return (output_scale * b_out - b_x) / tl.maximum(1.0 - b_t, 1e-3)
    elif NET.PREDICTION == "noise":
        return (b_x - output_scale * b_out) / tl.maximum(b_t, 1e-3)
    else:
        return output_scale * b_out


@triton.jit
def read_velocity_grad(b_dv, b_t, output_scale, NET: tl.constexpr):
    """Gradients of b_out and b_x."""
    if NET.PREDICTION == "endpoint":
        b_dv = b_dv / tl.maximum(1.0 - b_t, 1e-3)
        return output_scale * b_dv, -b_dv
    elif NET.PREDICTION == "noise":
        b_dv = b_dv / tl.maximum(b_t, 1e-3)
        return -output_scale * b_dv, b_dv
    else:
        return output_scale * b_dv, b_dv * 0.0
