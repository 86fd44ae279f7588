"""Diffusion Policy's replay buffer: Zarr with data/<key> (N, ...) and meta/episode_ends (E,). Chi et al.,
arXiv:2303.04137. Versions 2 (Blosc) and 3 of the format.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offline.formats._common import Format, Options, Source, assemble, same_length
from offline.store import TrajectoryStore
from pilotwave.errors import UserError


@dataclass(frozen=True)
class Recipe:
    """How a well-known data set is to be read: recognized by the widths of its keys."""

    widths: dict[str, int]
    observation: Sequence[str]
    names: dict[str, Sequence[str]]
    dt: float


RECIPES = {
    "pusht": Recipe(  # pusht_cchi_v7_replay: state is (agent xy, block xy, block angle), recorded at 10 Hz
        widths={"state": 5, "keypoint": 18, "action": 2},
        observation=("state[0:2]", "keypoint"),
        names={
            "observation": ("agent_x", "agent_y", *(f"keypoint_{i}_{axis}" for i in range(9) for axis in "xy")),
            "action": ("target_x", "target_y"),
            "state": ("agent_x", "agent_y", "block_x", "block_y", "block_angle"),
        },
        dt=0.1,
    )
}
_EXTRA = ("reward", "terminal", "timestamp", "n_contacts", "goal")  # numbers a step that are no observation
_CAMERAS = {"img": "image"}


def matches(path: Path) -> bool:
    markers = (".zgroup", "zarr.json", "meta/episode_ends/.zarray", "meta/episode_ends/zarr.json")
    return path.is_dir() and any((path / marker).is_file() for marker in markers)


def read(path: Path, options: Options) -> TrajectoryStore:
    import zarr
    from zarr.errors import BaseZarrError

    _refuse_code(path)
    try:
        root = zarr.open_group(str(path), mode="r")
        keys = sorted(root["data"].array_keys()) if "data" in root else []  # type: ignore[union-attr]
        if not keys or "meta/episode_ends" not in root:
            raise UserError(f"{path}: expected data/<key> arrays and meta/episode_ends; found {sorted(root.keys())}")
        ends = np.asarray(root["meta/episode_ends"][:])  # type: ignore[index]
        sources = {key: Source.of(root[f"data/{key}"]) for key in keys}
        same_length(path, sources, keys)
        return _build(path, sources, options, ends, dict(root.attrs))
    except (BaseZarrError, OSError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: damaged Zarr data ({reason}); copy or download it again") from error


def _build(
    path: Path, sources: dict[str, Source], options: Options, ends: np.ndarray, attributes: dict[str, Any]
) -> TrajectoryStore:
    recipe_name, recipe = next(
        ((n, r) for n, r in RECIPES.items() if {k: sources[k].width for k in r.widths if k in sources} == r.widths),
        ("", None),
    )
    vectors = [k for k, s in sources.items() if s.low_dimensional and s.dtype.kind == "f"]
    dt = attributes.get("dt") or (1.0 / attributes["fps"] if attributes.get("fps") else None)
    return assemble(
        path,
        sources,
        options,
        ends,
        rename={},
        observation=recipe.observation if recipe else [k for k in vectors if k not in ("action", *_EXTRA)],
        names=recipe.names if recipe and not options.observation_keys else {},
        camera=lambda key: _CAMERAS.get(key, key),
        dt=float(dt) if dt else (recipe.dt if recipe else None),
        metadata={"recipe": recipe_name} if recipe else {},
        format="zarr",
    )


def _refuse_code(path: Path) -> None:
    """Raises UserError where reading would unpickle: any array whose metadata names the pickle codec."""
    for name in (".zarray", ".zmetadata", "zarr.json"):
        for file in sorted(path.rglob(name)):
            try:
                text = json.dumps(json.loads(file.read_text()))
            except ValueError as error:
                raise UserError(f"{file}: damaged Zarr metadata ({error}); copy or download it again") from error
            if '"pickle"' in text or '"numcodecs.pickle"' in text:
                raise UserError(f"{file.parent}: pickled objects, which can run code; refused: store plain arrays")


FORMAT = Format("zarr", "Diffusion Policy Zarr replay buffer (data/<key>, meta/episode_ends)", matches, read)
