"""Singlestep methods: some levels between s and t are evaluated at too, and nothing is remembered of earlier steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._coefficients import at, hold, level_at, still
from diffusion.solvers.ddim import ddim
from diffusion.tableau import Coefficient, Row

# (alpha, sigma at s, the levels between and t; h) -> for each point after s its weights of x_s, D_1, D_2, ...
Step = Callable[[Tensor, Tensor, Tensor], list[list[Tensor]]]


def middles(schedule: NoiseSchedule, levels: Tensor, fractions: Sequence[float]) -> Tensor:
    """(steps, fractions, ...): the levels at these fractions of each step in lambda; its end, where that is clean."""
    lmbda = schedule.log_snr(levels)
    s, h = lmbda[:-1], lmbda[1:] - lmbda[:-1]
    between = torch.stack([level_at(schedule, s + f * h) for f in fractions], 1)
    end = levels[1:, None].expand_as(between)
    return torch.where(torch.isfinite(s + h)[:, None] & (h > 0)[:, None], between, end)


def combine(*parts: tuple[Tensor, Sequence[Tensor]]) -> list[Tensor]:
    """sum_i c_i w_i, weight by weight, of parts (c_i, w_i)."""
    length = max(len(w) for _, w in parts)
    none = torch.zeros_like(parts[0][0])
    return [sum((c * w[j] for c, w in parts if j < len(w)), none) for j in range(length)]


def singlestep(schedule: NoiseSchedule, levels: Tensor, between: Tensor, step: Step, infinite: bool = False) -> list[Row]:
    """Rows of evaluations at s and at the levels between; steps from alpha = 0 or to sigma = 0, where h is infinite, are DDIM's,
    of first order, unless the method takes them (`infinite`)."""
    alpha, sigma = at(schedule, levels)
    simple = torch.zeros_like(sigma[1:], dtype=torch.bool) if infinite else (sigma[1:] <= 0) | (alpha[:-1] <= 0)
    rows: list[Row] = []
    for i, first in enumerate(ddim(schedule, levels)):
        single, same = simple[i], still(levels[i], levels[i + 1])
        if bool(single.all()):
            rows.append(first)
            continue
        a, s = at(schedule, torch.cat([levels[i : i + 1], between[i], levels[i + 1 : i + 2]]))
        h = torch.log(a[-1] / a[0]) - torch.log(s[-1] / s[0])
        x, d = (torch.as_tensor(c, dtype=h.dtype).expand_as(h) for c in (first.U_x, first.U_d))
        rows.append(Row(levels[i], levels[i], 1.0))
        *stages, last = (_where(single, same, x, d, w) for w in step(a, s, h))
        for j, (c_x, c_d) in enumerate(stages):
            t, P = between[i][j], (c_x, c_d, 0.0)
            if j < len(stages) - 1:
                rows.append(Row(t, t, 1.0, P=P))
            else:
                rows.append(Row(t, levels[i + 1], last[0], last[1][0], last[1][1:], P=P))
    return rows


def _where(single: Tensor, same: Tensor, x: Tensor, d: Tensor, w: Sequence[Tensor]) -> tuple[Coefficient, tuple[Coefficient, ...]]:
    """Weights of x and of the predictions, newest first: DDIM's (x, d) for tokens that it takes, nothing for those that stay."""
    none = torch.zeros_like(x)
    c = [torch.where(single, e, part) for e, part in zip([x, d, *[none] * len(w)], w)]
    return hold(c[0], same, 1.0), tuple(hold(part, same, 0.0) for part in reversed(c[1:]))
