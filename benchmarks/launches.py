"""How many kernels a call launches on a GPU: measured there, else counted in Triton's interpreter without running any.

Where kernels are interpreted, a launch is counted and left out (results are then meaningless), and every operator of
torch that does work of its own counts as one launch besides.
"""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from fastflow import branches
from fastflow.kernels import launch

# Operators that only look at memory in another way, or make it.
_IDLE = {
    *("alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided", "expand", "expand_as"),
    *("flatten", "is_nonzero", "item", "_local_scalar_dense", "lift_fresh", "mT", "narrow", "new_empty", "numpy_T"),
    *("permute", "_reshape_alias", "reshape", "resize_", "resolve_conj", "resolve_neg", "result_type", "select"),
    *("set_", "slice", "split", "split_with_sizes", "squeeze", "t", "to", "transpose", "unbind", "unflatten"),
    *("unsqueeze", "_unsafe_view", "view", "view_as", "_to_copy", "new_zeros", "zeros", "zeros_like", "ones", "full"),
    *("ones_like", "full_like", "_has_compatible_shallow_copy_type", "_version", "output_nr", "is_leaf"),
}

_LISTS = ("_foreach_", "_fused_")
_LAUNCH = "interpreted launch"


@contextlib.contextmanager
def _left_out() -> Iterator[None]:
    """Interpreted launches, told to the profiler and not done."""
    from triton.runtime.interpreter import GridExecutor

    def counted(*arguments: Any, **keywords: Any) -> None:
        with torch.profiler.record_function(_LAUNCH):
            pass

    # A GPU multiplies bfloat16 as it is.
    with mock.patch.object(GridExecutor, "__call__", counted), mock.patch.object(launch, "_widened_product", torch.bmm):
        yield


def _launched(call: Callable[[], Any]) -> list[Any]:
    """The profiler's events of a second call that would be launches on a GPU."""
    if not launch.interpreted():
        raise RuntimeError("launches are counted on a GPU or in Triton's interpreter (TRITON_INTERPRET=1)")
    with _left_out():
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            call()
    return [event for event in profiled.events() or [] if event.name == _LAUNCH or _works(event)]


def count(call: Callable[[], Any], device: torch.device) -> int:
    """Launches of the second call.

    Raises:
        RuntimeError: neither a GPU nor Triton's interpreter.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if device.type == "cuda":
        from benchmarks import counts

        return counts.count(call, device)["kernels"]
    return len(_launched(call))


def by_branch(call: Callable[[], Any]) -> dict[str, int]:
    """Launches of the second call in each branch that it has where it is captured (`fastflow.branches`), under the
    branch's name; "" is what is in none.

    Raises:
        RuntimeError: Triton's interpreter was not asked for.
    """
    with branches.allowed(), contextlib.ExitStack() as pretended:
        stream = mock.Mock()
        for owner, name, value in (
            (branches, "_capturing", lambda: True),
            (torch.cuda, "Stream", lambda: stream),
            (torch.cuda, "current_stream", lambda: stream),
            (torch.cuda, "stream", lambda _: contextlib.nullcontext()),
        ):
            pretended.enter_context(mock.patch.object(owner, name, value))
        return dict(collections.Counter(map(_branch_of, _launched(call))))


def _branch_of(event: Any) -> str:
    while event is not None:
        if event.name.startswith("branch "):
            return str(event.name.removeprefix("branch "))
        event = event.cpu_parent
    return ""


def _works(event: Any) -> bool:
    """Whether an event is an operator that does work which no operator within it does."""
    name = event.name.removeprefix("aten::")
    if name == event.name or name in _IDLE or _within_list(event.cpu_parent):
        return False
    if name.startswith(_LISTS):
        return True
    # On a CPU an operator turns numbers into tensors of its dtype: the innermost operators count.
    return not any(map(_contains_work, event.cpu_children))


def _contains_work(event: Any) -> bool:
    name = event.name.removeprefix("aten::")
    own = name != event.name and name not in _IDLE
    return own or any(map(_contains_work, event.cpu_children))


def _within_list(event: Any) -> bool:
    """Whether an event is of an operator on lists of tensors, or within one: on a GPU that is one launch or few."""
    while event is not None:
        if event.name.startswith(tuple(f"aten::{name}" for name in _LISTS)):
            return True
        event = event.cpu_parent
    return False
