"""Parts of a gradient step that do not need each other, as branches of its CUDA graph.

What an actor learns and what a critic learns need the same batch and nothing of each other; so do a floq critic's loss
and that of the plain critic which is distilled from it. One behind the other, each leaves most of a GPU idle while its
few rows go from layer to layer. Where `GraphedUpdate` captures a step, `branch` puts such a part on a stream of its
own, which becomes a branch of the graph; everywhere else it calls a function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["Branch", "active", "allowed", "branch", "settled"]

T = TypeVar("T")
P = ParamSpec("P")

_allowed: ContextVar[bool] = ContextVar("fastflow branches", default=False)


@contextlib.contextmanager
def allowed(value: bool = True) -> Iterator[None]:
    """Whether a step that is captured within it has branches."""
    token = _allowed.set(value)
    try:
        yield
    finally:
        _allowed.reset(token)


def active() -> bool:
    """Whether `branch` makes branches here."""
    return not torch.compiler.is_compiling() and _allowed.get() and _capturing()


def _capturing() -> bool:
    # Without CUDA in torch the second asks for it.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Branch(Generic[T]):
    """A part that goes on beside what follows it, until `join`."""

    def __init__(self, result: T, stream: torch.cuda.Stream | None = None) -> None:
        self._result, self._stream = result, stream

    def join(self) -> T:
        """The part's result; what follows waits for it. Before that neither the result may be used, nor may anything
        that the part reads be given back or written to."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        return self._result


def branch(name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Branch[T]:
    """Call `function` beside what follows, until `Branch.join`.

    It may read what is there, must not write to what others read, and draws no random numbers. The way back of its
    losses belongs within it: `settled`.

    Args:
        name: for profiles.
    """
    if not active():
        return Branch(function(*args, **kwargs))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.profiler.record_function(f"branch {name}"), torch.cuda.stream(stream):
        return Branch(function(*args, **kwargs), stream)


def settled(loss: Tensor) -> Tensor:
    """Where branches are made, a loss whose gradients have been computed, so that its way back is in its branch; else
    the loss as it is, whose way back comes with that of all others."""
    if not (active() and loss.requires_grad):
        return loss
    loss.backward()
    return loss.detach()
