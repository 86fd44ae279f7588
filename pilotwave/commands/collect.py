"""`pilotwave collect`: a task's scripted controller, recorded as D4RL HDF5."""

from __future__ import annotations

from collections.abc import Sequence

from pilotwave.config import compose
from pilotwave.console import metrics_table, progress, writable
from pilotwave.errors import UserError
from pilotwave.runs import given, task_options


def run(overrides: Sequence[str]) -> None:
    """Collect and say where the data lies."""
    cfg = compose("collect", overrides)
    if cfg.task is None:
        raise UserError("no task given; add task=NAME ('pilotwave tasks' lists them)")
    name, options = task_options(cfg)
    out = writable(cfg.out or f"data/{name}.hdf5")

    from robots import make
    from robots.collect import collect

    facts = collect(make(name, **options), cfg.steps, out, cfg.seed, progress("collecting"), noise=cfg.noise)
    metrics_table(facts, str(out))
    print(f"train on it: pilotwave train planner=diffuser task={given(overrides, 'task')} data={out}")
