"""`pilotwave dream`: a world model beside the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from pilotwave.config import read_yaml
from pilotwave.console import metrics_table, writable, write_json
from pilotwave.errors import UserError
from pilotwave.runs import compose_for, given, load, run_folder, sampler, task_of

if TYPE_CHECKING:
    from offline import TrajectoryStore


def run(overrides: Sequence[str]) -> None:
    """Roll both out, print the metrics and write them."""
    folder = run_folder(given(overrides, "run"))
    cfg = compose_for("dream", overrides, folder)
    for path in (cfg.json, cfg.video, cfg.plot):
        if path is not None:
            writable(path)
    task = task_of(cfg, folder)
    model = load(folder, ("world_model",), device=cfg.device)
    if hasattr(model, "choose"):
        model.choose(sampler(model, cfg))
    elif cfg.sampler.name or cfg.sampler.steps:
        raise UserError(f"{folder} is a {model.name} model, which has no sampler; leave sampler= out")
    baseline = None
    if cfg.baseline is not None:
        baseline = load(run_folder(cfg.baseline), ("world_model",), device=cfg.device)

    import world_models

    actions, source = actions_of(cfg, task, folder)
    metrics = world_models.dream(
        model,
        task,
        cfg.episodes,
        cfg.horizon,
        cfg.seed,
        actions=actions,
        lead=cfg.lead,
        baseline=baseline,
        plot=cfg.plot,
        video=cfg.video,
    )
    metrics["actions"] = source
    metrics_table(summary(metrics), f"{folder} beside {task.spec.name}")
    if "baseline" in metrics:
        metrics_table(summary(metrics["baseline"]), f"baseline {cfg.baseline}")
    write_json(cfg.json, metrics)


def summary(metrics: dict[str, Any]) -> dict[str, Any]:
    """What a table shows: the scalars, and the errors at a few steps."""
    shown = {key: value for key, value in metrics.items() if not isinstance(value, list | dict)}
    for key in ("state_error", "reward_error"):
        values = metrics[key] or []
        steps = [step for step in (1, 2, 4, 8, 16, 32, 64, 100, 200, 500) if step < len(values)]
        shown |= {f"{key} at step {step}": values[step - 1] for step in (*steps, len(values)) if step}
    return shown


def actions_of(cfg: DictConfig, task: Any, folder: Path) -> tuple[Any, str]:
    """Where the actions come from: a controller or a store of episodes to play back, and its name for the metrics."""
    from robots.collect import demonstrator

    if cfg.actions != "demonstrations":
        other = run_folder(cfg.actions)
        learned = load(other, ("planner", "policy"), device=cfg.device)
        return learned.controller(task.spec), str(other)
    scripted = demonstrator(task, cfg.seed)
    if scripted is not None and cfg.data is None:
        return scripted, "demonstrator"
    trained = read_yaml(folder / "config.yaml")
    data = cfg.data or trained.get("data")
    if data is None or not Path(data).exists():
        raise UserError(
            f"no actions for {task.spec.name}: the training data ({data}) is not here; add data=PATH (recorded episodes) "
            "or actions=RUN (a policy or planner)"
        )
    return held_out(str(data), trained), f"recorded: {data}"


def held_out(data: str, trained: dict[str, Any]) -> TrajectoryStore:
    """The episodes of `data`; of the training data, wherever it lies now, only those that training held out."""
    import offline

    store = offline.read(data, images=False)
    settings = trained.get("train") or {}
    kept = int(settings.get("held_out") or 0)
    same = trained.get("data") is not None and Path(trained["data"]).name == Path(data).name
    return store.split(kept, int(settings.get("seed", 0)))[1] if same and kept else store
