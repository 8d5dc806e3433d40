"""A step of Adam without what autograd and the optimizer do around it: gradients that are written in place, and the
fused kernel called directly."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Descent", "FlatGradients"]


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
    """Steps of a fused Adam or AdamW on the CPU as one call for each group: the optimizer itself takes several times as
    long to look at what it holds.

    Args:
        optimizer: whose state has moments for every parameter, without amsgrad and maximize; its other hyperparameters
            are read at every step.
    """

    def __init__(self, optimizer: torch.optim.Adam) -> None:
        self.optimizer = optimizer
        self._held: list[tuple[list[Tensor], ...]] = []  # by group: parameters, both moments, step counts
        self._counts: list[Tensor] = []  # all step counts, in as few pieces as they lie in

    def step(self) -> None:
        """`optimizer.step()`, without its hooks where every parameter has a gradient."""
        groups = self.optimizer.param_groups
        grads = [[p.grad for p in group["params"]] for group in groups]
        complete = all(grad is not None and grad.is_cpu for of_group in grads for grad in of_group)
        if torch.compiler.is_compiling() or not complete or not all(group["fused"] for group in groups):
            self.optimizer.step()
            return
        state = self.optimizer.state
        if not self._held or self._held[0][1][0] is not state[groups[0]["params"][0]]["exp_avg"]:
            self._look_up()
        kernel: Any = torch._fused_adamw_ if isinstance(self.optimizer, torch.optim.AdamW) else torch._fused_adam_
        with torch.no_grad():
            torch._foreach_add_(self._counts, 1)
            for group, own, (parameters, means, squares, steps) in zip(groups, grads, self._held, strict=True):
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
