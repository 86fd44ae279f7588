"""World models beside the simulator: the same start, the same actions, and the error of every imagined step.

The simulator is driven closed loop (by a demonstrator or a policy) or by recorded actions; the model sees the start and
the actions alone, open loop, as in Ding et al. 2024, section 4.2. Errors are divided by the deviation of the training data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pilotwave.errors import UserError
from world_models.base import WorldModel

if TYPE_CHECKING:
    from offline.store import TrajectoryStore


@dataclass
class Recording:
    """What the simulator did in n episodes of T steps, after a lead of L observations whose last one is the start.

    lead (n, L, Do), lead_actions (n, L - 1, Da), actions (n, T, Da), observations (n, T, Do), rewards (n, T) or None,
    valid (n, T): False from the step after an episode's end on.
    """

    lead: np.ndarray
    lead_actions: np.ndarray
    actions: np.ndarray
    observations: np.ndarray
    rewards: np.ndarray | None
    valid: np.ndarray


def record(task: Any, controller: Any, episodes: int, horizon: int, seed: int = 0, *, lead: int = 50) -> Recording:
    """Drive the simulator with a `robots.Controller`: `lead` steps, then the horizon that is to be imagined."""
    from robots.rollout import Decider

    decider = None

    def act(observation: Mapping[str, np.ndarray], step: int) -> np.ndarray:
        nonlocal decider
        if decider is None:
            decider = Decider(controller, task.spec, dict(observation))
        else:
            decider.history.push(dict(observation))
        return decider.actions(step)

    observation = task.reset([seed + i for i in range(episodes)])
    return _run(task, observation, act, np.full(episodes, lead), horizon)


def replay(task: Any, store: TrajectoryStore, episodes: int, horizon: int, seed: int = 0, *, lead: int = 2) -> Recording:
    """Play recorded episodes back: the simulator starts each from its first recorded state, at rest, and gets the
    recorded actions. Imagination begins at a random step that leaves room for the horizon; where an episode is too
    short, its last action is held (in both).

    Episodes are drawn by `seed`, each once before one is drawn again.
    """
    rng = np.random.default_rng(seed)
    rounds = -(-episodes // store.episodes)
    drawn = np.concatenate([rng.permutation(store.episodes) for _ in range(rounds)])[:episodes]
    recorded = [store.episode(int(i)) for i in drawn]
    room = np.array([len(episode["action"]) - horizon for episode in recorded])
    starts = np.array([int(rng.integers(lead - 1, max(lead, r + 1))) for r in room])
    first = {name: np.stack([episode[name][0] for episode in recorded]) for name in recorded[0]}
    length = int(starts.max()) + horizon
    actions = np.stack([episode["action"][np.minimum(np.arange(length), len(episode["action"]) - 1)] for episode in recorded])
    return _run(task, task.reset_recorded(first), lambda observation, step: actions[:, step], starts, horizon)


def _run(
    task: Any, observation: Mapping[str, np.ndarray], act: Callable[..., np.ndarray], starts: np.ndarray, horizon: int
) -> Recording:
    """All episodes step by step; episode i's imagination begins at its step starts[i]."""
    total = int(starts.max()) + horizon
    low, high = task.spec.action_low, task.spec.action_high
    states, actions, alive = [observation["state"]], [], [np.ones(len(starts), dtype=bool)]
    for step in range(total):
        action = np.clip(act(observation, step), low, high).astype(np.float32)
        observation, _, terminated, _ = task.step(action)
        actions.append(action)
        states.append(observation["state"])
        # the step at which an episode ends still counts
        alive.append(alive[-1] & ~terminated)
    state, action, going = (np.stack(each, axis=1) for each in (states, actions, alive))
    row, lead = np.arange(len(starts))[:, None], int(starts.min()) + 1
    before = starts[:, None] + np.arange(1 - lead, 1)
    after = starts[:, None] + np.arange(horizon)
    observations = state[row, after + 1]
    return Recording(
        state[row, before], action[row, before[:, :-1]], action[row, after], observations,
        task.rewards(observations.reshape(-1, observations.shape[-1]), )if False else _rewards(task, observations),
        going[row, after],
    )


def _rewards(task: Any, observations: np.ndarray) -> np.ndarray | None:
    r = task.rewards(observations.reshape(-1, observations.shape[-1]))
    return None if r is None else r.reshape(observations.shape[:2])


def compare(model: WorldModel, recording: Recording, seed: int = 0) -> tuple[dict[str, Any], np.ndarray]:
    """One model on a recording: its metrics, and the imagined observations (n, T, Do)."""
    began = time.perf_counter()
    imagined, rewards = model.rollout(recording.lead, recording.actions, recording.lead_actions, seed=seed)
    seconds = time.perf_counter() - began
    deviation = model.deviation.cpu().numpy()
    error = np.sqrt(np.mean(((imagined - recording.observations) / deviation) ** 2, axis=-1))
    error = np.where(np.isfinite(error), error, np.inf)
    metrics: dict[str, Any] = {
        "state_error": _mean(error, recording.valid),
        "reward_error": None,
        "diverged_rate": float(((error > 1) & recording.valid).any(axis=1).mean()),
        "steps_per_second": float(error.size / seconds),
    }
    if rewards is not None and recording.rewards is not None:
        difference = np.abs(rewards - recording.rewards) / float(model.reward_deviation)
        metrics["reward_error"] = _mean(difference, recording.valid)
    return metrics, imagined


def _mean(values: np.ndarray, valid: np.ndarray) -> list[float | None]:
    count = valid.sum(axis=0)
    total = np.where(valid, values, 0.0).sum(axis=0)
    return [float(t / c) if c else None for t, c in zip(total, count)]
