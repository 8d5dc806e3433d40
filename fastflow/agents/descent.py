"""A step of Adam without what autograd and the optimizer do around it: gradients that are written in place, the fused
kernel called directly, and learning rates that a captured step reads where they lie."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Descent", "FlatGradients", "GradientStep", "hold_rates", "set_rate"]

GradientStep = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""From a batch, or a minibatch, to its metrics; what is learnt is changed in place."""


class FlatGradients:
    """Gradients of a network's parameters side by side in one piece of memory, for what computes them without autograd:
    written in place in every minibatch, with one norm and one factor for all of them.

    Attributes:
        size: how many numbers they are.
        flat: the memory, 1-d; made when it is first asked for.
        parts: a gradient per parameter, in their order.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.size = sum(p.numel() for p in self.parameters)

    @functools.cached_property
    def flat(self) -> Tensor:
        return self.parameters[0].detach().new_zeros(self.size)

    @functools.cached_property
    def parts(self) -> list[Tensor]:
        pieces = self.flat.split([p.numel() for p in self.parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    def attach(self) -> None:
        """Makes them the parameters' gradients."""
        for parameter, part in zip(self.parameters, self.parts, strict=True):
            parameter.grad = part


class Descent:
    """Steps of a fused Adam or AdamW as one call for each group: the optimizer itself takes several times as long to
    look at what it holds, and refuses to be captured in a CUDA graph.

    Args:
        optimizer: whose state has moments for every parameter, all on one device, without amsgrad and maximize; its
            other hyperparameters are read at every step.
    """

    def __init__(self, optimizer: torch.optim.Adam) -> None:
        self.optimizer = optimizer
        self._held: list[tuple[list[Tensor], ...]] = []  # by group: parameters, both moments, step counts
        self._counts: list[Tensor] = []  # all step counts, in as few pieces as they lie in

    def step(self) -> None:
        """`optimizer.step()` without its hooks. A parameter without a gradient stays as it is."""
        groups = self.optimizer.param_groups
        if torch.compiler.is_compiling() or not all(group["fused"] for group in groups):
            self.optimizer.step()
            return
        state = self.optimizer.state
        if not self._held or self._held[0][1][0] is not state[groups[0]["params"][0]]["exp_avg"]:
            self._look_up()
        grads: list[list[Tensor]] = [[p.grad for p in group["params"]] for group in groups]
        held, counts = self._held, self._counts
        if any(grad is None for of_group in grads for grad in of_group):
            held = [_with_gradient(of_group, lists) for of_group, lists in zip(grads, held, strict=True)]
            grads = [[grad for grad in of_group if grad is not None] for of_group in grads]
            counts = [step for *_, steps in held for step in steps]
        kernel: Any = torch._fused_adamw_ if isinstance(self.optimizer, torch.optim.AdamW) else torch._fused_adam_
        with torch.no_grad():
            if counts:
                torch._foreach_add_(counts, 1)
            for group, own, (parameters, means, squares, steps) in zip(groups, grads, held, strict=True):
                if not own:
                    continue
                kernel(
                    parameters,
                    own,
                    means,
                    squares,
                    [],
                    steps,
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                )

    def _look_up(self) -> None:
        state, names = self.optimizer.state, ("exp_avg", "exp_avg_sq", "step")
        self._held = [
            (group["params"], *([state[p][name] for p in group["params"]] for name in names))
            for group in self.optimizer.param_groups
        ]
        self._counts = [step for *_, steps in self._held for step in steps]
        whole = self._counts[0]._base
        if whole is not None and whole.numel() == len(self._counts) and all(s._base is whole for s in self._counts):
            self._counts = [whole]


def _with_gradient(grads: Sequence[Tensor | None], lists: Sequence[list[Tensor]]) -> tuple[list[Tensor], ...]:
    """Of each list, what belongs to a parameter that has a gradient."""
    return tuple([x for x, grad in zip(each, grads, strict=True) if grad is not None] for each in lists)


def hold_rates(optimizer: torch.optim.Adam, device: torch.device) -> None:
    """Puts the learning rates of all groups into 0-d tensors on `device`, where `set_rate` changes them in place: a
    captured step takes the address of its rate, and would keep the value of a number for ever.

    They are float32 on CUDA, whose fused kernel takes no other, and float64 elsewhere, which is exact.
    """
    dtype = torch.float32 if device.type == "cuda" else torch.float64
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], Tensor):
            group["lr"] = torch.full((), group["lr"], dtype=dtype, device=device)


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Gives an optimizer's group another learning rate; waits for no device."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
