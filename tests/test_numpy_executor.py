"""The NumPy executor runs every table as torch's does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusion import Layout, NoiseSchedule, NumpySampler, Row, Tableau, level_matrices, sample, solver, solvers, spaced
from diffusion.solvers.dpm_v3 import ModelStatistics
from pilotwave.errors import UserError
from tests.mixture import elementwise

VP = NoiseSchedule.vp_linear()
CALM = {
    "edm": {"churn": 0},
    "sa": {"tau": 0},
    "restart": {"times": 0},
    "splitting": {"noise": 0},
    "recurrent": {"times": 1},
    "ddpm": None,
    "ddpm_accelerated": None,
    "dpmpp_2m_sde": None,
}


def denoise(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    return elementwise(VP)(torch.from_numpy(x), torch.from_numpy(np.asarray(t))).numpy()


@pytest.mark.parametrize("name", [name for name in solvers() if CALM.get(name, {}) is not None])
def test_it_draws_what_the_torch_executor_draws(name):
    table = solver(name, VP, 7, **CALM.get(name, {}))
    x = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before, sampler = x.clone(), NumpySampler(table, x.shape, np.float64)
    for _ in range(2):  # nothing is left from a run before
        np.testing.assert_allclose(sampler(denoise, x.numpy()), sample(elementwise(VP), table, x).numpy(), rtol=1e-9, atol=1e-9)
    assert torch.equal(x, before)


def test_a_row_is_what_its_equations_say():
    """The table of tests/test_tableau.py by hand, and a prediction that is kept otherwise."""
    t = torch.tensor([1.0, 0.7, 0.4, 0.1], dtype=torch.float64)
    table = Tableau(
        "by hand",
        (
            Row(t[0], t[1], 0.5, 0.25, K=(0.5, 2.0)),
            Row(t[1], t[2], 0.9, 0.1, (0.3,), P=(2.0, (1.5,), 0.0)),
            Row(t[2], t[2], 1.1, U=(0.2, 0.7), evaluate=False),
            Row(t[2], t[3], 2.0, 0.4, (1.0, 0.0), P=(1.0, (0.0, -0.5), 0.0)),
        ),
    )
    x = np.random.default_rng(0).standard_normal((3, 4))
    d_1 = 0.5 * x + 2 * (np.sin(x) + 1)
    x_1 = 0.5 * x + 0.25 * d_1
    d_2 = np.sin(2 * x_1 + 1.5 * d_1) + 0.7
    x_3 = 1.1 * (0.9 * x_1 + 0.1 * d_2 + 0.3 * d_1) + 0.2 * d_2 + 0.7 * d_1
    d_3 = np.sin(x_3 - 0.5 * d_1) + 0.4
    expected = 2 * x_3 + 0.4 * d_3 + d_2
    np.testing.assert_allclose(NumpySampler(table, x.shape, np.float64)(lambda y, t: np.sin(y) + t, x), expected, rtol=1e-12)
    torched = sample(lambda y, t: torch.sin(y) + t, table, torch.from_numpy(x))
    np.testing.assert_allclose(torched.numpy(), expected, rtol=1e-12)


def test_noise_comes_from_the_generator_and_has_its_coefficient():
    one = torch.ones(())
    table = Tableau("noise", (Row(one, one, 0.0, U_z=3.0, P=(1.0, (), 2.0)),))
    sampler, x, seen = NumpySampler(table, (20_000,)), np.zeros(20_000, np.float32), []

    def keep(y: np.ndarray, t: np.ndarray) -> np.ndarray:
        seen.append(y.copy())
        return np.zeros_like(y)

    first = sampler(keep, x, np.random.default_rng(1))
    assert first.dtype == np.float32
    assert np.array_equal(first, sampler(keep, x, np.random.default_rng(1)))
    assert not np.array_equal(first, sampler(keep, x, np.random.default_rng(2)))
    assert first.std() == pytest.approx(3, rel=0.03)
    assert seen[0].std() == pytest.approx(2, rel=0.03)
    assert abs(np.corrcoef(first, seen[0])[0, 1]) < 0.03


@pytest.mark.parametrize("name", [name for name in solvers() if CALM.get(name, {}) is not None and name != "restart"])
def test_levels_may_differ_by_token(name):
    """A pyramid with a token that is pinned, over two groups of features; the pinned one keeps every bit."""
    tokens = torch.tensor([[1.0, 1.0], [0.0, 0.5], [1.0, 1.0]])
    levels = level_matrices.pyramid(0.98 * spaced(VP, 5), 3, delay=2)
    table = solver(name, VP, levels, tokens=tokens, layout=Layout(a=1, b=2), **CALM.get(name, {}))
    x = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = NumpySampler(table, x.shape, np.float64)(denoise, x.numpy())
    np.testing.assert_allclose(ours, sample(elementwise(VP), table, x).numpy(), rtol=1e-9, atol=1e-9)
    assert np.array_equal(ours[:, 1, :1], x[:, 1, :1].numpy())


def test_constants_of_rows_are_added():
    lmbda = torch.tensor([-6.0, 6.0], dtype=torch.float64)
    statistics = ModelStatistics(lmbda, *(torch.full((2, 3), v, dtype=torch.float64) for v in (0.8, -0.3, 0.2)))
    table = solver("dpm_v3", VP, 6, statistics=statistics)
    x = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = NumpySampler(table, x.shape, np.float64)(denoise, x.numpy())
    np.testing.assert_allclose(ours, sample(elementwise(VP), table, x).numpy(), rtol=1e-9, atol=1e-9)


def test_tokens_that_do_not_fit_are_refused():
    table = solver("ddim", VP, level_matrices.pyramid(5, 3))
    with pytest.raises(UserError, match=r"tokens \(1, 3, 1\), which do not fit samples \(1, 4, 3\)"):
        NumpySampler(table, (1, 4, 3))
