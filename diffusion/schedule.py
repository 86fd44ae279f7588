"""Noise schedules: x_t = alpha(t) x_0 + sigma(t) eps, with t = 0 clean and t = 1 pure noise.

Sources: VP linear (Song et al. 2021, eq. 33), VP cosine (Nichol and Dhariwal 2021, eq. 17, in the continuous form of
Lu et al. 2022, appendix D.4), discrete betas (Ho et al. 2020), EDM (Karras et al. 2022, table 1), linear flow
(Lipman et al. 2023; Liu et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusion._options import check_options
from pilotwave.errors import UserError, nearest

Function = Callable[[Tensor], Tensor]

# The cosine's end: alpha(1) = 0.0085 rather than 0, so that noise can be turned into data at t = 1 (Lu et al. 2022).
_COSINE_END, _COSINE_S = 0.9946, 0.008


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha(t), sigma(t) for t in [0, 1]; made by one of the named constructors. They keep t's shape and dtype.

    `config` is the plain data that `NoiseSchedule.from_config` rebuilds the same schedule from.
    """

    name: str
    alpha: Function
    sigma: Function
    config: dict[str, Any] = field(default_factory=dict)

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda(t) = log(alpha / sigma), half the log signal-to-noise ratio; +inf at t = 0."""
        return torch.log(self.alpha(t)) - torch.log(self.sigma(t))

    def snr(self, t: Tensor) -> Tensor:
        """alpha^2 / sigma^2; inf at t = 0."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t for levels `t` that broadcast to x_0."""
        return self.alpha(t) * x_0 + self.sigma(t) * eps

    @classmethod
    def vp_linear(cls, beta_min: float = 0.1, beta_max: float = 20.0) -> NoiseSchedule:
        """beta(t) linear in t; alpha = exp(-t^2 (beta_max - beta_min) / 4 - t beta_min / 2)."""

        def log_alpha(t: Tensor) -> Tensor:
            return -0.25 * t**2 * (beta_max - beta_min) - 0.5 * t * beta_min

        return cls(
            "vp_linear",
            lambda t: torch.exp(log_alpha(t)),
            lambda t: torch.sqrt(-torch.expm1(2 * log_alpha(t))),
            {"beta_min": beta_min, "beta_max": beta_max},
        )

    @classmethod
    def vp_cosine(cls) -> NoiseSchedule:
        """alpha(t) = cos(u + v) / cos(v), u = pi/2 T t / (1 + s), v = pi/2 s / (1 + s), s = 0.008, T = 0.9946.

        sigma(t)^2 = 1 - alpha(t)^2 = sin(u) sin(u + 2 v) / cos(v)^2, which does not cancel near t = 0.
        """
        scale = math.pi / 2 * _COSINE_END / (1 + _COSINE_S)
        v = math.pi / 2 * _COSINE_S / (1 + _COSINE_S)
        return cls(
            "vp_cosine",
            lambda t: torch.cos(scale * t + v) / math.cos(v),
            lambda t: torch.sqrt(torch.sin(scale * t) * torch.sin(scale * t + 2 * v)) / math.cos(v),
        )

    @classmethod
    def edm(cls, sigma_max: float = 80.0, rho: float = 7.0) -> NoiseSchedule:
        """alpha = 1, sigma = sigma_max t^rho: steps uniform in t are Karras et al.'s (eq. 5) with sigma_min = 0."""
        return cls("edm", torch.ones_like, lambda t: sigma_max * t**rho, {"sigma_max": sigma_max, "rho": rho})

    @classmethod
    def flow(cls) -> NoiseSchedule:
        """alpha = 1 - t, sigma = t: straight lines from data to noise."""
        return cls("flow", lambda t: 1 - t, lambda t: t)

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor) -> NoiseSchedule:
        """Discrete betas of length N: t = (i + 1) / N is step i, where alpha^2 = prod_{j <= i} (1 - beta_j).

        Between the steps lambda is linear in t; below the first one sigma is linear, down to the clean t = 0.
        """
        b = torch.as_tensor(betas, dtype=torch.float64)
        if b.ndim != 1 or len(b) == 0 or not bool(((b > 0) & (b < 1)).all()):
            raise UserError("betas must be one row of numbers strictly between 0 and 1")
        n = len(b)
        log_alpha = 0.5 * torch.log1p(-b).cumsum(0)
        lmbda = log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))
        sigma_first = torch.sqrt(-torch.expm1(2 * log_alpha[0]))

        def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
            grid = lmbda.to(t.device)
            position = t.double() * n - 1
            low = position.floor().clamp(0, max(n - 2, 0)).long()
            high = (low + 1).clamp_max(n - 1)
            between = grid[low] + (grid[high] - grid[low]) * (position - low)
            # VP: alpha = sigmoid(2 lambda)^(1/2), sigma = sigmoid(-2 lambda)^(1/2)
            alpha, sigma = torch.sigmoid(2 * between).sqrt(), torch.sigmoid(-2 * between).sqrt()
            sigma_low = sigma_first.to(t.device) * (t.double() * n)
            first = position < 0
            sigma = torch.where(first, sigma_low, sigma)
            alpha = torch.where(first, torch.sqrt((1 - sigma_low**2).clamp_min(0)), alpha)
            return alpha.to(t.dtype), sigma.to(t.dtype)

        return cls("from_betas", lambda t: alpha_sigma(t)[0], lambda t: alpha_sigma(t)[1], {"betas": b.tolist()})

    @classmethod
    def from_config(cls, name: str, **config: Any) -> NoiseSchedule:
        """The schedule called `name`, with its constructor's arguments. Unknown ones raise `UserError`."""
        if name not in SCHEDULES:
            raise nearest("noise schedule", name, SCHEDULES)
        check_options(f"noise schedule '{name}'", SCHEDULES[name], config)
        return SCHEDULES[name](**config)


SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "vp_linear": NoiseSchedule.vp_linear,
    "vp_cosine": NoiseSchedule.vp_cosine,
    "edm": NoiseSchedule.edm,
    "flow": NoiseSchedule.flow,
    "from_betas": NoiseSchedule.from_betas,
}
