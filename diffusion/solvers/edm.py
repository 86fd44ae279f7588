"""EDM's stochastic sampler (Karras et al. 2022, algorithm 2): noise is added before every Heun step, and more of it taken away.

In its coordinates, x_hat = x / alpha and rho = sigma / alpha, from rho to rho_hat = rho (1 + gamma) and on by Heun's step:

    x_hat + (rho_hat^2 - rho^2)^(1/2) S_noise z,    gamma = min(S_churn / steps, sqrt(2) - 1) where S_min <= rho <= S_max, else 0
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._coefficients import at, level_at, noised, still
from diffusion.solvers.runge_kutta import heun
from diffusion.tableau import Row
from pilotwave.errors import UserError


def edm(
    schedule: NoiseSchedule,
    levels: Tensor,
    churn: float = 10.0,
    low: float = 0.05,
    high: float = 50.0,
    noise: float = 1.0,
) -> list[Row]:
    """S_churn, S_min, S_max and S_noise of the paper. Noise never exceeds that of t = 1, which the network has not seen."""
    if churn < 0 or noise < 0:
        raise UserError(f"edm's churn and noise must not be negative; got {churn} and {noise}")
    alpha, sigma = at(schedule, levels)
    rho, gamma = sigma[:-1] / alpha[:-1], min(churn / (len(levels) - 1), math.sqrt(2) - 1)
    stirred = (rho >= low) & (rho <= high) & ~still(levels[:-1], levels[1:])
    higher = torch.where(stirred, level_at(schedule, -torch.log(rho * (1 + gamma))), levels[:-1])
    rows: list[Row] = []
    for before, s, t in zip(levels, higher if gamma > 0 else levels, levels[1:]):
        if bool((s > before).any()):
            rows.append(noised(schedule, before, s, noise))
        rows += heun(schedule, torch.stack([s, t]))
    return rows
