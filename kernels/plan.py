"""What the kernels cover and which tiles they use: plain tables, no tuning at run time, no triton needed to read
them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import astuple, dataclass

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
    # raw | cosine | cosine_fourier | power_fourier | given (computed outside) | rows (and so is FiLM of every row)
    time_embedding: str
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
        """The widest row that a product takes whole: of a hidden layer, or the features that enter the first one, whose
        operands are in shared memory at the same time."""
        if self.norm == "film":
            return max(*self.padded, self.features_padded, self.time_padded)
        return max(*self.padded, self.features_padded + self.time_padded)

    @property
    def chain(self) -> bool:
        """Whether every layer takes the one before it and nothing else."""
        return all(into == ((i - 1,) if i else ()) for i, into in enumerate(self.inputs))

    @property
    def kind(self) -> str:
        """The plan's kind: fold, norm or film."""
        return "fold" if self.fold else "film" if self.norm == "film" else "norm"

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
        return _padded(self.state_features or self.state_dim)

    @property
    def time_padded(self) -> int:
        """TP."""
        return _padded(self.time_features)

    @property
    def smooth(self) -> bool:
        """Whether hl_gauss is computed from densities: their error, at most 1e-4 of the largest feature, is below the
        rounding of bfloat16."""
        return self.state_embedding == "hl_gauss" and self.precision == "bf16" and self.sigma >= 2.0

    @property
    def std(self) -> float:
        """Standard deviation of hl_gauss in units of the state."""
        return self.sigma * (self.high - self.low) / max(1, self.state_features)

    @property
    def element_size(self) -> int:
        """Bytes of a stored activation or packed weight."""
        return 2 if self.precision == "bf16" else 4


class KnownNetwork(Network):
    """A network that computes what follows from its sizes once: every launch asks. torch.compile, which follows how a
    `Network` is looked at, does not follow this."""

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(astuple(self))


for _name, _member in list(vars(Network).items()):
    if isinstance(_member, property) and _member.fget is not None:
        _once = functools.cached_property(_member.fget)
        _once.__set_name__(KnownNetwork, _name)
        setattr(KnownNetwork, _name, _once)


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
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376, GFX942: 65_536}
KINDS = {
    "fold": "one layer behind the other, LayerNorm behind the activation or none",
    "norm": "residual blocks, LayerNorm before the activation, layers with two inputs",
    "film": "U-Net with FiLM",
}
KERNELS = ("integrate_fwd", "matching_fwd", "backward")
# Padded widths up to which an entry serves.
WIDTHS = (128, 256, 512, MAX_WIDTH)


def _entries(*widths: str) -> dict[int, tuple[Tiles, ...]]:
    """Per width of WIDTHS, "rows x columns x warps x stages" of every entry, most rows first."""
    return {
        width: tuple(Tiles(*map(int, entry.split("x"))) for entry in text.split())
        for width, text in zip(WIDTHS, widths, strict=True)
    }


# Rows x columns x warps x stages of every entry, most rows first, for each of WIDTHS. Products of Hopper and Blackwell
# with 64 rows read both operands from shared memory; elsewhere three stages are what it takes to load the next tile of
# weights during the product with this one.
_LARGE = {
    ("forward", 2): _entries(
        "64x64x8x3 32x64x4x3 16x64x4x3",
        "64x64x8x3 32x64x8x3 16x64x4x3",
        "64x32x8x3 32x32x8x3 16x64x4x3",
        "32x32x8x2 16x32x4x2",
    ),
    ("forward", 4): _entries(
        "64x64x8x3 32x64x4x3 16x64x4x3", "64x32x8x3 32x32x8x3 16x64x4x3", "32x32x8x2 16x32x4x2", "16x16x4x2"
    ),
    ("backward", 2): _entries(
        "64x64x8x3 32x64x8x3 16x64x4x3",
        "64x32x8x3 32x32x8x3 16x64x8x3",
        "64x32x8x3 32x32x8x3 16x64x8x3",
        "32x32x8x2 16x32x4x2",
    ),
    ("backward", 4): _entries(
        "64x32x8x3 32x64x8x3 16x64x4x3", "64x32x8x3 32x32x8x3 16x64x8x3", "32x32x8x2 16x32x4x2", "16x16x4x2"
    ),
}
_SMALL = {
    ("forward", 2): _entries(
        "64x64x8x3 32x64x4x3 16x64x4x3", "64x32x8x3 32x64x8x3 16x64x4x3", "32x32x8x3 16x32x4x3", "16x32x4x2"
    ),
    ("forward", 4): _entries("64x32x8x3 32x64x4x3 16x64x4x3", "32x32x8x2 16x32x4x3", "16x32x4x2", ""),
    ("backward", 2): _entries(
        "64x64x8x3 32x64x4x3 16x64x4x3", "64x32x8x3 32x64x8x3 16x64x4x3", "32x32x8x2 16x32x4x3", "16x32x4x2"
    ),
    ("backward", 4): _entries("64x32x8x3 32x32x8x3 16x64x4x3", "32x32x8x2 16x32x4x3", "16x16x4x2", ""),
}
_HOPPER = {
    ("forward", 2): _entries(
        "64x64x4x2 32x64x4x3 16x64x4x3",
        "64x64x8x3 32x64x8x3 16x64x4x3",
        "64x64x8x2 32x64x8x3 16x64x4x3",
        "32x32x8x3 16x32x4x3",
    ),
    ("forward", 4): _entries(
        "64x64x8x2 32x64x4x3 16x64x4x3", "64x64x8x1 32x64x8x3 16x64x4x3", "32x32x8x3 16x32x4x3", "16x32x4x2"
    ),
    ("backward", 2): _entries(
        "64x64x8x2 32x64x4x3 16x64x4x3",
        "64x64x8x2 32x64x8x3 16x64x4x3",
        "64x64x8x2 32x64x8x3 16x64x8x3",
        "32x32x8x3 16x32x4x3",
    ),
    ("backward", 4): _entries(
        "64x64x8x2 32x64x4x3 16x64x4x3", "32x64x8x3 16x64x8x3", "32x32x8x3 16x32x4x3", "16x32x4x2"
    ),
}
_BLACKWELL = _HOPPER | {
    ("forward", 2): _entries(
        "64x64x4x2 32x64x4x3 16x64x4x3",
        "64x64x8x1 32x64x8x3 16x64x4x3",
        "64x64x8x1 32x64x8x3 16x64x4x3",
        "32x32x8x3 16x32x4x3",
    ),
    ("backward", 2): _entries(
        "64x64x8x2 32x64x4x3 16x64x4x3", "64x64x8x2 32x64x8x3 16x64x4x3", "32x64x8x3 16x64x8x3", "32x32x8x3 16x32x4x3"
    ),
}
_CDNA3 = {
    ("forward", 2): _entries(
        "64x64x4x1 16x64x4x2", "64x64x4x1 16x64x4x2", "64x64x4x1 16x64x4x1", "32x32x4x1 16x32x4x1"
    ),
    ("forward", 4): _entries("64x64x4x1 16x64x4x1", "64x64x4x1 16x64x4x1", "32x32x4x1 16x32x4x1", "16x16x4x1"),
    ("backward", 2): _entries("64x64x4x1 16x64x4x2", "64x32x4x1 16x64x4x1", "64x32x4x1 16x64x4x1", "16x32x4x1"),
    ("backward", 4): _entries("64x64x4x1 16x64x4x1", "32x32x4x1 16x64x4x1", "16x32x4x1", "16x16x4x1"),
}
# FiLM multiplies two more times in every tile where rows have times of their own: narrower tiles.
_LARGE_FILM = {
    ("forward", 2): _entries(
        "64x32x8x3 16x32x8x3", "64x32x8x3 16x32x8x3", "64x32x8x3 16x32x8x3", "32x16x4x3 16x16x4x3"
    ),
    ("forward", 4): _entries("64x32x8x3 16x32x8x3", "64x32x8x3 16x32x8x3", "32x16x4x3 16x16x4x3", "16x16x4x2"),
    ("backward", 2): _entries(
        "64x32x8x3 16x16x4x3", "64x32x8x3 16x16x4x3", "64x32x8x3 32x16x4x3 16x16x4x3", "32x16x4x3 16x16x4x3"
    ),
    ("backward", 4): _entries("64x32x8x3 16x16x4x3", "64x32x8x3 16x16x4x3", "32x16x4x3 16x16x4x3", "16x16x4x2"),
}
_SMALL_FILM = {
    (way, size): _entries(
        *(("64x32x8x3 16x16x4x3", "64x32x8x3 16x16x4x3", "32x16x4x3 16x16x4x3", "16x16x4x2") if size == 2 else
          ("32x16x4x3 16x16x4x3", "32x16x4x3 16x16x4x3", "16x16x4x2", ""))
    )
    for way in ("forward", "backward")
    for size in (2, 4)
}  # fmt: skip
_HOPPER_FILM = {
    ("forward", 2): _entries(
        *("64x64x8x1 32x32x4x3 16x32x8x3",) * 3,
        "32x32x4x3 16x32x8x3",
    ),
    ("forward", 4): _entries(
        *("64x64x8x1 32x32x4x3 16x32x8x3",) * 2,
        "32x32x4x3 16x32x8x3",
        "16x32x4x2",
    ),
    ("backward", 2): _entries(*("32x32x8x3 16x32x8x3",) * 4),
    ("backward", 4): _entries(*("32x32x8x3 16x32x8x3",) * 3, "16x32x4x2"),
}
_CDNA3_FILM = {
    (way, size): _entries(
        *(("64x32x4x1 32x32x4x1 16x64x4x1",) * 3 + ("16x32x4x1",) if size == 2 else
          ("64x32x4x1 32x32x4x1 16x64x4x1",) * 2 + ("16x32x4x1", "16x16x4x1"))
    )
    for way in ("forward", "backward")
    for size in (2, 4)
}  # fmt: skip
# arch, kind, way, bytes per element -> width -> entries
TABLE: dict[tuple[int, str, str, int], dict[int, tuple[Tiles, ...]]] = {
    (arch, kind, way, size): entries
    for arch, plain, film in (
        (80, _LARGE, _LARGE_FILM),
        (86, _SMALL, _SMALL_FILM),
        (90, _HOPPER, _HOPPER_FILM),
        (100, _BLACKWELL, _HOPPER_FILM),
        (120, _SMALL, _SMALL_FILM),
        (GFX942, _CDNA3, _CDNA3_FILM),
    )
    for kind in KINDS
    for (way, size), entries in (film if kind == "film" else plain).items()
}


def candidates(kernel: str, arch: int, net: Network) -> tuple[Tiles, ...]:
    """The plan's entries for one kernel, arch and network, most rows first; none where nothing fits."""
    way = "backward" if kernel == "backward" else "forward"
    if way == "forward" and narrow(net):
        return (NARROW_TILE_FP32,) if net.precision == "fp32" else NARROW_TILES
    by_width = TABLE.get((family(arch), net.kind, way, net.element_size), {})
    entries = next((entries for width, entries in by_width.items() if net.width <= width), ())
    if arch // 10 == 9 and min(net.padded) < 64:
        # Some versions of triton read beyond narrow operands of Hopper's products with 64 rows (issue 11366).
        entries = tuple(t for t in entries if t.rows < 64)
    return entries


# Layers up to this width, with weights of so many bytes, stay in registers and shared memory (kernels/narrow.py).
NARROW_WIDTH = 64
NARROW_BYTES = 48 * 1024
NARROW_TILES = (Tiles(32, NARROW_WIDTH, 4, 1), Tiles(16, NARROW_WIDTH, 2, 1))
# Products of float32 keep their operands in registers.
NARROW_TILE_FP32 = Tiles(16, NARROW_WIDTH, 4, 1)


def narrow(net: Network) -> bool:
    """Whether the walk and the loss keep a network's weights and activations within each program."""
    hp, size = net.padded, net.element_size
    ends = (net.features_padded + net.time_padded) * hp[0] + hp[-1] * net.state_padded
    hidden = sum(k * h for k, h in zip(net.inputs_padded, hp, strict=True))
    return net.fold and max(hp) <= NARROW_WIDTH and (ends + hidden) * size <= NARROW_BYTES


@dataclass(frozen=True)
class Groups:
    """How groups of programs share a walk's rows (kernels/group.py)."""

    tiles: Tiles  # BM rows at a time by the BN columns that a program keeps
    count: int  # groups of a member
    meets: bool = True  # one launch whose programs meet behind each layer; else a launch per layer


# Tiles of groups, the most rows first.
GROUP_TILES = (Tiles(32, 64, 8, 1), Tiles(16, 64, 4, 1), Tiles(16, 32, 4, 1))
# Arch, then width up to which: how many rows a group takes at most. Behind that programs that stream all weights should
# be as fast, by kernels/roofline.py, to which tests hold these numbers.
GROUP_ROWS = {80: {256: 16, MAX_WIDTH: 128}, 90: {256: 16, MAX_WIDTH: 256}, 100: {256: 16, MAX_WIDTH: 256}}
# The same where kernels/ring.py has what is behind it.
GROUP_ROWS_BESIDE_RING = 128
GROUP_WIDTH = 256


def group_bytes(net: Network, tiles: Tiles) -> int:
    """Shared memory of a program that keeps its columns of all layers, in bytes."""
    hp, size = net.padded, net.element_size
    weights = net.features_padded * hp[0] + sum(k * h for k, h in zip(net.inputs_padded, hp, strict=True))
    head = 0 if net.state_padded == 1 else hp[-1] * net.state_padded * size + 4 * tiles.rows * net.state_padded
    return (weights * tiles.columns // hp[0] + tiles.rows * max(hp)) * size + head


def group_tiles(arch: int, net: Network) -> tuple[Tiles, ...]:
    """Tiles of groups that fit a network on an arch, the first choice first."""
    if family(arch) not in GROUP_ROWS or net.precision != "bf16":
        return ()
    if not (net.fold and net.roll and net.layers > 1 and net.padded[0] >= GROUP_WIDTH):
        return ()
    return tuple(t for t in GROUP_TILES if group_bytes(net, t) <= SHARED_MEMORY[family(arch)])


@functools.lru_cache(maxsize=1024)
def groups(arch: int, sms: int, net: Network, members: int, rows: int, ringed: bool = False) -> Groups | None:
    """The groups that walk `rows` rows of each member, or None where another design does better; `ringed`: one of these
    is `ring`.

    Every program has a multiprocessor to itself, and all run at once.
    """
    by_width = GROUP_ROWS.get(family(arch), {})
    most = next((most for width, most in by_width.items() if net.padded[0] <= width), 0)
    most = min(most, GROUP_ROWS_BESIDE_RING) if ringed else most
    for tiles in group_tiles(arch, net):
        count = sms // (members * (net.padded[0] // tiles.columns))
        each = -(-rows // count) if count else 0
        if each > most:
            return None
        if each > 16 or (each and tiles.rows == 16):
            return Groups(tiles, min(count, -(-rows // tiles.rows)))
    return None


@dataclass(frozen=True)
class Ring:
    """How programs keep their rows' activations in shared memory while weights pass by (kernels/ring.py)."""

    tiles: Tiles  # RING_ROWS rows by BN columns
    places: int  # tiles of weights, RING_TILE rows by BN columns, that are there or on their way


RING_ROWS = RING_TILE = 64
RING_WIDTHS = (128, 512)
RING_PLACES = (4, 16)


@functools.lru_cache(maxsize=1024)
def ring(arch: int, net: Network) -> Ring | None:
    """The ring for a walk on an arch; None where the design does not cover a network."""
    width, rows, dp = net.padded[0], RING_ROWS, net.state_padded
    if family(arch) != 90 or net.precision != "bf16" or not (net.fold and net.roll):
        return None
    if net.features_padded > RING_TILE or dp > RING_TILE or not RING_WIDTHS[0] <= width <= RING_WIDTHS[1]:
        return None
    columns = min(128, width // 2)
    head = 2 * rows * 4 if dp == 1 else width * dp * 2
    # Two layers' activations; sums of rows; barriers; what the compiler keeps for groups of warps.
    kept = 2 * rows * width * 2 + 8 * rows * 4 + head + 8 * (2 * width // columns + 1) + 288
    places = min(RING_PLACES[1], (SHARED_MEMORY[90] - kept) // (RING_TILE * columns * 2 + 24))
    return Ring(Tiles(rows, columns, 4, 1), places) if places >= RING_PLACES[0] else None


# Bytes of stack per thread that an entry may take, forward and backward; docs/kernels.md shows what each takes. The
# unrolled layers of a U-Net inside the loop over steps are more than registers hold.
SPILL_BYTES = {"fold": (128, 640), "norm": (320, 448), "film": (768, 1536)}


def spill_bytes(kernel: str, arch: int, net: Network) -> int:
    """Bytes of stack per thread that an entry may take."""
    # On gfx942 triton 3.9 spills more than 3.7.
    return max(SPILL_BYTES[net.kind][kernel == "backward"], 512 if arch == GFX942 else 0)


def choose(kernel: str, arch: int, sms: int, net: Network, rows: int | None) -> Tiles:
    """The tiles for `rows` rows in all on a device of `sms` multiprocessors; None for the same whatever the rows.

    The most rows per program that still busy half of them: every program streams all weights, so a program with twice
    the rows takes far less than twice the time.
    """
    entries = candidates(kernel, arch, net)
    if rows is None:
        return entries[0]
    for tiles in entries:
        if 2 * -(-rows // tiles.rows) >= sms:
            return tiles
    return entries[-1]


def stores(net: Network, members: int, rows: int, evaluations: int) -> bool:
    """The memory rule: whether a walk's activations are stored for the backward pass, or computed again by it."""
    kept = 1 if net.fold else 2  # pre-activations; without FOLD the outputs as well
    return members * padded_rows(rows) * evaluations * sum(net.padded) * kept * net.element_size <= STORE_BYTES


@functools.lru_cache(maxsize=1024)
def film_rows(net: Network, members: int, rows: int, evaluations: int) -> Network:
    """The network of a call whose rows have times of their own: their FiLM comes from one product in front of the
    kernel while it takes no more memory than STORE_BYTES, else every program multiplies by FiLM's weights again."""
    size = members * rows * evaluations * 2 * sum(net.padded) * net.element_size
    return dataclasses.replace(net, time_embedding="rows") if net.norm == "film" and size <= STORE_BYTES else net


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
    """The arch whose table entries serve `arch` (compute capability as major * 10 + minor, or GFX942)."""
    if arch == GFX942:
        return GFX942
    if arch >= 120:
        return 120
    if arch >= 90:
        return 90 if arch < 100 else 100
    return 80 if arch in (80, 87) else 86


def why_unsupported(net: Network, device_index: int | None) -> str | None:
    """What keeps the kernels from covering a network on a GPU (None: under the interpreter), or None."""
    return why_unsupported_on(net, None if device_index is None else launch.target(device_index)[0])


def why_unsupported_on(net: Network, arch: int | None) -> str | None:
    """The same for an arch; None: for every one."""
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
    if arch is None:
        return None
    if arch < 80:
        return _why_not_arch(arch)
    if not all(candidates(kernel, arch, net) for kernel in KERNELS):
        memory = f"the {SHARED_MEMORY[family(arch)]:,} bytes of shared memory of {name_of(arch)}"
        return f"{net.precision} products {net.width} wide in {memory} (no tile fits)"
    return None


def _why_not_arch(arch: int) -> str:
    if arch:
        return f"compute capability {arch // 10}.{arch % 10} (8.0 and up have one)"
    return f"an AMD GPU other than {name_of(GFX942)}"


def describe(arch: int | None) -> str:
    """The plan for an arch (compute capability as major * 10 + minor, or GFX942) as text: what runs there with which
    tiles, what falls back there and what everywhere."""
    if arch is None:
        return "no GPU: CPU tensors run on the PyTorch reference"
    if arch < 80:
        return f"no fused kernel for {_why_not_arch(arch)}: the PyTorch reference runs"
    chosen = family(arch)
    lines = [
        f"{name_of(arch)}: tiles of {name_of(chosen)}, {SHARED_MEMORY[chosen]:,} bytes of shared memory per program",
        "  rows x columns x warps x stages of every entry, forward | backward, for products up to so wide",
    ]
    entries = " ".join("x".join(map(str, astuple(t))) for t in (*NARROW_TILES, NARROW_TILE_FP32))
    lines.append(f"  walk and loss of layers up to {NARROW_WIDTH} wide that fit {NARROW_BYTES:,} bytes: {entries}")
    if chosen in GROUP_ROWS:
        entries = " ".join("x".join(map(str, astuple(t))) for t in GROUP_TILES)
        lines.append(f"  walks of few rows by groups of programs, bf16 products, from {GROUP_WIDTH} wide: {entries}")
    if chosen == 90:
        state = "on" if launch.RING else "off"
        lines.append(
            "  walks of many rows with activations in shared memory, bf16 products, "
            f"{RING_WIDTHS[0]} to {RING_WIDTHS[1]} wide: FASTFLOW_RING=1 ({state})"
        )
    missing: dict[str, list[str]] = {}
    for kind, what in KINDS.items():
        lines.append(f"  {what}")
        for (size, name), width in itertools.product(((2, "bf16"), (4, "tf32, fp32")), WIDTHS):
            ways = [TABLE[chosen, kind, way, size][width] for way in ("forward", "backward")]
            if all(ways):
                text = " | ".join(" ".join("x".join(map(str, astuple(t))) for t in entries) for entries in ways)
                lines.append(f"    {name:10s} {width:4d}  {text}")
            else:
                below = max((w for w in WIDTHS if w < width), default=0)
                missing.setdefault(f"{name} products wider than {below}", []).append(kind)
    general = [
        f"hidden layers wider than {MAX_WIDTH}; more than {MAX_LAYERS} of them, or {MAX_UNROLLED_LAYERS} of unequal "
        "width or with two inputs",
        f"states of more than {MAX_STATE_DIM} dimensions, more than {MAX_FEATURES} state or time features",
        "float64 and float16 parameters",
        "second derivatives and forward-mode derivatives, gradients with respect to times and seeds",
    ]
    here = [
        text + (f" ({', '.join(kinds)})" if len(kinds) < len(KINDS) else "") + ": no tile fits the shared memory"
        for text, kinds in missing.items()
    ]
    lines += ["  falls back to the PyTorch reference here:", *(f"    {text}" for text in here or ["nothing"])]
    lines += ["  falls back everywhere:", *(f"    {text}" for text in general)]
    return "\n".join(lines)
