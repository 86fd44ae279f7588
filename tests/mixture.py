"""Gaussian mixtures, whose denoiser is known exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion import NoiseSchedule


@dataclass(frozen=True)
class Mixture:
    """sum_k weights_k N(means_k, covariances_k): (K,), (K, F), (K, F, F), float64."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def mean(self) -> Tensor:
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        second = torch.einsum("k,ki,kj->ij", self.weights, self.means, self.means)
        within = torch.einsum("k,kij->ij", self.weights, self.covariances)
        return second + within - torch.outer(self.mean(), self.mean())

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[k] + (torch.linalg.cholesky(self.covariances)[k] @ z[..., None])[..., 0]

    def log_density(self, x: Tensor, components: bool = False) -> Tensor:
        """log p(x) of x (..., F); with `components` each one's share of it, (..., K)."""
        m, S, w = (p.to(x.dtype) for p in (self.means, self.covariances, self.weights))
        gap = x[..., None, :] - m
        squared = torch.einsum("...ki,kij,...kj->...k", gap, torch.linalg.inv(S), gap)
        each = w.log() - 0.5 * (squared + torch.logdet(2 * torch.pi * S))
        return each if components else each.logsumexp(-1)

    def noised(self, schedule: NoiseSchedule, t: Tensor) -> Mixture:
        """The mixture that x_t follows, for one level t ()."""
        a, s = schedule.alpha(t).double(), schedule.sigma(t).double()
        eye = torch.eye(self.means.shape[1], dtype=torch.float64)
        return Mixture(self.weights, a * self.means, a**2 * self.covariances + s**2 * eye)

    def tilted(self, linear: Tensor, quadratic: Tensor) -> Mixture:
        """p(x) exp(r(x)) with r(x) = linear . x - x . quadratic x / 2, normalized: again a mixture."""
        P = torch.linalg.inv(self.covariances)
        S = torch.linalg.inv(P + quadratic)
        pull = (P @ self.means[..., None])[..., 0] + linear
        m = (S @ pull[..., None])[..., 0]
        exponent = (pull * m).sum(-1) - torch.einsum("ki,kij,kj->k", self.means, P, self.means)
        log_w = self.weights.log() + 0.5 * (exponent + torch.logdet(S) - torch.logdet(self.covariances))
        return Mixture(log_w.softmax(0), m, S)

    def shares(self, x: Tensor) -> Tensor:
        """p(component | x), (..., K). Over samples of the mixture its mean is `weights`."""
        return self.log_density(x, components=True).softmax(-1)

    def denoiser(self, schedule: NoiseSchedule):
        """D(x, t) = E[x_0 | x_t = x] for x (..., F) and levels that broadcast to (..., 1)."""
        spread, axes = torch.linalg.eigh(self.covariances)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            m, v, q, w = (p.to(x.dtype) for p in (self.means, spread, axes, self.weights))
            a, s = schedule.alpha(t)[..., None], schedule.sigma(t)[..., None]
            z = ((x[..., None, :] - a * m)[..., None, :] @ q)[..., 0, :]
            variance = a**2 * v + s**2
            log_p = w.log() - 0.5 * (z**2 / variance + variance.log()).sum(-1)
            each = m + (q @ (a * v / variance * z)[..., None])[..., 0]
            return (log_p.softmax(-1)[..., None] * each).sum(-2)

        return denoise


def _line(weights: list[float], means: list[float], deviations: list[float]) -> Mixture:
    w, m, d = (torch.tensor(p, dtype=torch.float64) for p in (weights, means, deviations))
    return Mixture(w, m[:, None], d[:, None, None] ** 2)


LINE = _line([0.3, 0.5, 0.2], [-1.2, 0.4, 1.5], [0.4, 0.3, 0.5])
PLANE = Mixture(
    torch.tensor([0.4, 0.6], dtype=torch.float64),
    torch.tensor([[-1.0, 0.5], [0.8, -0.3]], dtype=torch.float64),
    torch.tensor([[[0.20, 0.10], [0.10, 0.15]], [[0.25, -0.10], [-0.10, 0.20]]], dtype=torch.float64),
)


def elementwise(schedule: NoiseSchedule):
    """The exact denoiser of trajectories whose numbers are all independent draws from LINE: any shape, any levels."""
    denoise = LINE.denoiser(schedule)
    return lambda x, t: denoise(x[..., None], t[..., None])[..., 0]
