"""Device functions of the noise: x_0 and t from (seed, row id, sample, dimension), to the bit those of
`fastflow.philox`.

Written in the same fixed point, line by line. What comes last is always an integer times a power of two: exact, so that
whether a compiler contracts it with what the caller adds makes no difference.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox_normal(seed, id, s, d):
    """x_0, float32 of the broadcast shape: `PhiloxNoise(seed, ids, samples).x_0(dim)` at row id, sample s, dimension d.

    seed is an int64 scalar; id an int64 tile, s and d int32 tiles that broadcast with it ([BM, 1], [BM, 1], [1, DP]).
    """
    bits_a, bits_b, _, _ = tl.philox(seed, id.to(tl.uint32), (id >> 32).to(tl.uint32), s, d)
    return normal(bits_a, bits_b)


@triton.jit
def philox_uniform(seed, id, s):
    """t, float32 in [0, 1) of the broadcast shape: `PhiloxNoise(seed, ids, samples).t()` at row id, sample s."""
    bits, _, _, _ = tl.philox(seed, id.to(tl.uint32), (id >> 32).to(tl.uint32), s, 0xFFFFFFFF)
    return (bits >> 8).to(tl.float32) * (2.0**-24)


@triton.jit
def normal(bits_a, bits_b):
    """Box-Muller of two uint32 tiles of one shape; see `fastflow.philox.normal`.

    Constants are literals: the interpreter turns a global constexpr times a tensor into something that is neither.
    """
    n = (bits_a >> 8).to(tl.int32) + 1
    e = 24 - ((n.to(tl.float32).to(tl.int32, bitcast=True) - 0x3F3504F3) >> 23)
    f = (n << e) - 16777216
    x = f << 6
    p = product(x, 96206392) - 155501314
    p = product(x, p) + 160174109
    p = product(x, p) - 177637029
    p = product(x, p) + 214301873
    p = product(x, p) - 268467090
    p = product(x, p) + 357922822
    p = product(x, p) - 536870673
    p = product(x, p) + 1073741797
    minus_log = e.to(tl.int64) * 12486629536330718 - f.to(tl.int64) * p
    r = tl.sqrt_rn((minus_log >> 8).to(tl.float32) * 2048.0).to(tl.int32)
    y = 1073741824 - tl.minimum(bits_b, 0xFFFFFFFF - bits_b).to(tl.int32)
    z = product(y, y)
    q = product(z, 162864) - 5018838
    q = product(z, q) + 85566407
    q = product(z, q) - 693598307
    q = product(z, q) + 1686629706
    return product(r, product(y, q)).to(tl.float32) * (2.0**-28)


@triton.jit
def product(a, b):
    """Of int32 in units of 2**-30, rounded down."""
    return ((a.to(tl.int64) * b) >> 30).to(tl.int32)
