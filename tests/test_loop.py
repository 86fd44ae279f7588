"""The real-time loop: exact behaviour on a logical clock, and the real process, signals and clock in short runs."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from loop_fakes import Arm, Constant, MazePlanner

import robots
from pilotwave.errors import UserError
from robots.controller import Chunk
from robots.inference import Channel, Factory, InferenceProcess, InlineInference, Layout
from robots.loop import Limits, LogicalClock, LoopConfig, Plan, Samples, bare_loop, deploy
from robots.mujoco_robot import MujocoRobot
from robots.safety_filter import SafetyFilter
from robots.tracking import DirectTracker, PDTracker

TWO = Limits(-np.ones(2), np.ones(2))


def at(plan: Plan, motion: float) -> np.ndarray:
    """The plan's reference, which must exist."""
    reference = plan.at(motion)
    assert reference is not None
    return reference


def run(controller, *, robot=None, clock=None, latency=0.0, limits=TWO, **settings):
    """One logical run: (report, robot, inference)."""
    clock = clock or LogicalClock()
    robot = robot or Arm(clock.now)
    inference = InlineInference(controller, clock.now, latency)
    defaults = {"seconds": 2.0, "hold": 0.1, "damp": 0.1, "frequency": 100.0}
    report = deploy(robot, None, limits=limits, inference=inference, clock=clock, **(defaults | settings))
    return report, robot, inference


# ---- plans and chunks


def test_chunk_boundaries_have_no_step():
    rng = np.random.default_rng(0)
    plan, previous = Plan(PDTracker(1.0, 1.0)), None
    for k in range(400):
        motion = k * 0.01
        if k % 37 == 0:
            walk = np.cumsum(rng.normal(0, 0.02, (1, 60, 2)), axis=1) + rng.normal(0, 1.0, (1, 1, 2))
            before = plan.at(motion)
            plan.offer(Chunk(np.concatenate([walk, 0 * walk], 2), 0.02), motion, motion - 0.05, motion, 0.2)
            if before is not None:
                np.testing.assert_allclose(at(plan, motion), before, atol=1e-12)
        reference = at(plan, motion)
        if previous is not None:
            assert np.abs(reference - previous).max() < 0.4  # the chunks' own steps are over 1
        previous = reference


def test_blend_ends_on_the_new_chunk_exactly():
    plan, chunk = Plan(DirectTracker()), Chunk(np.full((1, 50, 2), 3.0), 0.1)
    plan.reference = np.zeros((1, 2))
    plan.offer(chunk, 0.0, 0.0, 0.0, 0.2)
    np.testing.assert_allclose([at(plan, t)[0, 0] for t in (0.0, 0.1, 0.2, 0.3)], [0.0, 1.5, 3.0, 3.0], atol=1e-12)


def test_chunk_waits_for_its_origin():
    plan = Plan(DirectTracker())
    plan.offer(Chunk(np.ones((1, 10, 1)), 0.1), 0.0, 0.0, 0.0, 0.0)
    plan.offer(Chunk(np.full((1, 10, 1), 2.0), 0.1), 0.1, 0.5, 0.1, 0.0)
    assert [at(plan, t)[0, 0] for t in (0.2, 0.4, 0.5, 0.6)] == [1.0, 1.0, 2.0, 2.0]


def test_late_references_are_dropped_and_counted():
    # decisions every 0.4 s arrive 0.25 s late; the first finds the robot held, so nothing of it is late
    report, _, _ = run(Constant([0.2, 0.2], steps=8, dt=0.1, replan_every=4), latency=0.25, step_seconds=0.1)
    made = report.chunks
    assert made == 5
    assert report.dropped_references == 2 * (made - 1)
    assert report.late_chunks == 0


def test_wholly_late_chunks_are_never_followed():
    settings = {"latency": 0.5, "step_seconds": 0.1, "hold_stops_time": False, "idle": (0.0, 0.0)}
    report, robot, _ = run(Constant([0.9, 0.9], steps=4, dt=0.1), **settings)
    assert report.late_chunks == report.chunks > 1
    assert report.dropped_references == 4 * report.chunks
    assert max(np.abs(c).max() for c in robot.sent) <= 0.5  # it stays where it began


def test_references_wait_while_the_robot_is_held():
    report, robot, _ = run(Constant([0.9, 0.9], steps=4, dt=0.1), latency=0.5, step_seconds=0.1, seconds=4.0)
    assert report.late_chunks == 0
    assert report.held > 0
    assert robot.sent[-1] == pytest.approx([0.9, 0.9], abs=1e-3)


def test_last_waypoint_is_held_at_rest_when_the_planner_is_late():
    class Short(MazePlanner):
        def act(self, history, step):
            chunk = super().act(history, step)
            ends.append(chunk.references[0, 9, :2])
            return Chunk(chunk.references[:, :10], chunk.dt)

    clock = LogicalClock()
    seen: list[tuple[float, np.ndarray]] = []
    ends: list[np.ndarray] = []
    report = deploy(
        MujocoRobot(robots.make("pointmaze-umaze"), seed=1, now=clock.now), None, limits=TWO, clock=clock, seconds=2.0,
        inference=InlineInference(Short("umaze"), clock.now, lambda k: 100.0 * k), slow_start=0.0, hold=0.0, damp=0.0,
        on_tick=lambda t, o, r, c: seen.append((t, np.array(r)[0])),
    )  # fmt: skip
    assert report.chunks == 1
    assert report.held == pytest.approx(180, abs=2)  # the plan lasts 0.2 s
    for t, reference in seen:
        if t > 0.2:
            np.testing.assert_allclose(reference, [*ends[0], 0.0, 0.0], atol=1e-6)


def test_slow_start_moves_from_where_the_robot_is():
    _, robot, _ = run(Constant([-0.9, 0.9], steps=100, dt=0.1), slow_start=1.0)
    path = np.array(robot.sent)
    np.testing.assert_allclose(path[0], [0.5, -0.5])
    assert np.abs(np.diff(path, axis=0)).max() < 1.5 * 1.4 / 100  # 1.4 in one second
    np.testing.assert_allclose(path[-1], [-0.9, 0.9], atol=1e-4)


def test_nothing_is_sent_before_a_plan_when_rest_is_unknown():
    report, robot, _ = run(Constant([0.1, 0.1]), robot=Arm(lambda: 0.0, names=("x", "y")), latency=0.5)
    assert report.ticks - len(robot.sent) >= 50
    assert all((np.array(c) == np.float32(0.1)).all() for c in robot.sent)


def test_new_episode_voids_the_plan():
    clock = LogicalClock()
    robot = Arm(clock.now, episodes=True)

    def teleport():
        robot.episode, robot.position = 1.0, np.array([-0.7, 0.7])

    robot.script[102] = teleport
    controller = Constant([0.5, -0.5], steps=100, replan_every=0)
    _, robot, _ = run(controller, robot=robot, clock=clock, latency=0.3, seconds=2.0)
    k = next(i for i, c in enumerate(robot.sent) if c[0] < 0)
    assert k == 100
    np.testing.assert_allclose(robot.sent[k : k + 25], np.tile([-0.7, 0.7], (25, 1)), atol=1e-6)
    assert controller.resets == 3  # at the start, and one an episode


def test_history_is_strided_and_padded_with_the_episodes_first():
    clock = LogicalClock()
    robot = Arm(clock.now)
    controller = Constant([0.0, 0.0], history=3, replan_every=1)
    run(controller, robot=robot, clock=clock, step_seconds=0.1, slow_start=1.0, seconds=1.0)
    first = controller.calls[0][1]["state"]
    assert first.shape == (1, 3, 2)
    np.testing.assert_array_equal(first, np.tile(np.array([0.5, -0.5], np.float32), (1, 3, 1)))
    step, later = controller.calls[5][0], controller.calls[5][1]["state"][0, :, 0]
    assert step == 5
    # a straight blend from 0.5 to 0: observations 0.1 s apart
    np.testing.assert_allclose(np.diff(later), -0.05, atol=1e-6)


def test_prediction_plans_from_where_the_robot_will_be():
    clock = LogicalClock()
    task = robots.make("pointmaze-umaze")
    asked: list[np.ndarray] = []

    class Spy(MazePlanner):
        def act(self, history, step):
            asked.append(history["state"][0, -1].copy())
            return super().act(history, step)

    path = []
    deploy(
        MujocoRobot(task, now=clock.now, seed=3), None, limits=TWO, clock=clock, seconds=1.6, step_seconds=0.01,
        inference=InlineInference(Spy("umaze", speed=1.0, replan_every=20), clock.now, 0.2),
        on_tick=lambda t, o, r, c: path.append((t, *o["state"][0])),
    )  # fmt: skip
    positions = np.array(path)[:, 1:3]
    errors = []
    for state in asked[3:6]:  # with a latency known, and the robot under way
        gaps = np.linalg.norm(positions - state[:2], axis=1)
        errors.append(gaps.min())
    assert max(errors) < 0.05


# ---- hazards


@pytest.mark.parametrize("kind", ["hazards", "moving-hazards"])
def test_a_guard_keeps_a_planner_that_knows_no_hazards_out_of_them(kind):
    def drive(guard):
        task = robots.make(f"pointmaze-large-{kind}", horizon=300)
        clock = LogicalClock()
        robot = MujocoRobot(task, seed=3, now=clock.now)
        report = deploy(
            robot, None, limits=TWO, clock=clock, seconds=10.0, step_seconds=0.01,
            inference=InlineInference(MazePlanner("large", speed=3.0), clock.now, 0.02), guard=guard,
        )  # fmt: skip
        assert report.episodes == len(robot.outcomes) >= 3
        assert report.unsafe_episodes == sum(o.margin < 0 for o in robot.outcomes)
        assert report.worst_margin <= min(o.margin for o in robot.outcomes)
        return report, task

    blind, task = drive(None)
    assert blind.unsafe_episodes > 0
    assert blind.worst_margin < -0.05
    assert blind.filtered == 0
    guarded, _ = drive(SafetyFilter(task.linear_model(), margin=0.02))
    assert guarded.unsafe_episodes == 0
    assert guarded.worst_margin > 0
    assert guarded.filtered > 0


def test_a_guards_steps_are_the_loops():
    task = robots.make("pointmaze-large-hazards")
    robot = MujocoRobot(task)
    with pytest.raises(UserError, match="right is 100 Hz"):
        deploy(robot, None, limits=TWO, guard=SafetyFilter(task.linear_model()), frequency=50.0)


# ---- what goes wrong


@pytest.mark.parametrize("bad", ["nan", "shape", "width", "raise"])
def test_bad_chunks_are_refused_the_plan_is_held_and_patience_ends(bad):
    report, robot, _ = run(Constant([0.3, 0.3], bad=bad, good=2, replan_every=10), step_seconds=0.01, patience=4)
    assert report.rejected_chunks == 4
    assert report.chunks == 2
    assert report.faults == 1
    assert report.ended == "fault: chunk"
    assert report.fault_log[0].latched
    assert np.isfinite(np.array(robot.sent)).all()
    assert report.violations == 0
    assert not robot.connected


def test_one_bad_packet_does_not_end_the_loop_but_many_do():
    clock = LogicalClock()
    robot = Arm(clock.now)
    robot.script = {20: ConnectionError("no reply"), 30: {"a.pos": float("nan"), "b.pos": 0.0}, 40: {"a.pos": 1.0}}
    report, _, _ = run(Constant([0.1, 0.1]), robot=robot, clock=clock)
    assert (report.bad_observations, report.faults, report.ended) == (3, 0, "time")
    robot = Arm(clock.now)
    robot.script = {k: ConnectionError("unplugged") for k in range(50, 5000)}
    report, _, _ = run(Constant([0.1, 0.1]), robot=robot, clock=clock, patience=3)
    assert (report.faults, report.ended) == (1, "fault: observation")
    assert "unplugged" in report.fault_log[0].detail
    assert report.seconds < 0.8


def test_failing_sends():
    clock = LogicalClock()
    robot = Arm(clock.now)
    robot.send_script = {10: ConnectionError("busy")}
    report, _, _ = run(Constant([0.1, 0.1]), robot=robot, clock=clock)
    assert (report.bad_sends, report.faults) == (1, 0)
    robot = Arm(clock.now)
    robot.send_script = {k: ConnectionError("gone") for k in range(10, 5000)}
    report, _, _ = run(Constant([0.1, 0.1]), robot=robot, clock=clock)
    assert report.ended == "fault: send"


def test_dead_inference_is_held_then_damped():
    clock = LogicalClock()
    robot = Arm(clock.now)
    damped = []
    robot.damp = lambda: damped.append(clock.now()) is None  # type: ignore[attr-defined, func-returns-value]
    controller = Constant([0.9, 0.0], steps=100, replan_every=0)
    inference = InlineInference(controller, clock.now)
    robot.script[52] = lambda: setattr(inference, "failure", "inference process died")
    report = deploy(
        robot, None, limits=TWO, inference=inference, clock=clock, seconds=5.0, hold=0.2, damp=0.3, slow_start=1.0
    )
    assert report.ended == "fault: inference"
    at = next(i for i, t in enumerate(robot.times) if t >= 0.5)
    np.testing.assert_allclose(np.array(robot.sent[at:]) - robot.sent[at - 1], 0.0, atol=1e-12)  # held in mid-blend
    assert damped == [pytest.approx(0.7, abs=0.011)]
    assert robot.times[-1] < damped[0]  # nothing is sent to a robot that damps itself
    assert report.seconds == pytest.approx(1.0, abs=0.02)


def test_pd_damping_commands_no_stiffness():
    clock = LogicalClock()
    task = robots.make("pointmaze-umaze")
    inference = InlineInference(MazePlanner("umaze"), clock.now)
    seen = []

    def watch(t, observation, reference, command):
        seen.append((observation["state"][0].copy(), reference[0].copy(), command.copy()))
        if len(seen) == 60:
            inference.failure = "dead"

    deploy(
        MujocoRobot(task, now=clock.now), None, limits=TWO, inference=inference, clock=clock,
        seconds=5.0, hold=0.2, damp=0.2, step_seconds=0.01, on_tick=watch,
    )  # fmt: skip
    hold, damp = seen[61:79], seen[83:]
    assert all((r == hold[0][1]).all() and (r[2:] == 0).all() for _, r, _ in hold)
    for state, _, command in damp:
        np.testing.assert_allclose(command, np.clip(-state[2:], -1, 1), atol=1e-6)


def test_restart_resumes_after_a_hold():
    clock = LogicalClock()
    robot = Arm(clock.now)
    inference = InlineInference(Constant([0.9, 0.9], replan_every=10), clock.now)
    robot.script[52] = lambda: setattr(inference, "failure", "inference process died")
    report = deploy(robot, None, limits=TWO, inference=inference, clock=clock, seconds=2.0, restarts=1)
    assert (report.restarts, report.faults, report.ended) == (1, 1, "time")
    assert not report.fault_log[0].latched
    np.testing.assert_allclose(robot.sent[-1], [0.9, 0.9], atol=1e-6)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    command=st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=2),
    previous=st.lists(st.floats(-1, 1), min_size=2, max_size=2),
    rate=st.floats(1e-3, 1e3),
)
def test_limits_hold_for_every_command(command, previous, rate):
    limits = Limits([-1, -0.5], [1, 0.25], rate)
    previous = np.clip(previous, limits.low, limits.high)
    out = limits.apply(np.array(command), previous, 0.01)
    assert limits.holds(out)
    assert (np.abs(out - previous) <= rate * 0.01 + 1e-12).all()


def test_commands_beyond_limits_are_clamped_and_counted():
    limits = Limits([-0.6, -0.6], [0.6, 0.6], 2.0)
    report, robot, _ = run(Constant([5.0, -5.0]), limits=limits, slow_start=0.0, blend=0.0)
    path = np.array(robot.sent)
    assert np.abs(path).max() <= 0.6
    assert np.abs(np.diff(path, axis=0)).max() <= 0.02 + 1e-9
    assert report.clamped > 100
    assert report.violations == 0


def test_a_robot_that_sends_something_else_is_reported():
    class Liar(Arm):
        def send_action(self, action):
            super().send_action(action)
            return {"a.pos": 7.0, "b.pos": float("nan")}

    report, _, _ = run(Constant([0.1, 0.1]), robot=Liar(lambda: 0.0))
    assert report.violations > 100


@hypothesis_settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_whatever_goes_wrong_commands_stay_allowed(seed):
    rng = np.random.default_rng(seed)
    clock = LogicalClock()
    limits = Limits(np.array([-0.6, -0.7]), np.array([0.8, 0.5]), 3.0)

    class Chaos(Constant):
        def act(self, history, step):
            steps, kind = int(rng.integers(1, 12)), rng.integers(12)
            if kind == 0:
                raise RuntimeError("no plan")
            references = rng.normal(0, 2, (1, steps, 2 if kind > 1 else 3)).astype(np.float32)
            if kind == 2:
                references[0, rng.integers(steps), 0] = rng.choice([np.nan, np.inf])
            dt, start = (-0.1, np.nan) if kind == 3 else (rng.uniform(0.01, 0.2), rng.uniform(-0.1, 0.2))
            return Chunk(references if kind != 4 else references[0], dt, start)

    robot = Arm(clock.now, names=("a.pos", "b.pos") if seed % 2 else ("x", "y"), episodes=bool(seed % 3))
    robot.position = limits.low * 0.5
    for read in rng.integers(2, 200, 15):
        robot.script[int(read)] = [
            OSError("bus"), {}, {"a.pos": np.nan, "b.pos": 0.0},
            lambda: clock.advance(rng.exponential(0.02)),
            lambda: setattr(robot, "episode", 1.0 if robot.episode is not None else None),
        ][rng.integers(5)]  # fmt: skip
    report, robot, _ = run(
        Chaos([0.0, 0.0], replan_every=int(rng.integers(0, 4))), robot=robot, clock=clock, seconds=1.5, limits=limits,
        latency=lambda k: rng.exponential(0.15), step_seconds=0.05, patience=int(rng.integers(1, 20)),
        idle=(0.0, 0.0) if seed % 5 == 0 else None,
    )  # fmt: skip
    sent = np.array(robot.sent).reshape(-1, 2)
    assert np.isfinite(sent).all()
    assert (sent >= limits.low).all()
    assert (sent <= limits.high).all()
    assert np.abs(np.diff(sent, axis=0)).max(initial=0) <= 3.0 * 0.01 + 1e-9
    assert report.ended == "time" or report.ended.startswith("fault")
    assert report.violations == 0
    assert not robot.connected


# ---- pacing


def test_overruns_are_counted_and_the_grid_is_kept():
    clock = LogicalClock(100.0)
    robot = Arm(clock.now)
    robot.script = {
        30: lambda: clock.advance(0.025),
        60: lambda: clock.advance(0.009),
        90: lambda: clock.advance(0.012),
    }
    report, _, _ = run(Constant([0.1, 0.1]), robot=robot, clock=clock, seconds=1.0)
    assert report.missed_deadlines == 3  # two in the first case, none in the second, one in the third
    grid = (np.array(robot.times) - 100.0) / 0.01
    started = np.delete(grid, [28, 29, 58, 88, 89])  # a slow tick sends late, and the next begins at once
    np.testing.assert_allclose(started, np.round(started), atol=1e-6)
    assert grid[-1] == pytest.approx(119)
    assert report.late_periods == 2
    assert report.period_ms is not None
    assert report.period_ms["max"] == pytest.approx(25.0, abs=0.01)
    assert report.period_ms["p50"] == pytest.approx(10.0, abs=0.01)


def test_garbage_collection_and_signals_are_restored():
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert gc.isenabled()
    run(Constant([0.1, 0.1]), seconds=0.1)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]


def test_memory_does_not_grow():
    sizes = {}

    def watch(t, observation, reference, command):
        k = round(t * 1000)
        if k in (400, 1200):
            gc.collect()
            sizes[k] = tracemalloc.get_traced_memory()[0]

    class Quiet(Arm):
        def send_action(self, action):
            return action

    clock = LogicalClock()
    tracemalloc.start()
    try:
        controller = Constant([0.1, 0.1], replan_every=10)
        controller.calls = type("Nothing", (list,), {"append": lambda self, x: None})()
        run(controller, robot=Quiet(clock.now), clock=clock, frequency=1000.0, seconds=1.3, on_tick=watch)
    finally:
        tracemalloc.stop()
    assert sizes[1200] - sizes[400] < 10_000  # 800 ticks, 80 chunks


def test_samples_keep_percentiles_and_maximum():
    samples = Samples(100)
    for k in range(1000):
        samples.add(1e6 if k == 3 else k)
    assert samples.summary() == {"p50": 949.5, "p99": pytest.approx(998.0, abs=0.1), "max": 1e6}
    assert Samples(3).summary() is None


def test_bare_loop():
    result = bare_loop(0.005, 0.2)
    assert result["ticks"] == 40
    assert result["period_ms"]["max"] >= result["period_ms"]["p50"] > 1.0


# ---- settings


def test_wrong_settings_are_told():
    with pytest.raises(UserError, match="frequency is 0"):
        run(Constant([0, 0]), frequency=0)
    with pytest.raises(UserError, match="unexpected keyword argument 'freqency'"):
        run(Constant([0, 0]), freqency=10)
    with pytest.raises(UserError, match="limits for 1 actions; the robot has 2"):
        run(Constant([0, 0]), limits=Limits([0], [1]))
    with pytest.raises(UserError, match="low above high at action 1"):
        Limits([0, 1], [1, 0])
    robot = Arm()
    robot.script = {k: OSError("dead") for k in range(100)}
    with pytest.raises(UserError, match="gives no valid observation"):
        run(Constant([0, 0]), robot=robot)
    with pytest.raises(UserError, match="no controller factory 'nowhere:f'"):
        Factory("nowhere:f")()


def test_robots_do_not_import_torch():
    code = "import sys, robots, robots.loop, robots.mujoco_robot; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- shared memory


def test_readers_never_see_half_an_observation():
    layout = Layout({"state": (64,), "camera": (32, 32, 3)}, depth=20)
    channel = Channel(layout, bytearray(layout.nbytes))
    stop = threading.Event()

    def write():
        k = 0
        while not stop.is_set():
            k += 1
            state, image = np.full((1, 64), k, np.float32), np.full((1, 32, 32, 3), k % 251, np.uint8)
            channel.publish(float(k), float(k), 0, 0, 0.0, state[0], {"state": state, "camera": image})

    writer = threading.Thread(target=write)
    writer.start()
    while channel.newest() is None:
        time.sleep(0.001)
    try:
        for _ in range(300):
            arrays, meta = channel.history(2, 3)
            newest = meta["stamp"]
            for row, state in enumerate(arrays["state"][0]):
                assert (state == state[0]).all()
                assert (arrays["camera"][0, row] == int(state[0]) % 251).all()
            assert arrays["state"][0, -1, 0] == newest == meta["expected"][0]
            if newest > 4:
                assert arrays["state"][0, 0, 0] == newest - 3
    finally:
        stop.set()
        writer.join()


# ---- the real process and clock


def factory(*args, **kwargs):
    return Factory("loop_fakes:Constant", args, kwargs)


def test_process_drives_and_a_slow_planner_leaves_the_period_alone():
    robot = Arm()
    config = LoopConfig(seconds=2.5, hold=0.05, damp=0.05, delay=0.9, step_seconds=0.1)
    limits = Limits([-0.6, -0.6], [0.6, 0.6])
    report = deploy(robot, factory([0.9, -0.9], replan_every=1), limits=limits, config=config)
    assert report.ended == "time"
    assert report.chunks in (1, 2, 3)
    assert report.latency_ms is not None
    assert report.latency_ms["p50"] >= 900
    # every period has its tick, or is counted as missed
    assert report.ticks <= 263
    assert report.ticks + report.missed_deadlines >= 257
    assert (report.violations, report.faults, report.bad_commands) == (0, 0, 0)
    np.testing.assert_allclose(robot.sent[-1], [0.6, -0.6])
    assert not robot.connected


def test_kill_9_of_the_inference_process_holds_and_ends():
    robot = Arm()
    inference = InferenceProcess(factory([0.9, 0.9], steps=100, replan_every=1))
    robot.script[60] = lambda: os.kill(inference.pid, signal.SIGKILL)
    report = deploy(robot, None, limits=TWO, inference=inference, seconds=20.0, hold=0.2, damp=0.1, slow_start=3.0)
    assert report.ended == "fault: inference"
    assert "exit code -9" in report.fault_log[0].detail
    seen = robot.times[0] + report.fault_log[0].seconds
    after = np.array([c for t, c in zip(robot.times, robot.sent) if t > seen + 0.02])
    assert len(after) > 5
    np.testing.assert_allclose(after - after[0], 0.0, atol=1e-6)
    assert not robot.connected


def test_kill_9_with_a_restart_goes_on():
    robot = Arm()
    inference = InferenceProcess(factory([0.9, 0.9], steps=5, replan_every=1))
    robot.script[40] = lambda: os.kill(inference.pid, signal.SIGKILL)

    def enough(t, observation, reference, command):
        if robot.reads > 100 and inference._restarting is None and (command > 0.89).all():
            signal.raise_signal(signal.SIGTERM)

    report = deploy(
        robot, None, limits=TWO, inference=inference, seconds=30.0, restarts=1, slow_start=0.2, hold=0.05, damp=0.05,
        on_tick=enough,
    )  # fmt: skip
    assert (report.restarts, report.ended) == (1, "SIGTERM")
    np.testing.assert_allclose(robot.sent[-1], [0.9, 0.9], atol=0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_through_hold_and_damping(number):
    clock = LogicalClock()
    robot = Arm(clock.now)
    robot.script[50] = lambda: signal.raise_signal(number)
    report, _, _ = run(Constant([0.9, 0.9], steps=100), robot=robot, clock=clock, seconds=None, hold=0.2, damp=0.1)
    assert report.ended == signal.Signals(number).name
    assert report.seconds == pytest.approx(0.48 + 0.3, abs=0.02)
    assert not robot.connected


def test_a_second_signal_skips_hold_and_damping():
    clock = LogicalClock()
    robot = Arm(clock.now)
    robot.script = dict.fromkeys((50, 60), lambda: signal.raise_signal(signal.SIGINT))
    report, _, _ = run(Constant([0.9, 0.9], steps=100), robot=robot, clock=clock, seconds=None, hold=5.0, damp=5.0)
    assert report.ended == "SIGINT"
    assert report.seconds < 0.7


def test_nothing_is_left_when_the_loop_is_killed(tmp_path):
    code = f"""
import sys
sys.path[:0] = {[os.path.dirname(__file__)]!r}
from loop_fakes import Arm
from robots.loop import Limits, deploy
from robots.inference import Factory, InferenceProcess
if __name__ == "__main__":
    inference = InferenceProcess(Factory("loop_fakes:Constant", ([0.9, 0.9],)))
    robot = Arm()
    robot.script[30] = lambda: print(inference.pid, inference._memory.name, flush=True)
    deploy(robot, None, limits=Limits([-1, -1], [1, 1]), inference=inference, seconds=30.0)
"""
    script = tmp_path / "drive.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    pid, name = process.stdout.readline().split()
    assert os.path.exists(f"/dev/shm/{name}")
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{pid}") or os.path.exists(f"/dev/shm/{name}"):
        assert time.monotonic() < deadline, "the inference process or its memory outlived the loop"
        time.sleep(0.02)


def test_scheduling_is_restored_and_not_inherited():
    robot, seen = Arm(), {}
    inference = InferenceProcess(factory([0.9, 0.9], replan_every=1))
    before = os.sched_getscheduler(0)

    def look():
        seen["loop"], seen["inference"] = os.sched_getscheduler(0), os.sched_getscheduler(inference.pid)

    def restarted(t, observation, reference, command):
        if robot.reads == 20:
            os.kill(inference.pid, signal.SIGKILL)
        if robot.reads > 40 and inference._restarting is None:
            look()
            signal.raise_signal(signal.SIGINT)

    report = deploy(
        robot, None, limits=TWO, inference=inference, seconds=30.0, restarts=1, on_tick=restarted, hold=0.05, damp=0.05
    )
    assert os.sched_getscheduler(0) == before
    assert seen["inference"] == os.SCHED_OTHER
    expected = "normal" if seen["loop"] & ~os.SCHED_RESET_ON_FORK == os.SCHED_OTHER else "fifo 20"
    assert report.scheduling == expected


def test_stalled_planner_is_a_fault():
    report = deploy(
        Arm(), factory([0.1, 0.1], steps=2, replan_every=1), limits=TWO, delay=0.8, stall=0.4, seconds=10.0,
        hold=0.05, damp=0.05, step_seconds=0.1,
    )  # fmt: skip
    assert report.ended == "fault: inference"
    assert "no decision for" in report.fault_log[0].detail


def test_controllers_that_cannot_start_are_told():
    with pytest.raises(UserError, match="no controller factory 'loop_fakes:Nobody'"):
        deploy(Arm(), Factory("loop_fakes:Nobody"), limits=TWO)
    with pytest.raises(RuntimeError, match="first decision failed: ValueError: no plan found"):
        deploy(Arm(), factory([0, 0], bad="raise", good=0), limits=TWO)
