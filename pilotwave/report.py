"""The demo's report: one Markdown page with the figures, a picture, the videos and the commands that made them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pilotwave.console import show

# By command: what it leaves in the folder to look at, and which of its figures are shown.
_MEDIA = {
    "train": "![loss over the steps, and steps to the goal](training.png)",
    "rollout": "[rollout.mp4](rollout.mp4): four episodes, the plan drawn in orange",
    "deploy": "[drive.mp4](drive.mp4): the drive, a new goal each time one is reached",
}
_SHOWN = {
    "rollout": ("success_rate", "first_reach_steps_mean", "return_mean", "episodes", "evaluations", "decision_ms"),
    "deploy": ("success_rate", "episodes", "period_ms", "missed_deadlines", "violations", "faults", "latency_ms"),
}


def write_report(out: Path, commands: Mapping[str, str], took: Mapping[str, float], rollout: Mapping[str, Any]) -> None:
    """Write report.md and training.png into `out`, which holds the run, drive.json and the videos.

    commands and took (seconds) are by command; rollout holds the metrics of the roll-outs.
    """
    _draw(out, rollout)
    figures = {"rollout": rollout, "deploy": json.loads((out / "drive.json").read_text(encoding="utf-8"))}
    lines = [f"# Pilotwave: {rollout['success_rate']:.0%} of {rollout['episodes']} random goals reached", ""]
    for name, command in commands.items():
        lines += [f"## {name} ({took[name]:.0f} s)", "", "```sh", command, "```", ""]
        lines += [_MEDIA[name], ""] if name in _MEDIA else []
        if name in _SHOWN:
            rows = [f"| {key.replace('_', ' ')} | {show(figures[name].get(key))} |" for key in _SHOWN[name]]
            lines += ["| figure | value |", "| --- | --- |", *rows, ""]
    (out / "report.md").write_text("\n".join(lines), encoding="utf-8")


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
