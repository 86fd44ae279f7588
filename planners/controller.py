"""A planner as robots see it: observations and goals in, timed references of the best plan out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from pilotwave.errors import UserError, nearest
from planners.plan import Plan
from robots import Chunk, DirectTracker, PDTracker


def _states(plan: Plan) -> np.ndarray:
    return plan.observations[:, 0]


def _actions(plan: Plan) -> np.ndarray:
    if plan.actions is None:
        raise UserError("this planner plans states only; track them with controller.track=pd")
    return plan.actions[:, 0]


REFERENCES: dict[str, Callable[[Plan], np.ndarray]] = {"pd": _states, "actions": _actions}


class PlanController:
    """Plans every `replan_every` steps (0: once an episode) and tracks the best of `samples` plans.

    The references are states tracked by a PD law with gains kp and kd, read `lookahead` seconds ahead, or the planned
    actions themselves. The noise comes from `seed`, so roll-outs repeat.
    """

    def __init__(
        self,
        planner: Any,
        task_spec: Any,
        sampler: Mapping[str, Any],
        *,
        replan_every: int,
        samples: int,
        track: str,
        kp: float,
        kd: float,
        lookahead: float = 0.0,
        seed: int = 0,
    ) -> None:
        if track not in REFERENCES:
            raise nearest("controller.track", track, REFERENCES)
        self.planner, self.sampler, self.samples = planner, dict(sampler), samples
        self.replan_every, self.history = replan_every, 1
        self.evaluations = planner.table(sampler).evaluations
        self.references = REFERENCES[track]
        self.dt = planner.stride * task_spec.dt
        p = planner.spec.goal_dim or planner.spec.observation_dim // 2
        pd = PDTracker(
            kp, kd, slice(0, p), slice(p, 2 * p), task_spec.action_low, task_spec.action_high, lookahead=lookahead
        )
        self.tracker = {"pd": pd, "actions": DirectTracker()}[track]
        self.generator = torch.Generator().manual_seed(seed)

    def reset(self, n: int) -> None:
        """Every plan starts from the observation alone."""

    def act(self, history: Mapping[str, np.ndarray], step: int) -> Chunk:
        """history: "state" (n, 1, Do), "goal" (n, 1, Dg) where the task has goals -> the references of n plans."""
        goal = history["goal"][:, -1] if "goal" in history else None
        plan = self.planner.plan(
            history["state"][:, -1], goal, self.samples, sampler=self.sampler, generator=self.generator
        )
        path = plan.observations[:, 0, :, :2] if goal is not None else None
        return Chunk(self.references(plan), dt=self.dt, plan=path)
