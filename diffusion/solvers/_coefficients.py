"""What every family shares: exact arithmetic on levels, and tokens whose level does not move."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.tableau import Coefficient


def plain(c: Tensor) -> Coefficient:
    """A float when the coefficient is one number, the tensor when it differs by token."""
    return float(c) if c.ndim == 0 else c


def still(s: Tensor, t: Tensor) -> Tensor:
    """True for tokens whose level stays (pinned, or already clean): they keep x and take nothing else."""
    return s == t


def hold(c: Tensor, where: Tensor, value: float) -> Coefficient:
    return plain(torch.where(where, torch.full_like(c, value), c))


def at(schedule: NoiseSchedule, levels: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma in float64."""
    return schedule.alpha(levels), schedule.sigma(levels)
