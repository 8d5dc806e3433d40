"""What the kernels cover and which tiles they use: plain tables, no tuning at run time, no triton needed to read
them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from . import launch

MAX_WIDTH = 1024
MAX_LAYERS = 16
# Layers of unequal width, or with two inputs, are unrolled: every one adds to what has to be compiled.
MAX_UNROLLED_LAYERS = 8
MAX_STATE_DIM = 128
MAX_FEATURES = 256
# Rows of every workspace are padded to this, a multiple of every row tile below.
ROW_PAD = 64
# Activations of all steps are stored for the backward pass while they take at most this many bytes, else computed
# again. The backward pass walks in parts whose activations and gradients stay within the same bound.
STORE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Network:
    """A velocity network in the kernels' words; sizes are those of one member."""

    state_dim: int
    cond_dim: int
    hidden: tuple[int, ...]  # width of each hidden layer
    inputs: tuple[tuple[int, ...], ...]  # hidden layers whose outputs it takes side by side; () for the first
    add: tuple[int, ...]  # hidden layer whose output is added to its own, -1 for none
    activation: str
    norm: str  # none | after | before (the activation) | film
    eps: float
    state_embedding: str  # identity | scaled | hl_gauss
    state_features: int
    low: float
    high: float
    sigma: float  # standard deviation of hl_gauss in edge spacings
    time_embedding: str  # raw | cosine | cosine_fourier | power_fourier | given (computed outside)
    time_features: int
    prediction: str  # velocity | endpoint | noise
    output_scale: float
    precision: str  # bf16 | tf32 | fp32

    @property
    def layers(self) -> int:
        """L, the number of hidden layers."""
        return len(self.hidden)

    @property
    def padded(self) -> tuple[int, ...]:
        """HP, the padded width of each hidden layer."""
        return tuple(_padded(width) for width in self.hidden)

    @property
    def inputs_padded(self) -> tuple[int, ...]:
        """KP, the padded rows of each hidden layer's weights; 0 for the first, whose inputs come in parts."""
        return tuple(sum(self.padded[j] for j in into) for into in self.inputs)

    @property
    def offsets(self) -> tuple[int, ...]:
        """OFF, the padded widths before each layer."""
        return (0, *itertools.accumulate(self.padded))[:-1]

    @property
    def weight_offsets(self) -> tuple[int, ...]:
        """OFF_W, the padded weights before each layer's."""
        sizes = (k * h for k, h in zip(self.inputs_padded, self.padded, strict=True))
        return (0, *itertools.accumulate(sizes))[:-1]

    @property
    def width(self) -> int:
        """The widest row that a product takes whole: of a hidden layer, the state's or time's features."""
        return max(*self.padded, self.features_padded, self.time_padded)

    @property
    def chain(self) -> bool:
        """Whether every layer takes the one before it and nothing else."""
        return all(into == ((i - 1,) if i else ()) for i, into in enumerate(self.inputs))

    @property
    def fold(self) -> bool:
        """Whether LayerNorm is folded into the layer behind it (see kernels/network.py)."""
        return self.norm in ("none", "after") and self.chain and max(self.add) < 0

    @property
    def roll(self) -> bool:
        """Whether one loop runs over the hidden layers."""
        return self.chain and len(set(self.hidden)) == 1

    @property
    def residual(self) -> int:
        """RES, layers per residual block; the number of layers where nothing is added."""
        return next((i - j for i, j in enumerate(self.add) if j >= 0), self.layers)

    @property
    def fresh(self) -> tuple[tuple[bool, ...], ...]:
        """FRESH: walking back through the layers, whether an input has no gradient from another layer yet."""
        seen: set[int] = set()
        out: list[tuple[bool, ...]] = []
        for layer in range(self.layers - 1, -1, -1):
            out.append(tuple(j not in seen for j in self.inputs[layer]))
            seen.update(self.inputs[layer])
        return tuple(reversed(out))

    @property
    def state_padded(self) -> int:
        """DP: 1 for a scalar, else enough columns for a product."""
        return 1 if self.state_dim == 1 else _padded(self.state_dim)

    @property
    def features_padded(self) -> int:
        """FP."""
        return _padded(self.state_features)

    @property
    def time_padded(self) -> int:
        """TP."""
        return _padded(self.time_features)

    @property
    def std(self) -> float:
        """Standard deviation of hl_gauss in units of the state."""
        return self.sigma * (self.high - self.low) / self.state_features

    @property
    def element_size(self) -> int:
        """Bytes of a stored activation or packed weight."""
        return 2 if self.precision == "bf16" else 4


def _padded(width: int) -> int:
    return max(16, power_of_2(width))


def evaluations(method: str) -> int:
    """V, evaluations of the field per step."""
    return 1 if method == "euler" else 2


@dataclass(frozen=True)
class Tiles:
    """One entry of the plan: BM rows by BN columns per product, warps per program, stages of the weight pipeline."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


# The arch number of AMD's CDNA 3, beside NVIDIA's major * 10 + minor.
GFX942 = 942
# Shared memory one program may ask for, in bytes.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


def _tiles(*entries: tuple[int, int, int, int]) -> tuple[Tiles, ...]:
    return tuple(Tiles(*entry) for entry in entries)


# Bytes of stack per thread that an entry may take, by precision. Up to Hopper the first entry for the published network
# takes none; with others the assembler rounds registers down to fit one more program and spills a few. Products in full
# float32 have no tensor cores and live in registers: exactness is their purpose.
SPILL_BYTES = {"bf16": 32, "tf32": 40, "fp32": 512}

# arch -> (bytes per element of the products, padded width at most) -> (rows, columns, warps, stages), most rows first.
# Chosen by ahead-of-time compilation with triton 3.6.0 and 3.9.0: the largest tiles within both bounds.
_LARGE = {
    (2, 64): _tiles((64, 64, 4, 2), (32, 32, 4, 2), (16, 32, 4, 2)),
    (2, 256): _tiles((64, 64, 8, 2), (32, 32, 4, 2), (16, 32, 4, 2)),
    (2, 512): _tiles((64, 64, 8, 2), (32, 32, 4, 2), (16, 64, 4, 2)),
    (2, 1024): _tiles((32, 32, 8, 2), (16, 32, 4, 2)),
    (4, 64): _tiles((32, 32, 4, 2), (16, 32, 4, 2)),
    (4, 256): _tiles((32, 32, 4, 2), (16, 32, 4, 2)),
    (4, 512): _tiles((32, 32, 8, 2), (16, 32, 4, 2)),
    (4, 1024): _tiles((16, 16, 8, 2)),
}
_SMALL = {
    (2, 64): _tiles((64, 64, 4, 2), (32, 32, 4, 2), (16, 32, 4, 2)),
    (2, 256): _tiles((32, 32, 4, 2), (16, 32, 4, 2)),
    (2, 512): _tiles((32, 32, 8, 2), (16, 32, 8, 2)),
    (2, 1024): _tiles((16, 16, 4, 2)),
    (4, 64): _tiles((32, 32, 4, 2), (16, 32, 4, 2)),
    (4, 256): _tiles((32, 32, 4, 2), (16, 32, 4, 2)),
    (4, 512): _tiles((16, 16, 4, 2)),
}
TABLE: dict[int, dict[tuple[int, int], tuple[Tiles, ...]]] = {
    80: _LARGE,
    86: _SMALL,
    90: _LARGE,
    100: _LARGE | {(2, 256): _LARGE[2, 256][1:], (2, 512): _LARGE[2, 512][1:]},  # 64 rows spill there
    120: _SMALL,
}


def candidates(kernel: str, arch: int, net: Network) -> tuple[Tiles, ...]:
    """The plan's entries for one kernel, arch and network, most rows first; none where nothing fits."""
    size, width = net.element_size, net.width
    for (bytes_per_element, widest), entries in TABLE[family(arch)].items():
        if bytes_per_element == size and width <= widest:
            # A narrow network has no wider tile than itself.
            return tuple(replace(t, columns=min(t.columns, max(net.padded))) for t in entries)
    return ()


def choose(kernel: str, arch: int, sms: int, net: Network, rows: int | None) -> Tiles:
    """The tiles for `rows` rows in all on a device of `sms` multiprocessors; None for the same whatever the rows.

    The most rows per program that still busy nearly half of them: every program streams all weights, so a program with
    twice the rows takes far less than twice the time.
    """
    entries = candidates(kernel, arch, net)
    if rows is None:
        return entries[0]
    for tiles in entries:
        if 2.2 * -(-rows // tiles.rows) >= sms:
            return tiles
    return entries[-1]


def stores(net: Network, members: int, rows: int, evaluations: int) -> bool:
    """The memory rule: whether a walk's activations are stored for the backward pass, or computed again by it."""
    kept = 1 if net.fold else 2  # pre-activations; without FOLD the outputs as well
    return members * padded_rows(rows) * evaluations * sum(net.padded) * kept * net.element_size <= STORE_BYTES


def backward_part(net: Network, members: int, rows: int, evaluations: int, per_step: int, stored: bool) -> int:
    """Evaluations, whole steps of them, that one launch of the backward pass writes out for the weight gradients."""
    copies = 2 + (2 if net.norm == "film" else 0) + (0 if stored else 1)
    most = STORE_BYTES // (members * rows * sum(net.padded) * copies * net.element_size)
    return min(evaluations, max(1, most // per_step) * per_step)


def loss_part(net: Network, members: int, batch: int, samples: int) -> int:
    """Rows of cond, each with its samples, that the backward pass of a loss takes at a time."""
    copies = 3 + (2 if net.norm == "film" else 0)
    rows = STORE_BYTES // (members * sum(net.padded) * copies * net.element_size)
    return min(batch, max(1, rows // samples))


def name_of(arch: int) -> str:
    """sm_90, gfx942."""
    return f"gfx{arch}" if arch == GFX942 else f"sm_{arch}"


def padded_rows(m: int) -> int:
    """MP, the rows of a workspace for m rows of one member."""
    return (m + ROW_PAD - 1) // ROW_PAD * ROW_PAD


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def family(arch: int) -> int:
    """The arch whose table entries serve `arch` (compute capability as major * 10 + minor)."""
    if arch >= 120:
        return 120
    if arch >= 90:
        return 90 if arch < 100 else 100
    return 80 if arch in (80, 87) else 86


def why_unsupported(net: Network, device_index: int | None) -> str | None:
    """What keeps the kernels from covering a network on a CUDA device (None: under the interpreter), or None."""
    if max(net.hidden) > MAX_WIDTH:
        return f"a hidden width of {max(net.hidden)} (at most {MAX_WIDTH})"
    if net.layers > (MAX_LAYERS if net.roll else MAX_UNROLLED_LAYERS):
        most = f"{MAX_LAYERS}" if net.roll else f"{MAX_UNROLLED_LAYERS} of unequal width or with two inputs"
        return f"{net.layers} hidden layers (at most {most})"
    if net.state_dim > MAX_STATE_DIM:
        return f"a state of {net.state_dim} dimensions (at most {MAX_STATE_DIM})"
    for name, features in (("state", net.state_features), ("time", net.time_features)):
        if features > MAX_FEATURES:
            return f"{features} {name} features (at most {MAX_FEATURES})"
    if device_index is not None:
        arch, _ = launch.target(device_index)
        if arch < 80:
            return f"compute capability {arch / 10} (8.0 and up have one)"
        if not candidates("integrate_fwd", arch, net):
            return (
                f"a hidden width of {max(net.hidden)} with {net.precision} products in the shared memory of sm_{arch}"
            )
    return None


def describe(arch: int | None) -> str:
    """The plan for an arch (compute capability as major * 10 + minor) as text, one line per precision and width."""
    if arch is None:
        return "no CUDA device: CPU tensors run on the PyTorch reference"
    if arch < 80:
        return f"sm_{arch}: no kernels (compute capability 8.0 and up have them)"
    chosen = family(arch)
    lines = [f"sm_{arch} (entries of sm_{chosen}, {SHARED_MEMORY[chosen]:,} bytes of shared memory per program)"]
    for (size, width), entries in TABLE[chosen].items():
        tiles = ", ".join(f"{t.rows}x{t.columns} warps {t.num_warps} stages {t.num_stages}" for t in entries)
        lines.append(f"  {'bf16' if size == 2 else 'tf32, fp32'} products, width to {width}: {tiles}")
    return "\n".join(lines)
