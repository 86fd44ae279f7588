"""Solvers against the schedulers of `diffusers`, their order of convergence, and the moments of what they draw."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from diffusion import NoiseSchedule, Tableau, sample, solver, solvers
from diffusion.solvers import SOLVERS
from diffusion.solvers._coefficients import level_at
from diffusion.solvers._spacing import SPACINGS
from pilotwave.errors import UserError
from tests.mixture import LINE, PLANE, elementwise

BETAS = np.linspace(1e-4, 0.02, 1000)
DISCRETE = NoiseSchedule.from_betas(BETAS.tolist())
ONE = torch.ones((), dtype=torch.float64)
CALLS = {
    "heun": 2,
    "edm": 2,
    "restart": 2,
    "midpoint": 2,
    "ddim_accelerated": 2,
    "dpm_2": 2,
    "dpmpp_2s": 2,
    "dpm_3": 3,
    "splitting": 2,
}  # evaluations a step
# options that take the noise away
CALM = {"edm": {"churn": 0}, "sa": {"tau": 0}, "restart": {"times": 0}, "recurrent": {"times": 1}}


# -- against diffusers: the same network, noise and steps, in float32, state by state ----------------------------------


def states(table: Tableau, denoise, x: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
    record: list[Tensor] = []
    sample(denoise, table, x, generator, constrain=lambda x, t: record.append(x) or x)
    return record


def assert_same(ours: list[Tensor], theirs: Iterable[Tensor]) -> None:
    for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        assert (x - y).norm() <= 1e-4 * y.norm(), f"state {i} differs by {(x - y).norm() / y.norm():.1e}"


def start(schedule: NoiseSchedule, t: float = 1.0) -> Tensor:
    x = torch.randn(8, 32, 6, generator=torch.Generator().manual_seed(0))
    return x * float(schedule.sigma(torch.tensor(t, dtype=torch.float64)))


def discrete(scheduler, steps: int) -> list[float]:
    """Our levels of a scheduler's integer steps: t = (i + 1) / N, ending clean."""
    scheduler.set_timesteps(steps)
    return [(int(i) + 1) / 1000 for i in dict.fromkeys(scheduler.timesteps.tolist())] + [0.0]


def discrete_states(scheduler, x: Tensor, scale: float = 1.0, **options) -> list[Tensor]:
    """States of a scheduler that wants the noise; `scale` is alpha at x where its states are x / alpha."""
    denoise, record = elementwise(DISCRETE), []
    y = x / scale
    for i in scheduler.timesteps:
        t = (torch.as_tensor(i, dtype=torch.float64) + 1) / 1000
        a, s = DISCRETE.alpha(t).float(), DISCRETE.sigma(t).float()
        z = y * a if scale != 1 else y
        y = scheduler.step((z - a * denoise(z, t.float())) / s, i, y, **options).prev_sample
        record.append(y)
    return record


@pytest.fixture(scope="module")
def diffusers():
    import diffusers

    return diffusers


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_is_that_of_diffusers(diffusers, steps, eta):
    scheduler = diffusers.DDIMScheduler(trained_betas=BETAS, clip_sample=False, timestep_spacing="trailing")
    table, x = solver("ddim", DISCRETE, discrete(scheduler, steps), eta=eta), start(DISCRETE)
    ours = states(table, elementwise(DISCRETE), x, torch.Generator().manual_seed(1))
    assert_same(ours, discrete_states(scheduler, x, eta=eta, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_is_that_of_diffusers(diffusers, variance):
    kind = f"fixed_{variance}"
    scheduler = diffusers.DDPMScheduler(trained_betas=BETAS, clip_sample=False, variance_type=kind)
    levels = discrete(scheduler, 20)
    table, x = solver("ddpm", DISCRETE, levels, variance=variance), start(DISCRETE, levels[0])
    ours = states(table, elementwise(DISCRETE), x, torch.Generator().manual_seed(1))
    assert_same(ours, discrete_states(scheduler, x, generator=torch.Generator().manual_seed(1)))


def sigma_states(scheduler, x: Tensor, **options) -> tuple[Tensor, list[Tensor]]:
    """Our levels of a scheduler's sigma / alpha, and its states. Where it rounds them to integer steps ours are not rounded."""
    rho, denoise, record = scheduler.sigmas.double(), elementwise(DISCRETE), []
    levels = torch.where(rho > 0, level_at(DISCRETE, -torch.log(rho)), rho)
    for i, t in zip(scheduler.timesteps, levels):
        a, s = DISCRETE.alpha(t).float(), DISCRETE.sigma(t).float()
        x = scheduler.step((x - a * denoise(x, t.float())) / s, i, x, **options).prev_sample
        record.append(x)
    return levels, record


MULTISTEP = [("dpmpp_2m", {}, "DPMSolverMultistep", {"final_sigmas_type": "zero"})]
MULTISTEP += [(f"deis_{k}", {}, "DEISMultistep", {"solver_order": k, "lower_order_final": False}) for k in (1, 2, 3)]
MULTISTEP += [
    (f"unipc_{k}", {"variant": variant}, "UniPCMultistep", {"solver_order": k, "solver_type": variant})
    for k in (1, 2, 3)
    for variant in ("bh1", "bh2")
]
MULTISTEP += [
    (
        "sa",
        {"tau": 0, "predictor": p, "corrector": c},
        "SASolver",
        {"predictor_order": p, "corrector_order": c, "tau_func": lambda t: 0, "lower_order_final": False},
    )
    for p, c in ((1, 2), (2, 2), (3, 3), (3, 4), (2, 4))
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("steps", [5, 10, 20])
@pytest.mark.parametrize(("name", "options", "theirs", "settings"), MULTISTEP)
def test_multistep_is_that_of_diffusers(diffusers, name, options, theirs, settings, steps):
    scheduler = getattr(diffusers, f"{theirs}Scheduler")(trained_betas=BETAS, timestep_spacing="trailing", **settings)
    scheduler.set_timesteps(steps)
    x = start(DISCRETE)
    levels, record = sigma_states(scheduler, x)
    ours = states(solver(name, DISCRETE, levels, **options), elementwise(DISCRETE), x)
    if options.get("variant") == "bh1":  # whose last step, to sigma = 0, is 0 * inf in theirs
        assert not record[-1].isfinite().any()
        assert ours.pop().isfinite().all()
        record.pop()
    assert_same(ours, record)


@pytest.mark.parametrize("steps", [5, 20])
def test_dpmpp_2m_sde_is_that_of_diffusers(diffusers, steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        trained_betas=BETAS, algorithm_type="sde-dpmsolver++", timestep_spacing="trailing", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    x = start(DISCRETE)
    levels, record = sigma_states(scheduler, x, generator=torch.Generator().manual_seed(1))
    table = solver("dpmpp_2m_sde", DISCRETE, levels)
    assert_same(states(table, elementwise(DISCRETE), x, torch.Generator().manual_seed(1)), record)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize(("name", "kind"), [("dpmpp_2s", "dpmsolver++"), ("dpm_2", "dpmsolver")])
def test_singlestep_is_that_of_diffusers(diffusers, name, kind, steps):
    """Every other of their levels, uniform in lambda, is the middle of ours. The last is not: they end lower."""
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        trained_betas=BETAS, algorithm_type=kind, use_exponential_sigmas=True, final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(2 * steps + 2)
    x = start(DISCRETE)
    levels, record = sigma_states(scheduler, x)
    assert scheduler.order_list[: 2 * steps] == [1, 2] * steps
    ours = states(solver(name, DISCRETE, levels[: 2 * steps + 1 : 2]), elementwise(DISCRETE), x)
    assert_same(ours, record[1 : 2 * steps : 2])


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(("name", "theirs"), [("euler", "EulerDiscreteScheduler"), ("heun", "HeunDiscreteScheduler")])
def test_runge_kutta_is_that_of_diffusers(diffusers, name, theirs, steps):
    """Their states are x / alpha; theirs of Heun's method are, every other time, the points between."""
    scheduler = getattr(diffusers, theirs)(trained_betas=BETAS, timestep_spacing="trailing")
    levels, x = discrete(scheduler, steps), start(DISCRETE)
    alpha = DISCRETE.alpha(torch.tensor(levels, dtype=torch.float64)).float()
    scaled = discrete_states(scheduler, x, float(alpha[0]))
    scaled = scaled[1::2] + scaled[-1:] if name == "heun" else scaled
    ours = states(solver(name, DISCRETE, levels), elementwise(DISCRETE), x)
    assert_same(ours, [y * a for y, a in zip(scaled, alpha[1:])])


@pytest.mark.parametrize(("name", "theirs"), [("euler", "EDMEulerScheduler"), ("dpmpp_2m", "EDMDPMSolverMultistepScheduler")])
def test_edm_is_that_of_diffusers(diffusers, name, theirs):
    """They precondition: the network's output is (D - c_skip x) / c_out (Karras et al. 2022, table 1)."""
    schedule, scheduler = NoiseSchedule.edm(), getattr(diffusers, theirs)(sigma_min=0.002, sigma_max=80.0)
    scheduler.set_timesteps(18)
    sigmas, data = scheduler.sigmas.double(), scheduler.config.sigma_data
    levels = (sigmas / 80).clamp(max=1) ** (1 / 7)
    x = start(schedule)
    denoise, theirs_states, y = elementwise(schedule), [], x
    for i, t, s in zip(scheduler.timesteps, levels, sigmas):
        skip, out = data**2 / (s**2 + data**2), s * data / torch.sqrt(s**2 + data**2)
        output = ((denoise(y.double(), t) - skip * y) / out).float()
        y = scheduler.step(output, i, y).prev_sample
        theirs_states.append(y)
    assert_same(states(solver(name, schedule, levels), denoise, x), theirs_states)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("where", ["edm", "vp_linear"])
@pytest.mark.parametrize(("churn", "low", "high"), [(3.0, 0.0, 1e9), (30.0, 0.0, 1e9), (30.0, 0.05, 4.0)])
def test_churn_is_that_of_diffusers(diffusers, where, churn, low, high):
    """Karras et al.'s algorithm 2, as their scheduler has it, on x / alpha: the states after the noise, and after Heun's step."""
    from diffusers.schedulers.deprecated import scheduling_karras_ve

    schedule, options = RANGES[where][0], {"s_churn": churn, "s_min": low, "s_max": high, "s_noise": 1.007}
    scheduler = scheduling_karras_ve.KarrasVeScheduler(sigma_min=0.1, sigma_max=6.0, **options)
    scheduler.set_timesteps(12)
    sigmas = torch.cat([scheduler.schedule.flip(0), torch.zeros(1)])
    t = torch.cat([level_at(schedule, -torch.log(sigmas[:-1].double())), torch.zeros(1, dtype=torch.float64)])
    table = solver("edm", schedule, t, churn=churn, low=low, high=high, noise=1.007)
    denoise, generator, idle = elementwise(NoiseSchedule.edm(1.0, 1.0)), torch.Generator().manual_seed(1), torch.Generator()
    y, record = start(schedule) / float(schedule.sigma(ONE)) * sigmas[0], []
    x = y * float(schedule.alpha(t[0]))
    for s, end in pairwise(sigmas):
        stirred = low <= s <= high  # they draw noise where they use none
        hat, s_hat = scheduler.add_noise_to_input(y, s, generator if stirred else idle)
        record += [hat] if stirred else []
        output = (denoise(hat, s_hat) - hat) / s_hat
        y, slope = scheduler.step(output, s_hat, end, hat, return_dict=False)
        if end > 0:
            output = (denoise(y, end) - y) / end
            y, _ = scheduler.step_correct(output, s_hat, end, hat, y, slope, return_dict=False)
        record.append(y)
    ours = []
    sample(
        elementwise(schedule), table, x, torch.Generator().manual_seed(1),
        constrain=lambda x, t: ours.append(x / schedule.alpha(t.double()).float()) or x,
    )  # fmt: skip
    assert len(ours) == 12 + sum(low <= s <= high for s in sigmas[:-1].tolist())
    assert_same(ours, record)


@pytest.mark.parametrize(
    ("name", "theirs"), [("euler", "FlowMatchEulerDiscreteScheduler"), ("heun", "FlowMatchHeunDiscreteScheduler")]
)
def test_flow_is_that_of_diffusers(diffusers, name, theirs):
    schedule, scheduler = NoiseSchedule.flow(), getattr(diffusers, theirs)()
    scheduler.set_timesteps(12)
    levels, x = list(dict.fromkeys(scheduler.sigmas.tolist())), start(schedule)
    if levels[-1] > 0:
        levels.append(0.0)
    denoise, record, y = elementwise(schedule), [], x
    for i in scheduler.timesteps:
        t = i / 1000
        y = scheduler.step((y - denoise(y, t)) / t, i, y).prev_sample
        record.append(y)
    record = record[1::2] + record[-1:] if name == "heun" else record
    assert_same(states(solver(name, schedule, levels), denoise, x), record)


def test_dpmpp_2m_on_the_flow_is_that_of_diffusers(diffusers):
    schedule = NoiseSchedule.flow()
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", use_flow_sigmas=True, prediction_type="flow_prediction", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(12)
    x, denoise, record = start(schedule), elementwise(schedule), []
    y = x
    for i, t in zip(scheduler.timesteps, scheduler.sigmas):
        y = scheduler.step((y - denoise(y, t)) / t, i, y).prev_sample
        record.append(y)
    assert_same(states(solver("dpmpp_2m", schedule, scheduler.sigmas), denoise, x), record)


# whose order is that of their deterministic options; splitting's is measured in tests/test_splitting.py
NOISY = ("ddpm", "ddpm_accelerated", "dpmpp_2m_sde", "splitting")


# -- order of convergence ----------------------------------------------------------------------------------------------

RANGES = {
    "vp_linear": (NoiseSchedule.vp_linear(), 1.0, 0.1),
    "vp_cosine": (NoiseSchedule.vp_cosine(), 0.9, 0.1),
    "edm": (NoiseSchedule.edm(), 0.8, 0.3),
    "flow": (NoiseSchedule.flow(), 0.9, 0.1),
    "from_betas": (DISCRETE, 1.0, 0.1),
}


@cache
def problem(where: str) -> tuple[Tensor, Tensor]:
    """Starts, and where the ODE takes them, by SciPy: over alpha, with w = sigma / alpha, dx / dw = (x - D) / w for all."""
    schedule, high, low = RANGES[where]
    x = torch.linspace(-2, 2, 21, dtype=torch.float64)
    (w, a), (w_end, a_end) = (
        (float(schedule.sigma(t * ONE) / schedule.alpha(t * ONE)), schedule.alpha(t * ONE)) for t in (high, low)
    )
    x = x * a * math.hypot(1, w)
    denoise = elementwise(NoiseSchedule.edm(1.0, 1.0))

    def slope(w: float, x: np.ndarray) -> np.ndarray:
        return (x - denoise(torch.from_numpy(x), w * ONE).numpy()) / w

    solution = solve_ivp(slope, (w, w_end), (x / a).numpy(), method="DOP853", rtol=1e-12, atol=1e-12)
    return x, a_end * torch.from_numpy(solution.y[:, -1])


def graded(high: float, low: float, steps: int, order: int) -> Tensor:
    """Even steps h, after a first of h^(order / 2), whose own first order does not show, doubled until they are reached."""
    even = (high - low) / steps
    levels = [high, high - even / 2 ** math.ceil(3 + (order / 2 - 1) * math.log2(steps))]
    while (step := 2 * (levels[-2] - levels[-1])) < even:
        levels.append(levels[-1] - step)
    rest = round((levels[-1] - low) / even)
    return torch.cat(
        [torch.tensor(levels[:-1], dtype=torch.float64), torch.linspace(levels[-1], low, rest + 1, dtype=torch.float64)]
    )


@pytest.mark.parametrize("name", [name for name in solvers() if name not in NOISY])
@pytest.mark.parametrize("where", RANGES)
def test_order_of_convergence(name, where):
    """Halving the steps divides the error by 2^order, on a mixture with the exact denoiser."""
    (schedule, high, low), (x, exact) = RANGES[where], problem(where)
    if name == "ddim_accelerated" and where in ("edm", "flow"):
        with pytest.raises(UserError, match="schedules that keep the variance"):
            solver(name, schedule)
        return
    order, errors = SOLVERS[name][1], []
    # some are slow to show their order, others to be made
    steps = 320 if name in ("ddim_accelerated", "sa") else 40 if CALLS.get(name, 1) > 1 else 160
    for n in (steps, 2 * steps):
        table = solver(name, schedule, graded(high, low, n, order), **CALM.get(name, {}))
        errors.append(float((sample(elementwise(schedule), table, x) - exact).norm()))
    assert table.order == order
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


# -- moments -----------------------------------------------------------------------------------------------------------


STOCHASTIC = [
    ("ddim", {"eta": 0.7}),
    ("ddpm", {}),
    ("ddpm", {"variance": "large"}),
    ("ddpm", {"variance": 0.4}),
    ("dpmpp_2m_sde", {}),
    ("edm", {"churn": 40, "low": 0.0, "high": 1e9}),
    ("restart", {}),
    ("recurrent", {"times": 3}),
    ("recurrent", {"base": "ddpm"}),
    ("ddpm_accelerated", {}),
    ("sa", {}),
    ("sa", {"tau": 1.5, "between": (0, 1), "predictor": 3, "corrector": 4}),
]


def gaussian_moments(table: Tableau, schedule: NoiseSchedule, mu: float, v: float) -> tuple[float, float]:
    """Mean and variance of what a table draws for N(mu, v): all is affine in x, the predictions kept, and the noise."""
    m = table.memory + 1
    alpha, sigma = (f(torch.stack([ONE, *(row.t for row in table.rows)])).numpy() for f in (schedule.alpha, schedule.sigma))
    mean, cov = np.zeros(1 + m), np.zeros((1 + m, 1 + m))
    mean[0], cov[0, 0] = alpha[0] * mu, alpha[0] ** 2 * v + sigma[0] ** 2
    for row, a, s in zip(table.rows, alpha[1:], sigma[1:]):
        # rows of (x, d_1, .., 1), each a combination of the same before
        x, *history, one = np.eye(2 + m)
        if row.evaluate:
            y = x
            if row.P is not None:
                assert row.P[2] == 0
                y = row.P[0] * x + sum(c * d for c, d in zip(row.P[1], history))
            gain = a * v / (a**2 * v + s**2)
            K_y, K_d = row.K or (0.0, 1.0)
            history = [K_y * y + K_d * (gain * y + (1 - a * gain) * mu * one), *history]
        weights = (row.U_d, *row.U) if row.evaluate else row.U
        x = row.U_x * x + sum(c * d for c, d in zip(weights, history))
        A = np.stack([x, *history[:m]])
        mean, cov = A[:, :-1] @ mean + A[:, -1], A[:, :-1] @ cov @ A[:, :-1].T
        cov[0, 0] += row.U_z**2
    return mean[0], cov[0, 0]


@pytest.mark.parametrize(("name", "options"), STOCHASTIC)
@pytest.mark.parametrize("schedule", [NoiseSchedule.vp_linear(), NoiseSchedule.edm(), NoiseSchedule.flow()], ids=lambda s: s.name)
def test_stochastic_solvers_keep_mean_and_variance(name, options, schedule):
    """Exactly computed, with no Monte Carlo: more steps, less error."""
    if name == "ddpm_accelerated" and schedule.name != "vp_linear":
        with pytest.raises(UserError, match="schedules that keep the variance"):
            solver(name, schedule)
        return
    mu, v, errors = 0.7, 0.3, []
    for steps in (50, 200):
        levels = torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** (1 if schedule.name == "edm" else 2)
        inner = {"inner": steps // 5} if name == "restart" else {}
        mean, var = gaussian_moments(solver(name, schedule, levels, **options, **inner), schedule, mu, v)
        errors.append(max(abs(mean - mu), abs(var / v - 1)))
    assert errors[1] < min(0.4 * errors[0] + 1e-3, 0.15)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_converges_to_the_moments_of_a_gaussian(variance):
    """D(x, t) = g x + (1 - a g) mu is affine, so mean and variance follow from the rows; the error is O(1/steps)."""
    schedule, mu, v = NoiseSchedule.vp_linear(), 0.7, 0.3

    def error(steps: int) -> float:
        a, s = schedule.alpha(ONE), schedule.sigma(ONE)
        mean, var = a * mu, a**2 * v + s**2
        for row in solver("ddpm", schedule, torch.linspace(1, 0, steps + 1) ** 2, variance=variance).rows:
            a, s = schedule.alpha(row.t), schedule.sigma(row.t)
            gain = a * v / (a**2 * v + s**2)
            mean = row.U_x * mean + row.U_d * (gain * mean + (1 - a * gain) * mu)
            var = (row.U_x + row.U_d * gain) ** 2 * var + row.U_z**2
        assert abs(mean - mu) < 1e-10
        return float(abs(var - v))

    errors = [error(steps) for steps in (200, 400, 800)]
    assert errors[-1] < 0.02 * v
    assert math.log2(errors[1] / errors[2]) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("name", solvers())
def test_samples_have_the_mixture_s_moments(name):
    schedule, generator = NoiseSchedule.vp_linear(), torch.Generator().manual_seed(0)
    x_T = torch.randn(4000, 2, generator=generator) * schedule.sigma(torch.ones(()))
    steps = 100 if SOLVERS[name][1] == 1 or name in ("ddim_accelerated", *dict(STOCHASTIC)) else 30
    table = solver(name, schedule, torch.linspace(1, 0, steps + 1) ** 2)
    x = sample(PLANE.denoiser(schedule), table, x_T, generator).double()
    torch.testing.assert_close(x.mean(0), PLANE.mean(), rtol=0, atol=0.04)
    torch.testing.assert_close(x.T.cov(), PLANE.covariance(), rtol=0, atol=0.06)


def test_the_mixture_s_denoiser_is_the_posterior_mean():
    """Against numerical integration of p(x_0 | x_t) on a line, so that the tests above stand on firm ground."""
    schedule, t = NoiseSchedule.vp_cosine(), 0.4 * ONE
    a, s = schedule.alpha(t), schedule.sigma(t)
    x_0, x = torch.linspace(-6, 6, 4001, dtype=torch.float64), torch.tensor([[-1.0], [0.2], [1.3]], dtype=torch.float64)
    m, d = LINE.means[:, 0], LINE.covariances[:, 0, 0].sqrt()
    prior = (LINE.weights / d * torch.exp(-0.5 * ((x_0[:, None] - m) / d) ** 2)).sum(-1)
    posterior = prior * torch.exp(-0.5 * ((x - a * x_0) / s) ** 2)
    expected = (posterior * x_0).sum(-1) / posterior.sum(-1)
    torch.testing.assert_close(elementwise(schedule)(x[:, 0], t), expected, rtol=1e-9, atol=1e-9)


# -- what is asked for -------------------------------------------------------------------------------------------------


def test_steps_are_a_number_or_falling_levels():
    schedule = NoiseSchedule.vp_linear()
    levels = [float(row.t) for row in solver("ddim", schedule, 4).rows]
    assert levels == [1.0, 0.75, 0.5, 0.25]
    for same in (np.int64(4), [1, 0.75, 0.5, 0.25, 0], np.linspace(1, 0, 5), torch.linspace(1, 0, 5)):
        assert [float(row.t) for row in solver("ddim", schedule, same).rows] == levels
    assert float(solver("ddim", schedule, [1.0, 0.01]).rows[-1].t_next) == pytest.approx(0.01)


@pytest.mark.parametrize("where", RANGES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacings_fall_from_one_to_zero(spacing, where):
    schedule = RANGES[where][0]
    for steps in (1, 2, 5, 10, 50):
        rows = solver("ddim", schedule, steps, spacing=spacing).rows
        levels = torch.stack([rows[0].t, *(row.t_next for row in rows)])
        assert len(levels) == steps + 1
        assert (levels[0], levels[-1]) == (1, 0)
        assert (levels.diff() < 0).all()
        rho = schedule.sigma(levels) / schedule.alpha(levels)
        even = {
            "uniform": levels,
            "quadratic": levels.sqrt(),
            "log_snr": torch.log(rho[1:-1]),
            "karras": rho[1:-1] ** (1 / 7),
        }.get(spacing)
        if even is not None and steps > 2:
            torch.testing.assert_close(even.diff(), even.diff()[:1].expand(len(even) - 1), rtol=1e-6, atol=1e-9)


def test_karras_steps_are_those_of_diffusers(diffusers):
    """From our sigma at t = 1 down to that at t = 0.001."""
    schedule = NoiseSchedule.edm(sigma_max=80.0, rho=2.0)
    scheduler = diffusers.EDMEulerScheduler(sigma_min=80e-6, sigma_max=80.0)
    scheduler.set_timesteps(18)
    levels = torch.stack([row.t for row in solver("ddim", schedule, 18, spacing="karras").rows])
    torch.testing.assert_close(schedule.sigma(levels).float(), scheduler.sigmas[:-1], rtol=1e-4, atol=0)


def test_aligned_steps_are_the_published_ones(diffusers):
    """Of ten steps; the first is t = 1 and the last 0."""
    published = diffusers.schedulers.AysSchedules
    for spacing, name in (("ays_sd", ""), ("ays_sdxl", "XL"), ("ays_svd", "Video")):
        schedule = NoiseSchedule.edm(800.0)
        levels = torch.stack([row.t_next for row in solver("ddim", schedule, 10, spacing=spacing).rows])
        expected = torch.tensor(published[f"StableDiffusion{name}Sigmas"][1:], dtype=torch.float64)
        torch.testing.assert_close(schedule.sigma(levels), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps", [0, -3, [1.0], [], [0.5, 1.0], [1.5, 0.0], [1.0, -0.1], [1.0, math.nan], 2.5, "ten"])
def test_steps_that_make_no_sense_are_refused(steps):
    with pytest.raises(UserError, match="sampler steps must be"):
        solver("ddim", NoiseSchedule.vp_linear(), steps)


def test_unknown_solvers_and_options_are_named():
    schedule = NoiseSchedule.vp_linear()
    with pytest.raises(UserError, match="did you mean 'dpmpp_2m'"):
        solver("dpmpp2m", schedule)
    with pytest.raises(UserError, match="unknown option of sampler 'ddim' 'ets'; did you mean 'eta'"):
        solver("ddim", schedule, ets=0.5)
    with pytest.raises(UserError, match="sampler 'heun' takes no options"):
        solver("heun", schedule, eta=0.5)
    with pytest.raises(UserError, match="ddpm variance"):
        solver("ddpm", schedule, variance="medium")
    with pytest.raises(UserError, match="fractions in"):
        solver("ddpm", schedule, 5, variance=[0.1, 0.2])
    with pytest.raises(UserError, match="did you mean 'karras'"):
        solver("ddim", schedule, spacing="karas")
    with pytest.raises(UserError, match="did you mean 'bh2'"):
        solver("unipc_2", schedule, variant="bh3")
    with pytest.raises(UserError, match="sa takes a predictor of"):
        solver("sa", schedule, predictor=5)
    with pytest.raises(UserError, match="restart wants"):
        solver("restart", schedule, low=0.5, high=0.2)
    with pytest.raises(UserError, match="did you mean 'heun'"):
        solver("restart", schedule, base="huen")
    with pytest.raises(UserError, match="churn and noise must not be negative"):
        solver("edm", schedule, churn=-1)


@pytest.mark.parametrize("name", ["deis_1", "deis_2", "deis_3", "dpm_1", "dpm_2", "dpm_3"])
def test_noise_cannot_be_predicted_from_pure_noise(name):
    schedule = NoiseSchedule.flow()
    with pytest.raises(UserError, match="not defined at t = 1 of 'flow'"):
        solver(name, schedule, 5)
    table = solver(name, schedule, torch.linspace(0.99, 0, 6))
    x = sample(elementwise(schedule), table, start(schedule, 0.99))
    assert x.isfinite().all()


@pytest.mark.parametrize("name", ["ddim_accelerated", "ddpm_accelerated"])
@pytest.mark.parametrize("schedule", [NoiseSchedule.edm(), NoiseSchedule.flow()], ids=lambda s: s.name)
@pytest.mark.parametrize("steps", [1, 10])
def test_accelerated_samplers_refuse_schedules_by_the_schedule_not_the_steps(name, schedule, steps):
    with pytest.raises(UserError, match="schedules that keep the variance"):
        solver(name, schedule, steps)
