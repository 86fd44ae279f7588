"""`pilotwave train`: a planner, policy or world model from recorded data."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from pilotwave.config import compose, plain
from pilotwave.console import metrics_table, table, writable, writable_folder, write_json
from pilotwave.errors import UserError
from pilotwave.runs import PACKAGES, provenance, task_options


def run(overrides: Sequence[str]) -> None:
    """Train, then print the final metrics and where the run lies."""
    cfg = compose("train", overrides, extra=registered_defaults)
    kind = chosen_kind(cfg)
    if cfg.data is None:
        raise UserError("no data given; add data=PATH ('pilotwave data PATH' shows what a data set holds)")
    settings = plain(cfg[kind])
    name = str(settings.get("name"))
    task, options = task_options(cfg) if cfg.task.name else (None, {})
    out = writable_folder(cfg.out or f"runs/{task or 'own'}-{name.replace('_', '-')}", keep=False)
    if cfg.json is not None:
        writable(cfg.json)

    import offline

    package = importlib.import_module(PACKAGES[kind])  # registers its algorithms
    training = offline.TrainConfig.from_dict({"seed": cfg.seed, **plain(cfg.train)})
    facts = task_spec(task, options)
    images = plain(cfg.images) or (list(facts.images) if facts else False)
    keys = plain(cfg.observation_keys) or plain(cfg.task.get("observation_keys"))
    store = offline.read(cfg.data, format=cfg.format, observation_keys=keys, images=images)
    spec = offline.DataSpec.of(store, facts, cfg.dt)
    if task is not None and settings.get("reward") and "reward" not in store.columns:
        add_rewards(store, task, options)
    if task is not None and settings.get("feasibility") and not {"margin", "cost"} & store.columns.keys():
        add_margins(store, task, options)
    algorithm = offline.build(kind, name, spec, settings, cfg.seed)
    drive = getattr(algorithm, "controller", None)
    if facts is not None and drive is not None:
        try:
            drive(facts)  # settings that could not drive its robot are refused now, not at the first roll-out
        except UserError as error:  # which calls them as a roll-out does
            raise UserError(str(error).replace("controller.", f"{kind}.control.")) from error
    about = {"task_options": facts.options} if facts else {}
    about |= {"data": str(cfg.data)}
    card = {**about, "command": shlex.join(["pilotwave", "train", *overrides]), **provenance()}
    metrics = offline.train(algorithm, store, out, training, resume=cfg.resume, full_config=about, card=card)
    metrics_table(metrics, str(out))
    if training.held_out and hasattr(package, "held_out_error") and hasattr(algorithm, "recorded"):  # it imitates what was recorded
        parts = store.split(training.held_out, training.seed)
        report = package.held_out_error(package.load(out, device="auto"), *parts, groups=plain(cfg.groups))
        offline.update_card(out, held_out=report)
        held_out_table(report)
        metrics["held_out"] = report
    write_json(cfg.json, metrics)


def held_out_table(report: Mapping[str, Any]) -> None:
    """Print what a package's `held_out_error` found: a group a row, mean absolute error / root mean square error."""
    methods = list(next(iter(report["groups"].values())))
    title = f"error on {report['episodes']} held-out episodes, chunks of {report['chunk']}: mean absolute / RMS"
    rows = []
    for group, errors in report["groups"].items():
        rows.append([group, *(f"{e['mae']:.4g} / {e['rmse']:.4g}" for e in (errors[method] for method in methods))])
    table(["actions", *(method.replace("_", " ") for method in methods)], rows, title)


def chosen_kind(cfg: DictConfig) -> str:
    """The one kind of algorithm that was asked for."""
    kinds = [kind for kind in PACKAGES if cfg[kind] is not None]
    if len(kinds) != 1:
        said = " and ".join(f"{kind}=" for kind in kinds) if kinds else "none"
        raise UserError(f"train takes exactly one of planner=NAME, policy=NAME, world_model=NAME; given: {said}")
    return kinds[0]


def registered_defaults(group: str) -> dict[str, Mapping[str, Any]]:
    """The `default_config` of registered classes (a plug-in's), by name."""
    if group not in PACKAGES or "offline.algorithm" not in sys.modules:
        return {}  # nothing can be registered yet, and importing it takes seconds
    from offline import algorithms

    found = {name: getattr(cls, "default_config", None) for name, cls in algorithms(group).items()}
    contents = {name: default() if callable(default) else default for name, default in found.items()}
    return {name: {"name": name, **content} for name, content in contents.items() if content is not None}


def task_spec(task: str | None, options: Mapping[str, Any]) -> Any:
    """The facts about a task, or None for data without one."""
    if task is None:
        return None
    import robots

    made = robots.make(task, **options)
    made.close()
    return made.spec


def add_rewards(store: Any, task: str, options: Mapping[str, Any]) -> None:
    """Give data that was recorded without rewards the task's own, where they follow from the state that is reached."""
    import numpy as np

    import robots

    made = robots.make(task, **options)
    earned = made.rewards(store.columns["observation"])
    made.close()
    if earned is not None:
        store.columns["reward"] = earned[following(store)].astype(np.float32)


def add_margins(store: Any, task: str, options: Mapping[str, Any]) -> None:
    """Give data that was recorded without constraints the task's own, where they follow from the state that is reached."""
    import numpy as np

    import robots

    made = robots.make(task, **options)
    margins = made.margins(store.columns["observation"])
    made.close()
    if margins is not None:
        store.columns["margin"] = margins[following(store)].astype(np.float32)


def following(store: Any) -> Any:
    """The row of the state after each step, (N,); that of an episode's last step was not recorded, and its own stands for it."""
    import numpy as np

    return np.minimum(np.arange(store.steps) + 1, np.repeat(store.episode_ends - 1, store.lengths))
