"""What every family shares: exact arithmetic on levels, and tokens whose level does not move."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.tableau import Coefficient, Row
from pilotwave.errors import UserError


def plain(c: Tensor) -> Coefficient:
    """A float when the coefficient is one number, the tensor when it differs by token."""
    first = c.flatten()[0]
    return float(first) if bool((c == first).all()) else c


def still(s: Tensor, t: Tensor) -> Tensor:
    """True for tokens whose level stays (pinned, or already clean): they keep x and take nothing else."""
    return s == t


def hold(c: Tensor, where: Tensor, value: float) -> Coefficient:
    return plain(torch.where(where, torch.full_like(c, value), c))


def at(schedule: NoiseSchedule, levels: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma in float64."""
    return schedule.alpha(levels), schedule.sigma(levels)


def noise_form(schedule: NoiseSchedule, alpha: Tensor) -> None:
    """Methods that predict the noise divide by alpha: `UserError` where some level has none of the data left."""
    if bool((alpha <= 0).any()):
        raise UserError(
            f"this sampler predicts the noise, which is not defined at t = 1 of '{schedule.name}' (pure noise); "
            "begin below it, as with steps=[0.99, ..., 0], or take one that predicts data (dpmpp_2m, unipc_2, sa, heun)"
        )


def level_at(schedule: NoiseSchedule, lmbda: Tensor) -> Tensor:
    """The level t whose log(alpha / sigma) is lmbda, by bisection to the last bit; 0 and 1 beyond the schedule's ends."""
    low, high = torch.zeros_like(lmbda), torch.ones_like(lmbda)
    for _ in range(64):
        middle = (low + high) / 2
        noisier = schedule.log_snr(middle) < lmbda
        low, high = torch.where(noisier, low, middle), torch.where(noisier, middle, high)
    return high


def noised(schedule: NoiseSchedule, s: Tensor, t: Tensor, scale: float = 1.0) -> Row:
    """A row that evaluates nothing and adds noise, from level s up to t; `scale` multiplies what is added."""
    (a_s, s_s), (a_t, s_t) = at(schedule, s), at(schedule, t)
    kept, same = a_t / a_s, still(s, t)
    added = scale * torch.sqrt((s_t**2 - (kept * s_s) ** 2).clamp_min(0))
    return Row(s, t, hold(kept, same, 1.0), U_z=hold(added, same, 0.0), evaluate=False)
