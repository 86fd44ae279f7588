"""Roofs over hopper and walker: what passes them on the executed motion, with nothing, with the filter, and with safe plans.

    python benchmarks/roofs.py                                   # the table of docs/planners/safe.md: 200 episodes a row
    python benchmarks/roofs.py --episodes 20 --seed 20000 --rows "expert" --out /tmp/expert.json
    python benchmarks/roofs.py --peaks hopper data/hopper-medium-expert.hdf5

Episode i resets with seed + i. Rows that `--out` holds and `--rows` does not name stay as they are.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """A robot, what drives it (the end of a checkpoint's name), its controller's settings, and its filter's, None without."""

    name: str
    robot: str
    run: str
    controller: dict[str, Any] = field(default_factory=dict)
    filter: dict[str, Any] | None = None


QUALITIES = [
    ("hopper", "medium", True),
    ("hopper", "expert", True),
    ("hopper", "expert", False),
    ("walker2d", "medium", False),
    ("walker2d", "expert", False),
]
ROWS = [
    Row(
        f"{robot}, {quality}, {'drawn' if explore else 'mean'}{', filter' if filtered else ''}",
        robot, "behaviour", {"quality": quality, "explore": explore}, {} if filtered else None,
    )
    for robot, quality, explore in QUALITIES
    for filtered in (False, True)
]  # fmt: skip
PLANNERS = [("hopper", "Diffuser"), ("hopper", "Veteran"), ("hopper", "Trajectory Diffuser")]
PLANNERS += [("walker2d", "Veteran"), ("walker2d", "Trajectory Diffuser")]
SAFE = {"hopper": {"margin": 0.0, "samples": 32}, "walker2d": {"margin": 0.01}}
FILTER: dict[str, dict[str, Any]] = {"hopper": {"rising": 1.6}, "walker2d": {}}  # over planners; 1.6 was chosen on the Diffuser
ROWS += [
    Row(
        f"{robot}, {name}{', safe plans' if safe else ''}{'' if filter is None else ', filter'}",
        robot, name.lower().replace(" ", "-"), safe, filter,
    )
    for robot, name in PLANNERS
    for safe, filter in (({}, None), ({"safety": "correct"} | SAFE[robot], None), ({}, FILTER[robot]))
]  # fmt: skip


def measure(row: Row, episodes: int, seed: int) -> dict[str, Any]:
    """The figures of a row."""
    import torch

    torch.set_num_threads(1)
    import planners
    import robots
    from robots import behaviour
    from robots.peak_filter import PeakFilter, for_task
    from robots.rollout import rollout

    began, task = time.perf_counter(), robots.make(f"{row.robot}-roof")
    load = behaviour.load if row.run == "behaviour" else planners.load
    learned = load(ROOT / "checkpoints" / f"{row.robot}-{row.run}")
    model = ROOT / "checkpoints" / f"{row.robot}-control-affine"
    options = row.controller | ({"model": str(model)} if "safety" in row.controller else {})
    guard = None if row.filter is None else PeakFilter(for_task(row.robot, model), task.barriers, **row.filter)
    metrics = rollout(task, learned.controller(task.spec, seed=seed, **options), episodes, seed, num_envs=episodes, guard=guard)
    return {
        "episodes": episodes,
        "seed": seed,
        "score": metrics["score_mean"],
        "score_error": metrics["score_std"] / episodes**0.5,
        "violating_rate": metrics["violations"]["episode_rate"],
        "worst_margin": metrics["violations"]["worst_margin"],
        "decision_p50_ms": metrics["decision_ms"]["p50"],
        "changed_rate": metrics["filter"]["changed_rate"] if guard else None,
        "infeasible_steps": metrics["filter"]["infeasible_steps"] if guard else None,
        "seconds": time.perf_counter() - began,
    }


def peak_error(robot: str, data: str) -> dict[str, float]:
    """Standard deviations in metres of the learned peak's error and of the ballistic height's, on recorded rises faster than 0.5
    m/s, every tenth step of them."""
    import numpy as np

    from offline.formats import read
    from offline.returns import peaks
    from robots.peak_filter import for_task

    model, store = for_task(robot, ROOT / "checkpoints" / f"{robot}-control-affine"), read(data)
    state, peak = store.columns["observation"], peaks(store, model.feature, model.velocity)
    known = np.flatnonzero(np.isfinite(peak) & (state[:, model.velocity] > 0.5))[::10]
    state, peak = state[known].astype(np.float64), peak[known]
    ballistic = state[:, model.feature] + state[:, model.velocity] ** 2 / (2 * 9.81)
    return {"learned": float((model.peak(state)[0] - peak).std()), "ballistic": float((ballistic - peak).std())}


def table(rows: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| | score | episodes that pass the roof | worst margin, m | filter acts |", "| --- " * 5 + "|"]
    for row in ROWS:
        if row.name in rows:
            r = rows[row.name]
            acts = "" if r["changed_rate"] is None else f"{100 * r['changed_rate']:.1f} %"
            passed = f"{100 * r['violating_rate']:.1f} % of {r['episodes']}"
            score = f"{r['score']:.1f} +- {r['score_error']:.1f}"
            lines.append(f"| {row.name} | {score} | {passed} | {r['worst_margin']:+.3f} | {acts} |")
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", default="", help="words, separated by +; rows whose name holds one of them")
    parser.add_argument("--out", default=str(ROOT / "docs" / "results" / "roofs.json"))
    parser.add_argument("--peaks", nargs=2, metavar=("ROBOT", "DATA"), help="measure the peaks alone, on recorded data")
    options = parser.parse_args()
    if options.peaks:
        print(json.dumps(peak_error(*options.peaks)))
        return
    out = Path(options.out)
    for row in ROWS:
        if any(word in row.name for word in options.rows.split("+")):
            figures = measure(row, options.episodes, options.seed)
            rows = json.loads(out.read_text()) if out.exists() else {}
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(rows | {row.name: figures}, indent=2) + "\n")
            print(f"{row.name}: {figures['seconds']:.0f} s", flush=True)
    print(table(json.loads(out.read_text())))


if __name__ == "__main__":
    main()
