"""Runge-Kutta methods on the probability-flow ODE (Karras et al. 2022, eq. 1 and algorithm 1).

With x_hat = x / c and w = sigma / c every schedule's ODE is d x_hat / d w = (x_hat - D) / w: for c = alpha (EDM's own
form), and for c = alpha + sigma, which stays finite where alpha(1) = 0 (under the linear flow it is the flow's own ODE,
w = t). Euler's method is the same in both, and is DDIM with eta = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._coefficients import at, hold, level_at, plain, still
from diffusion.solvers._singlestep import singlestep
from diffusion.solvers.ddim import ddim
from diffusion.tableau import Row


def euler(schedule: NoiseSchedule, levels: Tensor) -> list[Row]:
    """x_hat_t = x_hat_s + (rho_t - rho_s) (x_hat_s - d) / rho_s."""
    return ddim(schedule, levels)


def heun(schedule: NoiseSchedule, levels: Tensor) -> list[Row]:
    """Heun's second-order method; the step to sigma = 0, where the slope is not defined, is Euler's.

    Two rows a step: the first evaluates d_1 at x_s and leaves x, the second evaluates d_2 at Euler's x', and
    x_hat_t = x_hat_s + (w_t - w_s) / 2 ((x_hat_s - d_1) / w_s + (x'_hat - d_2) / w_t), or, with r = w_t / w_s,
    x_t = (sigma_t / sigma_s) x_s + c_t (1 - r) (2 - 1 / r) / 2 d_1 + c_t (1 / r - 1) / 2 d_2.
    """
    alpha, sigma = at(schedule, levels)
    c = alpha if bool((alpha[0] > 0).all()) else alpha + sigma
    rows: list[Row] = []
    for i, first in enumerate(euler(schedule, levels)):
        s, t, ends = levels[i], levels[i + 1], sigma[i + 1] <= 0
        if bool(ends.all()):
            rows.append(first)
            continue
        r = sigma[i + 1] * c[i] / (c[i + 1] * sigma[i])
        U_1, U_d = c[i + 1] * (1 - r) * (2 - 1 / r) / 2, c[i + 1] * (1 / r - 1) / 2
        # tokens that arrive at sigma = 0 before the others take Euler's step, those that stay take none
        euler_d = torch.as_tensor(first.U_d, dtype=r.dtype).expand_as(r)
        single = ends | still(s, t)
        rows.append(Row(s, s, 1.0))
        P = (first.U_x, (first.U_d,), 0.0)
        U = (plain(torch.where(single, euler_d, U_1)),)
        rows.append(Row(t, t, first.U_x, hold(U_d, single, 0.0), U, 0.0, P))
    return rows


def midpoint(schedule: NoiseSchedule, levels: Tensor) -> list[Row]:
    """The explicit midpoint method, second order; of the linear flow it is the flow's own (Lipman et al. 2023, appendix D).

    x_hat_m = x_hat_s + (w_m - w_s) (x_hat_s - d_1) / w_s,    w_m = (w_s + w_t) / 2
    x_hat_t = x_hat_s + (w_t - w_s) (x_hat_m - d_2) / w_m
    """
    alpha, sigma = at(schedule, levels)
    proper = bool((alpha[0] > 0).all())
    w = sigma / (alpha if proper else alpha + sigma)
    w_m = (w[1:] + w[:-1]) / 2
    between = level_at(schedule, -torch.log(w_m) if proper else torch.log1p(-w_m) - torch.log(w_m))
    between = torch.where(still(levels[:-1], levels[1:]), levels[1:], between)[:, None]

    def step(a: Tensor, s: Tensor, h: Tensor) -> list[list[Tensor]]:
        c = a if proper else a + s
        w_s, w_m, w_t = s / c
        x, d = c[1] / c[0] * w_m / w_s, c[1] * (1 - w_m / w_s)
        back = c[2] * (w_t - w_s) / w_m
        return [[x, d], [c[2] / c[0] + back * x / c[1], back * d / c[1], -back]]

    return singlestep(schedule, levels, between, step, infinite=True)
