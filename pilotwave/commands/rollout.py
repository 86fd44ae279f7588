"""`pilotwave rollout`: a planner or policy, closed loop on its task."""

from __future__ import annotations

from collections.abc import Sequence

from pilotwave.console import metrics_table, progress, writable, write_json
from pilotwave.runs import asked, compose_for, controller, given, guard, load, run_folder, task_of


def run(overrides: Sequence[str]) -> None:
    """Roll out, print the metrics and write them."""
    folder = run_folder(given(overrides, "run"))
    cfg = compose_for("rollout", overrides, folder)
    for path in (cfg.json, cfg.video):
        if path is not None:
            writable(path)
    task = task_of(cfg, folder)

    from robots.rollout import rollout

    learned = load(folder, ("planner", "policy", "behaviour"), ema=cfg.ema, device=cfg.device)
    metrics = rollout(
        task,
        controller(learned, task.spec, cfg),
        cfg.episodes,
        cfg.seed,
        num_envs=cfg.num_envs,
        horizon=cfg.horizon,
        video=cfg.video,
        timing_decisions=cfg.timing_decisions,
        guard=guard(cfg, task),
        barriers=asked(cfg, task),
        progress=progress("rolling out"),
    )
    metrics_table(metrics, f"{folder} on {task.spec.name}")
    write_json(cfg.json, metrics)
