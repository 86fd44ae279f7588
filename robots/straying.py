"""How far robots stray from the paths of their plans, measured in closed loop. NumPy only."""

from __future__ import annotations

import numpy as np

from pilotwave.errors import UserError
from robots.controller import Controller, FloatArray
from robots.rollout import Decider
from robots.tasks.base import Task


def distance(points: FloatArray, paths: FloatArray) -> FloatArray:
    """From points (n, d) to the nearest places of paths (n, P, d) of P - 1 segments, in their unit: (n,)."""
    start, along = paths[:, :-1], np.diff(paths, axis=1)
    gap = points[:, None] - start
    share = ((gap * along).sum(-1) / np.maximum((along * along).sum(-1), 1e-12)).clip(0, 1)
    return np.linalg.norm(gap - share[..., None] * along, axis=-1).min(1)


def straying(task: Task, controller: Controller, episodes: int, seed: int = 0) -> FloatArray:
    """Metres between robots and the paths of their plans (not where on them they should be by then), of every step of every
    robot until its goal is reached, in one batch; episode i resets with seed + i. UserError where plans are no paths."""
    observation = task.reset(range(seed, seed + episodes))
    decider = Decider(controller, task.spec, observation)
    going, strayed = np.ones(episodes, dtype=bool), []
    for step in range(task.spec.horizon):
        observation, _, terminated, info = task.step(decider.actions(step))
        decider.history.push(observation)
        going &= ~(info["success"] | terminated)
        if not going.any():
            break
        if decider.chunk is None or decider.chunk.plan is None:
            raise UserError(f"what drives {task.spec.name} here plans no paths to stray from; give a planner of a maze")
        path = decider.chunk.plan
        strayed.append(distance(observation["state"][:, : path.shape[-1]], path)[going])
    if not strayed:
        raise UserError(f"no robot of {task.spec.name} was on its way for a step; give more episodes")
    return np.concatenate(strayed)
