"""Running mean and variance of what an agent sees, from parallel batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["RunningStatistics"]


class RunningStatistics:
    """Mean and variance of all rows seen so far, by the pairwise update of Chan, Golub and LeVeque (1979), which is to
    batches what Welford's is to single rows.

    Sums are kept in float64, and nothing changes but by `update`: between two updates the same observation gives the
    same normalised one, to the last bit.

    Args:
        width: numbers in a row.
        device: where it lives.
        limit: normalised numbers are clamped to [-limit, limit].

    Attributes:
        count: 0-d, mean: [width], sum_of_squares: [width], of differences from the mean; all float64.
    """

    def __init__(self, width: int, *, device: torch.device | str = "cpu", limit: float = 10.0) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.sum_of_squares = torch.zeros(width, dtype=torch.float64, device=device)
        self.limit = limit
        self._kept: tuple[Any, Tensor, Tensor] | None = None  # mean and std of `normalize`, behind what they are of

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Takes in rows [..., width].

        Raises:
            ValueError: rows of another width.
        """
        if rows.shape[-1] != self.mean.shape[0]:
            raise ValueError(f"RunningStatistics: rows must be [..., {len(self.mean)}], got {list(rows.shape)}")
        rows = rows.reshape(-1, rows.shape[-1]).double()
        if not len(rows):
            return
        mean = rows.mean(0)
        squares = (rows - mean).square().sum(0)
        total = self.count + len(rows)
        shift = mean - self.mean
        self.sum_of_squares += squares + shift.square() * (self.count * len(rows) / total)
        self.mean += shift * (len(rows) / total)
        self.count.copy_(total)

    @property
    def std(self) -> Tensor:
        """Standard deviation [width], float64; 1 before anything was seen, and at least 1e-4."""
        variance = self.sum_of_squares / self.count.clamp(min=1)
        return torch.where(self.count > 0, variance.clamp(min=1e-8).sqrt(), torch.ones_like(variance))

    def normalize(self, rows: Tensor) -> Tensor:
        """(rows - mean) / std, clamped, in the rows' dtype."""
        mean, std = self._moments(rows.dtype)
        return ((rows - mean) / std).clamp(-self.limit, self.limit)

    def _moments(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and std in a dtype. A rollout asks for them at every step, and they change once in an update."""
        mine = (self.count, self.mean, self.sum_of_squares)
        if torch.compiler.is_compiling() or any(x.is_inference() for x in mine):
            return self.mean.to(dtype), self.std.to(dtype)
        # Tensors count what is done to them in place, be it by `update` or by whoever loads a state.
        key = (dtype, *((id(x), x._version) for x in mine))
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False):  # kept for every caller
                self._kept = (key, self.mean.to(dtype), self.std.to(dtype))
        return self._kept[1:]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors it consists of, by name: what a checkpoint holds."""
        return {"count": self.count, "mean": self.mean, "sum_of_squares": self.sum_of_squares}
