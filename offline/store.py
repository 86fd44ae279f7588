"""One in-memory (or memory-mapped) store of trajectories: flat columns and the rows at which episodes end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pilotwave.errors import UserError

DEFAULT_BUDGET = 8 * 2**30  # bytes held in memory before columns move to disk
CORE_COLUMNS = ("observation", "action", "reward", "goal")  # NaN in these is an error, elsewhere a finding
_BLOCK = 64 * 2**20  # bytes looked at together when a whole column is scanned


class Space:
    """Room for columns: plain memory up to `budget` bytes, then memory-mapped files in `folder`.

    A mapped file is deleted from its folder as soon as it is open, so nothing is left behind whatever ends the
    process. The folder is $PILOTWAVE_CACHE, else $XDG_CACHE_HOME/pilotwave, else ~/.cache/pilotwave.
    """

    def __init__(self, budget: int = DEFAULT_BUDGET, folder: Path | None = None):
        self.budget, self.used = budget, 0
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.folder = folder or Path(os.environ.get("PILOTWAVE_CACHE") or Path(base) / "pilotwave")

    def empty(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """An uninitialized array of `shape`. Raises UserError when neither memory budget nor disk can hold it."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if self.used + size <= self.budget or size == 0:
            self.used += size
            return np.empty(shape, dtype)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                # Reserved now: a write to a sparse mapping on a full disk would kill the process instead.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                return np.memmap(file, dtype=dtype, mode="r+", shape=tuple(shape))
        except OSError as error:
            free = shutil.disk_usage(self.folder).free if self.folder.exists() else 0
            raise UserError(
                f"no room for {size / 2**30:.2f} GiB of data in {self.folder} ({free / 2**30:.2f} GiB free: "
                f"{error.strerror}); set PILOTWAVE_CACHE to a folder with room, or raise the memory budget"
            ) from error


def blocks(array: np.ndarray, size: int = _BLOCK) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of `array` (N, ...) in consecutive pieces of about `size` bytes."""
    rows = max(1, size // max(1, array[:1].nbytes)) if len(array) else 1
    for start in range(0, len(array), rows):
        yield start, array[start : start + rows]


@dataclass
class TrajectoryStore:
    """Recorded trajectories, end to end.

    columns: name -> (N, ...). "observation" (N, Do) and "action" (N, Da) float32; optional "reward" (N,) float32,
        "terminal" (N,) bool (the episode ended for good there, not by time), "cost" (N,) float32 (above 0: the step broke a
        constraint), "margin" (N,) float32 (how far it was from that, negative where it did), "goal" (N, Dg), "image" or camera
        names uint8 (N, H, W, C), and any further key. Step t holds the observation and the action taken on it.
    episode_ends: (E,) int64, exclusive ends in rows, increasing, the last one N.
    names: feature names of a column, where known.
    dt: seconds a step, where known.
    source: where the data came from.
    metadata: JSON-able. "per_episode" (name -> list of length E) and "filters" (name -> episode numbers) follow
        `select` and `split`.
    """

    columns: dict[str, np.ndarray]
    episode_ends: np.ndarray
    names: dict[str, list[str]] = field(default_factory=dict)
    dt: float | None = None
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.episode_ends = np.asarray(self.episode_ends, dtype=np.int64).reshape(-1)

    @property
    def episodes(self) -> int:
        return len(self.episode_ends)

    @property
    def steps(self) -> int:
        return int(self.episode_ends[-1]) if self.episodes else 0

    @property
    def starts(self) -> np.ndarray:
        """(E,) first row of each episode."""
        return np.concatenate([np.zeros(1, np.int64), self.episode_ends[:-1]])[: self.episodes]

    @property
    def lengths(self) -> np.ndarray:
        """(E,) steps of each episode."""
        return self.episode_ends - self.starts

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in self.columns.values())

    def episode(self, i: int) -> dict[str, np.ndarray]:
        """Views of episode `i`: column -> (T_i, ...)."""
        if not -self.episodes <= i < self.episodes:
            raise UserError(f"no episode {i}; {self._where} has {self.episodes}")
        rows = slice(int(self.starts[i]), int(self.episode_ends[i]))
        return {name: column[rows] for name, column in self.columns.items()}

    def select(self, episodes: Sequence[int] | np.ndarray) -> TrajectoryStore:
        """The store of these episodes, in this order. A run of neighbours shares memory with this store; memory-mapped
        columns stay memory-mapped."""
        chosen = np.asarray(episodes, dtype=np.int64).reshape(-1)
        if len(chosen) == 0 or chosen.min() < 0 or chosen.max() >= self.episodes:
            raise UserError(f"episodes must be 0 to {self.episodes - 1}, at least one; got {chosen.tolist()}")
        starts, ends = self.starts[chosen], self.episode_ends[chosen]
        if np.all(np.diff(chosen) == 1):
            columns = {name: column[starts[0] : ends[-1]] for name, column in self.columns.items()}
        else:
            columns = {name: _gather(column, starts, ends) for name, column in self.columns.items()}
        metadata = dict(self.metadata)
        if "per_episode" in metadata:
            metadata["per_episode"] = {k: [v[i] for i in chosen.tolist()] for k, v in metadata["per_episode"].items()}
        if "filters" in metadata:
            place = {old: new for new, old in enumerate(chosen.tolist())}
            metadata["filters"] = {k: [place[i] for i in v if i in place] for k, v in metadata["filters"].items()}
        return TrajectoryStore(columns, np.cumsum(ends - starts), dict(self.names), self.dt, self.source, metadata)

    def split(self, held_out: int, seed: int = 0) -> tuple[TrajectoryStore, TrajectoryStore]:
        """(training, held-out) stores, by whole episodes drawn with `seed`; both keep the recorded order."""
        if not 0 < held_out < self.episodes:
            raise UserError(f"cannot hold out {held_out} of {self.episodes} episodes; give 1 to {self.episodes - 1}")
        drawn = np.random.default_rng(seed).permutation(self.episodes)
        return self.select(np.sort(drawn[held_out:])), self.select(np.sort(drawn[:held_out]))

    def validate(self) -> None:
        """Raises UserError, naming column, episode and step, unless the store can be trained on."""
        where, ends = self._where, self.episode_ends
        if not self.columns:
            raise UserError(f"{where}: no columns; expected at least observations or actions")
        if len(ends) == 0 or (len(ends) == 1 and ends[0] == 0):
            raise UserError(f"{where}: the data set is empty; expected at least one episode of at least one step")
        lengths = np.diff(ends, prepend=0)
        if lengths.min() <= 0:
            i = int(np.argmax(lengths <= 0))
            if lengths[i] == 0:
                raise UserError(f"{where}: episode {i} is empty; every episode needs at least one step")
            before = ends[i - 1] if i else 0
            raise UserError(f"{where}: episode ends must increase; end {i} is {ends[i]}, after {before}")
        for name, column in self.columns.items():
            if len(column) != ends[-1]:
                raise UserError(
                    f"{where}: column '{name}' has {len(column)} rows, the episodes have {ends[-1]}; "
                    "every column needs one row a step"
                )
        if self.dt is not None and not (np.isfinite(self.dt) and self.dt > 0):
            raise UserError(f"{where}: dt is {self.dt}; expected positive seconds a step")
        self.check_finite([name for name in CORE_COLUMNS if name in self.columns])

    def check_finite(self, columns: Sequence[str]) -> None:
        """Raises UserError naming the first NaN or infinity in `columns`."""
        for name in columns:
            row = _first_not_finite(self.columns[name])
            if row is None:
                continue
            episode = int(np.searchsorted(self.episode_ends, row, side="right"))
            values = np.asarray(self.columns[name][row], np.float64).reshape(-1)
            feature = int(np.argmax(~np.isfinite(values)))
            known = self.names.get(name) or []
            label = f" ({known[feature]})" if feature < len(known) else ""
            kind = "NaN" if np.isnan(values[feature]) else "an infinite value"
            raise UserError(
                f"{self._where}: {kind} in '{name}', episode {episode}, step {row - int(self.starts[episode])}, "
                f"feature {feature}{label}; repair or leave out that episode"
            )

    @property
    def _where(self) -> str:
        return self.source or "data set"


def _first_not_finite(column: np.ndarray) -> int | None:
    """The first row of `column` that holds NaN or infinity, if any."""
    if column.dtype.kind not in "fc":
        return None
    for start, part in blocks(column):
        bad = ~np.isfinite(part).reshape(len(part), -1).all(axis=1)
        if bad.any():
            return start + int(np.argmax(bad))
    return None


def _gather(column: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Rows [start, end) of each pair, joined; a mapped column gives a mapped result."""
    budget = 0 if is_mapped(column) else 2**63
    out = Space(budget).empty((int((ends - starts).sum()), *column.shape[1:]), column.dtype)
    row = 0
    for start, end in zip(starts.tolist(), ends.tolist()):
        out[row : row + end - start] = column[start:end]
        row += end - start
    return out


def is_mapped(array: np.ndarray) -> bool:
    """Whether `array` lies in a memory-mapped file."""
    base: Any = array
    while base is not None:
        if isinstance(base, np.memmap):
            return True
        base = getattr(base, "base", None)
    return False
