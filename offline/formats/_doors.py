"""Refusals at the door: what is missing, and what would run code when loaded."""

from __future__ import annotations

import zipfile
from pathlib import Path

from pilotwave.errors import UserError

_PICKLED = {".pkl", ".pickle", ".pt", ".pth", ".p", ".joblib", ".ckpt"}


def refuse(path: Path) -> None:
    """Raises UserError when `path` is missing, empty, or a pickle in any of its usual coats."""
    if not path.exists():
        near = path.parent if path.parent.exists() else None
        beside = sorted(p.name for p in near.iterdir())[:6] if near and near.is_dir() else []
        hint = f"; beside it: {', '.join(beside)}" if beside else ""
        raise UserError(f"{path}: no such file or folder{hint}")
    if path.is_dir():
        files = [p for p in path.iterdir() if p.is_file()]
        if files and all(p.suffix.lower() in _PICKLED for p in files):
            raise _pickle(files[0])
        return
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise UserError(f"{path}: the file is empty")
    if is_pickle(path, head):
        raise _pickle(path)


def is_pickle(path: Path, head: bytes) -> bool:
    """By content: pickle protocols 2 to 5, torch's zip archives; by name only where the content says nothing."""
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    if head[:4] == b"PK\x03\x04":
        try:
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith(".pkl") for name in archive.namelist())
        except Exception:  # a damaged archive can raise nearly anything; its reader will name the damage
            return False
    known = (b"\x89HDF\r\n\x1a\n", b"\x93NUMPY", b"PAR1")
    return path.suffix.lower() in _PICKLED and not head.startswith(known)


def _pickle(path: Path) -> UserError:
    return UserError(f"{path}: a pickle, which can run code when loaded; refused: convert it to HDF5, Zarr, npz or LeRobot first")
