"""The operators on the CPU: C++ that is compiled on first use for the machine it runs on, and called here.

One source serves every network: it reads a network's description at run time. It is built with the system's C++
compiler (the environment variable CXX, else g++, clang++ or c++) into a cache under the user's cache directory, by
content: another source, compiler or processor is another file. Needs torch alone, and no compiler to be imported.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..plan import Network

OPERATORS = (
    *("walk", "walk_bwd", "loss", "loss_bwd", "matching", "policy"),
    *("stack", "stack_bwd", "regression", "climb", "backup"),
)
SOURCES = ("operators.cpp", "network.h", "product.h", "amx.h", "vector.h")
# In the order of the enumerations in vector.h and network.h.
ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "relu", "elu", "mish", "tanh")
NORMS = ("none", "after", "before", "film")
EMBEDDINGS = ("identity", "scaled", "hl_gauss")
PREDICTIONS = ("velocity", "endpoint", "noise")
ONE_THREAD = 8_000_000  # multiplications up to which a call stays on one thread: twice WORTH in operators.cpp
COLS = 32  # columns that widths are padded to with AVX-512; narrower machines pad to fewer


class Description(NamedTuple):
    """A network as the native code reads it, and which of the two libraries runs it."""

    bf16: bool
    ints: bytes
    reals: bytes


NO_NETWORK = Description(False, b"", b"")


class Unavailable(RuntimeError):
    """Why there is no native code in this process."""


# Building -----------------------------------------------------------------------------------------------------------


def cache_directory() -> Path:
    """Where compiled code is kept: fastflow/ in the user's cache directory."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "fastflow"


def find_compiler() -> list[str]:
    """The C++ compiler's command.

    Raises:
        Unavailable: there is none.
    """
    given = shlex.split(os.environ.get("CXX", ""))
    for candidate in [given] if given else [["g++"], ["clang++"], ["c++"]]:
        path = shutil.which(candidate[0])
        if path:
            return [path, *candidate[1:]]
    raise Unavailable(f"no C++ compiler ({given[0] if given else 'g++, clang++ or c++'} not found)")


def _flags() -> list[str]:
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    # No -ffast-math: sums keep their order. GCC takes intrinsics' deliberately undefined values for mistakes.
    return ["-O2", native, "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-w"]


@functools.cache
def processor() -> str:
    """The processor's name and what it can do, as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} could not be run: {error}") from error
    if done.returncode:
        raise Unavailable(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def build(bf16: bool = False) -> Path:
    """The compiled library for float32 or bfloat16 operands, from the cache or compiled now (some four seconds).

    Raises:
        Unavailable: no compiler, it failed, or the cache cannot be written.
    """
    compiler = find_compiler()
    here = Path(__file__).parent
    parts = [*(here / name for name in SOURCES)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes())
    digest.update("\n".join([*compiler, _run([*compiler, "--version"]), *_flags(), processor()]).encode())
    library = cache_directory() / f"cpu-{'bf16' if bf16 else 'fp32'}-{digest.hexdigest()[:24]}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(suffix=".so", dir=library.parent)
        os.close(handle)
    except OSError as error:
        raise Unavailable(f"the cache {library.parent} cannot be written: {error}") from error
    try:
        command = [*compiler, *_flags(), f"-DPAIRS={str(bf16).lower()}", str(here / "operators.cpp"), "-o", name]
        try:
            _run([*command, "-fopenmp"])
        except Unavailable:
            _run(command)  # a compiler without OpenMP: one thread
        os.replace(name, library)  # whole, or not there
    finally:
        Path(name).unlink(missing_ok=True)
    return library


_lock = threading.Lock()
_state: dict[bool, ctypes.CDLL | str] = {}  # the libraries of float32 and bfloat16 operands, or why there is none


def _loaded(bf16: bool = False) -> ctypes.CDLL | str:
    """Asked for once per process: nothing is tried again."""
    if bf16 in _state:
        return _state[bf16]
    with _lock:
        if bf16 not in _state:
            try:
                library = ctypes.CDLL(str(build(bf16)))
                for name in OPERATORS:
                    function = getattr(library, f"fastflow_{name}")
                    function.argtypes = (ctypes.c_char_p,) * 3  # bytes are passed as they are
                library.fastflow_freeze.argtypes = (ctypes.c_char_p,) * 3
                library.fastflow_freeze.restype = ctypes.c_void_p
                library.fastflow_walk_frozen.argtypes = (
                    *(ctypes.c_void_p, *(ctypes.c_int64,) * 4),
                    *(ctypes.c_void_p,) * 4,
                )
                library.fastflow_release.argtypes = (ctypes.c_void_p,)
                _state[bf16] = library
            except (Unavailable, OSError, AttributeError) as error:
                _state[bf16] = str(error)
        return _state[bf16]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator,unused-ignore]
def why_unavailable() -> str | None:
    """What keeps native code from running here, or None. Compiles it at the first call."""
    found = _loaded()
    return found if isinstance(found, str) else None


def has_bf16() -> bool:
    """Whether products of bfloat16 operands run in native code; else it multiplies in float32."""
    found = _loaded()
    return not isinstance(found, str) and bool(found.fastflow_bf16())


def has_tiles() -> bool:
    """Whether products of bfloat16 operands run on AMX's tiles: the compiler, processor and system have them."""
    found = _loaded()
    return not isinstance(found, str) and bool(found.fastflow_tiles())


def features() -> str:
    """What of the machine native code uses, for people; why there is none, where there is none."""
    found = _loaded()
    if isinstance(found, str):
        return f"none, the PyTorch reference runs: {found}"
    products = "bfloat16 products" if found.fastflow_bf16() else "products of bfloat16 operands in float32"
    products += " by AMX" if has_tiles() else ""
    threads = "threads by OpenMP" if found.fastflow_threads() else "one thread"
    return f"vectors of {32 * found.fastflow_lanes()} bits, {products}, {threads}"


# Calling ------------------------------------------------------------------------------------------------------------


def padded(width: int) -> int:
    """A hidden layer's width in the native code's buffers."""
    found = _loaded()
    columns = COLS if isinstance(found, str) else 2 * found.fastflow_lanes()
    return -(-width // columns) * columns


def describe_network(net: Network, film_inputs: int) -> Description:
    """A network as `Net` in network.h reads it. `film_inputs`: rows of FiLM's weights."""
    bf16 = net.precision == "bf16" and has_bf16()
    ints = [
        net.state_dim,
        net.cond_dim,
        net.state_features,
        net.time_features,
        net.layers,
        ACTIVATIONS.index(net.activation),
        NORMS.index(net.norm),
        EMBEDDINGS.index(net.state_embedding),
        PREDICTIONS.index(net.prediction),
        film_inputs,
    ]
    for width, inputs, add in zip(net.hidden, net.inputs, net.add, strict=True):
        ints += [width, add, len(inputs), *(*inputs, 0, 0)[:2]]
    reals = (net.low, net.high, net.sigma, net.eps, net.output_scale)
    return Description(bf16, struct.pack(f"{len(ints)}q", *ints), struct.pack(f"{len(reals)}d", *reals))


def describe_stack(
    inputs: int, hidden: Sequence[int], outputs: int, activation: str, norm: bool, eps: float, precision: str
) -> Description:
    """The same of a plain network; `outputs` = 0 for one that ends with its last hidden layer."""
    bf16 = precision == "bf16" and has_bf16()
    kind = [ACTIVATIONS.index(activation), NORMS.index("after" if norm else "none"), 0, 0, 0]
    ints = [outputs, inputs, 0, 0, len(hidden), *kind]
    for i, width in enumerate(hidden):
        ints += [width, -1, int(i > 0), max(i - 1, 0), 0]
    return Description(bf16, struct.pack(f"{len(ints)}q", *ints), struct.pack("5d", 0.0, 1.0, 1.0, eps, 1.0))


def before(first: Description, ints: Sequence[int], second: Description) -> Description:
    """Two networks one behind the other, each followed by what an operator's call says of it: `ints` of the first."""
    between = struct.pack(f"{len(ints)}q", *ints)
    return Description(second.bf16, first.ints + between + second.ints, first.reals + second.reals)


def call(
    name: str,
    network: Description,
    ints: Sequence[int],
    reals: Sequence[float],
    tensors: Sequence[Tensor | None],
) -> None:
    """Run an operator on a described network; `tensors` are contiguous float32 on the CPU, as the source reads them.

    Raises:
        MemoryError: no room for its buffers.
    """
    _prepared(name, network, tuple(ints), tuple(reals))(tensors)


@functools.lru_cache(maxsize=512)
def _prepared(name: str, network: Description, ints: tuple[int, ...], reals: tuple[float, ...]) -> Prepared:
    return Prepared(name, network, ints, reals)


class Prepared:
    """A native operator with all that it takes but its tensors; arguments as for `call`."""

    def __init__(self, name: str, network: Description, ints: Sequence[int], reals: Sequence[float]) -> None:
        library = _loaded(network.bf16)
        if isinstance(library, str):
            raise Unavailable(library)
        self.name, self._function = name, getattr(library, f"fastflow_{name}")
        self._ints = network.ints + struct.pack(f"{len(ints)}q", *ints)
        self._reals = network.reals + struct.pack(f"{len(reals)}d", *reals)

    def __call__(self, tensors: Sequence[Tensor | None]) -> None:
        """Run it; MemoryError as for `call`."""
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        status = self._function(self._ints, self._reals, struct.pack(f"{len(pointers)}Q", *pointers))
        if status == 1:
            raise MemoryError(f"fastflow: no memory for the buffers of {self.name}")
        if status:
            raise RuntimeError(f"fastflow: {self.name} failed")


class PackedWalk:
    """A walk whose weights are packed once, in memory of its own until the object goes.

    Args:
        network: the description; ints, reals, tensors: those of the operator "walk" for no rows, up to its weights.
    """

    def __init__(
        self, network: Description, ints: Sequence[int], reals: Sequence[float], tensors: Sequence[Tensor | None]
    ) -> None:
        library = _loaded(network.bf16)
        if isinstance(library, str):
            raise Unavailable(library)
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        handle = library.fastflow_freeze(
            network.ints + struct.pack(f"{len(ints)}q", *ints),
            network.reals + struct.pack(f"{len(reals)}d", *reals),
            struct.pack(f"{len(pointers)}Q", *pointers),
        )
        if not handle:
            raise MemoryError("fastflow: no memory for a frozen copy of the weights")
        self._handle, self._walk = handle, library.fastflow_walk_frozen
        self._tensors = tuple(tensors)  # what the packed weights still point to, such as time features
        weakref.finalize(self, library.fastflow_release, handle)

    def __call__(self, x_0: Tensor, cond: Tensor, step_noise: Tensor | None, rows: int, samples: int) -> Tensor:
        """x_K, shaped as x_0, for contiguous x_0 [E, B, S, D] and cond [E or 1, B, C], or without E and S of 1."""
        x_1 = torch.empty_like(x_0)
        per_member = cond.dim() == 3 and cond.shape[0] > 1
        noise = None if step_noise is None else step_noise.data_ptr()
        inputs = (cond.data_ptr(), x_0.data_ptr(), noise, x_1.data_ptr())
        if self._walk(self._handle, rows, samples, torch.get_num_threads(), per_member, *inputs):
            raise MemoryError("fastflow: no memory for the buffers of a walk")
        return x_1
