"""DC-Solver (Zhao et al. 2024): UniPC whose predictions are compensated for having been made before the correction.

A corrector moves x_t, but what is remembered of the network is D at the x_t that the predictor had found. After the correction the
remembered prediction is moved along the parabola through the last three (eqs. 8 and 9, K = 2),

    d_i <- sum_k L_k(t') d_(i - k),    t' = rho_i t_i + (1 - rho_i) t_(i - 1),    L_k Lagrange's of t_i, t_(i-1), t_(i-2)

and all later steps take the moved one. rho = 1 moves nothing. `fit_ratios` finds rho_i, step after step, on a few trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._adams import adams
from diffusion.solvers._coefficients import plain
from diffusion.solvers._fit import least, trajectory
from diffusion.tableau import Coefficient, Constrain, Denoise, Row, Tableau, sample
from pilotwave.errors import UserError, nearest

_FIRST = 2  # the step from which on there are three predictions


def dc(
    schedule: NoiseSchedule, levels: Tensor, ratios: Sequence[float] | None = None, p: int = 2, variant: str = "bh2"
) -> list[Row]:
    """UniPC-p with compensation ratios rho, one a step (the first two, and none at all, count as 1); order p + 1 without."""
    if p not in (1, 2, 3):
        raise UserError(f"dc's p must be 1, 2 or 3; got {p}")
    if variant not in ("bh1", "bh2"):
        raise nearest("dc variant", variant, ("bh1", "bh2"))
    steps = len(levels) - 1
    rho = torch.as_tensor([1.0] * steps if ratios is None else list(ratios), dtype=torch.float64)
    if rho.shape != (steps,) or not bool(rho.isfinite().all()):
        raise UserError(f"dc takes one ratio a step, {steps} of them; got {ratios}")
    rows: list[Row] = []
    places: list[int] = []  # of the remembered predictions in the history, newest first
    both, alone = adams(schedule, levels, p, p + 1, average=variant), adams(schedule, levels, p, average=variant)
    for i, (row, predictor) in enumerate(zip(both, alone)):
        if i < _FIRST or rho[i] == 1:
            places = [0, *(place + 1 for place in places)]
            rows.append(replace(row, U=_spread(row.U, [place - 1 for place in places[1:]])))
            continue
        between = rho[i] * levels[i] + (1 - rho[i]) * levels[i - 1]
        P = _spread(_lagrange(levels[i - 2 : i + 1].flip(0), between), [0, *(place + 1 for place in places)])
        # what was predicted stands behind what it is moved to; the corrector takes the one, the predictor the other
        places = [0, *(place + 2 for place in places)]
        U = _spread((predictor.U_d, _less(row.U_d, predictor.U_d), *row.U), [0, 1, *places[1:]])
        rows.append(Row(row.t, row.t, 1.0))
        rows.append(Row(row.t, row.t_next, row.U_x, U=U, P=(0.0, P, 0.0), evaluate=False))
    return rows


def _spread(weights: Sequence[Coefficient], places: Sequence[int]) -> tuple[Coefficient, ...]:
    """The weights at their places, 0 between."""
    spread: list[Coefficient] = [0.0] * (max(places[: len(weights)], default=-1) + 1)
    for weight, place in zip(weights, places):
        spread[place] = weight
    return tuple(spread)


def _less(a: Coefficient, b: Coefficient) -> Coefficient:
    return plain(torch.as_tensor(a, dtype=torch.float64) - torch.as_tensor(b, dtype=torch.float64))


def _lagrange(nodes: Tensor, at: Tensor) -> list[Coefficient]:
    """Weights of the values at `nodes` (3, ...), newest first; the newest alone for tokens whose nodes coincide."""
    weights = [torch.ones_like(at) for _ in nodes]
    for k, node in enumerate(nodes):
        for other in (*nodes[:k], *nodes[k + 1 :]):
            weights[k] = weights[k] * (at - other) / (node - other)
    apart = (nodes[0] != nodes[1]) & (nodes[1] != nodes[2]) & (nodes[0] != nodes[2])
    return [plain(torch.where(apart, w, torch.full_like(w, float(k == 0)))) for k, w in enumerate(weights)]


@torch.no_grad()
def fit_ratios(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_T: Tensor,
    levels: Tensor,
    p: int = 2,
    variant: str = "bh2",
    fine: int = 20,
    span: float = 1.0,
    constrain: Constrain | None = None,
) -> list[float]:
    """Ratios for `solver("dc", schedule, levels, ratios=...)` from starts x_T (about ten; algorithm 1).

    rho_i is that which brings the corrected x_(i+1) nearest to the trajectory of `fine` UniPC steps for one of these; a search over
    [1 - span, 1 + span] by thirds and then by golden section. constrain: as in `sample`.
    """
    levels = torch.as_tensor(levels, dtype=torch.float64)
    steps = len(levels) - 1
    true, ratios = trajectory(denoise, schedule, x_T, levels, fine, constrain), [1.0] * steps
    for i in range(_FIRST, steps):
        # the corrected state is that from which the next step starts, as short as one likes
        beyond = levels[i + 1 : i + 2] * (1 - 1e-6) if levels[i + 1] > 0 else levels[:0]
        first = torch.cat([levels[: i + 2], beyond])

        def error(rho: float, i: int = i, first: Tensor = first) -> float:
            chosen = ratios[:i] + [rho] + [1.0] * (len(first) - 2 - i)
            x = sample(denoise, Tableau("dc", tuple(dc(schedule, first, chosen, p, variant))), x_T, constrain=constrain)
            return float((x - true[i]).square().sum())

        ratios[i] = least(error, 1 - span, 1 + span)
    return ratios
