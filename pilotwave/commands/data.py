"""`pilotwave data`: what a data set holds and what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence

from pilotwave.config import compose, plain
from pilotwave.console import metrics_table, table, writable, write_json
from pilotwave.errors import UserError


def run(overrides: Sequence[str]) -> None:
    """Print the inspection of one data set."""
    cfg = compose("data", overrides)
    if cfg.path is None:
        raise UserError("no data set given; name its file or folder first: pilotwave data PATH")
    if cfg.json is not None:
        writable(cfg.json)
    import offline

    report = offline.inspect(cfg.path, format=cfg.format, observation_keys=plain(cfg.observation_keys))
    metrics_table({key: value for key, value in report.items() if key not in ("columns", "problems")}, str(cfg.path))
    columns = report["columns"]
    if columns:
        heads = list(next(iter(columns.values())))
        table(["column", *heads], [[name, *(facts[head] for head in heads)] for name, facts in columns.items()])
    for problem in report["problems"]:
        print(f"problem: {problem}")
    if not report["problems"]:
        print("no problems found")
    write_json(cfg.json, report)
