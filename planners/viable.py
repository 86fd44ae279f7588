"""Plans without goals that keep to barriers: candidates corrected through a learned model, and judged again.

For planners of states and actions whose robots move through contacts, such as hoppers under a roof. SafeDiffuser's projection
moves planned states alone (`planners.safe`), which a path tracker then follows; but no action makes a robot's height or speed
what one likes, and inverse dynamics asked for such states answers with any. So of each candidate (s_0, a_0, s_1, a_1, ..)

    s'_(k+1) = s'_k + f(s'_k) + G(s'_k) a'_k,      a'_k the action of least consequence near a_k with h(s'_(k+1)) >= margin

with the model, the barrier h at the peak of a rise and the least consequence of `robots.peak_filter`. A candidate that needs
no correction in what is carried out before the next decision stays as it was drawn. The planner then values all by its own
measure, what a correction makes of a plan included, and takes the best viable one: from which, by h, the robot can go on as
recorded ones did and not break the barrier. Those without an allowed action rank behind all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pilotwave.errors import UserError
from planners.controller import PlanController
from planners.diffuser import UNSAFE
from planners.plan import Plan
from robots.barriers import Barrier, build
from robots.peak_filter import PeakFilter, for_task

# metres a second from which plans look at the peak, by task: earlier, what the data went on to do is not decided. Else the filter's
RISING = {"hopper": 1.6}


class ViablePlanner:
    """A planner's plans, corrected. planner: with `plan` to states and actions a step apart, and `judge` of these. ahead: how
    many of the actions are carried out."""

    def __init__(self, planner: Any, filter: PeakFilter, ahead: int = 1) -> None:
        if planner.stride != 1:
            raise UserError(f"controller.safety needs planned actions at every step; this planner's are {planner.stride} apart")
        self.planner, self.filter, self.ahead = planner, filter, ahead
        # as controllers see it
        self.spec, self.table, self.H, self.stride = planner.spec, planner.table, planner.H, planner.stride
        self.parameters = planner.parameters

    def plan(
        self,
        observation: np.ndarray,
        goal: np.ndarray | None = None,
        samples: int = 1,
        *,
        sampler: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> Plan:
        """The planner's `plan`, corrected and in the order of its new values; below -UNSAFE / 2 where it is not viable."""
        drawn = self.planner.plan(observation, goal, samples, sampler=sampler, generator=generator)
        if drawn.actions is None:
            raise UserError("controller.safety needs planned actions; this planner's plans are of states alone")
        shape = drawn.actions.shape
        states, actions, lost = self.correct(
            drawn.observations.reshape(-1, *drawn.observations.shape[-2:]), drawn.actions.reshape(-1, *shape[-2:])
        )
        values = self.planner.judge(states, actions).reshape(shape[:-2]) - UNSAFE * lost.reshape(shape[:-2])
        order = np.argsort(-values, axis=-1, kind="stable")

        def best_first(part: np.ndarray) -> np.ndarray:
            part = part.reshape(*shape[:-2], *part.shape[1:])
            return np.take_along_axis(part, order[..., None, None], -3)

        return Plan(best_first(states), best_first(actions), np.take_along_axis(values, order, -1))

    def correct(self, states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Plans (n, H, Do) and (n, H, Da), corrected, and which of them no action keeps viable (n,)."""
        now, rows = states[:, 0].astype(np.float64), np.arange(len(states))
        moved, lost = np.zeros(len(states), dtype=bool), np.zeros(len(states), dtype=bool)
        followed, carried = states.copy(), actions.copy()
        for k in range(states.shape[1] - 1):
            if k == self.ahead:
                rows = np.flatnonzero(moved)
            if len(rows):
                carried[rows, k], now[rows], wrong, none = self.filter.nearest(now[rows], actions[rows, k])
                followed[rows, k + 1], moved[rows], lost[rows] = now[rows], moved[rows] | wrong, lost[rows] | none
        same = ~moved[:, None, None]
        return np.where(same, states, followed), np.where(same, actions, carried), lost


@dataclass(frozen=True)
class Settings:
    """safety: "correct". margin: what plans keep of barriers, the filter's where None. barriers: beside the task's, settings of
    `robots.barriers.build`. model: a folder of `pilotwave train world_model=control_affine`; None for the task's shipped one.
    rising: the speed from which plans look at the peak of a rise; None for the task's of RISING, or else the filter's."""

    safety: str
    margin: float | None = None
    barriers: Sequence[Mapping[str, Any]] = ()
    model: str | None = None
    rising: float | None = None


def controller(
    planner: Any, task_spec: Any, sampler: Mapping[str, Any], settings: Settings, *, seed: int = 0, **control: Any
) -> PlanController:
    """The controller of a planner without goals under barriers; control: as PlanController takes it."""
    if settings.safety != "correct":
        raise UserError(f"controller.safety={settings.safety} is for plans to goals; plans without goals take correct")
    every: list[Barrier] = [*task_spec.barriers, *build(settings.barriers, planner.spec.observation_dim)]
    if not every:
        raise UserError(f"{task_spec.name} has no barriers; add controller.barriers, or roll out under a roof (task=hopper-roof)")
    replan = int(control["replan_every"]) or planner.H
    rising = RISING.get(planner.spec.task) if settings.rising is None else settings.rising
    given: dict[str, Any] = {key: value for key, value in (("rising", rising), ("margin", settings.margin)) if value is not None}
    guarded = ViablePlanner(planner, PeakFilter(for_task(planner.spec.task, settings.model), every, **given), replan)
    return PlanController(guarded, task_spec, sampler, seed=seed, **control)
