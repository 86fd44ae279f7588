"""`pilotwave rollout`: a planner or policy, closed loop on its task."""

from __future__ import annotations

from collections.abc import Sequence

from pilotwave.config import compose
from pilotwave.console import metrics_table, writable, write_json
from pilotwave.runs import controller, given, load, run_folder, task_of, with_task


def run(overrides: Sequence[str]) -> None:
    """Roll out, print the metrics and write them."""
    folder = run_folder(given(overrides, "run"))
    cfg = compose("rollout", with_task(overrides, folder))
    for path in (cfg.json, cfg.video):
        if path is not None:
            writable(path)
    task = task_of(cfg, folder)

    import robots

    learned = load(folder, ("planner", "policy"), ema=cfg.ema, device=cfg.device)
    metrics = robots.rollout(
        task,
        controller(learned, task.spec, cfg),
        cfg.episodes,
        cfg.seed,
        num_envs=cfg.num_envs,
        video=cfg.video,
        horizon=cfg.horizon,
    )
    metrics_table(metrics, f"{folder} on {task.spec.name}")
    write_json(cfg.json, metrics)
