"""Solvers against the schedulers of `diffusers`, their order of convergence, and the moments of what they draw."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion import NoiseSchedule, Tableau, sample, solver, solvers
from diffusion.solvers import SOLVERS
from pilotwave.errors import UserError
from tests.mixture import LINE, PLANE, elementwise

BETAS = np.linspace(1e-4, 0.02, 1000)
DISCRETE = NoiseSchedule.from_betas(BETAS.tolist())
ONE = torch.ones((), dtype=torch.float64)


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
    return pytest.importorskip("diffusers")


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


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_dpmpp_2m_is_that_of_diffusers(diffusers, steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        trained_betas=BETAS, algorithm_type="dpmsolver++", timestep_spacing="trailing", final_sigmas_type="zero"
    )
    table, x = solver("dpmpp_2m", DISCRETE, discrete(scheduler, steps)), start(DISCRETE)
    assert_same(states(table, elementwise(DISCRETE), x), discrete_states(scheduler, x))


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


@pytest.mark.parametrize(
    ("name", "theirs"), [("euler", "EDMEulerScheduler"), ("dpmpp_2m", "EDMDPMSolverMultistepScheduler")]
)
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


# -- order of convergence ----------------------------------------------------------------------------------------------

RANGES = {
    "vp_linear": (NoiseSchedule.vp_linear(), 1.0, 0.1),
    "vp_cosine": (NoiseSchedule.vp_cosine(), 0.9, 0.1),
    "edm": (NoiseSchedule.edm(), 0.8, 0.3),
    "flow": (NoiseSchedule.flow(), 0.9, 0.1),
    "from_betas": (DISCRETE, 1.0, 0.1),
}


@pytest.mark.parametrize("name", [name for name in solvers() if name != "ddpm"])
@pytest.mark.parametrize("where", RANGES)
def test_order_of_convergence(name, where):
    """Halving the steps divides the error by 2^order, on a mixture with the exact denoiser."""
    schedule, high, low = RANGES[where]
    denoise = elementwise(schedule)
    a, s = schedule.alpha(high * ONE), schedule.sigma(high * ONE)
    x = torch.linspace(-2, 2, 21, dtype=torch.float64) * torch.sqrt(a**2 + s**2)

    def run(name: str, steps: int) -> Tensor:
        return sample(denoise, solver(name, schedule, torch.linspace(high, low, steps + 1, dtype=torch.float64)), x)

    # Richardson's extrapolation of Heun's method, of third order
    reference = (4 * run("heun", 640) - run("heun", 320)) / 3
    errors = [float((run(name, steps) - reference).norm()) for steps in (80, 160)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(SOLVERS[name][1], abs=0.2)
    assert solver(name, schedule, 5).order == SOLVERS[name][1]


# -- moments -----------------------------------------------------------------------------------------------------------


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
    x_T = torch.randn(6000, 2, generator=generator) * schedule.sigma(torch.ones(()))
    table = solver(name, schedule, torch.linspace(1, 0, 101) ** 2)
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
