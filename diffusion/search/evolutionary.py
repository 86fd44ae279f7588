"""Evolutionary search over steps and per-step solvers (AutoDiffusion, Li et al. 2023, algorithm 1).

Each generation keeps the best `parents` of all that were tried, and tries as many mutations and crossings of them as
`population` says. AutoDiffusion's levels are a subset of the training steps and its measure is the FID; ours are any levels, and
the measure is the problem's error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from diffusion.search.candidate import Candidate
from diffusion.search.problem import Problem

Tried = dict[Candidate, float]  # candidate: error


def evolve(
    problem: Problem,
    first: Sequence[Candidate],
    random: Random,
    *,
    generations: int = 8,
    population: int = 16,
    parents: int = 8,
    tick: Callable[[], None] = lambda: None,
) -> Tried:
    """Everything tried, `first` and `generations` times `population` more. `tick` is called after each."""
    tried: Tried = {}

    def attempt(candidate: Candidate) -> None:
        tried[candidate] = problem.error(candidate.table(problem.schedule))
        tick()

    for candidate in dict.fromkeys(first):
        attempt(candidate)
    for _ in range(generations):
        best = sorted(tried, key=tried.__getitem__)[:parents]
        for _ in range(population):
            child = random.choice(best)
            if random.random() < 0.5:
                child = child.crossed(random.choice(best), random)
            while child in tried:
                child = child.mutated(random)
            attempt(child)
    return tried
