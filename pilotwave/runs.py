"""Runs by path: run directories and checkpoint folders, their tasks and controllers."""

from __future__ import annotations

import importlib
import inspect
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig

from pilotwave import __version__
from pilotwave.config import compose, plain, read_yaml, store
from pilotwave.errors import UserError, nearest

# Where the algorithms of a kind lie: importing the package registers them, and its `load` opens a run.
PACKAGES = {"planner": "planners", "policy": "policies", "world_model": "world_models"}
# And of what is not learned from data.
LOADERS = {**PACKAGES, "behaviour": "robots.behaviour"}


def run_folder(path: str | None) -> Path:
    """A run directory or checkpoint folder that exists, with its config.yaml."""
    if path is None:
        raise UserError("no run given; name a run directory or checkpoint folder first: pilotwave rollout RUN ...")
    folder = Path(path).expanduser()
    if folder.is_file():
        raise UserError(f"{path} is a file; give the run directory or checkpoint folder that training wrote")
    if not folder.is_dir():
        beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
        runs = [str(entry) for entry in beside if (entry / "config.yaml").is_file()]
        raise nearest("run", path, runs) if runs else UserError(f"no run '{path}'; give a folder that training wrote")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run: it has no config.yaml; give a folder that training wrote")
    return folder


def compose_for(command: str, overrides: Sequence[str], run: Path) -> DictConfig:
    """The command's configuration with the run's own task, as it was in training, unless `task=` says another."""
    config = read_yaml(run / "config.yaml")
    options = config.get("task_options")
    if isinstance(options, Mapping) and not any(word.startswith("task=") for word in overrides):
        store("task", "own", {"name": config.get("task"), **options})
        overrides = ["task=own", *overrides]
    return compose(command, overrides)


def given(overrides: Sequence[str], key: str) -> str | None:
    """The value that `overrides` give a plain key, before anything is composed."""
    found = [word.partition("=")[2] for word in overrides if word.startswith(f"{key}=")]
    return found[-1] if found else None


# Keys of a task's file that are not for `robots.make`: whose checkpoints it takes, what of its data it observes.
ABOUT_TASK = ("name", "checkpoints_of", "observation_keys")


def task_options(cfg: DictConfig) -> tuple[str, dict[str, Any]]:
    """The name and the options that `robots.make` takes, from the composed `task`."""
    settings = plain(cfg.task)
    if not settings.get("name"):
        raise UserError("the task's settings have no name; write 'name: pointmaze-large' (or another task) into them")
    options = {key: value for key, value in settings.items() if key not in ABOUT_TASK and value is not None}
    return str(settings["name"]), options


def task_of(cfg: DictConfig, run: Path) -> Any:
    """The simulator of the composed task, which must be one that the run was trained for."""
    import robots

    if cfg.task is None:
        raise UserError(f"{run} was trained without a task; add task=NAME ('pilotwave tasks' lists them)")
    name, options = task_options(cfg)
    accepted = cfg.task.get("checkpoints_of")
    spec = read_yaml(run / "config.yaml").get("spec") or {}
    task = robots.make(name, **options)
    known = (spec.get("task"), spec.get("observation_dim"), spec.get("action_dim"))
    robots_in_it = 2 if task.spec.apart else 1  # plans are of one
    wanted = (accepted or task.spec.name, task.spec.observation_dim // robots_in_it, task.spec.action_dim // robots_in_it)
    if known not in (wanted, (task.spec.name, *wanted[1:])):
        raise UserError(
            f"{run} was trained for {known[0]} ({known[1]} observations, {known[2]} actions), not for "
            f"{wanted[0]} ({wanted[1]} observations, {wanted[2]} actions); give a run of that task"
        )
    return task


def load(run: Path, kinds: Sequence[str], **options: Any) -> Any:
    """The learned side of a run, which must be of one of `kinds`."""
    kind = read_yaml(run / "config.yaml").get("kind")
    if kind not in LOADERS:
        raise nearest("kind of run", str(kind), LOADERS)
    if kind not in kinds:
        wanted = " or ".join(name.replace("_", " ") for name in kinds)
        raise UserError(f"{run} is a {str(kind).replace('_', ' ')}; this command takes a {wanted}")
    return importlib.import_module(LOADERS[kind]).load(run, **options)


def sampler(learned: Any, cfg: DictConfig) -> dict[str, Any]:
    """The run's own sampler ({name, steps, ...}), overlaid by what the user chose; another name brings its own."""
    chosen = {key: value for key, value in plain(cfg.sampler).items() if value is not None}
    return chosen if "name" in chosen else {**learned.config["sampler"], **chosen}


def controller(learned: Any, spec: Any, cfg: DictConfig) -> Any:
    """The controller of a planner or policy, with the settings of `controller:` and `sampler:`."""
    options = plain(cfg.controller)
    known = set(inspect.signature(learned.controller).parameters) - {"task_spec", "sampler"}
    for name in options:
        if name not in known:
            raise nearest("key", f"controller.{name}", [f"controller.{entry}" for entry in known])
    _check_kinds(learned.controller, options)
    if cfg.get("barriers") and options.get("safety") is not None:
        options["barriers"] = [*plain(cfg.barriers), *options.get("barriers", [])]
    return learned.controller(spec, sampler=sampler(learned, cfg), **options)


KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a word"),
    Sequence: ((list,), "a list"),
    Mapping: ((dict,), "settings such as {name: value}"),
}
"""An annotation -> the types of values from the command line that it takes, and what these are called."""


def _check_kinds(call: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """UserError for an option of another kind than its annotation in `call`, where that is one of KINDS."""
    try:
        hints = get_type_hints(call)
    except NameError:  # a plugin's, of names that only type checkers see
        return
    for name, value in options.items():
        hint = hints.get(name)
        parts = (hint,) if get_origin(hint) in KINDS else get_args(hint) or (hint,)
        kinds = [KINDS.get(get_origin(part) or part) for part in parts if part is not type(None)]
        known = [kind for kind in kinds if kind is not None]
        if value is not None and known and len(known) == len(kinds) and not any(type(value) in types for types, _ in known):
            raise UserError(f"controller.{name} is '{value}'; it must be {' or '.join(words for _, words in known)}")


def provenance() -> dict[str, str]:
    """The version, and the commit where the code runs from a checkout, for cards."""
    here = Path(__file__).resolve().parent
    words = ("git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40")
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {"version": __version__}
    return {"version": __version__, **({"commit": done.stdout.strip()} if done.returncode == 0 else {})}


def asked(cfg: DictConfig, task: Any) -> list[Any]:
    """All barriers of the command line, the filter's and those of safe plans too: the executed motion is judged by them."""
    from robots.barriers import build

    places = (cfg.barriers, cfg.filter.barriers, cfg.controller.get("barriers") or [])
    return [barrier for each in places for barrier in build(plain(each), task.spec.observation_dim)]


def guard(cfg: DictConfig, task: Any) -> Any:
    """The filter of actions that `filter:` asks for, or None."""
    settings = plain(cfg.filter)
    if not settings.pop("active"):
        return None
    from robots.barriers import build

    further = [*plain(cfg.barriers), *settings.pop("barriers")]
    barriers = [*task.barriers, *build(further, task.spec.observation_dim)]
    if not barriers and not task.spec.hazards:
        raise UserError(f"{task.spec.name} has no barriers to hold; add barriers=[...], or take a task that has some")
    return FILTERS[settings.pop("name")](cfg, task, barriers, settings)


def _cbf(cfg: DictConfig, task: Any, barriers: list[Any], settings: dict[str, Any]) -> Any:
    from robots.safety_filter import SafetyFilter

    model = task.linear_model()
    if model is None:
        raise UserError(f"no linear model of {task.spec.name} is known, which filter=cbf needs; try filter=peak, or leave it out")
    return SafetyFilter(model, barriers, **settings)


def _peak(cfg: DictConfig, task: Any, barriers: list[Any], settings: dict[str, Any]) -> Any:
    from robots.peak_filter import PeakFilter, for_task

    model = for_task(cfg.task.get("checkpoints_of") or task.spec.name, settings.pop("model"))
    return PeakFilter(model, barriers, **settings)


FILTERS: dict[str, Callable[[DictConfig, Any, list[Any], dict[str, Any]], Any]] = {"cbf": _cbf, "peak": _peak}
"""The `name` of a file in configs/filter/ -> the filter of a task's barriers and the file's other settings."""
