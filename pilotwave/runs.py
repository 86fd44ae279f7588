"""Runs by path: run directories and checkpoint folders, their tasks, and their agreement with a task."""

from __future__ import annotations

import importlib
import inspect
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


# Where the algorithms of a kind lie: importing the package registers them, and its `load` opens a run.
PACKAGES = {"planner": "planners", "policy": "policies", "world_model": "world_models"}


def load(run: Path, kinds: Sequence[str], **options: Any) -> Any:
    """The learned side of a run, which must be of one of `kinds`."""
    kind = read_yaml(run / "config.yaml").get("kind")
    if kind not in PACKAGES:
        raise nearest("kind of run", str(kind), PACKAGES)
    if kind not in kinds:
        wanted = " or ".join(name.replace("_", " ") for name in kinds)
        raise UserError(f"{run} is a {str(kind).replace('_', ' ')}; this command takes a {wanted}")
    return importlib.import_module(PACKAGES[kind]).load(run, **options)


def sampler_options(cfg: DictConfig) -> dict[str, Any]:
    """`sampler` and `steps`, where the user chose them."""
    chosen = {"sampler": cfg.sampler.name, "steps": cfg.sampler.steps}
    return {key: value for key, value in chosen.items() if value is not None}


def controller(learned: Any, spec: Any, cfg: DictConfig) -> Any:
    """The controller of a planner or policy, with the options of `controller:` and `sampler:`."""
    options = dict(OmegaConf.to_container(cfg.controller, resolve=True))  # type: ignore[call-overload]
    known = [name for name in inspect.signature(learned.controller).parameters if name != "task_spec"]
    for name in options:
        if name not in known:
            raise nearest("key", f"controller.{name}", [f"controller.{entry}" for entry in known])
    return learned.controller(spec, **sampler_options(cfg), **options)


def task_of(cfg: DictConfig, run: Path) -> Any:
    """The simulator of the composed task, which must be one that the run was trained for."""
    import robots

    if cfg.task is None:
        raise UserError(f"{run} was trained without a task; add task=NAME ('pilotwave tasks' lists them)")
    name, options = task_options(cfg)
    trained = read_yaml(run / "config.yaml").get("spec", {})
    accepted = options.pop("checkpoints_of", name)
    task = robots.make(name, **options)
    facts = (task.spec.observation_dim, task.spec.action_dim)
    if trained.get("task") != accepted or (trained.get("observation_dim"), trained.get("action_dim")) != facts:
        raise UserError(
            f"{run} was trained for {trained.get('task')} ({trained.get('observation_dim')} observations, "
            f"{trained.get('action_dim')} actions), not for {name} ({facts[0]}, {facts[1]}); give a run of that task"
        )
    return task
