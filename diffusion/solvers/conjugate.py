"""Conjugate integrators (Pandey et al. 2024, "Efficient integrators for diffusion generative models", section 3; lambda-DDIM).

An ODE of a linear and a network's part is solved for z = A_t x, in which the linear part is whatever B_t one chooses. With
x_hat = x / c, w = sigma / c and o = (x_hat - D) / w every schedule's ODE is d x_hat / d w = o (see `runge_kutta`: o is the noise
where c = alpha, the flow's velocity where alpha(1) = 0 and c = alpha + sigma), so that for B_t = b

    A_t = e^(b t) / c_t,    dz = b z dt + e^(b t) o dw                                         (theorem 1)

and Euler's method, with the integral of what stands before the network solved, takes a step of h = s - t by

    x_hat_t = e^(b h) ((1 - b h) x_hat_s + o_s int_s^t e^(b (u - s)) dw(u)).

b = 0 is DDIM. The paper finds b by a search, of either sign; on mixtures -0.5 errs less than DDIM in few steps. One evaluation a
step, order 1.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._coefficients import at, hold, still
from diffusion.tableau import Row
from pilotwave.errors import UserError

_NODES, _MASSES = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(64))


def conjugate(schedule: NoiseSchedule, levels: Tensor, b: float = -0.5) -> list[Row]:
    """B_t = b, in the schedule's own time t. It does not keep the marginal of constant predictions, but where b = 0."""
    if not abs(b) < 50:
        raise UserError(f"conjugate's b must lie between -50 and 50; got {b}")
    alpha, sigma = at(schedule, levels)
    proper = bool((alpha[0] > 0).all())

    def rho(t: Tensor) -> Tensor:
        a, s = at(schedule, t)
        return s / (a if proper else a + s)

    c = alpha if proper else alpha + sigma
    rows = []
    for i in range(len(levels) - 1):
        s, t, same = levels[i], levels[i + 1], still(levels[i], levels[i + 1])
        h, w_s, w_t = s - t, rho(s), rho(t)
        # by parts: e^(-b h) w_t - w_s + b int_t^s e^(b (u - s)) w(u) du
        u = t[..., None] + h[..., None] * (_NODES + 1) / 2
        inner = h / 2 * (_MASSES * torch.exp(b * (u - s[..., None])) * rho(u)).sum(-1)
        gain = (torch.exp(-b * h) * w_t - w_s + b * inner) / w_s
        U_x = c[i + 1] / c[i] * torch.exp(b * h) * (1 - b * h + gain)
        U_d = c[i + 1] * torch.exp(b * h) * -gain
        rows.append(Row(s, t, hold(U_x, same, 1.0), hold(U_d, same, 0.0)))
    return rows
