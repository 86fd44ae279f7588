"""Classifier-free guidance (Ho and Salimans 2021, eq. 6), written for the predicted data, with d_c given a condition, d_u without:

    d = d_u + w (d_c - d_u)                                        w = scale: 1 is the conditional model, 0 the other
    d <- (phi std(d_c) / std(d) + 1 - phi) d                       rescale phi (Lin et al. 2023, eqs. 15 and 16), std of each sample

Guidance in a limited interval (Kynkaanniemi et al. 2024) has w at levels low < t <= high and 1 elsewhere. With w = 1 samples
follow p(x | c). With another p(x) p(c | x)^w is what is meant, but reached only where p(x) and p(x | c) are Gaussians of one
covariance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.denoiser import broadcast_levels


@dataclass(frozen=True)
class ClassifierFree:
    """A denoiser, `sample(ClassifierFree(denoise, c, null, w), table, x_T)`: one call of `denoise` with twice the batch.

    denoise(x, t, condition) -> predicted clean x, as `Denoiser` is called; condition and null (B, C) or (1, C). Outside of the
    interval the batch is not doubled. Where the conditional prediction is there already, `guide` is the same as a hook, with one
    more call: `sample(conditional, table, x_T, guide=ClassifierFree(...).guide)`.
    """

    denoise: Callable[[Tensor, Tensor, Tensor], Tensor]
    condition: Tensor
    null: Tensor
    scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        condition = self._expand(self.condition, x)
        if not self._inside(t).any():
            return self.denoise(x, t, condition)
        levels = t if t.ndim == 0 or len(t) == 1 else torch.cat([t, t])
        conditions = torch.cat([condition, self._expand(self.null, x)])
        d_c, d_u = self.denoise(torch.cat([x, x]), levels, conditions).chunk(2)
        return self._combine(d_c, d_u, t)

    def guide(self, d: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """The hook's form: d is the conditional prediction of y."""
        if not self._inside(t).any():
            return d
        return self._combine(d, self.denoise(y, t, self._expand(self.null, y)), t)

    def _inside(self, t: Tensor) -> Tensor:
        low, high = self.interval
        return (t > low) & (t <= high)

    def _combine(self, d_c: Tensor, d_u: Tensor, t: Tensor) -> Tensor:
        w = torch.where(broadcast_levels(self._inside(t), d_c, None), self.scale, 1.0).to(d_c.dtype)
        d = torch.lerp(d_u, d_c, w)
        if not self.rescale:
            return d
        axes = tuple(range(1, d.ndim))
        ratio = d_c.std(axes, keepdim=True) / d.std(axes, keepdim=True)
        return (self.rescale * ratio + 1 - self.rescale) * d

    @staticmethod
    def _expand(condition: Tensor, x: Tensor) -> Tensor:
        return condition.expand(len(x), *condition.shape[1:])
