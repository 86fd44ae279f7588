"""What every reader shares: options, columns read in pieces, and how recorded keys become the store's columns."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offline.store import Space, TrajectoryStore, blocks
from pilotwave.errors import UserError, nearest

if TYPE_CHECKING:
    import h5py


@dataclass(frozen=True)
class Options:
    """What the user asked of a reader.

    observation_keys: keys to join into "observation", in this order; "key[2]" and "key[0:2]" take some features.
    images: False (leave cameras out), True (all of them), or their names.
    """

    observation_keys: Sequence[str] | None = None
    images: bool | Sequence[str] = False
    space: Space = field(default_factory=Space)


@dataclass(frozen=True)
class Format:
    """One data format. `matches` looks at the content of a path that exists; `read` and `write` do the work."""

    name: str
    summary: str
    matches: Callable[[Path], bool]
    read: Callable[[Path, Options], TrajectoryStore]
    write: Callable[..., None] | None = None


@dataclass(frozen=True)
class Source:
    """A recorded column before it is loaded: shape (N, ...), dtype, and its rows in consecutive pieces."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]
    names: Sequence[str] | None = None

    @classmethod
    def of(cls, array: Any, names: Sequence[str] | None = None) -> Source:
        """From anything with shape, dtype and slicing: NumPy, HDF5, Zarr."""

        def pieces() -> Iterator[np.ndarray]:
            step = max(1, 64 * 2**20 // max(1, int(np.prod(array.shape[1:])) * array.dtype.itemsize))
            chunk = getattr(array, "chunks", None)
            step = max(step // chunk[0], 1) * chunk[0] if chunk else step  # whole chunks: each is unpacked once
            for start in range(0, array.shape[0], step):
                yield np.asarray(array[start : start + step])

        return cls(tuple(array.shape), np.dtype(array.dtype), pieces, names)

    @classmethod
    def joined(cls, arrays: Sequence[Any], names: Sequence[str] | None = None) -> Source:
        """From one array an episode, all with the same trailing shape."""
        shape = (sum(a.shape[0] for a in arrays), *arrays[0].shape[1:])
        return cls(shape, np.dtype(arrays[0].dtype), lambda: (np.asarray(a[:]) for a in arrays), names)

    @property
    def width(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64))

    @property
    def low_dimensional(self) -> bool:
        """A vector or a few of them a step, of numbers."""
        return self.dtype.kind in "fiub" and len(self.shape) <= 3

    @property
    def image(self) -> bool:
        """(N, H, W, C) of numbers with 1, 3 or 4 channels, last or (as (N, C, H, W)) first."""
        return self.dtype.kind in "fu" and len(self.shape) == 4 and (self.shape[-1] in (1, 3, 4) or self.shape[1] == 3)

    def load(self, space: Space, dtype: Any = None) -> np.ndarray:
        out = space.empty(self.shape, dtype or self.dtype)
        row = 0
        for piece in self.pieces():
            out[row : row + len(piece)] = piece
            row += len(piece)
        return out

    def load_image(self, space: Space) -> np.ndarray:
        """As uint8 (N, H, W, C). Floating images are taken as 0..1 if no value passes 1, else as 0..255."""
        first = self.shape[-1] not in (1, 3, 4)  # channels first
        shape = (self.shape[0], *self.shape[2:], self.shape[1]) if first else self.shape
        out = space.empty(shape, np.uint8)
        floating = self.dtype.kind == "f"
        unit = floating and not any(p.size and p.max() > 1.0 for p in self.pieces())
        row = 0
        for piece in self.pieces():
            piece = np.moveaxis(piece, 1, -1) if first else piece
            if floating:
                piece = np.clip(np.rint(piece * 255.0 if unit else piece), 0, 255)
            out[row : row + len(piece)] = piece
            row += len(piece)
        return out


_SELECTOR = re.compile(r"^(?P<key>.+?)(?:\[(?P<start>-?\d*)(?P<colon>:?)(?P<stop>-?\d*)\])?$")


def join(sources: Mapping[str, Source], selectors: Sequence[str], space: Space) -> tuple[np.ndarray, list[str], list[list[Any]]]:
    """The column "observation" (N, Do) float32, its feature names, and (selector, width) of its parts, from selectors
    like "state", "state[2]", "state[0:2]"."""
    parts: list[tuple[Source, slice, str]] = []
    names: list[str] = []
    for selector in selectors:
        match = _SELECTOR.match(selector)
        assert match is not None
        key = match["key"]
        if key not in sources:
            raise nearest("observation key", key, sources)
        source, taken = sources[key], slice(None)
        if match["start"] is not None and not match["colon"]:
            i = int(match["start"] or 0)
            taken = slice(i, i + 1 or None)
        elif match["start"] is not None:
            taken = slice(*(int(match[g]) if match[g] else None for g in ("start", "stop")))
        if not source.low_dimensional:
            raise UserError(f"observation key '{key}' has shape {source.shape[1:]} a step; only numbers can be joined")
        labels = list(source.names or ([key] if source.width == 1 else [f"{key}.{i}" for i in range(source.width)]))
        if not labels[taken]:
            raise UserError(f"observation key '{selector}' takes no feature; '{key}' has {source.width}")
        parts.append((source, taken, selector))
        names += labels[taken]
    if not parts:
        raise UserError("no observation keys given; name at least one")
    rows = parts[0][0].shape[0]
    for source, _, selector in parts:
        if source.shape[0] != rows:
            raise UserError(f"observation key '{selector}' has {source.shape[0]} rows, '{parts[0][2]}' has {rows}")
    out = space.empty((rows, len(names)), np.float32)
    column, widths = 0, []
    for source, taken, selector in parts:
        row, width = 0, len(range(source.width)[taken])
        widths.append([selector, width])
        for piece in source.pieces():
            out[row : row + len(piece), column : column + width] = piece.reshape(len(piece), -1)[:, taken]
            row += len(piece)
        column += width
    return out, names, widths


def assemble(
    path: Path,
    sources: Mapping[str, Source],
    options: Options,
    ends: np.ndarray,
    *,
    rename: Mapping[str, str],
    observation: Sequence[str],
    names: Mapping[str, Sequence[str]] | None = None,
    camera: Callable[[str], str] = lambda key: key,
    dt: float | None = None,
    metadata: dict[str, Any] | None = None,
    format: str = "",
) -> TrajectoryStore:
    """The store of `sources`: the `observation` selectors joined, keys in `rename` under the store's names, cameras as
    asked, the rest as extra columns. Vectors become float32, flags bool, other columns keep their type."""
    space = options.space
    columns: dict[str, np.ndarray] = {}
    labels: dict[str, list[str]] = {}
    information: dict[str, Any] = {"format": format, **(metadata or {})}
    chosen = list(options.observation_keys or observation)
    if chosen:
        columns["observation"], labels["observation"], parts = join(sources, chosen, space)
        information["observation_parts"] = parts
        if len(chosen) == 1 and chosen[0] in sources and not sources[chosen[0]].names:
            del labels["observation"]  # "observations.0", ... would say nothing
        if names and "observation" in names and len(names["observation"]) == columns["observation"].shape[1]:
            labels["observation"] = list(names["observation"])
    cameras = {camera(key): key for key, source in sources.items() if source.image}
    wanted: Iterable[str] = cameras if options.images is True else (options.images or ())
    for name in wanted:
        if name not in cameras:
            raise nearest("camera", name, cameras) if cameras else UserError(f"{path}: holds no images; '{name}' asked")
        columns[name] = sources[cameras[name]].load_image(space)
    joined = {s for s in chosen if s in sources and s not in rename}  # not kept a second time
    for key, source in sources.items():
        name = rename.get(key, key)
        if source.image or not source.low_dimensional or key in joined or name in columns:
            continue
        dtype = _DTYPES.get(name)
        values = source.load(space, dtype)
        if name in ("reward", "cost", "margin", "terminal"):
            values = values.reshape(len(values), -1)[:, 0] if values.ndim > 1 else values
        elif name == "action":
            values = values.reshape(len(values), -1)
        columns[name] = values
        known = (names or {}).get(name) or source.names
        if known:
            labels[name] = list(known)
    if cameras:
        information["cameras"] = list(cameras)
    return TrajectoryStore(columns, ends, labels, dt, str(path), information)


_DTYPES = {
    "action": np.float32,
    "reward": np.float32,
    "cost": np.float32,
    "margin": np.float32,
    "goal": np.float32,
    "terminal": np.bool_,
}


def ends_from_flags(last: np.ndarray) -> np.ndarray:
    """(E,) exclusive ends from (N,) flags of last steps; rows after the last flag form one more episode."""
    ends = np.flatnonzero(np.asarray(last).reshape(-1)) + 1
    return ends if len(ends) and ends[-1] == len(last) else np.append(ends, len(last))


def same_length(path: Path, sources: Mapping[str, Source], keys: Iterable[str]) -> int:
    """The common number of rows of `keys`; UserError if they differ."""
    rows = {key: sources[key].shape[0] for key in keys if key in sources}
    if len(set(rows.values())) > 1:
        listed = ", ".join(f"'{k}' {n}" for k, n in rows.items())
        raise UserError(f"{path}: unequal column lengths: {listed}; every column needs one row a step")
    return next(iter(rows.values()))


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file for reading; damage is a UserError, on opening and on every read."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            yield file
    except OSError as error:
        reason = str(error).split("(")[-1].rstrip(")") or str(error)
        raise UserError(f"{path}: truncated or damaged HDF5 ({reason}); copy or download it again") from error


def hdf5_leaves(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path below `group`, dataset) for every dataset, in sorted order."""
    for name in sorted(group):
        item = group.get(name)
        if hasattr(item, "shape"):
            yield prefix + name, item
        elif item is not None and hasattr(item, "keys"):
            yield from hdf5_leaves(item, f"{prefix}{name}/")


def json_attribute(attributes: Mapping[str, Any], key: str) -> Any:
    """A JSON text kept in an HDF5 attribute; None when absent or not JSON."""
    try:
        return json.loads(attributes[key])
    except (KeyError, TypeError, ValueError):
        return None


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; the data set is incomplete") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable JSON ({error})") from error


__all__ = [
    "Format",
    "Options",
    "Source",
    "assemble",
    "blocks",
    "ends_from_flags",
    "hdf5_leaves",
    "join",
    "json_attribute",
    "open_hdf5",
    "read_json",
    "same_length",
]
