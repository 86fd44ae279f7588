"""Constraints as data: a `Barrier` is a function b(x) of a state, and b(x) >= 0 is safe.

x (..., F) is a NumPy array or a torch tensor in the task's own units, and every barrier works on both alike: robots
import no torch, planners no copy of the shapes. Values are metres (or the unit of the features read) and change by at
most one for one (1-Lipschitz in those features; `Separation` by sqrt 2), so b(x) >= m keeps x at least m away and a
tracking error of e costs e. The shapes to avoid are convex functions except polygons, grids and complements, so one
step of `project` suffices where only such shapes are active.

Parameters are numbers, arrays (d,), or one set for each of n robots, arrays (n, d) beside x (n, ..., F). A barrier with
a `velocity` (d,) or (n, d) moves: `time` seconds on it has moved by time * velocity.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import combinations, product
from typing import Any, ClassVar

import numpy as np

from pilotwave.errors import UserError, nearest

Features = slice | Sequence[int]
TINY = 1e-9


def namespace(x: Any) -> Any:
    """The module whose functions take x: numpy, or torch where x is a tensor."""
    return np if isinstance(x, np.ndarray) else sys.modules["torch"]


def like(x: Any, value: Any) -> Any:
    """A number or array in x's kind, precision and place."""
    if isinstance(x, np.ndarray):
        return np.asarray(value, dtype=x.dtype)
    return sys.modules["torch"].as_tensor(value, dtype=x.dtype, device=x.device)


def spread(x: Any, value: Any) -> Any:
    """`like`, and the robots' axis of a parameter (n, d) set against x's first: (n, 1, ..., d)."""
    value = like(x, value)
    return value.reshape((value.shape[0], *(1,) * (x.ndim - 2), value.shape[1])) if value.ndim == 2 else value


def _norm(x: Any) -> Any:
    return (x * x).sum(-1) ** 0.5


def _numbers(name: str, value: Any, *shape: int) -> np.ndarray:
    """A setting as finite numbers of a shape; UserError for what is none."""
    wanted = f"finite numbers, {' x '.join(map(str, shape))} of them" if shape else "a finite number"
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{name} is {value}; it must be {wanted}") from None
    if array.shape != shape or not np.isfinite(array).all():
        raise UserError(f"{name} is {value}; it must be {wanted}")
    return array


@dataclass(frozen=True, eq=False, kw_only=True)
class Barrier(ABC):
    """features: which of x's features it reads, d of them. velocity: of what it describes, in features a second."""

    features: Features = field(default_factory=lambda: slice(0, 2))
    velocity: Any = None
    steepest: ClassVar[float] = 1.0  # b changes by at most this for one

    @abstractmethod
    def local(self, p: Any) -> tuple[Any, Any]:
        """b (...) and its gradient (..., d) at features p (..., d), as they are at time 0."""

    def check(self, d: int) -> None:
        """UserError for parameters, of one set, that describe nothing in d features."""
        if self.velocity is not None:
            _numbers("velocity", self.velocity, d)

    def _at(self, x: Any, time: Any) -> tuple[Any, Any]:
        p = x[..., self.features]
        if self.velocity is not None:
            p = p - like(p, time)[..., None] * spread(p, self.velocity)
        return self.local(p)

    def value(self, x: Any, time: Any = 0.0) -> Any:
        """b (...) of states x (..., F); time: seconds from now, a number or one for each (...)."""
        return self._at(x, time)[0]

    def gradient(self, x: Any, time: Any = 0.0) -> Any:
        """db/dx (..., F)."""
        return self.both(x, time)[1]

    def both(self, x: Any, time: Any = 0.0) -> tuple[Any, Any]:
        """b (...) and db/dx (..., F)."""
        value, local = self._at(x, time)
        gradient = namespace(x).zeros_like(x)
        gradient[..., self.features] = local
        return value, gradient


@dataclass(frozen=True, eq=False)
class Superellipse(Barrier):
    """Keep out of |(p - center) / radii|_power <= 1: an ellipse (2), SafeDiffuser's quartic (4), any power from 2 up.

    b = min(radii) (|z|_power - 1), the gauge scaled to metres: SafeDiffuser's sum |z|^power - 1 has the same sign and
    set, but a gradient that vanishes inside and grows without bound outside. power: a number or (n, 1).
    """

    center: Any
    radii: Any
    power: Any = 2.0

    def check(self, d: int) -> None:
        super().check(d)
        _numbers("center", self.center, d)
        if (_numbers("radii", self.radii, d) <= 0).any():
            raise UserError(f"radii are {self.radii}; all must be above 0")
        if _numbers("power", self.power) < 2:
            raise UserError(f"power is {self.power}; it must be at least 2")

    def local(self, p: Any) -> tuple[Any, Any]:
        radii, power = spread(p, self.radii) + p[..., :1] * 0, spread(p, self.power)
        z = (p - spread(p, self.center)) / radii
        scale = namespace(p).amin(radii, -1)
        # a gauge has no gradient at its centre: there, any direction will do
        middle = (z * z).sum(-1) < TINY**2
        first = z * 0
        first[..., 0] = TINY
        z = namespace(p).where(middle[..., None], first, z)
        size = abs(z)
        largest = namespace(p).amax(size, -1)  # keeps powers of small numbers from vanishing
        ratio = size / largest[..., None]
        exponent = power if power.ndim == 0 else power[..., 0]
        gauge = largest * (ratio**power).sum(-1) ** (1.0 / exponent)
        direction = namespace(p).sign(z) * (size / gauge[..., None]) ** (power - 1.0)
        return scale * (gauge - 1.0), scale[..., None] * direction / radii


@dataclass(frozen=True, eq=False)
class Box(Barrier):
    """Keep out of low <= p <= high (d,): the signed distance."""

    low: Any
    high: Any

    def check(self, d: int) -> None:
        super().check(d)
        if (_numbers("low", self.low, d) >= _numbers("high", self.high, d)).any():
            raise UserError(f"low is {self.low} and high {self.high}; low must be below high in each")

    def local(self, p: Any) -> tuple[Any, Any]:
        low, high = spread(p, self.low), spread(p, self.high)
        offset = p - (low + high) / 2
        beyond = abs(offset) - (high - low) / 2
        outside = beyond.clip(min=0.0)
        distance = _norm(outside)
        deepest = namespace(p).amax(beyond, -1)
        sign = namespace(p).where(offset < 0, like(p, -1.0), like(p, 1.0))
        # inside, the nearest face alone counts, the first of equal ones
        ties = (beyond >= deepest[..., None]) * like(p, 1.0)
        inward = ties * (ties.cumsum(-1) <= 1.0)
        normal = namespace(p).where((deepest > 0)[..., None], outside / distance.clip(min=TINY)[..., None], inward)
        return distance + deepest.clip(max=0.0), sign * normal


@dataclass(frozen=True, eq=False)
class Polygon(Barrier):
    """Keep out of a simple polygon, convex or not: vertices (k, 2) in order. The signed distance."""

    vertices: Any

    def check(self, d: int) -> None:
        super().check(d)
        corners = _numbers("vertices", self.vertices, len(self.vertices), 2)
        if d != 2 or len(corners) < 3 or (corners == np.roll(corners, 1, 0)).all(1).any():
            raise UserError("a polygon has at least 3 vertices of 2 features, each unlike the next")

    def local(self, p: Any) -> tuple[Any, Any]:
        xp = namespace(p)
        first = like(p, self.vertices)
        edge = xp.roll(first, -1, 0) - first
        away = p[..., None, :] - first
        along = ((away * edge).sum(-1) / (edge * edge).sum(-1)).clip(0.0, 1.0)
        gap = away - along[..., None] * edge
        distances = _norm(gap)
        nearest = distances.argmin(-1)
        chosen = (nearest[..., None] == like(nearest, range(len(first)))) * like(p, 1.0)
        distance = (distances * chosen).sum(-1)
        closest, side = (gap * chosen[..., None]).sum(-2), (edge * chosen[..., None]).sum(-2)
        # a ray to the right crosses the outline an odd number of times from within
        upward = (away[..., 1] >= 0) != (away[..., 1] - edge[:, 1] >= 0)
        turn = away[..., 0] * edge[:, 1] - away[..., 1] * edge[:, 0]
        crossed = upward & ((turn < 0) == (edge[:, 1] > 0))
        inside = (crossed * 1).sum(-1) % 2 == 1
        sign = xp.where(inside, like(p, -1.0), like(p, 1.0))
        # on the outline itself the edge's outward normal
        area = (first[:, 0] * xp.roll(first[:, 1], -1, 0) - first[:, 1] * xp.roll(first[:, 0], -1, 0)).sum()
        outward = xp.stack([side[..., 1], -side[..., 0]], -1) * (1.0 if area > 0 else -1.0)
        outward = outward / _norm(outward)[..., None]
        normal = sign[..., None] * closest / distance.clip(min=TINY)[..., None]
        return sign * distance, xp.where((distance < TINY)[..., None], outward, normal)


@dataclass(frozen=True, eq=False)
class Grid(Barrier):
    """A signed-distance grid, multilinear between its nodes and level beyond them: values (N1, ..., Nd) at origin +
    index * spacing. Keep out of where it is negative."""

    values: Any
    origin: Any
    spacing: float

    def check(self, d: int) -> None:
        super().check(d)
        _numbers("origin", self.origin, d)
        nodes = np.shape(self.values)
        if len(nodes) != d or min(nodes) < 2 or _numbers("spacing", self.spacing) <= 0:
            raise UserError(f"a grid has {d} axes of at least 2 nodes, as many as features, and a spacing above 0")
        _numbers("values", self.values, *nodes)

    def local(self, p: Any) -> tuple[Any, Any]:
        xp = namespace(p)
        values = like(p, self.values)
        d = values.ndim
        last = like(p, np.array(values.shape) - 1.0)
        at = (p - like(p, self.origin)) / self.spacing
        within = (at >= 0) & (at <= last)
        at = xp.minimum(at.clip(min=0.0), last)
        cell = xp.minimum(xp.floor(at), last - 1)
        weight = at - cell
        cell = cell.astype(np.int64) if isinstance(p, np.ndarray) else cell.long()
        value, gradient = p[..., 0] * 0, xp.zeros_like(p)
        for corner in product((0, 1), repeat=d):
            node = values[tuple(cell[..., i] + corner[i] for i in range(d))]
            share = [weight[..., i] if corner[i] else 1 - weight[..., i] for i in range(d)]
            whole = node
            for s in share:
                whole = whole * s
            value = value + whole
            for i in range(d):
                slope = node * (1.0 if corner[i] else -1.0) / self.spacing
                for j in range(d):
                    slope = slope * share[j] if j != i else slope
                gradient[..., i] = gradient[..., i] + slope
        return value, gradient * within


@dataclass(frozen=True, eq=False)
class HalfSpace(Barrier):
    """Stay where normal . p <= offset: b = (offset - normal . p) / |normal|. A joint, speed or height limit."""

    normal: Any
    offset: float

    def check(self, d: int) -> None:
        super().check(d)
        _numbers("offset", self.offset)
        if not _numbers("normal", self.normal, d).any():
            raise UserError("normal is 0; it must point somewhere")

    def local(self, p: Any) -> tuple[Any, Any]:
        normal = like(p, self.normal)
        unit = normal / _norm(normal)
        return like(p, self.offset) / _norm(normal) - (p * unit).sum(-1), -unit + p * 0


@dataclass(frozen=True, eq=False)
class Complement(Barrier):
    """Stay inside what another barrier keeps out of: b = -b. A workspace, or a speed limit as a disc of velocities."""

    other: Barrier

    def local(self, p: Any) -> tuple[Any, Any]:
        value, gradient = self.other.local(p)
        return -value, -gradient


@dataclass(frozen=True, eq=False)
class Separation(Barrier):
    """Two robots' features, one half of `features` each (2 k of them), stay `distance` apart: b = |p - q| - distance."""

    distance: float
    features: Features = field(default_factory=lambda: slice(0, 4), kw_only=True)
    steepest: ClassVar[float] = 2**0.5

    def check(self, d: int) -> None:
        super().check(d)
        if d % 2 or _numbers("distance", self.distance) <= 0:
            raise UserError(f"distance is {self.distance}, of {d} features; it must be above 0, and features two halves")

    def local(self, p: Any) -> tuple[Any, Any]:
        half = p.shape[-1] // 2
        gap = p[..., :half] - p[..., half:]
        length = _norm(gap)
        first = gap * 0
        first[..., 0] = 1.0
        xp = namespace(p)
        unit = xp.where((length < TINY)[..., None], first, gap / length.clip(min=TINY)[..., None])
        return length - self.distance, xp.concatenate([unit, -unit], -1)


@dataclass(frozen=True, eq=False)
class Sum(Barrier):
    """b = sum_k w_k b_k / sum_k w_k of `terms` that do not move, with weights w_k > 0 (1 each): what one falls short of another may
    make up for, as speed near an obstacle for distance. Its features are those that the terms read."""

    terms: Sequence[Barrier]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not self.terms or any(part.velocity is not None for part in (self, *self.terms)):
            raise UserError("a sum of barriers has at least one term, and none that moves")
        read = (range(f.stop)[f] if isinstance(f := term.features, slice) else f for term in self.terms)
        object.__setattr__(self, "features", sorted({i for features in read for i in features}))

    def check(self, d: int) -> None:
        if self.weights is not None and (_numbers("weights", self.weights, len(self.terms)) <= 0).any():
            raise UserError(f"weights are {self.weights}; all must be above 0")

    def local(self, p: Any) -> tuple[Any, Any]:
        read: Any = self.features
        x = like(p, np.zeros(read[-1] + 1)) + p[..., :1] * 0
        x[..., read] = p
        weights = self.weights or [1.0] * len(self.terms)
        parts = [term.both(x) for term in self.terms]
        shares = [weight / sum(weights) for weight in weights]
        value = sum(share * b for share, (b, _) in zip(shares, parts))
        return value, sum(share * gradient for share, (_, gradient) in zip(shares, parts))[..., read]


@dataclass(frozen=True, eq=False)
class Custom(Barrier):
    """b = function(p) of features p (..., d), with its gradient(p) (..., d), or without: automatic differentiation for
    tensors, central differences of `step` for arrays."""

    function: Callable[[Any], Any]
    derivative: Callable[[Any], Any] | None = None
    step: float = 1e-5

    def local(self, p: Any) -> tuple[Any, Any]:
        if self.derivative is not None:
            return self.function(p), self.derivative(p)
        if isinstance(p, np.ndarray):
            wide = p.astype(np.float64)
            columns = []
            for i in range(p.shape[-1]):
                shift = np.zeros(p.shape[-1])
                shift[i] = self.step
                columns.append((self.function(wide + shift) - self.function(wide - shift)) / (2 * self.step))
            return self.function(p), np.stack(columns, -1).astype(p.dtype)
        torch = sys.modules["torch"]
        with torch.enable_grad():
            q = p.detach().requires_grad_()
            value = self.function(q)
            (gradient,) = torch.autograd.grad(value.sum(), q)
        return value.detach(), gradient


def limits(low: Sequence[float], high: Sequence[float], features: Features) -> list[Barrier]:
    """low <= p <= high for each of d features, as 2 d half-spaces; infinite bounds are left out."""
    found: list[Barrier] = []
    for i, (least, most) in enumerate(zip(low, high)):
        unit = np.eye(len(low))[i]
        if np.isfinite(most):
            found.append(HalfSpace(unit, float(most), features=features))
        if np.isfinite(least):
            found.append(HalfSpace(-unit, -float(least), features=features))
    return found


SHAPES: dict[str, type[Barrier]] = {
    "superellipse": Superellipse,
    "box": Box,
    "polygon": Polygon,
    "grid": Grid,
    "half_space": HalfSpace,
    "separation": Separation,
    "sum": Sum,
}


def build(settings: Any, width: int) -> list[Barrier]:
    """Barriers of states (..., width) from settings [{shape: box, low: [1, 1], high: [2, 2]}, ...]: keys of SHAPES and their
    parameters; `features` is a list of numbers, `inside: true` keeps the robot within the shape instead of out of it."""
    if isinstance(settings, str | Mapping) or not isinstance(settings, Sequence):
        raise UserError(f"barriers are a list such as [{{shape: box, low: [1, 1], high: [2, 2]}}]; got {settings}")
    return [_barrier(each, width) for each in settings]


def _barrier(settings: Any, width: int) -> Barrier:
    if not isinstance(settings, Mapping):
        raise UserError(f"a barrier is written as {{shape: box, low: [1, 1], high: [2, 2]}}; got {settings}")
    options = dict(settings)
    shape, inside = str(options.pop("shape", "")), options.pop("inside", False)
    if shape not in SHAPES:
        raise nearest("barrier shape", shape, SHAPES)
    known = [field.name for field in fields(SHAPES[shape])]
    for name in options:
        if name not in known:
            raise nearest(f"setting of the barrier '{shape}'", str(name), known)
    try:
        if "terms" in options:
            options["terms"] = build(options["terms"], width)
        barrier = SHAPES[shape](**options)
        read = indices(barrier.features, width)
        if not read or len(set(read)) < len(read):
            raise UserError(f"features are {options['features']}; at least one is needed, and each once")
        if not isinstance(inside, bool):
            raise UserError(f"inside is {inside}; it must be true or false")
        barrier.check(len(read))
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"the barrier {dict(settings)} does not fit together: {error}") from None
    return Complement(barrier, features=barrier.features, velocity=barrier.velocity) if inside else barrier


def indices(features: Features, width: int) -> list[int]:
    """Which of a state's `width` features those are; UserError for others."""
    if isinstance(features, slice):
        return list(range(width))[features]
    if not isinstance(features, Sequence) or not all(isinstance(i, int) and 0 <= i < width for i in features):
        raise UserError(f"features are {features}; they must be a list of numbers from 0 to {width - 1}")
    return list(features)


ROW = ("center_x", "center_y", "radius_x", "radius_y", "power", "velocity_x", "velocity_y")
"""What describes one hazard in the observation "hazards" (n, K, 7): a superellipse where it is now, and its velocity."""


def from_rows(rows: np.ndarray, features: Features = slice(0, 2)) -> list[Barrier]:
    """The K hazards of n robots, each one barrier for all robots, from an observation (n, K, 7); see `ROW`."""
    rows = np.asarray(rows, dtype=np.float64)
    return [
        Superellipse(rows[:, k, 0:2], rows[:, k, 2:4], rows[:, k, 4:5], features=features, velocity=rows[:, k, 5:7])
        for k in range(rows.shape[1])
    ]


def values(barriers: Sequence[Barrier], x: Any, time: Any = 0.0) -> Any:
    """(..., K): each barrier's b."""
    return namespace(x).stack([barrier.value(x, time) for barrier in barriers], -1)


# ---------------------------------------------------------------------------------------------- quadratic programs
def least_change(target: Any, G: Any, h: Any, tolerance: float = 1e-9) -> tuple[Any, Any]:
    """The y (..., d) nearest to target (..., d) with G y >= h, G (..., K, d), h (..., K); and where there is one (...).

    Exact: the solution has at most d active constraints, so for d <= 2 (and always for K <= 2) the nearest feasible
    point among the target, its projections on single constraints and on pairs is it. Otherwise, where none of these is
    feasible or more may be active, Lawson and Hanson's least-distance programming (1974, chapter 23), row by row.
    """
    xp = namespace(target)
    K, d = G.shape[-2], G.shape[-1]
    lacking = h - (G * target[..., None, :]).sum(-1)
    size = (G * G).sum(-1)
    flat = size <= TINY
    single = (lacking / xp.where(flat, size * 0 + 1.0, size)).clip(min=0.0)
    moves = [target[..., None, :] * 0, G * single[..., None]]
    if K > 1:
        i, j = (list(index) for index in zip(*combinations(range(K), 2)))
        cross = (G[..., i, :] * G[..., j, :]).sum(-1)
        determinant = size[..., i] * size[..., j] - cross * cross
        parallel = determinant <= 1e-12 * size[..., i] * size[..., j]
        determinant = xp.where(parallel, determinant * 0 + 1.0, determinant)
        first = (size[..., j] * lacking[..., i] - cross * lacking[..., j]) / determinant
        second = (size[..., i] * lacking[..., j] - cross * lacking[..., i]) / determinant
        # a multiplier below zero marks a point that another candidate beats
        kept = (~parallel & (first >= 0) & (second >= 0)) * like(target, 1.0)
        moves.append(G[..., i, :] * (first * kept)[..., None] + G[..., j, :] * (second * kept)[..., None])
    move = xp.concatenate(moves, -2)  # (..., C, d)
    slack = (move[..., None, :] * G[..., None, :, :]).sum(-1) - lacking[..., None, :]
    scale = tolerance * (1.0 + abs(lacking))
    allowed = (slack >= -scale[..., None, :]).all(-1)
    cost = (move * move).sum(-1)
    cost = xp.where(allowed, cost, cost * 0 + float("inf"))
    best = cost.argmin(-1)
    chosen = (best[..., None] == like(best, range(cost.shape[-1])))[..., None]
    y = target + xp.where(chosen, move, move * 0).sum(-2)
    feasible = allowed.any(-1)
    if d > 2 and K > 2:
        y, feasible = _refine(target, G, h, y, feasible)
    return y, feasible


def _refine(target: Any, G: Any, h: Any, y: Any, feasible: Any) -> tuple[Any, Any]:
    """The rows in which three or more constraints may be active, by non-negative least squares."""
    from scipy.optimize import nnls

    G_rows, lacking = _plain(G), _plain(h - (G * target[..., None, :]).sum(-1))
    moved, found = _plain(y - target).copy(), _plain(feasible).astype(bool)
    for row in zip(*np.nonzero((lacking > 0).any(-1))):
        E = np.concatenate([G_rows[row].T, lacking[row][None]])
        f = np.eye(len(E))[-1]
        r = E @ nnls(E, f)[0] - f
        found[row] = np.linalg.norm(r) > 1e-7
        moved[row] = -r[:-1] / r[-1] if found[row] else 0.0
    return target + like(target, moved), like(feasible, found)


def _plain(x: Any) -> np.ndarray:
    """A float64 array of an array or tensor, wherever it lies."""
    return np.asarray(x if isinstance(x, np.ndarray) else x.detach().cpu(), dtype=np.float64)


def project(
    x: Any, barriers: Sequence[Barrier], margin: Any = 0.0, time: Any = 0.0, iterations: int = 20, tolerance: float = 1e-6
) -> tuple[Any, Any]:
    """States near x (..., F) with every b >= margin, and where that was reached to `tolerance` (...) bool.

    Newton's method on min |y - x|^2, ended by the first safe y: each round linearizes the barriers at y and solves the
    quadratic program exactly, so the point is the nearest one where outlines are straight, and nearly so elsewhere.
    The later half of the rounds starts from where it is instead of x, which leaves notches that the nearest point
    would have it cycle in. States that no round makes safe come back as unsafe, moved or not: the caller decides. margin: a
    number or one for each barrier (K,).
    """
    xp = namespace(x)
    wide = x.astype(np.float64) if xp is np else x.double()
    y, aim = wide + 0.0, like(wide, margin) + tolerance / 2
    if not barriers:
        return x, wide[..., 0] == wide[..., 0]
    for step in range(iterations + 1):
        every = [barrier.both(y, time) for barrier in barriers]
        b = xp.stack([value for value, _ in every], -1) - aim
        unsafe = (b < 0).any(-1)
        if step == iterations or not bool(unsafe.any()):
            break
        G = xp.stack([gradient[unsafe] for _, gradient in every], -2)
        origin = wide if step < iterations // 2 else y
        move, _ = least_change((origin - y)[unsafe], G, -b[unsafe])
        y[unsafe] = y[unsafe] + move
    safe = (b >= -tolerance / 2).all(-1)
    return (y.astype(x.dtype) if xp is np else y.to(x.dtype)), safe
