"""The sum rules of every table, to 1e-12 over schedules and steps: what its theory promises for constant and linear predictions.

Constant predictions. Where the data is a constant c, x_s = alpha_s c + sigma_s e goes to alpha_t c + sigma_t e ("marginal": then
the noise is a constant too). With noise of its own, N(alpha_s c, sigma_s^2) goes to N(alpha_t c, sigma_t^2).

Linear predictions. What a method takes for a polynomial (the data, the noise, or the slope of x / c in w = sigma / c) is
k_0 + k_1 phi, with phi the variable it integrates in: lambda = log(alpha / sigma) for Adams methods and DPM-Solvers, w for
Runge-Kutta's. Methods of order 2 and more then give the exact solution, or one in which the mean of phi over the step is a
stated approximation ("bh1", "bh2", the middle); those of order 1 take phi where the step begins. Multistep methods know one
prediction in the first step, and two in the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion import NoiseSchedule, Tableau, sample, solver, solvers
from diffusion.solvers.dpm_v3 import ModelStatistics

# -- schedules and steps -----------------------------------------------------------------------------------------------

SMOOTH = (
    st.builds(NoiseSchedule.vp_linear, st.floats(0.05, 1), st.floats(5, 30)),
    st.builds(NoiseSchedule.vp_cosine),
    st.builds(NoiseSchedule.edm, st.floats(5, 100), st.floats(1, 7)),
    st.builds(NoiseSchedule.flow),
)
DISCRETE = st.builds(NoiseSchedule.from_betas, st.lists(st.floats(1e-3, 0.1), min_size=20, max_size=60))
schedules = st.one_of(*SMOOTH, DISCRETE)
keep_variance = st.one_of(*SMOOTH[:2], DISCRETE)


@st.composite
def falling(draw: st.DrawFn, last: bool = True) -> list[float]:
    """Two to nine levels from 1 or below it, each between half of the one before and just below it, and perhaps 0 as the last."""
    start, ratios = (
        draw(st.one_of(st.floats(0.5, 0.98), st.just(1.0))),
        draw(st.lists(st.floats(0.5, 0.97), min_size=1, max_size=7)),
    )
    levels = [start * math.prod(ratios[:i]) for i in range(len(ratios) + 1)]
    return [*levels, 0.0] if last and draw(st.booleans()) else levels


@dataclass(frozen=True)
class Level:
    """alpha, sigma, and what follows from them, at t; c and w as in `diffusion.solvers.runge_kutta`."""

    t: float
    a: Tensor
    s: Tensor
    c: Tensor

    @property
    def w(self) -> Tensor:
        return self.s / self.c

    @property
    def lmbda(self) -> Tensor:
        return torch.log(self.a) - torch.log(self.s)


def at(schedule: NoiseSchedule, levels: Sequence[float]) -> list[Level]:
    t = torch.tensor(levels, dtype=torch.float64)
    a, s = schedule.alpha(t), schedule.sigma(t)
    c = a if a[0] > 0 else a + s
    return [Level(*entry) for entry in zip(levels, a, s, c)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def states(denoise: Callable[[Tensor, Tensor], Tensor], table: Tableau, x: Tensor) -> list[tuple[float, Tensor]]:
    """(t, x) after every update."""
    record: list[tuple[float, Tensor]] = []
    sample(denoise, table, x, constrain=lambda x, t: record.append((float(t), x)) or x)
    return record


# -- what is promised for linear predictions ---------------------------------------------------------------------------

# (level before, level after, state, k_0, k_1, how much is known of the prediction: 1 its value, 2 its slope, 3 more) -> state
Step = Callable[[Level, Level, Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Linear:
    """The variable phi, the clean data from (level, x, prediction), a step, and how many predictions a predictor and a corrector
    look at: the corrector moves the state, once the next prediction is known, to what a step with more of them gives."""

    phi: Callable[[Level], Tensor]
    data: Callable[[Level, Tensor, Tensor], Tensor]
    step: Step
    predictor: int = 1
    corrector: int = 0

    def states(self, levels: Sequence[Level], x: Tensor, k_0: Tensor, k_1: Tensor) -> list[Tensor]:
        record = []
        for i, (s, t) in enumerate(pairwise(levels)):
            record.append(self.step(s, t, x, k_0, k_1, min(self.predictor, i + 1)))
            x = self.step(s, t, x, k_0, k_1, min(self.corrector, i + 2)) if self.corrector else record[-1]
        return record


def exponential(kind: str, average: str | None = None, tau: float = 0.0) -> Step:
    """x_t = U_x x_s + U q_s + k_1 M: q_s the prediction where the step begins, M what its slope adds."""

    def step(s: Level, t: Level, x: Tensor, k_0: Tensor, k_1: Tensor, known: int) -> Tensor:
        h, kappa = t.lmbda - s.lmbda, 1 + tau**2
        if kind == "data":
            U_x, U, scale = t.s / s.s * torch.exp(-(tau**2) * h), -t.a * torch.expm1(-kappa * h), t.a * kappa
            whole = t.a * (h + torch.expm1(-kappa * h) / kappa)
        else:
            U_x, U, scale = t.a / s.a, -t.s * torch.expm1(h), -t.s
            whole = -t.s * (torch.expm1(h) - h)
        # the slope's part of a method that knows one value, two, and more: none, of the stated mean, and all of it
        two = {None: whole, "bh1": scale * h**2 / 2, "bh2": U * h / 2}[average]
        M = (torch.zeros_like(h), two, whole)[min(known, 3) - 1]
        return U_x * x + U * (k_0 + k_1 * s.lmbda) + k_1 * M

    return step


def adams(kind: str, predictor: int, corrector: int = 0, average: str | None = None, tau: float = 0.0) -> Linear:
    data = (lambda level, x, q: q) if kind == "data" else (lambda level, x, q: (x - level.s * q) / level.a)
    return Linear(lambda level: level.lmbda, data, exponential(kind, average, tau), predictor, corrector)


def single(kind: str, average: str | None = None) -> Linear:
    """A singlestep method knows the slope at once."""
    linear = adams(kind, 1, average=average)
    inner = linear.step
    return replace(linear, step=lambda s, t, x, k_0, k_1, known: inner(s, t, x, k_0, k_1, 2))


def _slope(s: Level, t: Level, x: Tensor, k_0: Tensor, k_1: Tensor, known: int) -> Tensor:
    return t.c * (x / s.c + k_0 * (t.w - s.w) + k_1 * (t.w**2 - s.w**2) / 2)


# Runge-Kutta methods of order 2 on d (x / c) / d w = slope
SLOPE = Linear(lambda level: level.w, lambda level, x, q: x / level.c - level.w * q, _slope)


@dataclass(frozen=True)
class Score(Linear):
    """d (x / alpha) / d Q = -(alpha S) / 2 with Q = 1 / alpha^2 and the score S: the accelerated DDIM extrapolates alpha S in Q
    from the level before, and divides what that adds by r_u, which its expansion leaves out."""

    def states(self, levels: Sequence[Level], x: Tensor, k_0: Tensor, k_1: Tensor) -> list[Tensor]:
        record = []
        for i, (s, t) in enumerate(pairwise(levels)):
            gone = self.phi(s) - self.phi(t)
            x_hat = x / s.a + gone / 2 * (k_0 + k_1 * self.phi(s))
            if i > 0:
                x_hat = x_hat - k_1 * gone**2 / 4 * (s.a / levels[i - 1].a) ** 2
            x = t.a * x_hat
            record.append(x)
        return record


SCORE = Score(lambda level: level.a**-2, lambda level, x, q: (x + level.s**2 * q / level.a) / level.a, _slope)

# -- the table: a new solver takes a line ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Promise:
    """constant: "marginal", "score" (alpha S constant is exact), "limit" and "mean limit" (as the steps shrink; the mean over a
    momentum that is drawn). calm: options without noise; None: there is always some.
    linear: (options, what it promises); for sure with noise, of the mean. noisy: (options, "marginal" or "mean")."""

    constant: str = "marginal"
    calm: dict[str, Any] | None = field(default_factory=dict)
    linear: Sequence[tuple[dict[str, Any], Linear]] = ()
    noisy: Sequence[tuple[dict[str, Any], str]] = ()
    schedules: st.SearchStrategy[NoiseSchedule] = schedules
    top: float = 1.0  # the highest level, where all of them are not defined at 1


# DPM-Solver's statistics of DPM-Solver-v3
NOISE = ModelStatistics(*(torch.tensor(part).double() for part in ([-1, 1], [[0]] * 2, [[-1]] * 2, [[0]] * 2)))
EVERYWHERE = {"tau": 0.7, "between": (0, 1)}
FIRST = [({}, adams("data", 1))]
PROMISES = {
    "ddim": Promise(linear=FIRST, noisy=[({"eta": 0.6}, "marginal"), ({"eta": 1.0}, "marginal")]),
    "euler": Promise(linear=FIRST),
    "recurrent": Promise(
        calm={"times": 1},
        linear=[({"times": 1}, adams("data", 1)), ({"times": 1, "base": "heun"}, SLOPE)],
        noisy=[({"times": 3}, "marginal"), ({"base": "ddpm"}, "marginal")],
    ),
    "ddpm": Promise(
        calm=None,
        linear=[({}, adams("data", 1, tau=1.0)), ({"variance": "large"}, adams("data", 1, tau=1.0))],
        noisy=[({}, "marginal"), ({"variance": "large"}, "mean"), ({"variance": 0.4}, "mean")],
    ),
    "heun": Promise(linear=[({}, SLOPE)]),
    "midpoint": Promise(linear=[({}, SLOPE)]),
    "edm": Promise(
        calm={"churn": 0},
        linear=[({"churn": 0}, SLOPE)],
        noisy=[({"churn": 40, "low": 0, "high": 1e9}, "marginal"), ({"noise": 1.007}, "mean")],
    ),
    "restart": Promise(
        calm={"times": 0},
        linear=[({"times": 0}, SLOPE), ({"times": 0, "base": "dpmpp_2m", "low": 0.0}, adams("data", 2, average="bh2"))],
        noisy=[({}, "marginal"), ({"base": "ddim", "low": 0.3, "high": 0.6, "times": 3}, "marginal")],
    ),
    "deis_1": Promise(linear=[({}, adams("noise", 1))], top=0.98),
    "deis_2": Promise(linear=[({}, adams("noise", 2))], top=0.98),
    "deis_3": Promise(linear=[({}, adams("noise", 3))], top=0.98),
    "dpm_1": Promise(linear=[({}, adams("noise", 1))], top=0.98),
    "dpm_2": Promise(linear=[({}, single("noise", "bh2"))], top=0.98),
    "dpm_3": Promise(linear=[({}, single("noise"))], top=0.98),
    "dpmpp_2s": Promise(linear=[({}, single("data", "bh2"))]),
    "dpmpp_2m": Promise(linear=[({}, adams("data", 2, average="bh2"))]),
    "dpmpp_3m": Promise(linear=[({}, adams("data", 3))]),
    "dpmpp_2m_sde": Promise(calm=None, linear=[({}, adams("data", 2, average="bh2", tau=1.0))], noisy=[({}, "marginal")]),
    **{f"unipc_{p}": Promise(linear=[({"variant": v}, adams("data", p, p + 1, v)) for v in ("bh1", "bh2")]) for p in (1, 2, 3)},
    "dpm_v3": Promise(
        linear=[({"p": p}, adams("data", p, p + 1)) for p in (1, 2, 3)]
        + [({"corrector": False}, adams("data", 2)), ({"statistics": NOISE}, adams("noise", 2, 3))]
    ),
    "dc": Promise(linear=[({"p": p}, adams("data", p, p + 1, "bh2")) for p in (1, 2, 3)]),
    "sa": Promise(
        calm={"tau": 0},
        linear=[({"tau": 0}, adams("data", 2, 2, "bh1")), (EVERYWHERE, adams("data", 2, 2, "bh1", 0.7))]
        + [(EVERYWHERE | {"predictor": p, "corrector": c}, adams("data", p, c, "bh1", 0.7)) for p, c in ((1, 0), (3, 0), (3, 4))],
        noisy=[({}, "marginal"), (EVERYWHERE, "marginal"), (EVERYWHERE | {"predictor": 3, "corrector": 4}, "marginal")],
    ),
    "ddim_accelerated": Promise("score", linear=[({}, SCORE)], schedules=keep_variance),
    "ddpm_accelerated": Promise("score", calm=None, schedules=keep_variance),
    "conjugate": Promise("limit", linear=[({"b": 0.0}, adams("data", 1))]),
    "splitting": Promise("mean limit", {"noise": 0}, top=0.98),
}


def test_every_solver_says_what_it_promises():
    new = set(solvers()) - set(PROMISES)
    assert not new, f"say in tests/test_sum_rules.py what {new} promise for constant and linear predictions"


def calm(exact: bool) -> list[str]:
    """Solvers that can do without noise and keep the marginal of constant predictions, or do so in the limit alone."""
    return [name for name, promise in PROMISES.items() if promise.calm is not None and (promise.constant == "marginal") == exact]


# -- constant predictions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", calm(exact=True))
@settings(max_examples=12, deadline=None)
@given(data=st.data(), t=falling())
def test_constant_predictions_keep_the_marginal(name, data, t):
    """For d = c, x_s = alpha_s c + sigma_s e goes to alpha_t c + sigma_t e, whatever e: the method is consistent."""
    promise, schedule = PROMISES[name], data.draw(PROMISES[name].schedules)
    t = [promise.top * level for level in t]
    levels, c, e = at(schedule, t), noise(5, seed=1), noise(5, seed=2)
    record = states(lambda x, t: c, solver(name, schedule, t, **promise.calm), levels[0].a * c + levels[0].s * e)
    assert [t for t, _ in record] == t[1:]
    # what predicts the noise divides by alpha, and its rounding errors with it
    scale = 1.0 if promise.top == 1 else 1 / float(levels[0].a)
    for (_, x), level in zip(record, levels[1:]):
        torch.testing.assert_close(x, level.a * c + level.s * e, rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize("name", calm(exact=False))
def test_constant_predictions_keep_the_marginal_in_the_limit(name):
    """Expansions in the step: with half the step, at most 0.6 of the error."""
    schedule, c, errors = NoiseSchedule.vp_linear(), noise(5, seed=1), []
    e = 0 * c if PROMISES[name].constant == "mean limit" else noise(5, seed=2)
    for steps in (100, 200):
        t = torch.linspace(0.9, 0.2, steps + 1, dtype=torch.float64)
        first, last = at(schedule, [0.9, 0.2])
        x = sample(lambda x, t: c, solver(name, schedule, t, **PROMISES[name].calm), first.a * c + first.s * e)
        errors.append(float((x - last.a * c - last.s * e).abs().max()))
    assert 0 < errors[1] < 0.6 * errors[0]
    assert errors[1] < 0.05


# -- linear predictions ------------------------------------------------------------------------------------------------

LINEAR = [(name, i) for name, promise in PROMISES.items() for i in range(len(promise.linear))]


@pytest.mark.parametrize(("name", "i"), LINEAR)
@settings(max_examples=8, deadline=None)
@given(data=st.data(), t=falling(last=False))
def test_linear_predictions(name, i, data, t):
    """States are those of the promise after every step, the first ones included; with noise, their means are."""
    schedule, (options, linear) = data.draw(PROMISES[name].schedules), PROMISES[name].linear[i]
    t = [0.98 * level for level in t]
    levels, (k_0, k_1, x) = at(schedule, t), noise(3, 5, seed=4)
    spread = max(1.0, *(float(linear.phi(level).abs()) for level in levels))
    k_1, largest = k_1 / spread, [1.0]
    x = x * math.hypot(levels[0].a, levels[0].s)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        # phi of the level asked for, which may lie between
        a, s = schedule.alpha(t), schedule.sigma(t)
        level = Level(float(t), a, s, a if levels[0].a > 0 else a + s)
        d = linear.data(level, x, k_0 + k_1 * linear.phi(level))
        largest.append(float(d.abs().max()))
        return d

    table = solver(name, schedule, t, **options)
    quiet = Tableau(name, tuple(replace(row, U_z=0.0) for row in table.rows))
    record = states(denoise, quiet, x)
    expected = linear.states(levels, x, k_0, k_1)
    assert [t for t, _ in record] == t[1:]
    scale = max(*largest, *(float(x.abs().max()) for x in expected))
    for (_, x), there in zip(record, expected):
        torch.testing.assert_close(x, there, rtol=0, atol=1e-12 * scale)


NODES, MASSES = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(64))
# name -> options, what is interpolated, how many rows until all of the method is in use
INTERPOLATED = {
    "deis_3": ({}, "noise", 2),
    "dpmpp_3m": ({}, "data", 2),
    "unipc_3": ({}, "data", 3),
    "sa": ({"tau": 0.7, "between": (0, 1), "predictor": 3, "corrector": 4}, "data", 3),
}


@pytest.mark.parametrize("name", INTERPOLATED)
@settings(max_examples=12, deadline=None)
@given(schedule=schedules, t=falling(last=False))
def test_adams_methods_integrate_parabolas_exactly(name, schedule, t):
    """sum_j U_j (lambda_j - lambda_s)^k is the integral of the method's exponential times that power, by Gauss's quadrature."""
    options, what, full = INTERPOLATED[name]
    t = [0.98 * level for level in t]
    kappa = -1.0 if what == "noise" else 1 + options.get("tau", 0.0) ** 2
    levels = at(schedule, t)
    lmbda = torch.stack([level.lmbda for level in levels])
    for i, row in enumerate(solver(name, schedule, t, **options).rows[full:], full):
        end, h = levels[i + 1], lmbda[i + 1] - lmbda[i]
        after, scale = h * (NODES + 1) / 2, -end.s if what == "noise" else end.a * kappa
        weights = torch.tensor([row.U_d, *row.U], dtype=torch.float64)
        for k in range(3):
            terms = weights * (lmbda[i - torch.arange(len(weights))] - lmbda[i]) ** k
            exact = scale * (h / 2 * MASSES * torch.exp(-kappa * (h - after)) * after**k).sum()
            assert abs(terms.sum() - exact) <= 1e-12 * (1 + terms.abs().sum())


@settings(max_examples=12, deadline=None)
@given(schedule=st.one_of(*SMOOTH), t=falling(last=False), b=st.floats(-3, 3))
def test_conjugate_integrates_constant_slopes_of_its_own_ode(schedule, t, b):
    """x_hat_t = e^(b h) ((1 - b h) x_hat_s + o int_s^t e^(b (u - s)) w'(u) du) for the slope o, w' by differentiation."""
    t = [0.98 * level for level in t]
    for row, s, end in zip(solver("conjugate", schedule, t, b=b).rows, (levels := at(schedule, t)), levels[1:]):
        h = s.t - end.t
        u = (end.t + h * (NODES + 1) / 2).requires_grad_()
        (slope,) = torch.autograd.grad((schedule.sigma(u) / schedule.alpha(u)).sum(), u)
        integral = -(h / 2 * MASSES * torch.exp(b * (u.detach() - s.t)) * slope).sum()
        grown = end.c * math.exp(b * h)
        scale = 1 + float(grown * (s.w + 1))
        torch.testing.assert_close(row.U_x * s.c + row.U_d, grown * (1 - b * h), rtol=0, atol=1e-12 * scale)
        torch.testing.assert_close(-row.U_d * s.w, grown * integral, rtol=0, atol=1e-12 * scale)


# -- noise -------------------------------------------------------------------------------------------------------------

NOISY = [(name, options, kept) for name, promise in PROMISES.items() for options, kept in promise.noisy]


@pytest.mark.parametrize(("name", "options", "kept"), NOISY)
@settings(max_examples=12, deadline=None)
@given(schedule=schedules, t=falling())
def test_stochastic_tables_keep_the_marginal(name, options, kept, schedule, t):
    """For d = c, N(alpha_s c, sigma_s^2) goes to N(alpha_t c, sigma_t^2); "mean": a variance of its own."""
    first = at(schedule, t)[0]
    mean, variance = first.a, first.s**2
    scale = 1 + float(variance)
    for row in solver(name, schedule, t, **options).rows:
        assert row.K is None
        assert row.P is None or row.P[2] == 0
        mean = row.U_x * mean + sum(((row.U_d, *row.U) if row.evaluate else row.U), 0.0)
        variance = row.U_x**2 * variance + row.U_z**2
        if row.updates:
            (there,) = at(schedule, [float(row.t_next)])
            torch.testing.assert_close(mean, there.a, rtol=1e-12, atol=1e-12)
            if kept == "marginal":
                torch.testing.assert_close(variance, there.s**2, rtol=1e-12, atol=1e-12 * scale)
    if (name, options) == ("ddpm", {"variance": "large"}):
        assert variance >= at(schedule, t)[-1].s ** 2 - 1e-12


@settings(max_examples=12, deadline=None)
@given(schedule=keep_variance, t=falling(last=False))
def test_accelerated_ddpm_is_exact_for_a_constant_score(schedule, t):
    """alpha S = g: x / alpha moves by (Q_s - Q_t) g and gains the variance Q_s - Q_t, Q = 1 / alpha^2: the reverse SDE's."""
    levels = at(schedule, t)
    g, x_hat, variance = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64) / levels[0].a, 0.0
    rows = solver("ddpm_accelerated", schedule, t).rows
    mean, spread = levels[0].a * x_hat, torch.zeros((), dtype=torch.float64)
    for before, row, s, end in zip(rows[::2], rows[1::2], levels, levels[1:]):
        spread = spread + before.U_z**2
        # D = (y + sigma^2 S) / alpha
        kept = row.U_x + row.U_d / s.a
        mean, spread = kept * mean + row.U_d * s.s**2 * g / s.a**2, kept**2 * spread + row.U_z**2
        gone = s.a**-2 - end.a**-2
        x_hat, variance = x_hat + gone * g, variance + gone
        scale = float(levels[0].a ** -2)
        torch.testing.assert_close(mean / end.a, x_hat, rtol=1e-12, atol=1e-12 * scale)
        torch.testing.assert_close(spread / end.a**2, variance, rtol=1e-12, atol=1e-12 * scale)
