"""Where the steps are: levels from 1 to 0, for a number of steps.

Uniform in t; quadratic (DDIM, Song et al. 2021, appendix D.2); uniform in lambda = log(alpha / sigma) (Lu et al. 2022a);
Karras et al. 2022, eq. 5, in rho = sigma / alpha; Align Your Steps (Sabour et al. 2024), the tables published for three models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._coefficients import level_at

CLEAN = 1e-3  # the last level before 0 of spacings in lambda, where 0 is infinitely far


def _uniform(schedule: NoiseSchedule, steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def _quadratic(schedule: NoiseSchedule, steps: int) -> Tensor:
    return _uniform(schedule, steps) ** 2


def _ends(schedule: NoiseSchedule) -> tuple[float, float]:
    """lambda at t = 1, or just below where that is pure noise, and at t = CLEAN."""
    high, low = (schedule.log_snr(torch.tensor(t, dtype=torch.float64)) for t in (1.0, CLEAN))
    if not high.isfinite():
        high = schedule.log_snr(torch.tensor(1 - CLEAN, dtype=torch.float64))
    return float(high), float(low)


def _at(schedule: NoiseSchedule, lmbda: Tensor) -> Tensor:
    """1, the levels of all lambda but the first, 0."""
    levels = level_at(schedule, lmbda)
    levels[0] = 1
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def _log_snr(schedule: NoiseSchedule, steps: int) -> Tensor:
    return _at(schedule, torch.linspace(*_ends(schedule), steps, dtype=torch.float64))


def _karras(schedule: NoiseSchedule, steps: int) -> Tensor:
    power = 1 / 7
    first, last = (np.exp(-power * end) for end in _ends(schedule))
    return _at(schedule, -torch.log(torch.linspace(first, last, steps, dtype=torch.float64)) / power)


def _align(table: Sequence[float]) -> Callable[[NoiseSchedule, int], Tensor]:
    """sigma / alpha of the ten steps, log-linear between for other numbers, as its authors do. The first is t = 1."""

    def levels(schedule: NoiseSchedule, steps: int) -> Tensor:
        log_table = np.log(table)
        log_table[0] = min(log_table[0], -float(schedule.log_snr(torch.ones((), dtype=torch.float64))))
        log_rho = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(table)), log_table)
        return _at(schedule, -torch.from_numpy(log_rho[:-1]))

    return levels


SPACINGS: dict[str, Callable[[NoiseSchedule, int], Tensor]] = {
    "uniform": _uniform,
    "quadratic": _quadratic,
    "log_snr": _log_snr,
    "karras": _karras,
    "ays_sd": _align((14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)),
    "ays_sdxl": _align((14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)),
    "ays_svd": _align((700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)),
}
