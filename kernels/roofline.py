"""What a launch should take, by a model of the machine: no measurement, and no triton needed to read it.

A design is a way to lay the evaluations of a network out over a GPU:

    rows    one program owns BM rows and streams all weights through its multiprocessor, tiles as `plan.choose` says
    group   some programs share a block of rows; each keeps a slice of the columns of every layer's weights in shared
            memory for the whole walk and meets the others at a barrier behind every layer
    layers  one launch per layer, in a CUDA graph, over tiles of rows and columns
    narrow  hidden widths of at most 64: weights and activations stay in registers
    ring    one program owns 64 rows, whose activations stay in its shared memory; two groups of its warps take turns

A layer takes the longer of its products and of what L2 has to deliver for them (what goes back has wires of its own),
then its epilogue (bias, activation, statistics, rounding), then what it waits for: nothing hides the epilogue or the
wait, unless several programs are on a multiprocessor, in which case their waits overlap, or two groups of warps take
turns, in which case epilogues hide behind products. `predict` adds all up, `best` names the cheapest design.

What is prepared and added up around a launch is not in here: see `around` and `weight_gradients`. `built` names the
design that runs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import launch, plan
from .plan import Network, Tiles

DESIGNS = ("rows", "group", "layers", "narrow", "ring")


@dataclass(frozen=True)
class Machine:
    """One GPU. Rates are what is reached, not what is printed on it."""

    name: str
    arch: int
    sms: int
    clock: float  # Hz under load
    bf16: float  # FLOP/s of dense products
    tf32: float
    l2: float  # bytes/s from L2 to all multiprocessors
    port: float  # bytes/s from L2 to one
    memory: float  # bytes/s
    l2_bytes: int
    shared: int  # bytes of shared memory per program
    node: float  # s from the end of a graph's launch to the work of the next
    barrier: float  # s that programs take to meet by atomics
    refill: float  # s until loads are in flight again behind a barrier or a launch
    start: float  # s of the same within a program that waits for nobody
    few_rows: tuple[tuple[int, float], ...]  # (rows, share of the rate) of products with at most so many rows

    def rate(self, precision: str) -> float:
        """FLOP/s of products."""
        # fp32 has no matrix instructions: a multiplication and an addition per lane and cycle.
        return {"bf16": self.bf16, "tf32": self.tf32, "fp32": 2.0 * LANES * self.sms * self.clock}[precision]

    def efficiency(self, rows: int) -> float:
        """Share of the rate that products of so many rows reach."""
        return next((share for most, share in self.few_rows if rows <= most), 1.0)


# H200. bf16: 769 to 798 TFLOP/s measured by others with torch 2.11 on random data; TF32 at half of it. L2: 10.2 and 9.7
# TB/s were measured on an H200 and 5.5 on power-limited cards, taken in between. A port: 64 bytes per cycle at most,
# 35 to 38 with all ports busy. node: 1.2 to 1.4 us between kernels of a graph. barrier: 1.0 to 1.1 us of 32 to 136
# blocks. refill and start: L2 answers after 263 cycles (0.15 us), estimated as two to five times that. few_rows: below
# 64 rows mma.sync replaces wgmma, at 63 % of the peak; 16 rows fill half of it.
H200 = Machine(
    name="H200",
    arch=90,
    sms=132,
    clock=1.75e9,
    bf16=790e12,
    tf32=395e12,
    l2=8e12,
    port=100e9,
    memory=4.8e12,
    l2_bytes=50 * 2**20,
    shared=plan.SHARED_MEMORY[90],
    node=1.3e-6,
    barrier=1.0e-6,
    refill=0.8e-6,
    start=0.3e-6,
    few_rows=((16, 0.33), (32, 0.67)),
)
# The same chip with another memory (3.35 TB/s by its data sheet); 7.0 TB/s of L2 were measured on the PCIe card.
H100 = replace(H200, name="H100", l2=7e12, memory=3.35e12)
# 108 multiprocessors, 312 TFLOP/s, 2.0 TB/s and 40 MB by its data sheet, four fifths of the former reached by
# assumption; L2 5.4 TB/s measured on the 80 GB card. Waits as on Hopper. mma.sync is what it has: 16 rows fill half.
A100 = replace(
    H200,
    name="A100",
    arch=80,
    sms=108,
    clock=1.41e9,
    bf16=250e12,
    tf32=125e12,
    l2=5.4e12,
    port=80e9,
    memory=2.0e12,
    l2_bytes=40 * 2**20,
    shared=plan.SHARED_MEMORY[80],
    few_rows=((16, 0.5),),
)
MACHINES = {machine.name: machine for machine in (H200, H100, A100)}


def machine_of(gpu: str) -> Machine | None:
    """The machine of a GPU's full name, such as "NVIDIA H100 80GB HBM3"; None for one that is not known."""
    words = re.split(r"[^A-Z0-9]+", gpu.upper())
    return next((machine for name, machine in MACHINES.items() if name in words), None)


# float32 lanes of a multiprocessor.
LANES = 128
# Instructions per element of an epilogue, from the assembly: an activation by the hardware's tanh 6, bias, statistics,
# factor and rounding 11, addresses of weights and of what is stored among them; the derivative is a little more.
EPILOGUE, EPILOGUE_BACK = 17, 24
# Per feature of a state embedding: two erfs; with bfloat16 products the density in an interval's middle.
EMBEDDING, EMBEDDING_SMOOTH = {"hl_gauss": 64}, {"hl_gauss": 16}
# Registers of a multiprocessor over what a thread may take.
THREADS = 65536 // 255
# The same of kernels/ring.py, whose activations need no addresses; counted by tests/test_ring.py.
EPILOGUE_RING = 13
# Programs of a group; each member of an ensemble has groups of its own.
GROUP_SIZES = (4, 8, 16, 32)
GROUP_TILE = 16
# mma.sync's share of the rate; every 16 rows read all of a program's weights through shared memory, 128 bytes a cycle.
GROUP_EFFICIENCY = 0.63
SHARED_BYTES = 128
# Warps that split a product's columns each compute the features of all its rows.
GROUP_WARPS = 4
LAYER_TILES = ((128, 128), (64, 128), (64, 64))
NARROW_ROWS = (16, 32, 64)
# Cycles from one layer to the next within registers: two chained products 66, from accumulators to operands through
# shared memory 80, an activation 50. Estimated.
NARROW_CYCLES = 200
# Share of the rate that libraries reach on the weight gradients' products: long sums, few tiles.
LIBRARY_EFFICIENCY = 0.8


@dataclass(frozen=True)
class Cost:
    """Seconds of a launch, or of several, by what is waited for.

    Args:
        tensor: in products. l2: in loads and stores. epilogue: in what follows products.
        wait: in launches, barriers and latencies.
        seconds: all in all; less than the sum, because products and loads overlap.
        overlapped: the same if epilogues overlapped with both: what a warp-specialised kernel could reach.
    """

    tensor: float = 0.0
    l2: float = 0.0
    epilogue: float = 0.0
    wait: float = 0.0
    seconds: float = 0.0
    overlapped: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.tensor + other.tensor,
            self.l2 + other.l2,
            self.epilogue + other.epilogue,
            self.wait + other.wait,
            self.seconds + other.seconds,
            self.overlapped + other.overlapped,
        )

    def times(self, n: int) -> Cost:
        """n of them, one behind the other."""
        return Cost(*(n * x for x in (self.tensor, self.l2, self.epilogue, self.wait, self.seconds, self.overlapped)))


def _phase(tensor: float, l2: float, epilogue: float, wait: float) -> Cost:
    busy = max(tensor, l2)
    return Cost(tensor, l2, epilogue, wait, busy + epilogue + wait, max(busy, epilogue) + wait)


def _late(tensor: float, l2: float, epilogue: float, wait: float) -> Cost:
    """The same where loads begin behind the product, beside its epilogue."""
    seconds = tensor + max(l2, epilogue) + wait
    return Cost(tensor, l2, epilogue, wait, seconds, max(tensor, l2, epilogue) + wait)


@dataclass(frozen=True)
class Layer:
    """One product per row with what belongs to it.

    Args:
        inputs, outputs: padded sizes of its weights.
        extra: bytes per row that are read or written besides the inputs and outputs, through L2 alone.
        kept: bytes per row that are written for, or read by, the way back.
        instructions: per output, of the epilogue.
    """

    inputs: int
    outputs: int
    extra: int = 0
    kept: int = 0
    instructions: int = EPILOGUE


def layers(net: Network, kernel: str, save: bool = False, own_times: bool = False) -> list[Layer]:
    """What one evaluation, or its way back, multiplies: first layer, hidden ones, head.

    Args:
        net: the network. kernel: a name of `plan.KERNELS`.
        save: a walk keeps its activations. own_times: rows have times of their own.
    """
    size, hp = net.element_size, net.padded
    own_times = own_times or kernel != "integrate_fwd"
    kept = size * (1 if net.fold else 2)
    if kernel == "backward":
        # Outputs become inputs; every layer reads what was kept and writes the gradient of its pre-activation.
        back = [
            Layer(hp[i], k, 0, (kept + size) * k, EPILOGUE_BACK)
            for i, k in reversed(list(enumerate(net.inputs_padded)))
            if i
        ]
        head = Layer(max(16, net.state_padded), hp[-1], 0, (kept + size) * hp[-1], EPILOGUE_BACK)
        return [head, *back, Layer(hp[0], net.features_padded, 0, 0, 2)]
    save = save or kernel == "matching_fwd"
    film = net.norm == "film"
    found = []
    for i, width in enumerate(hp):
        if i == 0:
            time = net.time_padded if own_times and not film else 0
            extra = size * width * bool(net.cond_dim and not film)
            layer = Layer(net.features_padded + time, width, extra, kept * width * save)
        else:
            layer = Layer(net.inputs_padded[i], width, 0, kept * width * save)
        # A second pass over the row: the norm is not folded.
        second = 0 if net.fold else EPILOGUE
        if film:
            layer = replace(layer, extra=layer.extra + 2 * size * width)
        found.append(replace(layer, instructions=layer.instructions + second))
        if film and own_times and net.time_embedding != "rows":
            found.append(Layer(net.time_padded, 2 * width, 0, 0, 2))
    return [*found, Layer(hp[-1], max(16, net.state_padded), 0, 0, 4)]


def hidden_flops(net: Network, rows: int, evaluations: int) -> int:
    """FLOPs of the products between hidden layers, for rows of all members."""
    pairs = ((sum(net.hidden[j] for j in into), width) for into, width in zip(net.inputs, net.hidden, strict=True))
    return 2 * rows * evaluations * sum(k * n for k, n in pairs)


def floor(net: Network, rows: int, evaluations: int, machine: Machine, passes: int = 1) -> float:
    """Seconds that the products between hidden layers alone take at the machine's rate; `passes` 3 with the two of the
    way back."""
    return passes * hidden_flops(net, rows, evaluations) / machine.rate(net.precision)


def why_not(design: str, kernel: str, net: Network, machine: Machine) -> str | None:
    """What keeps a design from a kernel of a network, or None."""
    if design not in DESIGNS:
        raise ValueError(f"design must be one of {', '.join(DESIGNS)}, got {design!r}")
    if kernel not in plan.KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(plan.KERNELS)}, got {kernel!r}")
    if design == "rows":
        return None if plan.candidates(kernel, machine.arch, net) else "no tile fits the shared memory"
    if design == "narrow":
        return (
            None if max(net.padded) <= plan.NARROW_WIDTH and net.chain else "a layer wider than 64, or with two inputs"
        )
    if design == "ring":
        if kernel != "integrate_fwd":
            return "walks alone"
        return None if plan.ring(machine.arch, net) else "Hopper, bf16 and widths that its shared memory holds twice"
    if not net.fold:
        return "a norm that is not folded, or layers with two inputs"
    if design == "group" and kernel == "backward":
        return "weights would have to stay in shared memory both ways"
    if design == "group" and group_size(net, machine) is None:
        return "no slice of the weights fits the shared memory"
    return None


def group_size(net: Network, machine: Machine) -> int | None:
    """The fewest programs whose shared memory holds all weights and a tile of rows; None where there are none."""
    for g in GROUP_SIZES:
        tiles = Tiles(GROUP_TILE, net.padded[0] // g, 4, 1)
        if g <= machine.sms and min(net.padded) // g >= 16 and plan.group_bytes(net, tiles) <= machine.shared:
            return g
    return None


def predict(
    design: str,
    kernel: str,
    net: Network,
    rows: int,
    evaluations: int,
    machine: Machine,
    *,
    members: int = 1,
    save: bool = False,
    own_times: bool = False,
    tiles: Tiles | None = None,
) -> Cost:
    """What one launch of a kernel takes, by the model.

    Args:
        design: a name of DESIGNS.
        kernel: a name of `plan.KERNELS`; "backward" without the weights' gradients.
        net: the network.
        rows: of all members together.
        evaluations: of the network per row.
        machine: a GPU, such as `H200`.
        members: of the ensemble.
        save: a walk keeps its activations for the way back. own_times: its rows have times of their own.
        tiles: of "rows", in place of the plan's.

    Raises:
        ValueError: an unknown name, or a design that does not cover the network; see `why_not`.
    """
    reason = why_not(design, kernel, net, machine)
    if reason:
        raise ValueError(f"{design} does not cover {kernel} of this network: {reason}")
    parts = layers(net, kernel, save, own_times)
    m = -(-rows // members)
    kept_bytes = rows * evaluations * sum(layer.kept for layer in parts)
    # What the way back reads fits L2, or comes from memory.
    through_memory = kept_bytes > machine.l2_bytes
    # The head is in the last hidden layer's epilogue.
    headless = parts if kernel == "backward" else parts[:-1]
    if design == "group":
        return _group(headless, net, m, evaluations, machine, members, through_memory)
    if design == "layers":
        return _layers(headless, net, m, evaluations, machine, members, through_memory)
    if design == "narrow":
        return min(
            (_narrow(parts, net, m, evaluations, machine, members, bm, through_memory) for bm in NARROW_ROWS),
            key=lambda cost: cost.seconds,
        )
    if design == "ring":
        return _ring(parts, net, m, evaluations, machine, members, through_memory)
    tiles = tiles or plan.choose(kernel, machine.arch, machine.sms, net, rows)
    return _rows(parts, net, m, evaluations, machine, members, tiles, through_memory)


def best(
    net: Network,
    rows: int,
    evaluations: int,
    machine: Machine,
    kernel: str = "integrate_fwd",
    *,
    designs: Sequence[str] = DESIGNS,
    members: int = 1,
    save: bool = False,
    own_times: bool = False,
) -> str:
    """Name of the cheapest of some designs; looked up from the second time on.

    Raises:
        ValueError: none of them covers the network.
    """
    return _best(net, rows, evaluations, machine, kernel, tuple(designs), members, save, own_times)


@functools.lru_cache(maxsize=4096)
def _best(
    net: Network,
    rows: int,
    evaluations: int,
    machine: Machine,
    kernel: str,
    designs: tuple[str, ...],
    members: int,
    save: bool,
    own_times: bool,
) -> str:
    covering = [design for design in designs if why_not(design, kernel, net, machine) is None]
    if not covering:
        raise ValueError(f"none of {', '.join(designs)} covers {kernel} of this network on {machine.name}")
    options: dict[str, Any] = {"members": members, "save": save, "own_times": own_times}
    return min(covering, key=lambda d: predict(d, kernel, net, rows, evaluations, machine, **options).seconds)


def built(
    net: Network,
    rows: int,
    machine: Machine,
    kernel: str = "integrate_fwd",
    *,
    members: int = 1,
    save: bool = False,
    own_times: bool = False,
    ring: bool | None = None,
) -> str:
    """Name of the design that runs: what the plan chooses, of those that kernels exist of. `ring`: with FASTFLOW_RING
    1 or 0, by default as it is."""
    if kernel != "backward" and plan.narrow(net):
        return "narrow"
    plain = kernel == "integrate_fwd" and not (save or own_times)
    ringed = (launch.RING if ring is None else ring) and plan.ring(machine.arch, net) is not None
    if plain and plan.groups(machine.arch, machine.sms, net, members, -(-rows // members), ringed):
        return "group"
    return "ring" if plain and ringed else "rows"


def fills(design: str, kernel: str, net: Network, rows: int, machine: Machine, members: int = 1) -> bool:
    """Whether a launch has so many programs that those of others find next to no multiprocessor until it is done.
    Arguments as of `predict`."""
    m = -(-rows // members)
    if design in ("narrow", "layers"):
        # Small programs, of which several fit a multiprocessor; or many short launches.
        return False
    if design == "group":
        groups = plan.groups(machine.arch, machine.sms, net, members, m)
        each = groups.count * (net.padded[0] // groups.tiles.columns) if groups else machine.sms
    else:
        tiles = plan.choose(kernel, machine.arch, machine.sms, net, rows)
        each = -(-m // (plan.RING_ROWS if design == "ring" else tiles.rows))
    return members * each >= 0.75 * machine.sms


def best_tiles(
    kernel: str,
    net: Network,
    rows: int,
    machine: Machine,
    candidates: Sequence[Tiles] | None = None,
    *,
    members: int = 1,
    save: bool = False,
    own_times: bool = False,
) -> Tiles:
    """The cheapest tiles of "rows" by the model, of some or of the plan's; `plan.choose` goes by rows alone."""
    options: dict[str, Any] = {"members": members, "save": save, "own_times": own_times}
    found = plan.candidates(kernel, machine.arch, net) if candidates is None else candidates
    return min(found, key=lambda t: predict("rows", kernel, net, rows, 1, machine, tiles=t, **options).seconds)


# Designs ------------------------------------------------------------------------------------------------------------


def _embedding(net: Network, rows: int, machine: Machine) -> float:
    """Seconds of one multiprocessor for the state features of so many rows."""
    per_feature = EMBEDDING_SMOOTH if net.smooth else EMBEDDING
    return rows * net.features_padded * per_feature.get(net.state_embedding, 0) / (LANES * machine.clock)


def _delivered(
    loads: float, kept: int, rows: int, machine: Machine, through_memory: bool, busy: int, turns: int = 1
) -> float:
    """Seconds until L2 has delivered so many bytes to each of `busy` multiprocessors, `turns` times over, and what a
    layer keeps of all rows is in memory, if that is where it goes."""
    l2 = turns * max(busy * loads / machine.l2, loads / machine.port)
    return max(l2, kept * rows / machine.memory) if through_memory else l2


def _rows(
    parts: Sequence[Layer],
    net: Network,
    m: int,
    evaluations: int,
    machine: Machine,
    members: int,
    tiles: Tiles,
    through_memory: bool,
) -> Cost:
    size, rate = net.element_size, machine.rate(net.precision) / machine.sms
    programs = members * -(-m // tiles.rows)
    busy = min(programs, machine.sms)
    # So many programs one behind the other on the multiprocessor that has most.
    turns = -(-programs // machine.sms)
    needed = size * (tiles.rows * net.width + tiles.num_stages * net.width * min(tiles.columns, max(net.padded)))
    together = max(1, min(THREADS // (32 * tiles.num_warps), machine.shared // needed))
    bm, efficiency = tiles.rows, machine.efficiency(tiles.rows)
    total = Cost()
    for layer in parts:
        loads = size * layer.inputs * (layer.outputs + bm) + bm * (layer.extra + layer.kept)
        l2 = _delivered(loads, layer.kept, members * m, machine, through_memory, busy, turns)
        tensor = turns * 2 * bm * layer.inputs * layer.outputs / (rate * efficiency)
        epilogue = turns * bm * layer.outputs * layer.instructions / (LANES * machine.clock)
        wait = machine.start * -(-turns // together)
        # With two stages the next tile of weights is asked for when the product is done.
        waits = tiles.num_stages < 3 and together < 2 and layer.outputs > tiles.columns
        total += _late(tensor, l2, epilogue, wait) if waits else _phase(tensor, l2, epilogue, wait)
    total += _phase(0.0, 0.0, turns * _embedding(net, bm, machine), 0.0)
    return total.times(evaluations) + _phase(0.0, 0.0, 0.0, machine.node)


def _group(
    parts: Sequence[Layer],
    net: Network,
    m: int,
    evaluations: int,
    machine: Machine,
    members: int,
    through_memory: bool,
) -> Cost:
    size, rate = net.element_size, machine.rate(net.precision) / machine.sms
    g = group_size(net, machine)
    assert g is not None  # else `why_not` had a reason
    groups = max(1, machine.sms // g // members)
    groups = min(groups, -(-m // GROUP_TILE))
    # Members that do not fit beside each other come one behind the other.
    rounds = -(-members * groups * g // (machine.sms // g * g))
    share = -(-m // groups)
    share = -(-share // GROUP_TILE) * GROUP_TILE
    busy = min(members * groups * g, machine.sms)
    total = Cost()
    # Of the head everybody adds the parts up behind the last layer's barrier.
    for layer in parts:
        columns = max(16, layer.outputs // g)
        loads = share * (size * layer.inputs + (layer.extra + layer.kept) // g)
        l2 = _delivered(loads, layer.kept, members * m, machine, through_memory, busy)
        tensor = 2 * share * columns * layer.inputs / (rate * GROUP_EFFICIENCY)
        reads = share // GROUP_TILE * size * layer.inputs * columns / (SHARED_BYTES * machine.clock)
        tensor = max(tensor, reads)
        epilogue = share * columns * layer.instructions / (LANES * machine.clock)
        total += _phase(tensor, l2, epilogue, machine.barrier + machine.refill)
    total += _phase(0.0, 0.0, GROUP_WARPS * _embedding(net, share, machine), 0.0)
    weights = size * sum(layer.inputs * layer.outputs for layer in parts) / g
    begin = _phase(0.0, max(weights / machine.port, busy * weights / machine.l2), 0.0, machine.node)
    return (total.times(evaluations) + begin).times(rounds)


def _layers(
    parts: Sequence[Layer],
    net: Network,
    m: int,
    evaluations: int,
    machine: Machine,
    members: int,
    through_memory: bool,
) -> Cost:
    size, rate = net.element_size, machine.rate(net.precision) / machine.sms

    def launch(layer: Layer, bm: int, bn: int) -> Cost:
        bn = min(bn, layer.outputs)
        programs = members * -(-m // bm) * -(-layer.outputs // bn)
        turns, busy = -(-programs // machine.sms), min(programs, machine.sms)
        loads = size * layer.inputs * (bm + bn) + bm * bn * (layer.extra + layer.kept) // layer.outputs
        l2 = _delivered(loads, layer.kept, members * m, machine, through_memory, busy, turns)
        tensor = turns * 2 * bm * bn * layer.inputs / (rate * machine.efficiency(bm))
        epilogue = turns * bm * bn * layer.instructions / (LANES * machine.clock)
        return _phase(tensor, l2, epilogue, machine.node + machine.refill)

    total = Cost()
    for layer in parts:
        total += min((launch(layer, *tile) for tile in LAYER_TILES), key=lambda cost: cost.seconds)
    # Every program of the first layer computes its rows' features.
    total += _phase(0.0, 0.0, _embedding(net, 64, machine), 0.0)
    return total.times(evaluations)


def _narrow(
    parts: Sequence[Layer],
    net: Network,
    m: int,
    evaluations: int,
    machine: Machine,
    members: int,
    bm: int,
    through_memory: bool,
) -> Cost:
    rate = machine.rate(net.precision) / machine.sms
    programs = members * -(-m // bm)
    turns = -(-programs // machine.sms)
    # Programs of 4 warps; what they keep leaves room for two of them beside each other.
    together = max(1, THREADS // 128)
    total = Cost()
    for layer in parts:
        tensor = turns * 2 * bm * layer.inputs * layer.outputs / (rate * machine.efficiency(bm))
        epilogue = turns * bm * layer.outputs * layer.instructions / (LANES * machine.clock)
        kept = bm * (layer.extra + layer.kept)
        l2 = _delivered(kept, layer.kept, members * m, machine, through_memory, min(programs, machine.sms), turns)
        total += _phase(tensor, l2, epilogue, NARROW_CYCLES / machine.clock * -(-turns // together))
    total += _phase(0.0, 0.0, turns * _embedding(net, bm, machine), 0.0)
    return total.times(evaluations) + _phase(0.0, 0.0, 0.0, machine.node)


def _ring(
    parts: Sequence[Layer],
    net: Network,
    m: int,
    evaluations: int,
    machine: Machine,
    members: int,
    through_memory: bool,
) -> Cost:
    ring = plan.ring(machine.arch, net)
    assert ring is not None  # else `why_not` had a reason
    size, rate, bm = net.element_size, machine.rate(net.precision) / machine.sms, ring.tiles.rows
    programs = members * -(-m // bm)
    busy, turns = min(programs, machine.sms), -(-programs // machine.sms)

    def epilogue(columns: int, instructions: int) -> float:
        return turns * bm * columns * instructions / (LANES * machine.clock)

    def phase(tensor: float, l2: float, epilogue: float, seconds: float, wait: float = 0.0) -> Cost:
        return Cost(tensor, l2, epilogue, wait, seconds + wait, seconds + wait)

    total = Cost()
    # A scalar's head is in the last layer's epilogue.
    for i, layer in enumerate(parts[:-1] if net.state_padded == 1 else parts):
        loads = size * layer.inputs * layer.outputs + bm * (layer.extra + layer.kept)
        l2 = _delivered(loads, layer.kept, members * m, machine, through_memory, busy, turns)
        tensor = turns * 2 * bm * layer.inputs * layer.outputs / rate
        hidden, products = 0 < i < net.layers, max(tensor, l2)
        behind = epilogue(layer.outputs, layer.instructions + (EPILOGUE_RING - EPILOGUE if i < net.layers else 0))
        # The first layer's products are too short to hide behind, and nothing hides the head.
        seconds = max(products, behind) if hidden else products + behind
        tiles = layer.outputs // ring.tiles.columns
        if i == 1 and tiles > 2:
            # All but a chunk of the first consumer's first tile goes on beside the first layer's last epilogues.
            seconds -= products / tiles * (tiles - 1) / tiles
        total += phase(tensor, l2, behind, seconds)
    # What is left when a step's last product is done, then the state and its features.
    tail = epilogue(ring.tiles.columns, EPILOGUE_RING) + turns * _embedding(net, bm, machine)
    total += phase(0.0, 0.0, 0.0, tail, 2 * machine.start * turns)
    return total.times(evaluations) + _phase(0.0, 0.0, 0.0, machine.node)


# What surrounds a launch --------------------------------------------------------------------------------------------


def around(launches: int, machine: Machine) -> float:
    """Seconds of so many small kernels in a CUDA graph, each too small to take longer than its launch."""
    return launches * machine.node


def prepared(net: Network, rows: int, evaluations: int, machine: Machine) -> float:
    """Seconds of the product in front of a kernel that takes every row's time features to FiLM, where there is one."""
    if net.time_embedding != "rows":
        return 0.0
    outputs = rows * evaluations * 2 * sum(net.padded)
    flops = 2 * outputs * net.time_features
    return max(flops / (machine.rate(net.precision) * LIBRARY_EFFICIENCY), outputs * net.element_size / machine.memory)


def weight_gradients(net: Network, rows: int, evaluations: int, machine: Machine) -> float:
    """Seconds of the products over all rows that make the gradients of the hidden layers' weights, without launches."""
    seconds = hidden_flops(net, rows, evaluations) / (machine.rate(net.precision) * LIBRARY_EFFICIENCY)
    # Inputs and gradients are read once per product.
    moved = 2 * rows * evaluations * sum(net.padded) * net.element_size
    return (
        max(seconds, moved / (machine.memory if moved > machine.l2_bytes else machine.l2)) + net.layers * machine.node
    )
