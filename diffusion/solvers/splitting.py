"""Splitting integrators (Pandey et al. 2024, "Efficient integrators for diffusion generative models", section 4).

They solve the reverse ODE of phase-space Langevin diffusion (PSLD, Pandey and Mandt 2023), in which data x has a momentum m:

    dx = (-Gamma x + m / M) dt + (2 Gamma)^(1/2) dw,    dm = (-x - nu m) dt + (2 M nu)^(1/2) dw',    m(0) ~ N(0, gamma M)

(time in units of 2 / beta), z = (x, m) given x_0 being N(mu x_0, Sigma), in turns: x with m held, and m with x held. With s the
score and h a step back, the reduced ones reuse an evaluation (algorithms 1 to 4 of its appendix D):

    euler           x' = x + h (Gamma x - m / M + Gamma s_x),  m' = m + h (x' + nu m + M nu s_m),       s = s(x, m, t)
    verlet          m_1 = m + h/2 (x + nu m + M nu s_m),       x' = x + h (Gamma x - m_1 / M + Gamma s_x),
                    m' = m_1 + h/2 (x' + nu m_1 + M nu s'_m),  s' = s(x', m_1, t - h)
    naive_euler     euler with s_m at (x', m, t);  naive_verlet: verlet with s_x at (x, m_1, t) and s' = s(x', m_1, t)

No network of (x, m) is needed. z is two Gaussian measurements of x_0, whose sufficient statistic is

    u = mu' Sigma^-1 z / SNR = x_0 + SNR^(-1/2) e,    SNR = mu' Sigma^-1 mu,    so that E[x_0 | z] = D(alpha u, t')

at the level t' with (alpha / sigma)^2 = SNR, and s = -Sigma^-1 (z - mu D). The state of the table is y = alpha u, which has the
marginals of the schedule; the rest of z, v = k' z with k' mu = 0 and variance 1, is kept among the predictions:
z = mu u + Sigma k v.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._coefficients import at, hold, noise_form, plain, still
from diffusion.tableau import Coefficient, Row
from pilotwave.errors import UserError, nearest

# Pandey and Mandt 2023 for CIFAR-10: critically damped, 1 / M = (Gamma - nu)^2 / 4
FRICTION, MASS, START = 0.01, 0.25, 0.04  # Gamma, M, gamma
_NU = FRICTION + 2 / MASS**0.5
_KAPPA = (FRICTION + _NU) / 2
_LONG = 64.0  # by when nothing of the data is left


def phase(time: Tensor) -> tuple[Tensor, Tensor]:
    """mu (..., 2) and Sigma (..., 2, 2) of z given x_0 = 1, in closed form since the eigenvalues of F coincide."""
    F = torch.tensor([[-FRICTION, 1 / MASS], [-1.0, -_NU]], dtype=time.dtype)
    eye, last = torch.eye(2, dtype=time.dtype), torch.tensor([1.0, MASS], dtype=time.dtype)
    flow = torch.exp(-_KAPPA * time)[..., None, None] * (eye + time[..., None, None] * (F + _KAPPA * eye))
    excess = torch.diag(torch.tensor([1.0, MASS * (1 - START)], dtype=time.dtype))
    return flow[..., 0], torch.diag(last) - flow @ excess @ flow.mT


def _snr(time: Tensor) -> Tensor:
    mu, Sigma = phase(time)
    return (mu * torch.linalg.solve(Sigma, mu)).sum(-1)


def time_at(snr: Tensor) -> Tensor:
    """When z knows that much of x_0, by bisection."""
    low, high = torch.zeros_like(snr), torch.full_like(snr, _LONG)
    for _ in range(70):
        middle = (low + high) / 2
        later = _snr(middle.clamp_min(1e-12)) > snr
        low, high = torch.where(later, middle, low), torch.where(later, high, middle)
    return high


class _Point:
    """A time of PSLD: its score, and the ways between z and (y, v). Weights have a last axis over (y, v, d_1, d_2, d_3)."""

    def __init__(self, time: Tensor, alpha: Tensor) -> None:
        mu, Sigma = phase(time)
        self.mu, self.precision = mu, torch.linalg.inv(Sigma)
        k = torch.stack([-mu[..., 1], mu[..., 0]], -1)
        k = k / (k[..., None, :] @ Sigma @ k[..., None]).sqrt()[..., 0]
        informed = (self.precision @ mu[..., None])[..., 0]
        to_y = alpha[..., None] * informed / (mu * informed).sum(-1, keepdim=True)
        self.inward = torch.stack([to_y, k], -2)
        self.outward = torch.stack([mu / alpha[..., None], (Sigma @ k[..., None])[..., 0]], -1)

    def score(self, z: Tensor, call: int) -> Tensor:
        """-Sigma^-1 (z - mu d) with the prediction of that call, 1 to 3."""
        gap = z.clone()
        gap[..., call + 1] -= self.mu
        return -self.precision @ gap


def _euler(s: _Point, t: _Point, h: Tensor, z: Tensor, naive: bool) -> tuple[list[Tensor], Tensor]:
    """Weights of the points evaluated at after the first, and z's at the end of the step."""
    x, m, points = z[..., 0, :], z[..., 1, :], []
    score = s.score(z, 1)
    x = x + h * (FRICTION * x - m / MASS + FRICTION * score[..., 0, :])
    if naive:
        z = torch.stack([x, m], -2)
        points.append((s.inward @ z)[..., 0, :])
        score = s.score(z, 2)
    return points, torch.stack([x, m + h * (x + _NU * m + MASS * _NU * score[..., 1, :])], -2)


def _verlet(s: _Point, t: _Point, h: Tensor, z: Tensor, naive: bool) -> tuple[list[Tensor], Tensor]:
    """As _euler; the last point is at t where the method is reduced."""
    x, m, points = z[..., 0, :], z[..., 1, :], []
    score = s.score(z, 1)
    m = m + h / 2 * (x + _NU * m + MASS * _NU * score[..., 1, :])
    if naive:
        z = torch.stack([x, m], -2)
        points.append((s.inward @ z)[..., 0, :])
        score = s.score(z, 2)
    x = x + h * (FRICTION * x - m / MASS + FRICTION * score[..., 0, :])
    z, end = torch.stack([x, m], -2), s if naive else t
    points.append((end.inward @ z)[..., 0, :])
    score = end.score(z, len(points) + 1)
    return points, torch.stack([x, m + h / 2 * (x + _NU * m + MASS * _NU * score[..., 1, :])], -2)


# name: (the step, naive: every score anew, and at the time that the step began)
VARIANTS = {
    "euler": (_euler, False),
    "verlet": (_verlet, False),
    "naive_euler": (_euler, True),
    "naive_verlet": (_verlet, True),
}


def splitting(schedule: NoiseSchedule, levels: Tensor, variant: str = "verlet", noise: float = 1.0) -> list[Row]:
    """One of VARIANTS, with 1 (euler), 2 or 3 (naive_verlet) evaluations a step, of order 1; to t = 0 it is DDIM's step.

    noise: the deviation of v at the start, which x_T does not have; 1 keeps the distribution, and 0 draws nothing.
    """
    if variant not in VARIANTS:
        raise nearest("splitting variant", variant, VARIANTS)
    if noise < 0:
        raise UserError(f"splitting's noise must not be negative; got {noise}")
    method, naive = VARIANTS[variant]
    alpha, sigma = at(schedule, levels)
    noise_form(schedule, alpha)
    clean = sigma <= 0
    times = time_at(torch.where(clean, torch.ones_like(alpha), (alpha / sigma) ** 2))
    points = [_Point(time, a) for time, a in zip(times, alpha)]
    begin = torch.eye(2, 5, dtype=torch.float64)
    rows = [Row(levels[0], levels[0], 1.0, P=(0.0, (), noise), evaluate=False)]
    for i, (s, t) in enumerate(pairwise(levels)):
        ends, same = clean[i + 1], still(s, t)
        arrived = torch.stack([torch.eye(5, dtype=torch.float64)[2], begin[1]])  # the prediction; v does not matter any more
        if bool(ends.all()):
            rows.append(Row(s, t, hold(torch.zeros_like(s), same, 1.0), hold(torch.ones_like(s), same, 0.0)))
            continue
        h = (times[i] - times[i + 1])[..., None]
        between, z = method(points[i], points[i + 1], h, points[i].outward @ begin, naive)
        final = torch.where(ends[..., None, None], arrived, points[i + 1].inward @ z)
        final = torch.where(same[..., None, None], begin, final)
        rows.append(Row(s, s, 1.0))
        for call, y in enumerate(between, 2):
            level = s if naive else t
            rows.append(Row(level, level, 1.0, P=_weights(torch.where((ends | same)[..., None], begin[0], y), call - 1)))
        calls = 1 + len(between)
        U_x, U, _ = _weights(final[..., 0, :], calls)
        rows.append(Row(s, t, U_x, U=(0.0, *U), P=_weights(final[..., 1, :], calls), evaluate=False))
    return rows


def _weights(w: Tensor, calls: int) -> tuple[Coefficient, tuple[Coefficient, ...], float]:
    """Of the state, and of what is kept after so many evaluations: d_calls, .., d_1, v."""
    return plain(w[..., 0]), tuple(plain(w[..., j]) for j in [*range(calls + 1, 1, -1), 1]), 0.0
