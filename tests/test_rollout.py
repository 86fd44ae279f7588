"""Roll-outs: the arithmetic of the metrics, batching, timing of chunks, trackers, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import robots
from pilotwave.errors import UserError
from robots import Chunk, DirectTracker, PDTracker, Task, TaskSpec
from robots.barriers import HalfSpace
from robots.collect import Demonstrator
from robots.rollout import rollout


class Line(Task):
    """A counter: the action is added to x; the goal condition holds for x >= 3; it ends past `end`."""

    def __init__(self, end: float = np.inf, start: float = 0.0):
        self.end, self.start = end, start
        self.spec = TaskSpec(
            "line", 1, 1, 10, 0.1, -np.ones(1), np.ones(1), ("x",), ("dx",), "success_rate", "a test",
            reference=(0.0, 20.0), final_info=("x",),
        )  # fmt: skip

    def reset(self, seeds):
        self.x = np.array([self.start + seed for seed in seeds], dtype=float)
        self.done = np.zeros(len(seeds), dtype=bool)
        return self.observation()

    def step(self, actions):
        before = self.x.copy()
        self.x = np.where(self.done, self.x, self.x + self._actions(actions, len(self.x))[:, 0])
        reward = np.where(self.done, 0.0, (self.x >= 3) * 2.0)
        self.done = self.done | (self.x > self.end)
        info = {"success": self.x >= 3, "margin": 5.5 - before, "x": self.x}
        return self.observation(), reward, self.done.copy(), info

    def observation(self):
        return {"state": self.x[:, None].astype(np.float32)}

    def render(self, i=0):
        return np.full((20, 20, 3), int(self.x[i]) * 10, dtype=np.uint8)

    def snapshot(self):
        return self.x.copy(), self.done.copy()

    def restore(self, snapshot):
        self.x, self.done = (part.copy() for part in snapshot)
        return self.observation()


class Constant:
    """Moves by `by`; writes down what it was asked."""

    evaluations, tracker = 7, DirectTracker()

    def __init__(self, by=1.0, replan_every=1, history=1, length=1):
        self.by, self.replan_every, self.history, self.length = by, replan_every, history, length
        self.asked, self.resets = [], []

    def reset(self, n):
        self.resets.append(n)

    def act(self, history, step):
        self.asked.append((step, history["state"].copy()))
        references = np.zeros((len(history["state"]), self.length, 1))
        references[:, :] = self.by
        return Chunk(references, 0.1)


def test_metrics_of_known_episodes():
    # seed 0: x = 1..10, reaches 3 at step 3, reward 2 for 8 steps; seed 2: reaches at step 1; seed 1: at step 2
    metrics = rollout(Line(), Constant(), 3, seed=0, num_envs=2)
    assert metrics["per_episode"]["first_reach_steps"] == [3, 2, 1]
    assert metrics["per_episode"]["return"] == [16.0, 18.0, 20.0]
    assert metrics["return_mean"] == metrics["latched_return_mean"] == 18.0
    assert metrics["normalized_return_mean"] == pytest.approx(90.0)
    assert metrics["score_mean"] == metrics["success_rate"] == 1.0
    assert metrics["first_reach_steps_mean"] == 2.0
    assert metrics["x_mean"] == 11.0
    assert metrics["evaluations"] == 7
    assert metrics["episodes"] == 3
    assert metrics["violations"] == {"episode_rate": 1.0, "worst_margin": 5.5 - 11}
    json.dumps(metrics)


def test_latched_return_keeps_the_first_reward():
    class Turn(Constant):
        def act(self, history, step):
            self.by = 1.0 if step < 3 else -1.0
            return super().act(history, step)

    metrics = rollout(Line(), Turn(), 1, seed=0)
    # x = 1 2 3 2 1 0 ...: one rewarded step, kept for the 8 from it on
    assert metrics["return_mean"] == 2.0
    assert metrics["latched_return_mean"] == 16.0
    assert metrics["violations"] == {"episode_rate": 0.0, "worst_margin": 2.5}


def test_further_barriers_are_judged_on_the_executed_states():
    barrier = HalfSpace([1.0], 4.0, features=[0])
    metrics = rollout(Line(end=100.0), Constant(1.0), 2, horizon=4, barriers=[barrier])
    assert metrics["per_episode"]["margin"] == [0.0, -1.0]  # x is 4 and 5 at the end; the task's own are larger
    assert metrics["violations"] == {"episode_rate": 0.5, "worst_margin": -1.0}


def test_never_reached_and_safe_are_said_so():
    metrics = rollout(Line(), Constant(by=0.1), 2, seed=0, horizon=5)
    assert metrics["first_reach_steps_mean"] is None
    assert metrics["per_episode"]["first_reach_steps"] == [None, None]
    assert metrics["success_rate"] == 0.0
    assert metrics["violations"]["episode_rate"] == 0.0
    assert metrics["horizon"] == 5


def test_episodes_that_end_early_stop_counting():
    controller = Constant()
    metrics = rollout(Line(end=3.5), controller, 2, seed=0, num_envs=2)
    # both end at x = 4: after 4 and 3 steps, with rewards at x = 3 and 4
    assert metrics["per_episode"]["length"] == [4, 3]
    assert metrics["per_episode"]["return"] == [4.0, 4.0]
    assert metrics["per_episode"]["latched_return"] == [16.0, 18.0]
    assert len(controller.asked) == 4  # no decision after all have ended


@pytest.mark.parametrize("num_envs", [1, 3, 100])
def test_batching_changes_nothing(num_envs):
    task = robots.make("pointmaze-umaze")
    metrics = rollout(task, Demonstrator(task), 7, seed=5, num_envs=num_envs, horizon=150)
    assert metrics["per_episode"]["seed"] == list(range(5, 12))
    alone = [rollout(task, Demonstrator(task), 1, seed=5 + i, horizon=150) for i in range(7)]
    # waypoints' offsets are drawn batch-wise, so steps agree closely, resets exactly
    reach = np.array(metrics["per_episode"]["first_reach_steps"])
    np.testing.assert_allclose(reach, [m["per_episode"]["first_reach_steps"][0] for m in alone], atol=40)
    assert metrics["decision_ms"]["batch"] == min(num_envs, 7)


def test_history_is_padded_with_the_first_observation():
    controller = Constant(history=3)
    rollout(Line(), controller, 2, seed=10, horizon=4)
    histories = [history[:, :, 0].tolist() for _, history in controller.asked]
    assert histories[0] == [[10, 10, 10], [11, 11, 11]]
    assert histories[1] == [[10, 10, 11], [11, 11, 12]]
    assert histories[3] == [[11, 12, 13], [12, 13, 14]]


@pytest.mark.parametrize(("every", "steps"), [(1, list(range(10))), (4, [0, 4, 8]), (0, [0])])
def test_decisions_fall_when_they_are_due(every, steps):
    controller = Constant(replan_every=every, length=10)
    rollout(Line(), controller, 1)
    assert [step for step, _ in controller.asked] == steps


def test_a_plan_made_once_is_made_anew_for_a_new_goal():
    task = robots.make("pointmaze-umaze", goal="chain")

    class Once(Demonstrator):
        replan_every = 0

        def __init__(self, task):
            super().__init__(task)
            self.goals = []

        def act(self, history, step):
            self.goals.append(history["goal"][0, -1].tolist())
            # far along the way at once: the goal itself; enough for cells next to each other
            return Chunk(np.repeat(history["goal"][:, -1:], 2, axis=1), 0.01)

        tracker = PDTracker(10.0, 1.0)

    controller = Once(task)
    metrics = rollout(task, controller, 4, seed=0, num_envs=1)
    reached = sum(metrics["per_episode"]["goals_reached"])
    assert reached > 0
    assert len(controller.goals) >= 4 + reached - 4  # one plan an episode, and one after each goal but a last-step one
    assert len(np.unique(controller.goals, axis=0)) > 4


def test_timing_of_one_robot_alone():
    controller = Constant(replan_every=0, length=10)
    metrics = rollout(Line(), controller, 5, num_envs=5, timing_decisions=12)
    assert metrics["decision_ms"]["batch"] == 1
    assert metrics["decision_ms"]["decisions"] == 12
    assert 0 < metrics["decision_ms"]["p50"] <= metrics["decision_ms"]["p99"] <= metrics["decision_ms"]["max"]
    assert controller.resets[1:] == [1] * len(controller.resets[1:])


@pytest.mark.parametrize("bad", [{"episodes": 0}, {"num_envs": 0}, {"horizon": -1}])
def test_impossible_counts_are_named(bad):
    with pytest.raises(UserError, match="at least 1"):
        rollout(Line(), Constant(), **({"episodes": 1} | bad))


def test_direct_tracker_holds_actions():
    chunk = Chunk(np.arange(4.0)[None, :, None], 0.1, start=0.05)
    tracker = DirectTracker()
    values = [float(tracker.reference(chunk, time)[0, 0]) for time in (0.0, 0.05, 0.1, 0.15, 0.349, 0.35, 9.0)]
    assert values == [0, 0, 0, 1, 2, 3, 3]
    # every multiple of the period counts, whatever floating point makes of it
    steps = [float(tracker.reference(Chunk(np.arange(50.0)[None, :, None], 0.1), k * 0.1)[0, 0]) for k in range(50)]
    assert steps == list(range(50))


def test_pd_tracker_interpolates_and_rests_at_the_end():
    points = np.array([[[0, 0, 1, 0], [1, 2, 3, 0], [2, 2, 5, 4]]], dtype=float)
    tracker = PDTracker(2.0, 0.5, low=-10, high=10)
    chunk = Chunk(points, 0.1, start=0.1)
    np.testing.assert_allclose(tracker.reference(chunk, 0.0), [[0, 0, 1, 0]])
    np.testing.assert_allclose(tracker.reference(chunk, 0.15), [[0.5, 1, 2, 0]])
    np.testing.assert_allclose(tracker.reference(chunk, 0.275), [[1.75, 2, 4.5, 3]])
    np.testing.assert_allclose(tracker.reference(chunk, 0.3), [[2, 2, 0, 0]])
    np.testing.assert_allclose(tracker.reference(chunk, 5.0), [[2, 2, 0, 0]])
    ahead = PDTracker(2.0, 0.5, lookahead=0.05)
    np.testing.assert_allclose(ahead.reference(chunk, 0.1), tracker.reference(chunk, 0.15))
    positions = PDTracker(1.0, 1.0).reference(Chunk(points[..., :2], 0.1, start=0.1), 0.15)
    np.testing.assert_allclose(positions, [[0.5, 1, 10, 20]])
    single = PDTracker(1.0, 1.0).reference(Chunk(points[:, :1], 0.1), 0.0)
    np.testing.assert_allclose(single, [[0, 0, 0, 0]])
    command = tracker.command(np.array([[0.0, 0, 1, 1]]), np.array([[1.0, 30, 0, 1]]))
    np.testing.assert_allclose(command, [[2 * 1 - 0.5, 10]])


def test_pd_tracker_drives_the_ball_along_a_plan():
    rows = ["#######", "#OOOOO#", "#OOOOO#", "#OOOOO#", "#######"]
    task = robots.make("pointmaze", maze=rows)
    obs = task.reset_to(np.array([[1.0, 1, 0, 0]]), np.array([[3.0, 5.0]]))
    line = np.linspace([1, 1], [3, 5], 101)[None]
    chunk, tracker = Chunk(line, 0.02), PDTracker(10.0, 1.0)
    for step in range(260):
        obs = task.step(tracker.command(obs["state"], tracker.reference(chunk, step * 0.01)))[0]
        if step in (50, 100, 150):
            np.testing.assert_allclose(obs["state"][0, :2], line[0, step // 2], atol=0.1)
    np.testing.assert_allclose(obs["state"][0], [3, 5, 0, 0], atol=0.02)


@pytest.mark.parametrize("name", ["umaze", "medium", "large"])
def test_the_demonstrator_solves_d4rls_mazes(name):
    task = robots.make(f"pointmaze-{name}", goal="fixed")
    metrics = rollout(task, Demonstrator(task), 20, seed=0, num_envs=20)
    assert metrics["success_rate"] == 1.0
    assert metrics["normalized_return_mean"] > 100


def test_robots_never_import_torch():
    code = (
        "import sys, pkgutil, importlib, robots\n"
        "for module in pkgutil.walk_packages(robots.__path__, 'robots.'): importlib.import_module(module.name)\n"
        "for name in robots.task_names():\n"
        "    task = robots.make(name, **({'maze': 'umaze'} if name == 'pointmaze' else {}))\n"
        "    task.reset([0]); task.step(task.spec.action_low[None])\n"
        "assert 'torch' not in sys.modules, 'torch came in'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    light = "import sys, robots, robots.rollout; assert not {'mujoco', 'pymunk', 'cv2'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_robots_that_have_ended_are_not_decided_for():
    class Leaving(Constant):
        def keep(self, rows):
            self.kept.append(rows.tolist())

    plain, leaving = Constant(history=2), Leaving(history=2)
    leaving.kept = []
    task = Line(end=3.5)
    expected = rollout(task, plain, 3, seed=0)
    metrics = rollout(task, leaving, 3, seed=0)
    # from x = 0, 1, 2 they end after 4, 3, 2 steps
    assert metrics["per_episode"] == expected["per_episode"]
    assert [len(state) for _, state in plain.asked] == [3, 3, 3, 3]
    assert [state[:, -1, 0].tolist() for _, state in leaving.asked] == [[0, 1, 2], [1, 2, 3], [2, 3], [3]]
    assert leaving.kept == [[0, 1], [0]]
