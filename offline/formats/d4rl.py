"""D4RL's HDF5: flat arrays, episode ends from timeouts or terminals. Fu et al., arXiv:2004.07219.

observations (N, Do), actions (N, Da), rewards (N,), terminals (N,), timeouts (N,), infos/<key> (N, ...); DSRL's costs (N,)
(Liu et al., arXiv:2306.09303), here also infos/cost, and infos/margin; arrays with one row an episode (initial_states/qpos) go
to metadata["per_episode"]. Files written here add root attributes: dt (seconds), names (JSON: column -> feature names).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from offline.formats._common import (
    Format,
    Options,
    Source,
    assemble,
    ends_from_flags,
    hdf5_leaves,
    json_attribute,
    open_hdf5,
    same_length,
)
from offline.store import TrajectoryStore
from pilotwave.errors import UserError

RENAME = {
    "actions": "action",
    "rewards": "reward",
    "terminals": "terminal",
    "next_observations": "next_observation",
    "infos/goal": "goal",
    "costs": "cost",
    "infos/cost": "cost",
    "infos/margin": "margin",
}
_CORE = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations", "costs")


def matches(path: Path) -> bool:
    import h5py

    if not path.is_file() or not h5py.is_hdf5(path):
        return False
    with open_hdf5(path) as file:
        return "actions" in file and "observations" in file


def read(path: Path, options: Options) -> TrajectoryStore:
    with open_hdf5(path) as file:
        sources = {key: Source.of(item) for key, item in hdf5_leaves(file) if item.ndim}
        keys = [k for k in sources if k in _CORE or k.startswith("observations/")]
        rows = same_length(path, sources, keys)
        if rows == 0:
            raise UserError(f"{path}: the data set is empty; expected at least one step")
        last = np.zeros(rows, bool)
        for flag in ("terminals", "timeouts"):
            if flag in sources:
                last |= np.asarray(file[flag]).reshape(-1).astype(bool)
        ends = ends_from_flags(last)
        per_episode, skipped = {}, []
        for key in [k for k in sources if sources[k].shape[0] != rows or sources[k].dtype.kind not in "fiub"]:
            source = sources.pop(key)
            if source.shape[0] == len(ends) and source.dtype.kind in "fiub" and source.width <= 10_000:
                per_episode[key] = np.asarray(file[key]).tolist()
            else:
                skipped.append(key)
            if key.startswith("infos/"):
                raise UserError(f"{path}: unequal column lengths: '{key}' {source.shape[0]}, 'actions' {rows}")
        sources.pop("timeouts", None)
        observation = [k for k in sources if k == "observations" or k.startswith("observations/")]
        observation = [k for k in observation if not sources[k].image]
        metadata: dict[str, object] = {"ends_marked": bool(last[-1])}
        if per_episode:
            metadata["per_episode"] = per_episode
        if skipped:
            metadata["not_read"] = skipped
        attributes = dict(file.attrs)
        for key in ("env", "env_name", "task"):
            if isinstance(attributes.get(key), str):
                metadata["env"] = attributes[key]
        dt = attributes.get("dt")
        return assemble(
            path,
            sources,
            options,
            ends,
            rename=RENAME,
            observation=observation,
            names=json_attribute(attributes, "names"),
            dt=float(dt) if dt is not None else None,
            metadata=metadata,
            format="d4rl",
            camera=lambda key: key.rsplit("/", 1)[-1],
        )


def write(store: TrajectoryStore, path: Path) -> None:
    """One HDF5 file as D4RL's; cameras become observations/<name> beside observations/state."""
    import h5py

    timeouts = np.zeros(store.steps, bool)
    timeouts[store.episode_ends - 1] = True
    terminal = store.columns.get("terminal", np.zeros(store.steps, bool))
    back = {new: old for old, new in RENAME.items()}
    with h5py.File(path, "w") as file:
        for name, column in store.columns.items():
            if name in ("observation", "terminal"):
                continue
            file.create_dataset(back.get(name, name), data=column, compression="gzip" if column.ndim == 4 else None)
        file["observations"] = store.columns["observation"]
        file["terminals"] = terminal
        file["timeouts"] = timeouts & ~terminal
        if "reward" not in store.columns:
            file["rewards"] = np.zeros(store.steps, np.float32)
        for name, values in store.metadata.get("per_episode", {}).items():
            array = np.asarray(values)
            if array.dtype.kind in "fiub":
                file[name] = array
        if store.dt is not None:
            file.attrs["dt"] = store.dt
        if "env" in store.metadata:
            file.attrs["env"] = store.metadata["env"]
        file.attrs["names"] = json.dumps(store.names)


FORMAT = Format("d4rl", "D4RL HDF5 (observations, actions, rewards, terminals, timeouts)", matches, read, write)
