"""Closed-loop episodes and the metrics measured on what was executed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pilotwave.errors import UserError
from robots.barriers import Barrier
from robots.controller import Chunk, Controller, Observation
from robots.safety_filter import SafetyFilter
from robots.tasks.base import Task, TaskSpec, executed_margin

Metrics = dict[str, Any]


@dataclass
class Episodes:
    """What n episodes left behind, arrays (n,). first_reach: the step (from 1) at whose end the goal condition first
    held, 0 if never. latched: return with the reward of the first reach kept from then on to the horizon. margin: the
    smallest constraint margin, NaN without constraints."""

    seed: np.ndarray
    length: np.ndarray
    returns: np.ndarray
    latched: np.ndarray
    max_reward: np.ndarray
    first_reach: np.ndarray
    margin: np.ndarray
    final: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def success(self) -> np.ndarray:
        return self.first_reach > 0


def normalized(returns: np.ndarray, spec: TaskSpec) -> np.ndarray:
    """D4RL's normalized score: 0 a random, 100 an expert policy."""
    assert spec.reference is not None
    random, expert = spec.reference
    return 100.0 * (returns - random) / (expert - random)


SCORES: dict[str, Callable[[Episodes, TaskSpec], np.ndarray]] = {
    "success_rate": lambda episodes, spec: episodes.success.astype(np.float64),
    "max_reward": lambda episodes, spec: episodes.max_reward,
    "normalized_return": lambda episodes, spec: normalized(episodes.returns, spec),
    "safe_success_rate": lambda episodes, spec: (episodes.success & ~(episodes.margin < 0)).astype(np.float64),
}
"""`TaskSpec.score` -> score of each episode (n,); `score_mean` is their mean."""


class History:
    """The last To observations of n robots: each key (n, To, ...), the first observation repeated before the start."""

    def __init__(self, length: int, observation: Observation):
        self.length = length
        self.arrays = {key: np.repeat(value[:, None], length, axis=1) for key, value in observation.items()}

    def push(self, observation: Observation) -> None:
        """Append one observation and drop the oldest."""
        for key, value in observation.items():
            self.arrays[key] = np.concatenate([self.arrays[key][:, 1:], value[:, None]], axis=1)


class Decider:
    """Calls a controller when it is due, for the robots that still act, and turns its chunk into this step's actions."""

    def __init__(self, controller: Controller, spec: TaskSpec, observation: Observation, guard: SafetyFilter | None = None):
        self.controller, self.spec, self.guard = controller, spec, guard
        self.history = History(max(1, controller.history), observation)
        self.rows = np.arange(len(observation["state"]))  # the robots that are decided for
        self.chunk: Chunk | None = None
        self.decided = 0
        self.milliseconds: list[float] = []
        self.filtering: list[float] = []
        controller.reset(len(observation["state"]))
        if guard is not None:
            guard.reset(len(observation["state"]))

    def actions(self, step: int, again: bool = False) -> np.ndarray:
        """Actions (n, Da) at environment step `step`; `again` asks for a decision now."""
        every = self.controller.replan_every
        if self.chunk is None or again or (every > 0 and step - self.decided >= every):
            began = time.perf_counter()
            self.chunk = self._decide(step)
            self.milliseconds.append(1e3 * (time.perf_counter() - began))
            self.decided = step
        reference = self.controller.tracker.reference(self.chunk, (step - self.decided) * self.spec.dt)
        actions = self.controller.tracker.command(self.history.arrays["state"][:, -1], reference)
        if self.guard is None:
            return actions
        began = time.perf_counter()
        actions = self.guard({key: value[:, -1] for key, value in self.history.arrays.items()}, actions)
        self.filtering.append(1e3 * (time.perf_counter() - began))
        return actions

    def _decide(self, step: int) -> Chunk:
        """A chunk of all robots; those that no longer act have references of 0."""
        arrays, n = self.history.arrays, len(self.history.arrays["state"])
        if len(self.rows) == n:
            return self.controller.act(arrays, step)
        chunk = self.controller.act({key: value[self.rows] for key, value in arrays.items()}, step)

        def spread(part: np.ndarray) -> np.ndarray:
            whole = np.zeros((n, *part.shape[1:]), part.dtype)
            whole[self.rows] = part
            return whole

        return replace(chunk, references=spread(chunk.references), plan=None if chunk.plan is None else spread(chunk.plan))

    def leave_out(self, finished: np.ndarray) -> None:
        """Decide no longer for finished robots (n,) bool, where the controller can leave some out."""
        keep, kept = getattr(self.controller, "keep", None), np.flatnonzero(~finished[self.rows])
        if keep is not None and 0 < len(kept) < len(self.rows):
            keep(kept)
            self.rows = self.rows[kept]


def rollout(
    task: Task,
    controller: Controller,
    episodes: int,
    seed: int = 0,
    *,
    num_envs: int = 50,
    horizon: int | None = None,
    video: str | Path | None = None,
    video_episodes: int = 4,
    timing_decisions: int = 0,
    guard: SafetyFilter | None = None,
    barriers: Sequence[Barrier] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Metrics:
    """Run `episodes` episodes, `num_envs` at a time, and return the metrics of the contract, JSON-able.

    Episode i is reset with seed + i whatever the batching. horizon: steps an episode, the task's own by default. A
    batch ends early when all its episodes have terminated. decision_ms is measured around `controller.act` for the
    batch that it ran ("batch" says how many at once); with timing_decisions > 0 it comes from that many further
    decisions of one robot alone, after one that warms up. video: an .mp4 or .gif of the first `video_episodes`
    episodes. guard: filters the actions. barriers: what executed states are judged by beside the task's own. progress:
    called with (episodes done, episodes).
    """
    for name, value in {"episodes": episodes, "num_envs": num_envs, "horizon": horizon or task.spec.horizon}.items():
        if value < 1:
            raise UserError(f"{name}={value}; at least 1 is needed")
    steps = horizon or task.spec.horizon
    recorder = None
    if video is not None:
        from robots.video import Recorder

        recorder = Recorder(video, task, min(video_episodes, num_envs, episodes), controller)
    done: list[Episodes] = []
    milliseconds: list[float] = []
    filtering: list[float] = []
    guarded = np.zeros(3)
    batch = min(num_envs, episodes)
    for first in range(0, episodes, num_envs):
        seeds = range(seed + first, seed + min(first + num_envs, episodes))
        result, decider = run_batch(task, controller, seeds, steps, recorder, guard, barriers)
        if recorder is not None:
            recorder.close()
            recorder = None
        done.append(result)
        # a smaller last batch would mix two latencies
        milliseconds += decider.milliseconds if len(seeds) == batch else []
        filtering += decider.filtering if len(seeds) == batch else []
        if guard is not None:
            guarded += [guard.filtered.sum(), guard.changed.sum(), guard.infeasible.sum()]
        if progress is not None:
            progress(min(first + num_envs, episodes), episodes)
    if timing_decisions > 0:
        milliseconds, batch = time_decisions(task, controller, timing_decisions, seed, steps), 1
    metrics = summarize(done, task.spec)
    metrics |= {
        "task": task.spec.name,
        "task_options": task.spec.options,
        "episodes": episodes,
        "seed": seed,
        "horizon": steps,
        "evaluations": controller.evaluations,
        "decision_ms": latency(milliseconds) | {"batch": batch},
        "replan_every": controller.replan_every,
    }
    if guard is not None:
        metrics["filter"] = {
            "changed_rate": guarded[1] / guarded[0],
            "infeasible_steps": int(guarded[2]),
            "ms": latency(filtering) | {"batch": min(num_envs, episodes)},
        }
    if video is not None:
        metrics["video"] = str(video)
    return metrics


def run_batch(
    task: Task,
    controller: Controller,
    seeds: Sequence[int],
    steps: int,
    recorder: Any = None,
    guard: SafetyFilter | None = None,
    barriers: Sequence[Barrier] = (),
) -> tuple[Episodes, Decider]:
    """One batch of episodes: what they left, and what decided, with the milliseconds that it took."""
    observation = task.reset(seeds)
    decider = Decider(controller, task.spec, observation, guard)
    n = len(seeds)
    zeros = np.zeros(n)
    kept = Episodes(np.array(seeds), np.zeros(n, int), zeros.copy(), zeros.copy(), zeros - np.inf, np.zeros(n, int), zeros + np.nan)
    active, latch = np.ones(n, dtype=bool), np.zeros(n)
    again = False
    if recorder is not None:
        recorder.frame(None)
    for step in range(steps):
        actions = decider.actions(step, again)
        observation, reward, terminated, info = task.step(actions)
        decider.history.push(observation)
        # a controller that plans once plans anew when a goal has changed
        again = controller.replan_every == 0 and bool(np.any(info.get("new_goal", False)))
        reached = info["success"] & active & (kept.first_reach == 0)
        kept.first_reach[reached] = step + 1
        latch[reached] = reward[reached]
        kept.returns += reward * active
        kept.latched += np.where(kept.first_reach > 0, latch, reward) * (active | (kept.first_reach > 0))
        kept.max_reward = np.where(active, np.maximum(kept.max_reward, reward), kept.max_reward)
        kept.length += active
        margin = executed_margin(info, observation, barriers)
        if margin is not None:
            kept.margin = np.where(active, np.fmin(kept.margin, margin), kept.margin)
        for key in task.spec.final_info:
            kept.final[key] = np.where(active, info[key], kept.final.get(key, info[key]))
        if recorder is not None:
            recorder.frame(decider.chunk)
        active &= ~terminated
        if not active.any():
            break
        decider.leave_out(~active)
    remaining = steps - step - 1
    kept.latched += np.where(kept.first_reach > 0, latch * remaining, 0.0)
    return kept, decider


def time_decisions(task: Task, controller: Controller, decisions: int, seed: int, steps: int) -> list[float]:
    """Milliseconds of `decisions` closed-loop decisions of one robot alone, the first call left out as warm-up."""
    milliseconds: list[float] = []
    episode = 0
    while len(milliseconds) < decisions + 1:
        decider = Decider(controller, task.spec, task.reset([seed + episode]))
        episode += 1
        for step in range(steps):
            # forgetting, as before an episode, makes every decision a new plan instead of a look at the one in progress
            if step % (controller.replan_every or 10) == 0:
                controller.reset(1)
            # a controller that plans once is asked every 10 steps here, so that one episode gives many decisions
            actions = decider.actions(step, controller.replan_every == 0 and step % 10 == 0)
            if len(milliseconds) + len(decider.milliseconds) > decisions:
                break
            observation, _, terminated, _ = task.step(actions)
            decider.history.push(observation)
            if terminated.all():
                break
        milliseconds += decider.milliseconds
    return milliseconds[1 : decisions + 1]


def latency(milliseconds: Sequence[float]) -> dict[str, float | int]:
    """{p50, p99, max, decisions} of measured times."""
    times = np.array(milliseconds)
    p50, p99 = np.percentile(times, [50, 99])
    return {"p50": float(p50), "p99": float(p99), "max": float(times.max()), "decisions": len(times)}


def summarize(batches: Sequence[Episodes], spec: TaskSpec) -> Metrics:
    """The episode part of the metrics. Means over nothing (never reached, no constraints) are None."""
    names = ("seed", "length", "returns", "latched", "max_reward", "first_reach", "margin")
    final = {key: np.concatenate([batch.final[key] for batch in batches]) for key in spec.final_info}
    every = Episodes(**{name: np.concatenate([getattr(b, name) for b in batches]) for name in names}, final=final)
    score = SCORES[spec.score](every, spec)
    reached = every.first_reach[every.success]
    metrics: Metrics = {
        "score": spec.score,
        "score_mean": float(score.mean()),
        "score_std": float(score.std()),
        "success_rate": float(every.success.mean()),
        "return_mean": float(every.returns.mean()),
        "latched_return_mean": float(every.latched.mean()),
        "first_reach_steps_mean": float(reached.mean()) if len(reached) else None,
        "violations": None,
    }
    if spec.reference is not None:
        metrics["normalized_return_mean"] = float(normalized(every.returns, spec).mean())
        metrics["normalized_latched_return_mean"] = float(normalized(every.latched, spec).mean())
    if not np.isnan(every.margin).all():
        metrics["violations"] = {
            "episode_rate": float((every.margin < 0).mean()),
            "worst_margin": float(np.nanmin(every.margin)),
        }
    for key, value in final.items():
        metrics[f"{key}_mean"] = float(value.mean())
    metrics["per_episode"] = {
        "seed": every.seed.tolist(),
        "margin": [None if np.isnan(margin) else float(margin) for margin in every.margin],
        "score": score.tolist(),
        "success": every.success.tolist(),
        "return": every.returns.tolist(),
        "latched_return": every.latched.tolist(),
        "first_reach_steps": [int(step) or None for step in every.first_reach],
        "length": every.length.tolist(),
    } | {key: value.tolist() for key, value in final.items()}
    return metrics
