"""World models beside the simulator: the same start, the same actions, and the error of every imagined step.

The simulator is driven closed loop (by a demonstrator, a policy or a planner) or by recorded actions. The model sees the
start and the actions alone, open loop (Ding et al. 2024, section 4.2). Errors are divided by the deviation of the data that
the model learned from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pilotwave.errors import UserError
from world_models.base import WorldModel

if TYPE_CHECKING:
    from offline.store import TrajectoryStore

FRESH = 10_000_000
"""Added to seeds of the simulator: `robots.collect` counts up from its own seed, and training data is not to be met again."""
DIVERGED = 1.0
"""A roll-out whose error passes this many deviations of the data has diverged."""


@dataclass
class Recording:
    """What the simulator did in n episodes of T steps, after a lead of L observations whose last one is the start.

    lead (n, L, Do), lead_actions (n, L - 1, Da), actions (n, T, Da), observations (n, T, Do), rewards (n, T), valid (n, T):
    False after the step at which an episode ended.
    """

    lead: np.ndarray
    lead_actions: np.ndarray
    actions: np.ndarray
    observations: np.ndarray
    rewards: np.ndarray
    valid: np.ndarray


def record(task: Any, controller: Any, episodes: int, horizon: int, seed: int = 0, *, lead: int = 50) -> Recording:
    """Drive the simulator with a `robots.Controller`: `lead` steps, then the horizon that is to be imagined.

    Episode i is reset with FRESH + seed + i.
    """
    from robots.rollout import Decider

    observation = task.reset([FRESH + seed + i for i in range(episodes)])
    decider = Decider(controller, task.spec, observation)

    def act(observation: Mapping[str, np.ndarray], step: int) -> np.ndarray:
        if step:
            decider.history.push(dict(observation))
        return decider.actions(step)

    return _run(task, observation, act, np.full(episodes, lead), horizon)


def replay(task: Any, store: TrajectoryStore, episodes: int, horizon: int, seed: int = 0, *, lead: int = 1) -> Recording:
    """Play recorded episodes back: the simulator starts from an episode's first recorded state and gets its actions.

    Imagination begins at a random step, at least `lead` steps in, that leaves room for the horizon; where an episode is too
    short for that, it begins at once and the last action is held, for simulator and model alike. Episodes are drawn by
    `seed`, each once before one is drawn again.
    """
    rng = np.random.default_rng(seed)
    rounds = -(-episodes // store.episodes)
    drawn = np.concatenate([rng.permutation(store.episodes) for _ in range(rounds)])[:episodes]
    recorded = [store.episode(int(i)) for i in drawn]
    starts = np.array([int(rng.integers(lead, max(lead, len(e["action"]) - horizon) + 1)) for e in recorded])
    first = {name: np.stack([episode[name][0] for episode in recorded]) for name in recorded[0]}
    steps = np.arange(int(starts.max()) + horizon)
    actions = np.stack([episode["action"][np.minimum(steps, len(episode["action"]) - 1)] for episode in recorded])
    return _run(task, task.reset_recorded(first), lambda observation, step: actions[:, step], starts, horizon)


def _run(
    task: Any, observation: Mapping[str, np.ndarray], act: Callable[..., np.ndarray], starts: np.ndarray, horizon: int
) -> Recording:
    """All episodes side by side; episode i's imagination begins at its step starts[i]."""
    spec = task.spec
    states, actions, rewards, alive = [observation["state"]], [], [], [np.ones(len(starts), dtype=bool)]
    for step in range(int(starts.max()) + horizon):
        action = np.clip(act(observation, step), spec.action_low, spec.action_high).astype(np.float32)
        observation, reward, terminated, _ = task.step(action)
        state = observation["state"]
        earned = task.rewards(state)
        actions.append(action)
        states.append(state)
        rewards.append(reward if earned is None else earned)
        alive.append(~terminated)
    state, action, reward, going = (np.stack(each, axis=1) for each in (states, actions, rewards, alive))
    row, before = np.arange(len(starts))[:, None], starts[:, None] + np.arange(-int(starts.min()), 1)
    after = starts[:, None] + np.arange(horizon)
    return Recording(
        lead=state[row, before],
        lead_actions=action[row, before[:, :-1]],
        actions=action[row, after],
        observations=state[row, after + 1],
        rewards=reward[row, after],
        # the step at which an episode ends still counts
        valid=np.minimum.accumulate(going, axis=1)[row, after],
    )


def compare(model: WorldModel, recording: Recording, seed: int = 0) -> tuple[dict[str, Any], np.ndarray]:
    """One model on a recording: its metrics, and the imagined observations (n, T, Do).

    state_error: at each step the mean over episodes of the root mean square over features of (imagined - simulated) /
    deviation; reward_error: of |imagined - simulated| / deviation. A step that no episode reached is None.
    """
    began = time.perf_counter()
    imagined, rewards = model.rollout(recording.lead, recording.actions, recording.lead_actions, seed=seed)
    seconds = time.perf_counter() - began
    error = np.sqrt(np.mean(((imagined - recording.observations) / model.deviation.cpu().numpy()) ** 2, axis=-1))
    wrong = None if rewards is None else np.abs(rewards - recording.rewards) / float(model.reward_deviation)
    return {
        "state_error": _means(error, recording.valid),
        "reward_error": None if wrong is None else _means(wrong, recording.valid),
        "diverged_rate": float((~(error <= DIVERGED) & recording.valid).any(axis=1).mean()),
        "steps_per_second": error.size / seconds,
    }, imagined


def _means(values: np.ndarray, valid: np.ndarray) -> list[float | None]:
    count, total = valid.sum(axis=0), np.where(valid, values, 0.0).sum(axis=0)
    return [float(t / c) if c else None for t, c in zip(total, count)]


def below_from(errors: list[float | None], others: list[float | None]) -> int | None:
    """The first step (from 1) from which on `errors` stay below `others`, None where the last step is not below."""
    above = [step for step, (e, o) in enumerate(zip(errors, others), 1) if e is not None and o is not None and e >= o]
    first = max(above, default=0) + 1
    return first if first <= len(errors) else None


def dream(
    model: WorldModel,
    task: Any,
    episodes: int = 50,
    horizon: int = 100,
    seed: int = 0,
    *,
    actions: Any,
    lead: int | None = None,
    baseline: WorldModel | None = None,
    plot: str | Path | None = None,
    video: str | Path | None = None,
) -> dict[str, Any]:
    """Imagine `episodes` episodes of `horizon` steps beside the simulator; the metrics of the contract, JSON-able.

    actions: a `robots.Controller` that drives the simulator, or a TrajectoryStore whose episodes are played back.
    lead: steps of the simulator before imagination begins (50 with a controller; at least the models' history - 1).
    baseline: a second model for the same task, whose metrics go under "baseline". plot: PNG of the errors; video: simulator
    beside imagination, for the first two episodes.
    """
    models = [model] if baseline is None else [model, baseline]
    for each in models:
        if (each.spec.observation_dim, each.spec.action_dim) != (task.spec.observation_dim, task.spec.action_dim):
            raise UserError(f"a world model of {each.spec.task} cannot dream of {task.spec.name}; give a run of that task")
    least = max(1, *(each.h - 1 for each in models))
    recorded = hasattr(actions, "episode_ends")
    lead = max(least, (1 if recorded else 50) if lead is None else lead)
    recording = (replay if recorded else record)(task, actions, episodes, horizon, seed, lead=lead)
    results = [compare(each, recording, seed) for each in models]
    metrics = {
        "task": task.spec.name,
        "world_model": model.name,
        "episodes": episodes,
        "horizon": horizon,
        "seed": seed,
        "evaluations": model.evaluations,
        "steps_at_once": model.T,
        "actions": "recorded" if recorded else type(actions).__name__,
        **results[0][0],
    }
    if baseline is not None:
        metrics["baseline"] = {"world_model": baseline.name, **results[1][0]}
        metrics["below_baseline_from"] = below_from(metrics["state_error"], metrics["baseline"]["state_error"])
    names = [each.name.replace("_", " ") for each in models]
    if plot is not None:
        draw_errors(Path(plot), f"{task.spec.name}, {episodes} episodes", dict(zip(names, (r[0] for r in results))))
    if video is not None:
        draw_side_by_side(video, task, recording, dict(zip(names, (r[1] for r in results))))
    return metrics


def draw_errors(path: Path, title: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """The errors by step, a line for each model: state left, reward right where there is one."""
    from matplotlib.figure import Figure

    panels = [key for key in ("state_error", "reward_error") if any(result[key] for result in results.values())]
    figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
    for i, key in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for name, result in results.items():
            if result[key]:
                values = [np.nan if value is None else value for value in result[key]]
                axes.plot(np.arange(1, len(values) + 1), values, label=name)
        axes.set(xlabel="imagined step", ylabel=f"{key.replace('_', ' ')} (deviations of the data)", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_side_by_side(
    path: str | Path, task: Any, recording: Recording, imagined: Mapping[str, np.ndarray], episodes: int = 2
) -> None:
    """A video: a row an episode, the simulator on the left, each model's imagination beside it."""
    import cv2

    from robots.video import Writer, tile

    if task.draw(recording.observations[0, 0]) is None:
        raise UserError(f"no pictures can be drawn from observations of {task.spec.name}; leave video= out")
    episodes = min(episodes, len(recording.observations))
    rows = {"simulator": recording.observations, **imagined}
    every = max(1, round(1.0 / (25.0 * task.spec.dt)))
    writer = Writer(Path(path), max(1, round(1.0 / (task.spec.dt * every))))
    for step in range(0, recording.observations.shape[1], every):
        pictures: list[Any] = []
        for i in range(episodes):
            for name, observations in rows.items():
                picture = np.ascontiguousarray(task.draw(observations[i, step]))
                scale = 360 / picture.shape[0]
                picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
                cv2.putText(picture, name, (8, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (60, 60, 60), 1, cv2.LINE_AA)
                pictures.append(picture)
        writer.add(tile(pictures, columns=len(rows)))
    writer.close()
