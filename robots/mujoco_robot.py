"""A simulated robot in real time: a `robots.tasks` task whose physics follows the clock, behind the robot interface."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from robots.barriers import ROW, Barrier
from robots.robot import EPISODE, GOAL, HAZARD, Outcome, Robot
from robots.tasks.base import Task, executed_margin

MAX_CATCH_UP = 1.0


class MujocoRobot(Robot):
    """One copy of a task, stepped to the present whenever it is read; commands are held until the next one.

    It moves on whether or not the loop is in time, as a machine would. After a reset it rests until its first command.
    An episode ends when the task says success (in tasks with `goal="chain"` the next goal follows where the robot is),
    terminates, or its horizon is over; then the scene is reset with the next seed and "episode" counts up.
    now: the clock, `time.monotonic` by default. barriers: what it is judged by beside the task's own. outcomes: the last ten
    thousand episodes. worst_margin: the smallest barrier so far, None without any.
    """

    name = "mujoco"

    def __init__(
        self, task: Task, *, seed: int = 0, barriers: Sequence[Barrier] = (), now: Callable[[], float] = time.monotonic
    ) -> None:
        self.task, self.barriers, self._now, self._seed = task, barriers, now, seed
        spec = task.spec
        self.outcomes: deque[Outcome] = deque(maxlen=10_000)
        self.stalled = 0.0
        self.worst_margin: float | None = None
        self._goal = [f"{GOAL}{i}" for i in range(spec.goal_dim)]
        self._hazards = [f"{HAZARD}{k}.{name}" for k in range(spec.hazards) for name in ROW]
        self._connected = False
        self._episode = -1

    @property
    def observation_features(self) -> dict[str, Any]:
        spec = self.task.spec
        return {**dict.fromkeys((*spec.observation_names, *self._goal, *self._hazards, EPISODE), float), **spec.images}

    @property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(self.task.spec.action_names, float)

    @property
    def is_connected(self) -> bool:
        return self._connected

    def connect(self) -> None:
        self._connected = True
        self._reset()

    def disconnect(self) -> None:
        self._connected = False

    def _reset(self) -> None:
        self._episode += 1
        self._arrays = self.task.reset([self._seed + self._episode])
        self._action: np.ndarray | None = None
        self._steps = self._begun = 0
        self._margin: float | None = None

    def _advance(self) -> None:
        dt = self.task.spec.dt
        # steps fall half-way between reads at the same rate, so that jitter does not shift them
        wanted = int((self._now() - self._origin) / dt + 0.5)
        if (wanted - self._steps) * dt > MAX_CATCH_UP:
            lost = wanted - self._steps - int(MAX_CATCH_UP / dt)
            self.stalled += lost * dt
            self._origin += lost * dt
            wanted -= lost
        while self._action is not None and self._steps < wanted:
            self._arrays, _, terminated, info = self.task.step(self._action)
            self._steps += 1
            steps, success = self._steps - self._begun, bool(info["success"][0])
            least = executed_margin(info, self._arrays, self.barriers)
            if least is not None:
                margin = float(least[0])
                kept = (self._margin, self.worst_margin)
                self._margin, self.worst_margin = (margin if m is None else min(margin, m) for m in kept)
            if success or bool(terminated[0]) or steps >= self.task.spec.horizon:
                self.outcomes.append(Outcome(success, steps * dt, self._margin))
                self._begun = self._steps
                if not (success and "new_goal" in info):
                    self._reset()

    def get_observation(self) -> dict[str, Any]:
        if not self._connected:
            raise ConnectionError("the robot is not connected; call connect() first")
        if self._action is not None:
            self._advance()
        spec, arrays = self.task.spec, self._arrays
        flat: dict[str, Any] = dict(zip(spec.observation_names, arrays["state"][0].tolist()))
        if self._goal:
            flat.update(zip(self._goal, arrays["goal"][0].tolist()))
        if self._hazards:
            flat.update(zip(self._hazards, arrays["hazards"][0].ravel().tolist()))
        flat[EPISODE] = float(self._episode)
        for key in spec.images:
            flat[key] = arrays[key][0]
        return flat

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        if not self._connected:
            raise ConnectionError("the robot is not connected; call connect() first")
        spec = self.task.spec
        command = np.array([[action[name] for name in spec.action_names]], dtype=np.float64)
        command = np.clip(command, spec.action_low, spec.action_high)
        if self._action is None:
            self._origin = self._now()
        self._action = command
        return dict(zip(spec.action_names, command[0].tolist()))
