"""What the learned side looks like to robots: a callable from observation histories to chunks of references.

Shapes: n parallel robots, To observations of history, T references a chunk, R features a reference, Da action features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]
Observation = dict[str, np.ndarray]
"""One array a key, leading axis n: "state" (n, Do) float32, and where the task has them "goal" (n, Dg) float32 and
image keys (n, H, W, 3) uint8. A history has a second axis To, oldest first."""


@dataclass
class Chunk:
    """References for the near future.

    references: (n, T, R). dt: seconds between references. start: reference j is due at `start + j * dt` seconds after
    the observation that the chunk was made from (an action is applied from then on, a position is to be held then).
    plan: optional (n, P, 2) world coordinates of the planned path, drawn into videos.
    """

    references: FloatArray
    dt: float
    start: float = 0.0
    plan: FloatArray | None = None


@runtime_checkable
class Tracker(Protocol):
    """Turns references into commands at the robot's rate; NumPy only."""

    def reference(self, chunk: Chunk, time: float) -> FloatArray:
        """The reference (n, R) due `time` seconds after the chunk's observation."""
        ...

    def command(self, observation: FloatArray, reference: FloatArray) -> FloatArray:
        """The action (n, Da) for the state observation (n, Do) and a reference (n, R)."""
        ...

    def rest(self, observation: FloatArray) -> FloatArray | None:
        """The reference (n, R) that stands still where the robot is; None where that cannot be told."""
        ...

    def hold(self, reference: FloatArray) -> FloatArray:
        """The reference (n, R) that stands still at the given one."""
        ...

    def expected(self, observation: FloatArray, now: FloatArray, then: FloatArray) -> FloatArray | None:
        """The observation (n, Do) once the reference went from `now` to `then`; None where that cannot be told."""
        ...


class Controller(Protocol):
    """A planner or policy with its tracker.

    replan_every: environment steps executed from a chunk before the next decision; 0 plans once an episode.
    history: observations To that `act` wants. evaluations: network calls a decision.
    A controller that also has `keep(rows)`, which goes on with these rows of its robots alone, is not asked to decide for
    robots whose episodes have ended; others always see all n.
    """

    replan_every: int
    history: int
    evaluations: int
    tracker: Tracker

    def reset(self, n: int) -> None:
        """Start n episodes."""
        ...

    def act(self, history: Mapping[str, np.ndarray], step: int) -> Chunk:
        """Decide at environment step `step` from a history: each key (n, To, ...), oldest first."""
        ...
