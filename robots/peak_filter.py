"""A control-barrier filter for robots that act through contacts: dynamics and barrier learned from recorded steps. NumPy only.

Under a roof it is too late to act when the height nears it: what was pushed off will fly. So a barrier b is asked not of where the
robot is but of the peak of its rise, V(s), as recorded robots went on from there (`world_models.control_affine`):

    h(s) = b(s with the feature at V(s))   while the feature rises faster than `rising`,   b(s) else

a policy neural control barrier function (So et al. 2024, arXiv 2310.15478). With s+ = s + f(s) + G(s) u, u is the action with

    h(s+) >= margin        and least        |what it changes of s+, but for what b is to see|^2 + effort |u - wanted|^2

a quadratic program with h linearized at u, repeated, and checked against h itself. The first term keeps a hopper on its foot: of
the torques that push off less, those are taken that turn and slow it least. Where no allowed action is found, `infeasible`
counts it, and the robot does what leaves most of h.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import yaml

from pilotwave.errors import UserError, require
from robots.barriers import Barrier, Features, least_change, like, namespace, values

ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Perceptrons side by side, SiLU between their layers: weights (E, in, out) and biases (E, 1, out) of each layer, in whose
    precision arrays are computed."""

    layers: Sequence[tuple[np.ndarray, np.ndarray]]

    def __call__(self, x: Any) -> tuple[Any, list[Any]]:
        """x (n, in) -> mean output (n, out), and the slopes of the activations, for `gradient`."""
        slopes = []
        x = x.astype(self.layers[0][0].dtype) if isinstance(x, np.ndarray) else x
        for k, (weight, bias) in enumerate(self.layers):
            if k:
                gate = 1 / (1 + namespace(x).exp(-x))
                slopes.append(gate * (1 + x * (1 - gate)))
                x = x * gate
            x = x @ like(x, weight) + like(x, bias)
        return x.mean(0), slopes

    def gradient(self, slopes: Sequence[Any]) -> Any:
        """Of one output's mean by x, (n, in)."""
        back: Any = None
        for (weight, _), slope in zip(self.layers[:0:-1], slopes[::-1]):
            turned = like(slope, weight.swapaxes(1, 2))
            back = (turned if back is None else back @ turned) * slope
        return (back @ like(back, self.layers[0][0].swapaxes(1, 2))).mean(0)


@dataclass(frozen=True, eq=False)
class ControlAffine:
    """s+ = s + f(s) + G(s) u and the peak V(s) of a feature, of states s (n, Do) and actions u (n, Da) within low and high.

    offset, scale: of the networks' inputs; change: of f and G's outputs (Do,); rise: of V's; velocity: the feature's speed.
    """

    dynamics: Ensemble
    peaks: Ensemble
    offset: np.ndarray
    scale: np.ndarray
    change: np.ndarray
    rise: float
    feature: int
    velocity: int
    low: np.ndarray
    high: np.ndarray
    task: str = ""

    def step(self, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where states go by themselves (n, Do), and G (n, Da, Do)."""
        out = self.dynamics((state - self.offset) / self.scale)[0]
        parts = out.reshape(len(state), -1, len(self.change)) * self.change
        return state + parts[:, 0], parts[:, 1:]

    def peak(self, x: Any) -> tuple[Any, Any]:
        """V (...) and its gradient (..., Do) at states (..., Do), arrays or tensors."""
        flat = x.reshape(-1, x.shape[-1])
        offset, scale = like(flat, self.offset), like(flat, self.scale)
        out, slopes = self.peaks((flat - offset) / scale)
        gradient = self.rise * self.peaks.gradient(slopes) / scale
        gradient[:, self.feature] += 1
        return (flat[:, self.feature] + self.rise * out[:, 0]).reshape(x.shape[:-1]), gradient.reshape(x.shape)


@dataclass(frozen=True, eq=False)
class AtPeak(Barrier):
    """h of the module: a barrier at the peak of the rise. It reads all features of a state."""

    of: Barrier
    model: ControlAffine
    rising: float = 0.5
    features: Features = field(default_factory=lambda: slice(None), kw_only=True)

    def local(self, p: Any) -> tuple[Any, Any]:
        model, rises = self.model, p[..., self.model.velocity] > self.rising
        x, slope = p + 0, p * 0  # slope: of the feature that b is asked of, by the state
        slope[..., model.feature] = 1
        if rises.any():  # few do, and the peak's networks are what takes time here
            at_peak = x[..., model.feature]  # a view
            at_peak[rises], slope[rises] = model.peak(p[rises])
        value, gradient = self.of.both(x)
        by_feature = gradient[..., model.feature, None] + 0
        gradient[..., model.feature] = 0
        return value, gradient + by_feature * slope


class PeakFilter:
    """Filters the actions of n robots; see the module. barriers: of the state. margin: what must remain of each. rising: the speed
    from which the peak counts, features a second. effort: what a unit of changed action costs beside a usual change of a state."""

    def __init__(
        self,
        model: ControlAffine,
        barriers: Sequence[Barrier],
        *,
        margin: float = 0.01,
        rising: float = 0.5,
        effort: float = 0.05,
        iterations: int = 3,
    ) -> None:
        for name, value in (("margin", margin), ("rising", rising), ("effort", effort)):
            require(f"filter.{name}", value, 0)
        self.model, self.margin, self.effort, self.iterations = model, margin, effort, iterations
        self.barriers = [AtPeak(barrier, model, rising) for barrier in barriers]
        self.weight = 1 / model.change
        self.weight[[model.feature, model.velocity]] = 0.0
        self.reset(0)

    def reset(self, n: int) -> None:
        """Start n episodes: counts (n,) of the actions filtered, changed, and left without an allowed one."""
        self.filtered, self.changed, self.infeasible = (np.zeros(n, dtype=np.int64) for _ in range(3))

    def forget(self) -> None:
        """Nothing is carried from step to step."""

    def __call__(self, observation: Mapping[str, np.ndarray], actions: np.ndarray) -> np.ndarray:
        """The actions (n, Da) to carry out in place of the wanted ones, of observations {"state": (n, Do), ...}."""
        state = np.asarray(observation["state"], dtype=np.float64)
        if len(self.filtered) != len(state):
            self.reset(len(state))
        u, _, wrong, lost = self.nearest(state, actions)
        self.filtered += 1
        self.changed += wrong
        self.infeasible += lost
        return u

    def nearest(self, state: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of states (n, Do) the allowed actions (n, Da) nearest to the wanted ones, the states (n, Do) that they lead to, which
        of them were changed, and of which there was none."""
        u = np.clip(np.asarray(actions, dtype=np.float64), self.model.low, self.model.high)
        drift, effect = self.model.step(state)
        after = drift + (effect * u[..., None]).sum(1)
        wrong, lost = values(self.barriers, after).min(-1) < self.margin, np.zeros(len(u), dtype=bool)
        if wrong.any():
            u[wrong], lost[wrong] = self._correct(drift[wrong], effect[wrong], u[wrong])
            after[wrong] = drift[wrong] + (effect[wrong] * u[wrong][..., None]).sum(1)
        return u, after, wrong, lost

    def _left(self, drift: np.ndarray, effect: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """h(s+) - margin (n, K) after actions u, and its gradient by them (n, K, Da)."""
        after = drift + (effect * u[..., None]).sum(1)
        every = [barrier.both(after) for barrier in self.barriers]
        h = np.stack([value for value, _ in every], -1) - self.margin
        return h, np.stack([np.einsum("nad,nd->na", effect, gradient) for _, gradient in every], 1)

    def _correct(self, drift: np.ndarray, effect: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The allowed actions (n, Da) of least consequence that were found, and which rows have none but what leaves most of h."""
        n, size = wanted.shape
        low, high = self.model.low, self.model.high
        felt = effect * self.weight
        # |u - wanted|_M^2 with M = root root' is the plain distance of root' u
        root = np.linalg.cholesky(felt @ felt.swapaxes(1, 2) + self.effort * np.eye(size))
        back = np.linalg.inv(root).swapaxes(1, 2)
        target = (root.swapaxes(1, 2) @ wanted[..., None])[..., 0]
        box = np.broadcast_to(np.concatenate([np.eye(size), -np.eye(size)]), (n, 2 * size, size))
        edges = np.broadcast_to(np.concatenate([low, -high]), (n, 2 * size))
        at, h = wanted, np.full(n, -np.inf)
        best, cost, most, left = wanted.copy(), np.full(n, np.inf), wanted.copy(), np.full(n, -np.inf)
        slack, slope = self._left(drift, effect, at)
        for _ in range(self.iterations):
            asked = (slope * at[:, None]).sum(-1) - slack + ROUNDING
            rows = np.concatenate([slope, box], 1) @ back
            norm = np.maximum(np.linalg.norm(rows, axis=-1), 1e-12)
            y, found = least_change(target, rows / norm[..., None], np.concatenate([asked, edges], 1) / norm)
            worst = np.take_along_axis(slope, slack.argmin(-1)[:, None, None], 1)[:, 0]
            corner = np.where(worst > 0, high, low)
            at = np.where(found[:, None], np.clip((back @ y[..., None])[..., 0], low, high), corner)
            slack, slope = self._left(drift, effect, at)
            h, away = slack.min(-1), np.linalg.norm((root.swapaxes(1, 2) @ (at - wanted)[..., None])[..., 0], axis=1)
            better = (h >= 0) & (away < cost)
            best[better], cost[better] = at[better], away[better]
            more = h > left
            most[more], left[more] = at[more], h[more]
        lost = np.isinf(cost)
        return np.where(lost[:, None], most, best), lost


def for_task(task: str, path: str | Path | None = None) -> ControlAffine:
    """The model of a folder, which must be one of this task (without its roof), or the task's shipped one."""
    model = load(path or f"checkpoints/{task}-control-affine")
    if model.task != task:
        raise UserError(f"{path} was trained for {model.task}, not for {task}; give one of that task")
    return model


def load(path: str | Path) -> ControlAffine:
    """The model of a folder that `pilotwave train world_model=control_affine` wrote."""
    folder = Path(path)
    files = {name: folder / name for name in ("config.yaml", "card.json", "model.safetensors")}
    for name, file in files.items():
        if not file.is_file():
            raise UserError(f"{folder} lacks {name}; give a folder that 'pilotwave train world_model=control_affine' wrote")
    config, content = yaml.safe_load(files["config.yaml"].read_text(encoding="utf-8")), files["model.safetensors"].read_bytes()
    if config.get("name") != "control_affine":
        raise UserError(f"{folder} is a {config.get('name')}; give a folder of 'pilotwave train world_model=control_affine'")
    if hashlib.sha256(content).hexdigest() != json.loads(files["card.json"].read_text(encoding="utf-8")).get("sha256"):
        raise UserError(f"{files['model.safetensors']} does not match the sha256 in card.json; copy the folder again")
    tensors = {key.removeprefix("ema."): value for key, value in safetensors.numpy.load(content).items() if key.startswith("ema.")}

    def array(name: str) -> np.ndarray:
        return np.asarray(tensors[name], np.float64)

    def single(name: str) -> np.ndarray:
        return np.asarray(tensors[name], np.float32)

    def ensemble(name: str) -> Ensemble:
        count = sum(key.startswith(f"{name}.weight.") for key in tensors)
        return Ensemble([(single(f"{name}.weight.{k}"), single(f"{name}.bias.{k}")) for k in range(count)])

    scale = array("normalizer.groups.observation.scale")
    spec, peak = config["spec"], config["algorithm"]["peak"]
    return ControlAffine(
        ensemble("dynamics"), ensemble("peak"),
        array("normalizer.groups.observation.offset"), np.where(scale == 0, np.inf, scale),
        array("error")[1], float(tensors["rise"]), int(peak["feature"]), int(peak["velocity"]),
        np.asarray(spec["action_low"], np.float64), np.asarray(spec["action_high"], np.float64), str(config["task"]),
    )  # fmt: skip
