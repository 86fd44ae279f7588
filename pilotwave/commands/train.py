"""`pilotwave train`: a planner, policy or world model from recorded data."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pilotwave.config import compose
from pilotwave.console import metrics_table, writable, writable_folder, write_json
from pilotwave.errors import UserError, nearest
from pilotwave.runs import PACKAGES, task_options


def run(overrides: Sequence[str]) -> None:
    """Train, then print the final metrics and where the run lies."""
    cfg = compose("train", overrides, fallback=registered_default)
    kind = chosen_kind(cfg)
    if cfg.data is None:
        raise UserError("no data given; add data=PATH ('pilotwave data PATH' shows what a data set holds)")
    settings = plain(cfg[kind])
    name = str(settings.get("name"))
    task, options = task_options(cfg) if cfg.task.name else (None, {})
    out = writable_folder(cfg.out or f"runs/{task or 'own'}-{name}")
    if cfg.json is not None:
        writable(cfg.json)

    import offline

    importlib.import_module(PACKAGES[kind])
    known = offline.algorithms(kind)
    if name not in known:
        raise nearest(kind.replace("_", " "), name, known)
    store = offline.read(cfg.data, format=cfg.format, observation_keys=cfg.observation_keys)
    spec = offline.DataSpec.of(store, task_spec(task, options))
    if cfg.held_out >= store.episodes:
        raise UserError(f"held_out is {cfg.held_out} of {store.episodes} episodes; keep some to train on")
    training, held_out = store.split(cfg.held_out, cfg.seed) if cfg.held_out else (store, None)
    algorithm = known[name](spec, settings)
    algorithm.prepare(training)
    metrics = offline.train(
        algorithm,
        training,
        out,
        offline.TrainConfig(seed=cfg.seed, **plain(cfg.train)),
        held_out=held_out,
        resume=cfg.resume,
        full_config={"task": plain(cfg.task), "data": str(cfg.data)},
        card={"command": shlex.join(["pilotwave", "train", *overrides]), "data": str(cfg.data)},
    )
    metrics_table(metrics, str(out))
    write_json(cfg.json, metrics)


def chosen_kind(cfg: DictConfig) -> str:
    """The one kind of algorithm that was asked for."""
    kinds = [kind for kind in PACKAGES if cfg[kind] is not None]
    if len(kinds) != 1:
        said = " and ".join(f"{kind}=" for kind in kinds) if kinds else "none"
        raise UserError(f"train takes exactly one of planner=NAME, policy=NAME, world_model=NAME; given: {said}")
    return kinds[0]


def registered_default(group: str, name: str) -> Mapping[str, Any] | None:
    """The `default_config` of a registered class (a plug-in's) that no file in `configs` describes."""
    from offline import algorithms

    default = getattr(algorithms(group).get(name), "default_config", None) if group in PACKAGES else None
    content = default() if callable(default) else default
    return None if content is None else {"name": name, **content}


def task_spec(task: str | None, options: Mapping[str, Any]) -> Any:
    """The facts about a task, or None for data without one."""
    if task is None:
        return None
    import robots

    made = robots.make(task, **options)
    made.close()
    return made.spec


def plain(config: DictConfig) -> dict[str, Any]:
    """Plain Python mappings and lists."""
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
