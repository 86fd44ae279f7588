"""What a planner returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Plan:
    """Plans in the task's units, best first: observations (samples, H, Do), actions (samples, H, Da) or None, values
    (samples,); with a leading batch axis when planned for a batch. arrivals (samples,): the token reaching the goal,
    where there is one.
    """

    observations: np.ndarray
    actions: np.ndarray | None
    values: np.ndarray
    arrivals: np.ndarray | None = None
