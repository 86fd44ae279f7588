"""The robot interface, the adapter and the simulated robot on a logical clock."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import robots
from robots.barriers import HalfSpace
from robots.loop import LogicalClock
from robots.mujoco_robot import MujocoRobot
from robots.robot import Adapter
from robots.tasks.pointmaze import PointMaze


def push(robot: MujocoRobot, *force: float) -> dict[str, float]:
    return robot.send_action(dict(zip(robot.action_features, force)))


@pytest.fixture
def clock() -> LogicalClock:
    return LogicalClock(5.0)


def test_features_describe_what_is_returned(clock):
    for name in ("pointmaze-umaze", "pusht", "pointmaze-large-narrow"):
        robot = MujocoRobot(robots.make(name), now=clock.now)
        features = robot.observation_features  # before connect, as LeRobot's may be asked
        robot.connect()
        observation = robot.get_observation()
        assert observation.keys() == features.keys()
        assert all(isinstance(observation[k], float) for k, v in features.items() if v is float)
        assert set(robot.action_features) == set(robot.task.spec.action_names)


def test_it_is_judged_by_further_barriers(clock):
    limit = HalfSpace([1.0], 0.1, features=[2])  # of the velocity along x
    robot, free = (MujocoRobot(robots.make("pointmaze-umaze"), seed=4, barriers=b, now=clock.now) for b in ([limit], []))
    for each in (robot, free):
        each.connect()
        push(each, 1.0, 0.0)
    clock.advance(0.05)
    observation = robot.get_observation()
    free.get_observation()
    speed = observation["vx"]
    assert speed > 0.1
    assert robot.worst_margin == pytest.approx(0.1 - speed, abs=1e-6)
    assert free.worst_margin is None


def test_physics_follows_the_clock_and_not_the_calls(clock):
    one, other = (MujocoRobot(robots.make("pointmaze-umaze"), seed=4, now=clock.now) for _ in range(2))
    for robot in (one, other):
        robot.connect()
        push(robot, 0.3, -0.2)
    for _ in range(20):
        clock.advance(0.01)
        one.get_observation()
    assert one.get_observation() == other.get_observation()  # read twenty times, read once
    before = one.get_observation()
    assert one.get_observation() == before  # no time, no motion


def test_rests_until_the_first_command(clock):
    robot = MujocoRobot(robots.make("pointmaze-umaze"), now=clock.now)
    robot.connect()
    first = robot.get_observation()
    clock.advance(3.0)
    assert robot.get_observation() == first
    push(robot, 1.0, 0.0)
    clock.advance(0.1)
    assert robot.get_observation()["vx"] > first["vx"]


def test_jitter_below_half_a_step_changes_nothing(clock):
    rng = np.random.default_rng(0)
    still = MujocoRobot(robots.make("pointmaze-umaze"), seed=1, now=clock.now)
    still.connect()
    push(still, 0.1, 0.0)
    start, steps = clock.time, []
    for k in range(1, 100):
        clock.time = start + 0.01 * k + rng.uniform(-0.004, 0.004)
        still.get_observation()
        steps.append(still._steps)
    assert steps == list(range(1, 100))


def test_a_long_pause_is_not_made_up_for(clock):
    robot = MujocoRobot(robots.make("pointmaze-umaze"), now=clock.now)
    robot.connect()
    push(robot, 0.0, 0.0)
    clock.advance(1000.0)
    robot.get_observation()
    assert robot.stalled == pytest.approx(999.0, abs=0.02)
    assert robot._steps == 100


def test_actions_are_clipped_and_the_sent_ones_returned(clock):
    robot = MujocoRobot(robots.make("pointmaze-umaze"), now=clock.now)
    robot.connect()
    assert push(robot, 9.0, -0.5) == {"force_x": 1.0, "force_y": -0.5}


def test_episodes_time_out_into_a_new_scene(clock):
    robot = MujocoRobot(robots.make("pointmaze-umaze", horizon=20), seed=2, now=clock.now)
    robot.connect()
    scenes = []
    for _ in range(30):
        scenes.append(robot.get_observation()["episode"])
        push(robot, 0.0, 0.0)
        clock.advance(0.05)
    assert scenes[0] == 0
    assert len(robot.outcomes) == scenes[-1] >= 4
    for outcome in robot.outcomes:
        assert outcome.success or outcome.seconds == pytest.approx(0.2)


def test_chained_goals_keep_the_scene(clock):
    task = PointMaze("umaze", goal="chain")
    robot = MujocoRobot(task, now=clock.now)
    robot.connect()
    observation = robot.get_observation()
    task.reset_to(
        np.array([[observation["x"], observation["y"], 0.0, 0.0]]), np.array([[observation["x"], observation["y"]]])
    )
    push(robot, 0.0, 0.0)
    clock.advance(0.011)
    after = robot.get_observation()
    assert [o.success for o in robot.outcomes] == [True]
    assert after["episode"] == 0
    assert (after["goal.0"], after["goal.1"]) != (observation["x"], observation["y"])


def test_disconnected_robots_refuse(clock):
    robot = MujocoRobot(robots.make("pointmaze-umaze"), now=clock.now)
    with pytest.raises(ConnectionError):
        robot.get_observation()
    with pytest.raises(ConnectionError):
        push(robot, 0.0, 0.0)


def test_adapter_orders_names_and_refuses_what_is_wrong(clock):
    robot = MujocoRobot(robots.make("pointmaze-umaze"), now=clock.now)
    robot.connect()
    flat = robot.get_observation()
    adapter = Adapter(robot)
    assert adapter.shapes == {"state": (4,), "goal": (2,)}
    arrays = adapter.arrays(flat)
    np.testing.assert_array_equal(arrays["state"][0], np.array([flat[k] for k in ("x", "y", "vx", "vy")], np.float32))
    np.testing.assert_array_equal(arrays["goal"][0], np.array([flat["goal.0"], flat["goal.1"]], np.float32))
    backwards = Adapter(robot, state=("vy", "x"), action=("force_y", "force_x"))
    np.testing.assert_array_equal(backwards.arrays(flat)["state"][0], np.array([flat["vy"], flat["x"]], np.float32))
    assert backwards.flat(np.array([1.0, 2.0])) == {"force_y": 1.0, "force_x": 2.0}
    with pytest.raises(ValueError, match="state is not finite"):
        adapter.arrays(flat | {"x": float("inf")})
    with pytest.raises(KeyError):
        adapter.arrays({k: v for k, v in flat.items() if k != "vx"})
    assert adapter.measured(arrays["state"]) is None


def test_hazards_come_as_the_task_has_them():
    task = robots.make("pointmaze-large-moving-hazards")
    robot = MujocoRobot(task)
    robot.connect()
    adapter = Adapter(robot)
    assert adapter.shapes == {"state": (4,), "goal": (2,), "hazards": (2, 7)}
    hazards = adapter.arrays(robot.get_observation())["hazards"]
    np.testing.assert_array_equal(hazards, task.observation()["hazards"])


def test_adapter_checks_images():
    camera = SimpleNamespace(
        observation_features={"a.pos": float, "front": (4, 6, 3)}, action_features={"a.pos": float}
    )
    adapter = Adapter(camera)
    picture = np.zeros((4, 6, 3), np.uint8)
    assert adapter.arrays({"a.pos": 1.0, "front": picture})["front"].shape == (1, 4, 6, 3)
    np.testing.assert_array_equal(adapter.measured(np.array([[1.0]], np.float32)), [[1.0]])
    with pytest.raises(ValueError, match=r"right is uint8 \(4, 6, 3\)"):
        adapter.arrays({"a.pos": 1.0, "front": picture[:2]})
    with pytest.raises(ValueError, match="float64"):
        adapter.arrays({"a.pos": 1.0, "front": picture.astype(float)})
