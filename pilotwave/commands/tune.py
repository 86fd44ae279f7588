"""`pilotwave tune`: the sampler's table that suits a run's weights best, saved beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from pilotwave.config import plain
from pilotwave.console import metrics_table, progress, writable, writable_folder, write_json
from pilotwave.errors import UserError
from pilotwave.runs import compose_for, controller, given, load, run_folder, task_of

if TYPE_CHECKING:
    from diffusion.tableau import Call


def run(overrides: Sequence[str]) -> None:
    """Search, print the errors and save the table."""
    folder = run_folder(given(overrides, "run"))
    cfg = compose_for("tune", overrides, folder)
    if cfg.json is not None:
        writable(cfg.json)
    writable_folder(folder)
    task = task_of(cfg, folder)
    learned = load(folder, ("planner", "policy"), ema=cfg.ema, device=cfg.device)
    if not hasattr(learned, "denoiser"):
        raise UserError(f"{learned.name} has no denoiser of its own to tune a table for")

    from diffusion.search import Problem, tune
    from offline.checkpoint import write_atomic
    from offline.tables import packed_table, table_file

    own = learned.table()
    search, check = (Problem(calls_of(learned, task, cfg, i), learned.denoiser.schedule) for i in range(2))
    settings = {key: int(cfg[key]) for key in ("evaluations", "seed", "generations", "stages", "iterations")}
    found = tune(search, **settings, progress=progress("tuning"))
    file = table_file(folder, cfg.evaluations)
    facts = {"found_by": f"pilotwave tune, {plain(OmegaConf.masked_copy(cfg, SETTINGS))}"}
    write_atomic(file, packed_table(found.table, learned.origin[1], **facts))
    metrics = {
        "evaluations": found.table.evaluations,
        "best_hand_made": found.hand_made,
        "errors": found.errors,
        "held_out": {
            "best_hand_made": check.error(found.best_hand_made),
            "tuned": check.error(found.table),
            f"own_{learned.config['sampler']['name']}_{own.evaluations}": check.error(own),
        },
        "samples": sum(len(call.x_T) for call in search.calls),
        "seed": cfg.seed,
        "table": str(file),
    }
    metrics_table(metrics, f"{folder}: distance to many small steps from the same noise, in normalized units")
    write_json(cfg.json, metrics)
    print(f"use it: pilotwave rollout {folder} sampler=tuned sampler.steps={cfg.evaluations}")


SETTINGS = ["evaluations", "episodes", "seed", "samples", "generations", "stages", "iterations", "controller"]


def calls_of(learned: Any, task: Any, cfg: DictConfig, part: int) -> list[Call]:
    """What `sample` was asked in `episodes` episodes, evenly spaced and `samples` samples at most; parts share no episode."""
    from diffusion.tableau import record
    from robots.rollout import rollout

    seed = cfg.seed + part * cfg.episodes
    settings = OmegaConf.create({"controller": {**plain(cfg.controller), "seed": seed}, "sampler": {}})
    with record() as calls:
        rollout(task, controller(learned, task.spec, settings), cfg.episodes, seed, num_envs=BATCH)
    every = max(1, round(sum(len(call.x_T) for call in calls) / cfg.samples))
    return calls[::every]


BATCH = 8  # episodes side by side: calls of few samples, so that a share of the calls spreads over situations
