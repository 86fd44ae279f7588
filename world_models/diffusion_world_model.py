"""Diffusion World Model (Ding et al. 2024): the next T observations and rewards are denoised at once, given the actions.

    (o_1..o_T, r_1..r_T) = D(x_t, t; o_{1-h}..o_0, a_{1-h}..a_{T-1})                              (the paper's eq. 6)

States are denoised beside a forecast, in its usual errors (see `world_models.base`). The denoiser knows that time has a
direction: one cell, the same for every step, goes from the estimate of state k - 1 to that of state k, as a simulator does,
and sees of the noisy state k its linear estimate. So an estimate rests on the whole way there, and the loss, which is that of
all T states, teaches the cell to be right where its own estimates lead: at t = 1 this is a one-step network that was trained
through T steps (causal and recurrent as Diffusion Forcing's denoiser, Chen et al. 2024, section 3.3).

The paper conditions on the first action and a return, and leaves later actions to the data's behaviour; here all actions
are given, so that the model answers for any of them. Past its horizon it goes on from its own last predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffusion import Denoiser, Layout, NoiseSchedule, sample
from diffusion.networks import build_network
from offline import DataSpec, register, sampler_table
from world_models.base import Scene, WorldModel, spread

if TYPE_CHECKING:
    from offline.store import TrajectoryStore


@dataclass
class Outlook:
    """The denoiser's condition: what is known, and the states (B, T, Dz) that are forecast, with their usual errors."""

    world: WorldModel
    scene: Scene
    forecast: Tensor
    usual: Tensor

    def simulate(self, correct: Any = None) -> Tensor:
        """States (B, T, Dz), step by step: each is the forecast of one step, with the cell's correction (k, step) -> (B, Dz)."""
        frame, h = self.world.frame, self.world.h
        states, known, action = [*self.scene.past.unbind(1)], self.scene.known, self.scene.action
        for k in range(self.world.T):
            step = self.world.step(torch.stack(states[-h:], 1), known, action[:, k : k + h])
            ahead = step.forecast if correct is None else step.forecast + step.scale * correct(k, step)
            states.append(frame.uncentre(ahead, step.at))
            known = torch.cat([known[:, 1:], torch.ones_like(known[:, :1])], 1)
        return torch.stack(states[h:], 1)


class Simulator(nn.Module):
    """One cell carried along the horizon: noisy x (B, T, F) and levels (B, T, groups) -> x_0 (B, T, F).

    The cell sees a step's condition, the level, and the linear estimate of x_0 (EDM's c_skip, Karras et al. 2022, table 1): for
    states, how far that lies from the one-step forecast, trusted as much as the level allows. Pure noise is 0.
    """

    def __init__(self, cell: nn.Module, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.cell, self.schedule = cell, schedule

    def forward(self, x: Tensor, t: Tensor, outlook: Outlook) -> Tensor:
        t = t[:, :1, :1]
        a, s = self.schedule.alpha(t), self.schedule.sigma(t)
        trust = a**2 / (a**2 + s**2)
        estimate = x * a * torch.rsqrt(a**2 + s**2)  # x comes with unit variance
        dz, rest = outlook.forecast.shape[-1], []

        def correct(k: int, step: Any) -> Tensor:
            plain = outlook.world.frame.uncentre(step.forecast, step.at)
            beside = trust[:, 0] * (outlook.forecast[:, k] - plain) / outlook.usual[:, k]
            seen = torch.cat([estimate[:, k, :dz] + beside, estimate[:, k, dz:]], 1)
            out = self.cell(seen[:, None], t, step.condition)[:, 0].to(x.dtype)
            rest.append(out[:, dz:])
            return out[:, :dz]

        states = outlook.simulate(correct)
        return torch.cat([(states - outlook.forecast) / outlook.usual, torch.stack(rest, 1)], 2)


@register
class DiffusionWorldModel(WorldModel):
    """Config (configs/world_model/diffusion_world_model.yaml): WorldModel's, schedule, noise, network (the cell), sampler,
    samples (predictions that are averaged)."""

    name = "diffusion_world_model"
    usual: Tensor

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__(spec, config)
        dz = self.frame.features
        self.layout = Layout(state=dz, reward=1) if self.joint else Layout(state=dz)
        cell = build_network(
            features=self.layout.features, horizon=1, groups=1, condition_dim=self.condition_dim, **config["network"]
        )
        schedule = NoiseSchedule.from_config(**config["schedule"])
        self.denoiser = Denoiser(Simulator(cell, schedule), schedule, self.layout, "data")
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
        outlook.forecast = outlook.simulate()
        return outlook

    def levels(self, batch: int, generator: torch.Generator) -> Tensor:
        """Training levels (B,) of density proportional to t^(noise - 1): uniform, or more of them where little is known."""
        device = self.deviation.device
        u = (torch.rand((), generator=generator, device=device) + torch.arange(batch, device=device) / batch) % 1
        return (u ** (1 / self.noise)).clamp_min(1e-3)

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        known = self.known_past(batch["valid"], generator)
        past, future = batch["observation"].split([self.h, self.T], 1)
        outlook = self.outlook(past, known, batch["action"][:, :-1])
        x_0 = (self.frame.enter(future, outlook.scene.origin) - outlook.forecast) / outlook.usual
        if self.joint:
            reward = self.normalizer.normalize("reward", batch["reward"][:, self.h - 1 : -1, None])
            x_0 = torch.cat([x_0, reward], 2)
        perturbation = float(self.config.get("input_perturbation", 0.0))
        levels = self.levels(len(x_0), generator)
        loss = self.denoiser.loss(x_0, generator, condition=outlook, levels=levels, perturbation=perturbation)
        loss = loss + self.reading_loss(batch)
        return loss, {"loss": loss.detach()}

    def predict(
        self, past: Tensor, known: Tensor, actions: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        n = self.samples
        outlook = self.outlook(*(each.repeat_interleave(n, 0) for each in (past, known, actions)))
        shape = (len(outlook.usual), self.T, self.layout.features)
        noise = torch.randn(shape, generator=generator, device=past.device)
        x_T = noise * self.denoiser.schedule.sigma(torch.ones((), device=past.device))
        out = sample(lambda x, t: self.denoiser(x, t, outlook), self.table, x_T, generator)
        state = outlook.forecast + out[..., self.layout["state"]] * outlook.usual
        state = state.unflatten(0, (-1, n)).mean(1)
        observations = self.frame.leave(state, self.scene(past, known, actions).origin)
        if not self.joint:
            return observations, None
        reward = out[..., self.layout["reward"]].unflatten(0, (-1, n)).mean(1)
        return observations, self.normalizer.denormalize("reward", reward)[..., 0]
