"""Walks with the weights as they were when they were frozen: for acting, where the same weights serve
thousands of calls.

A frozen copy owns its weights: later updates of what it was made from do not reach it. It gives no gradients. On the
CPU its weights are packed once, and a call of one row costs a few microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastflow import cpu, ops
from fastflow.fields import VelocityField
from fastflow.kernels.cpu import PackedWalk

__all__ = ["FrozenWalk"]


class FrozenWalk:
    """`fastflow.integrate` of one field, or several, as they are now.

    Args:
        field, num_steps, method, t_0, t_1, backend, precision: as for `fastflow.integrate`; times are numbers.

    Raises:
        ValueError, TypeError, NotImplementedError: as `fastflow.integrate`.
    """

    def __init__(
        self,
        field: VelocityField | Sequence[VelocityField],
        *,
        num_steps: int,
        method: str = "euler",
        t_0: float = 0.0,
        t_1: float = 1.0,
        backend: str | None = None,
        precision: str | None = None,
    ) -> None:
        fields = [field] if isinstance(field, VelocityField) else list(field)
        self._options: dict[str, Any] = dict(num_steps=num_steps, method=method, t_0=t_0, t_1=t_1)
        self._options |= dict(backend=backend, precision=precision)
        ops.check_walk(fields, **self._options)
        self._fields = [_copy(f) for f in fields]
        self._native: PackedWalk | None = None
        self._freeze()

    def _freeze(self) -> None:
        call = ops.check_walk(self._fields, **self._options)
        self._spec = call.spec
        if call.runner() == "native" and not call.spec.film:
            names = ("num_steps", "method", "t_0", "t_1")
            self._native = cpu.freeze(call.spec, call.parameters, call.precision, *(self._options[n] for n in names))

    def __call__(self, x_0: Tensor, cond: Tensor | None = None, *, step_noise: Tensor | None = None) -> Tensor:
        """x_K, without gradient; arguments, result and errors as for `fastflow.integrate`; RuntimeError inside
        `torch.jit.trace`, which would not see the walk."""
        if torch._C._is_tracing():
            raise RuntimeError("FrozenWalk: a frozen copy cannot be traced; trace the module that it was made from")
        # What a control loop asks for needs no look at every option.
        if self._native is not None and step_noise is None:
            rows = ops.plain_rows(self._spec, x_0, cond, len(self._fields))
            if rows is not None:
                assert cond is not None
                return self._native(x_0, cond, None, *rows)
        if self._native is None:
            field = self._fields if len(self._fields) > 1 else self._fields[0]
            with torch.no_grad():
                return ops.integrate(field, x_0, cond, step_noise=step_noise, **self._options)
        with torch.no_grad():
            call = ops.check_walk(self._fields, **self._options)
            x, c = call.canonical(x_0, cond, "x_0")
            noise = None if step_noise is None else call.like_steps(step_noise, self._options["num_steps"]).contiguous()
            x_1 = self._native(x.contiguous(), c.contiguous(), noise, call.batch, call.samples)
            return call.restore(x_1)

    # The packed weights lie in memory of this process: a copy packs its own.

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_native"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _native=None)
        self._freeze()


def _copy(field: VelocityField) -> VelocityField:
    """A field of its own with the same weights, whatever stands in the parameters' places."""
    given = field.parameter_list()
    # Made on the meta device, where no initial weights are drawn.
    twin = VelocityField(field.spec, "meta", given[0].dtype).to_empty(device=given[0].device)
    with torch.no_grad():
        for mine, theirs in zip(twin.parameter_list(), given, strict=True):
            mine.copy_(theirs)
    return twin.requires_grad_(False)
