"""Two robots that must not collide: plans of a trained single-robot Diffuser, put together.

MotionDiffuser (Jiang et al. 2023, arXiv 2306.03083) plans the joint motion of agents by sampling and holds constraints
between them, such as no collision, meanwhile. It learns joint motions; here single-robot ones are all that was demonstrated,
so the joint distribution is their product, given that the robots stay apart:

1. each robot's `samples` plans, drawn and judged as always,
2. all pairs of them, also with either robot slowed down to one of `PACES`, ranked by both values, by the time lost, and by
   how much nearer than `apart` + `margin` the robots come,
3. the best few pairs projected, instant by instant, to the barrier |p - q| - apart >= margin (`robots.barriers`),
4. the best of those that hold it without a leap and without leaving the places of the data, where these are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pilotwave.errors import require
from planners.diffuser import UNSAFE, Diffuser
from planners.places import Places
from planners.plan import Plan
from planners.tracking_margin import tracking_margin
from robots.barriers import Separation, project


class JointDiffuser:
    """See the module. As controllers see it, a planner of one robot with (p, q, velocities of both) for a state.

    apart: metres between the robots; 0 plans each as if it were alone. margin: metres more, for tracking;
    None: twice what `planners.tracking_margin` derives for one robot. refine: points a token.
    keep: pairs that are projected. reach: metres that a plan may be moved. haste: a step of more than this times the data's longest
    is a leap. near: what a metre too near costs in the ranking of pairs. bend: what a metre of change costs of a plan's value.
    """

    PACES = (1.0, 0.75, 0.5, 0.3)

    def __init__(
        self,
        diffuser: Diffuser,
        apart: float,
        *,
        margin: float | None = None,
        refine: int = 4,
        keep: int = 8,
        reach: float = 0.35,
        haste: float = 2.0,
        near: float = 20.0,
        bend: float = 4.0,
        places: Places | None = None,
    ) -> None:
        self.diffuser, self.apart, self.refine, self.keep = diffuser, apart, refine, keep
        self.margin = 2 * tracking_margin(diffuser.origin) if margin is None else margin
        require("controller.margin", self.margin, 0)
        self.reach, self.haste, self.near, self.bend, self.places = reach, haste, near, bend, places
        one = diffuser.spec
        self.spec = replace(one, observation_dim=2 * one.observation_dim, action_dim=2 * one.action_dim, goal_dim=2 * one.goal_dim)
        self.table, self.H, self.stride = diffuser.table, (diffuser.H - 1) * refine + 1, diffuser.stride / refine

    def plan(
        self,
        observation: np.ndarray,
        goal: np.ndarray,
        samples: int = 1,
        *,
        sampler: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> Plan:
        """Plans (B, 1, H', 2 Do) from observations (B, 2 Do) to goals (B, 2 Dg); their values are below -UNSAFE / 2 where the
        robots would come too near each other."""
        d, n = self.diffuser.spec.goal_dim, len(observation)
        halves = (
            np.stack([observation[:, :d], observation[:, d : 2 * d]]),
            np.stack([observation[:, 2 * d : 3 * d], observation[:, 3 * d :]]),
        )
        alone = np.concatenate(halves, -1).reshape(2 * n, -1)
        goals = np.stack([goal[:, :d], goal[:, d:]]).reshape(2 * n, d)
        plan = self.diffuser.plan(alone, goals, samples, sampler=sampler, generator=generator)
        each, values = plan.observations[..., :d].reshape(2, n, samples, -1, d), plan.values.reshape(2, n, samples)
        assert plan.arrivals is not None
        arrivals = plan.arrivals.reshape(2, n, samples)
        chosen = [self._pair(each[:, i], values[:, i], arrivals[:, i]) for i in range(n)]
        paths, value = np.stack([path for path, _ in chosen]), np.array([value for _, value in chosen])
        dt = self.stride * self.diffuser.spec.dt
        speed = np.gradient(paths, dt, axis=1)
        return Plan(np.concatenate([paths, speed], -1).astype(observation.dtype)[:, None], None, value[:, None])

    def _pair(self, each: np.ndarray, values: np.ndarray, arrivals: np.ndarray) -> tuple[np.ndarray, float]:
        """The best joint path (H', 2 d) and its value, of paths (2, S, H, d), values (2, S) and arrival tokens (2, S)."""
        samples, H, d = each.shape[1:]
        paces = (1.0,) if self.apart == 0 else self.PACES
        time = np.arange(self.H) / self.refine
        # (2, P, S, H', d): each plan at each pace, and what it costs, (2, P, S)
        paths = np.stack([self._at(each, time * pace) for pace in paces], 1)
        cost = np.stack([-values + arrivals / H * (1 / pace - 1) for pace in paces], 1)
        if self.apart == 0:
            best = cost[:, 0].argmin(1)
            return np.concatenate([paths[0, 0, best[0]], paths[1, 0, best[1]]], -1), -float(cost[:, 0].min(1).sum())
        first, second = (part.ravel() for part in np.indices((len(paces) * samples,) * 2))
        usual = (first < samples) | (second < samples)  # one robot at most is slowed down
        first, second = first[usual], second[usual]
        flat, costs = paths.reshape(2, -1, self.H, d), cost.reshape(2, -1)
        gap = np.linalg.norm(flat[0][first] - flat[1][second], axis=-1).min(1)
        total = costs[0][first] + costs[1][second] + self.near * (self.apart + self.margin - gap).clip(min=0)
        kept = np.argsort(total)[: self.keep]
        joint = np.concatenate([flat[0][first[kept]], flat[1][second[kept]]], -1)
        moved, safe, furthest = self._apart(joint)
        worth = -(costs[0][first[kept]] + costs[1][second[kept]]) - self.bend * furthest - UNSAFE * ~safe
        best = int(worth.argmax())
        return moved[best], float(worth[best])

    @staticmethod
    def _at(each: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Paths (..., H, d) at times (T,) in tokens, linear between them: (..., T, d)."""
        low = np.minimum(time.astype(np.int64), each.shape[-2] - 2)
        w = (time - low)[:, None]
        return (1 - w) * each[..., low, :] + w * each[..., low + 1, :]

    def _apart(self, joint: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Joint paths (K, H', 2 d) moved to stay apart, whether they do and can be driven (K,), and metres moved (K,)."""
        d = joint.shape[-1] // 2
        moved, held = project(joint, [Separation(self.apart, features=slice(0, 2 * d))], self.margin)
        # where the robots are cannot be changed
        moved[:, 0], held[:, 0] = joint[:, 0], True
        robots = moved.reshape(*moved.shape[:-1], 2, d)
        steps = np.linalg.norm(np.diff(robots, axis=1), axis=-1) * self.refine
        furthest = np.linalg.norm(robots - joint.reshape(robots.shape), axis=-1).max((1, 2))
        between = (robots[:, 1:] + robots[:, :-1]) / 2
        crossing = np.linalg.norm(between[:, :, 0] - between[:, :, 1], axis=-1).min(1) < self.apart
        safe = held.all(1) & ~crossing & (furthest <= self.reach)
        safe &= (steps <= self.haste * float(self.diffuser.longest_step)).all((1, 2))
        if self.places is not None:
            away = self.places.away(robots)
            safe &= (away <= np.maximum(self.places.near, away[:, [0, -1]].max(1))[:, None]).all((1, 2))
        return moved, safe, furthest
