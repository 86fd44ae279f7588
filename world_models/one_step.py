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
from world_models.base import Step, WorldModel


@register
class OneStep(WorldModel):
    """Config (configs/world_model/one_step.yaml): WorldModel's with horizon 1, network."""

    name = "one_step"

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__(spec, config)
        if self.T != 1:
            raise UserError(f"world_model.horizon={self.T}; a one-step model has a horizon of 1")
        self.outputs = self.frame.features + int(self.joint)
        self.network = build_network(
            features=self.outputs, horizon=1, groups=1, condition_dim=self.condition_dim, **config["network"]
        )

    def output(self, step: Step) -> Tensor:
        """What the network says, (B, Dz [+ 1]): the next state beside the forecast, and its reward, normalized."""
        nothing = step.at.new_zeros(len(step.at), 1, self.outputs)
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
        if self.joint:
            target = torch.cat([target, self.normalizer.normalize("reward", batch["reward"][:, -2:-1])], 1)
        loss = ((self.output(step) - target) ** 2).mean() + self.reading_loss(batch)
        return loss, {"loss": loss.detach()}

    def predict(
        self, past: Tensor, known: Tensor, actions: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        scene = self.scene(past, known, actions)
        step = self.step(scene.past, known, scene.action)
        out = self.output(step)
        state = step.forecast + out[:, : self.frame.features] * step.scale
        observations = self.frame.leave(state[:, None], scene.origin)
        if not self.joint:
            return observations, None
        return observations, self.normalizer.denormalize("reward", out[:, self.frame.features :])
