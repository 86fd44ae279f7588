"""Hierarchical Diffuser (Chen et al. 2024, "Simple Hierarchical Planning with Diffusion", arXiv 2401.02644).

Two Diffusers, learned beside each other from the same windows (section 3.1, their equations 5 and 6):

    high   every K-th state, o_0, o_K, o_2K, ...: subgoals on the way from o to the goal (the Sparse Diffuser)
    low    the states and actions of one jump, o_kK .. o_(k+1)K, with both ends pinned

A plan is the best of the high level's candidates with its jumps filled in: they do not depend on each other, so all of
them are one batch of the low level, and neighbours join exactly, since both hold the same subgoal. Whoever replans within
K steps needs the first jump alone (`segments=1`). The paper's low level has every step of the data for a token, here
`points` of them a jump; for mazes it has K = 15 and 120 to 390 steps, and no learned arrival, which is Diffuser's here. Where
rewards count, the paper's high level also plans the actions of each jump beside its subgoal (`dense`), and value networks guide
both levels (`value`, `low.value`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffusion import Tableau
from offline import Algorithm, DataSpec, Normalizer, Windows, register
from pilotwave.errors import UserError
from planners.controller import PlanController, overlaid
from planners.diffuser import Diffuser
from planners.plan import Plan
from planners.roadmap import Roadmap

if TYPE_CHECKING:
    from offline.store import TrajectoryStore


@register
class HierarchicalDiffuser(Algorithm):
    """Config (configs/planner/hierarchical.yaml): Diffuser's, for the high level, whose `stride` is `jump`, K; `points`,
    the low level's tokens a jump; `windows`, the jumps of each window that it learns from; `low`, its own settings; `dense`,
    whether the high level plans actions too; `control` perhaps with `segments`; and `roadmap`, the nodes of a map of what
    demonstrations join, for goals farther away than any of them (`planners.roadmap`), or 0.

    As controllers see it, a planner of the low level's tokens: `H` of them, `stride` steps apart.
    """

    kind, name = "planner", "hierarchical"

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__(spec, config)
        self.K, self.m = int(config["jump"]), int(config["points"])
        if self.m < 1 or self.K % self.m:
            raise UserError(f"planner.jump={self.K} must be a multiple of planner.points={self.m}, 1 or more")
        self.dense = bool(config.get("dense", False))
        beside = self.m * spec.action_dim if self.dense else 0
        self.high = Diffuser(spec, {**config, "stride": self.K, "actions": False, "beside": beside})
        # the low level's goal is the next subgoal, a whole observation, in the last of its tokens
        whole = replace(spec, goal_dim=spec.observation_dim)
        own = {"horizon": self.m + 1, "stride": self.K // self.m, "arrivals": "last", "surprise_levels": []}
        self.low = Diffuser(whole, {**config, "value": None, **config["low"], **own})
        self.H, self.stride = (self.high.H - 1) * self.m + 1, self.K // self.m
        nodes = int(config["roadmap"])
        if nodes and not spec.goal_dim:
            raise UserError(f"planner.roadmap={nodes} needs a task with goals; take 0 for others")
        self.roadmap = Roadmap(spec.goal_dim, self.high.H, nodes) if nodes else None

    @property
    def normalizer(self) -> Normalizer:
        """Both levels' (each keeps a copy)."""
        return self.high.normalizer

    # -- training ------------------------------------------------------------------------------------------------------

    def prepare(self, store: TrajectoryStore) -> None:
        self.high.prepare(store)
        self.low.prepare(store)
        if self.roadmap is not None:
            recorded = self.normalizer.normalize("observation", torch.as_tensor(store.columns["observation"]))
            self.roadmap.place(recorded[:, : self.spec.goal_dim])

    def windows(self, store: TrajectoryStore, device: torch.device | str) -> Windows:
        windows = self.high.windows(store, device)
        tokens = self.high.H * self.m if self.dense else self.H
        fine = Windows(store, tokens, columns=[], stride=self.stride, device=device)
        fine.columns = windows.columns
        return fine

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The high level's loss of every m-th token, and the low level's of jumps that begin anywhere in the windows."""
        coarse = {key: value[:, :: self.m] for key, value in batch.items()}
        if self.dense:
            coarse["beside"] = batch["action"].unflatten(1, (-1, self.m)).flatten(2)
        loss, info = self.high.loss(coarse, generator)
        b, n = len(batch["observation"]), int(self.config["windows"])
        device = batch["observation"].device
        begin = torch.randint(self.H - self.m, (b, n, 1), generator=generator, device=generator.device).to(device)
        rows = torch.arange(b, device=device)[:, None, None]
        jump = begin + torch.arange(self.m + 1, device=device)
        jumps = {key: value[rows, jump].flatten(0, 1) for key, value in batch.items()}
        low_loss, low_info = self.low.loss(jumps, generator)
        info["low_loss"] = low_info["loss"]
        if self.roadmap is not None:
            reach_loss = self.roadmap.loss(batch["observation"][:, :: self.m, : self.spec.goal_dim], generator)
            info["reach_loss"], loss = reach_loss.detach(), loss + reach_loss
        return loss + low_loss, info

    # -- planning ------------------------------------------------------------------------------------------------------

    def table(self, sampler: Mapping[str, Any] | None = None) -> Tableau:
        """The high level's sampler; the low level's is its own."""
        return self.high.table(sampler)

    def plan(
        self,
        observation: np.ndarray,
        goal: np.ndarray | None = None,
        samples: int = 1,
        *,
        sampler: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        filled: int | None = None,
        segments: int | None = None,
        roadmap: bool = True,
    ) -> Plan:
        """As Diffuser.plan, (samples, H, ...) or (B, samples, H, ...), ranked by the high level.

        filled: how many of the best plans the low level fills in; segments: how many of their jumps; None for all.
        What is not filled in, and what follows the arrival, is interpolated between subgoals, with actions of 0.
        roadmap: plan to the first place on the roadmap's way where the goal is too far; False plans to the goal itself.
        """
        if self.roadmap is not None and roadmap and goal is not None:
            goal = self.waypoint(observation, goal)
        coarse = self.high.plan(observation, goal, samples, sampler=sampler, generator=generator)
        return self.fill(coarse, filled, segments, generator)

    @torch.no_grad()
    def waypoint(self, observation: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """The place to go to next, (Dg,) or (B, Dg), on the way from observations to goals by the roadmap."""
        assert self.roadmap is not None
        d, device = self.spec.goal_dim, next(self.parameters()).device
        states = np.array(np.broadcast_to(observation, (*np.shape(observation)[:-1], self.spec.observation_dim)), np.float32)
        ends = states.copy()
        ends[..., :d] = goal
        here, there = (
            self.normalizer.normalize("observation", torch.as_tensor(np.atleast_2d(part), device=device))[:, :d]
            for part in (states, ends)
        )
        full = torch.as_tensor(np.atleast_2d(ends), device=device)
        node = self.roadmap.next_node(here, there)
        places = torch.cat([self.roadmap.nodes[node.clamp_min(0)], torch.zeros_like(full[:, d:])], 1)
        places = torch.where((node < 0)[:, None], full, self.normalizer.denormalize("observation", places))[:, :d]
        return places.cpu().numpy().reshape(*states.shape[:-1], d)

    def fill(
        self, coarse: Plan, filled: int | None = None, segments: int | None = None, generator: torch.Generator | None = None
    ) -> Plan:
        """Plans of subgoals, (..., samples, H_high, Do) -> plans (..., samples, H, Do) through each of them."""
        *batch, samples, tokens, width = coarse.observations.shape
        jumps, shape = tokens - 1, (*batch, samples, (tokens - 1) * self.m + 1, -1)
        device = next(self.parameters()).device
        subgoals = torch.as_tensor(coarse.observations, device=device).reshape(-1, tokens, width)
        w = torch.arange(self.m, device=device)[:, None] / self.m
        between = (1 - w) * subgoals[:, :-1, None] + w * subgoals[:, 1:, None]  # (B * samples, jumps, m, Do)
        actions = torch.zeros(*between.shape[:3], self.spec.action_dim, device=device)

        jump = torch.arange(jumps, device=device)
        wanted = (torch.arange(len(subgoals), device=device) % samples < (filled or samples))[:, None]
        wanted = wanted & (jump < (segments or jumps))
        if coarse.arrivals is not None:
            wanted &= jump < torch.as_tensor(coarse.arrivals, device=device).reshape(-1, 1)
        x = self._jumps(subgoals[:, :-1][wanted], subgoals[:, 1:][wanted], generator)
        # the subgoal itself, not what normalizing it and back leaves of it
        between[wanted, 1:] = self.normalizer.denormalize("observation", x[:, 1:-1, : self.spec.observation_dim])
        path = torch.cat([between.flatten(1, 2), subgoals[:, -1:]], 1).view(shape).cpu().numpy()
        arrivals = None if coarse.arrivals is None else coarse.arrivals * self.m
        if "action" not in self.low.layout:
            return Plan(path, None, coarse.values, arrivals)
        actions[wanted] = self.normalizer.denormalize("action", x[:, :-1, self.low.layout["action"]])
        actions = torch.cat([actions.flatten(1, 2), torch.zeros_like(actions[:, 0, :1])], 1)
        return Plan(path, actions.view(shape).cpu().numpy(), coarse.values, arrivals)

    def _jumps(self, begin: Tensor, end: Tensor, generator: torch.Generator | None) -> Tensor:
        """Normalized trajectories (N, m + 1, F) between states (N, Do) in the task's units."""
        if not len(begin):
            return begin.new_zeros(0, self.m + 1, self.low.layout.features)
        begin, end = (self.normalizer.normalize("observation", state) for state in (begin, end))
        last = torch.full((len(begin),), self.m, device=begin.device)
        return self.low.sample_plans(begin, end, last, self.low.table(), generator)

    def controller(
        self,
        task_spec: Any,
        *,
        sampler: Mapping[str, Any] | None = None,
        replan_every: int | None = None,
        samples: int | None = None,
        track: str | None = None,
        deviation: float | None = None,
        segments: int | None = None,
        roadmap: bool = True,
        seed: int = 0,
    ) -> PlanController:
        """This planner for roll-outs and robots; see Diffuser's. segments: jumps that are filled in, None for all;
        roadmap: see `plan`."""
        given = {"replan_every": replan_every, "samples": samples, "track": track, "deviation": deviation, "segments": segments}
        control = overlaid(self.config["control"], **given)
        options = {"filled": 1, "segments": control.pop("segments", None), "roadmap": roadmap}
        settings = sampler or self.config["sampler"]
        controller = PlanController(self, task_spec, settings, seed=seed, options=options, **control)
        controller.evaluations += self.low.table().evaluations
        return controller
