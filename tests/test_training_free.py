"""The TFG family: against its algorithm written out, where it is exact, and how far off it is where it is not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffusion import NoiseSchedule, sample, solver
from diffusion.guidance import METHODS, Settings, TrainingFree, search
from pilotwave.errors import UserError
from tests.mixture import PLANE, Mixture
from tests.tilted import LINEAR, TILTED, begin, deviations, reward

VP, FLOW, EDM = NoiseSchedule.vp_linear(), NoiseSchedule.flow(), NoiseSchedule.edm()
SCHEDULES = pytest.mark.parametrize("schedule", [VP, FLOW, EDM], ids=lambda s: s.name)
LEVELS = torch.tensor([0.02, 0.3, 0.7, 0.98], dtype=torch.float64)
METHOD = pytest.mark.parametrize("method", METHODS)


def gaussian(mean: Tensor, S: Tensor) -> Mixture:
    return Mixture(torch.ones(1, dtype=torch.float64), mean[None], S[None])


def linear(x: Tensor) -> Tensor:
    return x @ LINEAR.to(x.dtype)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_with_ddpm_it_is_algorithm_1_of_the_paper(gamma):
    """Ye et al. 2024 in their symbols, with rho_t = rho beta_t, mu_t = mu beta_t and N_iter = 1."""
    rho, mu, recur, draws = 0.6, 0.3, 3, 2
    levels = torch.linspace(1, 0, 9, dtype=torch.float64)
    bar = VP.alpha(levels) ** 2
    D, noise, smoothing = PLANE.denoiser(VP), seeded(1), seeded(2)
    x_t = x_T = begin(VP, 30)
    for i in range(8):
        alpha_t = bar[i] / bar[i + 1]
        beta_t = 1 - alpha_t
        for _ in range(recur):
            x = x_t.clone().requires_grad_()
            deltas = [torch.empty_like(x_t).normal_(generator=smoothing) for _ in range(draws)] if gamma else [torch.zeros(())]

            def log_f(x, deltas=deltas, i=i):
                f = sum(reward(x + gamma * (1 - bar[i]).sqrt() * delta).exp() for delta in deltas) / len(deltas)
                return f.log().sum()

            x_0 = D(x, levels[i])
            delta_t = rho * beta_t * torch.autograd.grad(log_f(x_0), x)[0]
            x_0 = x_0.detach().requires_grad_()
            delta_0 = mu * beta_t * torch.autograd.grad(log_f(x_0), x_0)[0]
            mean = (bar[i + 1].sqrt() * beta_t * x_0 + alpha_t.sqrt() * (1 - bar[i + 1]) * x_t) / (1 - bar[i])
            variance = beta_t * (1 - bar[i + 1]) / (1 - bar[i])
            x_next = mean.detach() + delta_t / alpha_t.sqrt() + bar[i + 1].sqrt() * delta_0
            if variance > 0:
                x_next = x_next + variance.sqrt() * torch.empty_like(x_t).normal_(generator=noise)
            if _ < recur - 1:
                x_t = alpha_t.sqrt() * x_next + beta_t.sqrt() * torch.empty_like(x_t).normal_(generator=noise)
        x_t = x_next
    settings = Settings(rho=rho, mu=mu, gamma=gamma, draws=draws, recur=recur)
    guide = TrainingFree(D, reward, VP, settings, seeded(2))
    table = solver("recurrent", VP, levels, times=recur, base="ddpm")
    torch.testing.assert_close(sample(guide.denoise, table, x_T, seeded(1)), x_t, rtol=1e-9, atol=1e-9)


@METHOD
def test_the_hook_and_the_denoiser_agree(method):
    calls = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return PLANE.denoiser(VP)(x, t)

    settings, x = METHODS[method], begin(VP, 20)
    table = solver("recurrent", VP, 5, times=settings.recur)
    direct = sample(TrainingFree(denoise, reward, VP, settings, seeded(1)).denoise, table, x, seeded(2))
    assert len(calls) == table.evaluations == 5 * settings.recur
    hook = sample(denoise, table, x, seeded(2), guide=TrainingFree(denoise, reward, VP, settings, seeded(1)))
    assert len(calls) == (2 if settings.rho == 0 else 3) * table.evaluations
    torch.testing.assert_close(direct, hook)


# -- where it is exact -------------------------------------------------------------------------------------------------


@SCHEDULES
def test_dps_is_exact_for_gaussian_data_and_a_linear_energy(schedule):
    data = gaussian(PLANE.means[0], PLANE.covariances[0])
    truth = data.tilted(LINEAR, torch.zeros(2, 2, dtype=torch.float64)).denoiser(schedule)
    guide = TrainingFree(data.denoiser(schedule), linear, schedule, METHODS["dps"])
    for t in LEVELS:
        x = begin(schedule, 20)
        torch.testing.assert_close(guide.denoise(x, t), truth(x, t), rtol=1e-7, atol=1e-7)


@SCHEDULES
@pytest.mark.parametrize("iterations", [1, 4])
def test_mpgd_is_exact_for_white_data_and_a_linear_energy(schedule, iterations):
    data = gaussian(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    truth = data.tilted(LINEAR, torch.zeros(2, 2, dtype=torch.float64)).denoiser(schedule)
    settings = replace(METHODS["mpgd"], mu=1 / iterations, iterations=iterations)
    guide = TrainingFree(data.denoiser(schedule), linear, schedule, settings)
    for t in LEVELS:
        x = begin(schedule, 20)
        torch.testing.assert_close(guide.denoise(x, t), truth(x, t), rtol=1e-7, atol=1e-7)


@SCHEDULES
def test_lgd_is_exact_for_white_data_and_any_energy(schedule):
    data = gaussian(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    A = 2 * torch.eye(2, dtype=torch.float64)
    truth = data.tilted(LINEAR, A).denoiser(schedule)
    settings = replace(METHODS["lgd"], draws=1500)
    guide = TrainingFree(data.denoiser(schedule), lambda x: linear(x) - x.square().sum(-1), schedule, settings, seeded())
    for t in LEVELS[1::2]:
        x = begin(schedule, 8)
        torch.testing.assert_close(guide.denoise(x, t), truth(x, t), rtol=0, atol=0.1)
        biased = TrainingFree(guide._denoise, guide.log_f, schedule, METHODS["dps"]).denoise(x, t)
        assert (biased - truth(x, t)).abs().max() > 0.1 or t < 0.5


# -- where it is not ---------------------------------------------------------------------------------------------------


@METHOD
def test_on_the_mixture_it_comes_nearer_the_truth_without_reaching_it(method):
    settings, x = METHODS[method], begin(VP, 4000)
    table = solver("recurrent", VP, 20, times=settings.recur)
    guide = TrainingFree(PLANE.denoiser(VP), reward, VP, settings, seeded(1))
    guided, plain = sample(guide.denoise, table, x, seeded()), sample(PLANE.denoiser(VP), table, x, seeded())
    assert (guided.mean(0) - TILTED.mean()).norm() < 0.6 * (plain.mean(0) - TILTED.mean()).norm()
    assert deviations(guided)[0] > 10


# -- search ------------------------------------------------------------------------------------------------------------


def test_the_search_doubles_what_helps():
    scored: list[Settings] = []

    def score(s: Settings) -> float:
        scored.append(s)
        return -((math.log2(s.rho) - 2) ** 2) - (math.log2(s.mu) + 1) ** 2 - s.gamma

    found = search(score, Settings(rho=0.25, mu=0.25, recur=3), beam=2, rounds=20)
    assert found[0][1] == Settings(rho=4.0, mu=0.5, recur=3)
    assert found[0][0] == 0 > found[1][0]
    assert len(set(scored)) == len(scored) < 20  # nothing twice, and it ends by itself
    assert all(s.gamma == 0 for s in scored)


def test_the_search_ends_after_its_rounds():
    assert search(lambda s: s.rho, METHODS["dps"], rounds=3, beam=1) == [(8.0, Settings(rho=8.0))]


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(UserError, match="did you mean 'increase'"):
        Settings(rho_structure="increasing")
    with pytest.raises(UserError, match="wants rho, mu, gamma >= 0"):
        Settings(rho=-1)
    with pytest.raises(UserError, match="recurrent wants times >= 1"):
        solver("recurrent", VP, times=0)
    with pytest.raises(UserError, match="did you mean 'ddpm'"):
        solver("recurrent", VP, base="dpm")
