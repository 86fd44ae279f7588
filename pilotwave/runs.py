"""Runs by path: run directories and checkpoint folders, their tasks, and their agreement with a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pilotwave.config import groups, read_yaml, store
from pilotwave.errors import UserError, nearest


def run_folder(path: str | None) -> Path:
    """A run directory or checkpoint folder that exists, with its config.yaml."""
    if path is None:
        raise UserError("no run given; name a run directory or checkpoint folder first: pilotwave rollout RUN ...")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
        runs = [str(entry) for entry in beside if (entry / "config.yaml").is_file()]
        raise nearest("run", path, runs) if runs else UserError(f"no run '{path}'; give a folder that training wrote")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run: it has no config.yaml; give a folder that training wrote")
    return folder


def with_task(overrides: Sequence[str], run: Path) -> list[str]:
    """`overrides`, the run's own task first unless they name one; a task of the user's comes from the run itself."""
    task = read_yaml(run / "config.yaml").get("task")
    if not isinstance(task, Mapping) or any(word.startswith("task=") for word in overrides):
        return list(overrides)
    name = str(task.get("name"))
    if name not in groups()["task"]:
        store("task", name, task)
    return [f"task={name}", *overrides]


def given(overrides: Sequence[str], key: str) -> str | None:
    """The value that `overrides` give a plain key, before anything is composed."""
    found = [word.partition("=")[2] for word in overrides if word.startswith(f"{key}=")]
    return found[-1] if found else None


def task_options(cfg: DictConfig) -> tuple[str, dict[str, Any]]:
    """The name and the options that `robots.make` takes, from the composed `task`."""
    options = dict(OmegaConf.to_container(cfg.task, resolve=True))  # type: ignore[call-overload]
    name = options.pop("name", None)
    if not name:
        raise UserError("the task's settings have no name; write 'name: pointmaze-large' (or another task) into them")
    return str(name), options
