"""DPM-Solver++ (Lu et al. 2022b): exponential integrators for the data prediction.

lambda = log(alpha / sigma) and h = lambda_t - lambda_s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._coefficients import at, hold, still
from diffusion.solvers.ddim import ddim
from diffusion.tableau import Row


def dpmpp_2m(schedule: NoiseSchedule, levels: Tensor) -> list[Row]:
    """The second-order multistep method (algorithm 2), with c = 1 / (2 r), r = h_previous / h:

        x_t = (sigma_t / sigma_s) x_s + alpha_t (1 - e^-h) ((1 + c) d - c d_1)

    The first step, and the last when it ends at t = 0 (h = inf), are first order (c = 0), as in the paper's code.
    """
    alpha, sigma = at(schedule, levels)
    lmbda = torch.log(alpha) - torch.log(sigma)
    rows = ddim(schedule, levels)[:1]
    for i in range(1, len(levels) - 1):
        s, t = levels[i], levels[i + 1]
        h, h_previous = lmbda[i + 1] - lmbda[i], lmbda[i] - lmbda[i - 1]
        c = h / (2 * h_previous)
        c = torch.where(torch.isfinite(c), c, torch.zeros_like(c))
        weight = alpha[i + 1] * -torch.expm1(-h)
        same = still(s, t)
        U_x = hold(sigma[i + 1] / sigma[i], same, 1.0)
        rows.append(Row(s, t, U_x, hold(weight * (1 + c), same, 0.0), (hold(-weight * c, same, 0.0),)))
    return rows
