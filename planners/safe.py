"""SafeDiffuser (Xiao et al. 2023, arXiv 2306.00148): plans of a trained Diffuser that keep to barriers, untrained for.

The sampler's state x is changed least, after every update to a level t, so that each token's b(x) is at least

    RoS       margin                        the robust-safe QP at every level
    ReS       margin once t <= `hard`       relaxed before: its slack variable is so cheap there (1e-4 of the change's
                                            cost, in the public code) that nothing is constrained
    TVS       margin - s(t), s = depth t    a bound that tightens along the denoising and ends at the full one (the
                                            public code adds its derivative with the wrong sign, and ends slightly unsafe)
    correct   nothing until the end         generate, then correct once, as SafeFlowMatcher (2026) proposes

in the task's units. This is the discrete-time barrier condition b(x_next) >= (1 - k) b(x_now) with their k = 1. The
paper linearizes b at x_now, which is the same for its hundreds of small updates; with 8 large ones, the tangent at x_now would
forbid all that lies behind an obstacle.

What the plan is worth on the robot is decided after the last update, for each method alike: the path is refined to
`refine` points a token, as it will be tracked, every point is projected to b >= `margin` after the pins, and the margin
holds the tracking error: what the robot was measured to stray from such paths. Plans with a point or a segment that
could not be made safe rank behind all others. The corrected plan is then judged by Diffuser's own measure, which sees
plans that the correction has pushed into a wall.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pilotwave.errors import UserError, nearest, require
from planners.controller import PlanController
from planners.diffuser import UNSAFE, Diffuser
from planners.places import Places
from planners.plan import Corrected, Plan
from planners.tracking_margin import tracking_margin
from robots import Chunk
from robots.barriers import Barrier, Superellipse, from_rows, project, values

FAR = Superellipse((1e6, 1e6), (1.0, 1.0))


class Constraint:
    """`during` and `after` of one planning call: barriers for each plan of the batch, of positions in the first d features
    of the observation (d = goal_dim) with velocities in the next d."""

    def __init__(self, planner: SafeDiffuser, barriers: Sequence[Barrier]) -> None:
        self.planner, self.barriers = planner, list(barriers)
        diffuser = planner.diffuser
        self.times = planner.until(np.arange(diffuser.H) * diffuser.stride * diffuser.spec.dt)
        self.do, self.d = diffuser.spec.observation_dim, diffuser.spec.goal_dim

    def during(self, x: Tensor, t: Tensor) -> Tensor:
        slack = METHODS[self.planner.method](self.planner, float(t))
        if math.isinf(slack):
            return x
        normalizer = self.planner.diffuser.normalizer
        states = normalizer.denormalize("observation", x[..., : self.do])
        states, _ = project(states, self.barriers, self.planner.margin - slack, self.times)
        return torch.cat([normalizer.normalize("observation", states), x[..., self.do :]], -1)

    def after(self, observations: Tensor, arrival: Tensor | None) -> Corrected:
        planner, m, d = self.planner, self.planner.refine, self.d
        coarse = observations if arrival is None else planner.diffuser._stay(observations, arrival)
        tokens = torch.arange((coarse.shape[1] - 1) * m + 1, device=coarse.device) / m
        low = tokens.long().clamp(max=coarse.shape[1] - 2)
        weight = (tokens - low)[:, None].to(coarse.dtype)
        path = (1 - weight) * coarse[:, low] + weight * coarse[:, low + 1]
        dt = planner.diffuser.stride * planner.diffuser.spec.dt / m
        time = planner.until(np.arange(path.shape[1]) * dt)
        # where the robot is cannot be changed, nor asked more of than it gives
        projected, _ = project(path, self.barriers, planner.margin, time)
        projected[:, 0] = path[:, 0]
        moved = projected[..., :d] - path[..., :d]
        path = torch.cat([projected[..., :d], path[..., d:]], -1)
        if path.shape[-1] >= 2 * d:
            path[..., d : 2 * d] += torch.gradient(moved, spacing=dt, dim=1)[0]
        middle = (path[:, 1:] + path[:, :-1]) / 2
        halfway = (time[1:] + time[:-1]) / 2
        ends, between = values(self.barriers, path[:, 1:], time[1:]), values(self.barriers, middle, halfway)
        # on the way out of a margin that the robot stands in, points may be as near as it is
        start = values(self.barriers, path[:, :1], 0.0).clamp(max=planner.margin) - 1e-4
        least = torch.minimum(start, torch.full_like(start, planner.margin - 1e-4))
        safe = (ends >= least).all(-1).all(-1) & (between >= least - planner.sag).all(-1).all(-1)
        longest = planner.diffuser.longest_step
        moves = path[..., :d].diff(dim=1).norm(dim=-1) * m
        furthest = moved.norm(dim=-1).amax(1)
        safe &= (moves <= planner.haste * longest).all(-1) & (furthest <= planner.reach)
        if planner.places is not None:
            away = planner.places.away(path[..., :d].double().cpu().numpy())
            # the robot and its goal may be anywhere
            most = np.maximum(planner.places.near, away[:, [0, -1]].max(1))
            safe &= torch.as_tensor(away.max(1) <= most, device=safe.device)
        kept = coarse.clone()
        kept[..., : 2 * d] = path[:, ::m, : 2 * d]
        if arrival is not None:
            until = torch.arange(coarse.shape[1], device=coarse.device)[None] <= arrival[:, None]
            kept = torch.where(until[..., None], kept, observations)
        return Corrected(kept, path, safe, planner.bend * furthest)


METHODS: dict[str, Callable[[SafeDiffuser, float], float]] = {
    "ros": lambda planner, t: 0.0,
    "res": lambda planner, t: 0.0 if t <= planner.hard else math.inf,
    "tvs": lambda planner, t: planner.depth * t,
    "correct": lambda planner, t: math.inf,
}
"""Method -> metres by which states at level t may fall short of the margin."""


class SafeDiffuser:
    """A trained Diffuser whose plans keep to barriers.

    method: a key of METHODS. margin: metres that plans keep from barriers, for the tracking error; None derives
    it (`planners.tracking_margin`). refine: points a token of the path. ahead: seconds for which moving barriers are
    taken to go on as they do. hard: the level from which ReS is strict. depth: metres of TVS's slack at t = 1. haste: a
    corrected step of more than this times the data's longest is a leap through an obstacle. sag: what a segment may lose
    between its points. reach: a plan that must be moved further than this, in metres, leads through an obstacle and
    counts as unsafe. bend: what a metre of change costs of a plan's value. places: where demonstrations were; plans that
    leave them count as unsafe.
    """

    def __init__(
        self,
        diffuser: Diffuser,
        method: str = "res",
        *,
        margin: float | None = None,
        refine: int = 4,
        ahead: float = 0.5,
        hard: float = 0.3,
        depth: float = 1.0,
        haste: float = 2.0,
        sag: float = 0.02,
        reach: float = 0.35,
        bend: float = 4.0,
        places: Places | None = None,
    ) -> None:
        if method not in METHODS:
            raise nearest("controller.safety", str(method), METHODS)
        if not isinstance(diffuser, Diffuser) or not diffuser.spec.goal_dim:
            raise UserError("controller.safety needs a Diffuser whose first observations are positions to go to")
        self.diffuser, self.method, self.refine = diffuser, method, refine
        self.margin = tracking_margin(diffuser.origin) if margin is None else margin
        require("controller.margin", self.margin, 0)
        self.ahead, self.haste, self.sag, self.reach, self.bend = ahead, haste, sag, reach, bend
        self.places = places
        self.hard: float = hard
        self.depth: float = depth
        # as controllers see it: a planner of finer tokens
        self.spec, self.table = diffuser.spec, diffuser.table
        self.H, self.stride = (diffuser.H - 1) * refine + 1, diffuser.stride / refine

    def until(self, times: np.ndarray) -> np.ndarray:
        """The times for which barriers are moved on."""
        return np.minimum(times, self.ahead)

    def plan(
        self,
        observation: np.ndarray,
        goal: np.ndarray,
        samples: int = 1,
        *,
        barriers: Sequence[Barrier] = (),
        hazards: np.ndarray | None = None,
        sampler: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> Plan:
        """`Diffuser.plan` under constant barriers and hazards (K, 7) or (B, K, 7); `plan.observations` (..., H', Do) are
        the refined paths, `refine` points a token, and unsafe plans have values below -UNSAFE / 2."""
        every = list(barriers)
        if hazards is not None:
            rows = hazards[None] if hazards.ndim == 2 else hazards
            every += from_rows(np.repeat(rows, samples, 0))
        constraint = Constraint(self, every or [FAR])
        return self.diffuser.plan(observation, goal, samples, sampler=sampler, generator=generator, correction=constraint)


class SafeController(PlanController):
    """PlanController under barriers: constant ones, and the observation's "hazards" (n, K, 7) where a task has them.

    At each decision a robot also gets a new plan when the rest of its own is no longer safe. Where the places of the data are
    known, the way over them that is clear now is searched first, and candidates also lead to places on it; of those that are
    safe, likely (valued at `likely` or more) and no detour, the robot takes the one by which it would be at the goal first, an
    early arrival weighing `haste` times. Where none is, it goes on with its last plan while that is safe, or else stands still,
    and asks again at the next decision, with all candidates to places on the way. A robot that stands although its plan goes
    on is in a local trap: the place ahead of it becomes one of `memory` hazards of its own that its next plans avoid too (the
    filter does not see them).
    """

    AHEAD, RADIUS, STILL = 0.35, 0.25, 0.15  # metres, metres, metres a second
    SHORT, PASSED, EACH = 1.5, 1.0, 2  # metres of the shortest leg, metres at which a place is passed, candidates to each
    DETOUR, PATIENCE = 1.4, 8  # how much longer a plan may be than its way, decisions for which this is asked

    def __init__(
        self,
        planner: SafeDiffuser,
        *args: Any,
        barriers: Sequence[Barrier] = (),
        memory: int = 4,
        likely: float = -3.5,
        haste: float = 3.0,
        **options: Any,
    ) -> None:
        self.barriers, self.memory, self.likely, self.haste = list(barriers), memory, likely, haste
        super().__init__(planner, *args, **options)

    def reset(self, n: int) -> None:
        super().reset(n)
        self.waiting = np.zeros(n, dtype=bool)
        self.waits, self.trapped = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        self.traps = np.tile((1e6, 1e6, 1.0, 1.0, 2.0, 0.0, 0.0), (n, self.memory, 1))
        self.by_way_of = np.full((n, self.goal_dim), np.nan)
        self.ways: list[dict[bytes, np.ndarray]] = [{} for _ in range(n)]  # those found last

    def keep(self, rows: np.ndarray) -> None:
        super().keep(rows)
        for name in ("waiting", "waits", "trapped", "traps", "by_way_of"):
            setattr(self, name, getattr(self, name)[rows])
        self.ways = [self.ways[i] for i in rows.tolist()]

    def act(self, history: Mapping[str, np.ndarray], step: int) -> Chunk:
        """history: "state" (n, 1, Do), "goal" (n, 1, Dg), perhaps "hazards" (n, 1, K, 7) -> references of n safe plans."""
        state, goal = history["state"][:, -1], history["goal"][:, -1]
        n = len(state)
        hazards = history["hazards"][:, -1] if "hazards" in history else np.zeros((n, 0, 7))
        if self.plan is None or len(self.begun) != n:
            self.reset(n)
        there = np.linalg.norm(state[:, : self.goal_dim] - self.by_way_of, axis=1) < self.PASSED
        self.by_way_of[there] = np.nan
        renew, going = self._renew(state, np.where(np.isnan(self.by_way_of), goal, self.by_way_of), step), np.zeros(n, dtype=bool)
        if self.plan is not None:
            now = self._from_now(self.plan.observations[:, 0], step)
            astray = np.linalg.norm(now[:, 0, : self.goal_dim] - state[:, : self.goal_dim], axis=1) > (self.deviation or np.inf)
            going = ~self._stuck(state, now) & self._safe(now, hazards)
            renew |= self.waiting | ~going
            going &= ~astray
        if renew.any():
            plan = self._search(state, goal, hazards, renew)
            self.waiting[renew] = waits = plan.values[:, 0] < self.likely
            self.waits[renew] = np.where(waits, self.waits[renew] + 1, 0)
            # standing: where it is, at rest
            stand = state[renew, None].copy()
            stand[..., self.goal_dim :] = 0
            plan.observations[waits, 0] = stand[waits]
            self.by_way_of[self.waiting & renew] = np.nan
            self._take(plan, renew, ~(waits & going[renew]))
            self.begun[renew & ~(self.waiting & going)] = step
            self.goals[renew] = np.where(np.isnan(self.by_way_of), goal, self.by_way_of)[renew]
        assert self.plan is not None
        path = self._from_now(self.plan.observations[:, 0], step)
        return Chunk(path, dt=self.dt, plan=self.plan.observations[:, 0, :, :2])

    def _search(self, state: np.ndarray, goal: np.ndarray, hazards: np.ndarray, which: np.ndarray) -> Plan:
        """The best plans (m, 1, ...) of the robots of a mask, to their goals or to places on their ways."""
        rows, each = np.flatnonzero(which), min(self.EACH, self.samples)
        k = self.samples // each
        aims = [self._aims(i, state[i, : self.goal_dim], goal[i], hazards[i], k) for i in rows.tolist()]
        aim, metres, share = (np.stack(part) for part in zip(*aims))
        aim = aim.astype(state.dtype)
        known = np.concatenate([hazards, self.traps[:, : self.trapped.max()]], 1)
        plan = self.planner.plan(
            np.repeat(state[rows], k, 0), aim.reshape(-1, self.goal_dim), each, barriers=self.barriers,
            hazards=np.repeat(known[rows], k, 0), sampler=self.sampler, generator=self.generator,
        )  # fmt: skip
        value = plan.values[:, 0].reshape(-1, k)
        # what is left of the way beyond the place, at the plan's pace up to it
        taken = share * 0 if plan.arrivals is None else plan.arrivals[:, 0].reshape(-1, k) / self.planner.diffuser.H
        length = np.linalg.norm(np.diff(plan.observations[:, 0, :, : self.goal_dim], axis=1), axis=2).sum(1).reshape(-1, k)
        wanders = (length > self.DETOUR * metres + self.SHORT) & (self.waits[rows] < self.PATIENCE)[:, None]
        value = value - UNSAFE * wanders
        score = np.where(value >= self.likely, value + taken - self.haste * taken / share, value - UNSAFE)
        row, best = np.arange(len(rows)), score.argmax(1)
        self.by_way_of[rows] = np.where((share[row, best] < 1)[:, None], aim[row, best], np.nan)
        return Plan(plan.observations[row * k + best, :1], None, value[row, best][:, None])

    def _aims(self, i: int, place: np.ndarray, goal: np.ndarray, hazards: np.ndarray, k: int) -> tuple[np.ndarray, ...]:
        """k places (k, d) to plan to, half of them the goal unless that failed before, and of each the metres (k,) of way up to it
        (inf where no way is known) and their share (k,) of the whole way."""
        aims, metres, share = np.tile(goal, (k, 1)), np.full(k, np.inf), np.ones(k)
        way = self._way(i, place, goal, hazards)
        if not len(way):
            return aims, metres, share
        along = np.cumsum(np.linalg.norm(np.diff(way, axis=0, prepend=place[None]), axis=1))
        drawn = torch.rand(k, generator=self.generator).numpy()
        evenly = np.arange(1, k + 1) / (k - k // 2 + 1)  # beyond 1: the goal
        reach = self.SHORT + (drawn if self.waits[i] else evenly) * (along[-1] - self.SHORT)
        at = np.searchsorted(along, reach).clip(max=len(way) - 1)
        before = at < len(way) - 1
        aims[before] = way[at[before]]
        return aims, along[at], np.where(before, along[at] / along[-1], 1.0)

    def _way(self, i: int, place: np.ndarray, goal: np.ndarray, hazards: np.ndarray) -> np.ndarray:
        """The points (.., d) of robot i's way past its hazards (K, 7) and its traps, or past hazards alone where there is none."""
        places = self.planner.places
        if places is None:
            return np.zeros((0, self.goal_dim))
        for held in (self.traps[i, : self.trapped[i]], self.traps[i, :0]):
            rows = np.concatenate([hazards, held])
            key = goal.tobytes() + rows.tobytes()
            if key not in self.ways[i]:
                self.ways[i] = {key: places.ways(goal, self.barriers + from_rows(rows[None]))}
            way = places.way(self.ways[i][key], place)
            if len(way):
                break
        return way

    def _take(self, plan: Plan, renew: np.ndarray, taken: np.ndarray) -> None:
        """Of the plans (m, ...) of the robots of a mask those taken (m,) bool; states alone are tracked."""
        if self.plan is None:
            self.plan = Plan(
                np.zeros((len(renew), 1, *plan.observations.shape[2:]), plan.observations.dtype), None, np.zeros((len(renew), 1))
            )
        rows = np.flatnonzero(renew)[taken]
        self.plan.observations[rows], self.plan.values[rows] = plan.observations[taken, :1], plan.values[taken, :1]

    def _safe(self, path: np.ndarray, hazards: np.ndarray) -> np.ndarray:
        """Whether paths (n, H', Do) from now on keep out of where hazards are then (n,)."""
        every = self.barriers + from_rows(hazards)
        if not every:
            return np.ones(len(path), dtype=bool)
        time = self.planner.until(np.arange(path.shape[1]) * self.dt)
        return (values(every, path.astype(np.float64), time) >= 0).all((1, 2))

    def _stuck(self, state: np.ndarray, now: np.ndarray) -> np.ndarray:
        """Robots (n,) that stand where their plans (n, H', Do) go on; their places ahead are remembered."""
        d = self.goal_dim
        gap = now[:, 0, :d] - state[:, :d]
        distance = np.linalg.norm(gap, axis=1)
        stuck = (np.linalg.norm(state[:, d : 2 * d], axis=1) < self.STILL) & (distance > self.AHEAD) & ~self.waiting
        for i in np.flatnonzero(stuck):
            slot = self.trapped[i] % self.memory
            self.traps[i, slot, :2] = state[i, :d] + self.AHEAD * gap[i] / distance[i]
            self.traps[i, slot, 2:4] = self.RADIUS
            self.trapped[i] += 1
        return stuck
