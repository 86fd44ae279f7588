"""The real-time control loop: absolute deadlines, inference elsewhere, timed references, limits and checks on
everything.

One tick, at t0 + k * period on the monotonic clock: read the robot, check, publish to the inference process, take its
newest chunk if there is one, evaluate the reference that is due now, let the tracker make a command of it, limit,
check, send. Nothing in a tick waits for the planner. References are timed on a motion clock: the monotonic clock, which
stands while the robot is held for want of a plan, so that a late plan continues where the robot waits instead of
jumping ahead. docs/real_time.md tells the whole story: states, faults, figures.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from pilotwave.errors import UserError
from robots.controller import Chunk, Tracker
from robots.inference import Decision, Factory, Inference, InferenceProcess, Pace
from robots.robot import Adapter
from robots.safety_filter import SafetyFilter


class Clock(Protocol):
    """Seconds that never go backwards."""

    def now(self) -> float: ...
    def sleep_until(self, deadline: float) -> None: ...


class MonotonicClock:
    """time.monotonic; sleeps to `spin` seconds before a deadline, then spins (sleep alone wakes some 0.1 ms late)."""

    def __init__(self, spin: float = 2e-4) -> None:
        self.spin = spin
        self.now = time.monotonic

    def sleep_until(self, deadline: float) -> None:
        rest = deadline - self.spin - time.monotonic()
        if rest > 0:
            time.sleep(rest)  # clock_nanosleep with an absolute deadline on Linux
        if self.spin:
            while time.monotonic() < deadline:
                pass


class LogicalClock:
    """A clock that moves only when it is told to, or slept on: exact tests, and simulation as fast as it goes."""

    def __init__(self, start: float = 0.0) -> None:
        self.time = start

    def now(self) -> float:
        return self.time

    def advance(self, seconds: float) -> None:
        self.time += seconds

    def sleep_until(self, deadline: float) -> None:
        self.time = max(self.time, deadline)


class Limits:
    """What may be sent. low, high: (Da,); rate: largest change a second between commands, (Da,) or one number."""

    def __init__(self, low: ArrayLike, high: ArrayLike, rate: ArrayLike | None = None) -> None:
        self.low, self.high = (np.atleast_1d(np.asarray(v, dtype=np.float64)) for v in (low, high))
        shapes = self.low.shape, self.high.shape
        if shapes[0] != shapes[1] or self.low.ndim != 1 or not np.isfinite([self.low, self.high]).all():
            raise UserError(f"limits low {shapes[0]} and high {shapes[1]}; right is two finite vectors of one length")
        if (self.low > self.high).any():
            first = int(np.argmax(self.low > self.high))
            raise UserError(f"limit low above high at action {first}; low must not exceed high")
        self.rate = None if rate is None else np.broadcast_to(np.asarray(rate, dtype=np.float64), self.low.shape)
        if self.rate is not None and not (self.rate > 0).all():
            raise UserError("a rate limit is zero, negative or NaN; right is units a second above 0")

    def apply(self, command: np.ndarray, previous: np.ndarray | None, seconds: float) -> np.ndarray:
        """The nearest allowed command (Da,), `seconds` after `previous`."""
        if self.rate is not None and previous is not None:
            step = self.rate * seconds
            command = np.minimum(np.maximum(command, previous - step), previous + step)
        return np.minimum(np.maximum(command, self.low), self.high)

    def holds(self, command: np.ndarray) -> bool:
        """Whether a command is finite and within the values (to rounding)."""
        slack = 1e-6 * (1.0 + np.abs(self.low) + np.abs(self.high))
        return bool((command >= self.low - slack).all() and (command <= self.high + slack).all())


@dataclass(frozen=True)
class LoopConfig:
    """Settings of `deploy`; seconds unless said otherwise.

    seconds: how long to run (None: until a signal). frequency: Hz. step_seconds: length of the environment step that
    the controller was trained at (None: one period). replan: between decisions (None: as the controller says; 0:
    always). delay: added to every decision, to see what a slow planner does.
    blend: over which the step between the old and a new chunk is spread. slow_start: the same for the first chunk.
    idle: the command that means "do nothing" (for forces and velocities: zeros), used before any chunk and to stop,
    where the tracker and the names cannot tell a resting command. predict: plan from where the robot will be when the
    chunk arrives (measured latency), if the tracker can tell. hold_stops_time: references wait while the robot is held.
    hold, damp: lengths of the two phases that end every run. patience: consecutive bad observations, sends, commands or
    chunks before a fault. restarts: how often a dead inference process is started again. stall, startup: see
    InferenceProcess. spin: before each deadline. tolerance: share of a period after which a tick counts as late.
    realtime_priority: SCHED_FIFO priority of the loop's thread where the system permits it (root, or an rtprio limit);
    None: ordinary scheduling.
    """

    seconds: float | None = 60.0
    frequency: float = 100.0
    step_seconds: float | None = None
    replan: float | None = None
    delay: float = 0.0
    blend: float = 0.1
    slow_start: float = 1.0
    idle: tuple[float, ...] | None = None
    predict: bool = True
    hold_stops_time: bool = True
    hold: float = 0.5
    damp: float = 0.5
    patience: int = 5
    restarts: int = 0
    stall: float = 10.0
    startup: float = 180.0
    spin: float = 2e-4
    tolerance: float = 0.1
    realtime_priority: int | None = 20

    def __post_init__(self) -> None:
        positive = {"frequency": self.frequency, "seconds": self.seconds, "step_seconds": self.step_seconds}
        for name, value in positive.items():
            if value is not None and not (np.isfinite(value) and value > 0):
                raise UserError(f"{name} is {value}; it must be a positive number")
        for name in ("delay", "blend", "slow_start", "hold", "damp", "spin", "replan", "restarts"):
            value = getattr(self, name)
            if value is not None and not (np.isfinite(value) and value >= 0):
                raise UserError(f"{name} is {value}; it must be 0 or more")
        if self.patience < 1:
            raise UserError(f"patience is {self.patience}; it must be 1 or more")


class Samples:
    """Percentiles of the last `capacity` numbers, and the largest of all, in memory that never grows."""

    def __init__(self, capacity: int) -> None:
        self._values = np.zeros(max(capacity, 1), dtype=np.float32)
        self.count = 0
        self.maximum = -np.inf

    def add(self, value: float) -> None:
        self._values[self.count % len(self._values)] = value
        self.count += 1
        if value > self.maximum:
            self.maximum = value

    def summary(self, scale: float = 1.0, digits: int = 4) -> dict[str, float] | None:
        """{p50, p99, max}, times `scale`; None when there are none."""
        if not self.count:
            return None
        p50, p99 = np.percentile(self._values[: self.count], [50, 99])
        return {k: round(float(v) * scale, digits) for k, v in (("p50", p50), ("p99", p99), ("max", self.maximum))}


@dataclass(frozen=True)
class Fault:
    """What went wrong, when (seconds after the loop began), and whether it ended the run."""

    seconds: float
    kind: str
    detail: str
    latched: bool


@dataclass
class DeployReport:
    """What a run was like. Times in ms as {p50, p99, max}.

    success_rate, episodes: where the robot can judge them (else None, 0). period_ms: between starts of ticks.
    missed_deadlines: periods that were over before their command was sent. late_periods: ticks that began more than
    `tolerance` of a period after their deadline. work_ms: from a tick's start to its command. chunk_age_ms: at each
    tick, since the observation that the plan in force was made from. latency_ms: from observation to chunk in the loop;
    decision_ms: the controller's share. scheduling: what the system
    gave the loop's thread. dropped_references: due before their chunk arrived; late_chunks: all of them
    were. held: ticks without a reference due. filtered: commands that the guard changed, infeasible: of those, without one
    that it allows; clamped: commands that the limits changed after. unsafe_episodes, worst_margin: where the robot can tell
    how near hazards it came (negative: inside). violations: commands outside
    of the limits as the robot says it executed them. faults: how many; fault_log: the first hundred.
    """

    success_rate: float | None = None
    episodes: int = 0
    period_ms: dict[str, float] | None = None
    missed_deadlines: int = 0
    faults: int = 0
    seconds: float = 0.0
    frequency: float = 0.0
    ticks: int = 0
    late_periods: int = 0
    work_ms: dict[str, float] | None = None
    chunks: int = 0
    evaluations: int = 0
    chunk_age_ms: dict[str, float] | None = None
    latency_ms: dict[str, float] | None = None
    decision_ms: dict[str, float] | None = None
    dropped_references: int = 0
    late_chunks: int = 0
    rejected_chunks: int = 0
    held: int = 0
    filtered: int = 0
    infeasible: int = 0
    clamped: int = 0
    unsafe_episodes: int | None = None
    worst_margin: float | None = None
    violations: int = 0
    bad_observations: int = 0
    bad_commands: int = 0
    bad_sends: int = 0
    restarts: int = 0
    scheduling: str = "normal"
    ended: str = ""
    fault_log: list[Fault] = field(default_factory=list)
    episode_seconds_mean: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, the contract's keys first."""
        return asdict(self)


OnTick = Callable[[float, Mapping[str, np.ndarray], np.ndarray | None, np.ndarray | None], None]
"""Called each tick with (seconds since the start, observation, reference or None, command sent or None)."""


class Plan:
    """The chunks in force: evaluates the reference at a motion time, without a step where one chunk follows another."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.reference: np.ndarray | None = None  # of the last tick, what the next chunk must continue
        self.stamp = -np.inf
        self.chunk: Chunk | None = None
        self._origin = self._begun = self._blend = 0.0
        self._evaluated = np.inf
        self._offset: np.ndarray | None = None
        self._pending: deque[tuple[Chunk, float, float, float]] = deque(maxlen=4)

    def clear(self) -> None:
        """Forget all chunks; the last reference stays, at rest."""
        self.chunk, self._offset = None, None
        self._pending.clear()
        if self.reference is not None:
            self.reference = self.tracker.hold(self.reference)

    def end(self) -> float:
        """Motion time at which the last reference stops being due; -inf without a chunk."""
        c = self.chunk
        return -np.inf if c is None else self._origin + c.start + c.references.shape[1] * c.dt

    def runs(self, motion: float) -> bool:
        """Whether a reference is due at this motion time."""
        return bool(self._pending) or motion < self.end()

    def offer(self, chunk: Chunk, stamp: float, origin: float, motion: float, blend: float) -> tuple[int, bool]:
        """Put a chunk in force, at its origin if that is to come: (references that came too late, accepted)."""
        steps = chunk.references.shape[1]
        late = int(np.clip(np.floor((motion - origin - chunk.start) / chunk.dt + 1e-6), 0, steps))
        if late == steps:
            return late, False
        self._pending.append((chunk, stamp, origin, blend))
        self._advance(motion)
        return late, True

    def _advance(self, motion: float) -> None:
        while self._pending:
            chunk, stamp, origin, blend = self._pending[0]
            early = origin > motion + 1e-9
            if early and motion < self.end():
                return
            self._pending.popleft()
            self._origin = min(origin, motion)
            self.chunk, self.stamp, self._offset = chunk, stamp, None
            # from the last tick's reference on, so that a new chunk every tick moves too
            self._begun = min(self._evaluated, motion)
            self._blend = motion + blend - self._begun
            if self.reference is not None and blend > 0:
                target = self.tracker.reference(chunk, self._begun - self._origin)
                if target.shape == self.reference.shape:
                    self._offset = self.reference - target

    def at(self, motion: float) -> np.ndarray | None:
        """The reference (1, R) at a motion time: due, or the last one held; None before there was any."""
        self._advance(motion)
        self._evaluated = motion
        if self.chunk is not None:
            reference = self.tracker.reference(self.chunk, motion - self._origin)
            if self._offset is not None:
                weight = 1.0 - (motion - self._begun) / self._blend
                if weight > 0:
                    reference = reference + weight * self._offset
                else:
                    self._offset = None
            self.reference = reference
        return self.reference

    def ahead(self, motion: float) -> np.ndarray | None:
        """The reference that the chunk in force asks for at a future motion time, without blending."""
        return None if self.chunk is None else self.tracker.reference(self.chunk, motion - self._origin)


class _Loop:
    """The state of one run. Every method is short and none waits, apart from the robot's own calls."""

    def __init__(
        self, robot: Any, adapter: Adapter, inference: Inference, tracker: Tracker, limits: Limits, config: LoopConfig,
        clock: Clock, evaluations: int, on_tick: OnTick | None, guard: SafetyFilter | None = None,
    ) -> None:  # fmt: skip
        self.robot, self.adapter, self.inference, self.tracker = robot, adapter, inference, tracker
        self.limits, self.config, self.clock, self.on_tick, self.guard = limits, config, clock, on_tick, guard
        if guard is not None:
            guard.reset(1)
        self.period = 1.0 / config.frequency
        self.began = self.ticked = clock.now()
        self.plan = Plan(tracker)
        self.report = DeployReport(frequency=config.frequency, evaluations=evaluations)
        capacity = (
            1 << 20 if config.seconds is None else min(1 << 20, int(config.seconds * config.frequency * 1.2) + 1000)
        )
        self.periods, self.work, self.ages = Samples(capacity), Samples(capacity), Samples(capacity)
        self.latencies, self.decisions = Samples(1 << 14), Samples(1 << 14)
        self.recent: deque[float] = deque(maxlen=5)  # latencies, for the prediction
        self.streaks: dict[str, int] = {}
        self.observation: dict[str, np.ndarray] | None = None
        self.episode = 0
        self.sent: np.ndarray | None = None
        self.held_seconds = 0.0
        self.waiting_for_restart = False
        self.slow_until: float | None = None  # the first chunk, and the first after a restart, is approached slowly
        self.phase = "run"  # run -> hold -> damp -> over
        self.phase_ends = np.inf
        self.damped_by_robot = False
        self.signal: int | None = None
        self.hurry = False

    # ---- what can go wrong

    def fault(self, kind: str, detail: str, now: float, *, latch: bool = True) -> None:
        """Record a fault; a latched one ends the run through hold and damping."""
        self.report.faults += 1
        if len(self.report.fault_log) < 100:
            self.report.fault_log.append(Fault(round(now - self.began, 4), kind, detail, latch))
        if latch:
            self.finish(f"fault: {kind}", now)

    def finish(self, why: str, now: float) -> None:
        """Leave the run phase, once: hold where we are."""
        if self.phase == "run":
            self.report.ended = why
            self.phase, self.phase_ends = "hold", now + self.config.hold
            self.plan.clear()

    def streak(self, kind: str, bad: bool, detail: object, now: float) -> None:
        """Count consecutive failures of one kind; `patience` of them are a fault."""
        if not bad:
            self.streaks[kind] = 0
            return
        self.streaks[kind] = self.streaks.get(kind, 0) + 1
        if self.streaks[kind] == self.config.patience:
            self.fault(kind, f"{self.config.patience} in a row; last: {detail}", now)

    # ---- one tick

    def observe(self, now: float) -> bool:
        """Read and check the robot; on failure the last observation stays. Whether there is a fresh one."""
        try:
            flat = self.robot.get_observation()
            arrays, episode = self.adapter.arrays(flat), self.adapter.episode(flat)
        except Exception as error:  # one bad packet must not end the loop
            self.report.bad_observations += 1
            self.streak("observation", True, f"{type(error).__name__}: {error}", now)
            return False
        self.streak("observation", False, "", now)
        if self.observation is not None and episode != self.episode:
            self.plan = Plan(self.tracker)  # the scene was reset: nothing planned before is true
            if self.guard is not None:
                self.guard.forget()
        self.observation, self.episode = arrays, episode
        return True

    def motion(self, now: float) -> float:
        """The time of the motion clock."""
        return now - self.held_seconds

    def publish(self, now: float) -> None:
        """Give the inference side this tick's observation, and where the robot will be when its answer comes."""
        assert self.observation is not None
        motion = due = self.motion(now)
        state = expected = self.observation["state"]
        if self.config.predict and self.recent and self.plan.runs(motion):
            due = min(motion + max(self.recent), self.plan.end())
            here, there = self.plan.ahead(motion), self.plan.ahead(due)
            if here is not None and there is not None:
                moved = self.tracker.expected(state, here, there)
                if moved is None:
                    due = motion
                else:
                    expected = moved
        self.inference.publish(now, due, self.episode, expected[0], self.observation)

    def accept(self, now: float) -> None:
        """Take the newest decision, if it is one that can be followed."""
        decision = self.inference.latest()
        if decision is None or self.phase != "run" or decision.episode != self.episode:
            return
        self.latencies.add(now - decision.stamp)
        self.decisions.add(decision.seconds)
        self.recent.append(now - decision.stamp)
        chunk, reason = self.checked(decision)
        self.streak("chunk", chunk is None, reason, now)
        if chunk is None:
            self.report.rejected_chunks += 1
            return
        if decision.stamp <= self.plan.stamp:
            return
        self.report.chunks += 1
        self.waiting_for_restart = False
        motion = self.motion(now)
        if self.slow_until is None:
            self.slow_until = motion + self.config.slow_start
        blend = max(self.config.blend, self.slow_until - motion)
        late, accepted = self.plan.offer(chunk, decision.stamp, decision.due, motion, blend)
        self.report.dropped_references += late
        self.report.late_chunks += not accepted

    def checked(self, decision: Decision) -> tuple[Chunk | None, str]:
        """The chunk, or why it cannot be followed."""
        references = decision.references
        if references is None:
            return None, decision.error
        if not np.isfinite(references).all():
            return None, "a reference is NaN or infinite"
        if not (np.isfinite(decision.dt) and decision.dt > 0 and np.isfinite(decision.start)):
            return None, f"chunk times are wrong: dt {decision.dt}, start {decision.start}"
        chunk = Chunk(references.astype(np.float64), decision.dt, decision.start)
        assert self.observation is not None
        try:
            command = np.asarray(self.tracker.command(self.observation["state"], self.tracker.reference(chunk, 0.0)))
        except (ValueError, IndexError, TypeError) as error:
            return None, f"chunk of shape {references.shape} does not fit the tracker: {error}"
        if command.shape != (1, len(self.limits.low)):
            return (
                None,
                f"chunk of shape {references.shape} gives {command.shape[-1]} commands, not {len(self.limits.low)}",
            )
        return chunk, ""

    def resting(self) -> np.ndarray | None:
        """The reference (1, R) that keeps the robot where it is now, if anything can tell."""
        assert self.observation is not None
        state = self.observation["state"]
        rest = self.tracker.rest(state)
        if rest is None and self.config.idle is not None:
            rest = np.array([self.config.idle], dtype=np.float64)
        return self.adapter.measured(state) if rest is None else rest

    def reference(self, now: float) -> np.ndarray | None:
        """The reference of this tick; None: send nothing."""
        if self.phase == "damp":
            return None if self.damped_by_robot else self.resting()
        if self.phase == "hold" or self.waiting_for_restart:
            idle = self.config.idle is not None and self.tracker.rest(self.observation["state"]) is None  # type: ignore[index]
            return self.resting() if idle else self.plan.reference
        motion = self.motion(now)
        if not self.plan.runs(motion):
            self.report.held += 1
            if self.config.hold_stops_time:
                self.held_seconds += self.elapsed
        return self.plan.at(motion)

    def command(self, reference: np.ndarray, now: float) -> np.ndarray | None:
        """The checked and limited command (Da,) for a reference; the last one sent when there is no good one."""
        assert self.observation is not None
        try:
            raw = np.asarray(self.tracker.command(self.observation["state"], reference), dtype=np.float64)[0]
            wrong = "" if raw.shape == self.limits.low.shape and np.isfinite(raw).all() else f"command {raw}"
            if self.guard is not None and not wrong:
                raw = self.guard(self.observation, raw[None])[0]
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        self.streak("command", bool(wrong), wrong, now)
        if wrong:
            self.report.bad_commands += 1
            return self.sent
        limited = self.limits.apply(raw, self.sent, self.period)
        self.report.clamped += bool((limited != raw).any())
        return limited

    def send(self, command: np.ndarray, now: float) -> None:
        """Send, and look at what the robot says it sent."""
        try:
            sent = self.adapter.command(self.robot.send_action(self.adapter.flat(command)))
        except Exception as error:
            self.report.bad_sends += 1
            self.streak("send", True, f"{type(error).__name__}: {error}", now)
            return
        self.streak("send", False, "", now)
        self.report.violations += not self.limits.holds(sent)
        self.sent = sent

    def watch(self, now: float) -> None:
        """The watchdog over the inference side."""
        problem = self.inference.problem(now) if self.phase == "run" else None
        if problem is None:
            return
        again = self.report.restarts < self.config.restarts
        self.fault("inference", problem, now, latch=not again)
        if again:
            self.report.restarts += 1
            self.plan.clear()
            self.waiting_for_restart, self.slow_until = True, None
            self.inference.restart()

    def phases(self, now: float) -> None:
        """From run through hold and damp to the end."""
        if self.signal is not None:
            self.finish(signal.Signals(self.signal).name, now)
        elif self.config.seconds is not None and now - self.began >= self.config.seconds:
            self.finish("time", now)
        if self.phase == "hold" and now >= self.phase_ends:
            self.phase, self.phase_ends = "damp", now + self.config.damp
            damp = getattr(self.robot, "damp", None)
            try:
                self.damped_by_robot = bool(damp()) if damp is not None else False
            except Exception as error:
                self.fault("damp", f"{type(error).__name__}: {error}", now)
        if self.hurry or (self.phase == "damp" and now >= self.phase_ends):
            self.phase = "over"

    def tick(self, now: float) -> None:
        """Everything between a deadline and its command."""
        self.elapsed, self.ticked = now - self.ticked, now
        fresh = self.observe(now)
        self.watch(now)
        self.phases(now)
        if self.phase == "over":
            return
        if self.plan.reference is None:
            self.plan.reference = self.resting()  # what the first chunk continues
        if fresh and self.phase == "run":
            self.publish(now)
            self.accept(now)
        reference = self.reference(now)
        command = None if reference is None else self.command(reference, now)
        if command is not None:
            self.send(command, now)
        if self.plan.chunk is not None and self.phase == "run":
            self.ages.add(now - self.plan.stamp)
        if self.on_tick is not None:
            assert self.observation is not None
            self.on_tick(now - self.began, self.observation, reference, command)

    # ---- pacing

    def run(self) -> DeployReport:
        """Tick until the end."""
        report, period = self.report, self.period
        late = self.config.tolerance * period
        self.began = self.ticked = previous = self.clock.now()
        deadline, tick = self.began, 0
        collected = self.began
        while True:
            self.clock.sleep_until(deadline)
            now = self.clock.now()
            if tick:
                self.periods.add(now - previous)
            previous = now
            report.late_periods += now - deadline > late
            self.tick(now)
            done = self.clock.now()
            self.work.add(done - now)
            tick += 1
            if self.phase == "over":
                break
            deadline += period
            if done >= deadline:  # this period is over: skip what cannot be met instead of running after it
                skipped = int((done - deadline) / period) + 1
                report.missed_deadlines += skipped
                deadline += (skipped - 1) * period
            elif done - collected > 1.0 and deadline - done > 0.5 * period:
                gc.collect()  # with everything older frozen this takes microseconds, and there is time
                collected = done
        return self.finished(tick)

    def finished(self, ticks: int) -> DeployReport:
        """The report."""
        report = self.report
        report.ticks = ticks
        report.seconds = round(self.clock.now() - self.began, 4)
        report.period_ms, report.work_ms = self.periods.summary(1e3), self.work.summary(1e3)
        report.chunk_age_ms, report.latency_ms = self.ages.summary(1e3, 2), self.latencies.summary(1e3, 2)
        report.decision_ms = self.decisions.summary(1e3, 2)
        if self.guard is not None:
            report.filtered, report.infeasible = int(self.guard.changed.sum()), int(self.guard.infeasible.sum())
        report.worst_margin = getattr(self.robot, "worst_margin", None)
        outcomes = list(getattr(self.robot, "outcomes", ()))
        report.episodes = len(outcomes)
        if outcomes:
            report.success_rate = float(np.mean([o.success for o in outcomes]))
            margins = [o.margin for o in outcomes if o.margin is not None]
            report.unsafe_episodes = sum(margin < 0 for margin in margins) if margins else None
            report.episode_seconds_mean = round(float(np.mean([o.seconds for o in outcomes])), 4)
        return report


@contextmanager
def _signals(loop: _Loop) -> Iterator[None]:
    """SIGINT and SIGTERM end the run through hold and damping; a second one skips to the end of both."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: object) -> None:
        loop.hurry = loop.signal is not None
        loop.signal = number

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _prioritise(priority: int | None) -> str:
    """Real-time scheduling for this thread if the system permits it; what was got."""
    if not priority or not hasattr(os, "SCHED_RESET_ON_FORK"):
        return "normal"
    try:
        # threads and processes started from here must not inherit it
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
    except OSError:
        return "normal"
    return f"fifo {priority}"


@contextmanager
def _undisturbed(priority: int | None) -> Iterator[str]:
    """No garbage collection at random moments, and real-time scheduling where permitted; yields the scheduling."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    before = (os.sched_getscheduler(0), os.sched_getparam(0)) if hasattr(os, "sched_getparam") else None
    scheduling = _prioritise(priority)
    try:
        yield scheduling
    finally:
        if before is not None and scheduling != "normal":
            os.sched_setscheduler(0, *before)
        gc.unfreeze()
        if enabled:
            gc.enable()


def _first_observation(robot: Any, adapter: Adapter, patience: int) -> tuple[dict[str, np.ndarray], int]:
    error: Exception | None = None
    for _ in range(patience):
        try:
            flat = robot.get_observation()
            return adapter.arrays(flat), adapter.episode(flat)
        except Exception as problem:
            error = problem
    raise UserError(f"the robot gives no valid observation: {type(error).__name__}: {error}")


def deploy(
    robot: Any,
    controller_factory: Factory | None,
    *,
    limits: Limits,
    config: LoopConfig | None = None,
    tracker: Tracker | None = None,
    adapter: Adapter | None = None,
    inference: Inference | None = None,
    clock: Clock | None = None,
    on_tick: OnTick | None = None,
    guard: SafetyFilter | None = None,
    **settings: Any,
) -> DeployReport:
    """Drive a robot with a controller that lives in its own process, for `seconds` or until a signal.

    robot: any object with LeRobot's interface, connected or not (disconnected at the end either way).
    controller_factory: how that process makes its controller. limits: for every command. tracker: instead of the
    controller's own. inference, clock: other than InferenceProcess and the monotonic clock (tests: InlineInference and
    LogicalClock). guard: changes commands before the limits do; its model's steps are one period long. settings: fields of
    LoopConfig, over `config`. Raises UserError for wrong settings or a controller that cannot start; what happens after the
    loop began is in the report.
    """
    try:
        config = replace(config or LoopConfig(), **settings)
    except TypeError as error:
        raise UserError(f"deploy: {error}; settings are {', '.join(LoopConfig.__dataclass_fields__)}") from None
    adapter = adapter or Adapter(robot)
    if guard is not None and not np.isclose(guard.model.dt * config.frequency, 1.0, rtol=1e-3):
        raise UserError(
            f"the filter's model has steps of {guard.model.dt:g} s and the loop runs at {config.frequency:g} Hz; right is "
            f"{1 / guard.model.dt:g} Hz"
        )
    if len(limits.low) != len(adapter.action):
        raise UserError(f"limits for {len(limits.low)} actions; the robot has {len(adapter.action)}")
    if config.idle is not None and len(config.idle) != len(adapter.action):
        raise UserError(f"idle has {len(config.idle)} numbers; the robot has {len(adapter.action)} actions")
    if inference is None:
        if controller_factory is None:
            raise UserError("deploy needs a controller_factory (or an inference of its own)")
        inference = InferenceProcess(controller_factory, stall_seconds=config.stall, startup_seconds=config.startup)
    clock = clock or MonotonicClock(config.spin)
    step = config.step_seconds or 1.0 / config.frequency
    stride = max(1, round(step * config.frequency))
    try:
        hello = inference.start(adapter.shapes, Pace(step, stride, config.replan, config.delay))
        if not robot.is_connected:
            robot.connect()
        loop = _Loop(
            robot, adapter, inference, tracker or hello.tracker, limits, config, clock, hello.evaluations, on_tick, guard
        )
        loop.observation, loop.episode = _first_observation(robot, adapter, config.patience)
        now = clock.now()
        inference.publish(now, now, loop.episode, loop.observation["state"][0], loop.observation)
        inference.wait_ready()
        priority = config.realtime_priority if isinstance(clock, MonotonicClock) else None
        with _signals(loop), _undisturbed(priority) as loop.report.scheduling:
            return loop.run()
    finally:
        try:
            if robot.is_connected:
                robot.disconnect()
        finally:
            inference.stop()


def bare_loop(period: float, seconds: float, tolerance: float = 0.1) -> dict[str, Any]:
    """A loop that only sleeps to absolute deadlines: the best that `time.sleep` does on this machine.

    Returns period_ms {p50, p99, max}, late_periods, missed_deadlines as DeployReport defines them, and ticks.
    """
    if not (period > 0 and seconds > 0):
        raise UserError(f"period {period} and seconds {seconds} must be positive")
    ticks = max(2, round(seconds / period))
    samples, late, missed = Samples(ticks), 0, 0
    previous = deadline = time.monotonic()
    for tick in range(ticks):
        rest = deadline - time.monotonic()
        if rest > 0:
            time.sleep(rest)
        now = time.monotonic()
        if tick:
            samples.add(now - previous)
        previous = now
        late += now - deadline > tolerance * period
        deadline += period
        if now >= deadline:
            skipped = int((now - deadline) / period) + 1
            missed += skipped
            deadline += (skipped - 1) * period
    return {"period_ms": samples.summary(1e3), "late_periods": late, "missed_deadlines": missed, "ticks": ticks}
