"""A local Minari data set: metadata.json beside main_data.hdf5, or one folder an episode for arrow and parquet.

Minari 0.5's own storage classes read the episodes. An episode has one more observation than actions; the last one is
left out. Without both spaces in the metadata, Minari would build the environment, which can run code that the file
names; then the spaces are taken from the arrays instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from offline.formats._common import Format, Options, Source, assemble, open_hdf5, read_json
from offline.store import TrajectoryStore
from pilotwave.errors import UserError

RENAME = {"desired_goal": "goal"}


def _folder(path: Path) -> Path | None:
    """The folder with the data, given it or its parent."""
    for folder in (path / "data", path):
        if (folder / "metadata.json").is_file() and "total_episodes" in read_json(folder / "metadata.json"):
            return folder
    return None


def matches(path: Path) -> bool:
    return path.is_dir() and _folder(path) is not None


def read(path: Path, options: Options) -> TrajectoryStore:
    folder = _folder(path)
    if folder is None:
        raise UserError(f"{path}: no metadata.json with 'total_episodes'; a Minari data set has one")
    metadata = read_json(folder / "metadata.json")
    total = int(metadata["total_episodes"])
    if total == 0:
        raise UserError(f"{path}: the data set is empty; metadata.json counts no episode")
    episodes = [_flat(path, i, episode) for i, episode in enumerate(_episodes(path, folder, metadata))]
    if len(episodes) != total:
        raise UserError(f"{path}: {len(episodes)} episodes of data, metadata.json counts {total}")
    for i, episode in enumerate(episodes):
        if different := sorted(set(episode) ^ set(episodes[0])):
            raise UserError(f"{path}: episodes of unequal keys: '{different[0]}' is not in both episode 0 and {i}")
    lengths = [len(episode["reward"]) for episode in episodes]
    sources = {key: Source.joined([e[key] for e in episodes]) for key in episodes[0]}
    observed = [k for k in sources if k.startswith("observation/")]
    plain = {k: k.removeprefix("observation/") for k in observed}
    sources = {plain.get(k, k): s for k, s in sources.items()}
    goal_task = {"observation", "achieved_goal", "desired_goal"} <= set(plain.values())  # Gymnasium's GoalEnv
    plain = plain or {"observation": "observation"}
    vectors = sorted(n for n in plain.values() if sources[n].dtype.kind == "f" and sources[n].low_dimensional)
    information: dict[str, Any] = {
        key: metadata[key] for key in ("dataset_id", "algorithm_name", "author", "code_permalink") if key in metadata
    }
    if isinstance(metadata.get("env_spec"), str):
        information["env_spec"] = metadata["env_spec"]
    return assemble(
        path,
        sources,
        options,
        np.cumsum(lengths),
        rename=RENAME if goal_task else {},
        observation=["observation"] if goal_task else vectors,
        camera=lambda key: "image" if key == "observation" else key.rsplit("/", 1)[-1],
        metadata=information,
        format="minari",
    )


def _episodes(path: Path, folder: Path, metadata: dict[str, Any]) -> list[dict[str, Any]]:
    from minari.dataset._storages import get_minari_storage
    from minari.serialization import deserialize_space

    form = str(metadata.get("data_format", "hdf5"))
    try:
        spaces = [deserialize_space(metadata[key]) for key in ("observation_space", "action_space") if key in metadata]
        if len(spaces) < 2:
            if form != "hdf5":
                raise UserError(f"{path}: metadata.json names no observation_space and action_space; {form} needs both")
            with open_hdf5(folder / "main_data.hdf5") as file:
                spaces = [_space(file["episode_0"][key]) for key in ("observations", "actions")]
        storage = get_minari_storage(form)(folder, *spaces, jpeg_encoding=bool(metadata.get("jpeg_encoding", True)))
        if form == "hdf5":
            with open_hdf5(folder / "main_data.hdf5"):  # names damage before Minari meets it
                pass
        return list(storage.get_episodes(range(int(metadata["total_episodes"]))))
    except (OSError, KeyError, ValueError, AssertionError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: damaged or unknown Minari data ({reason}); download it again") from error


def _space(item: Any) -> Any:
    """The Gymnasium space of recorded arrays."""
    from gymnasium import spaces

    if hasattr(item, "keys"):
        if all(key.startswith("_index_") for key in item):
            return spaces.Tuple([_space(item[f"_index_{i}"]) for i in range(len(item))])
        return spaces.Dict({key: _space(item[key]) for key in item})
    return spaces.Box(-np.inf, np.inf, item.shape[1:], np.float64)


def _flat(path: Path, number: int, episode: dict[str, Any]) -> dict[str, np.ndarray]:
    """An episode as flat columns of equal length: observation/<key>, action, reward, terminal, infos/<key>."""
    steps = len(episode["rewards"])
    columns: dict[str, np.ndarray] = {}

    def add(name: str, value: Any, required: bool) -> None:
        if isinstance(value, Mapping | tuple):
            pairs = value.items() if isinstance(value, Mapping) else ((str(i), v) for i, v in enumerate(value))
            for key, item in pairs:
                add(f"{name}/{key}", item, required)
            return
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            return
        if required and len(array) not in (steps, steps + 1):
            raise UserError(f"{path}: unequal column lengths in episode {number}: '{name}' {len(array)}, 'rewards' {steps}")
        if array.ndim and len(array) in (steps, steps + 1):
            columns[name] = array[:steps]

    add("observation", episode["observations"], True)
    add("action", episode["actions"], True)
    add("reward", episode["rewards"], True)
    add("terminal", episode["terminations"], True)
    add("infos", episode.get("infos") or {}, False)
    if any(name.startswith("action/") for name in columns):  # a dictionary of actions becomes one vector
        parts = [columns.pop(name) for name in sorted(columns) if name.startswith("action/")]
        columns["action"] = np.concatenate([p.reshape(steps, -1) for p in parts], axis=1)
    return columns


FORMAT = Format("minari", "Minari data set folder (metadata.json, main_data.hdf5)", matches, read)
