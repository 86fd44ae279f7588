"""robomimic's HDF5: data/demo_N {actions, rewards, dones, states, obs/<key>, next_obs/<key>}, mask/<filter>.

Mandlekar et al., arXiv:2108.03298; layout of robomimic 0.3. data.attrs["env_args"] is JSON {env_name, type,
env_kwargs}. Filters go to metadata["filters"] as episode numbers: `store.select(store.metadata["filters"]["train"])`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from offline.formats._common import Format, Options, Source, assemble, hdf5_leaves, json_attribute, open_hdf5
from offline.store import TrajectoryStore
from pilotwave.errors import UserError

RENAME = {"actions": "action", "rewards": "reward", "dones": "terminal"}
_GYM_TYPE = 2  # robomimic.envs.env_base.EnvType.GYM_TYPE: the simulator of data that no robosuite made


def matches(path: Path) -> bool:
    import h5py

    if not path.is_file() or not h5py.is_hdf5(path):
        return False
    with open_hdf5(path) as file:
        return "data" in file and hasattr(file["data"], "keys") and any(k.startswith("demo") for k in file["data"])


def _number(name: str) -> tuple[int, str]:
    digits = re.search(r"(\d+)$", name)
    return (int(digits[1]) if digits else 2**31, name)


def read(path: Path, options: Options) -> TrajectoryStore:
    with open_hdf5(path) as file:
        data = file["data"]
        demos = sorted(data, key=_number)
        leaves = [_leaves(data[demo]) for demo in demos]
        lengths = [_length(path, demo, data[demo], found) for demo, found in zip(demos, leaves)]
        sources: dict[str, Source] = {}
        skipped = []
        for key in leaves[0]:
            for demo, found in zip(demos, leaves):
                if key not in found:
                    raise UserError(f"{path}: episodes of unequal keys: {demo} lacks '{key}', which {demos[0]} has")
            shapes = {found[key].shape[1:] for found in leaves}
            if len(shapes) > 1 and not key.startswith("obs/") and key != "actions":
                skipped.append(key)  # simulator states whose width follows the scene
                continue
            if len(shapes) > 1:
                listed = " and ".join(str(s) for s in sorted(shapes)[:2])
                raise UserError(f"{path}: '{key}' has shape {listed} a step in different episodes; one is expected")
            plain = key.removeprefix("obs/")
            name = key if plain in leaves[0] and plain != key else plain
            sources[name] = Source.joined([found[key] for found in leaves])
        for demo, found in zip(demos, leaves):
            if extra := sorted(set(found) - set(leaves[0])):
                raise UserError(f"{path}: episodes of unequal keys: {demo} has '{extra[0]}', which {demos[0]} lacks")
        env_args = json_attribute(data.attrs, "env_args") or {}
        frequency = (env_args.get("env_kwargs") or {}).get("control_freq")
        dt = data.attrs.get("dt") or (1.0 / frequency if frequency else None)
        metadata: dict[str, Any] = {"env_args": env_args, "per_episode": {"name": demos}}
        if filters := _filters(file, demos):
            metadata["filters"] = filters
        if skipped:
            metadata["not_read"] = skipped
        observed = {key.removeprefix("obs/") for key in leaves[0] if key.startswith("obs/")}
        observation = sorted(k for k in sources if k in observed and _vector(sources[k]))
        return assemble(
            path,
            sources,
            options,
            np.cumsum(lengths),
            rename=RENAME,
            observation=observation or [k for k in ("states",) if k in sources],
            names=json_attribute(data.attrs, "names"),
            dt=float(dt) if dt else None,
            metadata=metadata,
            format="robomimic",
        )


def _vector(source: Source) -> bool:
    return source.dtype.kind == "f" and len(source.shape) <= 2


def _leaves(demo: Any) -> dict[str, Any]:
    """Datasets of an episode by path; next_obs is obs one step later and is left out."""
    return {k: v for k, v in hdf5_leaves(demo) if not k.startswith("next_obs/") and v.ndim and v.dtype.kind in "fiub"}


def _length(path: Path, demo: str, group: Any, leaves: dict[str, Any]) -> int:
    if "actions" not in leaves:
        raise UserError(f"{path}: {demo} has no 'actions'; a robomimic episode needs them")
    length = len(leaves["actions"])
    for key, values in leaves.items():
        if len(values) != length:
            raise UserError(f"{path}: unequal column lengths in {demo}: '{key}' {len(values)}, 'actions' {length}")
    stated = group.attrs.get("num_samples", length)
    if stated != length:
        raise UserError(f"{path}: {demo} has {length} steps, its num_samples says {stated}")
    return length


def _filters(file: Any, demos: list[str]) -> dict[str, list[int]]:
    place = {demo: i for i, demo in enumerate(demos)}
    filters = {}
    for name, members in hdf5_leaves(file["mask"]) if "mask" in file else ():
        listed = [m.decode() if isinstance(m, bytes) else str(m) for m in members[:]]
        filters[name] = sorted(place[m] for m in listed if m in place)
    return filters


def write(store: TrajectoryStore, path: Path) -> None:
    """One HDF5 file that robomimic's SequenceDataset reads. The observation is split into the keys it was joined from
    (else one key, "state"); cameras are further keys; a last step's next_obs repeats its obs."""
    import h5py

    parts = observation_parts(store)
    cameras = [name for name, column in store.columns.items() if column.ndim == 4 and column.dtype == np.uint8]
    named = {"observation", "next_observation", "action", "reward", "terminal", *cameras}
    back = {new: old for old, new in RENAME.items()}
    known = store.metadata.get("env_args") or {}
    env_args = known or {"env_name": str(store.metadata.get("env", "unknown")), "type": _GYM_TYPE, "env_kwargs": {}}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for i in range(store.episodes):
            episode = store.episode(i)
            length = int(store.lengths[i])
            demo = data.create_group(f"demo_{i}")
            demo.attrs["num_samples"] = length
            demo["actions"] = episode["action"]
            demo["rewards"] = episode.get("reward", np.zeros(length, np.float32))
            done = episode.get("terminal", np.zeros(length, bool)).astype(np.int64)
            demo["dones"] = done
            for name, column in episode.items():
                if name not in named:
                    demo[back.get(name, name)] = column
            later = np.minimum(np.arange(length) + 1, length - 1)
            following = episode.get("next_observation")
            for key, columns in parts.items():
                demo[f"obs/{key}"] = episode["observation"][:, columns]
                chosen = episode["observation"][later] if following is None else following
                demo[f"next_obs/{key}"] = chosen[:, columns]
            for key in cameras:
                demo.create_dataset(f"obs/{key}", data=episode[key], compression="gzip")
                demo.create_dataset(f"next_obs/{key}", data=episode[key][later], compression="gzip")
        data.attrs["total"] = store.steps
        data.attrs["env_args"] = json.dumps(env_args)
        data.attrs["names"] = json.dumps(store.names)
        if store.dt is not None:
            data.attrs["dt"] = store.dt
        for name, members in store.metadata.get("filters", {}).items():
            file[f"mask/{name}"] = np.array([f"demo_{i}" for i in members], dtype="S")


def observation_parts(store: TrajectoryStore) -> dict[str, slice]:
    """Key -> columns of "observation", as they were joined; {"state": all} when that is not known."""
    if "observation" not in store.columns:
        return {}
    width = store.columns["observation"].shape[1]
    parts, start = {}, 0
    recorded = store.metadata.get("observation_parts", [])
    for selector, size in recorded:
        key = re.sub(r"\W+", "_", selector).strip("_")
        key = "state" if len(recorded) == 1 and key.startswith("observation") else key
        parts[key] = slice(start, start + size)
        start += size
    return parts if start == width else {"state": slice(0, width)}


FORMAT = Format("robomimic", "robomimic HDF5 (data/demo_N with obs, actions)", matches, read, write)
