"""Plain .npy arrays: a file or a folder of them.

A file (E, T, F) is E episodes of T observations, (T, F) is one. A folder of such files joins their episodes (the
file's name is kept as the episode's task), unless it has actions.npy: then each file is a column, (E, T, ...), or
(N, ...) with episode_ends.npy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from offline.formats._common import Format, Options, Source, assemble, same_length
from offline.store import TrajectoryStore
from pilotwave.errors import UserError

RENAME = {
    "observations": "observation",
    "actions": "action",
    "rewards": "reward",
    "terminals": "terminal",
    "images": "image",
}
_MAGIC = b"\x93NUMPY"


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.npy")) if path.is_dir() else [path]
    return [file for file in files if file.is_file() and file.open("rb").read(6) == _MAGIC]


def matches(path: Path) -> bool:
    return bool(_files(path))


def read(path: Path, options: Options) -> TrajectoryStore:
    arrays = {file.stem: _load(file) for file in _files(path)}
    if path.is_dir() and "actions" in arrays:
        return _columns(path, arrays, options)
    episodes, tasks = [], []
    for name, array in arrays.items():
        if array.ndim not in (2, 3) or array.dtype.kind not in "fiu":
            raise UserError(
                f"{path}: '{name}' is {array.dtype} {array.shape}; expected numbers (episodes, steps, features) "
                "or (steps, features)"
            )
        episodes += list(array if array.ndim == 3 else array[None])
        tasks += [name] * (len(array) if array.ndim == 3 else 1)
    if not episodes:
        raise UserError(f"{path}: the data set is empty; expected at least one episode")
    if len({e.shape[1] for e in episodes}) > 1:
        listed = ", ".join(f"'{name}' {array.shape[-1]}" for name, array in arrays.items())
        raise UserError(f"{path}: files of different feature counts ({listed}); read them one by one")
    ends = np.cumsum([len(e) for e in episodes])
    sources = {"observation": Source.joined(episodes)}
    metadata = {"per_episode": {"tasks": [[task] for task in tasks]}}
    return assemble(path, sources, options, ends, rename={}, observation=["observation"], metadata=metadata, format="npy")


def _columns(path: Path, arrays: dict[str, np.ndarray], options: Options) -> TrajectoryStore:
    ends = arrays.pop("episode_ends", None)
    if ends is None:
        leading = arrays["actions"].shape[:2]
        for name, array in arrays.items():
            if array.shape[:2] != leading or arrays["actions"].ndim != 3:
                raise UserError(
                    f"{path}: '{name}' is {array.shape}, 'actions' {arrays['actions'].shape}; expected (episodes, "
                    "steps, ...) alike, or rows and episode_ends.npy"
                )
        ends = np.arange(1, leading[0] + 1) * leading[1]
        arrays = {name: array.reshape(-1, *array.shape[2:]) for name, array in arrays.items()}
    sources = {name: Source.of(array) for name, array in arrays.items()}
    same_length(path, sources, sources)
    joined = [k for k in ("observations", "observation") if k in sources and sources[k].low_dimensional]
    return assemble(
        path,
        sources,
        options,
        ends,
        rename=RENAME,
        observation=joined,
        camera=lambda key: RENAME.get(key, key),
        format="npy",
    )


def _load(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        if "pickle" in str(error).lower() or "object" in str(error).lower():
            raise UserError(f"{file}: holds pickled objects, which can run code; refused: store plain arrays") from error
        raise UserError(f"{file}: truncated or damaged .npy ({error}); copy or download it again") from error
    except (OSError, EOFError) as error:
        raise UserError(f"{file}: cannot be read ({error}); copy or download it again") from error


FORMAT = Format("npy", "plain .npy arrays (episodes, steps, features), a file or a folder", matches, read)
