"""Recurrence: every step is taken, undone by adding noise, and taken again, `times` times in all.

    x_s = (alpha_s / alpha_t) x_t + (sigma_s^2 - (alpha_s / alpha_t)^2 sigma_t^2)^(1/2) z

RePaint (Lugmayr et al. 2022, algorithm 1, jumps of one step) harmonizes what is in-painted with it; FreeDoM (Yu et al. 2023),
universal guidance (Bansal et al. 2023) and TFG (Ye et al. 2024, N_recur) what is guided.
"""

from __future__ import annotations

from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._coefficients import noised
from diffusion.solvers.ddim import ddim, ddpm
from diffusion.solvers.runge_kutta import heun
from diffusion.tableau import Row
from pilotwave.errors import UserError, nearest

BASES = {"ddim": ddim, "ddpm": ddpm, "heun": heun}


def recurrent(schedule: NoiseSchedule, levels: Tensor, times: int = 2, base: str = "ddim") -> list[Row]:
    """`base` takes the steps; times 1 is `base` itself."""
    if base not in BASES:
        raise nearest("recurrent base", base, BASES)
    if times < 1:
        raise UserError(f"recurrent wants times >= 1; got {times}")
    rows: list[Row] = []
    for i in range(len(levels) - 1):
        again = [noised(schedule, levels[i + 1], levels[i])] if times > 1 else []
        step = BASES[base](schedule, levels[i : i + 2])
        rows += [*step, *(again + step) * (times - 1)]
    return rows
