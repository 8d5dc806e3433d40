"""Runs all programs of a Triton kernel at the same time, without a GPU: for programs that wait for each other.

Triton's interpreter runs one program after the other, so a kernel whose programs meet would wait for ever. Here every
program is a thread of `kernel_machine`, of which one goes on at a time, and a seeded choice says which at every load,
store and atomic operation. Memory is looked at element by element:

- What a program loads of another's stores must have been released by that one and acquired by this one since, through
  an atomic operation; so must what it overwrites have been read. Clocks of all programs say so, whatever the order was.
- What others store during the launch is not loaded through the cache of one multiprocessor.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from kernel_machine import Machine, MachineError, Names, Pointer, Scalar, pointed
from torch import Tensor


class _Shadow:
    """By element of a tensor: who stored it last and when, and when each program has read it."""

    def __init__(self, elements: int, programs: int) -> None:
        self.writer = torch.full((elements,), -1)
        self.written = torch.zeros(elements, dtype=torch.int64)
        self.read = torch.zeros(programs, elements, dtype=torch.int64)


class Together(Machine):
    """A machine whose `launch` has all programs under way at once."""

    def launch(self, kernel: Any, grid: Sequence[int], arguments: dict[str, Any]) -> None:
        run = self.function(kernel)
        values = {name: pointed(x) for name, x in arguments.items()}
        self.grid = (grid[0], grid[1])
        self.places = [(x, y) for y, x in itertools.product(range(grid[1]), range(grid[0]))]
        count = len(self.places)
        # Row p: up to when program p knows what each has done.
        self.clocks = torch.zeros(count, count, dtype=torch.int64)
        self.clocks.fill_diagonal_(1)
        self.released: dict[tuple[int, int], Tensor] = {}
        self.shadows: dict[int, _Shadow] = {}
        self.specialize([(functools.partial(run, **values), ()) for _ in self.places])

    def function(self, jitted: Any) -> Callable[..., Any]:
        names = Names(self)
        language = names.replaced["tl"]
        language.program_id = lambda axis: Scalar(self.places[self.me.number][axis])
        language.load, language.store, language.atomic_add = self._load, self._store, self._atomic_add
        return names.function(jitted)

    def _shadow(self, p: Pointer, mask: Any) -> tuple[_Shadow, Tensor]:
        at, chosen = p._inside(mask)
        found = self.shadows.setdefault(p.base.data_ptr(), _Shadow(p.base.numel(), len(self.places)))
        return found, at[chosen].view(-1)

    def _load(self, p: Pointer, mask: Any = None, other: float = 0.0, cache_modifier: str = "") -> Tensor:
        self.pause()
        shadow, at = self._shadow(p, mask)
        me = self.me.number
        foreign = (shadow.writer[at] >= 0) & (shadow.writer[at] != me)
        if foreign.any():
            if cache_modifier != ".cg":
                raise MachineError("a load through one multiprocessor's cache of what another program stores")
            if (shadow.written[at] > self.clocks[me][shadow.writer[at]])[foreign].any():
                raise MachineError("a load that does not wait for the store")
        shadow.read[me, at] = self.clocks[me, me]
        return p.load(mask, other)

    def _store(self, p: Pointer, value: Any, mask: Any = None) -> None:
        self.pause()
        shadow, at = self._shadow(p, mask)
        me = self.me.number
        known = self.clocks[me]
        others = torch.arange(len(self.places)) != me
        if (shadow.read[:, at] > known[:, None])[others].any():
            raise MachineError("a store that does not wait for another program's load")
        foreign = (shadow.writer[at] >= 0) & (shadow.writer[at] != me)
        if (shadow.written[at] > known[shadow.writer[at]])[foreign].any():
            raise MachineError("a store that does not wait for another program's")
        shadow.writer[at], shadow.written[at] = me, known[me]
        p.store(value, mask)

    def _atomic_add(self, p: Pointer, value: int, sem: str, scope: str) -> int:
        if scope != "gpu":
            raise MachineError(f"an atomic operation of scope {scope} between programs")
        self.pause()
        where, me = (p.base.data_ptr(), int(p.at)), self.me.number
        nobody = torch.zeros(len(self.places), dtype=torch.int64)
        if sem in ("acquire", "acq_rel"):
            self.clocks[me] = torch.maximum(self.clocks[me], self.released.get(where, nobody))
        if sem in ("release", "acq_rel"):
            self.released[where] = torch.maximum(self.released.get(where, nobody), self.clocks[me])
            self.clocks[me, me] += 1
        before = int(p.base[where[1]])
        p.base[where[1]] += value
        return before
