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
from pilotwave.errors import UserError, nearest

if TYPE_CHECKING:
    from offline.store import TrajectoryStore

_NEGLIGIBLE = 3e-4  # deviations of the data
_NUMBERS = 3_000_000  # that the forecast is fitted to, at most


def _hold(linear: Tensor, inputs: Tensor, change: Tensor) -> None:
    """The robot stays: o_k = o_0."""
    linear.zero_()


def _linear(linear: Tensor, inputs: Tensor, change: Tensor) -> None:
    """Least squares, robust: rows that no linear function explains (contacts) lose their weight.

    Iteratively reweighted with Cauchy's weights 1 / (1 + (r / c)^2), c twice the median error (Holland and Welsch 1977).
    """
    x, y = inputs.double(), change.double()
    scale = y.square().mean(0).sqrt().clamp_min(1e-9)
    weight = torch.ones(len(x), 1, dtype=torch.float64)
    for _ in range(_ROUNDS):
        gram = x.T @ (weight * x)
        gram.diagonal().add_(1e-6 * gram.diagonal().mean())
        solution = torch.linalg.solve(gram, x.T @ (weight * y))
        error = ((x @ solution - y) / scale).square().mean(1, keepdim=True).sqrt()
        weight = 1 / (1 + (error / (2 * error.median()).clamp_min(1e-9)) ** 2)
    linear.copy_(solution)


_ROUNDS = 8
FORECASTS = {"hold": _hold, "linear": _linear}


def _scale(x: Tensor) -> Tensor:
    """Root mean square over the first axis, 1 where there is nothing."""
    spread = x.double().square().mean(0).sqrt()
    return torch.where(spread > 1e-6, spread, torch.ones_like(spread)).float()


class WorldModel(Algorithm):
    """A model of o_1..o_T, r_1..r_T given o_{1-h}..o_0, the actions between them, and a_0..a_{T-1}.

    Config of all of them: history h, horizon T (steps predicted at once), reward (learn the reward column), forecast, forget
    (share of training windows whose past is hidden, so that the model also starts from a single observation).
    Observations are predicted relative to a `forecast`, divided by its usual error, so that what is simple comes exact: with
    "hold" a robot that stays where it is, with "linear" a linear function of past and actions, fitted once to the data.
    """

    kind = "world_model"
    evaluations = 1  # network calls for `horizon` imagined steps
    deviation: Tensor
    reward_deviation: Tensor
    difference: Tensor
    error: Tensor
    linear: Tensor

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__(spec, config)
        self.h, self.T, self.reward = int(config["history"]), int(config["horizon"]), bool(config["reward"])
        if min(self.h, self.T) < 1:
            raise UserError(f"world_model.history={self.h}, world_model.horizon={self.T}; each must be at least 1")
        groups = {"observation": spec.observation_dim, "action": spec.action_dim} | ({"reward": 1} if self.reward else {})
        self.normalizer = Normalizer.from_shapes(groups, "gaussian")
        if config["forecast"] not in FORECASTS:
            raise nearest("world_model.forecast", str(config["forecast"]), FORECASTS)
        # deviations of the data (errors are measured in these), and of past observations from o_0
        self.register_buffer("deviation", torch.ones(spec.observation_dim))
        self.register_buffer("reward_deviation", torch.ones(()))
        self.register_buffer("difference", torch.ones(self.h - 1, spec.observation_dim))
        # the forecast's usual error, without and with a known past
        self.register_buffer("error", torch.ones(2, self.T, spec.observation_dim))
        # the linear forecast's coefficients, without and with a known past; zero for a robot that stays
        inputs = 1 + self.h * spec.observation_dim + (self.h - 1 + self.T) * spec.action_dim
        self.register_buffer("linear", torch.zeros(2, inputs, self.T * spec.observation_dim))

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
        deviation = np.std(columns["observation"], axis=0, dtype=np.float64)
        self.deviation.copy_(torch.from_numpy(np.where(deviation > 1e-6, deviation, 1.0)))
        self._fit_forecast(store)

    def _fit_forecast(self, store: TrajectoryStore) -> None:
        windows = self.windows(store, "cpu")
        whole = windows.first >= windows.starts[windows.episode]  # no padding before
        rows = torch.nonzero(whole).flatten()
        if not len(rows):
            raise UserError(f"no episode is as long as history + horizon = {self.h + self.T} steps; shorten them")
        most = max(1000, _NUMBERS // (self.error.numel() + self.linear.shape[1]))
        batch = windows.gather(rows[torch.linspace(0, len(rows) - 1, min(len(rows), most)).long()])
        past, future = batch["observation"].split([self.h, self.T], 1)
        action = batch["action"][:, :-1]
        self.difference.copy_(_scale(past[:, :-1] - past[:, -1:]))
        for k, known in enumerate((False, True)):
            mask = torch.full((len(past), self.h), known).logical_or(self._now)
            FORECASTS[self.config["forecast"]](
                self.linear[k], self._inputs(past, mask, action), (future - past[:, -1:]).flatten(1)
            )
            # what is known better than this needs no more: targets of mere rounding would be noise to learn
            error = _scale(future - self.forecast(past, mask, action)[0])
            self.error[k] = torch.maximum(error, _NEGLIGIBLE * self.deviation)

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

    def _inputs(self, past: Tensor, known: Tensor, action: Tensor) -> Tensor:
        """What the linear forecast depends on, (B, inputs): past (B, h, Do), known (B, h), normalized actions."""
        x = self.relative_past(past) * known[..., None]
        before = action[:, : self.h - 1] * known[:, :-1, None]
        return torch.cat([torch.ones_like(x[:, :1, 0]), x.flatten(1), before.flatten(1), action[:, self.h - 1 :].flatten(1)], 1)

    def forecast(self, past: Tensor, known: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """What o_1..o_T would be if all were simple, and its usual error, each (B, T, Do) in the task's units: past (B, h, Do)
        of which `known` (B, h) are meaningful, and normalized actions (B, h - 1 + T, Da)."""
        whole = known.all(1, keepdim=True)
        inputs = self._inputs(past, torch.where(whole, known, self._now), action)
        change = torch.where(whole, inputs @ self.linear[1], inputs @ self.linear[0])
        forecast = past[:, -1:] + change.unflatten(1, (self.T, -1))
        return forecast, torch.where(whole[..., None], self.error[1], self.error[0])

    @property
    def _now(self) -> Tensor:
        return torch.arange(self.h, device=self.deviation.device) == self.h - 1

    def relative_past(self, past: Tensor) -> Tensor:
        """(B, h, Do) in the task's units -> (o_i - o_0) / difference_i, and at i = 0 the normalized observation itself."""
        now = past[:, -1:]
        earlier = (past[:, :-1] - now) / self.difference
        return torch.cat([earlier, self.normalizer.normalize("observation", now)], 1)

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
