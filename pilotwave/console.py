"""What the commands print and write: tables for people, JSON for programs, and the files that hold them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pilotwave.errors import UserError


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print a table; piped into a file or program, lines are never cut."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    grid = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*(show(value) for value in row))
    console.print(grid)


def show(value: object) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "  ".join(f"{key} {show(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(show, value))
    return str(value)


def metrics_table(metrics: Mapping[str, Any], title: str) -> None:
    """Metrics a line; lists (of each episode) stay in the JSON."""

    def is_short(value: object) -> bool:
        parts = value.values() if isinstance(value, Mapping) else [value]
        return not any(isinstance(part, list) for part in parts)

    table(("metric", "value"), [(key, value) for key, value in metrics.items() if is_short(value)], title)


def progress(label: str) -> Callable[[int, int], None]:
    """A function to be called with (done, total), which draws a bar on standard error where that is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        return lambda done, total: None
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(label)

    def report(done: int, total: int) -> None:
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    return report


def write_json(path: str | Path | None, content: Mapping[str, Any]) -> None:
    """Write `content`, whole or not at all; nothing when `path` is None."""
    if path is None:
        return
    target = writable(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, default=_plain)
        file.write("\n")
    os.chmod(temporary, 0o644)
    os.replace(temporary, target)


def _plain(value: Any) -> Any:
    return value.tolist()  # NumPy scalars and arrays


def writable(path: str | Path) -> Path:
    """The path of a file that can be written, its folder made; asked before long work, so that it is not lost."""
    target = Path(path).expanduser()
    if target.is_dir():
        raise UserError(f"{target} is a folder; give the path of a file")
    writable_folder(target.parent)
    return target


def writable_folder(path: str | Path, keep: bool = True) -> Path:
    """The folder, made where it is missing (unless `keep` is false); UserError when nothing can be written in it."""
    folder = Path(path).expanduser()
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for each in () if keep else missing:
            each.rmdir()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write into the folder {folder}: {reason}; choose another place") from error
    return folder
