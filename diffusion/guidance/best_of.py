"""Best of n: n samples are drawn for each that is wanted, and the one of greatest reward is kept (Stiennon et al. 2020).

It knows no energy to tilt by: its density is n p(x) P(r(x') < r(x))^(n - 1), further out the larger n. With a temperature T one is
drawn with probability softmax(r / T), which gives p(x) exp(r(x) / T) as n grows (sampling-importance resampling, Rubin 1987).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.guidance._particles import Reward, draw, grouped, rows


@dataclass(frozen=True)
class BestOf:
    """`BestOf(reward, n).finish(sample(denoise, table, x_T))`: (groups * n, ...) -> (groups, ...)."""

    reward: Reward
    n: int
    temperature: float = 0.0
    generator: torch.Generator | None = None

    def finish(self, x_0: Tensor) -> Tensor:
        return x_0[rows(draw(grouped(self.reward(x_0), self.n), self.temperature, self.generator), self.n)]
