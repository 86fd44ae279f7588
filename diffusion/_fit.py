"""What fits on trajectories share: the true states, and a search for one number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers.unipc import unipc_2
from diffusion.tableau import Constrain, Denoise, Tableau, sample

_GOLDEN = 0.6180339887498949


@torch.no_grad()
def trajectory(
    denoise: Denoise, schedule: NoiseSchedule, x_T: Tensor, levels: Tensor, fine: int = 20, constrain: Constrain | None = None
) -> list[Tensor]:
    """The states at levels (n + 1,) after the first, by `fine` UniPC steps from each to the next."""
    levels = levels.double()
    parts = levels[:-1, None] + (levels[1:] - levels[:-1])[:, None] * torch.arange(fine, dtype=torch.float64) / fine
    path: list[Tensor] = []

    def record(x: Tensor, t: Tensor) -> Tensor:
        path.append(x if constrain is None else constrain(x, t))
        return path[-1]

    table = Tableau("reference", tuple(unipc_2(schedule, torch.cat([parts.flatten(), levels[-1:]]))))
    sample(denoise, table, x_T, constrain=record)
    return path[fine - 1 :: fine]


def least(error: Callable[[float], float], low: float, high: float, grid: int = 7, rounds: int = 12) -> float:
    """Where `error` is least: the best of a grid, then golden section between its neighbours; 1 where nothing is better."""
    points = torch.linspace(low, high, grid, dtype=torch.float64).tolist()
    values = [error(point) for point in points]
    best = min(range(grid), key=values.__getitem__)
    low, high = points[max(best - 1, 0)], points[min(best + 1, grid - 1)]
    inner = [high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)]
    found = [error(point) for point in inner]
    for _ in range(rounds):
        if found[0] < found[1]:
            high, inner, found = inner[1], [inner[1] - _GOLDEN * (inner[1] - low), inner[0]], [0.0, found[0]]
            found[0] = error(inner[0])
        else:
            low, inner, found = inner[0], [inner[1], inner[0] + _GOLDEN * (high - inner[0])], [found[1], 0.0]
            found[1] = error(inner[1])
    candidates = dict(zip([*inner, 1.0], [*found, error(1.0)]))
    return min(candidates, key=candidates.__getitem__)
