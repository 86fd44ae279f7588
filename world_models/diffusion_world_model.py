"""Diffusion World Model (Ding et al. 2024): the next T observations and rewards are denoised at once, given the actions.

    (o_1..o_T, r_1..r_T) = D(x_t, t; o_{1-h}..o_0, a_{1-h}..a_{T-1})                              (the paper's eq. 6)

Token k of x holds o_k, r_k and the action a_{k-1} that led there. Actions are clean tokens, level 0, of the same denoiser; states
are denoised beside a forecast, in its usual errors (see `world_models.base`). The denoiser knows that time has a direction:
one cell, the same for every step, goes from the estimate of state k - 1 to that of state k, as a simulator does, and sees of
the noisy state k its linear estimate. So an estimate rests on the whole way there, and the loss, which is that of all T
states, teaches the cell to be right where its own estimates lead: at t = 1 this is a one-step network that was trained through
T steps (causal and recurrent as Diffusion Forcing's denoiser, Chen et al. 2024, section 3.3). r_k is estimated from the noisy
r_k and the estimates of o_{k-1} and o_k, which it does not bend: its loss stops there.

The paper conditions on the first action and a return, and leaves later actions to the data's behaviour; here all actions
are given, so that the model answers for any of them. Past its horizon it goes on from its own last predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffusion import Denoiser, Layout, NoiseSchedule, inpaint
from diffusion.networks import build_network
from offline import DataSpec, register, sampler_table
from world_models.base import RewardHead, Scene, WorldModel, spread

if TYPE_CHECKING:
    from offline.store import TrajectoryStore


@dataclass
class Outlook:
    """The denoiser's condition: what is known, and the states (B, T, Dz) that are forecast, with their usual errors."""

    world: WorldModel
    scene: Scene
    forecast: Tensor
    usual: Tensor

    def simulate(self, action: Tensor, correct: Any = None) -> Tensor:
        """States (B, T, Dz) under a_0..a_{T-1} (B, T, Da), in the coordinates of the scene, step by step: each is the forecast of
        one step, with the cell's correction (k, step) -> (B, Dz)."""
        frame, h = self.world.frame, self.world.h
        states, known = [*self.scene.past.unbind(1)], self.scene.known
        action = torch.cat([self.scene.action[:, : h - 1], action], 1)
        for k in range(self.world.T):
            step = self.world.step(torch.stack(states[-h:], 1), known, action[:, k : k + h])
            ahead = step.forecast if correct is None else step.forecast + step.scale * correct(k, step)
            states.append(frame.uncentre(ahead, step.at))
            known = torch.cat([known[:, 1:], torch.ones_like(known[:, :1])], 1)
        return torch.stack(states[h:], 1)

    def transitions(self, states: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the rewards of such states and actions are read from."""
        frame, origin = self.world.frame, self.scene.origin
        observations = frame.leave(torch.cat([self.scene.past[:, -1:], states], 1), origin)
        return self.world.transitions(observations, frame.leave_actions(action, origin))


class Simulator(nn.Module):
    """One cell carried along the horizon: noisy x (B, T, F) and levels (B, T, groups) -> x_0 (B, T, F).

    Actions are taken as they are: their level is 0. The cell sees a step's condition, the state's level, and the linear estimate
    of x_0 (EDM's c_skip, Karras et al. 2022, table 1): for states, how far that lies from the one-step forecast, trusted as
    much as the level allows. Pure noise is 0. `reward`, where there are rewards, sees the transition, and of r_k the same.
    """

    def __init__(self, layout: Layout, cell: nn.Module, reward: nn.Module | None, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.layout, self.cell, self.reward, self.schedule = layout, cell, reward, schedule

    def forward(self, x: Tensor, t: Tensor, outlook: Outlook) -> Tensor:
        a, s = self.schedule.alpha(t), self.schedule.sigma(t)
        trust = a**2 / (a**2 + s**2)
        estimate = x * self.layout.levels(a * torch.rsqrt(a**2 + s**2))  # x comes with unit variance
        seen = self.layout.unpack(estimate)
        action = outlook.world.normalizer.denormalize("action", seen["action"])

        def correct(k: int, step: Any) -> Tensor:
            plain = outlook.world.frame.uncentre(step.forecast, step.at)
            beside = trust[:, k, :1] * (outlook.forecast[:, k] - plain) / outlook.usual[:, k]
            out: Tensor = self.cell((seen["state"][:, k] + beside)[:, None], t[:, k : k + 1, :1], step.condition)[:, 0]
            return out.to(x.dtype)

        states = outlook.simulate(action, correct)
        parts = {"state": (states - outlook.forecast) / outlook.usual, "action": seen["action"]}
        if self.reward is not None:
            parts["reward"] = self.reward(*outlook.transitions(states.detach(), action), seen["reward"], t[..., -1:])
        return self.layout.pack(parts)


@register
class DiffusionWorldModel(WorldModel):
    """Config (configs/world_model/diffusion_world_model.yaml): WorldModel's, schedule, noise, network (the cell), sampler,
    samples (predictions that are averaged)."""

    name = "diffusion_world_model"
    usual: Tensor
    clean: Tensor

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__(spec, config)
        dz = self.frame.features
        self.layout = Layout(state=dz, action=spec.action_dim, **({"reward": 1} if self.reward else {}))
        cell = build_network(features=dz, horizon=1, groups=1, condition_dim=self.condition_dim, **config["network"])
        reward = RewardHead(self.reward_inputs + 2) if self.reward else None
        schedule = NoiseSchedule.from_config(**config["schedule"])
        self.denoiser = Denoiser(Simulator(self.layout, cell, reward, schedule), schedule, self.layout, "data")
        # idea 2: the question that a world model answers is that its actions are clean
        self.register_buffer("clean", torch.tensor([group == "action" for group in self.layout.groups]), persistent=False)
        self.samples, self.noise = int(config["samples"]), float(config["noise"])
        # the usual error of the forecast, carried on for T steps, without and with a known past
        self.register_buffer("usual", torch.ones(2, self.T, dz))
        self.choose(config["sampler"])

    def choose(self, sampler: Mapping[str, Any]) -> None:
        """Another sampler {name, steps, ...} for the roll-outs that follow."""
        self.table = sampler_table(self, sampler)
        self.evaluations = self.table.evaluations

    def networks(self) -> list[nn.Module]:
        return [module for path, module in self.named_modules() if path.endswith(".cell")]

    def prepare(self, store: TrajectoryStore) -> None:
        super().prepare(store)
        batch = self.whole_windows(store)
        past, future = batch["observation"].split([self.h, self.T], 1)
        for k, first in enumerate((self.h - 1, 0)):
            known = (torch.arange(self.h) >= first).expand(len(past), -1)
            outlook = self.outlook(past, known, batch["action"][:, :-1])
            error = self.frame.enter(future, outlook.scene.origin) - outlook.forecast
            self.usual[k] = torch.maximum(spread(error), self.negligible())

    def outlook(self, past: Tensor, known: Tensor, actions: Tensor) -> Outlook:
        """past (B, h, Do) of which `known` (B, h) are meaningful, actions (B, h - 1 + T, Da), in the task's units."""
        usual = torch.where(known.all(1)[:, None, None], self.usual[1], self.usual[0])
        outlook = Outlook(self, self.scene(past, known, actions), usual, usual)
        outlook.forecast = outlook.simulate(outlook.scene.action[:, self.h - 1 :])
        return outlook

    def pack(self, outlook: Outlook, state: Tensor, reward: Tensor | None) -> Tensor:
        """x (B, T, F) of states (B, T, Dz) beside the forecast, rewards (B, T, 1) in the task's units, and the actions."""
        parts = {"state": state, "action": self.normalizer.normalize("action", outlook.scene.action[:, self.h - 1 :])}
        if reward is not None:
            parts["reward"] = self.normalizer.normalize("reward", reward)
        return self.layout.pack(parts)

    def levels(self, batch: int, generator: torch.Generator) -> Tensor:
        """Training levels (B,) of density proportional to t^(noise - 1): uniform, or more of them where little is known."""
        device = self.deviation.device
        u = (torch.rand((), generator=generator, device=device) + torch.arange(batch, device=device) / batch) % 1
        return (u ** (1 / self.noise)).clamp_min(1e-3)

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        known = self.known_past(batch["valid"], generator)
        past, future = batch["observation"].split([self.h, self.T], 1)
        outlook = self.outlook(past, known, batch["action"][:, :-1])
        state = (self.frame.enter(future, outlook.scene.origin) - outlook.forecast) / outlook.usual
        x_0 = self.pack(outlook, state, batch["reward"][:, self.h - 1 : -1, None] if self.reward else None)
        levels, clean = self.levels(len(x_0), generator), self.clean.expand(len(x_0), self.T, -1)
        perturbation = float(self.config.get("input_perturbation", 0.0))
        loss = self.denoiser.loss(x_0, generator, condition=outlook, levels=levels, clean=clean, perturbation=perturbation)
        return loss, {"loss": loss.detach()}

    def predict(
        self, past: Tensor, known: Tensor, actions: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        n = self.samples
        outlook = self.outlook(*(each.repeat_interleave(n, 0) for each in (past, known, actions)))
        nothing = torch.zeros_like(outlook.forecast)
        given = self.pack(outlook, nothing, nothing[..., :1] if self.reward else None)
        clean = self.clean.expand(*given.shape[:2], -1)
        out = self.layout.unpack(inpaint(self.denoiser, self.table, given, clean, generator, condition=outlook))
        state = (outlook.forecast + out["state"] * outlook.usual).unflatten(0, (-1, n)).mean(1)
        observations = self.frame.leave(state, self.scene(past, known, actions).origin)
        if not self.reward:
            return observations, None
        reward = out["reward"].unflatten(0, (-1, n)).mean(1)
        return observations, self.normalizer.denormalize("reward", reward)[..., 0]
