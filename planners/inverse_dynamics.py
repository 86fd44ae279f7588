"""Inverse dynamics: which action leads from one state towards another."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class InverseDynamics(nn.Module):
    """a = f(o, o'): normalized observations (..., Do), one token apart -> normalized actions (..., Da).

    For planners of states alone (Ajay et al. 2023, Decision Diffuser, eq. 6; Lu et al. 2025 keep it apart from the planner).
    """

    def __init__(self, observation_dim: int, action_dim: int, width: int = 256) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(2 * observation_dim, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, action_dim),
        )  # fmt: skip

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        # their difference, which is small, is what counts
        with torch.autocast(before.device.type, enabled=False):
            out: Tensor = self.network(torch.cat([before, after - before], -1))
        return out

    def loss(self, observation: Tensor, action: Tensor) -> Tensor:
        """Mean squared error over windows (B, H, Do), (B, H, Da) of recorded tokens."""
        return (self(observation[:, :-1], observation[:, 1:]) - action[:, :-1]).square().mean()

    def along(self, observation: Tensor) -> Tensor:
        """Actions (B, H, Da) along trajectories (B, H, Do); the last token's is the one before."""
        actions = self(observation[:, :-1], observation[:, 1:])
        return torch.cat([actions, actions[:, -1:]], 1)
