"""`pilotwave dream`: a world model beside the simulator."""

from __future__ import annotations

from collections.abc import Sequence

from pilotwave.console import metrics_table, writable, write_json
from pilotwave.runs import compose_for, given, load, run_folder, sampler, task_of


def run(overrides: Sequence[str]) -> None:
    """Roll both out, print the metrics and write them."""
    folder = run_folder(given(overrides, "run"))
    cfg = compose_for("dream", overrides, folder)
    for path in (cfg.json, cfg.video, cfg.plot):
        if path is not None:
            writable(path)
    task = task_of(cfg, folder)
    model = load(folder, ("world_model",), device=cfg.device)

    import world_models

    metrics = world_models.dream(
        model,
        task,
        cfg.episodes,
        cfg.horizon,
        cfg.seed,
        plot=cfg.plot,
        video=cfg.video,
        sampler=sampler(model, cfg),
    )
    metrics_table(metrics, f"{folder} beside {task.spec.name}")
    write_json(cfg.json, metrics)
