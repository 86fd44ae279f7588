"""`pilotwave collect`: a task's scripted controller, recorded as D4RL HDF5."""

from __future__ import annotations

from collections.abc import Sequence

from pilotwave.config import compose
from pilotwave.console import writable
from pilotwave.errors import UserError
from pilotwave.runs import task_options


def run(overrides: Sequence[str]) -> None:
    """Collect and say where the data lies."""
    cfg = compose("collect", overrides)
    if cfg.task is None:
        raise UserError("no task given; add task=NAME ('pilotwave tasks' lists them)")
    name, options = task_options(cfg)
    out = writable(cfg.out or f"data/{name}.hdf5")

    from robots.collect import collect

    collect(name, cfg.steps, out, cfg.seed, **options)
    print(f"wrote {out}; train on it: pilotwave train planner=NAME task={name} data={out}")
