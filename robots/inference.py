"""Inference in a process of its own, joined to the control loop by bounded shared memory that never blocks the loop.

The loop writes one observation a tick into a ring (the newest wins), the inference process reads the history its
controller wants, decides, and writes chunks into a second ring (the newest wins). Times are `time.monotonic`, common to
both sides. The controller is made in that process by a `Factory`, so whatever the learned side imports lives there
alone.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any, Protocol

import numpy as np

from pilotwave.errors import UserError
from robots.controller import Controller, Tracker

CHUNK_SLOTS = 4
_LOCK = threading.Lock()


def _fence() -> None:
    """Orders memory writes on every architecture: release, then acquire (a lone store may be seen early on ARM)."""
    with _LOCK:
        pass
    with _LOCK:
        pass


@dataclass(frozen=True)
class Factory:
    """A picklable recipe for a controller: `target` is "package.module:callable", called with plain arguments."""

    target: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> Controller:
        module, _, name = self.target.partition(":")
        try:
            make = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"no controller factory '{self.target}' ({error}); right is 'package.module:callable'"
            ) from None
        return make(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Pace:
    """When and from what to decide.

    step_seconds: length of one environment step as the controller was trained; stride: control ticks in it.
    replan: seconds between decisions; None: the controller's own `replan_every` (0: a new decision only for a new goal
    or episode, or when the chunk runs out). delay: artificial seconds added to every decision, for tests of slow
    planners.
    """

    step_seconds: float
    stride: int
    replan: float | None = None
    delay: float = 0.0


@dataclass(frozen=True)
class Hello:
    """What the inference process says about its controller."""

    history: int
    replan_every: int
    evaluations: int
    tracker: Tracker


@dataclass(frozen=True)
class Decision:
    """A chunk with its times, or the reason why there is none. references: (1, T, R) or None.

    stamp: when the observation was taken. due: time (of the motion clock) that the chunk's time 0 stands for.
    """

    stamp: float
    due: float
    episode: int
    seconds: float
    references: np.ndarray | None = None
    dt: float = 0.0
    start: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Layout:
    """Sizes of the two rings. shapes: of each observation key without batch axis; depth: observations kept."""

    shapes: Mapping[str, tuple[int, ...]]
    depth: int
    capacity: int = 1 << 16
    """Largest T * R of a chunk."""

    def header(self) -> np.dtype:
        names = [("observations", "i8"), ("chunks", "i8"), ("ready", "i8"), ("stop", "i8"), ("heartbeat", "f8")]
        return np.dtype(names, align=True)

    def observation(self) -> np.dtype:
        keys = [(f"x:{k}", "u1" if len(s) == 3 else "f4", tuple(s)) for k, s in self.shapes.items()]
        meta = [("stamp", "f8"), ("due", "f8"), ("episode", "i8"), ("first", "i8"), ("began", "f8")]
        return np.dtype([*meta, ("expected", "f4", tuple(self.shapes["state"])), *keys], align=True)

    def chunk(self) -> np.dtype:
        meta = [("stamp", "f8"), ("due", "f8"), ("episode", "i8"), ("seconds", "f8"), ("dt", "f8"), ("start", "f8")]
        size = [("steps", "i8"), ("width", "i8"), ("error", "S240"), ("data", "f4", (self.capacity,))]
        return np.dtype([*meta, *size], align=True)

    @property
    def nbytes(self) -> int:
        return 64 + self.depth * self.observation().itemsize + CHUNK_SLOTS * self.chunk().itemsize


class Channel:
    """Both rings over one buffer. One writer and one reader a ring; a reader sees a whole record or none."""

    def __init__(self, layout: Layout, buffer: Any) -> None:
        self.layout = layout
        self.header = np.frombuffer(buffer, layout.header(), count=1)
        self.slots = np.frombuffer(buffer, layout.observation(), count=layout.depth, offset=64)
        offset = 64 + layout.depth * layout.observation().itemsize
        self.chunks = np.frombuffer(buffer, layout.chunk(), count=CHUNK_SLOTS, offset=offset)
        # one view a field: indexing a record by name costs more than the copy
        self.fields = {name: self.slots[name] for name in self.slots.dtype.names or ()}
        self.count, self.chunk_count = self.header["observations"], self.header["chunks"]
        self.ready, self.stop, self.heartbeat = self.header["ready"], self.header["stop"], self.header["heartbeat"]

    def publish(
        self,
        stamp: float,
        due: float,
        episode: int,
        first: int,
        began: float,
        expected: np.ndarray,
        arrays: Mapping[str, np.ndarray],
    ) -> None:
        """Write one observation (arrays with leading axis 1); first, began: index and due of its episode's first."""
        i = int(self.count[0]) % self.layout.depth
        fields = self.fields
        fields["stamp"][i], fields["due"][i], fields["episode"][i], fields["first"][i] = stamp, due, episode, first
        fields["began"][i], fields["expected"][i] = began, expected
        for key, value in arrays.items():
            fields[f"x:{key}"][i] = value[0]
        _fence()
        self.count[0] += 1

    def newest(self) -> tuple[float, int, np.ndarray | None] | None:
        """Stamp, episode and goal of the newest observation; None before the first."""
        count = int(self.count[0])
        if count == 0:
            return None
        i = (count - 1) % self.layout.depth
        goal = self.fields["x:goal"][i].copy() if "goal" in self.layout.shapes else None
        return float(self.fields["stamp"][i]), int(self.fields["episode"][i]), goal

    def history(self, length: int, stride: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Key -> (1, length, ...): the newest, `stride` apart, padded with the first of the episode; and times."""
        while True:
            count = int(self.count[0])
            newest = count - 1
            first = int(self.fields["first"][newest % self.layout.depth])
            wanted = [max(newest - k * stride, first, 0) for k in range(length - 1, -1, -1)]
            rows = np.array(wanted) % self.layout.depth
            arrays = {key: self.fields[f"x:{key}"][rows][None] for key in self.layout.shapes}
            last = rows[-1]
            meta = {key: self.fields[key][last].copy() for key in ("stamp", "due", "episode", "began", "expected")}
            _fence()
            if int(self.count[0]) - wanted[0] < self.layout.depth:  # else the writer came round while we copied
                return arrays, meta

    def answer(self, decision: Decision) -> None:
        """Write one decision."""
        slot = self.chunks[int(self.chunk_count[0]) % CHUNK_SLOTS]
        for name in ("stamp", "due", "episode", "seconds", "dt", "start"):
            slot[name] = getattr(decision, name)
        references, error = decision.references, decision.error
        if references is not None and references.size > self.layout.capacity:
            references, error = None, f"a chunk of {decision.references.shape} exceeds {self.layout.capacity} numbers"  # type: ignore[union-attr]
        slot["steps"], slot["width"] = references.shape[1:] if references is not None else (0, 0)
        slot["error"] = error.encode("utf-8", "replace")[:240]
        if references is not None:
            slot["data"][: references.size] = references.reshape(-1)
        _fence()
        self.chunk_count[0] += 1

    def decision(self, seen: int) -> tuple[Decision | None, int]:
        """The newest decision if more than `seen` were made, and how many were made."""
        count = int(self.chunk_count[0])
        if count == seen:
            return None, seen
        slot = self.chunks[(count - 1) % CHUNK_SLOTS]
        steps, width, error = int(slot["steps"]), int(slot["width"]), bytes(slot["error"]).decode("utf-8", "replace")
        references = slot["data"][: steps * width].reshape(1, steps, width).copy() if not error else None
        stamp, due, seconds = float(slot["stamp"]), float(slot["due"]), float(slot["seconds"])
        answer = Decision(
            stamp, due, int(slot["episode"]), seconds, references, float(slot["dt"]), float(slot["start"]), error
        )
        _fence()
        if int(self.chunk_count[0]) - (count - 1) >= CHUNK_SLOTS:  # overwritten while we copied: a newer one is there
            return self.decision(seen)
        return answer, count


class Decider:
    """Runs a controller on what the channel holds: decides when a decision is due, builds the history, calls `act`."""

    def __init__(self, controller: Controller, channel: Channel, pace: Pace, after: float = -np.inf) -> None:
        self.controller, self.channel, self.pace = controller, channel, pace
        self.stamp = after  # of the last observation used; only newer ones count
        self._episode: int | None = None
        self._goal: np.ndarray = np.empty(0)
        self._next = -np.inf

    def due(self) -> bool:
        """Whether the newest observation asks for a decision."""
        newest = self.channel.newest()
        if newest is None:
            return False
        stamp, episode, goal = newest
        if stamp <= self.stamp:
            return False
        return (
            episode != self._episode
            or stamp >= self._next
            or (goal is not None and not np.array_equal(goal, self._goal))
        )

    def decide(self) -> Decision:
        """One decision from the newest observations; what the controller raises is reported in it, not raised."""
        begun = time.perf_counter()
        arrays, meta = self.channel.history(self.controller.history, self.pace.stride)
        stamp, due, episode = float(meta["stamp"]), float(meta["due"]), int(meta["episode"])
        if episode != self._episode:
            self.controller.reset(1)
        self._episode = episode
        self._goal = arrays["goal"][0, -1].copy() if "goal" in arrays else np.empty(0)
        if self.controller.history == 1:
            arrays["state"][0, -1] = meta["expected"]
        replan = self.controller.replan_every * self.pace.step_seconds if self.pace.replan is None else self.pace.replan
        references, dt, start, error, lasts = None, 0.0, 0.0, "", replan
        try:
            step = round((due - float(meta["began"])) / self.pace.step_seconds)
            chunk = self.controller.act(arrays, step)
            references, dt, start = np.asarray(chunk.references, dtype=np.float32), float(chunk.dt), float(chunk.start)
            if references.ndim != 3 or len(references) != 1 or references.size == 0:
                raise ValueError(f"chunk has shape {references.shape}; right is (1, T, R)")
            duration = start + references.shape[1] * dt
            once = self.pace.replan is None and self.controller.replan_every == 0
            lasts = duration if once else min(replan, duration)
        except Exception as problem:  # the loop holds its plan and counts; the process lives on
            references, error = None, f"{type(problem).__name__}: {problem}"
        if self.pace.delay:
            time.sleep(self.pace.delay)
        self.stamp, self._next = stamp, stamp + lasts
        return Decision(stamp, due, episode, time.perf_counter() - begun, references, dt, start, error)


class Inference(Protocol):
    """What the loop needs of the deciding side. Only `start` and `stop` may take long; the rest never blocks."""

    def start(self, shapes: Mapping[str, tuple[int, ...]], pace: Pace) -> Hello: ...
    def wait_ready(self) -> None: ...
    def publish(
        self, stamp: float, due: float, episode: int, expected: np.ndarray, arrays: Mapping[str, np.ndarray]
    ) -> None: ...
    def latest(self) -> Decision | None: ...
    def problem(self, now: float) -> str | None: ...
    def restart(self) -> None: ...
    def stop(self) -> None: ...


class _Publisher:
    """The loop's side of a channel."""

    channel: Channel
    _seen = 0
    _first = 0
    _began = 0.0
    _episode: int | None = None

    def publish(
        self, stamp: float, due: float, episode: int, expected: np.ndarray, arrays: Mapping[str, np.ndarray]
    ) -> None:
        if episode != self._episode:
            self._episode, self._first, self._began = episode, int(self.channel.count[0]), due
        self.channel.publish(stamp, due, episode, self._first, self._began, expected, arrays)

    def latest(self) -> Decision | None:
        decision, self._seen = self.channel.decision(self._seen)
        return decision


def _layout(shapes: Mapping[str, tuple[int, ...]], history: int, stride: int) -> Layout:
    # 16 spare slots: a reader may take that many ticks to copy before it must read again
    return Layout(dict(shapes), (history - 1) * stride + 1 + 16)


class InlineInference(_Publisher):
    """The same decisions without a process, on the loop's clock: a decision made at t is seen from t + latency on.

    For exact tests and dry runs. latency: seconds, or a function from the decision's number to seconds.
    """

    def __init__(
        self, controller: Controller, now: Callable[[], float], latency: float | Callable[[int], float] = 0.0
    ) -> None:
        self.controller, self._now = controller, now
        self.latency = latency if callable(latency) else lambda _: latency  # type: ignore[return-value]
        self._made = 0
        self._pending: tuple[float, Decision] | None = None
        self.failure: str | None = None

    def start(self, shapes: Mapping[str, tuple[int, ...]], pace: Pace) -> Hello:
        c = self.controller
        layout = _layout(shapes, c.history, pace.stride)
        self.channel = Channel(layout, bytearray(layout.nbytes))
        self._decider = Decider(c, self.channel, pace)
        c.reset(1)
        return Hello(c.history, c.replan_every, c.evaluations, c.tracker)

    def wait_ready(self) -> None:
        """Ready at once."""

    def publish(
        self, stamp: float, due: float, episode: int, expected: np.ndarray, arrays: Mapping[str, np.ndarray]
    ) -> None:
        super().publish(stamp, due, episode, expected, arrays)
        if self._pending is None and self._decider.due():
            self._pending = (self._now() + self.latency(self._made), self._decider.decide())
            self._made += 1

    def latest(self) -> Decision | None:
        if self._pending is not None and self._now() >= self._pending[0]:
            self.channel.answer(self._pending[1])
            self._pending = None
        return super().latest()

    def problem(self, now: float) -> str | None:
        return self.failure

    def restart(self) -> None:
        self.failure = self._pending = None

    def stop(self) -> None:
        """Nothing to stop."""


class InferenceProcess(_Publisher):
    """A spawned process that makes its controller with `factory` and answers through shared memory.

    stall_seconds: a decision that takes longer counts as a fault. threads: of the numerical libraries there, unless the
    factory sets its own. niceness: added there, so that the control loop goes first. Raises UserError when the
    controller cannot be made.
    """

    def __init__(
        self,
        factory: Factory,
        *,
        stall_seconds: float = 10.0,
        startup_seconds: float = 180.0,
        threads: int = 1,
        niceness: int = 5,
    ) -> None:
        self.factory, self.stall_seconds, self.startup_seconds = factory, stall_seconds, startup_seconds
        self.threads, self.niceness = threads, niceness
        self._context = multiprocessing.get_context("spawn")
        self._memory: SharedMemory | None = None
        self._process: Any = None
        self._restarting: threading.Thread | None = None
        self._failure: str | None = None

    @property
    def pid(self) -> int:
        """The process id, after `start`."""
        return self._process.pid

    def start(self, shapes: Mapping[str, tuple[int, ...]], pace: Pace) -> Hello:
        self._pace = pace
        hello = self._spawn()
        layout = _layout(shapes, hello.history, pace.stride)
        self._memory = SharedMemory(create=True, size=layout.nbytes)
        self.channel = Channel(layout, self._memory.buf)
        self._attach()
        return hello

    def _spawn(self) -> Hello:
        """Start the process and hear what its controller is like."""
        self._pipe, theirs = self._context.Pipe()
        arguments = (self.factory, theirs, os.getpid(), self.niceness)
        self._process = self._context.Process(target=_serve, args=arguments, daemon=True, name="pilotwave-inference")
        # read when numerical libraries load, which may be before the first line of _serve
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(self.threads))
        before = {key: os.environ.get(key) for key in limits}
        os.environ.update(limits)
        try:
            self._process.start()
        finally:
            for key, value in before.items():
                os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)
        theirs.close()
        try:
            if not self._pipe.poll(self.startup_seconds):
                raise UserError(f"the controller was not ready within {self.startup_seconds:g} s (startup_seconds)")
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(1.0)
            raise RuntimeError(
                f"the inference process died while starting (exit code {self._process.exitcode})"
            ) from None
        except UserError:
            self._process.kill()
            raise
        if kind != "hello":
            self._process.join(1.0)
            raise UserError(value) if kind == "user" else RuntimeError(f"the controller could not be made: {value}")
        return value

    def _attach(self) -> None:
        assert self._memory is not None
        self.channel.ready[0] = 0
        self.channel.heartbeat[0] = time.monotonic()
        self._pipe.send((self._memory.name, self.channel.layout, self._pace))

    def wait_ready(self) -> None:
        """Wait until the controller has decided once from the published observation (warm-up)."""
        deadline = time.monotonic() + self.startup_seconds
        while not self.channel.ready[0]:
            if not self._process.is_alive():
                said = self._pipe.recv()[1] if self._pipe.poll(0) else f"exit code {self._process.exitcode}"
                raise RuntimeError(f"the inference process died in its warm-up ({said})")
            if time.monotonic() > deadline:
                raise UserError(
                    f"the controller's first decision took over {self.startup_seconds:g} s (startup_seconds)"
                )
            time.sleep(0.002)

    def problem(self, now: float) -> str | None:
        """Why no decisions will come: the process died, could not restart, or is stuck; None when all is well."""
        if self._restarting is not None:
            if self._restarting.is_alive():
                return None
            self._restarting = None
            if self._failure is not None:
                return f"restart failed: {self._failure}"
        if not self._process.is_alive():
            return f"inference process died (exit code {self._process.exitcode})"
        silent = now - float(self.channel.heartbeat[0])
        return f"no decision for {silent:.1f} s" if silent > self.stall_seconds else None

    def restart(self) -> None:
        """Start a fresh process on the same channel, in the background."""

        def work() -> None:
            try:
                self._process.kill()
                self._process.join()
                self._spawn()
                self._attach()
                self.wait_ready()
            except (UserError, RuntimeError, OSError) as error:
                self._failure = str(error)

        self._failure = None
        self._restarting = threading.Thread(target=work, daemon=True)
        self._restarting.start()

    def stop(self) -> None:
        if self._restarting is not None:
            self._restarting.join(1.0)
        if self._process is not None:
            if self._memory is not None:
                self.channel.stop[0] = 1
                self._process.join(0.5)
            self._process.kill()  # it keeps nothing that a kill could damage
            self._process.join()
            self._process.close()
            self._pipe.close()
            self._process = None
        if self._memory is not None:
            del self.channel
            self._memory.unlink()
            with contextlib.suppress(BufferError):  # a view still referenced somewhere: the memory goes with it
                self._memory.close()
            self._memory = None


def _serve(factory: Factory, pipe: Connection, parent: int, niceness: int) -> None:
    """The inference process."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C reaches the whole group; the loop decides when we stop
        signal.signal(number, signal.SIG_IGN)
    os.nice(niceness)
    try:
        controller = factory()
        pipe.send(
            ("hello", Hello(controller.history, controller.replan_every, controller.evaluations, controller.tracker))
        )
        name, layout, pace = pipe.recv()
    except EOFError:
        return
    except UserError as error:
        pipe.send(("user", str(error)))
        return
    except Exception as error:
        traceback.print_exc()
        pipe.send(("error", f"{type(error).__name__}: {error}"))
        return
    memory = SharedMemory(name)
    channel = Channel(layout, memory.buf)
    decider = Decider(controller, channel, pace)
    while os.getppid() == parent and not channel.stop[0]:
        channel.heartbeat[0] = time.monotonic()
        if not decider.due():
            time.sleep(0.002)
        elif channel.ready[0]:
            channel.answer(decider.decide())
        else:  # warm-up: first calls allocate and compile; its decision would be stale
            warm_up = decider.decide()
            if warm_up.error:
                pipe.send(("error", f"its first decision failed: {warm_up.error}"))
                break
            decider = Decider(controller, channel, pace, warm_up.stamp)
            channel.heartbeat[0] = time.monotonic()
            channel.ready[0] = 1
    os._exit(0)  # no interpreter shutdown: views of the shared memory are still alive, and nothing needs saving
