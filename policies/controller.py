"""A policy as robots see it: histories in, chunks of actions out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from robots import Chunk, DirectTracker


class PolicyController:
    """Receding-horizon control: one chunk every `replan_every` steps, held action by action.

    Samples are reproducible: the noise of an episode batch comes from `seed` and the number of the decision.
    """

    def __init__(self, policy: Any, dt: float, sampler: Mapping[str, Any], replan_every: int, seed: int = 0) -> None:
        self.policy, self.dt, self.replan_every = policy, dt, replan_every
        self.history = policy.To
        self.table = policy.table(sampler)
        self.evaluations = self.table.evaluations
        self.tracker = DirectTracker()
        self.generator = torch.Generator().manual_seed(seed)

    def reset(self, n: int) -> None:
        """Nothing is carried from one episode to the next but the noise stream."""

    def act(self, history: Mapping[str, np.ndarray], step: int) -> Chunk:
        """history: "state" (n, To, Do) and images (n, To, height, width, 3) -> n chunks of Ta actions."""
        tensors = {key: torch.as_tensor(value) for key, value in history.items() if key != "goal"}
        tensors["observation"] = tensors.pop("state").float()
        device = next(self.policy.parameters()).device
        tensors = {key: value.to(device) for key, value in tensors.items()}
        actions = self.policy.sample_actions(tensors, self.table, self.generator)
        return Chunk(actions.cpu().numpy(), dt=self.dt)
