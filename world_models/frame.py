"""The coordinates in which a world model predicts: the data's own, or those of a rigid body in the plane.

Where observations are points of a plane, no physics depends on where its origin lies and how its axes turn (walls apart).
Seen from a body in the scene, what the data holds at one place and angle is learnt for all, and the points of a rigid body
are three numbers, so that imagination cannot bend it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pilotwave.errors import UserError

Pose = tuple[Tensor, Tensor]  # centres (..., 2) and angles (...)


class Frame(nn.Module):
    """The data's own coordinates: states are observations."""

    def __init__(self, observation_dim: int, action_dim: int) -> None:
        super().__init__()
        self.features = observation_dim

    def fit(self, observations: Tensor) -> None:
        """Learn what there is to learn from observations (N, Do)."""

    def origin(self, observation: Tensor) -> Any:
        """Where the coordinates lie for observations (B, Do)."""
        return None

    def enter(self, observation: Tensor, origin: Any) -> Tensor:
        """Observations (B, n, Do) -> states (B, n, features)."""
        return observation

    def enter_actions(self, action: Tensor, origin: Any) -> Tensor:
        """Actions (B, n, Da), in the task's units."""
        return action

    def leave_actions(self, action: Tensor, origin: Any) -> Tensor:
        """The inverse of `enter_actions`."""
        return action

    def leave(self, state: Tensor, origin: Any) -> Tensor:
        """The inverse of `enter`."""
        return state

    def recentre(self, state: Tensor, action: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, n, features) and actions (B, m, Da) in the coordinates that `enter` has at the state (B, features)."""
        return state, action

    def uncentre(self, state: Tensor, at: Tensor) -> Tensor:
        """Back from there, a state (B, features)."""
        return state


class BodyFrame(Frame):
    """Observations and actions are points (x, y) of a plane; `bodies` [[first, end), ...] are the features that hold the
    points of a rigid body each. The first body's centre is the origin, its angle the direction of the axes.

    A state is the free points, then (x, y, r angle) of each body, r the body's radius (root mean square): all lengths. Seen from
    an origin, a body's angle lies within half a turn of it.
    """

    shape: Tensor
    radius: Tensor

    def __init__(self, observation_dim: int, action_dim: int, bodies: Sequence[Sequence[int]]) -> None:
        super().__init__(observation_dim, action_dim)
        self.bodies = [(int(first), int(end)) for first, end in bodies]
        inside = [i for first, end in self.bodies for i in range(first, end)]
        good = all(first % 2 == end % 2 == 0 and end - first >= 4 for first, end in self.bodies)
        if not good or len(set(inside)) < len(inside) or set(inside) - set(range(observation_dim)):
            raise UserError(
                f"world_model.bodies={self.bodies}; each must be [first, end) of at least two points (x, y), first even, "
                f"among the {observation_dim} features, without overlap"
            )
        self.free = [i for i in range(observation_dim) if i not in inside]
        if len(self.free) % 2 or action_dim % 2:
            raise UserError(f"world_model.bodies={self.bodies} wants all other features and the actions to be points (x, y)")
        self.features = len(self.free) + 3 * len(self.bodies)
        self.observation_dim = observation_dim
        points = max(end - first for first, end in self.bodies) // 2
        self.register_buffer("shape", torch.zeros(len(self.bodies), points, 2))  # of each body about its centre, unturned
        self.register_buffer("radius", torch.ones(len(self.bodies)))

    def fit(self, observations: Tensor) -> None:
        """The mean shape of each body, turned as the first row has it (Procrustes analysis, Gower 1975)."""
        for i, (first, end) in enumerate(self.bodies):
            points = observations[:, first:end].double().unflatten(1, (-1, 2))
            points = points - points.mean(1, keepdim=True)
            shape = points[0]
            for _ in range(3):
                shape = _turn(points, -_angle(points, shape)).mean(0)
            n = len(shape)
            self.shape[i, :n] = shape.float()
            self.radius[i] = shape.square().sum(-1).mean().sqrt().clamp_min(1e-6).float()

    def _poses(self, observation: Tensor) -> list[Pose]:
        poses = []
        for i, (first, end) in enumerate(self.bodies):
            points = observation[..., first:end].unflatten(-1, (-1, 2))
            centre = points.mean(-2)
            poses.append((centre, _angle(points - centre[..., None, :], self.shape[i, : points.shape[-2]])))
        return poses

    def origin(self, observation: Tensor) -> Pose:
        return self._poses(observation)[0]

    def enter(self, observation: Tensor, origin: Pose) -> Tensor:
        parts = [observation[..., self.free]]
        for i, (c, a) in enumerate(self._poses(observation)):
            parts += [c, (self.radius[i] * a)[..., None]]
        return self._moved_in(torch.cat(parts, -1), origin)

    def enter_actions(self, action: Tensor, origin: Pose) -> Tensor:
        return _relative(action, origin)

    def leave_actions(self, action: Tensor, origin: Pose) -> Tensor:
        return _world(action, origin)

    def leave(self, state: Tensor, origin: Pose) -> Tensor:
        state = self._moved_out(state, origin)
        n = len(self.free)
        out = state.new_zeros(*state.shape[:-1], self.observation_dim)
        out[..., self.free] = state[..., :n]
        for i, (first, end) in enumerate(self.bodies):
            c, angle = state[..., n + 3 * i : n + 3 * i + 2], state[..., n + 3 * i + 2] / self.radius[i]
            shape = self.shape[i, : (end - first) // 2].expand(*angle.shape, -1, 2)
            out[..., first:end] = (_turn(shape, angle) + c[..., None, :]).flatten(-2)
        return out

    def recentre(self, state: Tensor, action: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        origin = self._at(at)
        return self._moved_in(state, origin), _relative(action, origin)

    def uncentre(self, state: Tensor, at: Tensor) -> Tensor:
        return self._moved_out(state[:, None], self._at(at))[:, 0]

    def _at(self, state: Tensor) -> Pose:
        n = len(self.free)
        return state[:, n : n + 2], state[:, n + 2] / self.radius[0]

    def _moved_in(self, state: Tensor, origin: Pose) -> Tensor:
        """States (B, n, features) seen from poses (B, 2), (B)."""
        n = len(self.free)
        points = _relative(torch.cat([state[..., :n], *(state[..., j : j + 2] for j in self._places)], -1), origin)
        parts = [points[..., :n]]
        for i, j in enumerate(self._places):
            angle = state[..., j + 2] / self.radius[i] - origin[1][:, None]
            turned = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
            parts += [points[..., n + 2 * i : n + 2 * i + 2], (self.radius[i] * turned)[..., None]]
        return torch.cat(parts, -1)

    def _moved_out(self, state: Tensor, origin: Pose) -> Tensor:
        n, (_, angle) = len(self.free), origin
        points = _world(torch.cat([state[..., :n], *(state[..., j : j + 2] for j in self._places)], -1), origin)
        parts = [points[..., :n]]
        for i, j in enumerate(self._places):
            turned = state[..., j + 2] + self.radius[i] * angle[:, None]
            parts += [points[..., n + 2 * i : n + 2 * i + 2], turned[..., None]]
        return torch.cat(parts, -1)

    @property
    def _places(self) -> range:
        """Where the bodies lie in a state."""
        return range(len(self.free), self.features, 3)


def _relative(points: Tensor, origin: Pose) -> Tensor:
    """Points (B, n, 2 m) seen from poses (B, 2), (B)."""
    centre, angle = origin
    return _turn(points.unflatten(-1, (-1, 2)) - centre[:, None, None], -angle[:, None]).flatten(-2)


def _world(points: Tensor, origin: Pose) -> Tensor:
    """The inverse of `_relative`."""
    centre, angle = origin
    return (_turn(points.unflatten(-1, (-1, 2)), angle[:, None]) + centre[:, None, None]).flatten(-2)


def _turn(points: Tensor, angle: Tensor) -> Tensor:
    """Points (..., n, 2) turned about the origin by angles (...) in radians."""
    c, s = torch.cos(angle)[..., None], torch.sin(angle)[..., None]
    x, y = points.unbind(-1)
    return torch.stack([c * x - s * y, s * x + c * y], -1)


def _angle(points: Tensor, shape: Tensor) -> Tensor:
    """The turn (...) from centred points `shape` (n, 2) to `points` (..., n, 2) of least squares (Kabsch 1976)."""
    cross = (shape[:, 0] * points[..., 1] - shape[:, 1] * points[..., 0]).sum(-1)
    return torch.atan2(cross, (shape * points).sum((-2, -1)))


def build_frame(observation_dim: int, action_dim: int, bodies: Sequence[Sequence[int]]) -> Frame:
    """Bodies or none -> the frame."""
    return BodyFrame(observation_dim, action_dim, bodies) if bodies else Frame(observation_dim, action_dim)
