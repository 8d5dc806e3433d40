"""Reading a pickle of arrays without an unpickler: nothing that a file names is imported, called or given a state.

A pickle is a program for a stack machine, and one instruction of it calls any function that can be imported. The
machine here has the instructions that dicts, lists, strings, numbers and NumPy arrays are written with, and the few
names in `_CALLS` mean functions of this file. What NumPy's own functions would be told (`_reconstruct`, `dtype`,
`__setstate__`) is read as data, checked, and made into an array by `numpy.frombuffer`. Instructions come from
`pickletools.genops`, which decodes and executes nothing.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastflow.errors import UserError

__all__ = ["UnsafePickle", "load_arrays"]

_DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_DEPTH = 32
_ENTRIES = 100_000


class UnsafePickle(UserError):
    """A pickle that asks for more than arrays in containers, or is damaged. Nothing of it was executed."""


def load_arrays(path: str | os.PathLike[str]) -> Any:
    """The dicts, lists, tuples, strings, bytes, numbers, None and arrays that a pickle holds.

    Arrays of NumPy and of JAX (which is not needed) become `numpy.ndarray`, of the types bool, int8 to int64, uint8 to
    uint64 and float16 to float64; flax's FrozenDict becomes a dict. Protocols 3 to 5 are read.

    Args:
        path: the file, in memory as a whole while it is read.

    Raises:
        UnsafePickle: the file names anything else, uses another instruction (persistent ids, extension codes, out of
            band buffers, ...), or is damaged. The message says what and at which byte.
        UserError: the file cannot be read.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror})") from error
    machine = _Machine(path)
    try:
        value = machine.run(data)
        return _Plain(path).value(value)
    except UnsafePickle:
        raise
    # What a damaged file does to the machine: a stack that is empty, a number where a tuple should be, a bad string.
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, MemoryError) as error:
        raise UnsafePickle(f"{path}: not a pickle, or a damaged one, at byte {machine.position} ({error})") from error


# What stands on the stack for things that are not plain ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Name:
    """A global of `_CALLS`, or NumPy's array type, as a word and nothing else."""

    full: str

    def __str__(self) -> str:
        return self.full


class _DType:
    """A NumPy dtype: its code and, once its state has come, its byte order."""

    def __init__(self, code: object, align: object = False, copy: object = True) -> None:
        if not isinstance(code, str) or code not in _DTYPES:
            raise UnsafePickle(f"the dtype {_said(code)}, expected one of {', '.join(_DTYPES)}")
        self.code = code
        self.order = "="

    def set_state(self, state: Any) -> None:
        """(version, byte order, subarray, names, fields, item size, alignment, flags)."""
        order, structure = state[1], state[2:5]
        if (
            not isinstance(order, str)
            or order not in ("<", ">", "|", "=")
            or any(part is not None for part in structure)
        ):
            raise UnsafePickle(f"a dtype with fields or of byte order {_said(order)}, expected plain numbers")
        self.order = order

    def array(self, data: Any, shape: Any, order: str) -> np.ndarray:
        """A copy of raw bytes as an array of its own."""
        if not (isinstance(shape, tuple) and all(isinstance(n, int) and n >= 0 for n in shape)):
            raise UnsafePickle(f"an array of shape {_said(shape)}, expected a tuple of ints")
        dtype = np.dtype(self.order + self.code)
        if not isinstance(data, (bytes, bytearray)) or len(data) != math.prod(shape) * dtype.itemsize:
            came = f"{len(data)} bytes" if isinstance(data, (bytes, bytearray)) else _said(data)
            raise UnsafePickle(f"an array of {came}, expected the bytes of {list(shape)} {dtype}")
        # The copy is writable and in this machine's byte order.
        return np.frombuffer(data, dtype).astype(dtype.newbyteorder("=")).reshape(shape, order=order)  # type: ignore[call-overload]


class _Array:
    """An array whose state comes later."""

    array: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        """(version, shape, dtype, in Fortran's order, raw bytes)."""
        _, shape, dtype, fortran, data = state
        self.array = _dtype(dtype).array(data, shape, "F" if fortran else "C")


def _said(value: Any) -> str:
    """A value in a message: words as they are, of the rest the type, as it may be of any size."""
    return f"{str(value)[:80]!r}" if isinstance(value, (str, _Name)) else f"type {type(value).__name__}"


def _dtype(value: Any) -> _DType:
    if not isinstance(value, _DType):
        raise UnsafePickle(f"an array of {_said(value)}, expected a dtype")
    return value


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    if kind != _NDARRAY:
        raise UnsafePickle(f"an array of class {_said(kind)}, expected numpy.ndarray")
    return _Array()


def _jax_array(function: Any, arguments: Any, state: Any, aval_state: Any) -> _Array:
    """JAX pickles NumPy's recipe, and facts about the type that NumPy does not have."""
    if not (isinstance(function, _Name) and _CALLS[function.full] is _reconstruct):
        raise UnsafePickle(f"a JAX array made by {_said(function)}, expected NumPy's _reconstruct")
    array = _reconstruct(*arguments)
    array.set_state(state)
    return array


def _scalar(dtype: Any, data: Any) -> Any:
    return _dtype(dtype).array(data, (), "C")[()]


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    if order not in ("C", "F"):
        raise UnsafePickle(f"an array in order {_said(order)}, expected C or F")
    array = _Array()
    array.array = _dtype(dtype).array(data, shape, order)
    return array


def _frozen_dict(content: Any) -> dict[Any, Any]:
    if not isinstance(content, dict):
        raise UnsafePickle(f"a FrozenDict of {_said(content)}, expected a dict")
    return content


_NDARRAY = _Name("numpy.ndarray")
# The names of NumPy before 2 and since.
_CALLS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _DType,
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
    "jax._src.array._reconstruct_array": _jax_array,
    "flax.core.frozen_dict.FrozenDict": _frozen_dict,
}


# The machine --------------------------------------------------------------------------------------------------------

_MARK = object()
# Instructions that push what they carry.
_PUSH = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, position in pickletools.genops(data):
            self.position = position or 0
            try:
                self.step(opcode.name, argument)
            except UnsafePickle as error:
                raise UnsafePickle(
                    f"{self.path}: refused at byte {self.position}, nothing was executed: {error}"
                ) from None
        return self.stack.pop()

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in ("PROTO", "FRAME", "STOP"):
            return
        elif name in _PUSH:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack.append(tuple(stack.pop() for _ in range(count))[::-1])
        elif name == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self.since_mark()
            self.top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self.since_mark()
            if not all(type(key) in (str, int) for key in items[::2]):
                raise UnsafePickle("a key of a dict that is no string or int")
            self.top(dict).update(zip(items[::2], items[1::2], strict=True))
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.push_name(*argument.split(" "))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            self.push_name(module, attribute)
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            if not isinstance(function, _Name) or function.full not in _CALLS:
                raise UnsafePickle(f"a call of {_said(function)}")
            stack.append(_CALLS[function.full](*arguments))
        elif name == "BUILD":
            state, target = stack.pop(), stack[-1]
            if not isinstance(target, (_Array, _DType)):
                raise UnsafePickle(f"a state for {_said(target)}; only arrays and dtypes have one here")
            target.set_state(state)
        else:
            raise UnsafePickle(f"the instruction {name}, which no pickle of arrays needs")

    def push_name(self, module: Any, attribute: Any) -> None:
        name = _Name(f"{module}.{attribute}")
        if name.full not in _CALLS and name != _NDARRAY:
            raise UnsafePickle(f"the name {name.full}; a checkpoint holds arrays of NumPy or JAX alone")
        self.stack.append(name)

    def since_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise UnsafePickle(f"items for {_said(self.stack[-1])}, expected a {kind.__name__}")
        return self.stack[-1]


class _Plain:
    """Turns what the machine made into plain values. A file that names one dict many times, or inside itself, is given
    up before it fills the memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = 0

    def value(self, value: Any, depth: int = 0) -> Any:
        self.entries += 1
        if depth > _DEPTH or self.entries > _ENTRIES:
            raise UnsafePickle(f"{self.path}: more than {_ENTRIES:,} entries, or containers {_DEPTH} deep")
        if isinstance(value, _Array) and value.array is not None:
            return value.array
        if type(value) is dict:
            return {self.value(key, depth + 1): self.value(item, depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.value(item, depth + 1) for item in value)
        if value is None or isinstance(value, (bool, int, float, str, bytes, bytearray, np.generic)):
            return value
        raise UnsafePickle(f"{self.path}: expected arrays in containers, got {_said(value)}")
