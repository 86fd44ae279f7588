"""Conjugate and splitting integrators: what they reduce to, and the phase-space diffusion that the latter solve."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from diffusion import NoiseSchedule, sample, solver
from diffusion.solvers import splitting
from diffusion.solvers.splitting import FRICTION, MASS, START, VARIANTS, phase, time_at
from pilotwave.errors import UserError
from tests.mixture import LINE, elementwise
from tests.test_solvers import DISCRETE, RANGES, problem

NU = FRICTION + 2 / math.sqrt(MASS)
DRIFT = np.array([[-FRICTION, 1 / MASS], [-1.0, -NU]])
NOISE = np.diag([2 * FRICTION, 2 * MASS * NU])


@pytest.mark.parametrize("where", RANGES)
def test_a_conjugate_integrator_without_b_is_ddim(where):
    schedule = RANGES[where][0]
    for row, ddim in zip(solver("conjugate", schedule, 7, b=0).rows, solver("ddim", schedule, 7).rows):
        assert row.U_x == pytest.approx(ddim.U_x, rel=1e-12)
        assert row.U_d == pytest.approx(ddim.U_d, rel=1e-10)


@pytest.mark.parametrize("b", [-0.5, 1.0])
def test_a_conjugate_step_is_euler_s_in_its_own_coordinates(b):
    """z = e^(b t) x / alpha, dz = b z dt + e^(b t) e d rho, by quadrature with SciPy."""
    from scipy.integrate import quad

    schedule, s, t = NoiseSchedule.vp_cosine(), 0.8, 0.55

    def part(f, t: float) -> float:
        return float(f(torch.tensor(t, dtype=torch.float64)))

    def rho(u: float) -> float:
        return part(schedule.sigma, u) / part(schedule.alpha, u)

    a_s, s_s, x, d = part(schedule.alpha, s), part(schedule.sigma, s), 0.7, -0.4
    slope = [(rho(u + 1e-6) - rho(u - 1e-6)) / 2e-6 for u in (s, t)]
    integral, _ = quad(lambda u: math.exp(b * u) * (rho(u + 1e-6) - rho(u - 1e-6)) / 2e-6, s, t)
    assert min(slope) > 0
    z = math.exp(b * s) * x / a_s
    z = z + (t - s) * b * z + integral * (x - a_s * d) / s_s
    (row,) = solver("conjugate", schedule, [s, t], b=b).rows
    assert row.U_x * x + row.U_d * d == pytest.approx(math.exp(-b * t) * part(schedule.alpha, t) * z, rel=1e-7)


@pytest.mark.parametrize("where", RANGES)
def test_a_conjugate_integrator_errs_less_than_ddim(where):
    """In ten steps on the mixture, with the default b."""
    (schedule, high, low), (x, exact) = RANGES[where], problem(where)
    levels = torch.linspace(high, low, 11)
    error = [
        float((sample(elementwise(schedule), solver(name, schedule, levels), x) - exact).norm()) for name in ("conjugate", "ddim")
    ]
    assert error[0] < 0.9 * error[1]


def test_the_phase_space_moments_solve_their_equations():
    """d mu = F mu and d Sigma = F Sigma + Sigma F' + G G', from (1, 0) and diag(0, gamma M)."""

    def slope(t: float, y: np.ndarray) -> np.ndarray:
        mu, Sigma = y[:2], y[2:].reshape(2, 2)
        return np.concatenate([DRIFT @ mu, (DRIFT @ Sigma + Sigma @ DRIFT.T + NOISE).ravel()])

    begin = np.concatenate([[1, 0], np.diag([0, START * MASS]).ravel()])
    times = np.array([0.01, 0.3, 2.0])
    found = solve_ivp(slope, (0, 2), begin, t_eval=times, rtol=1e-11, atol=1e-13).y.T
    for time, y in zip(times, found):
        mu, Sigma = phase(torch.tensor(time, dtype=torch.float64))
        np.testing.assert_allclose(mu, y[:2], rtol=1e-8)
        np.testing.assert_allclose(Sigma, y[2:].reshape(2, 2), rtol=1e-8, atol=1e-12)
        snr = mu @ torch.linalg.solve(Sigma, mu)
        assert float(time_at(snr)) == pytest.approx(time, rel=1e-9)


def reference(where: str) -> tuple[Tensor, Tensor]:
    """Starts, and where the phase-space ODE takes them from a momentum that tells nothing new (v = 0), by SciPy on (x, m) itself.

    The score is that of a mixture whose parts are Gaussian in (x, m), with no use of sufficient statistics.
    """
    schedule, high, low = RANGES[where]
    x, _ = problem(where)
    t = torch.tensor([high, low], dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    begin, end = time_at((alpha / sigma) ** 2)
    mean, var = LINE.means[:, 0].numpy(), LINE.covariances[:, 0, 0].numpy()

    def slope(back: float, y: np.ndarray) -> np.ndarray:
        z = y.reshape(2, -1)
        mu, Sigma = (part.numpy() for part in phase(begin - back))
        log_p, scores = [], []
        for weight, m, v in zip(LINE.weights.numpy(), mean, var):
            C = v * np.outer(mu, mu) + Sigma
            gap = z - (m * mu)[:, None]
            scores.append(-np.linalg.solve(C, gap))
            log_p.append(np.log(weight) - 0.5 * np.log(np.linalg.det(C)) + 0.5 * (gap * scores[-1]).sum(0))
        p = np.exp(np.array(log_p) - np.max(log_p, 0))
        score = (p[:, None] * np.array(scores)).sum(0) / p.sum(0)
        return (-DRIFT @ z + 0.5 * NOISE @ score).ravel()

    mu, _ = phase(begin)
    start = np.outer(mu, x / alpha[0]).ravel()
    z = solve_ivp(slope, (0, float(begin - end)), start, method="DOP853", rtol=1e-10, atol=1e-10).y[:, -1].reshape(2, -1)
    mu, Sigma = phase(end)
    informed = torch.linalg.solve(Sigma, mu)
    return x, alpha[1] * (informed @ torch.from_numpy(z)) / (mu @ informed)


@pytest.mark.parametrize("where", RANGES)
def test_splitting_s_order_of_convergence(where):
    """To the solution of the ODE in (x, m), though only E[x_0 | alpha u] is ever asked for."""
    (schedule, high, low), (x, exact) = RANGES[where], reference(where)
    for variant in VARIANTS:
        errors = []
        for steps in (80, 160):
            levels = torch.linspace(high, low, steps + 1)
            table = solver("splitting", schedule, levels, variant=variant, noise=0)
            errors.append(float((sample(elementwise(schedule), table, x) - exact).norm()))
        assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.2), variant
        assert errors[1] < 0.1


@pytest.mark.parametrize("schedule", [NoiseSchedule.vp_linear(), NoiseSchedule.edm(), DISCRETE], ids=lambda s: s.name)
@pytest.mark.parametrize("variant", VARIANTS)
def test_splitting_keeps_mean_and_variance(variant, schedule):
    """Of a Gaussian, for which all is affine: x and v stay Gaussian, and the table says how; more steps, less error."""
    mu, v, one = 0.7, 0.3, torch.ones((), dtype=torch.float64)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        a, s = schedule.alpha(t), schedule.sigma(t)
        return mu + a * v / (a**2 * v + s**2) * (x - a * mu)

    errors = []
    for steps in (40, 80):
        levels = torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** (1 if schedule.name == "edm" else 2)
        table = solver("splitting", schedule, levels, variant=variant)
        a, s = schedule.alpha(one), schedule.sigma(one)
        # the table at (0, 0), (1, 0) and (0, 1) of (x_T, v)
        at = [float(sample(denoise, solver("splitting", schedule, levels, variant=variant, noise=0), x * one)) for x in (0.0, 1.0)]
        draws = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
        drawn = torch.empty(1, dtype=torch.float64).normal_(generator=draws[0])
        with_v = float(sample(denoise, table, torch.zeros(1, dtype=torch.float64), draws[1]))
        by_x, by_v = at[1] - at[0], (with_v - at[0]) / float(drawn)
        mean = at[0] + by_x * float(a * mu)
        var = by_x**2 * float(a**2 * v + s**2) + by_v**2
        errors.append(max(abs(mean - mu), abs(var / v - 1)))
    assert errors[1] < min(0.6 * errors[0] + 0.01, 0.25)


def test_splitting_s_mistakes_are_named():
    schedule = NoiseSchedule.vp_linear()
    with pytest.raises(UserError, match="did you mean 'verlet'"):
        solver("splitting", schedule, variant="verlett")
    with pytest.raises(UserError, match="noise must not be negative"):
        solver("splitting", schedule, noise=-1)
    with pytest.raises(UserError, match="b must lie between"):
        solver("conjugate", schedule, b=100)
    with pytest.raises(UserError, match="not defined at t = 1 of 'flow'"):
        solver("splitting", NoiseSchedule.flow())
    assert splitting.splitting(NoiseSchedule.flow(), torch.tensor([0.99, 0.5, 0.0], dtype=torch.float64))
