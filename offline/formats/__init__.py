"""Readers and writers, one file a format; the format of a path is found by its content."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path

from offline.formats._common import Format, Options
from offline.formats._doors import refuse
from offline.store import DEFAULT_BUDGET, Space, TrajectoryStore
from pilotwave.errors import UserError, nearest

_MODULES = ("d4rl", "robomimic", "minari", "zarr", "lerobot", "ogbench", "npy")  # in the order in which they are tried


def formats_known() -> dict[str, Format]:
    """Every format by name: those of one module a format, each with FORMAT or FORMATS."""
    found: dict[str, Format] = {}
    for name in _MODULES:
        module = import_module(f"offline.formats.{name}")
        for format in getattr(module, "FORMATS", None) or (module.FORMAT,):
            found[format.name] = format
    return found


def detect(path: str | Path) -> Format:
    """The format of `path`, by content. UserError when missing, a pickle, damaged, or of no known format."""
    path = Path(path).expanduser()
    refuse(path)
    for format in formats_known().values():
        with _damage(path, format):
            if format.matches(path):
                return format
    held = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else "a file"
    listed = "; ".join(format.summary for format in formats_known().values())
    raise UserError(f"{path}: no known data format (found: {held or 'an empty folder'}); known: {listed}")


def read(
    path: str | Path,
    *,
    format: str | None = None,
    observation_keys: Sequence[str] | None = None,
    images: bool | Sequence[str] = False,
    memory_budget_bytes: int = DEFAULT_BUDGET,
    validate: bool = True,
) -> TrajectoryStore:
    """The trajectories at `path`.

    format: a name of `formats_known()`; None finds it by content.
    observation_keys: what to join into "observation"; "key[0:2]" takes some features. None: the format's own choice.
    images: load cameras as uint8 (N, H, W, C): True for all, or their names.
    memory_budget_bytes: columns beyond it are memory-mapped files in the cache folder.
    validate: refuse what cannot be trained on (NaN, empty episodes, unequal lengths).

    Raises UserError, one line, for anything wrong with the data.
    """
    path = Path(path).expanduser()
    if format is not None and format not in formats_known():
        raise nearest("data format", format, formats_known())
    refuse(path)
    chosen = formats_known()[format] if format else detect(path)
    with _damage(path, chosen):
        store = chosen.read(path, Options(observation_keys, images, Space(memory_budget_bytes)))
    if validate:
        store.validate()
    return store


@contextmanager
def _damage(path: Path, format: Format) -> Iterator[None]:
    """Damaged bytes make the libraries below raise nearly anything; to the user it is one thing."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        message = f"{path}: damaged or unusual {format.name} data ({reason}); copy or download it again"
        raise UserError(message) from error


def write(store: TrajectoryStore, path: str | Path, format: str) -> Path:
    """Writes `store` to `path` in `format`, complete or not at all; returns the path. A file is replaced, a folder that
    holds something is refused. Raises UserError when the store is bad or the place cannot be written."""
    path = Path(path).expanduser()
    writers = {name: known.write for name, known in formats_known().items() if known.write}
    if format not in writers:
        raise nearest("output format", format, writers)
    store.validate()
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path}: the folder is not empty; give a new path")
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        writers[format](store, partial)
        if path.is_dir():
            path.rmdir()
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error
    finally:
        _remove(partial)
    return path


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


__all__ = ["Format", "Options", "detect", "formats_known", "read", "write"]
