"""DDPM (Ho et al. 2020) and DDIM (Song et al. 2021): from level s to t < s,

    x_t = alpha_t d + sqrt(sigma_t^2 - v) (x_s - alpha_s d) / sigma_s + sqrt(v) z,
    v   = eta^2 (sigma_t^2 / sigma_s^2) (sigma_s^2 - (alpha_s / alpha_t)^2 sigma_t^2)        (DDIM, eqs. 12 and 16)

eta = 1 is DDPM's posterior; its larger variance is beta = sigma_s^2 - (alpha_s / alpha_t)^2 sigma_t^2 (section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._coefficients import at, hold, plain, still
from diffusion.tableau import Row
from pilotwave.errors import UserError, nearest

VARIANCES = {"small": 0.0, "large": 1.0}


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


def ddpm(schedule: NoiseSchedule, levels: Tensor, variance: str | float | Sequence[float] | Tensor = "small") -> list[Row]:
    """Ancestral sampling: the posterior's mean (DDPM, eq. 7), its variance ("small") or beta ("large").

    Between them it is exp(v log large + (1 - v) log small) with a fraction v (Nichol and Dhariwal 2021, eq. 15): one number, one
    for every step, or the network's own ("learned"), which `denoise` then returns beside the data (`Denoiser.with_variance`).
    The last step, to t = 0, adds no noise.
    """
    if variance == "learned":
        return _learned(schedule, levels)
    if isinstance(variance, str):
        if variance not in VARIANCES:
            raise nearest("ddpm variance", variance, [*VARIANCES, "learned"])
        variance = VARIANCES[variance]
    alpha, sigma = at(schedule, levels)
    fraction = torch.as_tensor(variance, dtype=torch.float64)
    inside = bool(((fraction >= 0) & (fraction <= 1)).all())
    if fraction.shape not in ((), (len(levels) - 1,)) or not inside:
        raise UserError(f"ddpm variance must be small, large, learned, or fractions in [0, 1], one or one a step; got {variance}")
    fraction = fraction.expand(len(levels) - 1)
    rows = []
    for i in range(len(levels) - 1):
        a_s, s_s, a_t, s_t = alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]
        beta = (s_s**2 - (a_s / a_t) ** 2 * s_t**2).clamp_min(0)
        small = beta * s_t**2 / s_s**2
        v = torch.where(s_t > 0, beta ** fraction[i] * small ** (1 - fraction[i]), torch.zeros_like(beta))
        rows.append(_row(levels, i, a_s / a_t * s_t**2 / s_s**2, a_t * beta / s_s**2, torch.sqrt(v)))
    return rows


def _learned(schedule: NoiseSchedule, levels: Tensor) -> list[Row]:
    """DDPM with log U_z = 1/2 (log small + v (log large - log small)); no noise where the step ends clean or none is made."""
    alpha, sigma = at(schedule, levels)
    none = torch.full_like(sigma[0], -torch.inf)
    rows = []
    for i, row in enumerate(ddpm(schedule, levels)):
        quiet = still(levels[i], levels[i + 1]) | (sigma[i + 1] <= 0)
        beta = sigma[i] ** 2 - (alpha[i] / alpha[i + 1] * sigma[i + 1]) ** 2
        log_small = (torch.log(beta) + 2 * torch.log(sigma[i + 1] / sigma[i])) / 2
        between = hold(torch.log(sigma[i] / sigma[i + 1]), quiet, 0.0)
        rows.append(replace(row, U_z=0.0, V=(plain(torch.where(quiet, none, log_small)), between)))
    return rows


def _row(levels: Tensor, i: int, U_x: Tensor, U_d: Tensor, U_z: Tensor) -> Row:
    same = still(levels[i], levels[i + 1])
    return Row(levels[i], levels[i + 1], hold(U_x, same, 1.0), hold(U_d, same, 0.0), (), hold(U_z, same, 0.0))
