"""What a task is: a vectorised simulator with reset distribution, horizon and metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pilotwave.errors import UserError
from robots.barriers import Barrier, values
from robots.controller import Observation
from robots.safety_filter import LinearModel

BoolArray = NDArray[np.bool_]
Info = dict[str, np.ndarray]
"""Arrays (n, ...) a step: always "success" (n,) bool (the goal condition holds now); a task with constraints adds
"margin" (n,) (smallest barrier value of the executed state; negative is a violation)."""


@dataclass(frozen=True, eq=False)
class TaskSpec:
    """Facts about a task. Actions are clipped to action_low..action_high (Da,) by `step`.

    score: name of the metric in `robots.rollout.SCORES`. reference: (random, expert) returns for D4RL's normalization.
    images: (H, W, C) of each image key of the observation. hazards: how many its "hazards" (n, K, 7) holds. final_info: info keys
    whose value at the episode's end is reported. apart: metres that the task's two robots must stay from each other; 0 where it
    has one. barriers: of the state, for planners. options: JSON-able arguments for which `robots.make(name, **options)` makes
    this task again.
    """

    name: str
    observation_dim: int
    action_dim: int
    horizon: int
    dt: float
    action_low: np.ndarray
    action_high: np.ndarray
    observation_names: tuple[str, ...]
    action_names: tuple[str, ...]
    score: str
    source: str
    goal_dim: int = 0
    reference: tuple[float, float] | None = None
    images: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    hazards: int = 0
    final_info: tuple[str, ...] = ()
    apart: float = 0.0
    barriers: tuple[Barrier, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def executed_margin(info: Info, observation: Observation, barriers: Sequence[Barrier]) -> np.ndarray | None:
    """The smallest barrier (n,) at states that steps ended in, of the task's own and of further ones; None where there is none."""
    own = info.get("margin")
    if not barriers:
        return own
    further = values(barriers, observation["state"].astype(np.float64)).min(-1)
    return further if own is None else np.fmin(own, further)


class Task(ABC):
    """n copies of an environment stepped together. A copy that terminated stays as it is and earns 0 until `reset`."""

    spec: TaskSpec
    barriers: Sequence[Barrier] = ()  # what states must always keep to, beside the hazards that are observed
    metadata: ClassVar[dict[str, Any]] = {}

    @abstractmethod
    def reset(self, seeds: Sequence[int]) -> Observation:
        """Start n = len(seeds) episodes; each depends on its own seed alone. Returns {"state": (n, Do), ...}."""

    @abstractmethod
    def step(self, actions: np.ndarray) -> tuple[Observation, np.ndarray, BoolArray, Info]:
        """Apply actions (n, Da) for spec.dt seconds: observation, reward (n,), terminated (n,), info of (n, ...)."""

    @abstractmethod
    def observation(self) -> Observation:
        """The present observation, as reset and step return it."""

    @abstractmethod
    def render(self, i: int = 0) -> NDArray[np.uint8]:
        """A picture (H, W, 3) of copy i."""

    @abstractmethod
    def snapshot(self) -> Any:
        """The full state of all copies; opaque, in memory only."""

    @abstractmethod
    def restore(self, snapshot: Any) -> Observation:
        """Return to a snapshot of this task (the same number of copies): the same actions give the same future."""

    def to_pixels(self, points: np.ndarray) -> np.ndarray | None:
        """World coordinates (k, 2) as pixels (k, 2) (column, row) of `render`; None where there is no such map."""
        return None

    def rewards(self, states: np.ndarray) -> np.ndarray | None:
        """The reward (k,) that recorded data of this task give for reaching states (k, Do), where it depends on them alone."""
        return None

    def margins(self, states: np.ndarray) -> np.ndarray | None:
        """info["margin"] (k,) of reaching states (k, Do); None without constraints, or where they do not depend on states alone."""
        return values(self.barriers, states.astype(np.float64)).min(-1) if self.barriers else None

    def reset_recorded(self, rows: Mapping[str, np.ndarray]) -> Observation:
        """Start from recorded steps (a data set's columns, (n, ...) each), at rest where velocities are not recorded."""
        raise UserError(f"{self.spec.name} cannot be set to recorded states; let a controller act instead")

    def linear_model(self) -> LinearModel | None:
        """How the state moves from step to step, for filters of the action; None where it is not known to be linear."""
        return None

    def draw(self, state: np.ndarray) -> NDArray[np.uint8] | None:
        """A picture (H, W, 3) of an observation (Do,), imagined or real; None where the task cannot draw one."""
        return None

    def close(self) -> None:  # noqa: B027  (not every task has something to release)
        """Release windows and simulators."""

    def _actions(self, actions: np.ndarray, n: int) -> np.ndarray:
        """Actions checked and clipped: float64 (n, Da)."""
        actions = np.asarray(actions, dtype=np.float64)
        if actions.shape != (n, self.spec.action_dim):
            raise UserError(f"{self.spec.name}: actions have shape {actions.shape}; right is ({n}, {self.spec.action_dim})")
        if not np.isfinite(actions).all():
            raise UserError(f"{self.spec.name}: an action is NaN or infinite; actions must be finite")
        return np.clip(actions, self.spec.action_low, self.spec.action_high)


def checked_horizon(horizon: int | None, default: int) -> int:
    """The episode length asked for, or the task's own."""
    if horizon is None:
        return default
    if isinstance(horizon, bool) or int(horizon) != horizon or horizon < 1:
        raise UserError(f"horizon {horizon}; an episode needs a whole number of steps, 1 or more")
    return int(horizon)
