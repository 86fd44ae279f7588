"""Step sizes by dynamic programming."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusion import NoiseSchedule, optimal_steps, sample, solver
from pilotwave.errors import UserError
from tests.mixture import elementwise

SCHEDULES = {"vp": NoiseSchedule.vp_linear(), "flow": NoiseSchedule.flow(), "edm": NoiseSchedule.edm()}


def starts(schedule: NoiseSchedule, seed: int) -> Tensor:
    z = torch.randn(64, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return z * schedule.sigma(torch.ones((), dtype=torch.float64))


def test_all_of_the_grid_and_one_step_leave_no_choice():
    schedule = SCHEDULES["vp"]
    denoise, x_T = elementwise(schedule), starts(schedule, 0)
    assert optimal_steps(denoise, schedule, x_T, 1, teacher=10) == [1.0, 0.0]
    assert optimal_steps(denoise, schedule, x_T, 10, teacher=10) == torch.linspace(1, 0, 11, dtype=torch.float64).tolist()


def test_two_steps_are_the_best_of_all_that_could_be():
    """With one level between, the choice by dynamic programming is that by trying them all."""
    schedule = SCHEDULES["vp"]
    denoise, x_T = elementwise(schedule), starts(schedule, 0)
    target = sample(denoise, solver("ddim", schedule, 20), x_T)
    grid = torch.linspace(1, 0, 21, dtype=torch.float64).tolist()
    errors = {t: float((sample(denoise, solver("ddim", schedule, [1, t, 0]), x_T) - target).norm()) for t in grid[1:-1]}
    assert optimal_steps(denoise, schedule, x_T, 2, teacher=20) == [1.0, min(errors, key=errors.__getitem__), 0.0]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [4, 6])
def test_they_err_less_than_other_spacings_on_other_starts(name, steps):
    schedule = SCHEDULES[name]
    denoise, x_T = elementwise(schedule), starts(schedule, 1)
    exact = sample(denoise, solver("unipc_2", schedule, 400), x_T)

    def error(levels, **options) -> float:
        return float((sample(denoise, solver("ddim", schedule, levels, **options), x_T) - exact).norm())

    levels = optimal_steps(denoise, schedule, starts(schedule, 0), steps)
    assert len(levels) == steps + 1
    assert error(levels) < min(error(steps, spacing=spacing) for spacing in ("uniform", "quadratic", "log_snr", "karras"))


@pytest.mark.parametrize("steps", [0, 51])
def test_what_cannot_be_is_refused(steps):
    schedule = SCHEDULES["vp"]
    with pytest.raises(UserError, match="wants from 1 to 50 steps"):
        optimal_steps(elementwise(schedule), schedule, starts(schedule, 0), steps)
