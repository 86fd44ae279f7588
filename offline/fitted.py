"""What was fitted to a run's weights, beside them: safetensors with the numbers and, as metadata, the sha256 of the weights, the
sampler that it was fitted for where it is for one, and how.

dpm_v3 (statistics), calibration and time_shift are fitted once for a checkpoint; dc (ratios), epsilon_scaling and alignment for one
sampler and number of steps too. places, what the data itself has of places, and tracking, how far robots stray from the planner's
paths, lie there in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffusion import (
    ModelStatistics,
    NoiseSchedule,
    Reference,
    Tableau,
    corrections,
    fit_ratios,
    model_statistics,
)
from pilotwave.errors import UserError, nearest

if TYPE_CHECKING:
    from offline.algorithm import Algorithm
    from offline.store import TrajectoryStore

Numbers = dict[str, Tensor]


def _doubles(**numbers: Any) -> Numbers:
    return {key: torch.as_tensor(value, dtype=torch.float64).contiguous() for key, value in numbers.items()}


def _statistics(reference: Reference, schedule: NoiseSchedule, table: Tableau, generator: torch.Generator) -> Numbers:
    found = model_statistics(reference.denoise, schedule, reference.x_0, generator, constrain=reference.constrain)
    return _doubles(lmbda=found.lmbda, l=found.l, s=found.s, b=found.b)


def _ratios(reference: Reference, schedule: NoiseSchedule, table: Tableau, generator: torch.Generator) -> Numbers:
    steps = [row for row in table.rows if row.t_next < row.t]
    levels = torch.stack([steps[0].t, *(row.t_next for row in steps)])
    x_T = reference.noise(schedule, generator)
    return _doubles(ratios=fit_ratios(reference.denoise, schedule, x_T, levels, constrain=reference.constrain))


def _calibration(reference: Reference, schedule: NoiseSchedule, table: Tableau, generator: torch.Generator) -> Numbers:
    found = corrections.fit_calibration(reference.denoise, schedule, reference.x_0, generator, constrain=reference.constrain)
    return _doubles(levels=found.levels, bias=found.bias)


def _time_shift(reference: Reference, schedule: NoiseSchedule, table: Tableau, generator: torch.Generator) -> Numbers:
    return _doubles(variance=corrections.fit_time_shift(schedule, reference.x_0).variance)


def _epsilon_scaling(reference: Reference, schedule: NoiseSchedule, table: Tableau, generator: torch.Generator) -> Numbers:
    x_T = reference.noise(schedule, generator)
    denoise, x_0 = reference.caller(table), reference.x_0
    found = corrections.fit_epsilon_scaling(denoise, schedule, table, x_0, x_T, constrain=reference.constrain)
    return _doubles(slope=found.slope, offset=found.offset)


def _alignment(reference: Reference, schedule: NoiseSchedule, table: Tableau, generator: torch.Generator) -> Numbers:
    x_T = reference.noise(schedule, generator)
    denoise, x_0 = reference.caller(table), reference.x_0
    found = corrections.fit_alignment(denoise, schedule, table, x_T, x_0, constrain=reference.constrain)
    return _doubles(ratios=list(found.ratios))


FITS: dict[str, Callable[[Reference, NoiseSchedule, Tableau, torch.Generator], Numbers]] = {
    "dpm_v3": _statistics,
    "dc": _ratios,
    "calibration": _calibration,
    "time_shift": _time_shift,
    "epsilon_scaling": _epsilon_scaling,
    "alignment": _alignment,
}


def _places(learned: Algorithm, store: TrajectoryStore) -> Numbers:
    """Which cells of a grid, a 180th of the data's widest range wide, hold recorded places (the goal features)."""
    d = learned.spec.goal_dim
    if not 1 <= d <= 3:
        raise UserError(f"places are kept of tasks whose goals are 1 to 3 numbers; this one's are {d}")
    place = np.asarray(store.columns["observation"][:, :d], dtype=np.float64)
    origin, spacing = place.min(0), max(float(np.ptp(place, axis=0).max()), 1e-9) / 180
    index = np.rint((place - origin) / spacing).astype(np.int64)
    seen = torch.zeros(tuple((index.max(0) + 1).tolist()), dtype=torch.uint8)
    seen[tuple(torch.as_tensor(column) for column in index.T)] = 1
    return {"seen": seen, **_doubles(origin=origin, spacing=spacing)}


RECORDED: dict[str, Callable[[Algorithm, TrajectoryStore], Numbers]] = {"places": _places}
"""What is kept of the data itself: no sampler's numbers."""
MEASURED = ("tracking",)
"""What is measured in closed loop, by `pilotwave fit`: of a task, not of data."""
KNOWN = (*FITS, *RECORDED, *MEASURED)
FOR_ONE_SAMPLER = ("dc", "epsilon_scaling", "alignment")
# the solver's option that takes the numbers, and what of them
OPTIONS: dict[str, tuple[str, Callable[[Numbers], Any]]] = {
    "dpm_v3": ("statistics", lambda numbers: ModelStatistics(**numbers)),
    "dc": ("ratios", lambda numbers: numbers["ratios"].tolist()),
}
FITTED = "fitted"  # the option's value that asks for them


def fitted_file(folder: Path, what: str, sampler: Mapping[str, Any]) -> Path:
    """Where a fit lies."""
    suffix = f"_{sampler['name']}_{sampler['steps']}" if what in FOR_ONE_SAMPLER else ""
    return folder / f"{FITTED}_{what}{suffix}.safetensors"


def packed_fit(sha256: str, sampler: Mapping[str, Any], numbers: Mapping[str, Tensor], **facts: str) -> bytes:
    """The content of a fit's file; `facts` say how it was found."""
    return safetensors.torch.save(dict(numbers), {"sha256": sha256, "sampler": _about(sampler), **facts})


def load_fitted(origin: tuple[Path, str] | None, what: str, sampler: Mapping[str, Any]) -> Numbers:
    """The numbers of a fit; UserError where there are none, or those of other weights or another sampler, or a damaged file."""
    if what not in KNOWN:
        raise nearest("fit", what, KNOWN)
    if origin is None:
        raise UserError(f"'{what}' is fitted to saved weights; load a run or checkpoint, or give its numbers")
    folder, sha256 = origin
    file = fitted_file(folder, what, sampler)
    again = f"fit it with pilotwave fit {folder} what={what}{'' if what in MEASURED else ' data=PATH'}"
    if what in FOR_ONE_SAMPLER:
        again += f" sampler={sampler['name']} sampler.steps={sampler['steps']}"
    if not file.exists():
        raise UserError(f"{folder} has no {file.name}; {again}")
    try:
        with safe_open(file, framework="pt") as content:
            facts = content.metadata() or {}
            numbers = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is corrupt ({' '.join(str(error).split())}); {again}") from error
    if facts.get("sha256") != sha256:
        raise UserError(f"{file} was fitted to other weights than {folder} holds; {again}")
    if what in FOR_ONE_SAMPLER and facts.get("sampler") != _about(sampler):
        raise UserError(f"{file} was fitted for the sampler {facts.get('sampler')}; {again}")
    if not all(bool(torch.isfinite(part).all()) for part in numbers.values()):
        raise UserError(f"{file} holds numbers that are not finite; {again}")
    return numbers


def _about(sampler: Mapping[str, Any]) -> str:
    """A sampler but for what is fitted to it."""
    own = {key: value for key, value in sampler.items() if key != "correction" and value not in (None, FITTED)}
    return json.dumps(own, sort_keys=True, default=str)


def with_corrections(
    table: Tableau, schedule: NoiseSchedule, sampler: Mapping[str, Any], origin: tuple[Path, str] | None
) -> Tableau:
    """The table with the sampler's `correction`: the name of a fitted one, {name, its numbers}, or a list of these."""
    asked = sampler.get("correction")
    for each in asked if isinstance(asked, list | tuple) else [] if asked is None else [asked]:
        if isinstance(each, str):
            if each not in corrections.CORRECTIONS:
                raise nearest("correction", each, corrections.CORRECTIONS)
            numbers = {key: part.item() if part.ndim == 0 else part for key, part in load_fitted(origin, each, sampler).items()}
            name = each
        else:
            numbers = dict(each)
            name = str(numbers.pop("name", None))
        table = corrections.corrected(table, corrections.correction(name, schedule, **numbers))
    return table
