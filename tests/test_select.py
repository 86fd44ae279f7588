"""Best of n, SVDD and Feynman-Kac steering, against tilted mixtures and what is known of each in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion import NoiseSchedule, sample, solver
from diffusion.guidance import POTENTIALS, SVDD, BestOf, FeynmanKac
from diffusion.guidance._particles import draw, rows, systematic
from pilotwave.errors import UserError
from tests.mixture import PLANE
from tests.tilted import LINEAR, QUADRATIC, TILTED, begin, deviations, exact_energy, reward

VP = NoiseSchedule.vp_linear()
DENOISE = PLANE.denoiser(VP)
TABLE = solver("dpmpp_2m_sde", VP, 30, spacing="quadratic")  # the reverse SDE, which keeps the moments well in few steps


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact_value(x: Tensor, d: Tensor, t: Tensor) -> Tensor:
    return exact_energy(VP)(x, t)


# -- drawing -----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(log_w=st.lists(st.floats(-5, 5), min_size=1, max_size=40), seed=st.integers(0, 1000))
def test_systematic_resampling_takes_each_as_often_as_it_weighs(log_w, seed):
    weights = torch.tensor([log_w, log_w[::-1]], dtype=torch.float64).softmax(1)
    n = len(log_w)
    counts = torch.stack([torch.bincount(each, minlength=n) for each in systematic(weights, seeded(seed))])
    assert ((counts - n * weights).abs() < 1 + 1e-9).all()


def test_systematic_resampling_is_unbiased():
    weights = torch.tensor([[0.05, 0.1, 0.25, 0.6]], dtype=torch.float64).expand(5000, -1)
    share = torch.bincount(systematic(weights, seeded()).flatten(), minlength=4) / 20_000
    torch.testing.assert_close(share.double(), weights[0], rtol=0, atol=0.01)


def test_draws_are_softmax_and_the_greatest_at_temperature_0():
    logits = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
    many = torch.stack([draw(logits, 2.0, seeded(i))[:, 0] for i in range(4000)])
    for group, expected in enumerate((logits / 2).softmax(1)):
        share = torch.bincount(many[:, group], minlength=3) / 4000
        torch.testing.assert_close(share.double(), expected, rtol=0, atol=0.035)
    assert draw(logits, 0.0, None)[:, 0].tolist() == [1, 0]
    assert rows(torch.tensor([[1, 1], [0, 2]]), 3).tolist() == [1, 1, 3, 5]


# -- best of n ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "mean"), [(1, 0.0), (2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi)), (5, 1.16296)])
def test_best_of_n_is_the_greatest_order_statistic(n, mean):
    x = torch.randn(20_000 * n, 1, dtype=torch.float64, generator=seeded())
    best = BestOf(lambda x: 3 * x[:, 0], n).finish(x)
    assert best.shape == (20_000, 1)
    assert abs(best.mean() - mean) < 5 * best.std() / math.sqrt(20_000)


def test_drawn_by_reward_it_becomes_the_tilted_density():
    x = PLANE.draw(64_000, seeded())
    errors = [(BestOf(reward, n, 1.0, seeded(1)).finish(x).mean(0) - TILTED.mean()).norm() for n in (1, 4, 16)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert deviations(BestOf(reward, 64, 1.0, seeded(1)).finish(x))[0] < 5


# -- SVDD --------------------------------------------------------------------------------------------------------------


def test_svdd_with_one_successor_is_the_sampler_itself():
    x = begin(VP, 50)
    plain = sample(DENOISE, TABLE, x, seeded())
    svdd = SVDD(reward, 1, generator=seeded(1))
    assert torch.equal(svdd.finish(sample(DENOISE, TABLE, x, seeded(), select=svdd)), plain)


def test_svdd_keeps_one_of_each_group_and_gives_it_all_places():
    x, t = torch.arange(6.0)[:, None], torch.tensor(0.5)
    svdd = SVDD(lambda x: -x[:, 0], 3, temperature=0.0)
    assert svdd(x, x, t).tolist() == [0, 0, 0, 3, 3, 3]
    assert svdd(x, -x, t).tolist() == [2, 2, 2, 5, 5, 5]
    assert SVDD(reward, 3, 0.0, value=lambda x, d, t: x[:, 0])(x, -x, t).tolist() == [2, 2, 2, 5, 5, 5]
    assert svdd.finish(x).flatten().tolist() == [0, 3]


def test_svdd_with_the_exact_value_comes_to_the_tilted_mixture():
    """At temperature 2 the tilt is half as strong; what is left to correct goes as 1 / n."""
    truth = PLANE.tilted(LINEAR / 2, QUADRATIC / 2)

    def value(x: Tensor, d: Tensor, t: Tensor) -> Tensor:
        return 2 * exact_energy(VP, truth)(x, t)

    errors = []
    for n in (2, 24):
        svdd = SVDD(reward, n, temperature=2.0, value=value, generator=seeded(1))
        x = svdd.finish(sample(DENOISE, TABLE, begin(VP, 1000 * n), seeded(), select=svdd))
        errors.append(x.mean(0) - truth.mean())
    assert errors[1].norm() < 0.25 * errors[0].norm()
    assert errors[1].abs().max() < 0.08  # five standard errors of 1000 samples


# -- Feynman-Kac -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("potential", POTENTIALS)
def test_without_resampling_the_weights_are_those_of_the_reward(potential):
    """Whatever the potentials were, they cancel in the product: the last resampling is importance sampling's."""
    fk = FeynmanKac(reward, 20, potential=potential, threshold=0.0, generator=seeded(1))
    x_0 = sample(DENOISE, TABLE, begin(VP, 100), seeded(), select=fk)
    assert torch.equal(x_0, sample(DENOISE, TABLE, begin(VP, 100), seeded()))
    fk.generator = seeded(1)
    picked = systematic(reward(x_0).view(-1, 20).softmax(1), seeded(1))
    assert torch.equal(fk.finish(x_0), x_0[rows(picked, 20)])


@pytest.mark.parametrize("value", [None, exact_value], ids=["of D", "exact"])
@pytest.mark.parametrize(
    ("potential", "threshold", "every"),
    [("difference", 0.5, 1), ("difference", 1.0, 1), ("max", 0.5, 15), ("sum", 0.5, 15)],
)
def test_feynman_kac_samples_the_tilted_mixture(value, potential, threshold, every):
    n, groups = 200, 40
    fk = FeynmanKac(reward, n, value=value, potential=potential, threshold=threshold, every=every, generator=seeded(1))
    x = fk.finish(sample(DENOISE, TABLE, begin(VP, n * groups), seeded(), select=fk))
    assert deviations(x, groups=groups)[0] < 5
    assert (x.mean(0) - TILTED.mean()).norm() < 0.1 * (PLANE.mean() - TILTED.mean()).norm()


def test_temperature_divides_the_reward():
    truth = PLANE.tilted(LINEAR / 3, QUADRATIC / 3)
    fk = FeynmanKac(reward, 100, temperature=3.0, generator=seeded(1))
    x = fk.finish(sample(DENOISE, TABLE, begin(VP, 8000), seeded(), select=fk))
    assert deviations(x, truth, groups=80)[0] < 5


def test_resampling_happens_where_few_are_left():
    """Two groups: in the first one particle has all the weight, in the second all weigh alike."""
    fk = FeynmanKac(lambda x: 50 * x[:, 0], 4, threshold=0.5, generator=seeded())
    x = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])[:, None]
    t = torch.tensor(0.5)
    assert fk(x, x, t).tolist() == [2, 2, 2, 2, 4, 5, 6, 7]
    # the first group's survivors remember the value they were chosen for: the same value again changes nothing
    assert fk(x, torch.ones_like(x), t).tolist() == list(range(8))


def test_an_object_serves_one_run_after_another():
    fk = FeynmanKac(reward, 10, every=4)
    runs = []
    for _ in range(2):
        fk.generator = seeded(1)
        runs.append(fk.finish(sample(DENOISE, TABLE, begin(VP, 50), seeded(), select=fk)))
    assert torch.equal(*runs)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(UserError, match="did you mean 'difference'"):
        FeynmanKac(reward, 4, potential="diference")
    with pytest.raises(UserError, match="wants temperature > 0"):
        FeynmanKac(reward, 4, temperature=0.0)
    with pytest.raises(UserError, match="groups of 4"):
        BestOf(reward, 4).finish(torch.zeros(6, 2))
    with pytest.raises(UserError, match="one number for each"):
        SVDD(lambda x: x, 2)(torch.zeros(4, 2), torch.zeros(4, 2), torch.tensor(0.5))
