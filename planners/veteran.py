"""Diffusion Veteran (Lu et al. 2025, "What Makes a Good Diffusion Planner for Decision Making?", arXiv 2503.00535).

Four findings make the planner, after 6,000 trained models: draw candidates without guidance and keep the one that a critic
values most (section 4.1), a transformer as the denoiser (4.2), states alone with inverse dynamics for the actions (4.3),
and tokens several steps apart (4.4).

    candidates   x_1 .. x_n ~ p(o_0, o_s, .., o_(H-1)s | o_0)     a Diffuser of states, pinned at the start
    critic       V(x) = E[return | x]                             Monte Carlo returns of recorded windows
    actions      a = f(o_0, o_s)                                  inverse dynamics

The paper's critic learns the returns of its task's one goal. Where a task has goals, windows are given some: half of them
a place where the episode is up to `reach` tokens later, half one where another episode is. The return is discount^k if the
episode first comes within `arrive` of the goal at token k, and 0 if it does not in as many tokens. So V(x, g) is high for
plans that pass g soon, or end where others have gone on to g. `pin_goal` pins candidates at the goal too, at arrivals that
the data finds usual (see Diffuser), and leaves less to choose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion import Tableau
from diffusion.networks import FourierFeatures
from offline import Algorithm, DataSpec, Normalizer, Windows, register
from offline.returns import hindsight_goals, scaled_returns, tokens_until
from planners.controller import PlanController, overlaid, refuse_unheld
from planners.diffuser import Diffuser
from planners.inverse_dynamics import InverseDynamics
from planners.plan import Plan, checked, ended

if TYPE_CHECKING:
    from offline.store import TrajectoryStore


class Critic(nn.Module):
    """V(x, g) (B,) of normalized plans x (B, H, Do), with goals g (B, Dg) where there are any."""

    def __init__(self, inputs: int, width: int = 256, fourier: int = 4) -> None:
        super().__init__()
        self.fourier = FourierFeatures(inputs, fourier)
        self.mlp = nn.Sequential(
            nn.Linear(self.fourier.output_dim, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor, goal: Tensor | None = None) -> Tensor:
        parts = [x.flatten(1)] + ([] if goal is None else [goal])
        # candidates differ in the third digit
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = self.mlp(self.fourier(torch.cat(parts, 1).float()))
        return out[:, 0]


@register
class Veteran(Algorithm):
    """Config (configs/planner/veteran.yaml): Diffuser's, for the candidates; `pin_goal`; critic {discount, reach, width};
    `arrive`, the distance from the goal at which a plan ends, in the task's units.
    """

    kind, name = "planner", "veteran"

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__(spec, config)
        pinned = replace(spec, goal_dim=spec.goal_dim if config["pin_goal"] else 0)
        self.candidates = Diffuser(pinned, {**config, "actions": False, "value": None})
        self.H, self.stride = self.candidates.H, self.candidates.stride
        self.discount, self.reach = float(config["critic"]["discount"]), int(config["critic"]["reach"])
        inputs = self.H * spec.observation_dim + spec.goal_dim
        self.critic = Critic(inputs, int(config["critic"]["width"]))
        self.inverse_dynamics = InverseDynamics(spec.observation_dim, spec.action_dim)

    @property
    def normalizer(self) -> Normalizer:
        """The candidates'."""
        return self.candidates.normalizer

    # -- training ------------------------------------------------------------------------------------------------------

    def prepare(self, store: TrajectoryStore) -> None:
        self.candidates.prepare(store)

    def windows(self, store: TrajectoryStore, device: torch.device | str) -> Windows:
        """Of H tokens, or as many as the critic's goals may lie ahead."""
        windows = self.candidates.windows(store, device)
        if not self.spec.goal_dim:
            windows.columns["return"] = scaled_returns(store, self.discount).to(windows.device)
            return windows
        further = Windows(store, max(self.H, self.reach + 1), columns=[], stride=self.stride, device=device)
        further.columns = windows.columns
        return further

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        observation, action = batch["observation"], batch["action"]
        x = observation[:, : self.H]
        loss, info = self.candidates.loss({"observation": x, "action": action[:, : self.H]}, generator)
        goal, target = self._returns(observation, generator) if self.spec.goal_dim else (None, batch["return"][:, 0])
        critic_loss = ((self.critic(x, goal) - target) ** 2).mean()
        inverse_loss = self.inverse_dynamics.loss(x, action[:, : self.H])
        info |= {"critic_loss": critic_loss.detach(), "inverse_loss": inverse_loss.detach()}
        return loss + critic_loss + inverse_loss, info

    def _returns(self, observation: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Goals (B, Dg), normalized, of windows (B, T, Do), and the windows' returns (B,) for them."""
        goal = hindsight_goals(observation, self.reach, generator)
        places, to = (self.normalizer.denormalize("observation", part)[..., : self.spec.goal_dim] for part in (observation, goal))
        near = (places - to[:, None]).norm(dim=-1) <= float(self.config["arrive"])
        return goal[:, : self.spec.goal_dim], self.discount ** tokens_until(near)[:, 0]

    # -- planning ------------------------------------------------------------------------------------------------------

    def table(self, sampler: Mapping[str, Any] | None = None) -> Tableau:
        """The candidates' sampler."""
        return self.candidates.table(sampler)

    @torch.no_grad()
    def plan(
        self,
        observation: np.ndarray,
        goal: np.ndarray | None = None,
        samples: int = 50,
        *,
        sampler: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> Plan:
        """As Diffuser.plan, (samples, H, ...) or (B, samples, H, ...), by the critic's value, best first.

        A plan that comes within `arrive` of the goal ends there.
        """
        pin = goal if self.config["pin_goal"] else None
        drawn = self.candidates.plan(observation, pin, samples, sampler=sampler, generator=generator)
        shape, device = drawn.observations.shape[:-2], next(self.parameters()).device
        states = torch.as_tensor(drawn.observations, device=device).flatten(0, -3)
        x, g, to = self.normalizer.normalize("observation", states), None, None
        if self.spec.goal_dim:
            wanted = checked("goal", np.asarray(goal), self.spec.goal_dim)
            to = torch.as_tensor(np.broadcast_to(wanted, (*shape[:-1], wanted.shape[-1])).copy(), device=device)
            to = to.reshape(-1, self.spec.goal_dim).repeat_interleave(shape[-1], 0)
            g = self.normalizer.normalize("observation", self._at(to, states[:, 0]))[:, : self.spec.goal_dim]
        values = self.critic(x, g).view(shape)
        if to is not None:
            states, arrivals, _ = ended(states, to, float(self.config["arrive"]))
            x = self.normalizer.normalize("observation", states)
        actions = self.normalizer.denormalize("action", self.inverse_dynamics.along(x))
        order = values.argsort(dim=-1, descending=True, stable=True)

        def best_first(part: Tensor) -> np.ndarray:
            part = part.view(*shape, *part.shape[1:])
            index = order.view(*shape, *[1] * (part.ndim - order.ndim)).expand_as(part)
            return part.gather(order.ndim - 1, index).cpu().numpy()

        ending = best_first(arrivals) if to is not None else None
        return Plan(best_first(states), best_first(actions), best_first(values.flatten()), ending)

    @torch.no_grad()
    def judge(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Values (n,) of other plans without goals, states (n, H, Do), by the same measure."""
        states = torch.as_tensor(observations, dtype=torch.float32, device=next(self.parameters()).device)
        return self.critic(self.normalizer.normalize("observation", states)).cpu().numpy()

    def _at(self, place: Tensor, states: Tensor) -> Tensor:
        """States (B, Do) moved to places (B, Dg), at rest."""
        return torch.cat([place, torch.zeros_like(states[:, self.spec.goal_dim :])], 1)

    def controller(
        self,
        task_spec: Any,
        *,
        sampler: Mapping[str, Any] | None = None,
        replan_every: int | None = None,
        samples: int | None = None,
        track: str | None = None,
        deviation: float | None = None,
        safety: str | None = None,
        margin: float | None = None,
        barriers: Sequence[Mapping[str, Any]] = (),
        model: str | None = None,
        rising: float | None = None,
        seed: int = 0,
    ) -> PlanController:
        """This planner for roll-outs and robots; see Diffuser's. track: "actions" are those of the inverse dynamics. safety,
        margin, barriers, model, rising: see `planners.viable`."""
        given = {"replan_every": replan_every, "samples": samples, "track": track, "deviation": deviation}
        control = overlaid(self.config["control"], **given)
        if safety is not None:
            from planners import viable

            held = viable.Settings(safety, margin, barriers, model, rising)
            return viable.controller(self, task_spec, sampler or self.config["sampler"], held, seed=seed, **control)
        refuse_unheld("correct", margin=margin is not None, barriers=barriers, model=model, rising=rising is not None)
        return PlanController(self, task_spec, sampler or self.config["sampler"], seed=seed, **control)
