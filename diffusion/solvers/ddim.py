"""DDPM (Ho et al. 2020) and DDIM (Song et al. 2021): from level s to t < s,

    x_t = alpha_t d + sqrt(sigma_t^2 - v) (x_s - alpha_s d) / sigma_s + sqrt(v) z,
    v   = eta^2 (sigma_t^2 / sigma_s^2) (sigma_s^2 - (alpha_s / alpha_t)^2 sigma_t^2)        (DDIM, eqs. 12 and 16)

eta = 1 is DDPM's posterior; its larger variance is beta = sigma_s^2 - (alpha_s / alpha_t)^2 sigma_t^2 (section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._coefficients import at, hold, still
from diffusion.tableau import Row
from pilotwave.errors import nearest


def ddim(schedule: NoiseSchedule, levels: Tensor, eta: float = 0.0) -> list[Row]:
    """DDIM; eta = 0 is deterministic, eta = 1 is DDPM with the posterior's variance."""
    alpha, sigma = at(schedule, levels)
    rows = []
    for i in range(len(levels) - 1):
        a_s, s_s, a_t, s_t = alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]
        beta = (s_s**2 - (a_s / a_t) ** 2 * s_t**2).clamp_min(0)
        v = eta**2 * (s_t / s_s) ** 2 * beta
        kept = torch.sqrt((s_t**2 - v).clamp_min(0)) / s_s
        rows.append(_row(levels, i, kept, a_t - a_s * kept, torch.sqrt(v)))
    return rows


def ddpm(schedule: NoiseSchedule, levels: Tensor, variance: str = "small") -> list[Row]:
    """Ancestral sampling: the posterior's mean (DDPM, eq. 7), its variance ("small") or beta ("large").

    The last step, to t = 0, adds no noise.
    """
    if variance not in ("small", "large"):
        raise nearest("ddpm variance", variance, ("small", "large"))
    alpha, sigma = at(schedule, levels)
    rows = []
    for i in range(len(levels) - 1):
        a_s, s_s, a_t, s_t = alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]
        beta = (s_s**2 - (a_s / a_t) ** 2 * s_t**2).clamp_min(0)
        small = beta * s_t**2 / s_s**2
        v = small if variance == "small" else torch.where(s_t > 0, beta, torch.zeros_like(beta))
        rows.append(_row(levels, i, a_s / a_t * s_t**2 / s_s**2, a_t * beta / s_s**2, torch.sqrt(v)))
    return rows


def _row(levels: Tensor, i: int, U_x: Tensor, U_d: Tensor, U_z: Tensor) -> Row:
    same = still(levels[i], levels[i + 1])
    return Row(levels[i], levels[i + 1], hold(U_x, same, 1.0), hold(U_d, same, 0.0), (), hold(U_z, same, 0.0))
