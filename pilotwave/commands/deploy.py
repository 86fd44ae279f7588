"""`pilotwave deploy`: a planner or policy drives a robot in real time."""

from __future__ import annotations

from collections.abc import Sequence

from pilotwave.console import metrics_table, writable, write_json
from pilotwave.errors import UserError
from pilotwave.runs import compose_for, given, run_folder


def run(overrides: Sequence[str]) -> None:
    """Drive, print the statistics and write them."""
    policy = given(overrides, "policy")
    if policy is None:
        raise UserError("no policy given; add policy=RUN, a run directory or checkpoint folder")
    cfg = compose_for("deploy", overrides, run_folder(policy))
    for path in (cfg.json, cfg.video):
        if path is not None:
            writable(path)

    import robots

    metrics = robots.deploy(cfg)
    metrics_table(metrics, f"{policy} on {cfg.robot.name}")
    write_json(cfg.json, metrics)
