"""How far a policy's actions lie from those recorded in episodes that it has not learnt from, beside two baselines.

On every held-out window: the observations (and past actions) that the policy is given, and the chunk of actions that it
would carry out before the next decision, against the recorded chunk. The prediction is the mean of several samples, for
one sample carries the variance of the distribution besides the error. The baselines see the same windows:

    hold the last action    the action recorded just before now, repeated
    linear regression       ridge from the same history to the same chunk, fitted to the training episodes, its penalty
                            chosen for every output by cross-validation over them (Hastie et al. 2009, section 3.4.1)

An episode's first step has no last action and is left out, as are chunks that run past its end. A small error is no
proof of a good policy: one that copies its last action does well here and badly on the robot (de Haan et al. 2019).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pilotwave.errors import UserError
from policies.ridge import Ridge

if TYPE_CHECKING:
    from offline.store import TrajectoryStore
    from offline.windows import Windows
    from policies.diffusion_policy import DiffusionPolicy

_SIDES = {"left": "left", "l": "left", "right": "right", "r": "right"}
_PARTS = {  # the first part one of whose words stands in a name
    "hand": ("hand", "gripper", "finger", "fingers", "thumb", "index", "middle", "ring", "pinky", "little", "jaw"),
    "arm": ("shoulder", "elbow", "wrist", "arm", "forearm"),
    "leg": ("hip", "knee", "ankle", "leg", "foot", "thigh", "calf"),
    "torso": ("waist", "torso", "spine"),
    "head": ("neck", "head"),
}
_FOLDS = 5
_FITTED = 200_000  # windows that the regression is fitted to, at most


# ------------------------------------------------------------------------------------------------------------- groups
def joint_groups(names: Sequence[str], count: int, patterns: Mapping[str, str] | None = None) -> dict[str, list[int]]:
    """Columns by group: {"left arm": [0, 1, ...], ...}, of `count` action features called `names` (or nothing).

    `patterns` maps a group to a regular expression that finds its names; what none finds becomes "other". Without them
    a group is the side and the part of the body that a name speaks of ("kLeftShoulderPitch": left arm), else the word
    that it starts with, where several start so.
    """
    if len(names) != count:
        if patterns:
            raise UserError("the data does not name its action features; groups= needs their names")
        return {"action": list(range(count))}
    groups: dict[str, list[int]] = {}
    if patterns:
        for group, pattern in patterns.items():
            try:
                groups[str(group)] = [i for i, name in enumerate(names) if re.search(str(pattern), name)]
            except re.error as error:
                raise UserError(f"groups.{group}={pattern} is no regular expression: {error}") from error
            if not groups[str(group)]:
                raise UserError(f"groups.{group}={pattern} finds no action; they are called {', '.join(names)}")
        rest = [i for i in range(count) if not any(i in columns for columns in groups.values())]
        return groups | ({"other": rest} if rest else {})
    words = [[w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)] for name in names]
    for i, name in enumerate(words):
        side = next((_SIDES[word] for word in name if word in _SIDES), "")
        part = next((part for part, known in _PARTS.items() if any(word in known for word in name)), "")
        shared = name[0] if name and sum(other[:1] == name[:1] for other in words) > 1 else "other"
        groups.setdefault(f"{side} {part or shared}".strip(), []).append(i)
    return groups


# -------------------------------------------------------------------------------------------------------------- report
def held_out_error(
    policy: DiffusionPolicy,
    training: TrajectoryStore,
    held_out: TrajectoryStore,
    *,
    samples: int = 16,
    windows: int = 2000,
    groups: Mapping[str, str] | None = None,
    sampler: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The policy's error on `held_out`, beside that of the baselines, the regression fitted to `training`.

    samples: of which the mean is the prediction, in pairs of opposite noise, so that few suffice. windows: at most so
    many, evenly spaced. groups: as in `joint_groups`.
    Returns {"episodes", "windows", "chunk", "samples", "groups": {group: {method: {"mae", "rmse"}}}}, the errors in
    the units of the data, over all features of the group and all steps of the chunk; the methods are "policy",
    "one_sample", "hold_last_action", "linear_regression". UserError when no window fits.
    """
    if samples < 2 or samples % 2:
        raise UserError(f"samples is {samples}; it must be even, since noise is drawn in opposite pairs")
    names = joint_groups(policy.spec.action_names, policy.spec.action_dim, groups)
    device = next(policy.parameters()).device
    ridge, folds = None, min(_FOLDS, training.episodes)
    after = policy.window - 1 - policy.now  # now may be any step; which have a whole chunk after them is seen below
    recorded = policy.recorded(training, device, (), after)
    for index in _complete(policy, recorded, _FITTED):
        window = _Window(policy, recorded, index)
        ridge = ridge or Ridge(folds)
        ridge.add(window.inputs.cpu(), (window.target - window.base).flatten(1).cpu(), window.episode.cpu() % folds)
    recorded = policy.recorded(held_out, device, policy.spec.images, after)
    batches = _complete(policy, recorded, windows)
    if ridge is None or not batches:
        raise UserError(f"no held-out window has a past action and {policy.Ta} to come: the episodes are too short")
    ridge.fit()
    table, generator = policy.table(sampler), torch.Generator(device).manual_seed(seed)
    sums: dict[str, Tensor] = {}
    for index in batches:
        window = _Window(policy, recorded, index)
        drawn = _samples(policy, window.history, table, samples, generator)
        regression = ridge.predict(window.inputs.cpu()).to(device).view_as(window.target)
        predictions = {
            "policy": drawn.mean(0),
            "one_sample": drawn[0],
            "hold_last_action": window.last,
            "linear_regression": window.base + regression,
        }
        for method, predicted in predictions.items():
            error = (predicted - window.target).double().cpu()
            parts = torch.stack([error.abs().sum((0, 1)), error.square().sum((0, 1))])
            sums[method] = sums.get(method, torch.zeros(())) + parts
    count = sum(map(len, batches))
    return {
        "episodes": held_out.episodes,
        "windows": count,
        "chunk": policy.Ta,
        "samples": samples,
        "groups": {group: _errors(sums, columns, count * policy.Ta) for group, columns in names.items()},
    }


def _errors(sums: Mapping[str, Tensor], columns: list[int], count: int) -> dict[str, dict[str, float]]:
    means = {method: parts[:, columns].mean(1) / count for method, parts in sums.items()}
    return {method: {"mae": float(mae), "rmse": float(mse.sqrt())} for method, (mae, mse) in means.items()}


def _complete(policy: DiffusionPolicy, recorded: Windows, most: int, size: int = 256) -> list[Tensor]:
    """Batches of the windows with an action before now and a whole chunk after it, at most `most`, evenly spaced."""
    first, episode = recorded.first + policy.now, recorded.episode
    whole = (first > recorded.starts[episode]) & (first + policy.Ta <= recorded.ends[episode])
    index = whole.nonzero().flatten()
    if len(index) > most:
        index = index[torch.linspace(0, len(index) - 1, most, device=index.device).round().long()]
    return list(index.split(size)) if len(index) else []


class _Window:
    """Of B windows: `history` as the policy is given it, the chunk `target` (B, Ta, Da), the action before it `last`
    (B, 1, Da), the regression's `inputs` (B, F), and `base` (B, 1, Da), on which what it predicts is added."""

    def __init__(self, policy: DiffusionPolicy, recorded: Windows, index: Tensor) -> None:
        batch, now = recorded.gather(index), policy.now
        action = batch.pop("action")
        batch.pop("valid")
        self.episode = recorded.episode[index]
        self.history = {key: value[:, now - policy.To + 1 : now + 1] for key, value in batch.items()}
        self.history["action"] = action[:, now - policy.past : now]
        self.target = action[:, now : now + policy.Ta]
        self.last = recorded.columns["action"][recorded.first[index] + now - 1, None]
        # only what the policy knows; differences span the same inputs, but a penalty leaves their scale alone
        self.base = self.last if policy.past else torch.zeros_like(self.last)
        known = [self.history["observation"]] + ([self.history["action"]] if policy.past else [])
        parts = [part for k in known for part in (k[:, -1], (k[:, :-1] - k[:, -1:]).flatten(1))]
        self.inputs = torch.cat(parts, dim=1)


def _samples(
    policy: DiffusionPolicy, history: Mapping[str, Tensor], table: Any, samples: int, generator: torch.Generator
) -> Tensor:
    """(samples, B, Ta, Da), the second half from the opposite noise of the first."""
    batch, half = len(history["observation"]), samples // 2
    shape = (half, batch, policy.T, policy.spec.action_dim)
    noise = torch.randn(shape, generator=generator, device=generator.device)
    return torch.stack([policy.sample_actions(history, table, generator, part) for part in torch.cat([noise, -noise])])
