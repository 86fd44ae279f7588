"""Feynman-Kac steering (Singhal et al. 2025): sequential Monte Carlo over n particles a group, which go down the levels together.

At every `every`-th evaluation a particle's weight is multiplied by a potential G, of the value v = r(D(x_t)) / T or a better
estimate, v' that of the potential before:

    difference   G = exp(v - v')        max   G = exp(greatest v so far)        sum   G = exp(sum of v so far)

and where the effective sample size (sum w)^2 / sum w^2 falls below a share of n, the group is resampled (systematically) and its
weights are equal again. The last weights make the product of all exp(r(x_0) / T), so that samples follow p(x_0) exp(r(x_0) / T) as
n grows, with any value and any solver that samples p(x_0); a better value wants fewer particles. max and sum multiply up: they want
few potentials (`every`). Under a guide samples follow the guided sampler's density times exp(r / T).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.guidance._particles import Reward, Value, grouped, rows, systematic
from pilotwave.errors import UserError, nearest

# what a particle remembers, from the value now and what it remembered; log G_t from the memories now and before; the first memory
Potential = tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor], float]
POTENTIALS: dict[str, Potential] = {
    "difference": (lambda v, m: v, lambda new, m: new - m, 0.0),
    "max": (torch.maximum, lambda new, m: new, -torch.inf),
    "sum": (torch.add, lambda new, m: new, 0.0),
}


class FeynmanKac:
    """`fk.finish(sample(denoise, table, x_T, select=fk))` with x_T (groups * n, ...) gives as many samples, of equal weight.

    reward: clean x (B, ...) -> (B,); value: (x_t, D(x_t), t) -> (B,), in place of reward(D(x_t)). threshold: the share of n below
    which the effective sample size leads to resampling; 1 is every time, 0 never but at the end. Particles of a group are not
    independent, and share its conditions. One object serves one run at a time. Errors: `UserError` for unknown potentials and
    meaningless numbers.
    """

    def __init__(
        self,
        reward: Reward,
        n: int,
        temperature: float = 1.0,
        value: Value | None = None,
        potential: str = "difference",
        threshold: float = 0.5,
        every: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        if potential not in POTENTIALS:
            raise nearest("Feynman-Kac potential", potential, POTENTIALS)
        if temperature <= 0 or not 0 <= threshold <= 1 or every < 1:
            given = f"{temperature}, {threshold} and {every}"
            raise UserError(f"Feynman-Kac steering wants temperature > 0, threshold in [0, 1] and every >= 1; got {given}")
        self.reward, self.value, self.n, self.temperature = reward, value, n, temperature
        self.potential, self.threshold, self.every, self.generator = POTENTIALS[potential], threshold, every, generator
        self._state: tuple[Tensor, Tensor, Tensor] | None = None
        self._calls = 0

    def __call__(self, x: Tensor, d: Tensor, t: Tensor) -> Tensor:
        self._calls += 1
        if self._calls % self.every:
            return torch.arange(len(x), device=x.device)
        v = grouped(self.reward(d) if self.value is None else self.value(x, d, t), self.n) / self.temperature
        remember, log_g, first = self.potential
        # memory, log weights since the last resampling, log of the product of all potentials: each (groups, n)
        memory, log_w, product = self._state or (torch.full_like(v, first), torch.zeros_like(v), torch.zeros_like(v))
        new = remember(v, memory)
        g = log_g(new, memory)
        picked, resampled = self._resample(log_w + g, self.threshold)
        log_w = torch.where(resampled, 0.0, log_w + g)
        self._state = new.gather(1, picked), log_w, (product + g).gather(1, picked)
        return rows(picked, self.n)

    def finish(self, x_0: Tensor) -> Tensor:
        """x_0 resampled by its last weights; the object is ready for another run."""
        log_w = grouped(self.reward(x_0), self.n) / self.temperature
        if self._state is not None:  # less what the potentials have given already
            log_w = log_w + self._state[1] - self._state[2]
        self._state, self._calls = None, 0
        return x_0[rows(self._resample(log_w, 1.0)[0], self.n)]

    def _resample(self, log_w: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """Who goes on, (groups, n), and which groups were resampled, (groups, 1)."""
        weights = log_w.softmax(1)
        low = 1 / weights.square().sum(1, keepdim=True) < threshold * self.n
        same = torch.arange(self.n, device=log_w.device).expand_as(log_w)
        return torch.where(low, systematic(weights, self.generator), same), low
