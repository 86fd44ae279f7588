"""DPM-Solver++ (Lu et al. 2022b): exponential integrators for the data prediction.

lambda = log(alpha / sigma) and h = lambda_t - lambda_s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._adams import adams
from diffusion.solvers._singlestep import middles, singlestep
from diffusion.tableau import Row


def dpmpp_2s(schedule: NoiseSchedule, levels: Tensor) -> list[Row]:
    """The second-order singlestep method (algorithm 1, r = 1/2), two evaluations a step, with m halfway in lambda:

        u   = (sigma_m / sigma_s) x_s + alpha_m (1 - e^(-h / 2)) D(x_s, s)
        x_t = (sigma_t / sigma_s) x_s + alpha_t (1 - e^-h) D(u, m)

    A step to t = 0 (h = inf) is first order.
    """

    def step(a: Tensor, s: Tensor, h: Tensor) -> list[list[Tensor]]:
        none = torch.zeros_like(h)
        u = [s[1] / s[0], a[1] * -torch.expm1(-h / 2)]
        return [u, [s[2] / s[0], none, a[2] * -torch.expm1(-h)]]

    return singlestep(schedule, levels, middles(schedule, levels, (0.5,)), step)


def dpmpp_2m(schedule: NoiseSchedule, levels: Tensor) -> list[Row]:
    """The second-order multistep method (algorithm 2), with c = 1 / (2 r), r = h_previous / h:

        x_t = (sigma_t / sigma_s) x_s + alpha_t (1 - e^-h) ((1 + c) d - c d_1)

    The first step, and the last when it ends at t = 0 (h = inf), are first order (c = 0), as in the paper's code.
    """
    return adams(schedule, levels, 2, average="bh2")


def dpmpp_3m(schedule: NoiseSchedule, levels: Tensor) -> list[Row]:
    """The third-order multistep method (appendix B): the integral of the parabola through three predictions.

    `diffusers` halves the second derivative's term, which leaves it of second order; this is the integral itself.
    """
    return adams(schedule, levels, 3)


def dpmpp_2m_sde(schedule: NoiseSchedule, levels: Tensor) -> list[Row]:
    """SDE-DPM-Solver++(2M) (appendix C), which adds as much noise as DDPM does:

    x_t = (sigma_t / sigma_s) e^-h x_s + alpha_t (1 - e^-2h) ((1 + c) d - c d_1) + sigma_t (1 - e^-2h)^(1/2) z
    """
    return adams(schedule, levels, 2, tau=torch.ones_like(levels[1:]), average="bh2")
