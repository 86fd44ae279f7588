"""A mixture tilted by exp(r(x)), which is a mixture again: what guided samples should follow, and how far off they are."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion import NoiseSchedule
from tests.mixture import PLANE, Mixture

# r(x) = b . x - x . A x / 2 moves the weight of PLANE's first component from 0.4 to 0.88
LINEAR = torch.tensor([-1.2, 1.6], dtype=torch.float64)
QUADRATIC = torch.tensor([[1.0, 0.4], [0.4, 1.8]], dtype=torch.float64)
TILTED = PLANE.tilted(LINEAR, QUADRATIC)
FIRST = Mixture(torch.ones(1, dtype=torch.float64), PLANE.means[:1], PLANE.covariances[:1])  # p(x | the first component)


def reward(x: Tensor) -> Tensor:
    """r of x (..., 2), (...)."""
    b, A = LINEAR.to(x.dtype), QUADRATIC.to(x.dtype)
    return x @ b - 0.5 * ((x @ A) * x).sum(-1)


def exact_energy(schedule: NoiseSchedule, truth: Mixture = TILTED):
    """log E[exp r(x_0) | x_t] up to a constant: the log density of `truth` under noise, over that of PLANE."""
    return lambda x, t: truth.noised(schedule, t).log_density(x) - PLANE.noised(schedule, t).log_density(x)


def begin(schedule: NoiseSchedule, n: int, seed: int = 0) -> Tensor:
    """x_T (n, 2)."""
    z = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return z * schedule.sigma(torch.ones((), dtype=torch.float64))


def deviations(x: Tensor, truth: Mixture = TILTED, groups: int = 0) -> Tensor:
    """How many standard errors mean, second moments and shares of components are off, worst first.

    Rows of x (n, 2) are independent, or `groups` parts of it are.
    """
    gap = x - truth.mean()
    second = (gap[:, :, None] * gap[:, None, :] - truth.covariance()).flatten(1)
    off = torch.cat([gap, second, truth.shares(x) - truth.weights], 1).unflatten(0, (groups or len(x), -1)).mean(1)
    return (off.mean(0).abs() / (off.std(0) / len(off) ** 0.5)).sort(descending=True).values
