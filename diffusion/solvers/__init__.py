"""Solvers by name: `solver("dpmpp_2m", schedule, steps=10)` is a Tableau. One file a family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from diffusion._options import check_options
from diffusion.layout import Layout
from diffusion.schedule import NoiseSchedule
from diffusion.solvers import (
    accelerated,
    conjugate,
    dc,
    ddim,
    deis,
    dpm,
    dpm_v3,
    dpmpp,
    edm,
    recurrent,
    restart,
    runge_kutta,
    sa,
    splitting,
    unipc,
)
from diffusion.solvers._spacing import SPACINGS
from diffusion.tableau import Row, Tableau
from pilotwave.errors import UserError, nearest

# name -> (rows from the schedule and the levels (steps + 1, ...) in float64, order of convergence)
SOLVERS: dict[str, tuple[Callable[..., list[Row]], int]] = {
    "ddpm": (ddim.ddpm, 1),
    "ddim": (ddim.ddim, 1),
    "euler": (runge_kutta.euler, 1),
    "heun": (runge_kutta.heun, 2),
    "deis_1": (deis.deis_1, 1),
    "deis_2": (deis.deis_2, 2),
    "deis_3": (deis.deis_3, 3),
    "dpm_1": (dpm.dpm_1, 1),
    "dpm_2": (dpm.dpm_2, 2),
    "dpm_3": (dpm.dpm_3, 3),
    "dpm_v3": (dpm_v3.dpm_v3, 3),
    "dpmpp_2s": (dpmpp.dpmpp_2s, 2),
    "dpmpp_2m": (dpmpp.dpmpp_2m, 2),
    "dpmpp_3m": (dpmpp.dpmpp_3m, 3),
    "dpmpp_2m_sde": (dpmpp.dpmpp_2m_sde, 1),
    "unipc_1": (unipc.unipc_1, 2),
    "unipc_2": (unipc.unipc_2, 3),
    "unipc_3": (unipc.unipc_3, 4),
    "sa": (sa.sa, 2),
    "midpoint": (runge_kutta.midpoint, 2),
    "edm": (edm.edm, 2),
    "restart": (restart.restart, 2),
    "recurrent": (recurrent.recurrent, 1),
    "conjugate": (conjugate.conjugate, 1),
    "dc": (dc.dc, 3),
    "splitting": (splitting.splitting, 1),
    "ddim_accelerated": (accelerated.ddim_accelerated, 2),
    "ddpm_accelerated": (accelerated.ddpm_accelerated, 1),
}


def solvers() -> list[str]:
    """The names that `solver` knows."""
    return sorted(SOLVERS)


def solver(
    name: str,
    schedule: NoiseSchedule,
    steps: int | Sequence[float] | Tensor = 10,
    *,
    spacing: str = "uniform",
    tokens: Tensor | None = None,
    layout: Layout | None = None,
    **options: Any,
) -> Tableau:
    """The table of a solver.

    steps: how many, from 1 to 0 with the spacing called `spacing` (SPACINGS: uniform in t, quadratic, log_snr, karras, ays_sd,
    ays_sdxl, ays_svd), or a decreasing sequence of t that ends at 0 or a small t. A tensor (steps + 1, 1, horizon, groups)
    gives every token levels of its own (`diffusion.level_matrices` builds some). tokens (horizon, groups) in [0, 1] multiplies
    the levels: 0 for what is known and stays as it is. A layout spreads groups over features. Options go to the solver.
    Errors: `UserError` for unknown names, levels that do not decrease, and a solver that the schedule does not define.
    """
    if name not in SOLVERS:
        raise nearest("sampler", name, SOLVERS)
    rows, order = SOLVERS[name]
    levels = _levels(steps, schedule, spacing)
    if tokens is not None:
        levels = levels.reshape(levels.shape + (1,) * (4 - levels.ndim)) * tokens.to("cpu", torch.float64)
    if layout is not None and levels.ndim > 1 and levels.shape[-1] == len(layout.groups):
        levels = layout.levels(levels)
    check_options(f"sampler '{name}'", rows, options, given=2)
    return Tableau(name, tuple(rows(schedule, levels, **options)), order)


def _levels(steps: int | Sequence[float] | Tensor, schedule: NoiseSchedule, spacing: str) -> Tensor:
    if spacing not in SPACINGS:
        raise nearest("spacing of steps", spacing, SPACINGS)
    if isinstance(steps, Integral):
        count = int(steps)
        if count < 1:
            raise UserError(f"sampler steps must be at least 1; got {count}")
        return SPACINGS[spacing](schedule, count)
    given: Any = steps
    try:
        levels = torch.as_tensor(given if isinstance(given, Tensor) else list(given), dtype=torch.float64, device="cpu")
    except (TypeError, ValueError):
        levels = torch.empty(0)
    inside = bool(((levels >= 0) & (levels <= 1)).all())
    if levels.ndim == 0 or len(levels) < 2 or not inside or bool((levels[1:] > levels[:-1]).any()):
        got = f"a tensor {tuple(steps.shape)}" if isinstance(steps, Tensor) else steps
        raise UserError(f"sampler steps must be a whole number, or at least two levels in [0, 1], falling; got {got}")
    if levels.ndim not in (1, 4):
        raise UserError(f"a matrix of levels must be (steps + 1, 1, horizon, 1 or groups); got {tuple(levels.shape)}")
    return levels


def spaced(schedule: NoiseSchedule, steps: int, spacing: str = "uniform") -> Tensor:
    """The levels (steps + 1,) that `solver` takes for this number of steps. Errors: `UserError` for an unknown spacing."""
    return _levels(steps, schedule, spacing)
