"""Predictor-based search (S3, Liu et al. 2023, algorithm 1): most candidates are judged by a guess of their error.

Each stage fits a predictor to all that was tried, lets it judge many mutations of the best, and tries those that it ranks first.
The predictor is kernel ridge regression of the log error on a candidate's features (Rasmussen and Williams 2006, eq. 2.25).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

import torch
from torch import Tensor

from diffusion.search.candidate import Candidate
from diffusion.search.evolutionary import Tried
from diffusion.search.problem import Problem

_RIDGE = 0.05


class ErrorPredictor:
    """The expected log error of candidates, from (candidate, error) pairs."""

    def __init__(self, tried: Tried) -> None:
        known = {candidate: error for candidate, error in tried.items() if math.isfinite(error) and error > 0}
        x = self._features(list(known))
        self.mean, self.scale = x.mean(0), x.std(0).clamp_min(1e-6)
        self.x = (x - self.mean) / self.scale
        y = torch.tensor([math.log(error) for error in known.values()], dtype=torch.float64)
        self.offset = y.mean()
        gram = self._kernel(self.x) + _RIDGE * torch.eye(len(known), dtype=torch.float64)
        self.weights = torch.linalg.solve(gram, y - self.offset)

    def __call__(self, candidates: Sequence[Candidate]) -> Tensor:
        x = (self._features(candidates) - self.mean) / self.scale
        return self.offset + self._kernel(x) @ self.weights

    def _features(self, candidates: Sequence[Candidate]) -> Tensor:
        return torch.tensor([candidate.features() for candidate in candidates], dtype=torch.float64)

    def _kernel(self, x: Tensor) -> Tensor:
        return torch.exp(-(torch.cdist(x, self.x) ** 2) / (2 * x.shape[1]))


def predict_and_try(
    problem: Problem,
    tried: Tried,
    random: Random,
    *,
    stages: int = 6,
    trials: int = 12,
    proposals: int = 400,
    parents: int = 12,
    tick: Callable[[], None] = lambda: None,
) -> Tried:
    """What was tried before, and `stages` times `trials` more. `tick` is called after each."""
    tried = dict(tried)
    for _ in range(stages):
        predictor = ErrorPredictor(tried)
        best = sorted(tried, key=tried.__getitem__)[:parents]
        proposed = dict.fromkeys(random.choice(best).mutated(random) for _ in range(proposals))
        new = [candidate for candidate in proposed if candidate not in tried]
        for candidate in [new[i] for i in predictor(new).argsort().tolist()][:trials]:
            tried[candidate] = problem.error(candidate.table(problem.schedule))
            tick()
    return tried
