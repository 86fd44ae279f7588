"""What a planner returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


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


@dataclass
class Corrected:
    """Plans after a correction, in the task's units: states (B, H, Do) at the tokens, the path (B, H', Do) to follow
    in their place (over the same time, perhaps finer), which plans hold what was asked (B,), and what the correction costs
    of their values (B,)."""

    observations: Tensor
    path: Tensor
    safe: Tensor
    cost: Tensor


class Correction(Protocol):
    """Changes plans while and after they are sampled; every sample of every robot is one plan of the batch."""

    def during(self, x: Tensor, t: Tensor) -> Tensor:
        """The state of the sampler (B, H, F), normalized, after its update to level t."""
        ...

    def after(self, observations: Tensor, arrival: Tensor | None) -> Corrected:
        """The finished states (B, H, Do), in the task's units, which arrive at tokens (B,)."""
        ...
