"""PointMaze with short demonstrations and far goals: long ways must be put together from parts that were shown apart.

The ball, its maze and its metric are `pointmaze`'s, by default in the giant maze. Only starts and goals differ:
- Recorded (`collect`): episodes from a random empty cell to another at most `reach` moves away, which end once the goal is
  reached (within 0.1), and after 200 steps at the latest, as OGBench's "stitch" data sets of its mazes hold goals of at most
  4 cells (Park et al. 2024, "OGBench", arXiv 2410.20092, section 7).
- Reset: the start as in `pointmaze`, the goal in a random empty cell at least `apart` moves from the start, or in the
  farthest from it where there is none, both with D4RL's noise. In the giant maze with 12, the mean way has 17.5 moves, the
  longest 32. The figures are this project's: three times what was shown. Chen et al. (2024, "Simple Hierarchical Planning
  with Diffusion", arXiv 2401.02644) ask so, in an open maze, for ways that no demonstration goes as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pilotwave.errors import UserError
from robots.tasks.maps import MAPS
from robots.tasks.pointmaze import PointMaze

LONGEST = 200  # steps of a demonstration


class CompositionalMaze(PointMaze):
    """See the module. maze: as PointMaze's. reach: moves of the longest demonstration; apart: of the shortest way to a goal."""

    def __init__(
        self,
        maze: str | Path | Sequence[str] | Sequence[Sequence[object]] = "giant",
        reach: int = 4,
        apart: int = 12,
        horizon: int | None = None,
        view: str = "top",
    ) -> None:
        super().__init__(maze, "random", horizon, view)
        if not 1 <= reach <= apart:
            raise UserError(f"reach={reach}, apart={apart}; right is 1 <= reach <= apart, in moves from cell to cell")
        self.reach, self.apart = reach, apart
        options = {"maze": self.maze.name if self.maze.name in MAPS else self.maze.rows(), "reach": reach, "apart": apart}
        options["horizon"] = self.spec.horizon
        self.spec = replace(self.spec, name="pointmaze-compositional", options=options)

    def draw_goal(self, rng: np.random.Generator, other_than: int) -> np.ndarray:
        """A goal (2,) at least `apart` moves from cell number `other_than`, with D4RL's noise."""
        away = self.maze.distance[other_than]
        return self._within(rng, away >= min(self.apart, away.max()))

    def draw_near(self, rng: np.random.Generator, other_than: int) -> np.ndarray:
        """A goal (2,) at most `reach` moves from cell number `other_than`, as demonstrations have it."""
        away = self.maze.distance[other_than]
        return self._within(rng, (away > 0) & (away <= self.reach))

    def _within(self, rng: np.random.Generator, cells: np.ndarray) -> np.ndarray:
        cell = self.maze.cells[rng.choice(np.flatnonzero(cells))]
        return cell + rng.uniform(-0.1, 0.1, 2)
