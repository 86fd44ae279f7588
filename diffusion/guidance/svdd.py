"""SVDD, soft value-based decoding in diffusion (Li et al. 2024, "Derivative-free guidance", algorithm 1).

At every step each trajectory draws n successors x_s ~ p(x_s | x_t), and goes on from one of them, drawn with probability
softmax(v(x_s) / T). The soft value v(x_s) = T log E[exp(r(x_0) / T) | x_s] is estimated by r(D(x_s)) (SVDD-PM), whose D is the next
step's own evaluation.

Samples follow p(x_0) exp(r(x_0) / T) with the exact value, as n grows and with a solver that draws the noise of the reverse process
(ddpm, dpmpp_2m_sde). With r(D), a few successors, or T = 0 (the best successor) they follow it approximately.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.guidance._particles import Reward, Value, draw, grouped, rows


@dataclass(frozen=True)
class SVDD:
    """`svdd.finish(sample(denoise, table, x_T, select=svdd))` with x_T (groups * n, ...) gives (groups, ...).

    reward: clean x (B, ...) -> (B,). value: (x_t, D(x_t), t) -> (B,), in place of reward(D(x_t)). Conditions must be a group's own.
    """

    reward: Reward
    n: int
    temperature: float = 1.0
    value: Value | None = None
    generator: torch.Generator | None = None

    def __call__(self, x: Tensor, d: Tensor, t: Tensor) -> Tensor:
        v = self.reward(d) if self.value is None else self.value(x, d, t)
        picked = draw(grouped(v, self.n), self.temperature, self.generator)
        # the next step's noise makes n successors of the one that goes on
        return rows(picked.expand(-1, self.n), self.n)

    def finish(self, x_0: Tensor) -> Tensor:
        """One of each group, drawn alike by its reward."""
        return x_0[rows(draw(grouped(self.reward(x_0), self.n), self.temperature, self.generator), self.n)]
