"""Noise levels as features."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class _Frequencies(nn.Module):
    """`omega`, which stays in float32 when the network is cast: in bfloat16 a phase of 1000 t would be off by radians."""

    omega: Tensor

    def __init__(self, omega: Tensor) -> None:
        super().__init__()
        self.register_buffer("omega", omega, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.omega
        super()._apply(fn, recurse)
        self.omega = exact.to(self.omega.device)
        return self


class FourierFeatures(_Frequencies):
    """x (..., F) -> (..., F (1 + 2 n)): x beside sin and cos of pi 2^k x, k = 0 .. n - 1 (Tancik et al. 2020).

    They let a network see sharp borders, such as a maze's walls, in smooth coordinates.
    """

    def __init__(self, features: int, frequencies: int) -> None:
        super().__init__(math.pi * 2.0 ** torch.arange(frequencies))
        self.output_dim = features * (1 + 2 * frequencies)

    def forward(self, x: Tensor) -> Tensor:
        phase = (x[..., None] * self.omega).flatten(-2)
        return torch.cat([x, phase.sin(), phase.cos()], dim=-1)


class LevelEmbedding(_Frequencies):
    """Levels t (..., groups) in [0, 1] -> (..., width): sinusoids of 1000 t (Vaswani et al. 2017), then a small MLP."""

    def __init__(self, groups: int, width: int, frequencies: int = 32) -> None:
        scale = torch.exp(-math.log(10_000.0) * torch.arange(frequencies) / max(frequencies - 1, 1))
        super().__init__(1000.0 * scale)
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies * groups, width), nn.SiLU(), nn.Linear(width, width))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.mlp.parameters()).dtype

    def forward(self, t: Tensor) -> Tensor:
        phase = t[..., None] * self.omega
        features = torch.cat([phase.sin(), phase.cos()], dim=-1).flatten(-2)
        return self.mlp(features.to(self.dtype))
