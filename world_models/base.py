"""What world models share: coordinates, statistics of the data, histories, and roll-outs past their own horizon.

Step indices: a window's token `now` is the last known observation o_0; the tokens before it are the past, and token
now + k holds (o_k, r_k, a_{k-1}): the observation, the reward that came with it, and the action that led there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from offline import Algorithm, DataSpec, Normalizer, Windows
from pilotwave.errors import UserError, nearest
from world_models.frame import build_frame

if TYPE_CHECKING:
    from offline.store import TrajectoryStore

_NEGLIGIBLE = 3e-4  # deviations of the data
_NUMBERS = 3_000_000  # that the forecast is fitted to, at most
_ROWS = 10_000  # that the frame is fitted to, at most


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


def spread(x: Tensor) -> Tensor:
    """Root mean square over the first axis."""
    return x.double().square().mean(0).sqrt().float()


@dataclass
class Scene:
    """What is known, in the coordinates of the frame at o_0: past states (B, h, Dz), of which `known` (B, h) are meaningful,
    and actions (B, h - 1 + T, Da), past ones first. `origin` is where those coordinates lie."""

    past: Tensor
    known: Tensor
    action: Tensor
    origin: Any


@dataclass
class Step:
    """One step ahead of a state `at` (B, Dz), in its own coordinates: the forecast and its usual error (B, Dz), and
    what a network may know of it, `condition` (B, C)."""

    at: Tensor
    forecast: Tensor
    scale: Tensor
    condition: Tensor


class RewardHead(nn.Module):
    """r_1 from o_0, a_0 and o_1 (and what else a model says), all normalized, (..., size) each -> (..., 1)."""

    def __init__(self, inputs: int, width: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(inputs, width)]
        for _ in range(2):
            layers += [nn.LayerNorm(width), nn.GELU(approximate="tanh"), nn.Linear(width, width)]
        self.layers = nn.Sequential(*layers, nn.GELU(approximate="tanh"), nn.Linear(width, 1))

    def forward(self, *parts: Tensor) -> Tensor:
        with torch.autocast(parts[0].device.type, enabled=False):
            out: Tensor = self.layers(torch.cat(parts, -1))
        return out


class WorldModel(Algorithm):
    """A model of o_1..o_T, r_1..r_T given o_{1-h}..o_0, the actions between them, and a_0..a_{T-1}.

    Config of all of them: history h, horizon T (steps predicted at once), reward (learn the reward column), forecast, forget
    (share of training windows whose past is hidden, so that the model also starts from a single observation), bodies (see
    `world_models.frame`). States are the observations in the coordinates of the frame, Dz numbers.
    Rewards, which may depend on the place in the world, are a small network's, of the imagined observations.
    The next state is predicted relative to a `forecast`, divided by its usual error, so that what is simple comes exact: with
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
        do, da = spec.observation_dim, spec.action_dim
        self.frame = build_frame(do, da, config["bodies"])
        dz = self.frame.features
        self.reward_inputs = 2 * do + da
        groups = {"observation": do, "state": dz, "action": da, "world_action": da} | ({"reward": 1} if self.reward else {})
        self.normalizer = Normalizer.from_shapes(groups, "gaussian")
        if config["forecast"] not in FORECASTS:
            raise nearest("world_model.forecast", str(config["forecast"]), FORECASTS)
        # deviations of the data (errors are measured in these), and of past states from the present one
        self.register_buffer("deviation", torch.ones(do))
        self.register_buffer("reward_deviation", torch.ones(()))
        self.register_buffer("difference", torch.ones(self.h - 1, dz))
        # the forecast's usual error, and its coefficients (zero for a robot that stays), without and with a known past
        self.register_buffer("error", torch.ones(2, dz))
        self.register_buffer("linear", torch.zeros(2, 1 + self.h * (dz + da), dz))
        self.condition_dim = (self.h + 1) * dz + self.h * (da + 1)

    @abstractmethod
    def predict(
        self, past: Tensor, known: Tensor, actions: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        """past (B, h, Do), whose tokens are meaningful where `known` (B, h); actions (B, h - 1 + T, Da), past ones first.

        All in the task's units -> o_1..o_T (B, T, Do), r_1..r_T (B, T), None from a model without rewards.
        """

    # -- training ------------------------------------------------------------------------------------------------------

    def prepare(self, store: TrajectoryStore) -> None:
        if self.reward and "reward" not in store.columns:
            raise UserError(f"{store.source or 'the data'} has no rewards to learn; add world_model.reward=false")
        observation = store.columns["observation"]
        deviation = np.std(observation, axis=0, dtype=np.float64)
        self.deviation.copy_(torch.from_numpy(np.where(deviation > 1e-6, deviation, 1.0)))
        rows = np.linspace(0, len(observation) - 1, min(len(observation), _ROWS)).astype(int)
        self.frame.fit(torch.from_numpy(observation[rows]))
        batch = self.whole_windows(store)
        origin = self.frame.origin(batch["observation"][:, self.h - 1])
        columns: dict[str, np.ndarray | Tensor] = {
            "observation": observation,
            "world_action": store.columns["action"],
            "state": self.frame.enter(batch["observation"], origin),
            "action": self.frame.enter_actions(batch["action"][:, :-1], origin),
        }
        if self.reward:
            columns["reward"] = store.columns["reward"]
            self.reward_deviation.fill_(max(float(np.std(store.columns["reward"])), 1e-6))
        self.normalizer = Normalizer.fit(columns, "gaussian")
        self._fit_forecast(batch)

    def whole_windows(self, store: TrajectoryStore) -> dict[str, Tensor]:
        """Windows without padding, evenly from all the data, as many as the forecast is fitted to."""
        windows = self.windows(store, "cpu")
        rows = torch.nonzero(windows.first >= windows.starts[windows.episode]).flatten()
        if not len(rows):
            raise UserError(f"no episode is as long as history + horizon = {self.h + self.T} steps; shorten them")
        most = max(1000, _NUMBERS // ((self.h + self.T) * self.linear.shape[1]))
        return windows.gather(rows[torch.linspace(0, len(rows) - 1, min(len(rows), most)).long()])

    def _fit_forecast(self, batch: dict[str, Tensor]) -> None:
        everything = torch.ones(len(batch["observation"]), self.h, dtype=torch.bool)
        scene = self.scene(batch["observation"][:, : self.h], everything, batch["action"][:, : self.h])
        now, past = scene.past[:, -1], scene.past[:, :-1]
        change = self.frame.enter(batch["observation"][:, self.h : self.h + 1], scene.origin)[:, 0] - now
        difference = spread(past - now[:, None])
        self.difference.copy_(torch.where(difference > 1e-6, difference, torch.ones_like(difference)))
        action = self.normalizer.normalize("action", scene.action)
        for k, known in enumerate((everything & self._now, everything)):
            inputs = self._inputs(self.relative_past(scene.past), known, action)
            FORECASTS[self.config["forecast"]](self.linear[k], inputs, change)
            # what is known better than this needs no more: targets of mere rounding would be noise to learn
            self.error[k] = torch.maximum(spread(change - inputs @ self.linear[k]), self.negligible())

    def negligible(self) -> Tensor:
        """Differences of states (Dz,) that do not count."""
        same = self.frame.features == self.spec.observation_dim
        return _NEGLIGIBLE * (self.deviation if same else self.deviation.mean())

    def windows(self, store: TrajectoryStore, device: torch.device | str) -> Windows:
        columns = ["observation", "action"] + (["reward"] if self.reward else [])
        return Windows(store, self.h + self.T, columns=columns, pad_before=self.h - 1, device=device)

    def known_past(self, valid: Tensor, generator: torch.Generator) -> Tensor:
        """Which past tokens (B, h) training shows: the real ones, but for `forget` of the windows only the last."""
        known = valid[:, : self.h].clone()
        shape = (len(known), 1)
        kept = torch.rand(shape, generator=generator, device=known.device) >= float(self.config["forget"])
        known[:, :-1] &= kept
        return known

    def _inputs(self, relative: Tensor, known: Tensor, action: Tensor) -> Tensor:
        """What the linear forecast depends on, (B, inputs): `relative_past` (B, h, Dz), known (B, h), actions (B, h, Da)."""
        x = relative * known[..., None]
        before = action[:, :-1] * known[:, :-1, None]
        return torch.cat([torch.ones_like(x[:, :1, 0]), x.flatten(1), before.flatten(1), action[:, -1]], 1)

    def scene(self, past: Tensor, known: Tensor, actions: Tensor) -> Scene:
        """past (B, h, Do) of which `known` (B, h) are meaningful, actions (B, h - 1 + T, Da), in the task's units."""
        origin = self.frame.origin(past[:, -1])
        return Scene(self.frame.enter(past, origin), known, self.frame.enter_actions(actions, origin), origin)

    def step(self, past: Tensor, known: Tensor, action: Tensor) -> Step:
        """The step from the last of states (B, h, Dz), of which `known` (B, h) are meaningful, under actions (B, h, Da)."""
        at = past[:, -1]
        state, action = self.frame.recentre(past, action, at)
        action, relative = self.normalizer.normalize("action", action), self.relative_past(state)
        whole = known.all(1, keepdim=True)
        inputs = self._inputs(relative, torch.where(whole, known, self._now), action)
        # autocast would round products to three digits, and the forecast is exact to six
        with torch.autocast(at.device.type, enabled=False):
            change = torch.where(whole, inputs @ self.linear[1], inputs @ self.linear[0])
        forecast = state[:, -1] + change
        seen = self.normalizer.normalize("state", forecast)
        # hidden tokens of the past say nothing here either
        condition = torch.cat([self._inputs(relative, known, action)[:, 1:], seen, known.to(seen.dtype)], 1)
        return Step(at, forecast, torch.where(whole, self.error[1], self.error[0]), condition)

    @property
    def _now(self) -> Tensor:
        return torch.arange(self.h, device=self.deviation.device) == self.h - 1

    def relative_past(self, past: Tensor) -> Tensor:
        """States (B, h, Dz) -> (z_i - z_0) / difference_i, and at i = 0 the normalized state itself."""
        now = past[:, -1:]
        return torch.cat([(past[:, :-1] - now) / self.difference, self.normalizer.normalize("state", now)], 1)

    # -- rewards -------------------------------------------------------------------------------------------------------

    def transitions(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """o_0..o_T (B, T + 1, Do) and a_0..a_{T-1} (B, T, Da) in the task's units -> what rewards are read from, normalized:
        o_0..o_{T-1}, a_0..a_{T-1} and o_1..o_T."""
        o, a = self.normalizer.normalize("observation", observation), self.normalizer.normalize("world_action", action)
        return o[:, :-1], a, o[:, 1:]

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
