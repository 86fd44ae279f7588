"""A robot and controllers for the tests of the real-time loop; the controllers are made in the inference process."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from robots.controller import Chunk, Tracker
from robots.tasks.maps import maze_map
from robots.tasks.pointmaze import cell_of
from robots.tracking import DirectTracker, PDTracker


class MazePlanner:
    """Shortest path through a maze at constant speed, as positions and velocities dt apart."""

    history, evaluations = 1, 0

    def __init__(self, maze: str, speed: float = 2.0, dt: float = 0.02, replan_every: int = 20, seconds: float = 0.0):
        self.maze, self.speed, self.dt = maze_map(maze), speed, dt
        self.replan_every, self.seconds = replan_every, seconds
        self.tracker: Tracker = PDTracker(1.0, 1.0)

    def reset(self, n: int) -> None:
        assert n == 1

    def act(self, history: Mapping[str, np.ndarray], step: int) -> Chunk:
        time.sleep(self.seconds)
        state, goal = history["state"][0, -1].astype(float), history["goal"][0, -1].astype(float)
        maze = self.maze
        here, there = (int(maze.index[tuple(cell_of(p))]) for p in (state[:2], goal))
        route = [here]
        while route[-1] != there:
            route.append(int(maze.next_cell[route[-1], there]))
        middle = maze.cells - 0.2
        points = [state[:2], *middle[route[1:]], goal]
        if len(route) > 1 and (state[:2] - middle[here]) @ (middle[route[1]] - middle[here]) < 0:
            points.insert(1, middle[here])  # not past the first cell's middle yet
        corners = np.array(points)
        along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(corners, axis=0), axis=1))])
        wanted = np.arange(0.0, along[-1] + self.speed * self.dt, self.speed * self.dt)
        path = np.stack([np.interp(wanted, along, corners[:, k]) for k in range(2)], axis=1)
        velocity = np.gradient(path, self.dt, axis=0) if len(path) > 1 else np.zeros_like(path)
        return Chunk(np.concatenate([path, velocity], axis=1)[None], self.dt)


class Constant:
    """The same chunk every time, after `good` decisions something else: "nan", "shape", "raise", or "width"."""

    history = 1
    evaluations = 1

    def __init__(
        self, reference: list[float], steps: int = 8, dt: float = 0.1, replan_every: int = 1, seconds: float = 0.0,
        bad: str = "", good: int = 2, history: int = 1,
    ) -> None:  # fmt: skip
        self.references = np.tile(np.array(reference, dtype=np.float32), (1, steps, 1))
        self.dt, self.replan_every, self.seconds, self.bad, self.good = dt, replan_every, seconds, bad, good
        self.history = history
        self.tracker: Tracker = DirectTracker()
        self.calls: list[tuple[int, dict[str, np.ndarray]]] = []
        self.resets = 0

    def reset(self, n: int) -> None:
        self.resets += 1

    def act(self, history: Mapping[str, np.ndarray], step: int) -> Chunk:
        time.sleep(self.seconds)
        self.calls.append((step, {k: v.copy() for k, v in history.items()}))
        references = self.references
        if self.bad and len(self.calls) > self.good:
            if self.bad == "raise":
                raise ValueError("no plan found")
            references = {
                "nan": np.full_like(references, np.nan),
                "shape": references[0],
                "width": np.tile(references, (1, 1, 2)),
            }[self.bad]
        return Chunk(references, self.dt)


class Arm:
    """A LeRobot-like robot (no base class) whose two joints go where they are told; scripted failures by tick."""

    def __init__(self, now=time.monotonic, names=("a.pos", "b.pos"), episodes=False) -> None:
        self.now, self.names, self.position = now, names, np.array([0.5, -0.5])
        self.sent: list[np.ndarray] = []
        self.times: list[float] = []
        self.reads = 0
        self.script: dict[int, object] = {}  # read number -> exception to raise, observation to return, or function
        self.send_script: dict[int, Exception] = {}
        self.connected = self.was_connected = False
        self.episode = 0.0 if episodes else None

    @property
    def observation_features(self):
        return dict.fromkeys(self.names, float) | ({} if self.episode is None else {"episode": float})

    @property
    def action_features(self):
        return {"a.pos": float, "b.pos": float}

    @property
    def is_connected(self):
        return self.connected

    def connect(self):
        self.connected = self.was_connected = True

    def disconnect(self):
        self.connected = False

    def get_observation(self):
        self.reads += 1
        event = self.script.get(self.reads)
        if isinstance(event, Exception):
            raise event
        if callable(event):
            event()
        elif event is not None:
            return event
        flat = dict(zip(self.names, self.position.tolist()))
        return flat if self.episode is None else flat | {"episode": self.episode}

    def send_action(self, action):
        command = np.array([action["a.pos"], action["b.pos"]])
        self.times.append(self.now())
        self.sent.append(command)
        if len(self.sent) in self.send_script:
            raise self.send_script[len(self.sent)]
        self.position = command
        return action
