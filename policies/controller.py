"""A policy as robots see it: histories in, chunks of actions out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from robots import Chunk, DirectTracker


class PolicyController:
    """Receding-horizon control: one chunk every `replan_every` steps, held action by action.

    Where the policy knows past actions, they are those of the chunks before; an episode starts with `policy.start`. `options`
    go to the policy with every decision. Samples are reproducible: the noise of an episode batch comes from `seed` and the
    number of the decision.
    """

    def __init__(
        self,
        policy: Any,
        dt: float,
        sampler: Mapping[str, Any],
        replan_every: int,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.policy, self.dt, self.replan_every = policy, dt, replan_every
        self.history = policy.To
        self.table = policy.table(sampler)
        self.evaluations = self.table.evaluations
        self.tracker = DirectTracker()
        self.options = dict(options or {})
        self.generator = torch.Generator().manual_seed(seed)

    def reset(self, n: int) -> None:
        """Nothing is carried from one episode to the next but the noise stream."""
        if self.policy.past:
            self.taken = self.policy.start.expand(n, self.policy.past, -1)
            self.chunk, self.decided = self.taken[:, -1:], 0

    def act(self, history: Mapping[str, np.ndarray], step: int) -> Chunk:
        """history: "state" (n, To, Do) and images (n, To, height, width, 3) -> n chunks of Ta actions."""
        tensors = {key: torch.as_tensor(value) for key, value in history.items() if key != "goal"}
        tensors["observation"] = tensors.pop("state").float()
        device = next(self.policy.parameters()).device
        tensors = {key: value.to(device) for key, value in tensors.items()}
        if self.policy.past:
            since = torch.arange(step - self.decided, device=device).clamp(max=self.chunk.shape[1] - 1)
            self.taken = torch.cat([self.taken, self.chunk[:, since]], dim=1)[:, -self.policy.past :]
            tensors["action"] = self.taken
        actions = self.policy.sample_actions(tensors, self.table, self.generator, **self.options)
        self.chunk, self.decided = actions, step
        return Chunk(actions.cpu().numpy(), dt=self.dt)
