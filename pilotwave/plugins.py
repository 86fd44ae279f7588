"""A user's own modules, imported because the command line names them: never because a file does."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from pilotwave.errors import UserError

LOADED: list[str] = []
"""The plug-ins of this process, for those that it starts."""


def load_plugins(names: Iterable[str]) -> None:
    """Import modules (dotted names, found from the current folder too, or .py files), which register what they hold."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        _load(name)
        LOADED.append(name)


def _load(name: str) -> None:
    path = Path(name).expanduser()
    if path.suffix == ".py":
        if not path.is_file():
            raise UserError(f"no plug-in file '{path}'; plugins= takes modules that can be imported, or .py files")
        sys.path.insert(0, str(path.parent.resolve()))
        name = path.stem
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise UserError(f"the plug-in '{name}' imports '{error.name}', which is not installed") from error
        raise UserError(f"no module '{name}'; plugins= takes modules importable from here, or .py files") from error
