"""Restart (Xu et al. 2023, algorithm 1): an ODE solver that goes back, K times, from t_min to t_max by adding noise.

    x_max = (alpha_max / alpha_min) x_min + (sigma_max^2 - (alpha_max / alpha_min)^2 sigma_min^2)^(1/2) z

Large steps of the ODE err little, and the noise between contracts the errors made before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._coefficients import noised
from diffusion.solvers.ddim import ddim
from diffusion.solvers.dpmpp import dpmpp_2m
from diffusion.solvers.runge_kutta import heun
from diffusion.tableau import Row
from pilotwave.errors import UserError, nearest

BASES = {"heun": heun, "ddim": ddim, "dpmpp_2m": dpmpp_2m}


def restart(
    schedule: NoiseSchedule,
    levels: Tensor,
    low: float = 0.1,
    high: float = 0.3,
    times: int = 2,
    inner: int = 3,
    base: str = "heun",
) -> list[Row]:
    """From the first level at or below `low` back to `high`, `times` times, `inner` steps down each; `base` takes all steps."""
    if base not in BASES:
        raise nearest("restart base", base, BASES)
    if not 0 <= low < high <= 1 or times < 0 or inner < 1:
        raise UserError(f"restart wants 0 <= low < high <= 1, times >= 0 and inner >= 1; got {low}, {high}, {times} and {inner}")
    top = levels[0].max()
    path = levels.flatten(1).amax(1) if levels.ndim > 1 else levels
    if not torch.allclose(levels * top, levels[0] * path.reshape(-1, *[1] * (levels.ndim - 1)), rtol=0, atol=1e-9):
        raise UserError("restart goes back with all tokens at once; it takes no levels that fall at different steps")
    solve, split = BASES[base], int((path > low).sum())
    if split >= len(levels):
        return solve(schedule, levels)
    end, begin = levels[split], torch.maximum(levels[0] / top * high, levels[split])
    again = begin + (end - begin) * torch.linspace(0, 1, inner + 1, dtype=levels.dtype).reshape(-1, *[1] * (levels.ndim - 1))
    rows = solve(schedule, levels[: split + 1]) if split else []
    for _ in range(times):
        rows += [noised(schedule, end, begin), *solve(schedule, torch.cat([again[:-1], end[None]]))]
    return rows + (solve(schedule, levels[split:]) if split < len(levels) - 1 else [])
