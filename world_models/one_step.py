"""A deterministic one-step model, the baseline: (o_{1-h}..o_0, a_{1-h}..a_0) -> (o_1 - o_0, r_1), fed back for every step.

The usual model of model-based reinforcement learning (Nagabandi et al. 2018, eq. 1; without the ensemble of Chua et al. 2018):
differences of observations, normalized, under the mean squared error. It has the history, the network and the
normalization of the diffusion model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion.networks import build_network
from offline import DataSpec, register
from pilotwave.errors import UserError
from world_models.base import RewardHead, Step, WorldModel


@register
class OneStep(WorldModel):
    """Config (configs/world_model/one_step.yaml): WorldModel's with horizon 1, network."""

    name = "one_step"

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__(spec, config)
        if self.T != 1:
            raise UserError(f"world_model.horizon={self.T}; a one-step model has a horizon of 1")
        self.network = build_network(
            features=self.frame.features, horizon=1, groups=1, condition_dim=self.condition_dim, **config["network"]
        )
        self.reader = RewardHead(self.reward_inputs) if self.reward else None

    def output(self, step: Step) -> Tensor:
        """What the network says, (B, Dz): the next state beside the forecast, in its usual errors."""
        nothing = step.at.new_zeros(len(step.at), 1, self.frame.features)
        return self.network(nothing, nothing[..., :1], step.condition)[:, 0].to(step.at.dtype)

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        known = self.known_past(batch["valid"], generator)
        past, future = batch["observation"].split([self.h, 1], 1)
        noise = float(self.config["observation_noise"])
        if noise:
            past = past + noise * self.deviation * torch.randn(past.shape, generator=generator, device=past.device)
        scene = self.scene(past, known, batch["action"][:, :-1])
        step = self.step(scene.past, known, scene.action)
        target = (self.frame.enter(future, scene.origin)[:, 0] - step.forecast) / step.scale
        loss = ((self.output(step) - target) ** 2).mean()
        if self.reader is not None:
            now = self.h - 1
            parts = self.transitions(batch["observation"][:, now:], batch["action"][:, now:-1])
            reward = self.normalizer.normalize("reward", batch["reward"][:, now:-1, None])
            loss = loss + ((self.reader(*parts) - reward) ** 2).mean()
        return loss, {"loss": loss.detach()}

    def predict(
        self, past: Tensor, known: Tensor, actions: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        scene = self.scene(past, known, actions)
        step = self.step(scene.past, known, scene.action)
        state = step.forecast + self.output(step) * step.scale
        observations = self.frame.leave(state[:, None], scene.origin)
        if self.reader is None:
            return observations, None
        parts = self.transitions(torch.cat([past[:, -1:], observations], 1), actions[:, self.h - 1 :])
        return observations, self.normalizer.denormalize("reward", self.reader(*parts))[..., 0]
