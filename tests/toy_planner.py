"""A toy for planners: straight paths in the plane, planners built on them untrained or like trained ones, a short training."""

from __future__ import annotations

import numpy as np
import torch

from offline import Algorithm, DataSpec, TrajectoryStore

START, GOAL = np.array([0.1, -0.2, 0.5, 0.0], np.float32), np.array([0.4, 0.3], np.float32)


def straight_paths(reward: str = "x", episodes: int = 300, length: int = 30, observed: tuple[str, ...] = ("position", "velocity")):
    """Constant-velocity paths from the unit square; the action is the velocity, the reward "x" or "x velocity"."""
    rng = np.random.default_rng(0)
    starts, velocity = rng.uniform(-1, 1, (episodes, 1, 2)), rng.uniform(-1, 1, (episodes, 1, 2))
    position = starts + velocity * np.arange(length)[None, :, None] * 0.1
    parts = {"position": position, "velocity": np.broadcast_to(velocity, position.shape)}
    rows = {key: part.reshape(-1, 2).astype(np.float32) for key, part in parts.items()}
    rewards = {"x": rows["position"][:, 0], "x velocity": rows["velocity"][:, 0]}
    columns = {"observation": np.concatenate([rows[key] for key in observed], -1), "action": rows["velocity"]}
    columns["reward"] = rewards[reward].copy()
    return TrajectoryStore(columns, np.arange(1, episodes + 1) * length, {}, 0.1, "toy", {})


def build(cls: type[Algorithm], config: dict, store: TrajectoryStore, goal_dim: int = 2, trained_like: bool = False):
    """A planner prepared for `store`; trained_like: with last layers that do not output zero."""
    torch.manual_seed(0)
    widths = {f"{key}_dim": store.columns[key].shape[1] for key in ("observation", "action")}
    planner = cls(DataSpec(task="toy", dt=0.1, goal_dim=goal_dim, **widths), config)
    planner.prepare(store)
    if trained_like:
        for parameter in planner.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return planner.eval()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train(planner: Algorithm, store: TrajectoryStore, steps: int, batch: int = 64, lr: float = 3e-3):
    """The scalars of the last of so many steps of Adam."""
    windows, optimizer = planner.windows(store, "cpu"), torch.optim.Adam(planner.parameters(), lr)
    planner.train()
    for step in range(steps):
        loss, info = planner.loss(windows.sample(batch, seeded(step)), seeded(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    planner.eval()
    return info
