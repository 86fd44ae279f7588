"""Trackers: how a reference (an action, or a state to be in) becomes the command of this instant. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from robots.controller import Chunk, FloatArray


@dataclass(frozen=True)
class DirectTracker:
    """The reference is the action: held until the next one is due, the last one held after the chunk's end."""

    def reference(self, chunk: Chunk, time: float) -> FloatArray:
        """References (n, R) at `time` seconds after the observation."""
        # the small offset keeps 0.3 / 0.1 from flooring to 2
        index = int(np.floor((time - chunk.start) / chunk.dt + 1e-6))
        return chunk.references[:, np.clip(index, 0, chunk.references.shape[1] - 1)]

    def command(self, observation: FloatArray, reference: FloatArray) -> FloatArray:
        """Actions (n, Da) = references."""
        return reference

    def rest(self, observation: FloatArray) -> None:
        """Unknown: which action keeps a robot at rest depends on the robot."""

    def hold(self, reference: FloatArray) -> FloatArray:
        """The action itself."""
        return reference

    def expected(self, observation: FloatArray, now: FloatArray, then: FloatArray) -> None:
        """Unknown: actions do not say where the robot will be."""


@dataclass(frozen=True)
class PDTracker:
    """Proportional-derivative tracking of positions and velocities: a = kp (p_ref - p) + kd (v_ref - v), clipped.

    Janner et al. 2022 (Diffuser) track maze plans so with kp = kd = 1 (their action: next waypoint minus state).
    position, velocity: slices of both the observation and the reference. A reference without velocities (R = width of
    `position`) is differentiated along the chunk. lookahead: seconds ahead of now at which the reference is read: at 0
    it says where the robot should be already. After the chunk's end: the last position, at rest.
    """

    kp: float
    kd: float
    position: slice = field(default_factory=lambda: slice(0, 2))
    velocity: slice = field(default_factory=lambda: slice(2, 4))
    low: float | FloatArray = -1.0
    high: float | FloatArray = 1.0
    lookahead: float = 0.0

    def reference(self, chunk: Chunk, time: float) -> FloatArray:
        """References (n, 2 P) = (positions, velocities), linear between the chunk's instants."""
        points = chunk.references
        last = points.shape[1] - 1
        index = np.clip((time + self.lookahead - chunk.start) / chunk.dt, 0.0, None)
        at = min(int(index), max(last - 1, 0))
        weight = min(index - at, 1.0) if last else 0.0
        here, there = points[:, at], points[:, min(at + 1, last)]
        between = (1.0 - weight) * here + weight * there
        position = between[:, self.position]
        if index > last - 1e-6:
            velocity = np.zeros_like(position)
        elif points.shape[2] > position.shape[1]:
            velocity = between[:, self.velocity]
        else:
            velocity = (there - here)[:, self.position] / chunk.dt
        return np.concatenate([position, velocity], axis=1)

    def command(self, observation: FloatArray, reference: FloatArray) -> FloatArray:
        """Actions (n, P) from state observations (n, Do) and references (n, 2 P)."""
        width = reference.shape[1] // 2
        action = self.kp * (reference[:, :width] - observation[:, self.position])
        action = action + self.kd * (reference[:, width:] - observation[:, self.velocity])
        return np.clip(action, self.low, self.high)

    def rest(self, observation: FloatArray) -> FloatArray:
        """The reference (n, 2 P) that stands still where the robot is."""
        position = np.asarray(observation[:, self.position], dtype=np.float64)
        return np.concatenate([position, np.zeros_like(position)], axis=1)

    def hold(self, reference: FloatArray) -> FloatArray:
        """The same position, at rest."""
        width = reference.shape[1] // 2
        return np.concatenate([reference[:, :width], np.zeros_like(reference[:, width:])], axis=1)

    def expected(self, observation: FloatArray, now: FloatArray, then: FloatArray) -> FloatArray:
        """The observation (n, Do) after moving as far as from reference `now` to `then` (n, 2 P)."""
        width = now.shape[1] // 2
        moved = observation.copy()
        moved[:, self.position] += then[:, :width] - now[:, :width]
        moved[:, self.velocity] += then[:, width:] - now[:, width:]
        return moved
