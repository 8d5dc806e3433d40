"""Ahead-of-time compilation of every kernel for every arch of the plan, without a GPU: registers, spills, shared
memory, opcodes.

    python -m fastflow.kernels.aot [--arch 90] [--kernel integrate_fwd] [--field floq]      prints the table
    python -m fastflow.kernels.aot --record docs/kernels.json --markdown docs/kernels.md    compiles what has changed
    python -m fastflow.kernels.aot --grid                                                   every entry of the plan

It needs triton for Linux, whose wheel carries the assembler and the disassembler; `--triton FOLDER ...` compiles with
other versions, each the target of a `pip install --target`.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from . import plan

# Fields --------------------------------------------------------------------------------------------------------------


def _chain(net: plan.Network, *hidden: int, **changes: Any) -> plan.Network:
    """The network with other hidden layers, one behind the other."""
    inputs = tuple((i - 1,) if i else () for i in range(len(hidden)))
    return dataclasses.replace(net, hidden=hidden, inputs=inputs, add=(-1,) * len(hidden), **changes)


def _residual(net: plan.Network, depth: int, **changes: Any) -> plan.Network:
    """The network as blocks of `depth` layers behind the first."""
    add = tuple(i - depth if i and i % depth == 0 else -1 for i in range(net.layers))
    return dataclasses.replace(net, add=add, **changes)


FLOQ = plan.Network(
    state_dim=1,
    cond_dim=42,
    hidden=(512,) * 4,
    inputs=((), (0,), (1,), (2,)),
    add=(-1,) * 4,
    activation="gelu_tanh",
    norm="after",
    eps=1e-6,
    state_embedding="hl_gauss",
    state_features=50,
    low=-101.0,
    high=1.0,
    sigma=16.0,
    time_embedding="cosine",
    time_features=1,
    prediction="velocity",
    output_scale=1.0,
    precision="bf16",
)
ACTOR = dataclasses.replace(
    FLOQ,
    **dict(state_dim=5, state_features=5, cond_dim=37, norm="none", time_embedding="raw"),
    **dict(state_embedding="identity", low=0.0, high=1.0, sigma=1.0),
)
UNET = dataclasses.replace(
    ACTOR,
    **dict(state_dim=4, state_features=4, cond_dim=6, activation="mish", norm="film"),
    **dict(hidden=(512,) * 6, inputs=((), (0,), (1,), (2,), (3, 1), (4, 0)), add=(-1,) * 6),
    **dict(time_embedding="rows", time_features=256),
)
FPO = _chain(
    ACTOR,
    *(32,) * 4,
    **dict(state_dim=6, state_features=6, cond_dim=17, activation="silu", output_scale=0.25),
    **dict(time_embedding="power_fourier", time_features=8),
)
FIELDS = {
    "floq": FLOQ,
    "floq-tf32": dataclasses.replace(FLOQ, precision="tf32"),
    "floq-fp32": dataclasses.replace(FLOQ, precision="fp32"),
    "floq-2-layers": _chain(FLOQ, 512, 512),
    "floq-1024": _chain(FLOQ, *(1024,) * 4),
    "floq-1024-tf32": _chain(FLOQ, *(1024,) * 4, precision="tf32"),
    "floq-256": _chain(FLOQ, *(256,) * 4),
    "floq-64-tf32": _chain(FLOQ, 64, 64, precision="tf32"),
    "floq-resnet": _residual(_chain(FLOQ, *(512,) * 5), 2),
    "floq-resnet-norm-first": _residual(_chain(FLOQ, *(512,) * 5), 4, norm="before"),
    "fql-actor": ACTOR,
    "fql-actor-tf32": dataclasses.replace(ACTOR, precision="tf32"),
    "fql-one-step": dataclasses.replace(ACTOR, cond_dim=42, state_features=0, time_features=0),
    "floq-distilled": dataclasses.replace(
        FLOQ, cond_dim=42, state_embedding="identity", state_features=0, time_embedding="raw", time_features=0
    ),
    "td-flow": UNET,
    "td-flow-tf32": dataclasses.replace(UNET, precision="tf32"),
    "td-flow-1024": dataclasses.replace(UNET, hidden=(1024,) * 6),
    "td-flow-many-rows": dataclasses.replace(UNET, time_embedding="given"),
    "fpo": FPO,
    "fpo++": _chain(FPO, *(256,) * 3, state_dim=12, state_features=12, cond_dim=48, activation="elu"),
    "fpo++-tracking": _chain(FPO, 1024, 512, 256, state_dim=29, state_features=29, cond_dim=160, activation="elu"),
    "2048-1536-1024": _chain(FPO, 2048, 1536, 1024, state_dim=29, state_features=29, cond_dim=160, activation="elu"),
}
ARCHES = tuple(plan.SHARED_MEMORY)

# A kernel's flavours: its name, then what the launcher asks of it.
WALKS = {
    "integrate_fwd": "walk: Euler, shared times",
    "integrate_fwd-midpoint-rows": "walk: midpoint, times per row",
    "integrate_fwd-keep-save": "walk, activations stored",
    "integrate_fwd-noise": "walk, noise behind each step",
}
GROUPS = {
    "walk_group": "walk by groups that meet",
    "walk_group-layer": "walk by groups, a launch per layer",
}
RINGS = {"walk_ring": "walk, activations in shared memory (FASTFLOW_RING=1)"}
LOSSES = {
    "matching_fwd": "loss",
    "matching_fwd-keep-save": "loss, activations stored",
    "matching_fwd-draw-keep-save": "loss that draws its noise, stored",
}
BACKWARD = {
    "backward-loss-weights": "back from a loss, stored",
    "backward-loss-recompute-weights": "back from a loss, computed again",
    "backward-loss": "back from a loss, stored, without weights",
    "backward-weights": "back from a walk, stored",
    "backward-recompute-weights": "back from a walk, computed again",
    "backward-recompute": "back from a walk, computed again, without weights",
    "backward-recompute-weights-midpoint-rows": "back from a walk: midpoint, times per row, computed again",
}
KERNELS = WALKS | GROUPS | RINGS | LOSSES | BACKWARD
_BASE = ("integrate_fwd", "matching_fwd-keep-save", "backward-loss-weights")
# What each field's agent runs beyond or instead of the base.
_USED = {
    "floq": tuple(KERNELS),
    "floq-resnet": (*_BASE, "integrate_fwd-keep-save", "backward-weights", "backward-recompute-weights"),
    **dict.fromkeys(
        ("fql-one-step", "floq-distilled"),
        ("integrate_fwd", "integrate_fwd-keep-save", "backward-weights", "walk_group", "walk_ring"),
    ),
    "td-flow": (
        *("integrate_fwd", "integrate_fwd-midpoint-rows", "matching_fwd-keep-save"),
        *("backward-loss-weights", "backward-recompute-weights", "backward-recompute-weights-midpoint-rows"),
    ),
    "td-flow-many-rows": (
        *("integrate_fwd-midpoint-rows", "matching_fwd-keep-save", "backward-loss-weights"),
        "backward-recompute-weights-midpoint-rows",
    ),
    "fpo": (*_BASE, "integrate_fwd-noise", "matching_fwd-draw-keep-save"),
    "fpo++": (*_BASE, "integrate_fwd-noise", "matching_fwd-draw-keep-save", "walk_group", "walk_ring"),
    "fql-actor": (*_BASE, "walk_group", "walk_ring"),
    "floq-2-layers": (*_BASE, "walk_group", "walk_ring"),
    "floq-256": (*_BASE, "walk_group", "walk_ring"),
}


class Work(NamedTuple):
    """One row of the table: a field, a kernel's flavour, an arch and the tiles."""

    field: str
    kernel: str
    arch: int
    tiles: plan.Tiles


def entries(kernel: str, field: str, arch: int) -> tuple[plan.Tiles, ...]:
    """The plan's tiles for one kernel, field and arch."""
    if kernel in GROUPS:
        return plan.group_tiles(arch, FIELDS[field])
    if kernel in RINGS:
        ring = plan.ring(arch, FIELDS[field])
        return (ring.tiles,) if ring else ()
    return plan.candidates(kernel.partition("-")[0], arch, FIELDS[field])


def why_not(field: str, arch: int) -> str | None:
    """What keeps a field from running fused on an arch, or None."""
    return plan.why_unsupported_on(FIELDS[field], arch)


def matrix(
    kernels: Sequence[str] | None = None, fields: Sequence[str] = tuple(FIELDS), arches: Sequence[int] = ARCHES
) -> list[Work]:
    """The table's rows: of each field the kernels its agent runs, with the most rows per program; of floq's base
    kernels every entry of the plan. Named kernels are compiled for every field asked for."""
    found = []
    for field, arch in itertools.product(fields, arches):
        if why_not(field, arch) is None:
            for kernel in kernels or _USED.get(field, _BASE):
                tiles = entries(kernel, field, arch)
                found += [
                    Work(field, kernel, arch, t)
                    for t in tiles[: None if field == "floq" and kernel in (*_BASE, "walk_group") else 1]
                ]
    return found


# Every entry of the plan ---------------------------------------------------------------------------------------------

_GRID_FIELDS = {"fold": FLOQ, "norm": _residual(_chain(FLOQ, *(512,) * 5), 2, norm="before"), "film": UNET}
_GRID_KERNELS = {
    "integrate_fwd": ("integrate_fwd-midpoint-rows-noise",),
    "matching_fwd": ("matching_fwd-keep-save",),
    "backward": ("backward-loss-weights", "backward-recompute-weights"),
}


def grid(arches: Sequence[int] = ARCHES, precisions: Sequence[str] = ("bf16", "tf32", "fp32")) -> list[Work]:
    """Every entry of the plan with the kernels that take most; the fields are added to FIELDS.

    "-wide" fields have as many state and time features and dimensions as their entry may meet, for shared memory.
    """
    found = []
    for kind, width, precision in itertools.product(_GRID_FIELDS, plan.WIDTHS, precisions):
        base = _GRID_FIELDS[kind]
        net = dataclasses.replace(base, hidden=(width,) * base.layers, precision=precision)
        features = min(width if kind == "film" else width // 2, plan.MAX_FEATURES)
        wide = dataclasses.replace(
            net,
            **dict(state_embedding="identity", state_dim=min(features, plan.MAX_STATE_DIM)),
            **dict(state_features=min(features, plan.MAX_STATE_DIM), time_features=features),
            time_embedding="given",
        )
        for name, some in ((f"{kind}-{width}-{precision}", net), (f"{kind}-{width}-{precision}-wide", wide)):
            FIELDS[name] = some
            for arch, kernel in itertools.product(arches, _GRID_KERNELS):
                for tiles, flavour in itertools.product(plan.candidates(kernel, arch, some), _GRID_KERNELS[kernel]):
                    if why_not(name, arch) is None:
                        found.append(Work(name, flavour, arch, tiles))
    return found


# Compilation ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes."""

    registers: int
    stack: int  # bytes per thread: spills and local arrays
    loop_spills: int  # accesses to them in innermost loops; elsewhere they cost next to nothing
    shared: int  # bytes per program
    opcodes: dict[str, int]

    @property
    def matrix_instructions(self) -> int:
        """In the binary, of any generation and vendor."""
        return sum(n for name, n in self.opcodes.items() if name in _MATRIX or name.startswith("v_mfma"))


_MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "OMMA", "QMMA")
_SHOWN = (*_MATRIX, "LDGSTS", "UTMALDG", "LDL", "STL", "MUFU", "FFMA")


def lower(kernel: str, net: plan.Network, arch: int, tiles: plan.Tiles) -> Any:
    """The compiled kernel; triton's object, whose `asm` holds every stage.

    Raises:
        RuntimeError: the compiler refuses; its log's last line is in the message.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source_of = ASTSource
    if kernel in RINGS:
        from triton.experimental.gluon._runtime import GluonASTSource as source_of

    function, types, constants = arguments(kernel, net, arch, tiles)
    signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    # What a launch knows of its arguments: every pointer is aligned to 16 bytes.
    aligned = [i for i, name in enumerate(function.arg_names) if signature[name].startswith("*")]
    source = source_of(
        fn=function,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    target = GPUTarget("hip", "gfx942", 64) if arch == plan.GFX942 else GPUTarget("cuda", arch, 32)
    try:
        # On failure triton prints the whole assembly.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            options = {"num_warps": tiles.num_warps, "enable_fp_fusion": True}
            return triton.compile(source, target=target, options=options)
    except Exception as error:
        raise RuntimeError(
            f"{kernel} {plan.name_of(arch)} {tiles}: {type(error).__name__}: {str(error)[-300:]}"
        ) from error


def resources(compiled: Any, arch: int) -> Resources:
    """What a compiled kernel takes, read from the binary."""
    return (_of_amdgcn if arch == plan.GFX942 else _of_cubin)(compiled)


def _cuobjdump(compiled: Any, option: str) -> str:
    import triton

    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        pathlib.Path(cubin).write_bytes(compiled.asm["cubin"])
        return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def disassembled(compiled: Any) -> list[tuple[int, str, str]]:
    """(address, instruction, operands) of a kernel compiled for NVIDIA, in order."""
    pattern = r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_]+)([^;]*);"
    return [(int(at, 16), name, rest) for at, name, rest in re.findall(pattern, _cuobjdump(compiled, "-sass"), re.M)]


def loops_of(code: Sequence[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """(first, last) address of every loop."""
    jumps = [(at, re.search(r"0x([0-9a-f]+)", rest)) for at, name, rest in code if name == "BRA"]
    return [(int(to[1], 16), at) for at, to in jumps if to is not None and int(to[1], 16) < at]


def _of_cubin(compiled: Any) -> Resources:
    usage, code = _cuobjdump(compiled, "-res-usage"), disassembled(compiled)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    count = collections.Counter(name for _, name, _ in code)
    return Resources(
        registers=int(found[1]),
        stack=int(found[2]),
        loop_spills=_within_innermost(loops_of(code), [at for at, name, _ in code if name in ("LDL", "STL")]),
        shared=compiled.metadata.shared,
        opcodes={name: count[name] for name in _SHOWN if count[name]},
    )


def _of_amdgcn(compiled: Any) -> Resources:
    lines = compiled.asm["amdgcn"].splitlines()
    labels = {line.partition(":")[0]: i for i, line in enumerate(lines) if re.match(r"\.LBB\w+:", line)}
    jumps = [(i, re.match(r"\s+s_c?branch\w*\s+(\.LBB\w+)", line)) for i, line in enumerate(lines)]
    loops = [(labels[to[1]], i) for i, to in jumps if to is not None and labels[to[1]] < i]
    spills = [i for i, line in enumerate(lines) if re.match(r"\s+scratch_(load|store)", line)]
    names = [match[1] for match in map(re.compile(r"\s+([a-z]\w+)").match, lines) if match is not None]
    count = collections.Counter(name for name in names if name.startswith("v_mfma"))

    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", compiled.asm["amdgcn"])
        return int(found[1]) if found else 0

    return Resources(
        registers=metadata("vgpr_count"),
        stack=metadata("private_segment_fixed_size"),
        loop_spills=_within_innermost(loops, spills),
        shared=max(compiled.metadata.shared, metadata("group_segment_fixed_size")),
        opcodes=dict(sorted(count.items())),
    )


def innermost(loops: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those loops (first, last) that hold no other loop."""
    loops = set(loops)
    return [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]


def _within_innermost(loops: Iterable[tuple[int, int]], places: Iterable[int]) -> int:
    """How many places lie in innermost loops."""
    inner = innermost(loops)
    return sum(any(a <= place <= b for a, b in inner) for place in places)


def arguments(
    kernel: str, net: plan.Network, arch: int, tiles: plan.Tiles
) -> tuple[Any, dict[str, str], dict[str, object]]:
    """A kernel's function, the types of its run-time arguments and its constexpr values, as the launchers give them."""
    from .backward import backward_kernel
    from .group import walk_group_kernel
    from .integrate import integrate_fwd_kernel
    from .matching import matching_fwd_kernel
    from .pack import net_shape

    if kernel in RINGS:
        return _ring_arguments(net, arch, tiles)
    base, *flags = kernel.split("-")
    function = {
        "integrate_fwd": integrate_fwd_kernel,
        "matching_fwd": matching_fwd_kernel,
        "backward": backward_kernel,
        "walk_group": walk_group_kernel,
    }[base]
    packed = "*bf16" if net.precision == "bf16" else "*fp32"
    per_row = base == "matching_fwd" or "loss" in flags or "rows" in flags
    if net.time_embedding == "rows" and not per_row:
        net = dataclasses.replace(net, time_embedding="given")
    types = {}
    for name in function.arg_names:
        if name in _STORED or (name == "film_time_ptr" and net.time_embedding == "rows"):
            types[name] = packed
        elif name.endswith("_ptr"):
            types[name] = _POINTERS.get(name, "*fp32")
        else:
            types[name] = "i32" if name in _INTEGERS or "_stride_" in name else "fp32"
    method = next((m for m in ("midpoint", "heun") if m in flags), "euler")
    arithmetic = "fast" if net.precision == "bf16" and arch != plan.GFX942 else "exact"
    values = {
        "NET": net_shape(net, not per_row, tiles)._replace(ARITH=arithmetic),
        "V": plan.evaluations(method),
        "METHOD": method,
        "INTERPOLATE": True,
        "DRAW": "draw" in flags,
        "DRAW_TIME": "draw" in flags,
        "LOSS": "loss" in flags,
        "PATH": "path" in flags,
        "NOISE": "noise" in flags,
        "KEEP": "keep" in flags,
        "SAVE": "save" in flags,
        "NARROW": plan.narrow(net),
        "RECOMPUTE": "recompute" in flags,
        "WEIGHTS": "weights" in flags,
        "DCOND": True,
        "LAYER": 1 if "layer" in flags else -1,
        "G": net.padded[0] // tiles.columns,
    }
    return function, types, {name: values[name] for name in function.arg_names if name in values}


def _ring_arguments(net: plan.Network, arch: int, tiles: plan.Tiles) -> tuple[Any, dict[str, str], dict[str, object]]:
    from .pack import net_shape
    from .ring import tile_layout, walk_ring_kernel

    ring = plan.ring(arch, net)
    assert ring is not None  # as `entries` has asked
    weights = f"tensordesc<bf16[{plan.RING_TILE}, {tiles.columns}],{tile_layout(tiles)!r}>"
    types = {"c_ptr": "*bf16", "first": weights, "hidden": weights}
    types |= dict.fromkeys(("M", "samples", "num_steps"), "i32")
    for name in walk_ring_kernel.arg_names:
        types.setdefault(name, "*fp32" if name.endswith("_ptr") else "fp32")
    values = {"NET": net_shape(net, True, tiles)._replace(ARITH="fast"), "PLACES": ring.places}
    return walk_ring_kernel, types, values


_STORED = {
    *("c_ptr", "feat_ptr", "film_ptr", "w_feat_ptr", "w_time_ptr", "w_film_ptr", "w_hidden_ptr", "pre_ptr", "y_ptr"),
    *("h_ptr", "dpre_ptr", "xhat_ptr", "dfilm_ptr", "state_ptr", "dtime_ptr"),
}
_POINTERS = {"seed_ptr": "*i64", "ids_ptr": "*i64", "count_ptr": "*i32"}
_INTEGERS = {
    *("M", "MP", "R", "R_P", "R_D", "samples", "num_steps", "first_step", "steps", "evaluations", "i_low", "count")
}


# What a row depends on -----------------------------------------------------------------------------------------------


def fingerprint(work: Work) -> str:
    """Of all that decides a row's binary but the compiler: code of the device functions, arguments, tiles.

    Comments, docstrings and launchers do not count.
    """
    net = FIELDS[work.field]
    function, types, constants = arguments(work.kernel, net, work.arch, work.tiles)
    module = function.fn.__module__
    parts = [code_of(module, function.fn.__name__), types, constants, work.tiles.num_warps, work.arch]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def code_of(module: str, name: str) -> str:
    """A digest of a device function and of those it calls."""
    seen: set[tuple[str, str]] = set()
    queue, parts = [(module, name)], []
    while queue:
        where = queue.pop(0)
        if where in seen:
            continue
        seen.add(where)
        functions, imports = device_functions(
            pathlib.Path(importlib.import_module(where[0]).__file__ or "").read_text("utf-8")
        )
        tokens = functions[where[1]]
        parts.append(" ".join(tokens))
        for token in sorted(set(tokens)):
            if token in functions:
                queue.append((where[0], token))
            elif token in imports:
                source = f"{where[0].rpartition('.')[0]}.{imports[token]}"
                path = pathlib.Path(importlib.import_module(source).__file__ or "")
                if token in device_functions(path.read_text("utf-8"))[0]:
                    queue.append((source, token))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


_DECORATORS = ("triton.jit", "gluon.jit", "gluon.constexpr_function")


@functools.cache
def device_functions(text: str) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """(tokens of every triton function without comments and docstrings, module of every name imported from beside)."""
    tree = ast.parse(text)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    imports = {
        alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        for alias in node.names
    }
    functions = {}
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or not any(
            name in ast.unparse(d) for d in node.decorator_list for name in _DECORATORS
        ):
            continue
        first, last = node.decorator_list[0].lineno, node.end_lineno or 0
        text_at = node.body[0].lineno if ast.get_docstring(node, clean=False) is not None else None
        kept = []
        for token in tokens:
            if first <= token.start[0] <= last and token.type not in (tokenize.COMMENT, tokenize.NL):
                if token.type == tokenize.STRING and token.start[0] == text_at:
                    continue
                kept.append(token.string if token.string.strip() else tokenize.tok_name[token.type])
        functions[node.name] = tuple(kept)
    return functions, imports


# Many at a time ------------------------------------------------------------------------------------------------------


def compile_all(
    work: Sequence[Work], triton: str | None = None, jobs: int | None = None
) -> Iterator[tuple[Work, str, Resources | str, float]]:
    """(row, triton's version, what it takes or the compiler's refusal, seconds), several at a time, in any order.

    `triton`: the folder of another triton. Compiles in processes of its own, without the interpreter.
    """
    if not work:
        return
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if triton is not None:
        env["PYTHONPATH"] = os.pathsep.join(
            [str(pathlib.Path(triton).resolve()), *filter(None, [env.get("PYTHONPATH")])]
        )
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--serve", "--jobs", str(jobs or 0)]
    names = {w.field: dataclasses.asdict(FIELDS[w.field]) for w in work}
    asked = json.dumps({"fields": names, "work": [[*w[:3], dataclasses.astuple(w.tiles)] for w in work]})
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdin is not None and process.stdout is not None
    feeder = threading.Thread(target=lambda: (process.stdin.write(asked), process.stdin.close()))
    feeder.start()
    try:
        for line in process.stdout:
            i, version, found, seconds = json.loads(line)
            yield work[i], version, found if isinstance(found, str) else Resources(**found), seconds
        if process.wait():
            raise RuntimeError(f"compiling ended with exit code {process.returncode}")
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
        feeder.join()


def _serve(jobs: int) -> None:
    """The other end of `compile_all`: rows on stdin, results on stdout."""
    asked = json.loads(sys.stdin.read())
    for name, sizes in asked["fields"].items():
        FIELDS[name] = plan.Network(**{k: _tuples(v) for k, v in sizes.items()})
    work = [
        (i, Work(field, kernel, arch, plan.Tiles(*tiles)))
        for i, (field, kernel, arch, tiles) in enumerate(asked["work"])
    ]
    import triton

    # The compiler may write to stdout.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    jobs = min(jobs or os.cpu_count() or 1, len(work))
    context = multiprocessing.get_context("fork")
    with context.Pool(jobs) if jobs > 1 else contextlib.nullcontext() as pool:
        for i, found, seconds in (pool.imap_unordered if pool else map)(_compile, work):  # type: ignore[operator]
            try:
                print(json.dumps([i, triton.__version__, found, seconds]), file=out, flush=True)
            except BrokenPipeError:  # nobody reads on
                return


def _compile(numbered: tuple[int, Work]) -> tuple[int, dict[str, Any] | str, float]:
    i, work = numbered
    start = time.perf_counter()
    try:
        compiled = lower(work.kernel, FIELDS[work.field], work.arch, work.tiles)
        found: dict[str, Any] | str = dataclasses.asdict(resources(compiled, work.arch))
    except RuntimeError as error:
        found = str(error)
    return i, found, round(time.perf_counter() - start, 1)


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


def fits(work: Work, found: Resources) -> str | None:
    """What a row takes beyond its bounds, or None."""
    net, bound = FIELDS[work.field], plan.SHARED_MEMORY[work.arch]
    if found.shared > bound:
        return f"{found.shared} bytes of shared memory, {bound} there"
    allowed = plan.spill_bytes(work.kernel.partition("-")[0], work.arch, net)
    if found.stack > allowed:
        return f"{found.stack} bytes of stack, {allowed} allowed"
    if net.precision != "fp32" and not found.matrix_instructions:
        return "no matrix instructions"
    return None


# The record ----------------------------------------------------------------------------------------------------------

COMMAND = "python -m fastflow.kernels.aot --record docs/kernels.json --markdown docs/kernels.md"
BEGIN, END = "<!-- the table: written by fastflow.kernels.aot -->", "<!-- end of the table -->"


@dataclasses.dataclass
class Row:
    """A row of the record: fused with `tiles`, or falling back for `reason`."""

    field: str
    kernel: str
    arch: int
    tiles: plan.Tiles | None
    source: str
    reason: str
    results: dict[str, Resources]  # by triton's version

    @property
    def key(self) -> tuple[Any, ...]:
        return self.field, self.kernel, self.arch, self.tiles, self.source, self.reason

    def most(self) -> Resources:
        """The most that any of the compilers needs."""
        found = list(self.results.values())
        worst = max(found, key=lambda r: (r.loop_spills, r.stack, r.registers))
        return dataclasses.replace(worst, shared=max(r.shared for r in found))


def expected() -> list[Row]:
    """The rows that the record should have, without results."""
    rows = [Row(w.field, w.kernel, w.arch, w.tiles, fingerprint(w), "", {}) for w in matrix()]
    for field, arch in itertools.product(FIELDS, ARCHES):
        reason = why_not(field, arch)
        if reason is not None:
            rows.append(Row(field, "", arch, None, "", reason, {}))
    order = {name: i for i, name in enumerate(FIELDS)}, {name: i for i, name in enumerate(KERNELS)}
    return sorted(
        rows,
        key=lambda r: (
            order[0][r.field],
            order[1].get(r.kernel, -1),
            ARCHES.index(r.arch),
            -(r.tiles.rows if r.tiles else 0),
        ),
    )


def load(path: pathlib.Path) -> list[Row]:
    """The rows of a record; none where there is no such file."""
    rows = []
    for row in json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []:
        row["arch"] = next(a for a in ARCHES if plan.name_of(a) == row["arch"])
        row["tiles"] = plan.Tiles(*row["tiles"]) if row["tiles"] else None
        row["results"] = {version: Resources(**found) for version, found in row["results"].items()}
        rows.append(Row(**row))
    return rows


def save(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Write a record, one row per line, at once or not at all."""
    lines = []
    for row in rows:
        values = dataclasses.asdict(row) | {"arch": plan.name_of(row.arch)}
        values["tiles"] = dataclasses.astuple(row.tiles) if row.tiles else None
        lines.append("  " + json.dumps(values))
    _write(path, '{"command": ' + json.dumps(COMMAND) + ', "rows": [\n' + ",\n".join(lines) + "\n]}\n")


def _write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def stale(path: pathlib.Path) -> list[str]:
    """What a record lacks or says of other code or tiles, one line each."""
    recorded = {(r.field, r.kernel, r.arch, r.tiles, r.reason): r for r in load(path)}
    found = []
    for row in expected():
        where = f"{row.field}, {row.kernel or 'every kernel'}, {plan.name_of(row.arch)}"
        there = recorded.pop((row.field, row.kernel, row.arch, row.tiles, row.reason), None)
        if there is None:
            found.append(f"{where}: not in the record with {row.tiles or row.reason}")
        elif there.source != row.source:
            found.append(f"{where}: the kernel has changed")
        elif row.tiles is not None and not there.results:
            found.append(f"{where}: not compiled")
    return found + [
        f"{r.field}, {r.kernel}, {plan.name_of(r.arch)}: {r.tiles or r.reason} is no longer planned"
        for r in recorded.values()
    ]


def record(
    path: pathlib.Path, tritons: Sequence[str | None], jobs: int | None, say: Callable[[str], None] = print
) -> bool:
    """Bring a record up to date: compile what it lacks, keep the rest. An interrupted call is taken up by the next.

    Returns whether every row is within its bounds.
    """
    before = {row.key: row for row in load(path)}
    rows = expected()
    for row in rows:
        if row.key in before:
            row.results = before[row.key].results
    fused = {Work(r.field, r.kernel, r.arch, r.tiles): r for r in rows if r.tiles is not None}
    wanted = set()
    for triton in tritons:
        version = _version(triton)
        wanted.add(version)
        todo = [work for work, row in fused.items() if version not in row.results]
        say(f"triton {version}: {len(todo)} of {len(fused)} rows to compile")
        good = True
        for i, (work, version, found, _) in enumerate(compile_all(todo, triton, jobs)):
            if isinstance(found, str):
                say(f"FAILED {found}")
                good = False
                continue
            fused[work].results[version] = found
            if i % 20 == 19:
                save(path, rows)
        if not good:
            save(path, rows)
            return False
    for row in rows:
        row.results = {version: row.results[version] for version in sorted(wanted & set(row.results))}
    save(path, rows)
    beyond = [(w, why) for w, r in fused.items() for x in r.results.values() for why in [fits(w, x)] if why]
    for work, why in beyond:
        say(f"BEYOND ITS BOUNDS {_row(work)}: {why}")
    return not beyond


def _version(triton: str | None) -> str:
    env = os.environ | ({} if triton is None else {"PYTHONPATH": str(pathlib.Path(triton).resolve())})
    command = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()


def markdown(rows: Sequence[Row]) -> str:
    """The record as tables: an overview, then every row."""
    versions = sorted({version for row in rows for version in row.results})
    out = [
        f"Compiled by triton {' and '.join(versions)}; where they differ the row is that of the one that needs more.",
        "",
    ]
    reasons: list[str] = []
    out += ["| field | " + " | ".join(map(plan.name_of, ARCHES)) + " |", "|---" * (len(ARCHES) + 1) + "|"]
    for field in FIELDS:
        cells = []
        for arch in ARCHES:
            mine = [row for row in rows if row.field == field and row.arch == arch]
            why = next((row.reason for row in mine if row.reason), "")
            if why and why not in reasons:
                reasons.append(why)
            cells.append(f"falls back [{reasons.index(why) + 1}]" if why else "fused" if mine else "")
        out.append(f"| {field} | " + " | ".join(cells) + " |")
    out += ["", "Falls back:", "", *(f"{i + 1}. {why}" for i, why in enumerate(reasons)), ""] if reasons else [""]
    head = ["kernel", "GPU", "tile", "registers", "stack", "in loops", "shared memory", "instructions"]
    for field in FIELDS:
        mine = [row for row in rows if row.field == field and row.tiles is not None]
        if not mine:
            continue
        out += [
            f"### {field}",
            "",
            describe(FIELDS[field]),
            "",
            "| " + " | ".join(head) + " |",
            "|---" * len(head) + "|",
        ]
        for row in mine:
            assert row.tiles is not None
            t, r = row.tiles, row.most()
            ops = " ".join(
                f"{name.removeprefix('v_')} {n}"
                for name, n in r.opcodes.items()
                if name in _MATRIX or name in ("LDGSTS", "UTMALDG") or name.startswith("v_")
            )
            cells = [
                KERNELS[row.kernel],
                plan.name_of(row.arch),
                f"{t.rows}x{t.columns}, {t.num_warps} warps, {t.num_stages} stages",
            ]
            cells += [f"{x:,}" for x in (r.registers, r.stack, r.loop_spills, r.shared)]
            out.append("| " + " | ".join([*cells, ops or f"FFMA {r.opcodes.get('FFMA', 0)}"]) + " |")
        out.append("")
    return "\n".join(out)


def describe(net: plan.Network) -> str:
    """A network in a line."""
    widths = "-".join(map(str, net.hidden)) if len(set(net.hidden)) > 1 else f"{net.layers} x {net.hidden[0]}"
    kind = {
        "none": "no norm",
        "after": "LayerNorm behind the activation",
        "before": "LayerNorm before the activation",
        "film": "U-Net with FiLM",
    }
    if net.norm == "film":
        behind = "by row in front of the kernel" if net.time_embedding == "rows" else "within it"
        kind["film"] += f", time's share of it {behind}"
    if not net.state_features:
        kind[net.norm] += ", a plain network"
    residual = f", residual blocks of {net.residual}" if max(net.add) >= 0 else ""
    return (
        f"{net.state_dim} dimension{'s' * (net.state_dim > 1)}, hidden {widths}{residual}, {net.activation}, "
        f"{kind[net.norm]}, {net.precision} products."
    )


def write_markdown(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Put the tables between the markers of a page."""
    text = path.read_text("utf-8") if path.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    _write(path, f"{before}{BEGIN}\n\n{markdown(rows).rstrip()}\n\n{END}{after}")


# Command line --------------------------------------------------------------------------------------------------------


def _row(work: Work) -> str:
    t = work.tiles
    return (
        f"{work.kernel:28s} {work.field:22s} {plan.name_of(work.arch):6s} "
        f"{t.rows:3d}x{t.columns:<3d} w{t.num_warps:<2d} s{t.num_stages}"
    )


def main() -> int:
    """Print or record the table; exit code 1 if something does not compile or is beyond its bounds."""
    parser = argparse.ArgumentParser(prog="python -m fastflow.kernels.aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="*", default=[plan.name_of(a) for a in ARCHES], help="90, sm_90, gfx942 ...")
    parser.add_argument("--kernel", nargs="*", help="; ".join(f"{name} ({what})" for name, what in KERNELS.items()))
    parser.add_argument("--field", nargs="*", default=list(FIELDS), choices=list(FIELDS))
    parser.add_argument("--grid", action="store_true", help="every entry of the plan instead of agents' fields")
    parser.add_argument("--precision", nargs="*", default=["bf16", "tf32", "fp32"], help="of the grid")
    parser.add_argument("--triton", nargs="*", help="folders of other tritons to compile with")
    parser.add_argument("--jobs", type=int, help="processes (default: one per core)")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--record", type=pathlib.Path, metavar="FILE", help="bring this record up to date")
    parser.add_argument(
        "--markdown", type=pathlib.Path, metavar="FILE", help="write the record's tables into this page"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        _serve(args.jobs)
        return 0
    tritons = args.triton or [None]
    if args.record is not None:
        good = record(args.record, tritons, args.jobs)
        if args.markdown is not None:
            write_markdown(args.markdown, load(args.record))
        return 0 if good else 1
    arches = [a for a in ARCHES if {plan.name_of(a), str(a)} & set(args.arch)]
    work = grid(arches, args.precision) if args.grid else matrix(args.kernel, args.field, arches)
    good = True
    for triton in tritons:
        for row, version, found, seconds in compile_all(work, triton, args.jobs):
            why = found if isinstance(found, str) else fits(row, found)
            good &= why is None
            if args.json:
                values = {"triton": version, **row._asdict(), "tiles": dataclasses.asdict(row.tiles), "why": why}
                values |= {"error": found} if isinstance(found, str) else dataclasses.asdict(found)
                print(json.dumps(values), flush=True)
                continue
            taken = f"FAILED {found}"
            if not isinstance(found, str):
                opcodes = " ".join(f"{name}:{n}" for name, n in found.opcodes.items())
                taken = (
                    f"regs {found.registers:3d} stack {found.stack:5d} in loops {found.loop_spills:3d} "
                    f"shared {found.shared:6d} {opcodes}"
                )
            print(f"{version} {_row(row)} {taken} ({seconds} s){f'  BEYOND: {why}' if why else ''}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
