"""Diffusion Forcing (Chen et al. 2024, "Next-token Prediction Meets Full-Sequence Diffusion", arXiv 2407.01392).

Every token k of a trajectory has a noise level t_k of its own. A causal transformer learns to denoise all mixtures of them
(algorithm 1), so that one model generates the next token, or the whole sequence, or anything between (algorithm 2):

    training    min(SNR(t_k), 5) |x_k - D(x_1^t_1 .. x_k^t_k)|^2,  t_1 .. t_H independent        Hang et al. 2023's weight
    sampling    rows of a matrix of levels: full_sequence, pyramid (the far future stays noisy for longer), autoregressive
    history     what is clean is shown as alpha(h) x at a small level h > 0, so that errors in it do not add up
    guidance    d <- d + w (sigma^2 / alpha) grad log p(wanted | D(x, t)), through the network: the future moves the past

The planner is not conditioned on the goal, it is guided to it. log p is -|g - o_k|^2 / 2 (s^2 + r^2) for the token k at which to
arrive, where r^2 = sigma^2 / (alpha^2 + sigma^2) is how unsure D is of it (Song et al. 2023, pseudo-inverse guidance); the
paper's is the sum of all tokens' distances. k is spread over the usual durations of the data, which Diffuser's network learns
beside. Without goals tokens hold rewards, and log p is their sum, as in the paper; with a `discount` above 0 they hold the returns
to go, since few steps' rewards do not say who will fall. Actions are inverse dynamics'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffusion import Classifier, Denoiser, Layout, NoiseSchedule, Tableau, level_matrices, sample, spaced
from diffusion.networks import build_network
from offline import Algorithm, DataSpec, Normalizer, Windows, register, sampler_table
from offline.returns import returns_to_go
from pilotwave.errors import UserError, nearest
from planners.controller import PlanController, overlaid
from planners.diffuser import Durations
from planners.inverse_dynamics import InverseDynamics
from planners.plan import Plan, Question, ended

if TYPE_CHECKING:
    from offline.store import TrajectoryStore

MATRICES: dict[str, Callable[..., Tensor]] = {
    "full_sequence": level_matrices.full_sequence,
    "pyramid": level_matrices.pyramid,
    "autoregressive": level_matrices.autoregressive,
}


def independent(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Levels (B, H, G), every one uniform and independent of the others."""
    return torch.rand(shape, generator=generator, device=generator.device)


def mixed(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Levels (B, H, G): independent in half of the windows, one for all tokens in the others, as a full sequence has them."""
    levels = independent(shape, generator)
    levels[::2] = levels[::2, :1, :1].expand_as(levels[::2])
    return levels


LEVELS = {"independent": independent, "mixed": mixed}


@register
class DiffusionForcing(Algorithm):
    """Config (configs/planner/forcing.yaml): horizon H, stride, levels (a key of LEVELS), schedule, prediction, weighting, network,
    normalizer, sampler; discount of the returns that tokens hold, without goals; matrix {name, ...}, of MATRICES; history_level h;
    guidance {scale w, deviation s, bound of the guided prediction}; `arrive`, how near to its goal a plan ends, in the task's
    units; and what it takes to rank several plans.
    """

    kind, name = "planner", "forcing"

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__(spec, config)
        self.H, self.stride = int(config["horizon"]), int(config["stride"])
        if self.H < 2 or self.stride < 1:
            raise UserError(f"planner.horizon={self.H}, planner.stride={self.stride}; at least 2 and 1 are needed")
        for key, value, known in (("levels", config["levels"], LEVELS), ("matrix.name", config["matrix"]["name"], MATRICES)):
            if value not in known:
                raise nearest(f"planner.{key}", str(value), known)
        groups = {"observation": spec.observation_dim} | ({} if spec.goal_dim else {"reward": 1})
        self.layout = Layout(**groups)
        self.normalizer = Normalizer.from_shapes(groups | {"action": spec.action_dim})
        network = build_network(features=self.layout.features, horizon=self.H, groups=len(self.layout.groups), **config["network"])
        self.denoiser = Denoiser(network, NoiseSchedule.from_config(**config["schedule"]), self.layout, config["prediction"])
        self.inverse_dynamics = InverseDynamics(spec.observation_dim, spec.action_dim)
        if spec.goal_dim:
            self.durations = Durations(spec.observation_dim + spec.goal_dim, self.H)

    # -- training ------------------------------------------------------------------------------------------------------

    def prepare(self, store: TrajectoryStore) -> None:
        self.normalizer = Normalizer.fit(self._columns(store), self.config["normalizer"])

    def _columns(self, store: TrajectoryStore) -> dict[str, np.ndarray]:
        """What is learned from, (N, ...) each; returns in place of rewards."""
        columns = {key: store.columns[key] for key in ("observation", "action")}
        if "reward" in self.layout:
            columns["reward"] = returns_to_go(store, float(self.config.get("discount", 0.0)))[:, None]
        return columns

    def windows(self, store: TrajectoryStore, device: torch.device | str) -> Windows:
        windows = Windows(store, self.H, columns=[], stride=self.stride, device=device)
        normalizer = self.normalizer.to(device)
        for key, column in self._columns(store).items():
            windows.columns[key] = normalizer.normalize(key, torch.as_tensor(column, dtype=torch.float32).to(windows.device))
        return windows

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x_0 = self.layout.pack(batch)
        levels = LEVELS[self.config["levels"]]((len(x_0), self.H, len(self.layout.groups)), generator).to(x_0.device)
        loss = self.denoiser.loss(x_0, generator, levels=levels, weighting=self.config["weighting"], gamma=5.0)
        inverse_loss = self.inverse_dynamics.loss(batch["observation"], batch["action"])
        info = {"loss": loss.detach(), "inverse_loss": inverse_loss.detach()}
        loss = loss + inverse_loss
        if self.spec.goal_dim:
            duration_loss = self.durations.loss(batch["observation"], self.spec.goal_dim)
            info["duration_loss"] = duration_loss.detach()
            loss = loss + float(self.config["duration_weight"]) * duration_loss
        return loss, info

    # -- planning ------------------------------------------------------------------------------------------------------

    def table(self, sampler: Mapping[str, Any] | None = None) -> Tableau:
        """The sampler's steps, for every token after the config's matrix; the first observation is known."""
        settings, matrix = dict(sampler or self.config["sampler"]), dict(self.config["matrix"])
        levels = spaced(self.denoiser.schedule, settings["steps"], settings.pop("spacing", "uniform"))
        settings["steps"] = MATRICES[matrix.pop("name")](levels, self.H, **matrix)
        tokens = torch.ones(self.H, len(self.layout.groups))
        tokens[0, self.layout.groups.index("observation")] = 0
        return sampler_table(self, {**settings, "tokens": tokens, "layout": self.layout})

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """D(x, t) with levels (1, H, F): tokens cleaner than the level h are shown as it has them, with no noise added."""
        schedule, h = self.denoiser.schedule, float(self.config["history_level"])
        shown = t.clamp_min(h)
        return self.denoiser(x * schedule.alpha(shown) / schedule.alpha(t), shown)

    @torch.no_grad()
    def sample_plans(
        self,
        o: Tensor,
        g: Tensor | None,
        arrival: Tensor | None,
        table: Tableau,
        scale: float,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Trajectories (B, H, F) from observations (B, Do), guided to goals (B, Dg) at tokens (B,), all normalized, or to
        rewards. scale: w."""
        noise = torch.empty(len(o), self.H, self.layout.features, device=o.device).normal_(generator=generator)
        x_T = noise * self.denoiser.schedule.sigma(torch.ones((), device=o.device))
        x_T[:, 0, self.layout["observation"]] = o

        def log_p(x: Tensor, t: Tensor) -> Tensor:
            d = self.denoise(x, t)
            return self.log_rewards(d) if g is None or arrival is None else self.log_arrives(d, t, g, arrival)

        classifier, bound = Classifier(log_p, self.denoiser.schedule, scale), float(self.config["guidance"]["bound"])

        def guide(d: Tensor, y: Tensor, t: Tensor) -> Tensor:
            return classifier(d, y, t).clamp(-bound, bound)

        return sample(self.denoise, table, x_T, generator, guide=guide if scale else None)

    def log_rewards(self, d: Tensor) -> Tensor:
        """The sum of the rewards that are predicted, (B,) from (B, H, F)."""
        return d[..., self.layout["reward"]].sum((1, 2))

    def log_arrives(self, d: Tensor, t: Tensor, g: Tensor, arrival: Tensor) -> Tensor:
        """log N(g; o_k, s^2 + r^2), up to a constant, (B,) from predictions (B, H, F) at levels (1, H, F)."""
        alpha, sigma = (f(t).expand_as(d) for f in (self.denoiser.schedule.alpha, self.denoiser.schedule.sigma))
        rows = torch.arange(len(d), device=d.device)
        place, a, s = (part[rows, arrival, : g.shape[-1]] for part in (d, alpha, sigma))
        variance = float(self.config["guidance"]["deviation"]) ** 2 + s**2 / (a**2 + s**2)
        return -((g - place) ** 2 / (2 * variance)).sum(-1)

    @torch.no_grad()
    def plan(
        self,
        observation: np.ndarray,
        goal: np.ndarray | None = None,
        samples: int = 1,
        *,
        sampler: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        guidance: float | None = None,
    ) -> Plan:
        """Plans (samples, H, ...) or (B, samples, H, ...) from observations (Do,) or (B, Do), in the task's units.

        Best first: plans that the model finds likely, and that come to their goals, (Dg,) or (B, Dg), soon, or promise the most
        reward. A plan that comes within `arrive` of its goal ends there. guidance: w in place of the config's.
        """
        device = next(self.parameters()).device
        question = Question.of(self.spec, self.normalizer, observation, goal, samples, device)
        o, g, arrivals = question.observation, question.goal, None
        if g is not None:
            low, high = self.config["duration_quantiles"]
            q = torch.linspace(low, high, samples, device=device)
            arrivals = self.durations.quantiles(torch.cat([o, g], -1)[::samples], q).flatten()
        x = self.sample_plans(o, g, arrivals, self.table(sampler), self._scale(guidance), generator)
        states = self.normalizer.denormalize("observation", x[..., self.layout["observation"]])
        values = -float(self.config["surprise_weight"]) * self.surprise(x)
        if g is None:
            values = values + self.log_rewards(x) / self.H
        else:
            to = self.normalizer.denormalize("observation", torch.cat([g, o[:, g.shape[-1] :]], 1))[:, : g.shape[-1]]
            states, arrivals, distance = ended(states, to, float(self.config["arrive"]))
            values = values - arrivals / self.H - (distance - float(self.config["arrive"])).clamp_min(0)
        actions = self.inverse_dynamics.along(self.normalizer.normalize("observation", states))
        return question.best_first(values, states, self.normalizer.denormalize("action", actions), arrivals)

    def _scale(self, guidance: float | None) -> float:
        return float(self.config["guidance"]["scale"]) if guidance is None else guidance

    def surprise(self, x: Tensor) -> Tensor:
        """How unlikely trajectories x (B, H, F) are given the first observation, (B,)."""
        clean = torch.zeros(len(x), self.H, len(self.layout.groups), dtype=torch.bool, device=x.device)
        clean[:, 0, self.layout.groups.index("observation")] = True
        return self.denoiser.surprise(x, self.config["surprise_levels"], clean).mean(1)

    def controller(
        self,
        task_spec: Any,
        *,
        sampler: Mapping[str, Any] | None = None,
        replan_every: int | None = None,
        samples: int | None = None,
        track: str | None = None,
        deviation: float | None = None,
        guidance: float | None = None,
        seed: int = 0,
    ) -> PlanController:
        """This planner for roll-outs and robots; see Diffuser's. guidance: see `plan`."""
        given = {"replan_every": replan_every, "samples": samples, "track": track, "deviation": deviation}
        control = overlaid(self.config["control"], **given)
        settings = sampler or self.config["sampler"]
        controller = PlanController(self, task_spec, settings, seed=seed, options={"guidance": guidance}, **control)
        controller.evaluations *= 2 if self._scale(guidance) else 1
        return controller
