"""Classifier guidance (Dhariwal and Nichol 2021, algorithm 1; Song et al. 2021, eq. 14), written for the predicted data:

    d <- d + scale (sigma_t^2 / alpha_t) grad_x log p(y | x_t)

At scale 1 it is exact: d becomes E[x_0 | x_t, y]. So it is with the intermediate energy (Lu et al. 2023)
log E[exp r(x_0) | x_t] for log p(y | x_t), which gives p(x_0) exp r(x_0). Any other scale, or a network that was trained on clean
data alone, is an approximation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from diffusion.guidance._gradient import gradient, shift
from diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class Classifier:
    """`sample(..., guide=Classifier(log_p, schedule))` with log_p(x_t, t): (B, ...), levels -> (B,)."""

    log_p: Callable[[Tensor, Tensor], Tensor]
    schedule: NoiseSchedule
    scale: float = 1.0

    def __call__(self, d: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return d + self.scale * shift(self.schedule, t) * gradient(lambda x: self.log_p(x, t), y)
