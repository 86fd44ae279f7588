"""What world models share: statistics of the data, histories, and roll-outs past their own horizon.

Step indices: a window's token `now` is the last known observation o_0; the tokens before it are the past, and token
now + k holds (o_k, r_k, a_{k-1}): the observation, the reward that came with it, and the action that led there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from offline import Algorithm, DataSpec, Normalizer, Windows
from pilotwave.errors import UserError

if TYPE_CHECKING:
    from offline.store import TrajectoryStore

_ROWS = 200_000  # rows that the statistics of differences are taken from


class WorldModel(Algorithm):
    """A model of o_1..o_T, r_1..r_T given o_{1-h}..o_0, the actions between them, and a_0..a_{T-1}.

    Config of all of them: history h, horizon T (steps predicted at once), reward (learn the reward column), forget (share
    of training windows whose past is hidden, so that the model also starts from a single observation).
    Observations are predicted relative to o_0, divided by the deviation of such differences: a prediction of nothing
    is then a robot that stays where it is, and short steps are as exact as long ones.
    """

    kind = "world_model"
    evaluations = 1  # network calls for `horizon` imagined steps
    deviation: Tensor
    reward_deviation: Tensor
    difference: Tensor

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__(spec, config)
        self.h, self.T, self.reward = int(config["history"]), int(config["horizon"]), bool(config["reward"])
        if min(self.h, self.T) < 1:
            raise UserError(f"world_model.history={self.h}, world_model.horizon={self.T}; each must be at least 1")
        groups = {"observation": spec.observation_dim, "action": spec.action_dim} | ({"reward": 1} if self.reward else {})
        self.normalizer = Normalizer.from_shapes(groups, "gaussian")
        # deviations of the data (errors are measured in these), and of o_i - o_0 for every token i of a window
        self.register_buffer("deviation", torch.ones(spec.observation_dim))
        self.register_buffer("reward_deviation", torch.ones(()))
        self.register_buffer("difference", torch.ones(self.h + self.T, spec.observation_dim))

    @abstractmethod
    def predict(
        self, past: Tensor, known: Tensor, actions: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        """past (B, h, Do), whose tokens are meaningful where `known` (B, h); actions (B, h - 1 + T, Da), past ones first.

        All in the task's units -> o_1..o_T (B, T, Do), r_1..r_T (B, T) or None.
        """

    # -- training ------------------------------------------------------------------------------------------------------

    def prepare(self, store: TrajectoryStore) -> None:
        columns = {"observation": store.columns["observation"], "action": store.columns["action"]}
        if self.reward:
            if "reward" not in store.columns:
                raise UserError(f"{store.source or 'the data'} has no rewards to learn; add world_model.reward=false")
            columns["reward"] = store.columns["reward"]
            self.reward_deviation.fill_(max(float(np.std(columns["reward"])), 1e-6))
        self.normalizer = Normalizer.fit(columns, "gaussian")
        observation = columns["observation"]
        deviation = np.std(observation, axis=0, dtype=np.float64)
        self.deviation.copy_(torch.from_numpy(np.where(deviation > 1e-6, deviation, 1.0)))
        rows = np.linspace(0, store.steps - 1, min(store.steps, _ROWS)).astype(np.int64)
        episode = np.searchsorted(store.episode_ends, rows, side="right")
        for i in range(self.h + self.T):
            there = rows + i - (self.h - 1)
            same = (there >= store.starts[episode]) & (there < store.episode_ends[episode])
            if i == self.h - 1 or not same.any():
                continue
            steps = observation[there[same]].astype(np.float64) - observation[rows[same]]
            spread = np.sqrt(np.mean(steps**2, axis=0))
            self.difference[i] = torch.from_numpy(np.where(spread > 1e-6, spread, 1.0))

    def windows(self, store: TrajectoryStore, device: torch.device | str) -> Windows:
        columns = ["observation", "action"] + (["reward"] if self.reward else [])
        windows = Windows(store, self.h + self.T, columns=columns, pad_before=self.h - 1, device=device)
        for key in columns[1:]:
            column = windows.columns[key].float()
            column = column[:, None] if column.ndim == 1 else column
            windows.columns[key] = self.normalizer.to(device).normalize(key, column)
        return windows

    def known_past(self, valid: Tensor, generator: torch.Generator) -> Tensor:
        """Which past tokens (B, h) training shows: the real ones, but for `forget` of the windows only the last."""
        known = valid[:, : self.h].clone()
        shape = (len(known), 1)
        kept = torch.rand(shape, generator=generator, device=known.device) >= float(self.config["forget"])
        known[:, :-1] &= kept
        return known

    def relative(self, observation: Tensor) -> Tensor:
        """(B, n, Do), n <= h + T tokens from the first one on, in the task's units -> what networks see: (o_i - o_0) /
        difference_i, and at i = 0 the normalized observation itself."""
        now = observation[:, self.h - 1]
        x = (observation - now[:, None]) / self.difference[: observation.shape[1]]
        x[:, self.h - 1] = self.normalizer.normalize("observation", now)
        return x

    # -- imagination ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout(
        self,
        observation: np.ndarray,
        actions: np.ndarray,
        past_actions: np.ndarray | None = None,
        *,
        seed: int = 0,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The future that actions a_0..a_{T-1} lead to, any T: predicted `horizon` steps at a time, each call starting
        from the last one's end.

        observation (B, Do), or (B, n, Do) with the n - 1 observations before it, oldest first; actions (B, T, Da);
        past_actions (B, n - 1, Da), those between the observations, where known. Without the leading B: one roll-out.
        Returns observations (B, T, Do) and rewards (B, T), None from a model without rewards, in the task's units.
        """
        device = self.deviation.device
        action = self._checked("actions", actions, self.spec.action_dim, device)
        o = self._checked("observation", observation, self.spec.observation_dim, device)
        single = action.ndim == 2
        if single:
            action, o = action[None], o[None]
        if action.ndim != 3 or o.ndim not in (1, 2, 3):
            raise UserError(f"actions must be (B, T, {self.spec.action_dim}) or (T, ...); got {np.shape(actions)}")
        o = o.expand(len(action), -1) if o.ndim == 1 else o
        o = o[:, None] if o.ndim == 2 else o
        if len(o) != len(action):
            raise UserError(f"{len(o)} observations for {len(action)} sequences of actions; they must be as many")
        past, known, before = self._history(o, past_actions, single)
        generator = torch.Generator(device).manual_seed(seed)
        total, observations, rewards = action.shape[1], [], []
        for start in range(0, total, self.T):
            chunk = action[:, start : start + self.T]
            short = self.T - chunk.shape[1]
            # what follows the last action does not matter; holding it is the most usual continuation
            chunk = torch.cat([chunk, chunk[:, -1:].expand(-1, short, -1)], 1)
            every = torch.cat([before, chunk], 1)
            future, reward = self.predict(past, known, every, generator)
            observations.append(future)
            rewards.append(reward)
            past = torch.cat([past, future], 1)[:, -self.h :]
            known = torch.cat([known, torch.ones(future.shape[:2], dtype=torch.bool, device=device)], 1)[:, -self.h :]
            before = every[:, every.shape[1] - (self.h - 1) :]
        out = torch.cat(observations, 1)[:, :total].cpu().numpy()
        if not self.reward:
            return (out[0] if single else out), None
        r = torch.cat([reward for reward in rewards if reward is not None], 1)[:, :total].cpu().numpy()
        return (out[0], r[0]) if single else (out, r)

    def _history(self, o: Tensor, past_actions: np.ndarray | None, single: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The last h observations (B, h, Do), which of them are known (B, h), and the actions between (B, h - 1, Da)."""
        b, n = o.shape[:2]
        before = o.new_zeros(b, self.h - 1, self.spec.action_dim)
        if past_actions is not None:
            given = self._checked("past_actions", past_actions, self.spec.action_dim, o.device)
            given = given[None] if single else given
            if given.shape[:2] != (b, n - 1):
                raise UserError(f"past_actions must be (B, {n - 1}, ...), one between two observations; got {given.shape}")
            used = min(n, self.h) - 1
            if used:
                before[:, self.h - 1 - used :] = given[:, n - 1 - used :]
        elif n > 1:
            # observations of the past without its actions: the model was not trained on half of it
            o, n = o[:, -1:], 1
        past = torch.cat([o[:, :1].expand(-1, max(self.h - n, 0), -1), o[:, -self.h :]], 1)
        known = torch.zeros(b, self.h, dtype=torch.bool, device=o.device)
        known[:, self.h - min(n, self.h) :] = True
        return past, known, before

    def _checked(self, what: str, value: Any, width: int, device: torch.device) -> Tensor:
        array = np.asarray(value.cpu() if isinstance(value, Tensor) else value, dtype=np.float32)
        if array.ndim < 1 or array.shape[-1] != width:
            raise UserError(f"{what} must have {width} features in the last axis; got shape {array.shape}")
        if not np.isfinite(array).all():
            raise UserError(f"{what} holds NaN or infinity; every number must be finite")
        return torch.as_tensor(array, device=device)
