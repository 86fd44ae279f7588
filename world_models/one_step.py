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
        condition = self.h * (spec.observation_dim + spec.action_dim) + self.h
        outputs = spec.observation_dim + int(self.reward)
        self.network = build_network(
            features=outputs, horizon=1, groups=1, condition_dim=condition, **config["network"]
        )

    def output(self, observation: Tensor, known: Tensor, action: Tensor) -> Tensor:
        """observation (B, h, Do) in the task's units, known (B, h), normalized actions (B, h, Da) -> (B, Do [+ 1])."""
        x = self.relative(observation) * known[..., None]
        action = torch.cat([action[:, :-1] * known[:, :-1, None], action[:, -1:]], 1)
        condition = torch.cat([x.flatten(1), action.flatten(1), known.to(x.dtype)], 1)
        nothing = x.new_zeros(len(x), 1, self.spec.observation_dim + int(self.reward))
        return self.network(nothing, nothing[..., :1], condition)[:, 0]

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        known = self.known_past(batch["valid"], generator)
        observation = batch["observation"]
        target = self.relative(observation)[:, -1]
        if self.reward:
            target = torch.cat([target, batch["reward"][:, -2]], 1)
        noise = float(self.config.get("observation_noise", 0.0))
        past = observation[:, : self.h]
        if noise:
            shape, device = past[:, -1].shape, past.device
            moved = noise * torch.randn(shape, generator=generator, device=device) * self.difference[-1]
            past = past + moved[:, None]
            target = torch.cat([(observation[:, -1] - past[:, -1]) / self.difference[-1], target[:, past.shape[2] :]], 1)
        loss = ((self.output(past, known, batch["action"][:, : self.h]) - target) ** 2).mean()
        return loss, {"loss": loss.detach()}

    def predict(
        self, past: Tensor, known: Tensor, actions: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        out = self.output(past, known, self.normalizer.normalize("action", actions))
        observations = past[:, -1] + out[:, : past.shape[2]] * self.difference[-1]
        if not self.reward:
            return observations[:, None], None
        return observations[:, None], self.normalizer.denormalize("reward", out[:, past.shape[2] :])
