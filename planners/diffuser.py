"""Diffuser (Janner et al. 2022): plan by denoising a whole trajectory, with what is known held clean.

A trajectory is H tokens of (goal features, other observation features, action), `stride` environment steps apart. To
plan from o to a goal g (section 4.3, in-painting), token 0's observation and the goal features of the arrival token are
clean (level 0) while all else is denoised; with rewards instead of goals, the gradient of a value network on noisy
trajectories steers it (section 3.2, algorithm 1):

    d <- d + scale (sigma_t^2 / alpha_t) grad_x V(x_t, t)        eq. 3's shifted mean, written for the data prediction

or, with `value.steer`, chooses among the samples on their way by Feynman-Kac steering to the same p(x) exp(scale V(x)).

Training draws the arrival token at random, so that a plan may arrive early and stay, and learns how long ways from o to g
take in the data, p(k | o, g): asked to arrive sooner or later than the data ever did, a denoiser cuts through walls. The
paper's fixed last token is `arrivals: last`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion import Classifier, Denoiser, Layout, NoiseSchedule, Reference, Tableau, inpaint
from diffusion.guidance import POTENTIALS, FeynmanKac
from diffusion.networks import FourierFeatures, build_network
from diffusion.tableau import Constrain, Select
from offline import Algorithm, DataSpec, Normalizer, Windows, register, sampler_table
from offline.returns import scaled_returns
from pilotwave.errors import UserError, nearest
from planners.controller import PlanController, overlaid, refuse_unheld
from planners.plan import Correction, Plan, Question
from robots.barriers import build

if TYPE_CHECKING:
    from offline.store import TrajectoryStore


@dataclass(frozen=True)
class Arrivals:
    """Where in the horizon the goal is pinned: in training (random tokens (B,)), and in planning (quantiles of when)."""

    train: Callable[[int, int, torch.Generator], Tensor]
    durations: bool  # learn p(arrival | first observation, goal), and plan for arrivals that it finds usual


ARRIVALS = {
    "last": Arrivals(lambda b, h, g: torch.full((b,), h - 1), durations=False),
    "any": Arrivals(lambda b, h, g: torch.randint(1, h, (b,), generator=g), durations=True),
}

# trajectories (B, H, F) from observations, goals and arrival tokens, as `sample_plans` takes them
Draw = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]

UNSAFE = 1e3  # how far behind the others plans are ranked that a correction could not make safe


class Durations(nn.Module):
    """log p(k | o_0, g) over arrival tokens k = 1 .. H - 1, up to a constant: (..., Do + Dg) normalized -> (..., H - 1)."""

    def __init__(self, inputs: int, horizon: int, width: int = 256, fourier: int = 4) -> None:
        super().__init__()
        self.fourier = FourierFeatures(inputs, fourier)
        self.mlp = nn.Sequential(
            nn.Linear(self.fourier.output_dim, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, horizon - 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.fourier(x))

    def loss(self, observation: Tensor, goal_dim: int) -> Tensor:
        """Cross-entropy of windows (B, H, Do): every later token is a goal that was reached after so many."""
        b, horizon, _ = observation.shape
        begun = observation[:, :1].expand(-1, horizon - 1, -1)
        token = torch.arange(horizon - 1, device=observation.device).expand(b, -1)
        logits = self(torch.cat([begun, observation[:, 1:, :goal_dim]], -1)).float()
        return F.cross_entropy(logits.flatten(0, 1), token.flatten())

    def quantiles(self, x: Tensor, q: Tensor) -> Tensor:
        """Arrival tokens (B, n) before which a share q (n,) of the data's ways from x (B, Do + Dg) has arrived."""
        cumulative = self(x).float().softmax(-1).cumsum(-1)
        return (cumulative[:, None] < q[:, None]).sum(-1).clamp_max(cumulative.shape[-1] - 1) + 1


@register
class Diffuser(Algorithm):
    """Config (configs/planner/diffuser.yaml): horizon H, stride, actions, arrivals, schedule, prediction, weighting,
    network, normalizer, sampler, value ({scale, discount, clean, network} or null), and what planning does with them.
    """

    kind, name = "planner", "diffuser"
    longest_step: Tensor

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__(spec, config)
        self.H, self.stride = int(config["horizon"]), int(config["stride"])
        if self.H < 2 or self.stride < 1:
            raise UserError(f"planner.horizon={self.H}, planner.stride={self.stride}; at least 2 and 1 are needed")
        if config["arrivals"] not in ARRIVALS:
            raise nearest("planner.arrivals", str(config["arrivals"]), ARRIVALS)
        self.arrivals = ARRIVALS[config["arrivals"]]
        groups = {"goal": spec.goal_dim, "rest": spec.observation_dim - spec.goal_dim}
        groups["action"] = spec.action_dim if config["actions"] else 0
        groups["beside"] = int(config.get("beside", 0))  # features that are only planned along
        self.layout = Layout(**{name: size for name, size in groups.items() if size})
        self.normalizer = Normalizer.from_shapes({"observation": spec.observation_dim, "action": spec.action_dim})
        variance, shape = config.get("variance", "fixed"), (self.layout.features, self.H, len(self.layout.groups))
        outputs = self.layout.features * (2 if variance == "learned" else 1)
        network = build_network(features=shape[0], horizon=shape[1], groups=shape[2], outputs=outputs, **config["network"])
        schedule = NoiseSchedule.from_config(**config["schedule"])
        self.denoiser = Denoiser(network, schedule, self.layout, config["prediction"], variance)
        # how far the goal features move from token to token in the data, in the task's units
        self.register_buffer("longest_step", torch.tensor(float("inf")))
        self.value_config: dict[str, Any] = dict(config.get("value") or {})
        if self.value_config:
            for key in ("scale", "discount", "network"):
                if key not in self.value_config:
                    raise UserError(f"planner.value lacks {key}; it has scale, discount and network")
            value = dict(self.value_config["network"])
            self.value = build_network(features=self.layout.features, horizon=self.H, groups=len(self.layout.groups), **value)
            steer = self.value_config.get("steer")
            if steer is not None and steer not in POTENTIALS:
                raise nearest("planner.value.steer", str(steer), POTENTIALS)
            if steer is not None and spec.goal_dim:
                raise UserError("planner.value.steer lets plans take each other's place; goals at tokens of their own forbid it")
        if spec.goal_dim and self.arrivals.durations:
            self.durations = Durations(spec.observation_dim + spec.goal_dim, self.H)

    # -- training ------------------------------------------------------------------------------------------------------

    def prepare(self, store: TrajectoryStore) -> None:
        columns = {key: store.columns[key] for key in ("observation", "action")}
        self.normalizer = Normalizer.fit(columns, self.config["normalizer"])
        if self.spec.goal_dim:
            self.longest_step.fill_(self._longest_step(store))

    def _longest_step(self, store: TrajectoryStore) -> float:
        """The distance that 999 of 1000 recorded steps of one token stay below."""
        place = store.columns["observation"][:, : self.spec.goal_dim]
        episode = np.repeat(np.arange(store.episodes), store.lengths)
        same = episode[self.stride :] == episode[: -self.stride]
        moved = np.linalg.norm(place[self.stride :] - place[: -self.stride], axis=1)[same]
        return float(np.quantile(moved, 0.999)) if len(moved) else float("inf")

    def windows(self, store: TrajectoryStore, device: torch.device | str) -> Windows:
        columns = ["observation", "action"]
        if self.value_config:
            if "reward" not in store.columns:
                raise UserError("value guidance needs rewards in the data; leave planner.value null without them")
            columns.append("reward")
        windows = Windows(store, self.H, columns=columns, stride=self.stride, device=device)
        normalizer = self.normalizer.to(device)
        for key in ("observation", "action"):
            windows.columns[key] = normalizer.normalize(key, windows.columns[key])
        if self.value_config:
            windows.columns["return"] = scaled_returns(store, float(self.value_config["discount"])).to(device)
        return windows

    def pack(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Normalized observation (..., Do), action (..., Da) and what is beside them -> x (..., features)."""
        parts = [batch["observation"], *(batch[key] for key in ("action", "beside") if key in self.layout)]
        return torch.cat(parts, dim=-1)

    def clean(self, arrival: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """What is known, (batch, H, groups) bool: the first observation and the goal at the arrival tokens (batch,)."""
        known = torch.zeros(batch, self.H, len(self.layout.groups), dtype=torch.bool, device=device)
        observed = [i for i, group in enumerate(self.layout.groups) if group in ("goal", "rest")]
        known[:, 0, observed] = True
        if arrival is not None:
            known[torch.arange(batch, device=device), arrival, 0] = True
        return known

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x_0 = self.pack(batch)
        b, device = x_0.shape[0], x_0.device
        arrival = self.arrivals.train(b, self.H, generator).to(device) if self.spec.goal_dim else None
        clean = self.clean(arrival, b, device)
        weight = torch.ones(self.H, self.layout.features, device=device)
        if "action" in self.layout:
            weight[0, self.layout["action"]] = float(self.config["first_action_weight"])
        loss = self.denoiser.loss(
            x_0, generator, clean=clean, weighting=self.config["weighting"], weight=weight,
            perturbation=float(self.config.get("input_perturbation", 0.0)),
        )  # fmt: skip
        info = {"loss": loss.detach()}
        if self.spec.goal_dim and self.arrivals.durations:
            duration_loss = self.durations.loss(x_0[..., : self.spec.observation_dim], self.spec.goal_dim)
            info["duration_loss"] = duration_loss.detach()
            loss = loss + float(self.config["duration_weight"]) * duration_loss
        if self.value_config:
            t = torch.rand(b, generator=generator, device=device)
            t[: round(b * float(self.value_config.get("clean", 0.0)))] = 0
            eps = torch.randn(x_0.shape, generator=generator, device=device)
            noisy = self.denoiser.schedule.add_noise(x_0, eps, t[:, None, None])
            value_loss = ((self._value(noisy, t) - batch["return"][:, 0]) ** 2).mean()
            info["value_loss"] = value_loss.detach()
            loss = loss + value_loss
        return loss, info

    def reference(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Reference:
        """A batch of `windows` with what planning would know of it held, for `pilotwave fit`."""
        x_0 = self.pack(batch)
        arrival = self.arrivals.train(len(x_0), self.H, generator).to(x_0.device) if self.spec.goal_dim else None
        clean = self.clean(arrival, len(x_0), x_0.device)
        mask, noisy = self.layout.levels(clean), (~clean).to(x_0.dtype)

        def pin(x: Tensor, t: Tensor) -> Tensor:
            return torch.where(mask, x_0, x)

        def held(call: Any) -> Any:
            return lambda x, t: call(pin(x, t), t * noisy)

        return Reference(held(self.denoiser), x_0, pin, held(self.denoiser.with_variance))

    def _value(self, x: Tensor, t: Tensor) -> Tensor:
        """V(x_t, t): (B, H, F), levels () or (B,) -> (B,), the mean over a network's outputs."""
        levels = t.reshape(-1, 1, 1).expand(x.shape[0], self.H, len(self.layout.groups))
        return self.value(x, levels).float().mean(dim=(1, 2))

    # -- planning ------------------------------------------------------------------------------------------------------

    def table(self, sampler: Mapping[str, Any] | None = None) -> Tableau:
        """The sampler's Tableau: the config's, or another {name, steps, ...}."""
        return sampler_table(self, sampler or self.config["sampler"])

    @torch.no_grad()
    def sample_plans(
        self,
        observation: Tensor,
        goal: Tensor | None,
        arrival: Tensor | None,
        table: Tableau,
        generator: torch.Generator | None = None,
        constrain: Constrain | None = None,
        select: Select | None = None,
        begin: Tensor | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Trajectories (B, H, F) from observations (B, Do), goals (B, Dg), all normalized, and arrival tokens (B,).

        constrain: a further change of the state after each update, which leaves what is known as it is. select: a choice among
        the trajectories on their way, in place of the value's gradient. begin: see `inpaint`. guidance: in place of `value.scale`.
        """
        b, device = observation.shape[0], observation.device
        known = torch.zeros(b, self.H, self.layout.features, device=device)
        known[:, 0, : self.spec.observation_dim] = observation
        if goal is not None:
            known[torch.arange(b, device=device), arrival, : self.spec.goal_dim] = goal
        clean = self.clean(arrival if goal is not None else None, b, device)
        guide = None
        scale = self._scale(guidance)
        if scale and select is None:
            guide = Classifier(self._value, self.denoiser.schedule, scale)
        return inpaint(
            self.denoiser, table, known, clean, generator, guide=guide, constrain=constrain, select=select, begin=begin,
            temperature=float(self.config.get("temperature", 1.0)),
        )  # fmt: skip

    def plan(
        self,
        observation: np.ndarray,
        goal: np.ndarray | None = None,
        samples: int = 1,
        *,
        sampler: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        correction: Correction | None = None,
        arrivals: str | None = None,
        guidance: float | None = None,
        draw: Draw | None = None,
    ) -> Plan:
        """Plans from observations (Do,) or (B, Do) to goals (Dg,) or (B, Dg), in the task's units.

        Returns a Plan of (samples, H, ...) or (B, samples, H, ...), best first: by the value network, or else by
        early arrival among the plans that the denoiser itself finds likely. Goals are needed where the data has them.
        correction: changes the states while they are sampled and after, before the plans are judged. arrivals: a key of
        ARRIVALS in place of the config's. guidance: the scale of the value's gradient in place of `value.scale`, 0 for a choice
        alone. draw: makes the trajectories in place of `sample_plans`.
        """
        device = next(self.parameters()).device
        question = Question.of(self.spec, self.normalizer, observation, goal, samples, device)
        o, g, arrival = question.observation, question.goal, None
        if g is not None:
            arrival = self._arrivals(o[::samples], g[::samples], samples, arrivals).flatten()
        hook = None if correction is None else correction.during
        steering = self._steering(samples, generator, guidance)
        if draw is not None:
            x = draw(o, g, arrival)
        else:
            x = self.sample_plans(o, g, arrival, self.table(sampler), generator, hook, steering, guidance=guidance)
        if steering is not None:
            with torch.no_grad():
                x = steering.finish(x)
        do = self.spec.observation_dim
        observations = self.normalizer.denormalize("observation", x[..., :do])
        if correction is not None:
            corrected = correction.after(observations, arrival)
            observations = corrected.observations
            x = torch.cat([self.normalizer.normalize("observation", observations), x[..., do:]], -1)
        values = self._values(x, observations, arrival)
        if arrival is not None:
            observations = self._stay(observations, arrival)
        if correction is not None:
            observations, values = corrected.path, values - corrected.cost - UNSAFE * (~corrected.safe)
        actions = None
        if "action" in self.layout:
            actions = self.normalizer.denormalize("action", x[..., self.layout["action"]])
        return question.best_first(values, observations, actions, arrival)

    def _scale(self, guidance: float | None) -> float:
        if guidance is not None and not self.value_config:
            raise UserError("controller.guidance scales a value network, which this planner has not; planner.value trains one")
        return float(self.value_config.get("scale", 0.0)) if guidance is None else guidance

    def _steering(self, samples: int, generator: torch.Generator | None, guidance: float | None) -> FeynmanKac | None:
        """The choice among the samples of one observation by the value network, where `value.steer` names a potential."""
        potential, scale = self.value_config.get("steer"), self._scale(guidance)
        if potential is None:
            return None

        def value(x: Tensor, d: Tensor, t: Tensor) -> Tensor:
            return scale * self._value(x, t)

        def reward(x: Tensor) -> Tensor:
            return scale * self._value(x, torch.zeros((), device=x.device))

        return FeynmanKac(reward, samples, value=value, potential=potential, generator=generator)

    def _arrivals(self, o: Tensor, g: Tensor, samples: int, kind: str | None = None) -> Tensor:
        """The tokens (B, samples) to arrive at: spread over the usual durations from o (B, Do) to g (B, Dg), or the last."""
        arrivals = self.arrivals if kind is None else ARRIVALS[kind]
        if not (self.arrivals.durations and arrivals.durations):
            return torch.full((len(o), samples), self.H - 1, device=o.device)
        low, high = self.config["duration_quantiles"]
        q = torch.linspace(low, high, samples, device=o.device)
        return self.durations.quantiles(torch.cat([o, g], -1), q)

    def _stay(self, observations: Tensor, arrival: Tensor) -> Tensor:
        """After the arrival a plan stays where it arrived, at rest (features past the goal's are zero)."""
        token = torch.arange(self.H, device=arrival.device)[None, :]
        at = observations[torch.arange(len(arrival), device=arrival.device), arrival].clone()
        at[:, self.spec.goal_dim :] = 0
        return torch.where((token > arrival[:, None])[..., None], at[:, None], observations)

    def _values(self, x: Tensor, observations: Tensor, arrival: Tensor | None) -> Tensor:
        """(B,): the value network's estimate, or without one minus the arrival token, the surprise and any haste."""
        if self.value_config:
            # plans differ in the third digit
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                return self._value(x.float(), torch.zeros((), device=x.device))
        surprise = self.surprise(x, arrival)
        if arrival is None:
            return -surprise
        moved = observations[..., : self.spec.goal_dim].diff(dim=1).norm(dim=-1)
        until = torch.arange(1, self.H, device=x.device) <= arrival[:, None]
        haste = ((moved * until).amax(dim=1) / self.longest_step - 1).clamp_min(0)
        return -(arrival / self.H) - float(self.config["surprise_weight"]) * (surprise + haste)

    def surprise(self, x: Tensor, arrival: Tensor | None) -> Tensor:
        """How unlikely plans x (B, H, F) are, (B,): the mean of their tokens' surprise until arrival, at `surprise_levels`."""
        error = self.denoiser.surprise(x, self.config["surprise_levels"], self.clean(arrival, len(x), x.device))
        until = torch.arange(self.H, device=x.device) <= (self.H if arrival is None else arrival[:, None])
        return (error * until).sum(1) / until.expand_as(error).sum(1)

    @torch.no_grad()
    def judge(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Values (n,) of other plans without goals, states (n, H, Do) and actions (n, H, Da), by the same measure."""
        device = next(self.parameters()).device
        parts = {"observation": observations, "action": actions}
        tensors = {key: torch.as_tensor(part, dtype=torch.float32, device=device) for key, part in parts.items()}
        x = self.pack({key: self.normalizer.normalize(key, part) for key, part in tensors.items()})
        return self._values(x, tensors["observation"], None).cpu().numpy()

    def controller(
        self,
        task_spec: Any,
        *,
        sampler: Mapping[str, Any] | None = None,
        replan_every: int | None = None,
        samples: int | None = None,
        track: str | None = None,
        deviation: float | None = None,
        lookahead: float | None = None,
        arrivals: str | None = None,
        guidance: float | None = None,
        safety: str | None = None,
        margin: float | None = None,
        barriers: Sequence[Mapping[str, Any]] = (),
        places: bool = True,
        model: str | None = None,
        rising: float | None = None,
        seed: int = 0,
    ) -> PlanController:
        """This planner for roll-outs and robots.

        replan_every: steps between plans, 0 to plan once; samples: plans to choose from; track: "pd" tracks the planned
        states, "actions" carries out the planned actions; deviation, lookahead: see PlanController; arrivals, guidance: see `plan`.
        Defaults are the config's `control`. safety: a method of `planners.safe`, whose plans keep `margin` from `barriers`
        (settings of `robots.barriers.build`) and from the hazards that a task observes; None plans past them. places: with
        safety, whether the places of the data are used where they were kept beside the weights. Plans without goals are corrected
        as `planners.viable` says, whose `model` and `rising` they are.
        """
        given = {"replan_every": replan_every, "samples": samples, "track": track, "deviation": deviation}
        control = overlaid(self.config["control"], **given, lookahead=lookahead)
        settings = sampler or self.config["sampler"]
        if arrivals is not None and arrivals not in ARRIVALS:
            raise nearest("controller.arrivals", str(arrivals), ARRIVALS)
        self._scale(guidance)  # refuses here what a plan would
        if guidance is not None and safety is not None:
            raise UserError("controller.guidance is for plans without controller.safety")
        if getattr(task_spec, "apart", 0.0):
            if barriers or safety not in (None, "correct"):
                raise UserError("two robots are planned for with controller.safety=correct, or each alone without; no barriers")
            from planners.joint import JointDiffuser
            from planners.places import Places

            known = Places.beside(self.origin) if places else None
            joint = JointDiffuser(self, task_spec.apart if safety else 0.0, margin=margin, places=known)
            return PlanController(joint, task_spec, settings, seed=seed, **control)
        if safety is not None and not self.spec.goal_dim:
            from planners import viable

            held = viable.Settings(safety, margin, barriers, model, rising)
            return viable.controller(self, task_spec, settings, held, seed=seed, **control)
        if safety is not None and (model or rising is not None):
            raise UserError("controller.model and controller.rising are of plans without goals, under a roof")
        if safety is not None:
            from planners.places import Places
            from planners.safe import SafeController, SafeDiffuser

            planner = SafeDiffuser(self, safety, margin=margin, places=Places.beside(self.origin) if places else None)
            built = build(barriers, self.spec.observation_dim)
            if not built and not task_spec.hazards:
                raise UserError(f"{task_spec.name} has no hazards to plan past; add barriers=[...], or take a task that has some")
            return SafeController(planner, task_spec, settings, barriers=built, seed=seed, **control)
        refuse_unheld(
            "ros, res, tvs or correct", margin=margin is not None, barriers=barriers, model=model, rising=rising is not None
        )
        options = {"arrivals": arrivals, "guidance": guidance}
        return PlanController(self, task_spec, settings, seed=seed, options=options, **control)


__all__: Sequence[str] = ["ARRIVALS", "Arrivals", "Diffuser"]
