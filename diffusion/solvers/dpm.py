"""DPM-Solver (Lu et al. 2022a): exponential integrators for the noise prediction e(x, s) = (x - alpha_s D(x, s)) / sigma_s.

With h = lambda_t - lambda_s and the points between at fractions r of h, dpm_k makes k evaluations a step and remembers none.
A step to t = 0 (h = inf) is first order, DDIM's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._coefficients import at, noise_form
from diffusion.solvers._singlestep import combine, middles, singlestep
from diffusion.solvers.ddim import ddim
from diffusion.tableau import Row


def _noise(x: Sequence[Tensor], a: Tensor, s: Tensor) -> list[Tensor]:
    """Weights of (x - alpha D) / sigma, D being the newest prediction."""
    return [*(w / s for w in x), -a / s]


def _gain(a: Tensor, s: Tensor, i: int) -> Tensor:
    """- sigma_i (e^(lambda_i - lambda_s) - 1), which takes x_s = alpha_s d + sigma_s e to alpha_i d + sigma_i e."""
    return s[i] - a[i] / a[0] * s[0]


def dpm_1(schedule: NoiseSchedule, levels: Tensor) -> list[Row]:
    """First order (eq. 3.7), which is DDIM."""
    noise_form(schedule, at(schedule, levels)[0])
    return ddim(schedule, levels)


def dpm_2(schedule: NoiseSchedule, levels: Tensor) -> list[Row]:
    """Second order (algorithm 1, r = 1/2):

    u = (alpha_m / alpha_s) x_s - sigma_m (e^(h/2) - 1) e(x_s, s),    x_t = (alpha_t / alpha_s) x_s - sigma_t (e^h - 1) e(u, m)
    """
    noise_form(schedule, at(schedule, levels)[0])

    def step(a: Tensor, s: Tensor, h: Tensor) -> list[list[Tensor]]:
        x = [torch.ones_like(h)]
        e_s = _noise(x, a[0], s[0])
        u = combine((a[1] / a[0], x), (_gain(a, s, 1), e_s))
        return [u, combine((a[2] / a[0], x), (_gain(a, s, 2), _noise(u, a[1], s[1])))]

    return singlestep(schedule, levels, middles(schedule, levels, (1 / 2,)), step)


def dpm_3(schedule: NoiseSchedule, levels: Tensor) -> list[Row]:
    """Third order (algorithm 2, r_1 = 1/3, r_2 = 2/3), with phi(h) = (e^h - 1) / h - 1 and D_i = e(u_i, s_i) - e(x_s, s):

    u_1 = (alpha_1 / alpha_s) x_s - sigma_1 (e^(h/3) - 1) e_s
    u_2 = (alpha_2 / alpha_s) x_s - sigma_2 (e^(2h/3) - 1) e_s - 2 sigma_2 phi(2h/3) D_1
    x_t = (alpha_t / alpha_s) x_s - sigma_t (e^h - 1) e_s - 3/2 sigma_t phi(h) D_2
    """
    noise_form(schedule, at(schedule, levels)[0])

    def phi(h: Tensor) -> Tensor:
        return torch.expm1(h) / h - 1

    def step(a: Tensor, s: Tensor, h: Tensor) -> list[list[Tensor]]:
        x = [torch.ones_like(h)]
        e_s = _noise(x, a[0], s[0])
        u_1 = combine((a[1] / a[0], x), (_gain(a, s, 1), e_s))
        c = 2 * s[2] * phi(2 * h / 3)
        u_2 = combine((a[2] / a[0], x), (c + _gain(a, s, 2), e_s), (-c, _noise(u_1, a[1], s[1])))
        c = 1.5 * s[3] * phi(h)
        return [u_1, u_2, combine((a[3] / a[0], x), (c + _gain(a, s, 3), e_s), (-c, _noise(u_2, a[2], s[2])))]

    return singlestep(schedule, levels, middles(schedule, levels, (1 / 3, 2 / 3)), step)
