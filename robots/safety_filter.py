"""A control-barrier filter on the executed action: the least change that leaves the robot able to stop safely.

For robots whose action accelerates them (relative degree 2), and barriers that read positions, velocities or both. With the
linear model s+ = A s + B u, an action u is allowed when the whole way on which the robot would come to rest stays safe:

    h(s+) = min_{0 <= theta <= 1} b(p+ + theta d(v+), sqrt(1 - theta) v+)  >=  margin + (1 - gamma) (h(s) - margin)
    d(v)  = v |v| / (2 a) + v dt / 2                   the way to rest at a constant deceleration a

(the minimum bounded from below between samples, as b changes by at most one for one)
which is a discrete-time control barrier function (Agrawal and Sreenath 2017, eq. 13) with braking as its backup
(Gurriet et al. 2020): from a state that satisfies it, braking does, so a safe action always exists while the model
holds. `u` nearest to the wanted action solves a quadratic program with h linearized at u, repeated, and the result is
checked against h itself. Barriers that move are seen in their own frame, in which braking means to move along.

What the model does not know, such as walls, is met in two ways. A glancing blow turns a velocity v along an obstacle into
one towards it of up to |v| / 2 (frictionless, at 45 degrees), so h is asked for the way to rest from that too, |v|^2 / 8 a.
And a force lasts: what the last state differed by from the model's, up to what the limits can undo, is added to the
next (a disturbance observer, Chen et al. 2016).

Where no allowed action is found the robot brakes; where braking breaks h too, `infeasible` counts it, and the robot does
what leaves most of h: it brakes, or pushes off with all it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from pilotwave.errors import UserError, require
from robots.barriers import Barrier, from_rows, indices, least_change


@dataclass(frozen=True, eq=False)
class LinearModel:
    """s+ = A s + B u every dt seconds, s (Do,) the state observation, position and velocity slices of it of one width,
    low and high the limits of u (Da,)."""

    A: np.ndarray
    B: np.ndarray
    dt: float
    low: np.ndarray
    high: np.ndarray
    position: slice = field(default_factory=lambda: slice(0, 2))
    velocity: slice = field(default_factory=lambda: slice(2, 4))

    @classmethod
    def identify(
        cls, states: np.ndarray, actions: np.ndarray, following: np.ndarray, dt: float, low: np.ndarray, high: np.ndarray
    ) -> LinearModel:
        """The model that fits recorded steps best: states (N, Do), actions (N, Da) and the states that followed."""
        inputs = np.concatenate([states, actions], 1)
        weights = np.linalg.lstsq(inputs, following, rcond=None)[0].T
        width = states.shape[1]
        return cls(weights[:, :width], weights[:, width:], dt, low, high)

    @property
    def deceleration(self) -> float:
        """What the limits allow in every direction from every middle action, in velocity a second."""
        inverse = np.linalg.inv(self.B[self.velocity])
        reach = np.minimum(self.high, -self.low) / np.linalg.norm(inverse, axis=1)
        return float(reach.min()) / self.dt


class SafetyFilter:
    """Filters the actions of n robots. barriers: on the position, the velocity or both; those of the observation's "hazards"
    (n, K, 7) join them. margin: what must remain, in metres (of speed limits, metres a second). gamma in (0, 1]: the share of h
    that one step may use up. reserve: the share of the deceleration that braking counts on; the rest is for what the model
    leaves out. blows: whether glancing blows are reckoned with.
    """

    THETA = np.linspace(0.0, 1.0, 9)

    def __init__(
        self,
        model: LinearModel,
        barriers: Sequence[Barrier] = (),
        *,
        margin: float = 0.01,
        gamma: float = 1.0,
        reserve: float = 0.8,
        blows: bool = True,
        iterations: int = 4,
    ) -> None:
        require("filter.margin", margin, 0)
        require("filter.gamma", gamma, 0.001, 1)
        require("filter.reserve", reserve, 0.01, 1)
        self.model, self.barriers = model, list(barriers)
        for barrier in self.barriers:
            self._reads(barrier)
        self.margin, self.gamma, self.iterations = margin, gamma, iterations
        self.braking = reserve * model.deceleration
        self.blows = 1 / (8 * self.braking) if blows else 0.0
        self.reset(0)

    def _reads(self, barrier: Barrier) -> tuple[bool, bool]:
        """Whether a barrier reads positions, and whether velocities; UserError for one that the model says nothing of."""
        if barrier.features == self.model.position:
            return True, False
        width = self.model.A.shape[0]
        read = set(indices(barrier.features, width))
        places, speeds = (set(range(width)[part]) for part in (self.model.position, self.model.velocity))
        if not read <= places | speeds:
            known = sorted(places | speeds)
            raise UserError(f"a barrier reads features {sorted(read)}; the filter's model moves {known}")
        if read & speeds and barrier.velocity is not None:
            raise UserError("a barrier on velocities moves; the filter takes those that stay as they are")
        return bool(read & places), bool(read & speeds)

    def reset(self, n: int) -> None:
        """Start n episodes: counts (n,) of the actions filtered, changed, and left without an allowed one."""
        self.filtered, self.changed, self.infeasible = (np.zeros(n, dtype=np.int64) for _ in range(3))
        self.forget()

    def forget(self) -> None:
        """The robots were moved: what the last step made of them says nothing."""
        self.expected: np.ndarray | None = None

    def __call__(self, observation: Mapping[str, np.ndarray], actions: np.ndarray) -> np.ndarray:
        """The actions (n, Da) to carry out in place of the wanted ones, of observations {"state": (n, Do), ...}."""
        state = np.asarray(observation["state"], dtype=np.float64)
        rows = np.asarray(observation.get("hazards", np.zeros((len(state), 0, 7))), dtype=np.float64)
        if len(self.filtered) != len(state):
            self.reset(len(state))
        self.filtered += 1
        u = np.clip(np.asarray(actions, dtype=np.float64), self.model.low, self.model.high)
        if not self.barriers and not rows.shape[1]:
            return u
        drift = self._drift(state)
        bound = self._bound(rows, state)
        wrong = ~(self._after(rows, drift, u)[0] >= bound).all(-1)
        if wrong.any():
            self.changed[wrong] += 1
            u[wrong], lost = self._correct(rows[wrong], drift[wrong], u[wrong], bound[wrong])
            self.infeasible[wrong] += lost
        self.expected = state @ self.model.A.T + u @ self.model.B.T
        return u

    def _drift(self, state: np.ndarray) -> np.ndarray:
        """Where states (n, Do) go by themselves: A s, and what the last step had beside the model."""
        drift = state @ self.model.A.T
        if self.expected is None:
            return drift
        beside = state - self.expected
        size = np.linalg.norm(beside[:, self.model.velocity], axis=1, keepdims=True)
        return drift + beside * np.minimum(1.0, self.model.deceleration * self.model.dt / np.maximum(size, 1e-12))

    def brake(self, drift: np.ndarray) -> np.ndarray:
        """The stop action (n, Da) where states go to `drift` by themselves: straight against the velocity, as hard as
        the limits allow and the rest needs."""
        model = self.model
        u = -np.linalg.solve(model.B[model.velocity], drift[:, model.velocity].T).T
        over = np.maximum(u / np.where(u > 0, model.high, model.low), 1e-9).max(axis=1, keepdims=True)
        return u / np.maximum(over, 1.0)

    def _bound(self, rows: np.ndarray, state: np.ndarray) -> np.ndarray:
        """What h (n, K) must keep to after this step."""
        bound = np.full((len(state), len(self.barriers) + rows.shape[1]), self.margin)
        if self.gamma < 1:
            now = self._stopping(rows, state, 0.0)[0].min(-1)
            bound += (1 - self.gamma) * (now - self.margin).clip(min=0.0)
        return bound

    def _correct(self, rows: np.ndarray, drift: np.ndarray, wanted: np.ndarray, bound: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nearest allowed actions (n, Da) that were found, the brake where none was, and where it breaks h too."""
        brake, B = self.brake(drift), self.model.B
        # from the wish and from the brake, side by side: h is not concave in u, and each finds its own side of an obstacle
        hazards, going, aim, least = (np.repeat(part, 2, 0) for part in (rows, drift, wanted, bound))
        at = np.stack([wanted, brake], 1).reshape(aim.shape)
        u, best = np.repeat(brake, 2, 0), np.full(len(aim), np.inf)
        linear = self._stopping(hazards, going + at @ B.T, self.model.dt)
        for _ in range(self.iterations):
            at = self._solve(linear, aim, at, least)
            linear = self._stopping(hazards, going + at @ B.T, self.model.dt)
            cost = np.linalg.norm(at - aim, axis=1)
            better = (cost < best) & (linear[0].min(-1) >= least - 1e-9).all(-1)
            u[better], best[better] = at[better], cost[better]
        nearer = np.arange(len(wanted)) * 2 + best.reshape(-1, 2).argmin(1)
        u, found = u[nearer], np.isfinite(best[nearer])
        if found.all():
            return u, ~found
        # of the brake itself the samples alone are asked: the bound between them has no room for it
        slack = (self._after(rows, drift, brake)[1] - bound).min(-1)
        lost = ~found & (slack < -1e-6)
        if lost.any():
            most = np.where(lost, slack, np.inf)
            # nothing is allowed: of the stop action and pushes all round, what leaves most
            size = wanted.shape[1]
            for side in (*np.eye(size), *-np.eye(size), *map(np.array, product((-1.0, 1.0), repeat=size))):
                push = np.broadcast_to(np.where(side > 0, self.model.high, self.model.low) * abs(side), u.shape)
                left = (self._after(rows, drift, push)[1] - bound).min(-1)
                better = left > most
                u[better], most[better] = push[better], left[better]
        return u, lost

    def _after(self, rows: np.ndarray, drift: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """h (n, K) after actions u, bounded between the samples, and at the samples alone."""
        bounded, b = self._stopping(rows, drift + u @ self.model.B.T, self.model.dt)[:2]
        return bounded.min(-1), b.min(-1)

    def _stopping(self, rows: np.ndarray, state: np.ndarray, time: float) -> tuple[np.ndarray, ...]:
        """On the ways to rest from states (n, Do) beside the constant barriers and hazards (n, K', 7), K in all: b between
        neighbouring samples at least (n, K, M - 1), b at the samples (n, K, M), and the former's gradients by p and by v
        (n, K, M - 1, d)."""
        # all hazards at once, as if each had a robot of its own
        parts = [(barrier, 1) for barrier in self.barriers]
        if rows.shape[1]:
            parts += [(from_rows(rows.reshape(-1, 1, rows.shape[2]))[0], rows.shape[1])]
        every = [self._beside(barrier, np.repeat(state, k, 0) if k > 1 else state, time) for barrier, k in parts]
        shaped = [[part.reshape(len(state), k, *part.shape[1:]) for part in seen] for seen, (_, k) in zip(every, parts)]
        between, b, by_p, by_v = (np.concatenate(each, 1) for each in zip(*shaped))
        return between, b, by_p, by_v

    def _beside(self, barrier: Barrier, state: np.ndarray, time: float) -> tuple[np.ndarray, ...]:
        """`_stopping` of one barrier, or of one for each robot: (n, M - 1), (n, M) and twice (n, M - 1, d)."""
        model, (on_place, on_speed) = self.model, self._reads(barrier)
        position, velocity = state[:, model.position], state[:, model.velocity]
        theta = self.THETA[:, None]
        slower = np.sqrt(1 - theta)  # v at a share theta of the way to rest, of what it was
        relative = velocity if barrier.velocity is None else velocity - np.asarray(barrier.velocity)
        speed = np.sqrt((relative * relative).sum(1, keepdims=True))
        unit = relative / np.maximum(speed, 1e-9)
        factor = speed / (2 * self.braking) + model.dt / 2
        points = np.zeros((len(state), len(theta), state.shape[1]))
        points[..., model.position] = position[:, None] + theta * (relative * factor)[:, None]
        points[..., model.velocity] = slower * velocity[:, None]
        b, gradient = barrier.both(points, time)
        glances = on_place * self.blows  # no blow makes a robot faster
        b = b - glances * (velocity * velocity).sum(1, keepdims=True)
        by_p = gradient[..., model.position]
        # d(v)'s Jacobian is factor I + speed unit unit' / (2 a)
        along = (by_p * unit[:, None]).sum(-1, keepdims=True) * (unit * speed / (2 * self.braking))[:, None]
        by_v = theta * (by_p * factor[:, None] + along) + slower * gradient[..., model.velocity] - 2 * glances * velocity[:, None]
        moved, slowed = speed * factor / (len(theta) - 1), -speed * np.diff(slower[:, 0])
        spacing = barrier.steepest * np.hypot(on_place * moved, on_speed * slowed)
        between = (b[:, 1:] + b[:, :-1] - spacing) / 2
        return between, b, (by_p[:, 1:] + by_p[:, :-1]) / 2, (by_v[:, 1:] + by_v[:, :-1]) / 2

    def _solve(self, linear: tuple[np.ndarray, ...], wanted: np.ndarray, at: np.ndarray, bound: np.ndarray) -> np.ndarray:
        """The action nearest to `wanted` within the limits and h linearized at `at`, where there is one, else `at`."""
        model, (b, _, by_p, by_v) = self.model, linear
        worst = b.argmin(-1)[..., None]
        value = np.take_along_axis(b, worst, 2)[..., 0]
        by_p, by_v = (np.take_along_axis(part, worst[..., None], 2)[:, :, 0] for part in (by_p, by_v))
        G = by_p @ model.B[model.position] + by_v @ model.B[model.velocity]
        h = bound - value + (G * at[:, None]).sum(-1) + 1e-6
        size, n = wanted.shape[1], len(wanted)
        box = np.broadcast_to(np.concatenate([np.eye(size), -np.eye(size)]), (n, 2 * size, size))
        edges = np.broadcast_to(np.concatenate([model.low, -model.high]), (n, 2 * size))
        # scaled, so that one tolerance fits all constraints
        norm = np.maximum(np.sqrt((G * G).sum(-1)), 1e-12)
        u, found = least_change(wanted, np.concatenate([G / norm[..., None], box], 1), np.concatenate([h / norm, edges], 1))
        return np.where(found[:, None], np.clip(u, model.low, model.high), at)
