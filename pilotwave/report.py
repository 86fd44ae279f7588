"""The demo's report: one HTML page with a picture, the videos, the figures and the commands that made them."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pilotwave.console import show

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "td{padding:.1rem 1.5rem .1rem 0}pre{background:#f4f4f2;padding:.6rem;overflow-x:auto}video,img{max-width:100%}"
)
_SHOWN = {
    "rollout": ("success_rate", "first_reach_steps_mean", "return_mean", "episodes", "evaluations", "decision_ms"),
    "deploy": ("success_rate", "episodes", "period_ms", "missed_deadlines", "violations", "faults", "latency_ms"),
}


def write_report(
    out: Path,
    commands: Mapping[str, str],
    took: Mapping[str, float],
    rollout: Mapping[str, Any],
    drive: Mapping[str, Any],
) -> None:
    """Write report.html and training.png into `out`, which holds run/metrics.jsonl and the videos.

    commands and took (seconds) are by command; rollout and drive are the metrics that those commands wrote.
    """
    _draw(out, rollout)
    figures = {"rollout": rollout, "deploy": drive}
    media = {"train": '<img src="training.png">'}
    media |= {name: f'<video src="{file}.mp4" controls loop muted></video>' for name, file in _VIDEOS.items()}
    sections = []
    for name, line in commands.items():
        rows = "".join(
            f"<tr><td>{html.escape(key.replace('_', ' '))}<td>{html.escape(show(figures[name].get(key)))}"
            for key in _SHOWN.get(name, ())
        )
        sections.append(
            f"<h2>{name} <small>({took[name]:.0f} s)</small></h2><pre>{html.escape(line)}</pre>"
            f"{media.get(name, '')}<table>{rows}</table>"
        )
    head = f'<!doctype html><meta charset="utf-8"><title>Pilotwave demo</title><style>{_STYLE}</style>'
    title = f"<h1>Pilotwave: {rollout['success_rate']:.0%} of {rollout['episodes']} random goals reached</h1>"
    (out / "report.html").write_text(head + title + "".join(sections) + "\n", encoding="utf-8")


_VIDEOS = {"rollout": "rollout", "deploy": "drive"}


def _draw(out: Path, rollout: Mapping[str, Any]) -> None:
    """training.png: the loss over the steps, and how long the episodes took to their goals."""
    from matplotlib.figure import Figure

    lines = (out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    points = [json.loads(line) for line in lines]
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy([point["step"] for point in points], [point["loss"] for point in points])
    left.set(xlabel="training step", ylabel="loss")
    right.hist([steps for steps in rollout["per_episode"]["first_reach_steps"] if steps is not None], bins=20)
    right.set(xlabel="steps to the goal", ylabel="episodes")
    figure.savefig(out / "training.png", dpi=120)
