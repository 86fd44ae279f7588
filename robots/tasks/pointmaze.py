"""PointMaze: a force-driven ball finds its way through a maze.

Dynamics: D4RL's maze2d (Fu et al. 2020, "D4RL: Datasets for Deep Data-Driven Reinforcement Learning", its file
d4rl/pointmaze/maze_model.py), which gymnasium-robotics' PointMaze shares: a sphere of radius 0.1 and density 1000 on
two slide joints with damping 1, motors of gear 100, Euler steps of 0.01 s, velocities clipped to +-5 before each step,
frictionless contact with boxes of side 1.

Frame: D4RL's. The observation is (x, y, vx, vy) with x along the map's rows (downwards) and y along its columns. Cell
(row, column) is named by the position (row, column), but in D4RL the ball's body starts at (1.2, 1.2) of a world whose
walls are centred at whole numbers (row + 1, column + 1): the wall cell (r, c) covers r - 0.7 .. r + 0.3 by
c - 0.7 .. c + 0.3, so a corridor's middle lies 0.2 before its cell's position. Data, goals and obstacles published for
maze2d are given so, and this task keeps it. gymnasium-robotics' centred frame, for a map of H rows and W columns:
X = y + 0.7 - W / 2, Y = H / 2 - 0.7 - x, and its action (aX, aY) = (ay, -ax).

Reset (D4RL): start in a random empty cell plus uniform(-0.1, 0.1) on both coordinates, velocity normal(0, 0.1).
Goal: "random" another random empty cell plus uniform(-0.1, 0.1); "fixed" the map's G, exactly (D4RL's evaluation; the
start may be any cell, the goal's too); "chain" like random, and a new goal each time one is reached (never in the cell
just reached). Reward 1 in every step that ends within 0.5 of the goal, else 0; success is the same condition. An
episode runs its whole horizon: umaze 300, medium 600, large 800 (D4RL); another map 40 steps for each move of its
longest shortest path, rounded up to hundreds, 300 at least (giant: 1300).
Metric: success rate (the goal reached at any time); for "fixed" also D4RL's normalized return with its reference
returns (random, expert): umaze 23.85, 161.86; medium 13.13, 277.39; large 6.7, 273.99.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mujoco
import mujoco.rollout
import numpy as np
from numpy.typing import NDArray

from pilotwave.errors import UserError, nearest
from robots.controller import Observation
from robots.safety_filter import LinearModel
from robots.tasks.base import BoolArray, Info, Task, TaskSpec, checked_horizon
from robots.tasks.maps import MAPS, MazeMap, maze_map

GOALS = ("random", "fixed", "chain")
HORIZONS = {"umaze": 300, "medium": 600, "large": 800}
REFERENCES = {"umaze": (23.85, 161.86), "medium": (13.13, 277.39), "large": (6.7, 273.99)}
GOAL_RADIUS = 0.5
BALL_RADIUS = 0.1
BODY, WALL = 1.2, 1.0  # D4RL's offsets of the ball's body and of the walls from their cell's indices
MAX_SPEED = 5.0
_NOISE, _VELOCITY_NOISE = 0.1, 0.1


def model_xml(maze: MazeMap) -> str:
    """The MuJoCo model of a maze; joint positions are maze2d coordinates."""
    rows, columns = maze.walls.shape
    padded = np.pad(~maze.walls, 1)
    boxes = []
    for row, column in np.argwhere(maze.walls):
        # a wall that touches no empty cell cannot be hit: it is drawn and takes no part in collisions
        touched = padded[row : row + 3, column : column + 3].any()
        boxes.append(
            f'<geom type="box" pos="{row + WALL} {column + WALL} 0" size="0.5 0.5 0.2" rgba=".7 .5 .3 1"'
            + (' conaffinity="1"/>' if touched else ' contype="0" conaffinity="0"/>')
        )
    middle = f"{(rows + 1) / 2} {(columns + 1) / 2}"
    return f"""<mujoco model="pointmaze">
  <compiler inertiafromgeom="true" angle="radian"/>
  <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
  <default>
    <joint damping="1" limited="false"/>
    <geom friction=".5 .1 .1" density="1000" margin="0.002" condim="1" contype="2" conaffinity="1"/>
  </default>
  <visual><global offwidth="1280" offheight="1280"/><map znear=".01"/></visual>
  <asset>
    <texture name="floor" type="2d" builtin="checker" rgb1=".2 .3 .4" rgb2=".1 .2 .3" width="100" height="100"/>
    <material name="floor" texture="floor" texrepeat="{rows} {columns}"/>
  </asset>
  <worldbody>
    <light pos="{middle} 12" dir="0 0 -1" diffuse=".6 .6 .6"/>
    <camera name="top" fovy="{np.degrees(2 * np.arctan(rows / 2 / 50))}" pos="{middle} 50" xyaxes="0 1 0 -1 0 0"/>
    <geom name="floor" type="plane" size="40 40 .25" pos="0 0 -.1" material="floor" contype="0" conaffinity="0"/>
    <site name="goal" type="sphere" pos=".5 .5 0" size=".2" rgba=".9 .2 .2 .8"/>
    <body name="ball" pos="{BODY} {BODY} 0">
      <joint name="x" type="slide" axis="1 0 0"/>
      <joint name="y" type="slide" axis="0 1 0"/>
      <geom name="ball" type="sphere" size="{BALL_RADIUS}" rgba=".2 .8 .3 1" contype="1"/>
    </body>
    {"".join(boxes)}
  </worldbody>
  <actuator>
    <motor joint="x" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
    <motor joint="y" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
  </actuator>
</mujoco>"""


def cell_of(positions: np.ndarray) -> NDArray[np.int64]:
    """The cells (n, 2) that contain ball positions (n, 2)."""
    return np.floor(np.asarray(positions) + (BODY - WALL + 0.5)).astype(np.int64)


class PointMaze(Task):
    """See the module. maze: a name of `maps.MAPS`, a map file, or rows. render: "top" (drawn) or "mujoco".

    All copies are stepped by one call of `mujoco.rollout`, without Python between; states are arrays, so a snapshot is
    a copy and the future depends on nothing else.
    """

    def __init__(
        self,
        maze: str | Path | Sequence[str] | Sequence[Sequence[object]] = "large",
        goal: str = "random",
        horizon: int | None = None,
        view: str = "top",
    ):
        self.maze = maze if isinstance(maze, MazeMap) else maze_map(maze)
        if goal not in GOALS:
            raise nearest("goal option", str(goal), GOALS)
        if view not in ("top", "mujoco"):
            raise nearest("view", str(view), ("top", "mujoco"))
        self.goal_option, self.view = goal, view
        name = self.maze.name
        known = name in MAPS and self.maze.rows() == list(MAPS[name])
        longest = int(self.maze.distance.max())
        default = self.maze.horizon or max(300, -(-40 * longest // 100) * 100)
        if known:
            default = HORIZONS.get(name, default)
        options: dict[str, Any] = {"goal": goal, "horizon": checked_horizon(horizon, default)}
        if not known:
            options["maze"] = self.maze.rows()
        self.spec = TaskSpec(
            name=f"pointmaze-{name}" if known else "pointmaze",
            observation_dim=4,
            action_dim=2,
            horizon=options["horizon"],
            dt=0.01,
            action_low=-np.ones(2),
            action_high=np.ones(2),
            observation_names=("x", "y", "vx", "vy"),
            action_names=("force_x", "force_y"),
            score="success_rate",
            source="D4RL maze2d (Fu et al. 2020); MuJoCo",
            goal_dim=2,
            reference=REFERENCES.get(name) if goal == "fixed" and known else None,
            final_info=("goals_reached",) if goal == "chain" else (),
            options=options,
        )
        self.model = mujoco.MjModel.from_xml_string(model_xml(self.maze))
        self._data = mujoco.MjData(self.model)
        self._rollout = mujoco.rollout.Rollout(nthread=0)
        self._state = np.zeros((0, 5))  # time, x, y, vx, vy: MuJoCo's full physics state
        self._goal = np.zeros((0, 2))
        self._reached = np.zeros(0, dtype=np.int64)
        self._rng: list[np.random.Generator] = []
        self._renderer: Any = None

    def reset(self, seeds: Sequence[int]) -> Observation:
        self._rng = [np.random.default_rng(seed) for seed in seeds]
        n = len(self._rng)
        self._state, self._goal = np.zeros((n, 5)), np.zeros((n, 2))
        self._reached = np.zeros(n, dtype=np.int64)
        for i, rng in enumerate(self._rng):
            self._place(i, rng)
        return self.observation()

    def _place(self, i: int, rng: np.random.Generator) -> None:
        """Draw copy i's start and goal."""
        start = int(rng.integers(len(self.maze.cells)))
        self._state[i, 1:3] = self.maze.cells[start] + rng.uniform(-_NOISE, _NOISE, 2)
        self._state[i, 3:5] = rng.normal(0.0, _VELOCITY_NOISE, 2)
        self._goal[i] = self.maze.goal if self.goal_option == "fixed" else self.draw_goal(rng, start)

    def reset_to(self, states: np.ndarray, goals: np.ndarray, seed: int = 0) -> Observation:
        """Start n episodes at states (n, 4) with goals (n, 2), in the task's frame."""
        states, goals = np.atleast_2d(states), np.atleast_2d(goals)
        if states.shape[1:] != (4,) or goals.shape != (len(states), 2):
            raise UserError(f"states {states.shape} and goals {goals.shape}; right are (n, 4) and (n, 2)")
        self._rng = [np.random.default_rng((seed, i)) for i in range(len(states))]
        self._state = np.concatenate([np.zeros((len(states), 1)), states], axis=1).astype(np.float64)
        self._goal = np.array(goals, dtype=np.float64)
        self._reached = np.zeros(len(states), dtype=np.int64)
        return self.observation()

    def linear_model(self) -> LinearModel:
        """The ball away from walls: MuJoCo's Euler step with its implicit damping; exact below the speed limit."""
        dt, mass = self.spec.dt, float(self.model.body("ball").mass[0])
        gear, damping = float(self.model.actuator_gear[0, 0]), float(self.model.dof_damping[0])
        eye, kept = np.eye(2), mass / (mass + dt * damping)
        push = dt * gear / (mass + dt * damping)
        A = np.block([[eye, dt * kept * eye], [0 * eye, kept * eye]])
        return LinearModel(A, np.concatenate([dt * push * eye, push * eye]), dt, self.spec.action_low, self.spec.action_high)

    def rewards(self, states: np.ndarray) -> np.ndarray:
        """1 within the goal radius of the map's fixed goal, else 0: what `robots.collect` records."""
        return (np.linalg.norm(states[:, :2] - np.asarray(self.maze.goal), axis=1) <= GOAL_RADIUS).astype(np.float64)

    def reset_recorded(self, rows: Mapping[str, np.ndarray]) -> Observation:
        states = rows["observation"]
        return self.reset_to(states, rows.get("goal", np.tile(np.asarray(self.maze.goal), (len(states), 1))))

    def draw(self, state: np.ndarray) -> NDArray[np.uint8]:
        return self.draw_top(state[:2])

    def draw_goal(self, rng: np.random.Generator, other_than: int) -> np.ndarray:
        """A goal (2,) in a random empty cell other than number `other_than`, with D4RL's noise."""
        cell = int(rng.integers(len(self.maze.cells) - 1))
        return self.maze.cells[cell + (cell >= other_than)] + rng.uniform(-_NOISE, _NOISE, 2)

    def step(self, actions: np.ndarray) -> tuple[Observation, np.ndarray, BoolArray, Info]:
        n = len(self._state)
        actions = self._actions(actions, n)
        np.clip(self._state[:, 3:5], -MAX_SPEED, MAX_SPEED, out=self._state[:, 3:5])
        after = np.empty((n, 1, 5))
        self._rollout.rollout(
            [self.model] * n, [self._data], self._state, actions[:, None], skip_checks=True, nstep=1, state=after
        )
        self._state = after[:, 0]
        reached = np.linalg.norm(self._state[:, 1:3] - self._goal, axis=1) <= GOAL_RADIUS
        self._reached += reached
        info = {"success": reached, "goal": self._goal.copy()}
        if self.goal_option == "chain":
            for i in np.flatnonzero(reached):
                cell = np.clip(cell_of(self._goal[i]), 0, np.array(self.maze.walls.shape) - 1)
                self._goal[i] = self.draw_goal(self._rng[i], int(self.maze.index[tuple(cell)]))
            info["new_goal"] = reached
            info["goals_reached"] = self._reached.copy()
        return self.observation(), reached.astype(np.float64), np.zeros(n, dtype=bool), info

    def observation(self) -> Observation:
        return {"state": self._state[:, 1:].astype(np.float32), "goal": self._goal.astype(np.float32)}

    def snapshot(self) -> Any:
        rng = [generator.bit_generator.state for generator in self._rng]
        return self._state.copy(), self._goal.copy(), self._reached.copy(), rng

    def restore(self, snapshot: Any) -> Observation:
        state, goal, reached, rng = snapshot
        self._state, self._goal, self._reached = state.copy(), goal.copy(), reached.copy()
        self._rng = [np.random.default_rng() for _ in rng]
        for generator, kept in zip(self._rng, rng):
            generator.bit_generator.state = kept
        return self.observation()

    # pictures: rows run down, columns to the right, as the map is written

    @property
    def _scale(self) -> int:
        return max(16, 480 // max(self.maze.walls.shape))

    def to_pixels(self, points: np.ndarray) -> np.ndarray:
        """Pixels (k, 2) (column, row) of positions (k, 2)."""
        cells = np.asarray(points, dtype=np.float64) + (BODY - WALL + 0.5)
        return cells[:, ::-1] * self._scale

    def render(self, i: int = 0) -> NDArray[np.uint8]:
        if self.view == "mujoco":
            picture = self._render_mujoco(i)
            if picture is not None:
                return picture
        return self.draw_top(self._state[i, 1:3], self._goal[i])

    def draw_top(self, position: np.ndarray, goal: np.ndarray | None = None) -> NDArray[np.uint8]:
        """The maze from above with the ball at `position` (2,) and the goal (2,): (H, W, 3)."""
        import cv2

        scale = self._scale
        cells = np.where(self.maze.walls[..., None], (96, 104, 120), (245, 245, 240)).astype(np.uint8)
        picture = np.ascontiguousarray(cells.repeat(scale, axis=0).repeat(scale, axis=1))
        if goal is not None:
            at = self.to_pixels(np.asarray(goal)[None])[0].round().astype(int).tolist()
            cv2.circle(picture, at, round(GOAL_RADIUS * scale), (250, 205, 195), -1, cv2.LINE_AA)
            cv2.circle(picture, at, max(3, round(0.14 * scale)), (214, 60, 50), -1, cv2.LINE_AA)
        at = self.to_pixels(np.asarray(position)[None])[0].round().astype(int).tolist()
        cv2.circle(picture, at, max(3, round(BALL_RADIUS * 1.6 * scale)), (40, 110, 220), -1, cv2.LINE_AA)
        return picture

    def _render_mujoco(self, i: int) -> NDArray[np.uint8] | None:
        from robots.video import offscreen

        if self._renderer is None:
            rows, columns = self.maze.walls.shape
            self._renderer = offscreen(self.model, rows * self._scale, columns * self._scale) or False
        if self._renderer is False:
            return None
        self.model.site_pos[0, :2] = self._goal[i] + BODY
        self._data.qpos[:], self._data.qvel[:] = self._state[i, 1:3], self._state[i, 3:5]
        mujoco.mj_forward(self.model, self._data)
        self._renderer.update_scene(self._data, camera="top")
        return self._renderer.render()

    def close(self) -> None:
        if self._renderer:
            self._renderer.close()
        self._renderer = None
