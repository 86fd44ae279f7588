"""`pilotwave data`: what a data set holds and what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence

from pilotwave.config import compose
from pilotwave.console import writable, write_json
from pilotwave.errors import UserError


def run(overrides: Sequence[str]) -> None:
    """Print the inspection of one data set; what cannot be trained on ends in an error."""
    cfg = compose("data", overrides)
    if cfg.path is None:
        raise UserError("no data set given; name its file or folder first: pilotwave data PATH")
    if cfg.json is not None:
        writable(cfg.json)
    from rich.console import Console

    import offline

    keys = None if cfg.observation_keys is None else list(cfg.observation_keys)
    report = offline.inspect(cfg.path, format=cfg.format, observation_keys=keys)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(report)
    write_json(cfg.json, report.to_dict())
    if report.problems:
        raise UserError(f"{cfg.path}: {report.problems[0]}")
