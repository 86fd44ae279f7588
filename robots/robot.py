"""The robot interface: LeRobot's, so that any LeRobot robot can be driven as it is (duck-typed, no base class needed).

Observations and actions are flat dictionaries: "shoulder_pan.pos": float, a camera's name: uint8 (H, W, 3).
Reserved keys: "goal.<i>" (the goal, for goal-conditioned controllers), "hazard.<k>.<name>" (what the robot must keep out of, by
the names of `barriers.ROW`) and "episode" (a counter that changes when the scene was reset, so that plans made before it
are void). A robot may also have:

- `damp() -> bool`: become compliant without dropping torque at once; True when it did. Called once after a fault.
- `outcomes`: a sequence of `Outcome`, one a finished episode, where success can be judged (simulators, instrumented
cells).
- `worst_margin`: the smallest barrier of a hazard so far, negative inside; None where nothing can tell.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from robots.barriers import ROW

EPISODE = "episode"
GOAL = "goal."
HAZARD = "hazard."


@dataclass(frozen=True)
class Outcome:
    """How one episode ended: reached its goal or not, after how many seconds of the robot's time, and the smallest barrier
    on the way where there were hazards."""

    success: bool
    seconds: float
    margin: float | None = None


class Robot(ABC):
    """Base class for robots of this project; the loop itself only needs the methods, whatever the class."""

    name: str

    @property
    @abstractmethod
    def observation_features(self) -> dict[str, Any]:
        """Keys of `get_observation`: `float`, or a shape (H, W, C) for images. Available before `connect`."""

    @property
    @abstractmethod
    def action_features(self) -> dict[str, Any]:
        """Keys of `send_action`, each `float`. Available before `connect`."""

    @property
    @abstractmethod
    def is_connected(self) -> bool:
        """Whether observations can be read and actions sent."""

    @abstractmethod
    def connect(self) -> None:
        """Open the connection (and start moving nothing)."""

    @abstractmethod
    def get_observation(self) -> dict[str, Any]:
        """The newest observation, laid out as `observation_features`, in a small part of a period."""

    @abstractmethod
    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """Send a command laid out as `action_features`; returns what was really sent (a driver may clip)."""

    @abstractmethod
    def disconnect(self) -> None:
        """Torque off and close."""


class Adapter:
    """Maps a robot's flat dictionaries to the arrays that controllers and trackers use, and back.

    state, action: names in the order of the controller's features; by default the robot's float features in their
    order. Arrays have a leading axis of 1 (one robot): "state" (1, Do), "goal" (1, Dg), "hazards" (1, K, 7), cameras
    (1, H, W, C) uint8.
    """

    def __init__(
        self, robot: Any, *, state: tuple[str, ...] | None = None, action: tuple[str, ...] | None = None
    ) -> None:
        features = robot.observation_features
        scalars = [k for k, v in features.items() if not isinstance(v, tuple | list)]
        self.state = state or tuple(k for k in scalars if k != EPISODE and not k.startswith((GOAL, HAZARD)))
        self.goal = tuple(k for k in scalars if k.startswith(GOAL))
        self.hazards = tuple(k for k in scalars if k.startswith(HAZARD))
        self.action = action or tuple(robot.action_features)
        self.images = {k: tuple(v) for k, v in features.items() if isinstance(v, tuple | list)}
        self.has_episodes = EPISODE in features
        self.shapes: dict[str, tuple[int, ...]] = {"state": (len(self.state),)}
        if self.goal:
            self.shapes["goal"] = (len(self.goal),)
        if self.hazards:
            self.shapes["hazards"] = (len(self.hazards) // len(ROW), len(ROW))
        self.shapes |= self.images
        self._measured = [self.state.index(k) for k in self.action] if set(self.action) <= set(self.state) else None

    def arrays(self, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Observation arrays; raises ValueError or KeyError when a key is missing, misshapen or not finite."""
        out = {"state": np.array([[flat[k] for k in self.state]], dtype=np.float32)}
        if self.goal:
            out["goal"] = np.array([[flat[k] for k in self.goal]], dtype=np.float32)
        if self.hazards:
            out["hazards"] = np.array([flat[k] for k in self.hazards], dtype=np.float32).reshape(1, -1, len(ROW))
        for key, value in out.items():
            if not np.isfinite(value).all():
                raise ValueError(f"{key} is not finite")
        for key, shape in self.images.items():
            image = np.asarray(flat[key])
            if image.shape != shape or image.dtype != np.uint8:
                raise ValueError(f"image {key} is {image.dtype} {image.shape}; right is uint8 {shape}")
            out[key] = image[None]
        return out

    def episode(self, flat: Mapping[str, Any]) -> int:
        """The scene's counter, 0 where the robot has none."""
        return int(flat[EPISODE]) if self.has_episodes else 0

    def flat(self, command: np.ndarray) -> dict[str, float]:
        """A command (Da,) as the robot's dictionary."""
        return dict(zip(self.action, command.tolist()))

    def command(self, flat: Mapping[str, Any]) -> np.ndarray:
        """What `send_action` returned, as (Da,) float64."""
        return np.array([flat[k] for k in self.action], dtype=np.float64)

    def measured(self, state: np.ndarray) -> np.ndarray | None:
        """The measured values (1, Da) of what is commanded, where names tell (position-controlled arms); else None."""
        return None if self._measured is None else state[:, self._measured].astype(np.float64)
