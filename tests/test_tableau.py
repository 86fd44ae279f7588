"""The executor and its hooks, and tables for levels that differ by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusion import Layout, NoiseSchedule, Row, Tableau, sample, solver, solvers
from tests.mixture import elementwise

VP = NoiseSchedule.vp_linear()
NOISY = ("ddpm", "ddpm_accelerated", "dpmpp_2m_sde", "recurrent", "restart")
DETERMINISTIC = [name for name in solvers() if name not in NOISY]
CALM = {"edm": {"churn": 0}, "sa": {"tau": 0}, "splitting": {"noise": 0}}  # options that take the noise away
every = pytest.mark.parametrize("name", solvers())
calm = pytest.mark.parametrize("name", DETERMINISTIC)
alone = pytest.mark.parametrize("name", [name for name in DETERMINISTIC if name != "ddim_accelerated"])


def calmly(name: str, *args, **options) -> Tableau:
    return solver(name, *args, **CALM.get(name, {}), **options)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def states(denoise, table: Tableau, x: Tensor, **hooks) -> list[tuple[Tensor, Tensor]]:
    """(t, x) after every update."""
    record: list[tuple[Tensor, Tensor]] = []

    def keep(x: Tensor, t: Tensor) -> Tensor:
        record.append((t, x))
        return x

    assert sample(denoise, table, x, constrain=keep, **hooks) is record[-1][1]
    return record


# -- the executor ------------------------------------------------------------------------------------------------------


def test_a_row_is_what_its_equations_say():
    """Three rows by hand: points to evaluate at, two earlier predictions, and a row without an evaluation."""
    t = torch.tensor([1.0, 0.7, 0.4, 0.1], dtype=torch.float64)
    per_token = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    table = Tableau(
        "by hand",
        (
            Row(t[0], t[1], 0.5, 0.25),
            Row(t[1], t[2], 0.9, 0.1, (0.3,), P=(2.0, (1.5,), 0.0)),
            Row(t[2], t[2], 1.1, U=(0.2, 0.7), evaluate=False),
            Row(t[2], t[3], per_token, 0.4, (1.0, 0.0), P=(1.0, (0.0, -0.5), 0.0)),
        ),
    )
    assert (table.evaluations, table.memory) == (3, 2)
    x = noise(3, 2, 4)
    d_1 = torch.sin(x) + t[0]
    x_1 = 0.5 * x + 0.25 * d_1
    d_2 = torch.sin(2 * x_1 + 1.5 * d_1) + t[1]
    x_2 = 0.9 * x_1 + 0.1 * d_2 + 0.3 * d_1
    x_3 = 1.1 * x_2 + 0.2 * d_2 + 0.7 * d_1
    d_3 = torch.sin(x_3 - 0.5 * d_1) + t[2]
    x_4 = per_token * x_3 + 0.4 * d_3 + d_2
    torch.testing.assert_close(sample(lambda y, t: torch.sin(y) + t, table, x), x_4, rtol=1e-13, atol=1e-13)


def test_noise_of_a_row_has_its_coefficient_and_comes_from_the_generator():
    one = torch.ones(())
    table = Tableau("noise", (Row(one, one, 0.0, U_z=3.0, P=(1.0, (), 2.0)),))
    seen: list[Tensor] = []

    def denoise(y: Tensor, t: Tensor) -> Tensor:
        seen.append(y)
        return torch.zeros_like(y)

    x = torch.zeros(20_000)
    first = sample(denoise, table, x, torch.Generator().manual_seed(1))
    assert torch.equal(first, sample(denoise, table, x, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, sample(denoise, table, x, torch.Generator().manual_seed(2)))
    assert first.std() == pytest.approx(3, rel=0.03)
    assert seen[0].std() == pytest.approx(2, rel=0.03)
    assert abs(torch.corrcoef(torch.stack([first, seen[0]]))[0, 1]) < 0.03


# of seven steps: several a step, but one in a step to t = 0; restart takes two of three more steps down to it
CALLS = {
    "heun": 13,
    "ddim_accelerated": 13,
    "edm": 13,
    "dpm_2": 13,
    "dpmpp_2s": 13,
    "dpm_3": 19,
    "midpoint": 14,
    "recurrent": 14,
    "restart": 23,
    "splitting": 13,
}


@every
def test_evaluations_are_counted(name):
    table, calls = solver(name, VP, 7), []
    sample(lambda x, t: calls.append(t) or torch.zeros_like(x), table, noise(2, 3))
    assert len(calls) == table.evaluations == CALLS.get(name, 7)
    if name not in ("ddim_accelerated", "edm", "recurrent", "restart"):  # which go back
        assert [float(t) for t in calls] == sorted((float(t) for t in calls), reverse=True)


def test_a_table_is_moved_once():
    table = solver("dpmpp_2m", VP, 5)
    assert table.to("cpu") is table.to("cpu", torch.float32) is not table.to("cpu", torch.float64)
    assert table.to("cpu", torch.float16).rows[0].t.dtype == torch.float16


def test_sampling_is_differentiable_after_sampling_in_inference_mode():
    table, weight = solver("heun", VP, 4, tokens=torch.ones(2, 1)), torch.tensor(0.5, requires_grad=True)
    with torch.inference_mode():
        sample(lambda x, t: x * t, table, noise(1, 2, 3, dtype=torch.float32))
    sample(lambda x, t: weight * x * t, table, noise(1, 2, 3, dtype=torch.float32)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs() > 0


@every
def test_precision_is_that_of_the_samples(name):
    x = noise(4, 5)
    table, denoise = solver(name, VP, 6), elementwise(VP)
    single = sample(denoise, table, x.float(), torch.Generator().manual_seed(0))
    assert single.dtype == torch.float32
    if name in DETERMINISTIC and name not in CALM:  # noise differs between precisions
        torch.testing.assert_close(single.double(), sample(denoise, table, x), rtol=1e-4, atol=1e-5)


# -- hooks -------------------------------------------------------------------------------------------------------------


@every
def test_guide_changes_every_prediction(name):
    """A guide that replaces the prediction is a denoiser."""
    x, denoise, table = noise(3, 4), elementwise(VP), solver(name, VP, 5)
    points: list[Tensor] = []

    def guide(d: Tensor, y: Tensor, t: Tensor) -> Tensor:
        points.append(y)
        assert torch.equal(d, torch.zeros_like(y))
        return denoise(y, t)

    guided = sample(lambda x, t: torch.zeros_like(x), table, x, torch.Generator().manual_seed(3), guide=guide)
    assert torch.equal(guided, sample(denoise, table, x, torch.Generator().manual_seed(3)))
    assert len(points) == table.evaluations


@pytest.mark.parametrize(("schedule", "power"), [(VP, 2), (NoiseSchedule.edm(), 1)], ids=["vp", "edm"])
def test_guide_on_a_gaussian_gives_the_tilted_gaussian(schedule, power):
    """p(x_0) = N(mu, S) tilted by exp(b . x_0) is N(mu + S b, S), and E[x_0 | x_t] moves by Cov(x_0 | x_t) b.

    All is affine, so the samples' mean and covariance are exact, with no Monte Carlo.
    """
    mu, b = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([1.5, 0.7], dtype=torch.float64)
    S = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)

    def gain(t: Tensor) -> Tensor:
        a, s = schedule.alpha(t), schedule.sigma(t)
        return a * S @ torch.linalg.inv(a**2 * S + s**2 * eye)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return mu + (x - schedule.alpha(t) * mu) @ gain(t).T

    def guide(d: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return d + (S - schedule.alpha(t) * gain(t) @ S) @ b

    table = solver("heun", schedule, torch.linspace(1, 0, 200) ** power)
    a, s = (f(torch.ones((), dtype=torch.float64)) for f in (schedule.alpha, schedule.sigma))
    tilted = mu + S @ b
    start = torch.cat([(a * tilted)[None], a * tilted + eye])
    out = sample(denoise, table, start, guide=guide)
    A = (out[1:] - out[0]).T
    torch.testing.assert_close(out[0], tilted, rtol=0, atol=1e-3)
    torch.testing.assert_close(A @ (a**2 * S + s**2 * eye) @ A.T, S, rtol=0, atol=1e-3)


@every
def test_constrain_follows_every_update_and_has_the_last_word(name):
    seen: list[float] = []

    def halve(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t))
        return x.clamp(max=0.1)

    x = sample(elementwise(VP), solver(name, VP, 4), noise(50), constrain=halve)
    down = [t for t, before in zip(seen, [1.0, *seen]) if t < before]
    assert list(dict.fromkeys(t for t in down if t in (0.75, 0.5, 0.25, 0.0)))[:3] == [0.75, 0.5, 0.25]
    assert (seen == [0.75, 0.5, 0.25, 0.0]) == (name not in ("ddpm_accelerated", "edm", "recurrent", "restart"))
    assert seen[-1] == 0
    assert x.max() == 0.1


@calm
def test_select_reorders_all_that_goes_on(name):
    """State, prediction and history: swapping trajectories midway is the same as swapping their results."""
    x, table, denoise = noise(4, 3), calmly(name, VP, 6), elementwise(VP)
    order, calls = torch.tensor([2, 0, 3, 1]), [0]

    def select(x: Tensor, d: Tensor, t: Tensor) -> Tensor:
        calls[0] += 1
        return order if calls[0] == 3 else torch.arange(4)

    swapped = sample(denoise, table, x, select=select)
    assert calls[0] == table.evaluations
    torch.testing.assert_close(swapped, sample(denoise, table, x)[order], rtol=1e-13, atol=1e-13)


def test_select_keeps_the_best():
    x, table, denoise = noise(16, 3), solver("dpmpp_2m", VP, 6), elementwise(VP)

    def select(x: Tensor, d: Tensor, t: Tensor) -> Tensor:
        return d.sum(-1).argmax().expand(len(x))

    best = sample(denoise, table, x, select=select)
    winner = denoise(x, torch.ones((), dtype=torch.float64)).sum(-1).argmax()
    torch.testing.assert_close(best, sample(denoise, table, x)[winner].expand(16, 3))


# -- levels for every token --------------------------------------------------------------------------------------------


@every
def test_pinned_tokens_are_exact_and_the_others_as_without_them(name):
    x, pinned = noise(5, 6, 2, dtype=torch.float32), torch.tensor([True, False, False, True, False, True])
    tokens = (~pinned).double()[:, None]
    denoise = elementwise(VP)
    levels: list[Tensor] = []

    def watch(y: Tensor, t: Tensor) -> Tensor:
        levels.append(t)
        assert torch.equal(y[:, pinned], x[:, pinned])
        return denoise(y, t)

    table = solver(name, VP, 8, tokens=tokens)
    out = sample(watch, table, x, torch.Generator().manual_seed(0))
    plain = sample(denoise, solver(name, VP, 8), x, torch.Generator().manual_seed(0))
    assert torch.equal(out[:, pinned], x[:, pinned])
    torch.testing.assert_close(out[:, ~pinned], plain[:, ~pinned], rtol=1e-5, atol=1e-5)
    assert all(t.shape == (1, 6, 1) and (t[0, pinned] == 0).all() for t in levels)


@every
def test_layout_spreads_the_levels_of_groups(name):
    layout = Layout(observation=2, action=3)
    tokens = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    x, mask = noise(2, 3, 5), layout.levels(tokens).bool()
    table = solver(name, VP, 5, tokens=tokens, layout=layout)
    out = sample(elementwise(VP), table, x, torch.Generator().manual_seed(0))
    plain = sample(elementwise(VP), solver(name, VP, 5), x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(out, torch.where(mask, plain, x), rtol=1e-10, atol=1e-10)
    assert torch.equal(out[:, ~mask], x[:, ~mask])


@alone
@pytest.mark.parametrize("schedule", [VP, NoiseSchedule.flow()], ids=["vp", "flow"])
def test_a_matrix_of_levels_runs_every_token_on_its_own(name, schedule):
    """A pyramid: token j begins j steps late, so that early tokens are clean while late ones are still noise."""
    tokens, steps = 4, 6
    index = torch.arange(steps + tokens)[:, None] - torch.arange(tokens)
    # below t = 1, where the flow's data is gone and methods that predict the noise are not defined
    levels = 0.98 * (1 - index.clamp(0, steps).double() / steps)
    x, denoise = noise(3, tokens, 2), elementwise(schedule)
    out = sample(denoise, calmly(name, schedule, levels[:, None, :, None]), x)
    plain = sample(denoise, calmly(name, schedule, levels[: steps + 1, 0]), x)
    torch.testing.assert_close(out, plain, rtol=1e-9, atol=1e-9)


@calm
def test_tokens_may_begin_at_a_lower_level(name):
    x, steps = noise(3, 2, 2), torch.linspace(1, 0, 6, dtype=torch.float64)
    out = sample(elementwise(VP), calmly(name, VP, steps, tokens=torch.tensor([[1.0], [0.4]])), x)
    for token, scale in enumerate((1.0, 0.4)):
        plain = sample(elementwise(VP), calmly(name, VP, scale * steps), x)
        torch.testing.assert_close(out[:, token], plain[:, token], rtol=1e-6, atol=1e-6)
