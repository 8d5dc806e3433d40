"""Noise from a counter: x_0 and t as functions of (seed, row id, sample, dimension), computed again wherever they are
needed instead of stored.

The generator is Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). Normals are made
in fixed point, where every machine computes the same and no compiler can contract a product and a sum into one
rounding: a CPU, a GPU, a compiled graph and the kernels (`fastflow.kernels.noise`) give equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MASK = 0xFFFFFFFF

# Coefficients of least maximum error, in units of 2**-30, highest power first.
# log(1 + f) / f for 1 + f between sqrt(1/2) and sqrt(2): within 2.7e-8.
LOG = (
    96206392,
    -155501314,
    160174109,
    -177637029,
    214301873,
    -268467090,
    357922822,
    -536870673,
    1073741797,
)
# sin(pi/2 y) / y as a polynomial in y**2, |y| <= 1: within 7e-9.
SIN = (162864, -5018838, 85566407, -693598307, 1686629706)
LN_2 = 12486629536330718  # in units of 2**-54


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 (Salmon et al. 2011): four random words for each counter, those of `triton.language.philox`.

    Args:
        seed: 0-d int64, any value; its low and its high 32 bits are the key.
        c0, c1, c2, c3: the counter's words: int64 with values in [0, 2**32), of shapes that broadcast.

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).
    """
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        high_0, low_0 = _wide_product(c0, 0xD2511F53)
        high_2, low_2 = _wide_product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def _wide_product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a b, with b of at least 2**31."""
    # a (b - 2**32) is in the range of int64; a b need not be, and compilers may assume that nothing overflows.
    product = a * (b - (1 << 32))
    return (product >> 32) + a, product & MASK


def uniform(bits: Tensor) -> Tensor:
    """float32 in [0, 1), a multiple of 2**-24, from the high 24 of 32 random bits (int64 with values in [0, 2**32))."""
    return (bits >> 8).to(torch.float32) * 2.0**-24


def normal(bits_a: Tensor, bits_b: Tensor) -> Tensor:
    """Standard normals by the Box-Muller transform, sqrt(-2 log u) cos(2 pi v): float32 multiples of 2**-28.

    u in (0, 1] has the high 24 bits of `bits_a`, so that no normal exceeds 5.77; v in (0, 1) has all of `bits_b`.
    The error is below 1e-6. Only integer operations, conversions between integers and floats, products with powers of
    two and one square root are used, which IEEE 754 defines to the last bit.

    Args:
        bits_a, bits_b: int64 with values in [0, 2**32), of shapes that broadcast.
    """
    n = (bits_a >> 8) + 1  # u = n 2**-24 = (1 + f) 2**-e
    mantissa, exponent = torch.frexp(n.to(torch.float32))
    e = 24 - (exponent - (mantissa < 0.7071067690849304).int()).to(torch.int64)  # 1 + f begins at float32's sqrt(1/2)
    f = (n << e) - (1 << 24)
    minus_log = e * LN_2 - f * _polynomial(LOG, f << 6)
    # Cut to 51 bits: more would be rounded twice where a conversion goes by way of float64.
    square = (minus_log >> 8).to(torch.float32) * 2.0**11
    # The CPU's float32 root is not always the nearest float32; the float64 root, rounded, is.
    r = square.double().sqrt().to(torch.float32).to(torch.int64)  # sqrt(-2 log u) in units of 2**-28
    # cos(2 pi v) = sin(pi/2 y), y = 1 - 4 min(v, 1 - v)
    y = (1 << 30) - torch.minimum(bits_b, MASK - bits_b)
    cosine = (y * _polynomial(SIN, (y * y) >> 30)) >> 30
    return ((r * cosine) >> 30).to(torch.float32) * 2.0**-28


def _polynomial(coefficients: tuple[int, ...], x: Tensor) -> Tensor:
    """Horner's rule in units of 2**-30."""
    p = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        p = ((p * x) >> 30) + c
    return p


@dataclass(frozen=True, eq=False)
class PhiloxNoise:
    """The noise x_0 and the times t of a batch, each a function of the seed, its row's id and its place in the row.

    A row's noise does not depend on the batch it is in: a transition whose id is its place in the data set keeps its
    noise from one minibatch to the next, until the seed changes.

    Args:
        seed: 0-d int64, any value.
        ids: [B] int64, any values; rows with equal ids have equal noise.
        samples: S, noise samples per row.

    Raises:
        TypeError: `seed` or `ids` is not an int64 tensor, `samples` is not an int.
        ValueError: `seed` is not 0-d, `ids` is not 1-d or on another device than `seed`, `samples` is below 1.
    """

    seed: Tensor
    ids: Tensor
    samples: int

    def __post_init__(self) -> None:
        for name, tensor, shape in (("seed", self.seed, "0-d"), ("ids", self.ids, "1-d [B]")):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"PhiloxNoise: {name} must be an int64 tensor, got {type(tensor).__name__}")
            if tensor.dtype != torch.int64:
                raise TypeError(f"PhiloxNoise: {name} must be an int64 tensor, got {tensor.dtype}")
            if tensor.dim() != int(shape[0]):
                raise ValueError(f"PhiloxNoise: {name} must be {shape}, got shape {tuple(tensor.shape)}")
        if self.ids.device != self.seed.device:
            raise ValueError(
                f"PhiloxNoise: ids must be on the device of seed, {self.seed.device}, got {self.ids.device}"
            )
        _check_count("samples", self.samples)

    def x_0(self, dim: int) -> Tensor:
        """Standard normals, [B, S, dim] float32.

        Raises:
            TypeError: `dim` is not an int.
            ValueError: `dim` is below 1.
        """
        _check_count("dim", dim)
        ids = self.ids.view(-1, 1, 1)
        bits_a, bits_b, _, _ = self._words(ids, self._arange(self.samples).view(-1, 1), self._arange(dim))
        return normal(bits_a, bits_b)

    def t(self) -> Tensor:
        """Times uniform in [0, 1), [B, S] float32."""
        # The counter's last word is the dimension; no x_0 has as many as this.
        last = torch.full_like(self.seed, MASK)
        return uniform(self._words(self.ids.view(-1, 1), self._arange(self.samples), last)[0])

    def _words(self, ids: Tensor, sample: Tensor, dimension: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return philox(self.seed, ids & MASK, (ids >> 32) & MASK, sample, dimension)

    def _arange(self, count: int) -> Tensor:
        return torch.arange(count, device=self.seed.device)


def _check_count(name: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
        raise TypeError(f"PhiloxNoise: {name} must be an int, got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"PhiloxNoise: {name} must be at least 1, got {count}")
