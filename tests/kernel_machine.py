"""Runs kernels without a GPU as a GPU would: their source as Python over torch's tensors.

For two things that Triton's interpreter does not know. bfloat16: products take it as it is, casts round to nearest, and
what a kernel asks of hardware (tanh, reciprocal) is torch's; so what runs is the arithmetic that a GPU compiles
("fast", see kernels/tile.py). And Gluon, on a machine that does in any order what may happen in any order: a kernel's
partitions are threads of which one goes on at a time, and a seeded choice says which at every barrier, copy and
product. What hardware does behind a program's back is done as late as it may be, or as early, and what it must not meet
is an error:

- An address outside of the tensor that it is of.
- A copy by TMA fills its place with NaN when it starts and lands at some later time.
- A product reads its operands when it starts; they must be the same when it is waited for.
- An accumulator in flight is no tensor.
- A place that threads have stored to is not read by products or copied over before a fence, and a barrier that tells
  others of it is not arrived at before the partition's warps have met behind that fence.
- Barriers have phases as in hardware: a wait for a parity passes if the phase before the present one has it, so whoever
  is a whole phase ahead or behind passes wrongly or not at all. If nobody can go on, that is an error too.

Layouts, registers and sizes of places are the compiler's business (`fastflow.kernels.aot`). Noise that kernels draw is
left to the interpreter.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import itertools
import pkgutil
import random
import textwrap
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastflow.kernels


class MachineError(AssertionError):
    """What a kernel does that a GPU would not forgive."""


# Memory --------------------------------------------------------------------------------------------------------------


@dataclass
class Pointer:
    """Elements of a tensor, one or many."""

    base: Tensor
    at: Any = 0

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(element_ty=self.base.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(torch.as_tensor(self.at).shape)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.base, self.at + offset)

    __radd__ = __add__

    def __getitem__(self, key: Any) -> Pointer:
        return Pointer(self.base, self.at[key])

    def _inside(self, mask: Any) -> tuple[Tensor, Tensor]:
        at = torch.as_tensor(self.at)
        chosen = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand(at.shape)
        if bool(((at < 0) | (at >= self.base.numel()))[chosen].any()):
            raise MachineError(f"an address outside of a tensor of {tuple(self.base.shape)}")
        return torch.where(chosen, at, 0), chosen

    def load(self, mask: Any, other: float) -> Tensor:
        at, chosen = self._inside(mask)
        return torch.where(chosen, self.base.view(-1)[at], torch.tensor(other, dtype=self.base.dtype))

    def store(self, value: Any, mask: Any) -> None:
        at, chosen = self._inside(mask)
        if isinstance(value, Tensor) and value.dtype != self.base.dtype:
            raise MachineError(f"a store of {value.dtype} to a tensor of {self.base.dtype}")
        self.base.view(-1)[at[chosen]] = torch.as_tensor(value).expand(at.shape)[chosen]


def pointed(x: Any) -> Any:
    """What a kernel gets of an argument: of a tensor its address, with all memory behind it."""
    if type(x) is tuple:
        return tuple(map(pointed, x))
    if not isinstance(x, Tensor):
        return Scalar(x) if type(x) is int else x
    elements = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return Pointer(x.detach().as_strided((elements,), (1,)))


@dataclass
class Place:
    """One tile of shared memory and what is under way with it."""

    data: Tensor
    unfenced: set[int] = field(default_factory=set)  # partitions whose stores have no fence behind them
    landing: bool = False  # a copy is under way
    reads: int = 0  # products under way that read it


class Shared:
    """Shared memory: `index` of its first axis is a place, `slice` a part of one."""

    def __init__(self, machine: Machine, places: list[Place], parts: tuple[slice, ...] = ()) -> None:
        self.machine, self.places, self.parts = machine, places, parts

    def index(self, i: Any) -> Shared:
        i = int(i)
        if not 0 <= i < len(self.places):
            raise MachineError(f"place {i} of {len(self.places)}")
        return Shared(self.machine, [self.places[i]], (slice(None),) * self.places[i].data.dim())

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        if self.parts[dim] != slice(None) or not 0 <= start <= start + length <= self.place.data.shape[dim]:
            raise MachineError(f"rows {start} to {start + length} of {tuple(self.place.data.shape)}")
        parts = list(self.parts)
        parts[dim] = slice(start, start + length)
        return Shared(self.machine, self.places, tuple(parts))

    @property
    def place(self) -> Place:
        assert len(self.places) == 1, "index first"
        return self.places[0]

    @property
    def data(self) -> Tensor:
        return self.place.data[self.parts]

    def store(self, value: Tensor) -> None:
        place, data = self.place, self.data
        if value.shape != data.shape or value.dtype != data.dtype:
            raise MachineError(f"{value.dtype} {tuple(value.shape)} to {data.dtype} {tuple(data.shape)}")
        if place.landing or place.reads:
            raise MachineError("a store to a place that a copy or a product is under way with")
        data.copy_(value)
        place.unfenced.add(self.machine.me.number)
        self.machine.me.stored.append(place)
        self.machine.me.fenced = False

    def load(self, layout: Any) -> Tensor:
        place = self.place
        if place.landing or place.unfenced - {self.machine.me.number}:
            raise MachineError("a load from a place that is not ready")
        return self.data.clone()


class Barrier:
    """An mbarrier."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = 0
        self.phase = -1  # not there yet

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.phase = 0

    def arrive(self, count: int, expected: int = 0) -> None:
        if self.phase < 0:
            raise MachineError("a barrier that is not initialised")
        self.bytes += expected
        self.pending -= count
        if self.pending < 0:
            raise MachineError("more arrivals than a phase has")
        self._turn()

    def land(self, size: int) -> None:
        self.bytes -= size
        self._turn()

    def _turn(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count

    def passed(self, parity: int) -> bool:
        return self.phase & 1 != parity


class Barriers:
    """Barriers in shared memory."""

    def __init__(self, barriers: list[Barrier]) -> None:
        self.barriers = barriers

    def index(self, i: Any) -> Barriers:
        i = int(i)
        if not 0 <= i < len(self.barriers):
            raise MachineError(f"barrier {i} of {len(self.barriers)}")
        return Barriers([self.barriers[i]])

    @property
    def barrier(self) -> Barrier:
        assert len(self.barriers) == 1, "index first"
        return self.barriers[0]


# Products ------------------------------------------------------------------------------------------------------------


class Accumulator:
    """The result of a product that may be under way: no tensor until it has been waited for."""

    def __init__(self, a: Shared, b: Shared, acc: Tensor | Accumulator, use_acc: bool) -> None:
        for place in (a.place, b.place):
            if place.landing or place.unfenced:
                raise MachineError("a product reads a place that is not ready")
            place.reads += 1
        self.operands = (a, b)
        self.seen = (a.data.clone(), b.data.clone())
        self.before, self.use_acc = acc, use_acc
        self.value: Tensor | None = None

    def finish(self) -> None:
        for operand, seen in zip(self.operands, self.seen, strict=True):
            operand.place.reads -= 1
            if not torch.equal(operand.data, seen) and not bool(seen.isnan().any()):
                raise MachineError("an operand has changed while its product was under way")
        value = self.seen[0].float() @ self.seen[1].float()
        if self.use_acc:
            before = self.before.value if isinstance(self.before, Accumulator) else self.before
            assert before is not None, "products finish in order"
            value = before + value
        self.value = value


# The machine ---------------------------------------------------------------------------------------------------------


class _Stop(BaseException):
    """Ends a partition's thread when another has failed."""


def _always() -> bool:
    return True


@dataclass
class Partition:
    """One of a program's groups of warps."""

    number: int
    run: Callable[[], None]
    ready: Callable[[], bool] = _always
    turn: threading.Event = field(default_factory=threading.Event)
    done: bool = False
    stored: list[Place] = field(default_factory=list)  # since its warps met behind a fence
    fenced: bool = True
    products: list[Accumulator] = field(default_factory=list)


class Machine:
    """Runs kernels, one program at a time.

    `Machine().launch(kernel, grid, arguments)` runs every program.

    Args:
        seed: of what happens first where anything may.
        first: a partition that always goes on before the others, and before copies land; None for any.
        edit: of a kernel's source, for what a mistake in it comes to.
    """

    def __init__(self, seed: int = 0, first: int | None = None, edit: Callable[[str], str] = str) -> None:
        self.random = random.Random(seed)
        self.first = first
        self.edit = edit
        self.partitions: list[Partition] = []
        self.copies: list[Callable[[], None]] = []
        self.failure: Exception | None = None
        self.stopped = False
        self.outer = Partition(-1, lambda: None)
        self.me = self.outer
        self.back = threading.Event()
        self.program = self.grid = (0, 0, 0)

    def function(self, jitted: Any) -> Callable[..., Any]:
        """A device function over tensors."""
        return Names(self).function(jitted)

    def launch(self, kernel: Any, grid: Sequence[int], arguments: dict[str, Any]) -> None:
        run = self.function(kernel)
        values = {name: pointed(x) for name, x in arguments.items()}
        self.grid = (*grid, 1, 1)[:3]
        for z, y, x in itertools.product(*map(range, reversed(self.grid))):
            self.program = (x, y, z)
            run(**values)

    # Partitions --------------------------------------------------------------------------------------------

    def specialize(self, functions: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], *_: Any) -> None:
        if not self.outer.fenced:
            raise MachineError("partitions start before what was stored has a fence")
        self.partitions = [
            Partition(i, lambda function=function, arguments=arguments: function(*arguments))
            for i, (function, arguments) in enumerate(functions)
        ]
        threads = [threading.Thread(target=self._thread, args=(p,), daemon=True) for p in self.partitions]
        for thread in threads:
            thread.start()
        try:
            while self.failure is None and not all(p.done for p in self.partitions):
                self._step()
        finally:
            self.stopped = True
            for partition, thread in zip(self.partitions, threads, strict=True):
                partition.turn.set()
                thread.join()
            self.stopped = False
            self.me = self.outer
        if self.failure is not None:
            raise self.failure
        if self.copies:
            raise MachineError("a program ends with copies under way")

    def _thread(self, partition: Partition) -> None:
        partition.turn.wait()
        try:
            if not self.stopped:
                partition.run()
            if partition.products and not self.stopped:
                raise MachineError("a partition ends with products under way")
        except _Stop:
            pass
        except Exception as error:
            self.failure = error
        partition.done = True
        self.back.set()

    def _step(self) -> None:
        ready = [p for p in self.partitions if not p.done and p.ready()]
        first = [p for p in ready if p.number == self.first]
        actions: list[Partition | None] = [*(first or ready), *([None] if self.copies and not first else [])]
        if not actions:
            waiting = [p.number for p in self.partitions if not p.done]
            raise MachineError(f"partitions {waiting} wait for each other")
        action = self.random.choice(actions)
        if action is None:
            self.copies.pop(self.random.randrange(len(self.copies)))()
            return
        self.me = action
        self.back.clear()
        action.turn.set()
        self.back.wait()

    def pause(self, ready: Callable[[], bool] = _always) -> None:
        """Others may go on here; this partition does when `ready`."""
        me = self.me
        if me is self.outer:
            return
        me.ready = ready
        me.turn.clear()
        self.back.set()
        me.turn.wait()
        me.ready = _always
        if self.stopped:
            raise _Stop


class Names:
    """What a kernel's module finds under the names that it imports."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.modules: dict[int, dict[str, Any]] = {}
        gl = types.SimpleNamespace(
            **{name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "int32", "int64")},
            cdiv=lambda x, y: -(-x // y),
            trans=lambda x: x.T,
            max=lambda x, axis: x.amax(axis),
            min=lambda x, axis: x.amin(axis),
            program_id=lambda axis: Scalar(machine.program[axis]),
            num_programs=lambda axis: Scalar(machine.grid[axis]),
            static_range=range,
            range=lambda *args, **_: range(*args),
            arange=lambda low, high, layout=None: torch.arange(low, high),
            zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
            load=lambda p, mask=None, other=0.0: p.load(mask, other),
            store=lambda p, value, mask=None: p.store(value, mask),
            sum=lambda x, axis: x.sum(axis),
            minimum=_both(torch.minimum),
            maximum=_both(torch.maximum),
            where=_where,
            split=lambda x: (x[..., 0], x[..., 1]),
            convert_layout=lambda x, layout: x,
            allocate_shared_memory=self._allocate,
            warp_specialize=machine.specialize,
            barrier=self._meet,
            debug_barrier=lambda: None,
            dot=lambda x, y, input_precision=None: x.float() @ y.float(),
            int1=torch.bool,
            NVMMADistributedLayout=_layout,
            NVMMASharedLayout=types.SimpleNamespace(get_default_for=_layout),
            SwizzledSharedLayout=_layout,
            BlockedLayout=_layout,
            SliceLayout=_layout,
            **{name: getattr(torch, name) for name in ("exp", "exp2", "abs", "floor", "rsqrt", "erf", "sin", "cos")},
        )
        gl.inline_asm_elementwise = _assembly
        mbarrier = types.SimpleNamespace(
            MBarrierLayout=lambda: "barrier",
            init=lambda bar, count: bar.barrier.init(count),
            wait=self._wait,
            expect=lambda bar, size: bar.barrier.arrive(1, size),
            arrive=self._arrive,
        )
        self.replaced = {
            "gl": gl,
            "tl": gl,
            "mbarrier": mbarrier,
            "meet": self._meet,
            "fence_async_shared": self._fence,
            "load_tile": self._load_tile,
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_wait": self._finish,
        }

    def function(self, jitted: Any) -> Callable[..., Any]:
        """A kernel or device function as Python over these names."""
        plain = inspect.unwrap(jitted.fn)
        known = plain.__globals__
        if id(known) not in self.modules:
            names = self.modules[id(known)] = dict(known)
            for name, value in known.items():
                if type(value).__name__ == "ConstexprFunction" or hasattr(value, "arg_names"):
                    names[name] = _Later(self, value)
                elif name in self.replaced:
                    names[name] = self.replaced[name]
                elif type(value).__name__ == "constexpr":
                    names[name] = value.value
        lines, start = inspect.getsourcelines(plain)
        tree = _Values().visit(ast.parse(self.machine.edit(textwrap.dedent("".join(lines)))))
        ast.increment_lineno(tree, start - 1)
        found: dict[str, Any] = {}
        exec(compile(tree, inspect.getsourcefile(plain) or "kernel", "exec"), self.modules[id(known)], found)
        return found[plain.__name__]

    def _allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared | Barriers:
        if layout == "barrier":
            return Barriers([Barrier() for _ in range(shape[0])])
        empty = [torch.full(tuple(shape[1:]), torch.nan, dtype=dtype) for _ in range(shape[0])]
        return Shared(self.machine, [Place(x) for x in empty])

    def _wait(self, bar: Barriers, phase: int, pred: Any = True) -> None:
        if pred:
            barrier = bar.barrier
            if barrier.phase < 0:
                raise MachineError("a wait for a barrier that is not initialised")
            self.machine.pause(lambda: barrier.passed(int(phase)))

    def _arrive(self, bar: Barriers, *, count: int = 1, pred: Any = True) -> None:
        if pred:
            if self.machine.me.stored:
                raise MachineError("others are told of stores that a fence and a meeting of the warps do not follow")
            bar.barrier.arrive(count)
            self.machine.pause()

    def _fence(self) -> None:
        self.machine.me.fenced = True

    def _meet(self) -> None:
        me = self.machine.me
        if me.fenced:
            for place in me.stored:
                place.unfenced.discard(me.number)
            me.stored.clear()

    def _load_tile(self, weights: Any, at: Sequence[int], bar: Barriers, result: Shared, pred: Any = True) -> None:
        if not pred:
            return
        place, barrier = result.place, bar.barrier
        if place.landing or place.reads or place.unfenced:
            raise MachineError("a copy to a place that is in use")
        rows, columns = weights.block_shape
        base = torch.zeros(rows, columns, dtype=weights.base.dtype)
        inside = weights.base[at[0] : at[0] + rows, at[1] : at[1] + columns]
        base[: inside.shape[0], : inside.shape[1]] = inside
        place.landing = True
        place.data.fill_(torch.nan)

        def land() -> None:
            place.data.copy_(base)
            place.landing = False
            barrier.land(base.numel() * base.element_size())

        self.machine.copies.append(land)
        self.machine.pause()

    def _multiply(
        self, a: Shared, b: Shared, acc: Any, *, use_acc: Any = True, is_async: bool = False
    ) -> Accumulator | Tensor:
        product = Accumulator(a, b, acc, bool(use_acc))
        self.machine.me.products.append(product)
        self.machine.pause()
        if is_async:
            return product
        return self._finish(0, (product,))

    def _finish(self, num_outstanding: int, deps: Sequence[Any]) -> Any:
        products = self.machine.me.products
        self.machine.pause()
        while len(products) > num_outstanding:
            products.pop(0).finish()
        found = tuple(x.value if isinstance(x, Accumulator) and x.value is not None else x for x in deps)
        return found[0] if len(found) == 1 else found


class Scalar(int):
    """An integer that may be asked for as another type."""

    def to(self, dtype: torch.dtype) -> Any:
        return float(self) if dtype.is_floating_point else self


def _scalar(name: str) -> Callable[[int, Any], Any]:
    plain = getattr(int, name)

    def call(self: int, other: Any) -> Any:
        found = plain(self, other) if isinstance(other, int) else NotImplemented
        return Scalar(found) if type(found) is int else found

    return call


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift"):
    for _side in (f"__{_name}__", f"__r{_name}__"):
        setattr(Scalar, _side, _scalar(_side))


class _Values(ast.NodeTransformer):
    """Source in which tensors are values: `x += y` binds x anew. Decorators and annotations go."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list = []
        for argument in node.args.args:
            argument.annotation = None
        self.generic_visit(node)
        return ast.fix_missing_locations(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        assert isinstance(node.target, ast.Name)
        value = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
        return ast.copy_location(ast.Assign([node.target], value), node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        assert node.value is not None
        return ast.copy_location(ast.Assign([node.target], node.value), node)


class _Later:
    """A device function, made when it is first called."""

    def __init__(self, names: Names, jitted: Any) -> None:
        self.names, self.jitted, self.made = names, jitted, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.made is None:
            self.made = self.names.function(self.jitted)
        return self.made(*args, **kwargs)


def _layout(*args: Any, **kwargs: Any) -> None:
    return None


def _both(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    """Of two tensors, or of a tensor and a number."""

    def call(x: Any, y: Any) -> Any:
        if not isinstance(x, Tensor) and not isinstance(y, Tensor):
            return function(torch.tensor(x), torch.tensor(y)).item()
        like = x if isinstance(x, Tensor) else y
        return function(*(z if isinstance(z, Tensor) else torch.as_tensor(z, dtype=like.dtype) for z in (x, y)))

    return call


def _where(condition: Any, x: Any, y: Any) -> Tensor:
    return torch.where(*map(torch.as_tensor, (condition, x, y)))


_INSTRUCTIONS = {"tanh.approx.f32": torch.tanh, "rcp.approx.ftz.f32": torch.reciprocal}


def _assembly(text: str, constraints: str, args: Sequence[Tensor], **_: Any) -> Tensor:
    return _INSTRUCTIONS[text.split()[0]](*args)


class Mistake:
    """An edit of a kernel's source; `made` once it has found what to change."""

    def __init__(self, before: str, after: str) -> None:
        self.before, self.after, self.made = before, after, False

    def __call__(self, source: str) -> str:
        self.made |= self.before in source
        return source.replace(self.before, self.after)


class AsPython:
    """In a kernel's place: launches run on a machine of their own, `Machine(**options)`; `launches` counts them."""

    def __init__(self, kernel: Any, machine: type[Machine] = Machine, **options: Any) -> None:
        self.kernel, self.machine, self.options, self.launches = kernel, machine, options, 0

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def launch(*args: Any, **named: Any) -> None:
            self.launches += 1
            names = self.kernel.arg_names
            given = dict(zip(names, args, strict=False)) | {n: x for n, x in named.items() if n in names}
            given = {name: _as_on_a_gpu(value) for name, value in given.items()}
            self.machine(**self.options).launch(self.kernel, grid, given)

        return launch


def _as_on_a_gpu(value: Any) -> Any:
    """With the arithmetic that a GPU compiles in place of the interpreter's."""
    return value._replace(ARITH="fast") if getattr(value, "ARITH", None) == "emulate" else value


@contextlib.contextmanager
def kernels_as_python() -> Iterator[None]:
    """All of fastflow's Triton kernels as Python, but those that draw noise."""
    with contextlib.ExitStack() as replaced:
        for found in pkgutil.iter_modules(fastflow.kernels.__path__, "fastflow.kernels."):
            if found.name.rpartition(".")[2] not in ("cpu", "aot", "ring", "draw"):
                module = importlib.import_module(found.name)
                for name, value in list(vars(module).items()):
                    if name.endswith("_kernel") and hasattr(value, "arg_names"):
                        replaced.enter_context(mock.patch.object(module, name, AsPython(value)))
        yield
