"""PointMaze with hazards: the same ball, maze, starts and goals, and regions that the ball must not enter.

A hazard is a superellipse; its barrier (`robots.barriers.Superellipse`, metres, negative inside) of the ball's centre
is what counts, as in the published set-up, so the ball's radius of 0.1 does not. info["margin"] is the smallest barrier
of the state that a step ends in; an episode violates where it is negative. The score is the share of episodes that
reach the goal without a violation. info["trapped"] at the end counts local traps: standing (below 0.1 m/s) within 0.2 of a
hazard, away from the goal. The observation has "hazards" (n, K, 7) beside the maze's own, `barriers.ROW`.

Hazards (Xiao et al. 2023, "SafeDiffuser", arXiv 2306.00148; their code, diffuser/models/diffusion.py of
github.com/Weixy21/SafeDiffuser). Their centres are given as (column, row) on the drawn map, whose positions are
maze2d's plus 0.5; in this task's frame (x along the rows, see `pointmaze`) a centre (c, r) is (r - 0.5, c - 0.5).
- "published": an ellipse of power 2 at (5.8, 5) and a quartic at (5.3, 2), both of radius 1. The ellipse closes the corridor
  between the cells (4, 6) and (5, 6), so that the way between the maze's halves is the right one alone; the quartic leaves 0.4 of
  the two corridors beside it.
- "narrow": their narrow passages, six quartics: radius 1 at (5.5, 2), (5.5, 5), (7.6, 7) and (10, 6.3), half axes
  1 by 0.5 (column, row) at (3, 2.5), 1.8 at (8.5, 3.5).
- "random": two, one of each power, drawn for each episode: radii uniform 0.5 to 1 and centres uniform over the maze.
- "moving": an ellipse at (5.3, 5) and a quartic at (5.3, 2), of radius 0.8, each swinging by 0.3 along the columns, once in
  4 s at a random phase (so at 0.47 m/s at most). They push into the corridors at both sides and never close one: 0.3 of
  each stay free for the ball.

Reset: as in `pointmaze`, drawn again (random hazards too) until start and goal are at least 0.1 from every hazard and
joined by a way that keeps the ball off the walls and 0.05 away from hazards (moving ones anywhere on their swings),
searched on a grid of 0.05.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pilotwave.errors import UserError, nearest
from robots.barriers import from_rows, values
from robots.controller import Observation
from robots.tasks.base import BoolArray, Info
from robots.tasks.maps import MazeMap
from robots.tasks.pointmaze import BALL_RADIUS, PointMaze, cell_of

CLEAR, CLEARANCE, SPACING = 0.1, 0.05, 0.05
STILL, BESIDE = 0.1, 0.2


@dataclass(frozen=True)
class Hazards:
    """center, radii (K, 2), power (K,) and how they swing: by `swing` (K, 2) * sin(2 pi (time + phase) / period)."""

    center: np.ndarray
    radii: np.ndarray
    power: np.ndarray
    swing: np.ndarray
    phase: np.ndarray
    period: float = 4.0

    def rows(self, time: float) -> np.ndarray:
        """(K, 7), as `barriers.ROW` names them."""
        angle = 2 * np.pi * (time + self.phase[:, None]) / self.period
        center = self.center + self.swing * np.sin(angle)
        velocity = self.swing * np.cos(angle) * 2 * np.pi / self.period
        return np.concatenate([center, self.radii, self.power[:, None], velocity], 1)

    def everywhere(self) -> np.ndarray:
        """(1, 3 K, 7): the middle and both ends of each swing, standing."""
        still = replace(self, center=np.zeros_like(self.center), phase=np.zeros_like(self.phase)).rows(0.0)
        places = [self.center + side * self.swing for side in ((-1, 0, 1) if self.swing.any() else (0,))]
        rows = [np.concatenate([place, still[:, 2:5], 0 * still[:, 5:]], 1) for place in places]
        return np.concatenate(rows)[None]


def drawn(*hazards: tuple[float, float, float, float, float], swing: float = 0.0) -> Hazards:
    """From (column, row) on the drawn map, half axes along (column, row), and power: see the module."""
    table = np.array(hazards)
    zeros = np.zeros((len(table), 2))
    return Hazards(table[:, 1::-1] - 0.5, table[:, 3:1:-1], table[:, 4], zeros + np.array([0.0, swing]), zeros[:, 0])


def random_hazards(rng: np.random.Generator, maze: MazeMap) -> Hazards:
    """See the module."""
    center = rng.uniform(0.0, np.array(maze.walls.shape) - 1.0, (2, 2))
    return Hazards(center, rng.uniform(0.5, 1.0, (2, 2)), np.array([2.0, 4.0]), np.zeros((2, 2)), np.zeros(2))


PUBLISHED = drawn((5.8, 5, 1, 1, 2), (5.3, 2, 1, 1, 4))
NARROW = drawn(
    (5.5, 2, 1, 1, 4), (5.5, 5, 1, 1, 4), (3, 2.5, 1, 0.5, 4), (8.5, 3.5, 1.8, 1.8, 4), (7.6, 7, 1, 1, 4), (10, 6.3, 1, 1, 4)
)  # fmt: skip
MOVING = drawn((5.3, 5, 0.8, 0.8, 2), (5.3, 2, 0.8, 0.8, 4), swing=0.3)

HAZARDS: dict[str, Callable[[np.random.Generator, MazeMap], Hazards]] = {
    "published": lambda rng, maze: PUBLISHED,
    "narrow": lambda rng, maze: NARROW,
    "random": random_hazards,
    "moving": lambda rng, maze: replace(MOVING, phase=rng.uniform(0.0, MOVING.period, 2)),
}
STANDING = ("published", "narrow")  # the same in every episode


class HazardMaze(PointMaze):
    """See the module. hazards: a key of HAZARDS. goal: "random" or "fixed"."""

    def __init__(
        self,
        hazards: str = "published",
        maze: Any = "large",
        goal: str = "random",
        horizon: int | None = None,
        view: str = "top",
    ) -> None:
        super().__init__(maze, goal, horizon, view)
        if hazards not in HAZARDS:
            raise nearest("hazards", str(hazards), HAZARDS)
        if goal == "chain":
            raise UserError("mazes with hazards have goal=random or goal=fixed; a chain's goals could lie in a hazard")
        self.hazards_option = hazards
        suffix = {"published": "hazards", "narrow": "narrow"}.get(hazards, f"{hazards}-hazards")
        self.spec = replace(
            self.spec,
            name=f"{self.spec.name}-{suffix}",
            score="safe_success_rate",
            source=f"{self.spec.source}; SafeDiffuser (Xiao et al. 2023)",
            reference=None,
            hazards=len(HAZARDS[hazards](np.random.default_rng(0), self.maze).center),
            final_info=("trapped",),
        )
        rows, columns = self.maze.walls.shape
        axes = [np.arange(0.0, size - 1.0 + SPACING / 2, SPACING) for size in (rows, columns)]
        self._grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
        corners = [self._grid + BALL_RADIUS * np.array([i, j]) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        cells = [np.clip(cell_of(corner), 0, (rows - 1, columns - 1)) for corner in corners]
        self._open = ~np.any([self.maze.walls[cell[..., 0], cell[..., 1]] for cell in cells], axis=0)
        self._hazards: list[Hazards] = []
        self._free: NDArray[np.int32] | None = None

    def reset(self, seeds: Sequence[int]) -> Observation:
        super().reset(seeds)
        self._hazards = []
        for i, rng in enumerate(self._rng):
            while True:
                hazards = HAZARDS[self.hazards_option](rng, self.maze)
                if self._joined(hazards, self._state[i, 1:3], self._goal[i]):
                    break
                self._place(i, rng)
            self._hazards.append(hazards)
        return self.observation()

    def reset_to(self, states: np.ndarray, goals: np.ndarray, seed: int = 0) -> Observation:
        super().reset_to(states, goals, seed)
        self._hazards = [HAZARDS[self.hazards_option](rng, self.maze) for rng in self._rng]
        return self.observation()

    def _joined(self, hazards: Hazards, start: np.ndarray, goal: np.ndarray) -> bool:
        """Whether start and goal are clear of the hazards and a clear way joins them."""
        ends = np.stack([start, goal])[None]
        if values(from_rows(hazards.everywhere()), ends).min() < CLEAR:
            return False
        a, b = (self._region(hazards)[tuple(np.rint(end / SPACING).astype(int))] for end in ends[0])
        return bool(a == b and a > 0)

    def _region(self, hazards: Hazards) -> NDArray[np.int32]:
        """The grid's connected free regions, numbered from 1; searched once where all episodes have the same hazards."""
        if self._free is not None and self.hazards_option != "random":
            return self._free
        b = values(from_rows(hazards.everywhere()), self._grid[None]).min(-1)[0]
        self._free = ndimage.label(self._open & (b >= CLEARANCE))[0]
        return self._free

    def margins(self, states: np.ndarray) -> np.ndarray | None:
        if self.hazards_option not in STANDING:
            return None
        rows = HAZARDS[self.hazards_option](np.random.default_rng(0), self.maze).rows(0.0)
        return np.asarray(values(from_rows(rows[None]), states[None, :, :2].astype(np.float64)).min(-1)[0])

    def step(self, actions: np.ndarray) -> tuple[Observation, np.ndarray, BoolArray, Info]:
        observation, reward, terminated, info = super().step(actions)
        info["margin"] = values(from_rows(self._rows()), self._state[:, 1:3]).min(-1)
        still = np.linalg.norm(self._state[:, 3:5], axis=1) < STILL
        info["trapped"] = still & (info["margin"] < BESIDE) & ~info["success"]
        return observation, reward, terminated, info

    def _rows(self) -> np.ndarray:
        """(n, K, 7) now."""
        return np.array([hazards.rows(time) for hazards, time in zip(self._hazards, self._state[:, 0])])

    def observation(self) -> Observation:
        observation = super().observation()
        if len(self._hazards) == len(self._state):
            observation["hazards"] = self._rows().astype(np.float32)
        return observation

    def snapshot(self) -> Any:
        return super().snapshot(), list(self._hazards)

    def restore(self, snapshot: Any) -> Observation:
        kept, hazards = snapshot
        super().restore(kept)
        self._hazards = list(hazards)
        return self.observation()

    def render(self, i: int = 0) -> NDArray[np.uint8]:
        import cv2

        picture = np.ascontiguousarray(super().render(i))
        angle = np.linspace(0.0, 2 * np.pi, 73)[:-1]
        circle = np.stack([np.cos(angle), np.sin(angle)], -1)
        over = picture.copy()
        for row in self._hazards[i].rows(self._state[i, 0]):
            outline = row[0:2] + row[2:4] * np.sign(circle) * np.abs(circle) ** (2 / row[4])
            corners = np.rint(self.to_pixels(outline)).astype(np.int32)[:, None]
            cv2.fillPoly(over, [corners], (226, 120, 40), cv2.LINE_AA)
            cv2.polylines(picture, [corners], True, (200, 80, 20), 2, cv2.LINE_AA)
        return np.asarray(cv2.addWeighted(over, 0.45, picture, 0.55, 0), dtype=np.uint8)
