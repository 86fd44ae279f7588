"""Adams methods in lambda = log(alpha / sigma), which DEIS, DPM-Solver++, UniPC and SA-Solver all are.

From s to t, with h = lambda_t - lambda_s, the reverse process with stochasticity tau is solved exactly but for the data d,
or for the noise e where the method predicts that (SA-Solver, Xue et al. 2023, eqs. 10-14; tau = 0 is the ODE):

    x_t = (sigma_t / sigma_s) e^(-tau^2 h) x_s + alpha_t kappa int e^(-kappa (lambda_t - l)) d(l) dl
          + sigma_t (1 - e^(-2 tau^2 h))^(1/2) z,                                kappa = 1 + tau^2
    x_t = (alpha_t / alpha_s) x_s - sigma_t int e^(lambda_t - l) e(l) dl                  (kappa = -1, scale - sigma_t)

The predictor integrates the polynomial through d_s and the predictions before it; the corrector that through d_t as well,
and moves x_t by the difference once d_t is known, so that it costs no evaluation. Both are one row: evaluate, correct, predict.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._coefficients import at, hold, noise_form, still
from diffusion.tableau import Row

_TERMS = 24


def moments(z: Tensor, count: int) -> list[Tensor]:
    """M_k = int_0^1 u^k e^(-z (1 - u)) du for k < count: by recursion, by its series where that would cancel."""
    near = z.abs() < 1
    large, small = torch.where(near, torch.ones_like(z), z), torch.where(near, z, torch.zeros_like(z))
    M = [-torch.expm1(-large) / large]
    for k in range(1, count):
        M.append((1 - k * M[-1]) / large)
    series = []
    for k in range(count):  # sum_m (-z)^m k! / (k + m + 1)!
        term = total = torch.full_like(z, 1 / (k + 1))
        for m in range(1, _TERMS):
            term = term * -small / (k + m + 1)
            total = total + term
        series.append(total)
    return [torch.where(near, a, b) for a, b in zip(series, M)]


def weights(
    z: Tensor, total: Tensor, scale: Tensor, nodes: Sequence[Tensor], order: Tensor, average: Sequence[str | None]
) -> list[Tensor]:
    """Weights of the prediction at u = 0 and of those at `nodes`, for the polynomial through the first `order` of them.

    `scale` int_0^1 e^(-z (1 - u)) p(u) du, whose value for p = 1 is `total`. `average`, one a step, replaces the mean of u in
    formulas with two predictions: "bh1" M_1 by 1 / 2, "bh2" by M_0 / 2 (UniPC's B(h); DPM-Solver++ 2M is bh2).
    """
    M = moments(torch.where(order > 1, z, torch.ones_like(z)), len(nodes) + 1)
    # nodes that a token does not have may stand anywhere
    safe = torch.stack([torch.where(order > j + 1, u, torch.full_like(u, -1.0 - j)) for j, u in enumerate(nodes)] or [z], -1)
    w = [torch.zeros_like(z) for _ in nodes]
    for q in range(1, len(nodes) + 1):
        means = {None: M[1], "bh1": torch.full_like(z, 0.5), "bh2": M[0] / 2}
        mean = M[1] if q > 1 else torch.stack([means[kind][i] for i, kind in enumerate(average)])
        right = torch.stack([mean, *M[2 : q + 1]], -1)
        powers = torch.stack([safe[..., :q] ** k for k in range(1, q + 1)], -2)
        solution = torch.linalg.solve(powers, right)
        for j in range(q):
            w[j] = torch.where(order == q + 1, scale * solution[..., j], w[j])
    return [total - sum(w, torch.zeros_like(z)), *w]


def adams(
    schedule: NoiseSchedule,
    levels: Tensor,
    predictor: int | Sequence[int],
    corrector: int | Sequence[int] = 0,
    *,
    noise: bool = False,
    tau: Tensor | None = None,
    average: str | Sequence[str | None] | None = None,
) -> list[Row]:
    """Rows of the method with `predictor` predictions in its predictor and `corrector` in its corrector (0: none).

    These and `average` may differ by step. tau (steps, ...) or None for the ODE. The first steps have a lower order, for want
    of earlier predictions, and so have the last ones where they end at t = 0 (h = inf), as in the papers' code.
    """
    alpha, sigma = at(schedule, levels)
    if noise:
        noise_form(schedule, alpha)
    (a_s, a_t), (s_s, s_t) = (alpha[:-1], alpha[1:]), (sigma[:-1], sigma[1:])
    lmbda = torch.log(alpha) - torch.log(sigma)
    h, same = lmbda[1:] - lmbda[:-1], still(levels[:-1], levels[1:])
    zero, one = torch.zeros_like(h), torch.ones_like(h)
    spread = zero if tau is None else tau**2
    kappa = -one if noise else 1 + spread
    if noise:
        U_x, scale = a_t / a_s, -s_t * h
        total = s_t - U_x * s_s
    else:
        U_x = s_t / s_s * torch.where(spread > 0, torch.exp(-spread * h), one)
        scale, total = a_t * kappa * h, a_t * -torch.expm1(-kappa * h)

    p, c = _each(predictor, h), _each(corrector, h)
    averages = [average] * len(h) if average is None or isinstance(average, str) else average
    # where the earlier predictions are, and how many of them a step can use: levels that differ, and are not clean
    most, corrects = int(p.max()), int(c.max())
    memory = max(most, corrects)
    nodes, have, falls = [], one, one
    for j in range(1, memory):
        earlier, later = _shift(lmbda[:-1], j), _shift(lmbda[:-1], j - 1)
        falls = falls * (torch.isfinite(earlier) & (earlier < later))
        nodes.append((earlier - lmbda[:-1]) / h)
        have = have + falls
    left = (~same).long().flip(0).cumsum(0).flip(0)  # steps that a token still makes
    have = torch.where(sigma[-1] <= 0, torch.minimum(have, left), have)
    finite = torch.isfinite(h) & ~same

    order = torch.where(finite, torch.minimum(have, p), one)
    b = weights(kappa * h, total, scale, nodes[: most - 1], order, averages)
    U = b = b + [zero] * (memory + 1 - len(b))
    if corrects:
        order = torch.where(finite, torch.minimum(have + 1, c), one)
        w = weights(kappa * h, total, scale, [one, *nodes[: corrects - 2]], order, averages)
        # newest first: at the end of the step, at its start, before it; less what the predictor has given
        w = [w[1], w[0], *w[2:]] + [zero] * (memory + 1 - len(w))
        change = [torch.where(finite & (c > 0), corrected - given, zero) for corrected, given in zip(w, [zero, *b])]
        U = [w + U_x * torch.where(same, zero, torch.cat([zero[:1], d[:-1]])) for w, d in zip(b, change)]
    U_z = s_t * torch.sqrt(torch.where(spread > 0, -torch.expm1(-2 * spread * h), zero))

    rows = []
    for i in range(len(h)):
        held = [hold(w[i], same[i], 0.0) for w in U]
        while held and not torch.as_tensor(held[-1]).any():
            held.pop()
        clean = s_s[i] <= 0
        K = (hold(1 / s_s[i], clean, 0.0), hold(-a_s[i] / s_s[i], clean, 1.0)) if noise else None
        U_d = held[0] if held else 0.0
        U_i = tuple(held[1:])
        rows.append(Row(levels[i], levels[i + 1], hold(U_x[i], same[i], 1.0), U_d, U_i, hold(U_z[i], same[i], 0.0), K=K))
    return rows


def _each(count: int | Sequence[int], h: Tensor) -> Tensor:
    """One number a step, against h (steps, ...)."""
    numbers = torch.tensor(list(count) if isinstance(count, Sequence) else [count] * len(h), dtype=h.dtype)
    return numbers.reshape((-1,) + (1,) * (h.ndim - 1))


def _shift(x: Tensor, j: int) -> Tensor:
    """x one step back, j times; NaN where there is none."""
    return torch.cat([torch.full_like(x[:j], torch.nan), x[: max(len(x) - j, 0)]])
