"""Levels of whole trajectories: one row a step and one column a token, `solver(name, schedule, MATRIX)`.

One token's levels are t_0 > ... > t_K. Row m of a matrix holds t_k(m, j) for token j, with

    k(m, j) = clip(m - start_j, 0, K)        token j waits start_j steps, falls in K, and stays

(Diffusion Forcing, Chen et al. 2024): `full_sequence` start_j = 0; `pyramid` start_j = delay j;
`autoregressive` start_j = K j. `streaming` cuts the endless pyramid of a trajectory that moves on into rounds (Streaming Diffusion
Policy, Høeg et al. 2024). Tokens that are known are pinned by `solver(..., tokens=)`, 0 for each, whatever the matrix.

Every matrix is (rows, 1, horizon, 1), float64. `levels` is K, for levels uniform in t, or the levels themselves (K + 1,), as from
`diffusion.spaced(schedule, K, "karras")`. Errors: `UserError` for sizes that make no sense.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pilotwave.errors import UserError

Levels = int | Sequence[float] | Tensor


def full_sequence(levels: Levels, horizon: int) -> Tensor:
    """All tokens fall together: (K + 1, 1, horizon, 1)."""
    return pyramid(levels, horizon, delay=0)


def pyramid(levels: Levels, horizon: int, delay: float = 1.0, chunk: int = 1) -> Tensor:
    """Every `chunk` tokens begin `delay` steps (rounded down) after those before them: what comes later is less certain."""
    if delay < 0 or chunk < 1:
        raise UserError(f"a pyramid of levels wants a delay of 0 or more and a chunk of at least 1; got {delay} and {chunk}")
    t = _levels(levels)
    start = (delay * _chunks(horizon, chunk)).floor().long()
    return _matrix(t, start, len(t) + int(start.max()))


def autoregressive(levels: Levels, horizon: int, chunk: int = 1) -> Tensor:
    """Every `chunk` tokens begin when those before them are clean."""
    return pyramid(levels, horizon, len(_levels(levels)) - 1, chunk)


def streaming(levels: Levels, horizon: int, chunk: int, first: bool = False) -> Tensor:
    """One round of a stream, K chunk / horizon steps: (K chunk / horizon + 1, 1, horizon, 1).

    Of C = horizon / chunk chunks the first becomes clean, and each of the others as noisy as the one before it was. Then the first
    leaves, the others move up, and pure noise joins at the end. `first`: the K - K / C steps from noise everywhere to where rounds
    begin. C must divide K.
    """
    t = _levels(levels)
    if chunk < 1 or horizon % chunk or (len(t) - 1) % (horizon // chunk):
        raise UserError(
            "a stream wants chunks that divide its horizon, and as many steps or a multiple; "
            f"got a horizon of {horizon}, chunks of {chunk} and {len(t) - 1} steps"
        )
    chunks = horizon // chunk
    steps = (len(t) - 1) // chunks
    rows = _matrix(t, steps * _chunks(horizon, chunk).long(), len(t))
    return rows[: len(t) - steps] if first else rows[-steps - 1 :]


def _levels(levels: Levels) -> Tensor:
    t = torch.linspace(1, 0, levels + 1, dtype=torch.float64) if isinstance(levels, int) and levels > 0 else levels
    t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
    if t.ndim != 1 or len(t) < 2:
        raise UserError(f"levels of a token must be a number of steps, or one row of at least two; got {tuple(t.shape) or levels}")
    return t


def _chunks(horizon: int, chunk: int) -> Tensor:
    """The chunk that each token is in."""
    if horizon < 1:
        raise UserError(f"a matrix of levels wants a horizon of at least 1; got {horizon}")
    return torch.arange(horizon, dtype=torch.float64) // chunk


def _matrix(t: Tensor, start: Tensor, rows: int) -> Tensor:
    k = (torch.arange(rows)[:, None] - start).clamp(0, len(t) - 1)
    return t[k][:, None, :, None]
