"""What a search makes small: the distance of a table's samples to those of many small steps from the same noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from diffusion.schedule import NoiseSchedule
from diffusion.solvers import solver
from diffusion.tableau import Call, Tableau

REFERENCE = ("dpmpp_2m", 128)  # solver and steps that stand for the exact answer


class Problem:
    """Calls of `sample` (see `record`) and the answers they should have had, in the units of x: normalized data."""

    @torch.no_grad()
    def __init__(self, calls: Sequence[Call], schedule: NoiseSchedule, reference: Tableau | None = None) -> None:
        self.calls, self.schedule = tuple(calls), schedule
        table = reference or solver(REFERENCE[0], schedule, REFERENCE[1])
        self.targets = tuple(call.answer(table) for call in self.calls)

    @torch.no_grad()
    def error(self, table: Tableau) -> float:
        """Root of the mean squared distance, over all numbers of all samples; inf where one is not finite."""
        squares = sum(
            float((call.answer(table) - target).double().square().sum()) for call, target in zip(self.calls, self.targets)
        )
        error = math.sqrt(squares / sum(target.numel() for target in self.targets))
        return error if math.isfinite(error) else math.inf
