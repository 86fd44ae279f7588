"""What the families that follow gradients share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule

LogP = Callable[[Tensor], Tensor]


def gradient(log_p: LogP, x: Tensor) -> Tensor:
    """grad_x log_p(x), for log_p (B, ...) -> (B,), in whatever mode the caller is."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(log_p(x).sum(), x)[0]


def shift(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """sigma^2 / alpha: what a gradient of log p at x_t moves E[x_0 | x_t] by (Tweedie).

    At the pure noise of a linear flow (alpha 0) no gradient is left to be multiplied; the bound keeps 0 / 0 away.
    """
    return schedule.sigma(t) ** 2 / schedule.alpha(t).clamp_min(1e-6)
