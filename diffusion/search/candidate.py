"""What is searched over: the levels, and at every step an Adams method of its own.

The choices of a step are those of the unified framework (Liu et al. 2023, "USF", table 1) that share a history of data
predictions: how many predictions the predictor goes through, how many the corrector (0: none), and what stands for the mean
of the Taylor term (the integral, B_1 or B_2 of UniPC). DDIM, DPM-Solver++ 2M and 3M and UniPC are points of this space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

import torch

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._adams import adams
from diffusion.tableau import Tableau

PREDICTORS, AVERAGES = (1, 2, 3), (None, "bh1", "bh2")
METHODS = tuple((p, c, average) for p in PREDICTORS for c in (0, *range(2, p + 2)) for average in AVERAGES)
Method = tuple[int, int, str | None]


@dataclass(frozen=True)
class Candidate:
    """Levels (steps + 1) that fall from 1 to 0, and the method of each step: (predictor, corrector, average)."""

    levels: tuple[float, ...]
    methods: tuple[Method, ...]

    @classmethod
    def uniform(cls, levels: Sequence[float], method: Method) -> Candidate:
        """The same method at every step."""
        return cls(tuple(levels), (method,) * (len(levels) - 1))

    def table(self, schedule: NoiseSchedule) -> Tableau:
        predictor, corrector, average = zip(*self.methods)
        levels = torch.tensor(self.levels, dtype=torch.float64)
        return Tableau("searched", tuple(adams(schedule, levels, predictor, corrector, average=average)))

    def features(self) -> list[float]:
        """Numbers that a predictor of the error can learn from."""
        inner = [math.log(t / (1 - t)) for t in self.levels[1:-1]]
        steps = [[p, c, *(float(average == kind) for kind in AVERAGES)] for p, c, average in self.methods]
        return inner + [number for step in steps for number in step]

    def mutated(self, random: Random, chance: float = 0.3, spread: float = 0.5) -> Candidate:
        """Each level moved between its neighbours and each method drawn anew with `chance`; something always changes."""
        levels, methods = list(self.levels), list(self.methods)
        for i in range(1, len(levels) - 1):
            if random.random() < chance:
                high, low = levels[i - 1], levels[i + 1]
                share = math.log((levels[i] - low) / (high - levels[i])) + spread * random.gauss(0, 1)
                levels[i] = low + (high - low) / (1 + math.exp(-share))
        for i in range(len(methods)):
            if random.random() < chance:
                methods[i] = random.choice(METHODS)
        changed = replace(self, levels=tuple(levels), methods=tuple(methods))
        return changed if changed != self else self.mutated(random, chance, spread)

    def crossed(self, other: Candidate, random: Random) -> Candidate:
        """The first steps of this one, the last of the other; where the levels would not fall, the other's methods alone."""
        cut = random.randint(1, len(self.methods))
        levels, methods = self.levels[:cut] + other.levels[cut:], self.methods[:cut] + other.methods[cut:]
        falls = all(later < earlier for earlier, later in pairwise(levels))
        return Candidate(levels if falls else self.levels, methods)
