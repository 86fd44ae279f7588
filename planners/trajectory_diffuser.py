"""Trajectory Diffuser (Huang et al. 2024, "Diffusion Models as Optimizers for Efficient Planning in Offline RL").

An autoregressive model proposes a way, diffusion only makes it better:

    propose   o_(k+1) ~ N(o_k + s m_k, (s e^(l_k))^2),  (m_k, l_k) = f(o_0 .. o_k, c_k)      a causal transformer
    noise     x_T' = alpha(T') x + sigma(T') eps        at a middle level T' < 1 (SDEdit, Meng et al. 2022)
    refine    x_T' -> x_0                               a Diffuser's few last steps, with what is known held clean
    actions   a = h(o_k, o_(k+1))                       inverse dynamics

with s the deviation of a step in the data. Where generating a trajectory takes most of a diffusion's steps, and what these
settle is its coarse shape, the proposal gives that shape for the price of a small network. c_k says what is wanted: in the paper
the return to go, and in tasks with goals here the goal and how many tokens are left until its arrival, which is Diffuser's
learned one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion import Tableau, spaced
from diffusion.networks import build_network
from offline import Algorithm, DataSpec, Normalizer, Windows, register
from offline.returns import scaled_returns
from pilotwave.errors import UserError
from planners.controller import PlanController, overlaid, refuse_unheld
from planners.diffuser import Diffuser
from planners.inverse_dynamics import InverseDynamics
from planners.plan import Plan

if TYPE_CHECKING:
    from offline.store import TrajectoryStore


class Proposer(nn.Module):
    """p(o_(k+1) | o_0 .. o_k, c_0 .. c_k), Gaussian, of normalized observations (B, H, Do) and what is wanted (B, H, C)."""

    step: Tensor

    def __init__(self, observation_dim: int, wanted: int, horizon: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.H = horizon
        self.network = build_network(
            features=observation_dim + wanted, horizon=horizon, groups=1, outputs=2 * observation_dim, causal=True, **config
        )
        self.register_buffer("step", torch.ones(observation_dim))  # the deviation of o_(k+1) - o_k in the data

    def forward(self, o: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log deviation, (B, K, Do) each, of what follows the first K tokens, in steps."""
        x = torch.cat([o, wanted], -1)
        mean, log_deviation = self.network(x, torch.zeros_like(x[..., :1])).float().chunk(2, -1)
        return mean, log_deviation.clamp(-5, 2)

    def loss(self, o: Tensor, wanted: Tensor) -> Tensor:
        """The negative log-likelihood of recorded tokens, up to a constant: a mean over all numbers."""
        mean, log_deviation = self(o[:, :-1], wanted[:, :-1])
        loss: Tensor = F.gaussian_nll_loss(mean, o.diff(dim=1) / self.step, (2 * log_deviation).exp())
        return loss

    def propose(self, o: Tensor, wanted: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
        """Trajectories (B, H, Do) from first observations (B, Do); temperature multiplies the variance of each step."""
        x = o[:, None]
        for k in range(1, self.H):
            mean, log_deviation = (part[:, -1] for part in self(x, wanted[:, :k]))
            eps = torch.empty_like(mean).normal_(generator=generator)
            following = x[:, -1] + self.step * (mean + temperature**0.5 * log_deviation.exp() * eps)
            x = torch.cat([x, following[:, None]], 1)
        return x


@register
class TrajectoryDiffuser(Algorithm):
    """Config (configs/planner/trajectory_diffuser.yaml): Diffuser's, for what refines, of states alone; `level`, T', from which it
    does (0: the proposal is the plan); proposer {temperature, network}; wanted {discount, quantile}, the return that is asked for
    where there are no goals, as a quantile of the data's.
    """

    kind, name = "planner", "trajectory_diffuser"
    target: Tensor

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__(spec, config)
        self.level = float(config["level"])
        if not 0 <= self.level <= 1:
            raise UserError(f"planner.level={self.level:g}; a level is a number from 0 to 1")
        self.refiner = Diffuser(spec, {**config, "actions": False})
        self.H, self.stride = self.refiner.H, self.refiner.stride
        network = dict(config["proposer"]["network"])
        self.proposer = Proposer(spec.observation_dim, spec.goal_dim + 1, self.H, network)
        self.inverse_dynamics = InverseDynamics(spec.observation_dim, spec.action_dim)
        self.register_buffer("target", torch.zeros(()))  # the return that is asked for, scaled

    @property
    def normalizer(self) -> Normalizer:
        """The refiner's."""
        return self.refiner.normalizer

    # -- training ------------------------------------------------------------------------------------------------------

    def prepare(self, store: TrajectoryStore) -> None:
        self.refiner.prepare(store)
        windows = self.refiner.windows(store, "cpu")
        some = windows.gather(torch.linspace(0, len(windows) - 1, min(len(windows), 2000)).long())["observation"]
        self.proposer.step.copy_(some.diff(dim=1).std(dim=(0, 1)).clamp_min(1e-3))
        if not self.spec.goal_dim:
            returns = scaled_returns(store, float(self.config["wanted"]["discount"])).double()
            self.target.fill_(float(np.quantile(returns.numpy(), float(self.config["wanted"]["quantile"]))))

    def windows(self, store: TrajectoryStore, device: torch.device | str) -> Windows:
        windows = self.refiner.windows(store, device)
        if not self.spec.goal_dim:
            windows.columns["wanted"] = scaled_returns(store, float(self.config["wanted"]["discount"])).to(windows.device)
        return windows

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        loss, info = self.refiner.loss(batch, generator)
        o, b = batch["observation"], len(batch["observation"])
        if self.spec.goal_dim:
            arrival = self.refiner.arrivals.train(b, self.H, generator).to(o.device)
            wanted = self.wanted(o[torch.arange(b, device=o.device), arrival, : self.spec.goal_dim], arrival)
        else:
            wanted = batch["wanted"][:, :1, None].expand(-1, self.H, -1)
        proposer_loss = self.proposer.loss(o, wanted)
        inverse_loss = self.inverse_dynamics.loss(o, batch["action"])
        info |= {"proposer_loss": proposer_loss.detach(), "inverse_loss": inverse_loss.detach()}
        return loss + float(self.config["proposer"]["weight"]) * proposer_loss + inverse_loss, info

    def wanted(self, goal: Tensor, arrival: Tensor) -> Tensor:
        """c (B, H, Dg + 1): the goal (B, Dg), and the share of the horizon that is left until the arrival tokens (B,)."""
        left = (arrival[:, None] - torch.arange(self.H, device=goal.device)) / self.H
        return torch.cat([goal[:, None].expand(-1, self.H, -1), left[..., None]], -1)

    # -- planning ------------------------------------------------------------------------------------------------------

    def table(self, sampler: Mapping[str, Any] | None = None, level: float | None = None) -> Tableau:
        """The sampler's steps, laid from the level down to 0; none where it is 0."""
        level, settings = self.level if level is None else level, dict(sampler or self.config["sampler"])
        if level == 0:
            return Tableau("none", ())
        if isinstance(settings["steps"], int):
            steps = spaced(self.refiner.denoiser.schedule, settings["steps"], settings.pop("spacing", "uniform"))
            settings["steps"] = (level * steps).tolist()
        return self.refiner.table(settings)

    @torch.no_grad()
    def propose(self, o: Tensor, g: Tensor | None, arrival: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
        """Proposals (B, H, Do) from observations (B, Do) to goals (B, Dg) at tokens (B,), all normalized."""
        if g is not None and arrival is not None:
            wanted = self.wanted(g, arrival)
        else:
            wanted = self.target.expand(len(o), self.H, 1)
        return self.proposer.propose(o, wanted, float(self.config["proposer"]["temperature"]), generator)

    @torch.no_grad()
    def plan(
        self,
        observation: np.ndarray,
        goal: np.ndarray | None = None,
        samples: int = 1,
        *,
        sampler: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        level: float | None = None,
    ) -> Plan:
        """As Diffuser.plan, (samples, H, ...) or (B, samples, H, ...), ranked as there. level: T' in place of the config's."""
        table = self.table(sampler, level)

        def draw(o: Tensor, g: Tensor | None, arrival: Tensor | None) -> Tensor:
            proposal = self.propose(o, g, arrival, generator)
            if not table.rows:
                return proposal
            return self.refiner.sample_plans(o, g, arrival, table, generator, begin=proposal)

        plan = self.refiner.plan(observation, goal, samples, draw=draw)
        states = torch.as_tensor(plan.observations, device=self.target.device)
        x = self.normalizer.normalize("observation", states)
        actions = self.normalizer.denormalize("action", self.inverse_dynamics.along(x.flatten(0, -3)))
        return Plan(plan.observations, actions.view(*states.shape[:-1], -1).cpu().numpy(), plan.values, plan.arrivals)

    def judge(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Values (n,) of other plans without goals, states (n, H, Do), by the same measure."""
        return self.refiner.judge(observations, actions)

    def controller(
        self,
        task_spec: Any,
        *,
        sampler: Mapping[str, Any] | None = None,
        replan_every: int | None = None,
        samples: int | None = None,
        track: str | None = None,
        deviation: float | None = None,
        level: float | None = None,
        safety: str | None = None,
        margin: float | None = None,
        barriers: Sequence[Mapping[str, Any]] = (),
        model: str | None = None,
        rising: float | None = None,
        seed: int = 0,
    ) -> PlanController:
        """This planner for roll-outs and robots; see Diffuser's. level: see `plan`. The proposer's calls count as evaluations.
        safety, margin, barriers, model, rising: see `planners.viable`."""
        given = {"replan_every": replan_every, "samples": samples, "track": track, "deviation": deviation}
        control = overlaid(self.config["control"], **given)
        settings = sampler or self.config["sampler"]
        if safety is not None and level is not None:
            raise UserError("controller.level is for plans without controller.safety")
        if safety is not None:
            from planners import viable

            held = viable.Settings(safety, margin, barriers, model, rising)
            controller = viable.controller(self, task_spec, settings, held, seed=seed, **control)
        else:
            refuse_unheld("correct", margin=margin is not None, barriers=barriers, model=model, rising=rising is not None)
            controller = PlanController(self, task_spec, settings, seed=seed, options={"level": level}, **control)
        controller.evaluations = self.table(settings, level).evaluations + self.H - 1
        return controller
