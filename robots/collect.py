"""Data collection with scripted controllers, written as D4RL HDF5.

Mazes: a waypoint controller with noise, as D4RL's maze2d was made (Fu et al. 2020; its generate_maze2d_datasets.py and
waypoint_controller.py): shortest path over cells, a waypoint in each cell at the cell's position minus uniform(0, 0.2)
(which spreads paths over one side of the corridor, see the frame in `robots.tasks.pointmaze`), action
clip(10 (waypoint - position) - velocity) plus normal noise of 0.5, clipped to -1..1, a new random goal as soon as one
is reached within 0.1. Unlike there, the controller drives to the goal itself rather than to its cell's position, and
starts over from its own cell when a waypoint stays out of reach for 100 steps. Mazes of short demonstrations
(`robots.tasks.compositional`): the same controller, an episode for each goal. Locomotion: `robots.behaviour`.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from pilotwave.errors import UserError
from robots import replay
from robots.behaviour import Behaviour, behaviour_episodes, constraint_columns
from robots.controller import Chunk, Controller, Tracker
from robots.replay import Demonstrations, door_replays
from robots.tasks import Task, make
from robots.tasks.adroit import AdroitDoor
from robots.tasks.compositional import LONGEST, CompositionalMaze
from robots.tasks.locomotion import Locomotion
from robots.tasks.pointmaze import GOAL_RADIUS, PointMaze, cell_of
from robots.tracking import DirectTracker

Progress = Callable[[int, int], None]
KP, KD, REACHED, PATIENCE, NOISE = 10.0, 1.0, 0.1, 100, 0.5
STREAM_HORIZONS = 10


class WaypointController:
    """D4RL's maze2d controller for n balls at once: `actions(states, goals)` follows shortest paths by waypoints.

    rng: draws the waypoints' offsets and, with noise > 0, the action noise.
    """

    def __init__(self, task: PointMaze, n: int, rng: np.random.Generator, noise: float = NOISE):
        self.maze, self.rng, self.noise = task.maze, rng, noise
        self._goal = np.full((n, 2), np.nan)
        self._target = np.zeros(n, dtype=np.int64)
        self._cell = np.zeros(n, dtype=np.int64)
        self._waypoint = np.zeros((n, 2))
        self._waited = np.zeros(n, dtype=np.int64)

    def actions(self, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """Actions (n, 2) for states (n, 4) and goals (n, 2); a goal that changed starts a new path."""
        position, velocity = states[:, :2], states[:, 2:]
        fresh = (goals != self._goal).any(axis=1) | (self._waited > PATIENCE)
        if fresh.any():
            self._goal[fresh] = goals[fresh]
            self._target[fresh] = self._cells(goals[fresh])
            self._cell[fresh] = self._cells(position[fresh])
            self._advance(fresh)
        arrived = np.linalg.norm(position - self._waypoint, axis=1) < REACHED
        self._advance(arrived & (self._cell != self._target))
        self._waited += 1
        action = np.clip(KP * (self._waypoint - position) - KD * velocity, -1.0, 1.0)
        if self.noise > 0:
            action = np.clip(action + self.noise * self.rng.standard_normal(action.shape), -1.0, 1.0)
        return action

    def _cells(self, positions: np.ndarray) -> NDArray[np.int64]:
        """Numbers (n,) of the empty cells that hold positions (n, 2)."""
        row, column = np.clip(cell_of(positions), 0, np.array(self.maze.walls.shape) - 1).T
        return np.maximum(self.maze.index[row, column], 0)

    def _advance(self, mask: NDArray[np.bool_]) -> None:
        """Give the balls of a mask (n,) their next waypoint."""
        if not mask.any():
            return
        cell = self._cell[mask] = self.maze.next_cell[self._cell[mask], self._target[mask]]
        offset = self.rng.uniform(0.0, 0.2, (len(cell), 2))
        last = (cell == self._target[mask])[:, None]
        self._waypoint[mask] = np.where(last, self._goal[mask], self.maze.cells[cell] - offset)
        self._waited[mask] = 0


class Demonstrator:
    """The waypoint controller as a `Controller` of roll-outs and loops: what the demonstrations themselves score.

    wander: on to a goal of its own as soon as one is reached, as `collect` drives, instead of staying at the task's.
    """

    replan_every = 1
    history = 1
    evaluations = 0
    tracker: Tracker = DirectTracker()

    def __init__(self, task: PointMaze, noise: float = 0.0, seed: int = 0, wander: bool = False):
        self.task, self.noise, self.seed, self.wander = task, noise, seed, wander

    def reset(self, n: int) -> None:
        """Start n episodes."""
        self._controller = WaypointController(self.task, n, np.random.default_rng(self.seed), self.noise)
        self._rngs = [np.random.default_rng((self.seed, i)) for i in range(n)]
        self._own: np.ndarray | None = None

    def act(self, history: Mapping[str, np.ndarray], step: int) -> Chunk:
        """One action a decision."""
        state, goals = history["state"][:, -1].astype(np.float64), history["goal"][:, -1]
        if self.wander:
            self._own = goals = goals.astype(np.float64) if self._own is None else self._own
            for i in np.flatnonzero(np.linalg.norm(state[:, :2] - goals, axis=1) < REACHED):
                goals[i] = self.task.draw_goal(self._rngs[i], int(self._controller._cells(goals[i : i + 1])[0]))
        action = self._controller.actions(state, goals)
        return Chunk(action[:, None], self.task.spec.dt)


def maze_streams(
    task: PointMaze, steps: int, seed: int, noise: float, progress: Progress | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """`steps` steps of wandering from goal to goal: D4RL's columns, and facts about them.

    Several streams run side by side and are stored one after the other; each is physically continuous (a new goal
    moves nothing) and is one episode of about ten horizons, so that long windows fit.
    """
    streams = min(steps, max(4, round(steps / (STREAM_HORIZONS * task.spec.horizon))))
    length = -(-steps // streams)
    streams = -(-steps // length)
    observation = task.reset([seed + i for i in range(streams)])
    rngs = [np.random.default_rng((seed, i)) for i in range(streams)]
    controller = WaypointController(task, streams, np.random.default_rng((seed, streams)), noise)
    start = controller._cells(observation["state"][:, :2])
    goals = np.array([task.draw_goal(rng, int(cell)) for rng, cell in zip(rngs, start)])
    fixed = np.array(task.maze.goal, dtype=np.float64)
    kept = {name: np.empty((length, streams, width), np.float32) for name, width in {"o": 4, "a": 2, "g": 2, "r": 1}.items()}
    reached = 0
    for step in range(length):
        state = observation["state"].astype(np.float64)
        near = np.flatnonzero(np.linalg.norm(state[:, :2] - goals, axis=1) < REACHED)
        for i in near:
            goals[i] = task.draw_goal(rngs[i], int(controller._cells(goals[i : i + 1])[0]))
        reached += len(near)
        action = controller.actions(state, goals)
        kept["o"][step], kept["a"][step], kept["g"][step] = state, action, goals
        observation, _, _, info = task.step(action)
        kept["r"][step] = np.linalg.norm(observation["state"][:, :2] - fixed, axis=1, keepdims=True) <= GOAL_RADIUS
        if "margin" in info:
            kept.setdefault("m", np.empty((length, streams, 1), np.float32))[step] = info["margin"][:, None]
        if progress is not None and (step % 100 == 99 or step == length - 1):
            progress(min(steps, (step + 1) * streams), steps)
    columns = {name: value.swapaxes(0, 1).reshape(-1, value.shape[2])[:steps] for name, value in kept.items()}
    timeouts = np.zeros(steps, dtype=bool)
    timeouts[length - 1 :: length] = True
    return maze_columns(columns, timeouts), maze_facts(task, noise, timeouts, reached)


def maze_columns(kept: Mapping[str, np.ndarray], timeouts: np.ndarray) -> dict[str, np.ndarray]:
    """D4RL's columns from states "o", actions "a", goals "g", rewards "r" and, where the task has them, margins "m", (steps, width)
    each."""
    timeouts[-1] = True
    return {
        "observations": kept["o"],
        "actions": kept["a"],
        "rewards": kept["r"][:, 0],
        "terminals": np.zeros(len(timeouts), dtype=bool),
        "timeouts": timeouts,
        "infos/goal": kept["g"],
        "infos/qpos": kept["o"][:, :2],
        "infos/qvel": kept["o"][:, 2:],
    } | (constraint_columns(kept["m"][:, 0]) if "m" in kept else {})


def maze_facts(task: PointMaze, noise: float, timeouts: np.ndarray, reached: int) -> dict[str, Any]:
    """What a maze's file says of itself."""
    facts = {"controller": "waypoint", "noise": noise, "reward_goal": list(task.maze.goal), "maze": task.maze.rows()}
    return facts | {"episodes": int(timeouts.sum()), "goals_reached": reached}


def short_ways(
    task: CompositionalMaze, steps: int, seed: int, noise: float, progress: Progress | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """`steps` steps of episodes to near goals, each of which ends where its goal is reached: D4RL's columns, and facts."""
    together, fixed = 256, np.array(task.maze.goal, dtype=np.float64)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in "oagr"}
    ends: list[int] = []
    total = reached = batch = 0
    while total < steps:
        observation = task.reset([seed + batch * together + i for i in range(together)])
        rng = np.random.default_rng((seed, batch))
        controller = WaypointController(task, together, rng, noise)
        goals = np.array([task.draw_near(rng, int(cell)) for cell in controller._cells(observation["state"][:, :2])])
        kept = {name: np.empty((LONGEST, together, width), np.float32) for name, width in {"o": 4, "a": 2, "g": 2, "r": 1}.items()}
        length = np.full(together, LONGEST)
        for step in range(LONGEST):
            state = observation["state"].astype(np.float64)
            near = (np.linalg.norm(state[:, :2] - goals, axis=1) < REACHED) & (length == LONGEST)
            length[near] = step + 1  # with the step at the goal
            action = controller.actions(state, goals)
            kept["o"][step], kept["a"][step], kept["g"][step] = state, action, goals
            observation = task.step(action)[0]
            kept["r"][step] = np.linalg.norm(observation["state"][:, :2] - fixed, axis=1, keepdims=True) <= GOAL_RADIUS
            if (length < LONGEST).all():
                break
        for i, n in enumerate(length):
            for name, value in kept.items():
                parts[name].append(value[:n, i])
            total += int(n)
            ends.append(total)
        reached += int((length < LONGEST).sum())
        batch += 1
        if progress is not None:
            progress(min(total, steps), steps)
    columns = {name: np.concatenate(values)[:steps] for name, values in parts.items()}
    timeouts = np.zeros(steps, dtype=bool)
    timeouts[[end - 1 for end in ends if end <= steps]] = True
    data = maze_columns(columns, timeouts)
    return data, maze_facts(task, noise, timeouts, reached) | {"reach": task.reach}


COLLECTORS: dict[type[Task], tuple[Callable[..., tuple[dict[str, np.ndarray], dict[str, Any]]], float]] = {
    CompositionalMaze: (short_ways, NOISE),
    PointMaze: (maze_streams, NOISE),
    AdroitDoor: (door_replays, replay.NOISE),
    Locomotion: (behaviour_episodes, 0.0),
}
"""Task class -> (task, steps, seed, noise, progress[, what it is recorded from]) -> columns and facts; and its usual noise."""


RECORDED_FROM = {
    "demonstrations": "it is for adroit-door, recorded by replaying people",
    "behaviour": "it is for locomotion, recorded with behaviour policies",
    "quality": "it is for locomotion, recorded with behaviour policies",
}


DEMONSTRATORS: dict[type[Task], Callable[[Any, int], Controller]] = {
    PointMaze: lambda task, seed: Demonstrator(task, NOISE, seed, wander=True)
}
"""Task class -> (task, seed) -> the controller that `collect` records."""


def demonstrator(task: Task, seed: int = 0) -> Controller | None:
    """What acts in the data that `collect` makes for a task, as a Controller; None where there is no such thing."""
    made = [make_one(task, seed) for kind, make_one in DEMONSTRATORS.items() if isinstance(task, kind)]
    return made[0] if made else None


def collect(
    task: str | Task,
    steps: int,
    out: str | Path,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    noise: float | None = None,
    demonstrations: Demonstrations | None = None,
    behaviour: Behaviour | None = None,
    quality: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Collect `steps` steps on a task (a name of `robots.make` with its options, or a task) and write D4RL HDF5.

    Columns in mazes: observations, actions, rewards, terminals (never), timeouts (at the end of each stream), infos/goal (the
    controller's goal of the moment), infos/qpos, infos/qvel; for tasks with constraints infos/margin, that of the state that
    follows, and infos/cost, 1 where it is negative. A reward is the one that its step returns towards the
    map's fixed goal, as D4RL relabels maze2d: a function of the state that follows. The file's attributes hold the
    facts.
    The same arguments give the same file; it appears complete or not at all, so an interrupted run starts again.
    noise: its standard deviation; the task's own when None. demonstrations: for tasks that are recorded by replaying them.
    behaviour, quality: for locomotion, the policies and which of them act (`robots.behaviour.MIXTURES`).
    progress: called with (steps done, steps). Returns the facts: path, steps, episodes, goals_reached, seconds, ...
    """
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise UserError(f"steps={steps}; collect needs a whole number of steps, 1 or more")
    if noise is not None and not noise >= 0:
        raise UserError(f"noise={noise}; right is a standard deviation, 0 or more")
    task = make(task, **options) if isinstance(task, str) else task
    collectors = [entry for kind, entry in COLLECTORS.items() if isinstance(task, kind)]
    if not collectors:
        raise UserError(
            f"no scripted controller for task '{task.spec.name}'; "
            "collect works with the pointmaze tasks, adroit-door and locomotion"
        )
    collector, usual = collectors[0]
    given = {"demonstrations": demonstrations, "behaviour": behaviour, "quality": quality}
    more = {key: value for key, value in given.items() if value is not None}
    for key in more.keys() - inspect.signature(collector).parameters.keys():
        raise UserError(f"{key}= is not for {task.spec.name}: {RECORDED_FROM[key]}")
    path = Path(out)
    part = path.with_name(f".{path.name}.part")
    try:
        # before the work, so that a folder that cannot be written costs no time
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    began = time.perf_counter()
    try:
        data, facts = collector(task, int(steps), seed, usual if noise is None else noise, progress, **more)
        if "infos/cost" in data:
            facts |= {"unsafe_steps": int(data["infos/cost"].sum())}
        facts = {"task": task.spec.name, "seed": seed, "steps": int(steps), "dt": task.spec.dt} | facts
        with h5py.File(part, "w") as file:
            for name, column in data.items():
                file.create_dataset(name, data=column, compression="gzip", compression_opts=1)
            for key, value in facts.items():
                file.attrs[key] = json.dumps(value) if isinstance(value, list) else value
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)
    return {"path": str(path)} | facts | {"seconds": round(time.perf_counter() - began, 2)}
