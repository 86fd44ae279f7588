"""OGBench's npz: observations (N, Do), actions (N, Da), terminals (N,), often qpos, qvel. Park et al.,
arXiv:2410.20092.

`terminals` marks the last step of each trajectory, which ends by time; so there is no "terminal" column. Members are
read in pieces, never through pickle.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from offline.formats._common import Format, Options, Source, assemble, ends_from_flags, same_length
from offline.store import TrajectoryStore
from pilotwave.errors import UserError

RENAME = {"observations": "observation", "actions": "action", "rewards": "reward"}


def matches(path: Path) -> bool:
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"observations.npy", "actions.npy"} <= set(archive.namelist())


def read(path: Path, options: Options) -> TrajectoryStore:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.namelist() if m.endswith(".npy")]
            sources = {m.removesuffix(".npy"): _member(path, archive, m) for m in members}
            keys = [k for k in ("observations", "actions", "terminals", "timeouts", "rewards") if k in sources]
            rows = same_length(path, sources, keys)
            if rows == 0:
                raise UserError(f"{path}: the data set is empty; expected at least one step")
            last = np.zeros(rows, bool)
            for flag in ("terminals", "timeouts"):
                if flag in sources:
                    last |= np.concatenate([p.reshape(-1) for p in sources.pop(flag).pieces()]).astype(bool)
            kept = {k: s for k, s in sources.items() if s.shape[:1] == (rows,) and s.dtype.kind in "fiub"}
            skipped = sorted(set(sources) - set(kept))
            vector = kept["observations"].low_dimensional
            return assemble(
                path,
                kept,
                options,
                ends_from_flags(last),
                rename=RENAME,
                observation=["observations"] if vector else [],
                camera=lambda key: "image" if key == "observations" else key,
                metadata={"ends_marked": bool(last[-1]), **({"not_read": skipped} if skipped else {})},
                format="ogbench",
            )
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path}: truncated or damaged npz ({error}); copy or download it again") from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return reader(file)


def _member(path: Path, archive: zipfile.ZipFile, member: str) -> Source:
    with archive.open(member) as file:
        shape, fortran, dtype = _header(file)
    if dtype.hasobject:
        raise UserError(f"{path}: '{member}' holds pickled objects, which can run code; refused: store plain arrays")
    if fortran and len(shape) > 1:
        return Source.of(np.load(path, allow_pickle=False)[member.removesuffix(".npy")])

    def pieces() -> Iterator[np.ndarray]:
        row = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        step = max(1, 64 * 2**20 // max(1, row))
        with archive.open(member) as file:
            _header(file)
            for start in range(0, shape[0], step):
                count = min(step, shape[0] - start)
                data = file.read(count * row)
                if len(data) != count * row:
                    raise EOFError(f"'{member}' ends early")
                yield np.frombuffer(data, dtype).reshape(count, *shape[1:])

    return Source(shape, dtype, pieces)


FORMAT = Format("ogbench", "OGBench npz (observations, actions, terminals)", matches, read)
