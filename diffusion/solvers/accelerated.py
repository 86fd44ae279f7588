"""The provably accelerated DDIM and DDPM (Li et al. 2024, "Accelerating convergence of score-based diffusion models, provably").

With the score S(x, s) = -(x - alpha_s D(x, s)) / sigma_s^2 and r = (alpha_s / alpha_t)^2 of the step from s to t. Both are
expansions in 1 - r, made for many steps of schedules that keep the variance: alpha^2 + sigma^2 = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._coefficients import at, hold, still
from diffusion.tableau import Row
from pilotwave.errors import UserError


def _ratios(schedule: NoiseSchedule, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, sigma, and r of every step."""
    # of the schedule, not of these levels: the linear flow keeps it at both ends
    alpha, sigma = at(schedule, torch.linspace(0, 1, 9, dtype=torch.float64))
    if not torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-6):
        raise UserError(
            f"the accelerated samplers are made for schedules that keep the variance (vp_linear, vp_cosine, from_betas); got "
            f"'{schedule.name}'"
        )
    alpha, sigma = at(schedule, levels)
    return alpha, sigma, (alpha[:-1] / alpha[1:]) ** 2


def ddim_accelerated(schedule: NoiseSchedule, levels: Tensor) -> list[Row]:
    """Second order: S is evaluated again at the level u before s, on the way back there (eq. 10), two evaluations a step.

    y   = r_u^(1/2) (x_s - (1 - r_u) / 2 S(x_s, s))
    x_t = r^(-1/2) (x_s + (1 - r) / 2 S(x_s, s) + (1 - r)^2 / (4 (1 - r_u)) (S(x_s, s) - r_u^(1/2) S(y, u)))

    The first step, which has no level before it, goes without the last term.
    """
    alpha, sigma, ratio = _ratios(schedule, levels)
    rows: list[Row] = []
    for i, r in enumerate(ratio):
        s, t, same = levels[i], levels[i + 1], still(levels[i], levels[i + 1])
        S_x, S_d = -1 / sigma[i] ** 2, alpha[i] / sigma[i] ** 2
        c, back = (1 - r) / 2, torch.zeros_like(r)
        if i == 0:
            rows.append(Row(s, t, hold((1 + c * S_x) / r.sqrt(), same, 1.0), hold(c * S_d / r.sqrt(), same, 0.0)))
            continue
        b = 1 - ratio[i - 1]
        back = torch.where(b > 0, (1 - r) ** 2 / (4 * b), back)
        y_x, y_d = (1 - b).sqrt() * (1 - b / 2 * S_x), -(1 - b).sqrt() * b / 2 * S_d
        again = torch.where(b > 0, back * (1 - b).sqrt() / sigma[i - 1] ** 2, torch.zeros_like(r))
        U_x, U_1 = 1 + (c + back) * S_x + again * y_x, (c + back) * S_d + again * y_d
        U_2 = -again * alpha[i - 1]
        rows.append(Row(s, s, 1.0))
        P = (hold(y_x, same, 1.0), (hold(y_d, same, 0.0),), 0.0)
        U = (hold(U_1 / r.sqrt(), same, 0.0),)
        rows.append(Row(levels[i - 1], t, hold(U_x / r.sqrt(), same, 1.0), hold(U_2 / r.sqrt(), same, 0.0), U, P=P))
    return rows


def ddpm_accelerated(schedule: NoiseSchedule, levels: Tensor) -> list[Row]:
    """Half of the noise is added before the evaluation, and half after (eq. 13); one evaluation a step.

    y = x_s + ((1 - r) / 2)^(1/2) z,    x_t = r^(-1/2) (y + (1 - r) S(y, s) + ((1 - r) / 2)^(1/2) z')
    """
    alpha, sigma, ratio = _ratios(schedule, levels)
    rows: list[Row] = []
    for i, r in enumerate(ratio):
        s, t, same = levels[i], levels[i + 1], still(levels[i], levels[i + 1])
        half, weight = ((1 - r) / 2).clamp_min(0).sqrt(), (1 - r) / sigma[i] ** 2
        rows.append(Row(s, s, 1.0, U_z=hold(half, same, 0.0), evaluate=False))
        U_x, U_d = (1 - weight) / r.sqrt(), weight * alpha[i] / r.sqrt()
        rows.append(Row(s, t, hold(U_x, same, 1.0), hold(U_d, same, 0.0), U_z=hold(half / r.sqrt(), same, 0.0)))
    return rows
