"""Diffusion World Model (Ding et al. 2024): the next T observations and rewards are denoised at once, given the actions.

A trajectory is h + T tokens of (observation, reward, action); the past observations and all actions are clean (level 0),
the future observations and rewards noisy (the paper's eq. 6, its conditions written as levels of one denoiser):

    (o_1..o_T, r_1..r_T) = D(x_t, t)      with o relative to a forecast, which is clean too (see `world_models.base`)

The paper conditions on the first action and a return, and leaves later actions to the data's behaviour; here all actions
are given, so that the model answers for any of them. Past its horizon it goes on from its own last predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion import Denoiser, Layout, NoiseSchedule, sample, solver
from diffusion.networks import build_network
from offline import DataSpec, register
from world_models.base import WorldModel


@register
class DiffusionWorldModel(WorldModel):
    """Config (configs/world_model/diffusion_world_model.yaml): WorldModel's, schedule, prediction, weighting, network,
    sampler, samples (predictions that are averaged)."""

    name = "diffusion_world_model"

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__(spec, config)
        groups = {"observation": spec.observation_dim, "reward": int(self.reward), "action": spec.action_dim}
        groups["forecast"] = spec.observation_dim
        self.layout = Layout(**{name: size for name, size in groups.items() if size})
        self.action_group = self.layout.groups.index("action")
        network = build_network(
            features=self.layout.features, horizon=self.h + self.T, groups=len(self.layout.groups), **config["network"]
        )
        schedule = NoiseSchedule.from_config(**config["schedule"])
        self.denoiser = Denoiser(network, schedule, self.layout, config["prediction"])
        self.samples = int(config["samples"])
        self.choose(config["sampler"])

    def choose(self, sampler: Mapping[str, Any]) -> None:
        """Another sampler {name, steps, ...} for the roll-outs that follow."""
        options = dict(sampler)
        self.table = solver(options.pop("name"), self.denoiser.schedule, options.pop("steps"), **options)
        self.evaluations = self.table.evaluations

    def clean(self, known: Tensor) -> Tensor:
        """What is known: (B, h + T, groups) from the known past tokens (B, h)."""
        clean = torch.zeros(len(known), self.h + self.T, len(self.layout.groups), dtype=torch.bool, device=known.device)
        clean[:, :, self.layout.groups.index("forecast")] = True
        # rewards of the past are not asked for: 0, and clean
        clean[:, : self.h] = True
        clean[:, : self.h, 0] = known
        # the action before token i is known where that token and the one before it are
        clean[:, 1 : self.h, self.action_group] = known[:, :-1]
        clean[:, self.h :, self.action_group] = True
        return clean

    def pack(
        self, past: Tensor, known: Tensor, action: Tensor, future: Tensor | None, reward: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """past (B, h, Do) and future (B, T, Do) in the task's units, known (B, h), normalized actions (B, h - 1 + T, Da) and
        rewards (B, T, 1) -> x (B, h + T, features), and the forecast and its usual error. Zeros for what is None."""
        forecast, scale = self.forecast(past, known, action)
        error = torch.zeros_like(forecast) if future is None else (future - forecast) / scale
        given = self.relative_past(past)
        # hidden tokens of the past say nothing here either
        seen = torch.cat([torch.where(known[..., None], past, past[:, -1:]), forecast], 1)
        parts = {
            "observation": torch.cat([given, error], 1),
            "action": torch.cat([torch.zeros_like(action[:, :1]), action], 1),
            "forecast": self.normalizer.normalize("observation", seen),
        }
        if self.reward:
            nothing = action.new_zeros(len(action), self.h, 1)
            parts["reward"] = torch.cat([nothing, nothing.new_zeros(len(action), self.T, 1) if reward is None else reward], 1)
        return self.layout.pack(parts), forecast, scale

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        reward = batch["reward"][:, self.h - 1 : -1] if self.reward else None
        known = self.known_past(batch["valid"], generator)
        past, future = batch["observation"].split([self.h, self.T], 1)
        x_0, _, _ = self.pack(past, known, batch["action"][:, :-1], future, reward)
        clean = self.clean(known)
        weight = torch.ones(x_0.shape, device=x_0.device) * batch["valid"][..., None]
        loss = self.denoiser.loss(x_0, generator, clean=clean, weighting=self.config["weighting"], weight=weight)
        return loss, {"loss": loss.detach()}

    def predict(
        self, past: Tensor, known: Tensor, actions: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        b, n = len(past), self.samples
        x, forecast, scale = self.pack(past, known, self.normalizer.normalize("action", actions), None, None)
        clean = self.clean(known)
        x, clean = x.repeat_interleave(n, 0), clean.repeat_interleave(n, 0)
        mask, noisy = self.layout.levels(clean), (~clean).to(x.dtype)
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        x_T = torch.where(mask, x, noise * self.denoiser.schedule.sigma(torch.ones((), device=x.device)))
        out = sample(
            lambda y, t: self.denoiser(y, t * noisy),
            self.table,
            x_T,
            generator,
            constrain=lambda y, t: torch.where(mask, x, y),
        )
        out = out.view(b, n, *out.shape[1:]).mean(1)[:, self.h :]
        observations = forecast + out[..., self.layout["observation"]] * scale
        if not self.reward:
            return observations, None
        return observations, self.normalizer.denormalize("reward", out[..., self.layout["reward"]])[..., 0]
