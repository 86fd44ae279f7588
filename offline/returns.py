"""Monte Carlo returns of recorded episodes, and goals that what was recorded reaches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from offline.store import TrajectoryStore
from pilotwave.errors import UserError


def returns_to_go(store: TrajectoryStore, discount: float) -> np.ndarray:
    """sum_k discount^k r_{t+k} to the end of t's episode, (N,) float64. UserError for data without rewards."""
    if "reward" not in store.columns:
        raise UserError(f"{store.source or 'the data'} has no rewards, which values are learned from")
    rewards = np.asarray(store.columns["reward"], np.float64)
    returns = np.zeros_like(rewards)
    ends = set((store.episode_ends - 1).tolist())
    following = 0.0
    for i in range(len(rewards) - 1, -1, -1):
        following = rewards[i] + (0.0 if i in ends else discount * following)
        returns[i] = following
    return returns


def scaled_returns(store: TrajectoryStore, discount: float) -> Tensor:
    """`returns_to_go`, (N,) float32, shifted and scaled to mean 0 and deviation 1 over the data."""
    returns = returns_to_go(store, discount)
    return torch.as_tensor((returns - returns.mean()) / max(returns.std(), 1e-6), dtype=torch.float32)


def peaks(store: TrajectoryStore, feature: int, velocity: int) -> np.ndarray:
    """The highest that an observed feature comes in the rise that a step is in, (N,) float32: until its speed is no longer above 0.
    NaN where it does not rise, or the episode ends before the peak."""
    height, rising = (store.columns["observation"][:, i].astype(np.float32) for i in (feature, velocity))
    found = np.full_like(height, np.nan)
    ends = set((store.episode_ends - 1).tolist())
    for i in range(len(height) - 2, -1, -1):
        if rising[i] > 0 and i not in ends:
            found[i] = np.maximum(height[i], found[i + 1] if rising[i + 1] > 0 else height[i + 1])
    return found


def later_states(states: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """The state 1 to `reach` tokens later, (B, D), of each window of states (B, T, D): a goal that the window reaches."""
    later = torch.randint(1, reach + 1, (len(states),), generator=generator, device=generator.device)
    return states[torch.arange(len(states), device=states.device), later.to(states.device)]


def hindsight_goals(states: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """A goal (B, D) for each window of states (B, T, D): half of them a later state of its own, half one of another's."""
    goal = later_states(states, reach, generator)
    own = torch.randint(2, (len(states),), generator=generator, device=generator.device).to(states.device) == 0
    return torch.where(own[:, None], goal, goal.roll(1, 0))


def tokens_until(near: Tensor) -> Tensor:
    """How many tokens later the next one is near, (..., T) bool -> (..., T) float: 0 there, infinity where none is."""
    token = torch.arange(near.shape[-1], device=near.device, dtype=torch.float32)
    coming = torch.where(near, token, torch.inf).flip(-1).cummin(-1).values.flip(-1)
    return coming - token
