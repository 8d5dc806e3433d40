"""The diffusion counterpart of a successor flow: the same network predicts noise, and DDIM samples (TD-Flow, section
3.1 and appendices B and C.3.2).

Levels s run from 0 (data) to 1 (noise), against the time of the flows: the network sees t = 1 - s. The schedule is that
of `fastflow.density.alpha_bar`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.density import alpha_bar, diffusion_velocity
from fastflow.successor import SuccessorFlow

__all__ = ["LEVELS", "DiffusionSuccessor"]

LEVELS = 1000
"""Discrete levels of the loss, k / LEVELS for k = 1 .. LEVELS."""


class DiffusionSuccessor(SuccessorFlow):
    """A `SuccessorFlow` whose field predicts the noise in x = sqrt(alpha_bar) x_1 + sqrt(1 - alpha_bar) noise.

    `num_steps` are DDIM steps. They are evaluated one by one: DDIM is no walk that the fused integration knows.
    """

    def _walk(self, x_0: Tensor, cond: Tensor, num_steps: int) -> Tensor:
        return self.denoise(x_0, cond, torch.zeros((), dtype=x_0.dtype, device=x_0.device), num_steps)

    def noised(self, x_1: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """x_1 [B, D] at `level` [B]."""
        signal = alpha_bar(level).unsqueeze(-1)
        return signal.sqrt() * x_1 + (1 - signal).sqrt() * noise

    def denoise(self, x: Tensor, cond: Tensor, stop: Tensor, num_steps: int) -> Tensor:
        """DDIM (Song et al., arXiv:2010.02502, eq. 12 with sigma = 0) from level 1 to `stop`, without gradient.

        x [B, D] or [B, n, D] noise, cond [B, C], stop 0-d or [B].
        """
        stop = stop.expand(x.shape[:1]).view(-1, *(1 for _ in x.shape[1:-1])).expand(x.shape[:-1])
        for k in range(num_steps):
            # Weighed at both ends: the last step ends exactly at `stop`.
            now, after = ((1 - i / num_steps) + i / num_steps * stop for i in (k, k + 1))
            noise = self.velocity(x, 1 - now, cond)
            here, there = alpha_bar(now).unsqueeze(-1), alpha_bar(after).unsqueeze(-1)
            x = (there / here).sqrt() * (x - (1 - here).sqrt() * noise) + (1 - there).sqrt() * noise
        return x

    def density_velocity(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return diffusion_velocity(lambda y, level: self.field(y, 1 - level, cond), x, t)
