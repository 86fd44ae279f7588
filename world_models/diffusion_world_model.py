"""Diffusion World Model (Ding et al. 2024): the next T observations and rewards are denoised at once, given the actions.

A trajectory is h + T tokens of (observation, reward, action); the past observations and all actions are clean (level 0),
the future observations and rewards noisy (the paper's eq. 6, its conditions written as levels of one denoiser):

    (o_1..o_T, r_1..r_T) = D(x_t, t)      with o relative to o_0 (see `world_models.base`)

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
        # rewards of the past are not asked for: 0, and clean
        clean[:, : self.h] = True
        clean[:, : self.h, 0] = known
        # the action before token i is known where that token and the one before it are
        clean[:, 1 : self.h, self.action_group] = known[:, :-1]
        clean[:, self.h :, self.action_group] = True
        return clean

    def pack(self, observation: Tensor, action: Tensor, reward: Tensor | None) -> Tensor:
        """observation (B, h + T, Do) in the task's units, normalized actions (B, h - 1 + T, Da) and rewards of the future
        (B, T, 1) -> x (B, h + T, features)."""
        nothing = action.new_zeros(len(action), 1, action.shape[2])
        parts = {"observation": self.relative(observation), "action": torch.cat([nothing, action], 1)}
        if reward is not None:
            parts["reward"] = torch.cat([reward.new_zeros(len(reward), self.h, 1), reward], 1)
        return self.layout.pack(parts)

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        reward = batch["reward"][:, self.h - 1 : -1] if self.reward else None
        x_0 = self.pack(batch["observation"], batch["action"][:, :-1], reward)
        clean = self.clean(self.known_past(batch["valid"], generator))
        weight = torch.ones(x_0.shape, device=x_0.device) * batch["valid"][..., None]
        loss = self.denoiser.loss(x_0, generator, clean=clean, weighting=self.config["weighting"], weight=weight)
        return loss, {"loss": loss.detach()}

    def predict(
        self, past: Tensor, known: Tensor, actions: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        b, n = len(past), self.samples
        future = past[:, -1:].expand(-1, self.T, -1)
        reward = past.new_zeros(b, self.T, 1) if self.reward else None
        x = self.pack(torch.cat([past, future], 1), self.normalizer.normalize("action", actions), reward)
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
        observations = past[:, -1:] + out[..., self.layout["observation"]] * self.difference[self.h :]
        if not self.reward:
            return observations, None
        return observations, self.normalizer.denormalize("reward", out[..., self.layout["reward"]])[..., 0]
