"""DDPM with a variance of the network's own, the loss that trains it, and input perturbation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion import Denoiser, Layout, NoiseSchedule, NumpySampler, sample, solver
from diffusion.networks import build_network
from pilotwave.errors import UserError
from tests.mixture import LINE, elementwise
from tests.test_solvers import DISCRETE, assert_same, discrete, start, states

MU, V = 0.7, 0.3  # a Gaussian
VP = NoiseSchedule.vp_linear()


def best_fraction(schedule: NoiseSchedule, posterior: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """v of the variance that x_r has given x_t, where x_0 given x_t has variance `posterior`."""
    a, s, a_r, s_r = schedule.alpha(t), schedule.sigma(t), schedule.alpha(r), schedule.sigma(r)
    beta = s**2 - (a / a_r * s_r) ** 2
    small = beta * s_r**2 / s**2
    return torch.log1p((a_r * beta / s**2) ** 2 * posterior / small) / torch.log(beta / small)


def gaussian(schedule: NoiseSchedule, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """E[x_0 | x_t] and its variance, for N(MU, V)."""
    a, s = schedule.alpha(t), schedule.sigma(t)
    whole = a**2 * V + s**2
    return MU + a * V / whole * (x - a * MU), V * s**2 / whole * torch.ones_like(x)


def test_it_is_that_of_diffusers():
    import diffusers

    betas = np.linspace(1e-4, 0.02, 1000)
    scheduler = diffusers.DDPMScheduler(trained_betas=betas, clip_sample=False, variance_type="learned_range")
    levels = discrete(scheduler, 20)
    table, x, data = solver("ddpm", DISCRETE, levels, variance="learned"), start(DISCRETE, levels[0]), elementwise(DISCRETE)
    assert table.learned
    assert table.stochastic
    ours = states(table, lambda x, t: (data(x, t), (torch.tanh(x) + 1) / 2), x, torch.Generator().manual_seed(1))
    record, y, generator = [], x, torch.Generator().manual_seed(1)
    for i in scheduler.timesteps:
        t = (torch.as_tensor(i, dtype=torch.float64) + 1) / 1000
        a, s = DISCRETE.alpha(t).float(), DISCRETE.sigma(t).float()
        out = torch.cat([(y - a * data(y, t.float())) / s, torch.tanh(y)], 1)
        y = scheduler.step(out, i, y, generator=generator).prev_sample
        record.append(y)
    assert_same(ours, record)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_a_constant_fraction_is_a_fixed_variance(variance):
    x, v = torch.randn(3, 4, generator=torch.Generator().manual_seed(2)), float(variance == "large")
    draws = []
    for table, denoise in (
        (solver("ddpm", VP, 6, variance=variance), elementwise(VP)),
        (solver("ddpm", VP, 6, variance="learned"), lambda x, t: (elementwise(VP)(x, t), torch.full_like(x, v))),
    ):
        draws.append(sample(denoise, table, x, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(*draws)


@pytest.mark.parametrize("schedule", [VP, NoiseSchedule.edm(), NoiseSchedule.flow()], ids=lambda s: s.name)
def test_the_best_variance_draws_a_gaussian_exactly_in_few_steps(schedule):
    """For which neither fixed one does: x_r given x_t is Gaussian, and its variance lies between theirs (Bao et al. 2022)."""
    levels = torch.tensor([1.0, 0.7, 0.45, 0.3, 0.2, 0.02], dtype=torch.float64)
    nexts = dict(zip(levels.tolist(), levels[1:]))
    x_T = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, s = schedule.alpha(levels[0]), schedule.sigma(levels[0])
    x_T = a * MU + torch.sqrt(a**2 * V + s**2) * x_T

    def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        d, posterior = gaussian(schedule, x, t)
        return d, best_fraction(schedule, posterior, t, nexts[float(t)])

    a, s = schedule.alpha(levels[-1]), schedule.sigma(levels[-1])
    true = float(a**2 * V + s**2)

    def error(variance: str) -> float:
        table = solver("ddpm", schedule, levels, variance=variance)
        call = denoise if table.learned else lambda x, t: denoise(x, t)[0]
        x = sample(call, table, x_T, torch.Generator().manual_seed(1))
        assert float(x.mean()) == pytest.approx(float(a * MU), abs=0.01)
        return abs(float(x.var()) / true - 1)

    assert error("learned") < 0.015
    assert min(error("small"), error("large")) > 0.05


def test_the_best_variance_keeps_the_moments_of_a_mixture():
    """Var(x_0 | x_t) = (sigma^2 / alpha) dD / dx differs from number to number, and so does v."""
    data, levels = elementwise(VP), torch.linspace(1, 0, 41, dtype=torch.float64) ** 2
    nexts = dict(zip(levels.tolist(), levels[1:]))

    def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            d = data(y, t)
            (slope,) = torch.autograd.grad(d.sum(), y)
        if float(nexts[float(t)]) == 0:
            return d.detach(), torch.zeros_like(x)
        return d.detach(), best_fraction(VP, VP.sigma(t) ** 2 / VP.alpha(t) * slope, t, nexts[float(t)])

    x_T = torch.randn(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = sample(denoise, solver("ddpm", VP, levels, variance="learned"), x_T, torch.Generator().manual_seed(1))
    assert float(x.mean()) == pytest.approx(float(LINE.mean()), abs=0.02)
    assert float(x.var()) == pytest.approx(float(LINE.covariance()), rel=0.02)


def test_known_tokens_stay_and_levels_may_differ():
    tokens = torch.tensor([[0.0], [1.0], [0.4]])
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = solver("ddpm", VP, 5, tokens=tokens, variance="learned")
    out = sample(lambda x, t: (elementwise(VP)(x, t), torch.sigmoid(x)), table, x, torch.Generator().manual_seed(0))
    assert torch.equal(out[:, 0], x[:, 0])
    assert out.isfinite().all()


class Affine(nn.Module):
    """The exact denoiser of N(MU, V), and one raw number for the variance everywhere."""

    def __init__(self, raw: float) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.tensor(raw))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        t = t.double()
        d, _ = gaussian(VP, x.double() * torch.sqrt(VP.alpha(t) ** 2 + VP.sigma(t) ** 2), t)
        return torch.cat([d, self.raw.double().expand_as(d)], -1).to(x.dtype)


def test_the_bound_is_least_at_the_best_variance():
    """Its gradient in v vanishes where the variance is that of x_r given x_t, and only there; the data's prediction gets none."""
    t, one = torch.tensor(0.4, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    _, posterior = gaussian(VP, one, t)
    best = float(2 * best_fraction(VP, posterior, t, t - 1e-3) - 1)
    x_0 = MU + math.sqrt(V) * torch.randn(4000, 50, 1, generator=torch.Generator().manual_seed(0))
    slopes = []
    for raw in (best, best + 0.05, best - 0.05):
        denoiser = Denoiser(Affine(raw), VP, Layout(action=1), variance="learned")
        loss = denoiser.loss(x_0, torch.Generator().manual_seed(1), levels=torch.full((4000,), float(t)))
        loss.backward()
        slopes.append(float(denoiser.network.raw.grad))
    assert abs(slopes[0]) < 0.05 * min(slopes[1], -slopes[2])


@pytest.mark.parametrize("name", ["mlp", "transformer", "unet"])
def test_networks_give_it_beside_the_data(name):
    """Both halves of the outputs are trained."""
    network = build_network(name, features=2, horizon=4, groups=1, outputs=4, width=16)
    x = torch.randn(5, 4, 2, generator=torch.Generator().manual_seed(0))
    denoiser = Denoiser(network, VP, Layout(action=2), variance="learned")
    d, v = denoiser.with_variance(x, torch.tensor(0.5))
    assert d.shape == v.shape == x.shape
    assert torch.equal(d, denoiser(x, torch.tensor(0.5)))
    denoiser.loss(x, torch.Generator().manual_seed(0)).backward()
    gradient = network.out.bias.grad if name != "unet" else network.last[1].bias.grad
    assert (gradient.view(-1, 4) != 0).all()


def test_mistakes_are_named():
    network = build_network("mlp", features=2, horizon=4, groups=1, width=8)
    with pytest.raises(UserError, match="did you mean 'learned'"):
        Denoiser(network, VP, Layout(action=2), variance="learnt")
    with pytest.raises(UserError, match="has learned no variance"):
        Denoiser(network, VP, Layout(action=2)).with_variance(torch.zeros(1, 4, 2), torch.tensor(0.5))
    with pytest.raises(UserError, match="knows no learned variance"):
        NumpySampler(solver("ddpm", VP, 5, variance="learned"), (2,))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.gain * x


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_input_perturbation_trains_for_noisier_inputs(gamma):
    """The best linear map from alpha x_0 + sigma (eps + gamma xi) to eps, for x_0 ~ N(0, 1), is sigma / (1 + sigma^2 gamma^2)."""
    t = 0.5
    s = float(VP.sigma(torch.tensor(t)))
    denoiser = Denoiser(Linear(), VP, Layout(action=1), "noise")
    x_0 = torch.randn(2000, 100, 1, generator=torch.Generator().manual_seed(0))
    levels = torch.full((2000,), t)
    gains, losses = (0.0, 1.0, 2.0), []
    for gain in gains:
        denoiser.network.gain.data.fill_(gain)
        with torch.no_grad():
            losses.append(float(denoiser.loss(x_0, torch.Generator().manual_seed(1), levels=levels, perturbation=gamma)))
    # a parabola in the gain
    curvature = losses[2] - 2 * losses[1] + losses[0]
    best = 1 - (losses[2] - losses[0]) / (2 * curvature)
    assert best == pytest.approx(s / (1 + (s * gamma) ** 2), abs=0.01)
