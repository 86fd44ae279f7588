"""Noise schedules: their borders, identities and definitions."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion import SCHEDULES, NoiseSchedule
from pilotwave.errors import UserError

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALL = {
    "vp_linear": NoiseSchedule.vp_linear(),
    "vp_cosine": NoiseSchedule.vp_cosine(),
    "edm": NoiseSchedule.edm(),
    "flow": NoiseSchedule.flow(),
    "from_betas": NoiseSchedule.from_betas(BETAS),
    "from_betas_short": NoiseSchedule.from_betas([0.1, 0.2, 0.5]),
    "from_betas_one": NoiseSchedule.from_betas([0.3]),
}
VARIANCE_PRESERVING = [name for name in ALL if name not in ("edm", "flow")]

every = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL.keys())
vp = pytest.mark.parametrize("name", VARIANCE_PRESERVING)


def levels(n: int = 1001, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.linspace(0, 1, n, dtype=torch.float64).to(dtype)


def test_every_named_schedule_is_tested():
    assert set(SCHEDULES) <= set(ALL)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_is_clean_and_one_is_noise(schedule, dtype):
    zero, one = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
    assert schedule.alpha(zero) == 1
    assert schedule.sigma(zero) == 0
    assert schedule.log_snr(zero) == math.inf == schedule.snr(zero)
    assert schedule.sigma(one) > 0
    assert schedule.snr(one) < 0.1 or len(schedule.config.get("betas", [])) in (1, 3)


@every
def test_noise_rises_with_t(schedule):
    t = levels()
    assert (schedule.log_snr(t).diff() < 0).all()
    assert (schedule.sigma(t).diff() > 0).all()
    assert (schedule.alpha(t).diff() <= 0).all()


@vp
def test_variance_is_preserved(name):
    t = levels()
    total = ALL[name].alpha(t) ** 2 + ALL[name].sigma(t) ** 2
    torch.testing.assert_close(total, torch.ones_like(t), rtol=0, atol=1e-14)


@every
def test_shape_and_dtype_are_kept(schedule):
    for dtype in (torch.float32, torch.float64):
        t = torch.rand(2, 3, 4, dtype=dtype)
        for value in (schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)):
            assert value.shape == t.shape
            assert value.dtype == dtype
        assert schedule.alpha(t[0, 0, 0]).ndim == 0


@every
def test_single_precision_is_precise_near_the_data(schedule):
    t = torch.logspace(-4, 0, 50, dtype=torch.float32)
    exact = schedule.sigma(t.double())
    torch.testing.assert_close(schedule.sigma(t).double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(schedule.alpha(t).double(), schedule.alpha(t.double()), rtol=1e-5, atol=1e-7)


def test_vp_linear_solves_its_equation():
    """d log alpha / dt = -beta(t) / 2, beta from 0.1 to 20 (Song et al. 2021, eq. 33)."""
    t = levels(11).requires_grad_()
    (slope,) = torch.autograd.grad(NoiseSchedule.vp_linear().alpha(t).log().sum(), t)
    torch.testing.assert_close(slope, -0.5 * (0.1 + 19.9 * t.detach()), rtol=1e-12, atol=1e-12)


def test_vp_cosine_is_the_cosine():
    t, s = levels(), 0.008
    expected = torch.cos(math.pi / 2 * (0.9946 * t + s) / (1 + s)) / math.cos(math.pi / 2 * s / (1 + s))
    torch.testing.assert_close(NoiseSchedule.vp_cosine().alpha(t), expected, rtol=1e-12, atol=0)


def test_uniform_steps_of_edm_are_karras_steps():
    """Karras et al. 2022, eq. 5 with sigma_min = 0."""
    i, n = torch.arange(11, dtype=torch.float64), 11
    karras = (80 ** (1 / 7) + i / (n - 1) * (0 - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(NoiseSchedule.edm().sigma(levels(11).flip(0)), karras, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("betas", [BETAS, torch.tensor([0.1, 0.2, 0.5]), torch.tensor([0.3]), BETAS.numpy().tolist()])
def test_discrete_steps_are_the_cumulative_products(betas):
    schedule = NoiseSchedule.from_betas(betas)
    product = (1 - torch.as_tensor(betas, dtype=torch.float64)).cumprod(0)
    n = len(product)
    t = (torch.arange(n, dtype=torch.float64) + 1) / n
    torch.testing.assert_close(schedule.alpha(t) ** 2, product, rtol=1e-10, atol=0)
    torch.testing.assert_close(schedule.sigma(t) ** 2, 1 - product, rtol=1e-10, atol=0)
    torch.testing.assert_close(schedule.alpha(t.float()).double() ** 2, product, rtol=1e-4, atol=0)


def test_discrete_steps_are_those_of_diffusers():
    import diffusers

    scheduler = diffusers.DDPMScheduler(1000, 1e-4, 0.02)
    schedule = NoiseSchedule.from_betas(scheduler.betas)
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    torch.testing.assert_close((schedule.alpha(t) ** 2).float(), scheduler.alphas_cumprod, rtol=1e-4, atol=0)


def test_log_snr_is_interpolated_between_discrete_steps():
    schedule = ALL["from_betas_short"]
    at = schedule.log_snr(torch.tensor([1 / 3, 2 / 3, 1], dtype=torch.float64))
    between = schedule.log_snr(torch.tensor([0.5, 0.75], dtype=torch.float64))
    expected = torch.stack([(at[0] + at[1]) / 2, 0.75 * at[1] + 0.25 * at[2]])
    torch.testing.assert_close(between, expected, rtol=1e-12, atol=1e-12)


def test_below_the_first_discrete_step_sigma_is_linear():
    schedule = ALL["from_betas_short"]
    sigma = schedule.sigma(torch.tensor([1 / 3, 1 / 6, 1e-9], dtype=torch.float64))
    torch.testing.assert_close(sigma, sigma[0] * torch.tensor([1, 0.5, 3e-9], dtype=torch.float64), rtol=1e-9, atol=0)


@given(st.lists(st.floats(1e-6, 0.999), min_size=1, max_size=40))
def test_any_betas_make_a_schedule(betas):
    schedule, t = NoiseSchedule.from_betas(betas), levels(101)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert torch.isfinite(alpha).all()
    assert (sigma.diff() >= 0).all()
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-12)


@every
def test_a_schedule_is_rebuilt_from_plain_data(schedule):
    again = NoiseSchedule.from_config(schedule.name, **json.loads(json.dumps(schedule.config)))
    assert torch.equal(again.alpha(levels()), schedule.alpha(levels()))
    assert torch.equal(again.sigma(levels()), schedule.sigma(levels()))


def test_add_noise_takes_levels_for_every_token():
    schedule = ALL["vp_linear"]
    x_0, eps = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    t = torch.tensor([0.0, 0.5, 1.0])[:, None]
    x = schedule.add_noise(x_0, eps, t)
    assert torch.equal(x[:, 0], x_0[:, 0])
    torch.testing.assert_close(x[:, 1], schedule.alpha(t[1]) * x_0[:, 1] + schedule.sigma(t[1]) * eps[:, 1])


@pytest.mark.parametrize("betas", [[], [0.1, 0.0], [0.1, 1.0], [[0.1]], [math.nan]])
def test_betas_outside_their_range_are_refused(betas):
    with pytest.raises(UserError, match="between 0 and 1"):
        NoiseSchedule.from_betas(betas)


def test_unknown_schedules_and_settings_are_named():
    with pytest.raises(UserError, match="did you mean 'vp_cosine'"):
        NoiseSchedule.from_config("cosine_vp")
    with pytest.raises(UserError, match="beta_max"):
        NoiseSchedule.from_config("vp_linear", beta_maximum=3.0)
