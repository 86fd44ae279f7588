"""A planner as robots see it: observations and goals in, timed references of the best plan out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from offline.hardware import has_bf16
from pilotwave.errors import UserError, nearest
from planners.plan import Plan
from robots import Chunk, DirectTracker, PDTracker


def _states(plan: Plan) -> np.ndarray:
    return plan.observations[:, 0]


def _actions(plan: Plan) -> np.ndarray:
    if plan.actions is None:
        raise UserError("this planner plans states only; track them with controller.track=pd")
    return plan.actions[:, 0]


def overlaid(control: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """A config's `control` with what a call gives in its place (None: nothing)."""
    return {**control, **{key: value for key, value in given.items() if value is not None}}


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
REFERENCES: dict[str, Callable[[Plan], np.ndarray]] = {"pd": _states, "actions": _actions}


class PlanController:
    """Plans, and tracks the best of `samples` plans.

    A decision falls due every `replan_every` steps (0: once an episode). At a decision a robot gets a new plan; with
    `deviation` set, only a robot that is further than this from where its plan has it, whose plan ran out away from
    its goal, or whose goal has moved: the others go on, since a plan that works is worth more than a new one. The
    references are states tracked by a PD law with gains kp and kd, read `lookahead` seconds ahead, or the planned
    actions themselves. options: what `planner.plan` takes besides. evaluations: network calls a decision, the
    sampler's where None. precision: with bf16, networks compute in it where the hardware does, all but what judges plans
    and what turns them into actions; fp32 is the default. The noise comes from `seed`, so roll-outs repeat.
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
        deviation: float | None = None,
        options: Mapping[str, Any] | None = None,
        evaluations: int | None = None,
        precision: str = "fp32",
        seed: int = 0,
    ) -> None:
        if track not in REFERENCES:
            raise nearest("controller.track", track, REFERENCES)
        if precision not in PRECISIONS:
            raise nearest("control.precision", precision, PRECISIONS)
        self.dtype = PRECISIONS[precision]
        self.planner, self.sampler, self.samples, self.options = planner, dict(sampler), samples, dict(options or {})
        self.replan_every, self.history, self.deviation = replan_every, 1, deviation
        self.evaluations = planner.table(sampler).evaluations if evaluations is None else evaluations
        self.references = REFERENCES[track]
        self.dt = planner.stride * task_spec.dt
        self.goal_dim = planner.spec.goal_dim
        p = self.goal_dim or planner.spec.observation_dim // 2
        pd = PDTracker(kp, kd, slice(0, p), slice(p, 2 * p), task_spec.action_low, task_spec.action_high, lookahead=lookahead)
        self.tracker = {"pd": pd, "actions": DirectTracker()}[track]
        self.generator = torch.Generator().manual_seed(seed)
        self.reset(0)

    def reset(self, n: int) -> None:
        """Forget the plans in progress."""
        self.plan: Plan | None = None
        self.begun = np.zeros(n, dtype=np.int64)
        self.goals = np.zeros((n, self.goal_dim))

    def keep(self, rows: np.ndarray) -> None:
        """Go on with these of the robots alone."""
        self.begun, self.goals = self.begun[rows], self.goals[rows]
        if self.plan is not None:
            actions = None if self.plan.actions is None else self.plan.actions[rows]
            self.plan = Plan(self.plan.observations[rows], actions, self.plan.values[rows])

    def act(self, history: Mapping[str, np.ndarray], step: int) -> Chunk:
        """history: "state" (n, 1, Do), "goal" (n, 1, Dg) where the task has goals -> the references of n plans."""
        state = history["state"][:, -1]
        goal = history["goal"][:, -1] if "goal" in history else None
        renew = self._renew(state, goal, step)
        if renew.any():
            chosen = goal[renew] if goal is not None else None
            given = {"sampler": self.sampler, "generator": self.generator, **self.options}
            with self._computing():
                plan = self.planner.plan(state[renew], chosen, self.samples, **given)
            self._keep(plan, renew)
            self.begun[renew] = step
            if goal is not None:
                self.goals[renew] = goal[renew]
        assert self.plan is not None
        references = self._from_now(self.references(self.plan), step)
        path = self.plan.observations[:, 0, :, :2] if self.goal_dim else None
        return Chunk(references, dt=self.dt, plan=path)

    def _computing(self) -> AbstractContextManager[object]:
        """The precision of the networks."""
        if self.dtype == torch.float32:
            return nullcontext()
        device = next(self.planner.parameters()).device
        return torch.autocast(device.type, self.dtype, enabled=has_bf16(device))  # emulated, it is slower than float32

    def _renew(self, state: np.ndarray, goal: np.ndarray | None, step: int) -> np.ndarray:
        """Which robots (n,) get a new plan now."""
        n = len(state)
        if self.plan is None or len(self.begun) != n:
            self.reset(n)
            return np.ones(n, dtype=bool)
        if self.deviation is None or goal is None:
            return np.ones(n, dtype=bool)
        due = self._from_now(_states(self.plan), step)[:, 0]
        lost = np.linalg.norm(state[:, : self.goal_dim] - due[:, : self.goal_dim], axis=1) > self.deviation
        over = step - self.begun >= (self.planner.H - 1) * self.planner.stride
        away = np.linalg.norm(state[:, : self.goal_dim] - goal, axis=1) > self.deviation
        return lost | (over & away) | (goal != self.goals).any(axis=1)

    def _keep(self, plan: Plan, renew: np.ndarray) -> None:
        """The renewed robots' best plans, beside the plans in progress of the others."""
        actions = None if plan.actions is None else plan.actions[:, :1]
        best = Plan(plan.observations[:, :1], actions, plan.values[:, :1])
        if self.plan is None or renew.all():
            self.plan = best
            return
        self.plan.observations[renew], self.plan.values[renew] = best.observations, best.values
        if self.plan.actions is not None:
            self.plan.actions[renew] = best.actions

    def _from_now(self, references: np.ndarray, step: int) -> np.ndarray:
        """References (n, H, R) of plans begun at `begun`, as they stand `step - begun` environment steps later."""
        last = references.shape[1] - 1
        at = np.clip((step - self.begun)[:, None] / self.planner.stride + np.arange(last + 1), 0, last)
        low = np.minimum(at.astype(np.int64), last - 1)
        rows, w = np.arange(len(references))[:, None], (at - low)[..., None].astype(references.dtype)
        return (1 - w) * references[rows, low] + w * references[rows, low + 1]


def refuse_unheld(methods: str, **settings: Any) -> None:
    """Raises `UserError` for a setting of safety that is given without a method (of `methods`) which would hold it."""
    given = [f"controller.{key}" for key, value in settings.items() if value]
    if given:
        raise UserError(f"{' and '.join(given)}: nothing holds it without controller.safety={methods}")
