"""Behaviour policies: small networks trained on a task itself, whose episodes `collect` records. NumPy only.

A Gaussian policy: a = mu(o) + std eps, eps ~ N(0, 1), or mu(o) where it is not to explore; the task clips it. A folder holds
one task's policy at several times of its training (`pilotwave behaviour`), stored as float16, and which of these count as
"random", "medium", "expert" and "replay" (on the way from random to medium).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors.numpy
import yaml

from pilotwave.errors import UserError, nearest
from robots.controller import Chunk, Tracker
from robots.rollout import normalized
from robots.tasks.locomotion import Locomotion
from robots.tracking import DirectTracker

TOGETHER = 64  # episodes side by side in collection

MIXTURES: dict[str, tuple[str, ...]] = {
    "random": ("random",),
    "medium": ("medium",),
    "expert": ("expert",),
    "medium-replay": ("replay",),
    "medium-expert": ("medium", "expert"),
    "full-replay": ("replay", "expert"),
}
"""Quality of a data set -> what its policies are, each of which records as many steps as the others. D4RL's own (Fu et al. 2020):
its "replay" is what one training saw until it was medium; here, episodes of the policies at several times until then."""


@dataclass(frozen=True)
class GaussianPolicy:
    """layers: (weight (in, out), bias (out,)) of each layer; between them tanh. The last gives mean and log deviation."""

    layers: Sequence[tuple[np.ndarray, np.ndarray]]

    def __call__(self, states: np.ndarray, eps: np.ndarray | None = None) -> np.ndarray:
        """Actions (n, Da) for states (n, Do) and noise (n, Da); None: the mode."""
        x = states
        for weight, bias in self.layers[:-1]:
            x = np.tanh(x @ weight + bias)
        weight, bias = self.layers[-1]
        mean, log_deviation = np.split(x @ weight + bias, 2, axis=-1)
        return np.asarray(mean if eps is None else mean + np.exp(log_deviation) * eps)


class BehaviourController:
    """A behaviour policy as a `Controller`: one action a decision."""

    replan_every = 1
    history = 1
    evaluations = 1
    tracker: Tracker = DirectTracker()

    def __init__(self, policy: GaussianPolicy, dt: float, explore: bool = True, seed: int = 0) -> None:
        self.policy, self.dt, self.explore = policy, dt, explore
        self.rng = np.random.default_rng(seed)

    def reset(self, n: int) -> None:
        """Nothing is carried from one episode to the next but the noise stream."""

    def act(self, history: Mapping[str, np.ndarray], step: int) -> Chunk:
        """An action for each of n robots."""
        state = history["state"][:, -1]
        width = self.policy.layers[-1][1].shape[0] // 2
        eps = self.rng.standard_normal((len(state), width)).astype(np.float32) if self.explore else None
        return Chunk(self.policy(state, eps)[:, None], self.dt)


class Behaviour:
    """What a folder of behaviour policies holds."""

    def __init__(self, config: Mapping[str, Any], snapshots: Mapping[int, GaussianPolicy]) -> None:
        self.config = {**config, "sampler": {}}
        self.snapshots = dict(snapshots)
        self.task = str(config["task"])
        self.qualities: dict[str, list[int]] = {name: list(steps) for name, steps in config["qualities"].items()}

    def policies(self, quality: str) -> list[GaussianPolicy]:
        """The policies of a quality."""
        if quality not in self.qualities:
            raise nearest("quality", quality, self.qualities)
        return [self.snapshots[step] for step in self.qualities[quality]]

    def controller(
        self, task_spec: Any, *, sampler: Any = None, quality: str = "expert", explore: bool = True, seed: int = 0
    ) -> BehaviourController:
        """For roll-outs: the last policy of a quality, drawing its actions or (explore false) at its mode."""
        return BehaviourController(self.policies(quality)[-1], task_spec.dt, explore, seed)


def load(path: str | Path, *, ema: bool = True, device: str = "cpu") -> Behaviour:
    """The behaviour policies of a folder that `pilotwave behaviour` wrote. ema, device: of no meaning here."""
    folder = Path(path)
    files = SimpleNamespace(**{key: folder / name for key, name in FILES.items()})
    for file in (files.config, files.card, files.model):
        if not file.is_file():
            raise UserError(f"{folder} lacks {file.name}; give a folder that 'pilotwave behaviour task=NAME' wrote")
    config, content = yaml.safe_load(files.config.read_text(encoding="utf-8")), files.model.read_bytes()
    if config.get("kind") != "behaviour":
        raise UserError(f"{folder} is a {config.get('kind')}, no behaviour policy; give a folder of 'pilotwave behaviour'")
    if hashlib.sha256(content).hexdigest() != json.loads(files.card.read_text(encoding="utf-8")).get("sha256"):
        raise UserError(f"{files.model} does not match the sha256 in {files.card.name}; copy the folder again")
    return Behaviour(config, unpack(safetensors.numpy.load(content)))


FILES = {"config": "config.yaml", "card": "card.json", "model": "model.safetensors"}


def unpack(tensors: Mapping[str, np.ndarray]) -> dict[int, GaussianPolicy]:
    """Policies by training step from arrays "STEP.LAYER.weight" and "STEP.LAYER.bias"."""
    found: dict[int, dict[int, dict[str, np.ndarray]]] = {}
    for key, value in tensors.items():
        step, layer, part = key.split(".")
        found.setdefault(int(step), {}).setdefault(int(layer), {})[part] = value.astype(np.float32)
    return {
        step: GaussianPolicy([(layers[i]["weight"], layers[i]["bias"]) for i in sorted(layers)])
        for step, layers in sorted(found.items())
    }


def behaviour_episodes(
    task: Locomotion,
    steps: int,
    seed: int,
    noise: float,
    progress: Callable[[int, int], None] | None,
    behaviour: Behaviour | None = None,
    quality: str | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """`steps` steps of episodes of the policies of a quality (a key of MIXTURES): D4RL's columns, and facts about them.

    Actions are drawn from the policy, plus normal noise. Each policy's last episode is cut where its share of steps is full.
    "infos/trained_steps": how long the policy that acts had been trained.
    """
    if behaviour is None or quality is None:
        raise UserError(f"{task.spec.name} is recorded with behaviour policies: add quality={', '.join(MIXTURES)}")
    if quality not in MIXTURES:
        raise nearest("quality", quality, MIXTURES)
    trained = [step for part in MIXTURES[quality] for step in behaviour.qualities[part]]
    shares = np.diff(np.linspace(0, steps, len(trained) + 1).round().astype(int))
    episodes: list[dict[str, np.ndarray]] = []
    done = 0
    for number, (step, share) in enumerate(zip(trained, shares.tolist())):
        left, batch = share, 0
        while left > 0:
            # far from the small seeds that roll-outs use
            rng = np.random.default_rng([seed, number, batch])
            copies = min(TOGETHER, -(-left // task.spec.horizon))
            for episode in _episodes(task, behaviour.snapshots[step], copies, noise, rng):
                if left > 0:
                    length = min(len(episode["rewards"]), left)
                    episode = {name: column[:length] for name, column in episode.items()}
                    episode["timeouts"][-1] = not episode["terminals"][-1]
                    episodes.append(episode | {"infos/trained_steps": np.full(length, step, np.int32)})
                    left -= length
            batch += 1
            if progress is not None:
                progress(done + share - max(left, 0), steps)
        done += share
    columns = {name: np.concatenate([episode[name] for episode in episodes]) for name in episodes[0]}
    earned = [float(e["rewards"].sum()) for e in episodes if e["terminals"][-1] or len(e["rewards"]) == task.spec.horizon]
    facts = {"quality": quality, "noise": noise, "trained_steps": trained, "episodes": len(episodes)}
    if earned:
        facts |= {
            "return_mean": float(np.mean(earned)),
            "normalized_return_mean": float(normalized(np.array(earned), task.spec).mean()),
        }
    return columns, facts


def constraint_columns(margin: np.ndarray) -> dict[str, np.ndarray]:
    """What is recorded of steps' margins: as they are, and as costs."""
    return {"infos/margin": margin.astype(np.float32), "infos/cost": (margin < 0).astype(np.float32)}


def _episodes(
    task: Locomotion, policy: GaussianPolicy, n: int, noise: float, rng: np.random.Generator
) -> list[dict[str, np.ndarray]]:
    """n whole episodes, D4RL's columns each."""
    state = task.reset(rng.integers(2**30, 2**31, n).tolist())["state"]
    rows: dict[str, list[np.ndarray]] = {name: [] for name in ("observations", "actions", "rewards", "terminals")}
    further: dict[str, list[np.ndarray]] = {}
    length, over = np.zeros(n, dtype=int), np.zeros(n, dtype=bool)
    for _ in range(task.spec.horizon):
        eps = rng.standard_normal((2, n, task.spec.action_dim), np.float32)
        action = np.clip(policy(state, eps[0]) + noise * eps[1], -1, 1).astype(np.float32)
        observation, reward, terminated, info = task.step(action)
        for name, value in zip(rows, (state, action, reward.astype(np.float32), terminated)):
            rows[name].append(value)
        for name, value in constraint_columns(info["margin"]).items() if "margin" in info else ():
            further.setdefault(name, []).append(value)
        state, length, over = observation["state"], length + ~over, terminated
        if over.all():
            break
    columns = {name: np.stack(values, axis=1) for name, values in (rows | further).items()}
    return [
        {name: column[i, :end] for name, column in columns.items()} | {"timeouts": np.zeros(end, dtype=bool)}
        for i, end in enumerate(length.tolist())
    ]
