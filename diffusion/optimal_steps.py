"""Optimal step sizes by dynamic programming (Pei et al. 2025, "Optimal stepsize for diffusion sampling", algorithm 1).

A teacher goes down a fine grid x_0, .., x_N. With z(k, i) the student's state at point i after k steps, and j -> i a step of DDIM,

    z(k, i) = (j -> i) z(k - 1, j)    with the j < i whose step ends nearest to the teacher's x_i,

and the steps that led to z(steps, N) are read back. It costs steps * teacher evaluations of the batch, once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers import solver
from diffusion.tableau import Constrain, Denoise, sample
from pilotwave.errors import UserError


@torch.no_grad()
def optimal_steps(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_T: Tensor,
    steps: int,
    teacher: int = 50,
    spacing: str = "uniform",
    constrain: Constrain | None = None,
) -> list[float]:
    """Levels (steps + 1) from 1 to 0, for `solver(name, schedule, levels)`, fitted to the trajectories that start at x_T.

    The grid has `teacher` steps with the given spacing; `constrain` is as in `sample`. Errors: `UserError` for more steps
    than the grid has.
    """
    if not 1 <= steps <= teacher:
        raise UserError(f"optimal_steps wants from 1 to {teacher} steps, those of its teacher; got {steps}")
    table, path = solver("ddim", schedule, teacher, spacing=spacing), [x_T]

    def record(x: Tensor, t: Tensor) -> Tensor:
        path.append(x if constrain is None else constrain(x, t))
        return path[-1]

    sample(denoise, table, x_T, constrain=record)
    levels = torch.stack([table.rows[0].t, *(row.t_next for row in table.rows)])
    alpha, sigma = schedule.alpha(levels).tolist(), schedule.sigma(levels).tolist()
    t = levels.to(x_T.device, x_T.dtype)

    states, parents = {0: x_T}, []
    for k in range(1, steps + 1):
        clean = {j: denoise(z, t[j]) for j, z in states.items()}
        reached: dict[int, Tensor] = {}
        parent: dict[int, int] = {}
        # enough points must be left for the steps to come, and the last step ends the grid
        for i in range(k, teacher - (steps - k) + 1) if k < steps else [teacher]:
            nearest = float("inf")
            for j, z in states.items():
                if j >= i:
                    continue
                kept = sigma[i] / sigma[j]
                there = kept * z + (alpha[i] - kept * alpha[j]) * clean[j]
                there = there if constrain is None else constrain(there, t[i])
                error = float((there - path[i]).square().sum())
                if error < nearest:
                    nearest, reached[i], parent[i] = error, there, j
        states = reached
        parents.append(parent)
    chosen = [teacher]
    for parent in reversed(parents):
        chosen.append(parent[chosen[-1]])
    return [float(levels[i]) for i in reversed(chosen)]
