"""Maze maps: the named ones and those given by the user.

A map is rows of characters: `#` or `1` a wall, `O`, `0`, `.` or a blank an empty cell, `G` an empty cell that holds the
fixed goal. It comes as a list of strings, a list of lists (0 and 1 as in gymnasium-robotics; "r", "g", "c" there are
empty cells), a text file with one row a line, or a YAML file with `maze:` (rows) and optionally `horizon:`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pilotwave.errors import UserError, nearest

# umaze, medium, large: D4RL (Fu et al. 2020), d4rl/pointmaze/maze_model.py. giant: OGBench (Park et al. 2024), with the
# goal of its first task.
MAPS: dict[str, tuple[str, ...]] = {
    "umaze": (
        "#####",
        "#GOO#",
        "###O#",
        "#OOO#",
        "#####",
    ),
    "medium": (
        "########",
        "#OO##OO#",
        "#OO#OOO#",
        "##OOO###",
        "#OO#OOO#",
        "#O#OO#O#",
        "#OOO#OG#",
        "########",
    ),
    "large": (
        "############",
        "#OOOO#OOOOO#",
        "#O##O#O#O#O#",
        "#OOOOOO#OOO#",
        "#O####O###O#",
        "#OO#O#OOOOO#",
        "##O#O#O#O###",
        "#OO#OOO#OGO#",
        "############",
    ),
    "giant": (
        "################",
        "#O#OOOOOO##OOOO#",
        "#O#O##O#O#OO##O#",
        "#OOO#OO#OOO#OOO#",
        "#O###O######O#O#",
        "#OOO#OOO#OOOO#O#",
        "###O#O#OO#O#O###",
        "#OOO#OO#OOO#OOO#",
        "#O#O#O######O#O#",
        "#O###OOO#OOO##O#",
        "#OOOOO#OOO#OOOG#",
        "################",
    ),
}
_WALL, _EMPTY, _GOAL = "#1", "O0. rc", "Gg"


@dataclass(frozen=True)
class MazeMap:
    """walls: (rows, columns) bool. goal: the fixed goal's cell (row, column), without G the first empty (D4RL)."""

    name: str
    walls: NDArray[np.bool_]
    goal: tuple[int, int]
    horizon: int | None = None

    @cached_property
    def cells(self) -> NDArray[np.int64]:
        """The empty cells (k, 2) as (row, column), row by row."""
        return np.argwhere(~self.walls)

    @cached_property
    def index(self) -> NDArray[np.int64]:
        """(rows, columns): the number of each empty cell in `cells`, -1 for walls."""
        index = np.full(self.walls.shape, -1)
        index[~self.walls] = np.arange(len(self.cells))
        return index

    @cached_property
    def distance(self) -> NDArray[np.int64]:
        """(k, k) moves on the shortest path between empty cells over shared edges; -1 where there is none."""
        size = len(self.cells)
        distance = np.full((size, size), -1)
        for goal in range(size):
            distance[goal, goal] = 0
            queue = deque([goal])
            while queue:
                here = queue.popleft()
                for there in self._neighbours(here):
                    if distance[there, goal] < 0:
                        distance[there, goal] = distance[here, goal] + 1
                        queue.append(there)
        return distance

    @cached_property
    def next_cell(self) -> NDArray[np.int64]:
        """(k, k): the cell to enter next on a shortest path from the first to the second; the goal stays."""
        size = len(self.cells)
        table = np.tile(np.arange(size)[:, None], (1, size))
        for here in range(size):
            for there in reversed(self._neighbours(here)):
                closer = self.distance[there] == self.distance[here] - 1
                table[here, closer] = there
        return table

    def rows(self) -> list[str]:
        """The map as rows of characters."""
        rows = [["#" if wall else "O" for wall in row] for row in self.walls]
        rows[self.goal[0]][self.goal[1]] = "G"
        return ["".join(row) for row in rows]

    def _neighbours(self, cell: int) -> list[int]:
        row, column = self.cells[cell]
        around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        return [int(self.index[r, c]) for r, c in around if self.index[r, c] >= 0]


def maze_map(maze: str | Path | Sequence[str] | Sequence[Sequence[object]]) -> MazeMap:
    """A map from its name, file or rows. Raises UserError for anything that is not a closed, connected maze."""
    if not isinstance(maze, str | Path):
        return parse(maze, "maze")
    if str(maze) in MAPS:
        return parse(MAPS[str(maze)], str(maze))
    path = Path(maze)
    if not path.suffix and not path.exists():
        raise nearest("maze map", str(maze), MAPS)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"cannot read the maze map {path}: {reason}") from None
    if path.suffix not in (".yaml", ".yml"):
        return parse([line.rstrip("\r") for line in text.split("\n") if line.strip()], path.stem)
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{path} is not valid YAML") from None
    rows = content.get("maze") if isinstance(content, dict) else None
    if not isinstance(rows, list | str):
        raise UserError(f"{path} has no 'maze' entry; it needs a list of rows such as '#OG#'")
    horizon = content.get("horizon")
    return parse(rows.split() if isinstance(rows, str) else rows, path.stem, horizon)


def parse(rows: Sequence[str] | Sequence[Sequence[object]], name: str, horizon: int | None = None) -> MazeMap:
    """A map from its rows, checked: rectangular, walled all round, one piece, at most one goal."""
    lines = [[str(tile) for tile in row] for row in rows] if all(hasattr(row, "__iter__") for row in rows) else []
    if not lines:
        raise UserError(f"maze map '{name}' has no rows; give rows such as '#OG#'")
    width = len(lines[0])
    for number, line in enumerate(lines, 1):
        if len(line) != width:
            raise UserError(f"maze map '{name}': row {number} has {len(line)} cells, row 1 {width}; rows must be equal")
        for tile in line:
            if len(tile) != 1 or tile not in _WALL + _EMPTY + _GOAL:
                known = "# (wall), O (empty), G (goal)"
                raise UserError(f"maze map '{name}': unknown tile '{tile}' in row {number}; use {known}")
    grid = np.array(lines)
    walls = np.isin(grid, list(_WALL))
    if not (walls[0].all() and walls[-1].all() and walls[:, 0].all() and walls[:, -1].all()):
        raise UserError(f"maze map '{name}' is open at its border; the outermost cells must be walls (#)")
    goals = [] if set("rc") & set(grid.flat) else np.argwhere(np.isin(grid, list(_GOAL))).tolist()
    if len(goals) > 1:
        raise UserError(f"maze map '{name}' has {len(goals)} goals; one G at most")
    empty = np.argwhere(~walls).tolist()
    if len(empty) < 2:
        raise UserError(f"maze map '{name}' has {len(empty)} empty cells; start and goal need 2")
    row, column = goals[0] if goals else empty[0]
    maze = MazeMap(name, walls, (int(row), int(column)), horizon)
    if (maze.distance < 0).any():
        raise UserError(f"maze map '{name}' falls into parts that no path joins; all empty cells must be connected")
    return maze
