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
from world_models.base import WorldModel


@register
class OneStep(WorldModel):
    """Config (configs/world_model/one_step.yaml): WorldModel's with horizon 1, network."""

    name = "one_step"

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__(spec, config)
        if self.T != 1:
            raise UserError(f"world_model.horizon={self.T}; a one-step model has a horizon of 1")
        condition = (self.h + 1) * spec.observation_dim + self.h * spec.action_dim + self.h
        outputs = spec.observation_dim + int(self.reward)
        self.network = build_network(
            features=outputs, horizon=1, groups=1, condition_dim=condition, **config["network"]
        )

    def output(self, past: Tensor, known: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """past (B, h, Do) in the task's units, known (B, h), normalized actions (B, h, Da) -> what the network says (B, Do [+ 1]),
        and the forecast and its usual error (B, Do) that it is relative to."""
        forecast, scale = self.forecast(past, known, action)
        x = self.relative_past(past) * known[..., None]
        action = torch.cat([action[:, :-1] * known[:, :-1, None], action[:, -1:]], 1)
        seen = self.normalizer.normalize("observation", forecast)
        condition = torch.cat([x.flatten(1), seen.flatten(1), action.flatten(1), known.to(x.dtype)], 1)
        nothing = x.new_zeros(len(x), 1, self.spec.observation_dim + int(self.reward))
        return self.network(nothing, nothing[..., :1], condition)[:, 0], forecast[:, 0], scale[:, 0]

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        known = self.known_past(batch["valid"], generator)
        past, future = batch["observation"].split([self.h, 1], 1)
        noise = float(self.config["observation_noise"])
        if noise:
            shape, device = past[:, -1:].shape, past.device
            past = past + noise * torch.randn(shape, generator=generator, device=device) * self.error[1, 0]
        out, forecast, scale = self.output(past, known, batch["action"][:, : self.h])
        target = (future[:, 0] - forecast) / scale
        if self.reward:
            target = torch.cat([target, batch["reward"][:, -2]], 1)
        loss = ((out - target) ** 2).mean()
        return loss, {"loss": loss.detach()}

    def predict(
        self, past: Tensor, known: Tensor, actions: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        out, forecast, scale = self.output(past, known, self.normalizer.normalize("action", actions))
        observations = forecast + out[:, : past.shape[2]] * scale
        if not self.reward:
            return observations[:, None], None
        return observations[:, None], self.normalizer.denormalize("reward", out[:, past.shape[2] :])
