"""What the kernels cover and which tiles they use: plain tables, no tuning at run time, no triton needed to read
them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import launch

MAX_WIDTH = 1024
MAX_LAYERS = 8
MAX_STATE_DIM = 128
MAX_FEATURES = 256
# Rows of every workspace are padded to this, a multiple of every row tile below.
ROW_PAD = 64
# Columns of cond that one product takes at a time in the first layer.
COND_BLOCK = 64


@dataclass(frozen=True)
class Network:
    """A velocity network in the kernels' words; sizes are those of one member."""

    state_dim: int
    cond_dim: int
    hidden: tuple[int, ...]
    activation: str
    norm: bool
    eps: float
    state_embedding: str  # identity | scaled | hl_gauss
    state_features: int
    low: float
    high: float
    sigma: float  # standard deviation of hl_gauss in edge spacings
    time_embedding: str  # raw | cosine | cosine_fourier
    time_features: int
    precision: str  # bf16 | tf32 | fp32

    @property
    def width(self) -> int:
        """H, the width of every hidden layer."""
        return self.hidden[0]

    @property
    def width_padded(self) -> int:
        """HP."""
        return max(16, power_of_2(self.width))

    @property
    def layers(self) -> int:
        """L, the number of hidden layers."""
        return len(self.hidden)

    @property
    def cond_padded(self) -> int:
        """CP, a multiple of COND_BLOCK; 0 without cond."""
        return -(-self.cond_dim // COND_BLOCK) * COND_BLOCK

    @property
    def state_padded(self) -> int:
        """DP: 1 for a scalar, else enough columns for a product."""
        return 1 if self.state_dim == 1 else max(16, power_of_2(self.state_dim))

    def features_padded(self, time: bool) -> int:
        """FP of the state features alone, or of the state and time features side by side."""
        return max(16, power_of_2(self.state_features + (self.time_features if time else 0)))

    @property
    def std(self) -> float:
        """Standard deviation of hl_gauss in units of the state."""
        return self.sigma * (self.high - self.low) / self.state_features


@dataclass(frozen=True)
class Tiles:
    """One entry of the plan: BM rows by BN columns per product, warps per program, stages of the weight pipeline."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


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


def candidates(kernel: str, arch: int, precision: str, width: int) -> tuple[Tiles, ...]:
    """The plan's entries for one kernel, arch, precision and padded width, most rows first; none where nothing fits."""
    size = 2 if precision == "bf16" else 4
    for (bytes_per_element, widest), entries in TABLE[family(arch)].items():
        if bytes_per_element == size and width <= widest:
            # A narrow network has no wider tile than itself.
            return tuple(replace(t, columns=min(t.columns, width)) for t in entries)
    return ()


def choose(kernel: str, arch: int, sms: int, precision: str, width: int, rows: int) -> Tiles:
    """The tiles for `rows` rows in all on a device of `sms` multiprocessors.

    The most rows per program that still busy nearly half of them: every program streams all weights, so a program with
    twice the rows takes far less than twice the time.
    """
    entries = candidates(kernel, arch, precision, width)
    for tiles in entries:
        if 2.2 * -(-rows // tiles.rows) >= sms:
            return tiles
    return entries[-1]


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


def why_unsupported(
    hidden: tuple[int, ...],
    state_dim: int,
    state_features: int,
    time_features: int,
    precision: str,
    device_index: int | None,
) -> str | None:
    """What keeps the kernels from covering a network on a CUDA device (None: under the interpreter), or None."""
    for width in hidden:
        if width != hidden[0]:
            return f"hidden layers of unequal width {hidden}"
    if hidden[0] > MAX_WIDTH:
        return f"a hidden width of {hidden[0]} (at most {MAX_WIDTH})"
    if len(hidden) > MAX_LAYERS:
        return f"{len(hidden)} hidden layers (at most {MAX_LAYERS})"
    if state_dim > MAX_STATE_DIM:
        return f"a state of {state_dim} dimensions (at most {MAX_STATE_DIM})"
    if state_features + time_features > MAX_FEATURES:
        return f"{state_features + time_features} state and time features (at most {MAX_FEATURES})"
    if device_index is not None:
        arch, _ = launch.target(device_index)
        if arch < 80:
            return f"compute capability {arch / 10} (8.0 and up have one)"
        if not candidates("integrate_fwd", arch, precision, max(16, power_of_2(hidden[0]))):
            return f"a hidden width of {hidden[0]} with {precision} products in the shared memory of sm_{arch}"
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
