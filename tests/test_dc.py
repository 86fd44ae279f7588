"""DC-Solver against its equations, and what its ratios gain."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffusion import NoiseSchedule, fit_ratios, sample, solver
from pilotwave.errors import UserError
from tests.mixture import elementwise

RATIOS = [1.0, 1.0, 0.9, 1.2, 1.0, 0.7]
schedules = pytest.mark.parametrize(
    "schedule", [NoiseSchedule.vp_linear(), NoiseSchedule.edm(), NoiseSchedule.flow()], ids=lambda s: s.name
)


def uni(schedule: NoiseSchedule, x: Tensor, s: float, t: float, values: list[tuple[float, Tensor]]) -> Tensor:
    """UniPC's update (bh2, data prediction) from x at s to t: values are D at s and, as many as there are, at other levels."""

    def part(level: float) -> tuple[float, float, float]:
        u = torch.tensor(level, dtype=torch.float64)
        return float(schedule.alpha(u)), float(schedule.sigma(u)), float(schedule.log_snr(u))

    (_, s_s, l_s), (a_t, s_t, l_t) = part(s), part(t)
    h, m_0 = l_t - l_s, values[0][1]
    x_t = s_t / s_s * x + a_t * -math.expm1(-h) * m_0
    r = [(part(level)[2] - l_s) / h for level, _ in values[1:]]
    differences = [(m - m_0) / r_k for r_k, (_, m) in zip(r, values[1:])]
    if not r:
        return x_t
    B, phi, factorial, b = math.expm1(-h), math.expm1(-h) / -h - 1, 1, []
    for k in range(1, len(r) + 1):
        b.append(phi * factorial / B)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    rho = (
        [0.5]
        if len(r) == 1
        else torch.linalg.solve(torch.tensor([[v**k for v in r] for k in range(len(r))]).double(), torch.tensor(b).double())
    )
    return x_t - a_t * B * sum(float(c) * d for c, d in zip(rho, differences))


def transcribed(denoise, schedule: NoiseSchedule, levels: list[float], x: Tensor, ratios: list[float]) -> Tensor:
    """The loop of algorithm 2: correct, compensate the buffer's newest by the parabola through three, predict."""
    buffer: list[tuple[float, Tensor]] = []
    before = x
    for i, (s, t) in enumerate(pairwise(levels)):
        new = (s, denoise(x, torch.tensor(s, dtype=torch.float64)))
        if i > 0:
            x = uni(schedule, before, levels[i - 1], s, [buffer[0], new, *buffer[1:2]])
        buffer = [new, *buffer[:2]]
        if i >= 2:
            at, nodes = ratios[i] * (s - levels[i - 1]) + levels[i - 1], [level for level, _ in buffer]
            moved = torch.zeros_like(x)
            for k in range(3):
                weight = 1.0
                for j in range(3):
                    weight *= (at - nodes[j]) / (nodes[k] - nodes[j]) if j != k else 1.0
                moved = moved + weight * buffer[k][1]
            buffer[0] = (s, moved)
        before = x
        x = buffer[0][1] if t == 0 else uni(schedule, x, s, t, buffer[: 2 if i > 0 else 1])
    return x


@schedules
def test_it_is_what_the_paper_says(schedule):
    levels = [0.95, 0.8, 0.6, 0.45, 0.3, 0.15, 0.0]
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = solver("dc", schedule, levels, ratios=RATIOS)
    assert table.evaluations == 6
    ours = sample(elementwise(schedule), table, x)
    torch.testing.assert_close(ours, transcribed(elementwise(schedule), schedule, levels, x, RATIOS), rtol=1e-7, atol=1e-7)


def test_without_ratios_it_is_unipc():
    schedule = NoiseSchedule.vp_cosine()
    for p in (1, 2, 3):
        for mine, unipc in zip(solver("dc", schedule, 6, p=p).rows, solver(f"unipc_{p}", schedule, 6).rows, strict=True):
            assert (mine.U_x, mine.U_d, *mine.U) == (unipc.U_x, unipc.U_d, *unipc.U)


def test_known_tokens_stay():
    schedule, tokens = NoiseSchedule.vp_linear(), torch.tensor([[0.0], [1.0], [0.5]])
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = torch.linspace(1, 0, 7, dtype=torch.float64)
    out = sample(elementwise(schedule), solver("dc", schedule, levels, tokens=tokens, ratios=RATIOS), x)
    assert torch.equal(out[:, 0], x[:, 0])
    for token, scale in ((1, 1.0), (2, 0.5)):
        alone = sample(elementwise(schedule), solver("dc", schedule, scale * levels, ratios=RATIOS), x[:, token])
        torch.testing.assert_close(out[:, token], alone, rtol=1e-9, atol=1e-9)


@schedules
def test_ratios_fitted_on_ten_samples_err_less_on_others(schedule):
    denoise, levels = elementwise(schedule), torch.linspace(1, 0, 7, dtype=torch.float64)
    if schedule.name == "flow":  # whose corrections are small from the start
        levels = levels**2
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(60, 16, 2, dtype=torch.float64, generator=generator) * schedule.sigma(torch.ones((), dtype=torch.float64))
    ratios = fit_ratios(denoise, schedule, x_T[:10], levels)
    assert ratios[:2] == [1.0, 1.0]
    true = sample(denoise, solver("unipc_2", schedule, 400, spacing="quadratic"), x_T[10:])

    def error(**options) -> float:
        return float((sample(denoise, solver("dc", schedule, levels, **options), x_T[10:]) - true).square().mean().sqrt())

    assert error(ratios=ratios) < 0.8 * error()


def test_mistakes_are_named():
    schedule = NoiseSchedule.vp_linear()
    with pytest.raises(UserError, match="one ratio a step, 5 of them"):
        solver("dc", schedule, 5, ratios=[1.0, 1.0])
    with pytest.raises(UserError, match="did you mean 'bh2'"):
        solver("dc", schedule, 5, variant="bh3")
    with pytest.raises(UserError, match="dc's p must be"):
        solver("dc", schedule, 5, p=4)
