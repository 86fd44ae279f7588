"""What the families that choose share: a batch (groups * n, ...) that holds n particles of each group, side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pilotwave.errors import UserError

Reward = Callable[[Tensor], Tensor]  # of clean x (B, ...) -> (B,)
Value = Callable[[Tensor, Tensor, Tensor], Tensor]  # of x_t, D(x_t) and t -> (B,), an estimate of T log E[exp(r(x_0) / T) | x_t]


def grouped(v: Tensor, n: int) -> Tensor:
    """(groups * n,) -> (groups, n)."""
    if n < 1 or v.ndim != 1 or len(v) % n:
        raise UserError(f"groups of {n} need one number for each of a batch that is a multiple of {n}; got shape {tuple(v.shape)}")
    return v.view(-1, n)


def rows(picked: Tensor, n: int) -> Tensor:
    """Places within the groups (groups, m) -> rows of the batch (groups * m,)."""
    return (picked + n * torch.arange(len(picked), device=picked.device)[:, None]).flatten()


def draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One place of each group (groups, 1), with probability softmax(logits / temperature); the greatest at temperature 0.

    Gumbel-max: the greatest of logits / T - log(-log u).
    """
    if temperature > 0:
        u = torch.empty_like(logits).uniform_(generator=generator).clamp_min(torch.finfo(logits.dtype).tiny)
        logits = logits / temperature - (-u.log()).log()
    return logits.argmax(1, keepdim=True)


def systematic(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """n places of each group (groups, n): each particle n w times on average and never one off (Carpenter et al. 1999)."""
    n = weights.shape[1]
    u = torch.empty_like(weights[:, :1]).uniform_(generator=generator)
    at = (torch.arange(n, device=weights.device) + u) / n
    return torch.searchsorted(weights.cumsum(1), at.to(weights.dtype)).clamp_max(n - 1)
