"""Ahead-of-time compilation of every kernel for every arch of the plan, without a GPU: registers, stack, shared
memory, opcodes.

    python -m fastflow.kernels.aot [--arch 90] [--kernel integrate_fwd] [--case floq] [--json]

prints the table. It needs triton for Linux, whose wheel carries the assembler and the disassembler.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator

from . import plan

# Networks the table is printed for: floq's critic, FQL's actor, the demo's critic, in the precisions of the operators.
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


def _chain(net: plan.Network, *hidden: int, **changes: object) -> plan.Network:
    """The network with other hidden layers, one behind the other."""
    inputs = tuple((i - 1,) if i else () for i in range(len(hidden)))
    return dataclasses.replace(net, hidden=hidden, inputs=inputs, add=(-1,) * len(hidden), **changes)


_IDENTITY = dict(state_embedding="identity", low=0.0, high=1.0, sigma=1.0)
ACTOR = dataclasses.replace(
    FLOQ, state_dim=5, state_features=5, cond_dim=37, norm="none", time_embedding="raw", **_IDENTITY
)
RESIDUAL = dataclasses.replace(
    _chain(FLOQ, *(512,) * 9), add=tuple(i - 4 if i and i % 4 == 0 else -1 for i in range(9))
)
UNET = dataclasses.replace(
    ACTOR,
    state_dim=4,
    state_features=4,
    cond_dim=6,
    hidden=(512,) * 6,
    inputs=((), (0,), (1,), (2,), (3, 1), (4, 0)),
    add=(-1,) * 6,
    activation="mish",
    norm="film",
    time_embedding="given",
    time_features=256,
)
FPO = _chain(
    ACTOR,
    *(32,) * 4,
    state_dim=6,
    state_features=6,
    cond_dim=17,
    activation="silu",
    output_scale=0.25,
    time_embedding="power_fourier",
    time_features=8,
)
CASES = {
    "floq": FLOQ,
    "floq-tf32": dataclasses.replace(FLOQ, precision="tf32"),
    "floq-fp32": dataclasses.replace(FLOQ, precision="fp32"),
    "floq-1024": _chain(FLOQ, *(1024,) * 4),
    "floq-256": _chain(FLOQ, *(256,) * 4),
    "floq-64": _chain(FLOQ, 64, 64),
    "floq-64-tf32": _chain(FLOQ, 64, 64, precision="tf32"),
    "floq-first": dataclasses.replace(FLOQ, norm="before"),
    "floq-residual": RESIDUAL,
    "actor": ACTOR,
    "actor-tf32": dataclasses.replace(ACTOR, precision="tf32"),
    "td-flow": UNET,
    "td-flow-tf32": dataclasses.replace(UNET, precision="tf32"),
    "td-flow-1024": dataclasses.replace(UNET, hidden=(1024,) * 6),
    "fpo": FPO,
    "fpo++": _chain(FPO, *(256,) * 3, state_dim=12, state_features=12, cond_dim=48, activation="elu"),
    "fpo++-track": _chain(FPO, 1024, 512, 256, state_dim=29, state_features=29, cond_dim=160, activation="elu"),
}
KERNELS = ("integrate_fwd", "matching_fwd-save", "backward-loss-weights", "backward-recompute-weights")
ARCHES = tuple(plan.SHARED_MEMORY)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes."""

    kernel: str
    case: str
    arch: int
    tiles: plan.Tiles
    registers: int
    stack: int  # bytes per thread: spills and local arrays
    shared: int  # bytes per program
    opcodes: dict[str, int]
    seconds: float

    @property
    def tensor_cores(self) -> int:
        """Matrix instructions in the binary, of any generation."""
        return sum(
            n for name, n in self.opcodes.items() if name in ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "OMMA", "QMMA")
        )

    def row(self) -> str:
        """One line of the table."""
        t = self.tiles
        ops = " ".join(f"{name}:{n}" for name, n in self.opcodes.items())
        return (
            f"{self.kernel:14s} {self.case:12s} sm_{self.arch:<4d} "
            f"{t.rows:3d}x{t.columns:<3d} w{t.num_warps:<2d} s{t.num_stages} "
            f"regs {self.registers:3d} stack {self.stack:5d} shared {self.shared:6d} {ops} ({self.seconds:.1f} s)"
        )


def entries(kernel: str, case: str, arch: int) -> tuple[plan.Tiles, ...]:
    """The plan's tiles for one kernel, network and arch."""
    net = CASES[case]
    return plan.candidates(kernel, arch, net)


def compile_kernel(kernel: str, case: str, arch: int, tiles: plan.Tiles) -> Resources:
    """Compile one kernel for one arch and read what it takes from the binary.

    Raises:
        RuntimeError: the compiler refuses; its log's last line is in the message.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, types, constants = arguments(kernel, CASES[case], tiles)
    signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    # What a launch knows of its arguments: every pointer is aligned to 16 bytes.
    aligned = [i for i, name in enumerate(function.arg_names) if signature[name].startswith("*")]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    start = time.perf_counter()
    log = io.StringIO()
    try:
        # On failure triton prints the whole assembly.
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            compiled = triton.compile(
                source,
                target=GPUTarget("cuda", arch, 32),
                options={"num_warps": tiles.num_warps, "num_stages": 3, "enable_fp_fusion": True},
            )
    except Exception as error:
        raise RuntimeError(f"{kernel} {case} sm_{arch} {tiles}: {type(error).__name__}: {str(error)[-300:]}") from error
    seconds = time.perf_counter() - start
    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        pathlib.Path(cubin).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tools, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tools, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{kernel} {case} sm_{arch}: cuobjdump printed no resource usage: {usage[:200]!r}")
    count = collections.Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_]+)", sass, re.M))
    shown = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "OMMA", "QMMA", "LDGSTS", "LDL", "STL", "MUFU", "FFMA")
    return Resources(
        kernel,
        case,
        arch,
        tiles,
        registers=int(found[1]),
        stack=int(found[2]),
        shared=compiled.metadata.shared,
        opcodes={name: count[name] for name in shown if count[name]},
        seconds=seconds,
    )


def arguments(kernel: str, net: plan.Network, tiles: plan.Tiles) -> tuple[object, dict[str, str], dict[str, object]]:
    """A kernel's function, the types of its run-time arguments and its constexpr values, as the launchers give them."""
    from .backward import backward_kernel
    from .integrate import integrate_fwd_kernel
    from .matching import matching_fwd_kernel
    from .pack import constants

    base, *flags = kernel.split("-")
    function = {
        "integrate_fwd": integrate_fwd_kernel,
        "matching_fwd": matching_fwd_kernel,
        "backward": backward_kernel,
    }[base]
    packed = "*bf16" if net.precision == "bf16" else "*fp32"
    types = {}
    for name in function.arg_names:
        if name in _STORED:
            types[name] = packed
        elif name.endswith("_ptr"):
            types[name] = "*i64" if name in ("seed_ptr", "ids_ptr") else "*fp32"
        else:
            types[name] = "fp32" if name in _FLOATS else "i32"
    per_row = base == "matching_fwd" or "loss" in flags or "rows" in flags
    method = next((m for m in ("midpoint", "heun") if m in flags), "euler")
    values = constants(net, shared_times=not per_row) | {
        "V": plan.evaluations(method),
        "METHOD": method,
        "INTERPOLATE": True,
        "DRAW": "draw" in flags,
        "DRAW_TIME": "draw" in flags,
        "LOSS": "loss" in flags,
        "PATH": "path" in flags,
        "NOISE": "noise" in flags,
        "KEEP": "keep" in flags or "save" in flags,
        "SAVE": "save" in flags,
        "RECOMPUTE": "recompute" in flags,
        "WEIGHTS": "weights" in flags,
        "DCOND": True,
        "BM": tiles.rows,
        "BN": tiles.columns,
        "STAGES": tiles.num_stages,
    }
    if values["ARITH"] == "emulate":
        values["ARITH"] = "fast"
    return function, types, {name: values[name] for name in function.arg_names if name in values}


_STORED = {
    "c_ptr",
    "feat_ptr",
    "film_ptr",
    "w_feat_ptr",
    "w_time_ptr",
    "w_film_ptr",
    "w_hidden_ptr",
    "pre_ptr",
    "y_ptr",
    "h_ptr",
    "dpre_ptr",
    "xhat_ptr",
    "dfilm_ptr",
    "state_ptr",
    "dtime_ptr",
}
_FLOATS = {"start", "end", "low", "high", "std", "eps", "output_scale", "keep_start"}


def table(
    kernels: tuple[str, ...] = KERNELS,
    cases: tuple[str, ...] = tuple(CASES),
    arches: tuple[int, ...] = ARCHES,
    jobs: int | None = None,
) -> Iterator[Resources | RuntimeError]:
    """Compile the plan's entries, several at a time; yields resources or the compiler's refusal in order."""
    work = [(k, c, a, t) for k in kernels for c in cases for a in arches for t in entries(k, c, a)]
    with concurrent.futures.ProcessPoolExecutor(jobs or os.cpu_count()) as pool:
        yield from pool.map(_try_compile, work)


def _try_compile(work: tuple[str, str, int, plan.Tiles]) -> Resources | RuntimeError:
    try:
        return compile_kernel(*work)
    except RuntimeError as error:
        return error


def main() -> int:
    """Print the table; exit code 1 if something does not compile or does not fit its arch."""
    parser = argparse.ArgumentParser(prog="python -m fastflow.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHES, choices=ARCHES)
    parser.add_argument("--kernel", nargs="*", default=KERNELS, choices=KERNELS)
    parser.add_argument("--case", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    args = parser.parse_args()
    import triton

    if not args.json:
        print(f"triton {triton.__version__}")
    good = True
    for found in table(tuple(args.kernel), tuple(args.case), tuple(args.arch), args.jobs):
        if isinstance(found, RuntimeError):
            good = False
            print(json.dumps({"error": str(found)}) if args.json else f"FAILED {found}", flush=True)
            continue
        fits = found.shared <= plan.SHARED_MEMORY[found.arch]
        good &= fits
        if args.json:
            print(json.dumps(dataclasses.asdict(found) | {"triton": triton.__version__}), flush=True)
        else:
            print(found.row() + ("" if fits else f"  DOES NOT FIT {plan.SHARED_MEMORY[found.arch]}"), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
