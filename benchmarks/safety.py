"""Safety on the executed motion: SafeDiffuser's methods and the filter, apart and together, in the mazes with hazards.

    python benchmarks/safety.py                                  # the table of docs/planners/safe.md: 1000 episodes a row
    python benchmarks/safety.py --episodes 100 --seed 20000 --rows moving --workers 2 --out /tmp/moving.json
    python benchmarks/safety.py --filter                         # the time of one robot's filtered command alone

Episode i resets with seed + i. Each worker runs 50 episodes side by side and plans on a GPU where there is one; the time of
one decision is measured alone, on the CPU with one thread, before the rest starts.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RUN = str(ROOT / "checkpoints" / "pointmaze-{maze}-diffuser")
BATCH = 50


@dataclass(frozen=True)
class Row:
    """One row: a task (of a maze), the controller's settings, and the filter's margin (None: no filter)."""

    name: str
    task: str
    controller: dict[str, Any] = field(default_factory=dict)
    filter: float | None = None
    maze: str = "large"


FILTER = 0.02
ROWS = [
    Row("two hazards, Diffuser", "hazards"),
    Row("two hazards, Diffuser, filter", "hazards", {}, FILTER),
    *[
        Row(f"two hazards, {name}{', filter' if margin else ''}", "hazards", {"safety": method}, margin)
        for method, name in (("ros", "RoS"), ("res", "ReS"), ("tvs", "TVS"), ("correct", "correct"))
        for margin in (None, FILTER)
    ],
    Row("never seen, Diffuser", "random-hazards"),
    Row("never seen, correct", "random-hazards", {"safety": "correct"}),
    Row("never seen, correct, filter", "random-hazards", {"safety": "correct"}, FILTER),
    Row("narrow, Diffuser", "narrow"),
    Row("narrow, correct, filter", "narrow", {"safety": "correct"}, FILTER),
    Row("moving, Diffuser", "moving-hazards"),
    Row("moving, correct", "moving-hazards", {"safety": "correct", "replan_every": 5}),
    Row("moving, correct, filter", "moving-hazards", {"safety": "correct", "replan_every": 5}, FILTER),
    *[
        Row(f"two robots, {name}{', filter' if margin else ''}", "pair", controller, margin, "medium")
        for name, controller in (("each alone", {}), ("together", {"safety": "correct"}))
        for margin in (None, FILTER)
    ],
]


def shard(row: Row, first: int, episodes: int, run: str) -> tuple[str, dict[str, Any], float]:
    """Episodes first, first + 1, ... of a row."""
    import torch

    torch.set_num_threads(1)
    import planners
    import robots
    from planners.safe import SafeController
    from robots.rollout import rollout
    from robots.safety_filter import SafetyFilter

    began = time.perf_counter()
    planner = planners.load(run.format(maze=row.maze), device="auto")
    task = robots.make(f"pointmaze-{row.maze}-{row.task}")
    guard = None if row.filter is None else SafetyFilter(task.linear_model(), task.barriers, margin=row.filter)
    controller = planner.controller(task.spec, seed=first, **row.controller)
    metrics = rollout(task, controller, episodes, first, num_envs=BATCH, guard=guard)
    if isinstance(controller, SafeController):
        metrics["per_episode"]["traps"] = controller.trapped.tolist()  # one batch: all its episodes are still there
    return row.name, metrics, time.perf_counter() - began


def plan_times(run: str, plans: int = 20) -> dict[str, float]:
    """Median milliseconds of CPU time of one robot's first decision (8 candidates, and the way's search where there is one):
    Diffuser's, and that of each method of SafeDiffuser."""
    import torch

    torch.set_num_threads(1)
    import planners
    import robots
    from planners.safe import METHODS

    planner, task = planners.load(run.format(maze="large")), robots.make("pointmaze-large-hazards")
    every = {name: planner.controller(task.spec, safety=name if name in METHODS else None) for name in ("Diffuser", *METHODS)}
    times: dict[str, list[float]] = {name: [] for name in every}
    for k in range(plans + 2):
        history = {key: value[:, None] for key, value in task.reset([k]).items()}
        for name, controller in every.items():
            controller.reset(1)
            controller.generator.manual_seed(k)
            began = time.process_time()
            controller.act(history, 0)
            times[name].append(1e3 * (time.process_time() - began))
    return {name: float(np.median(measured[2:])) for name, measured in times.items()}


def filter_times(commands: int = 100) -> dict[str, float]:
    """Median milliseconds of one robot's filtered command: far from hazards, and where it must change the command."""
    import robots
    from robots.barriers import Complement, Superellipse
    from robots.safety_filter import SafetyFilter

    model = robots.make("pointmaze-large-hazards").linear_model()
    disc = Superellipse((0.0, 0.0), (1.0, 1.0), features=slice(2, 4))
    hazard, towards = (1.0, 0.0, 0.8, 0.8, 2.0, 0.0, 0.0), (0.0, 0.1, 2.2, 0.3)
    cases: dict[str, tuple[list[Any], int, tuple[float, ...], bool]] = {  # barriers, hazards, a state, whether it is changed there
        "far from two hazards": ([], 2, (-5.0, 0.0, 0.0, 0.0), False),
        "one hazard": ([], 1, towards, True),
        "six hazards": ([], 6, towards, True),
        "a speed limit": ([Complement(disc, features=disc.features)], 0, (0.0, 0.0, 0.97, 0.0), True),
    }
    found = {}
    for name, (barriers, hazards, state, changed) in cases.items():
        guard, times = SafetyFilter(model, barriers, margin=FILTER), []
        observation = {"state": np.array([state]), "hazards": np.array([[hazard] * hazards]).reshape(1, hazards, 7)}
        for _ in range(commands + 1):
            guard.forget()
            began = time.perf_counter()
            guard(observation, np.array([[1.0, 0.3]]))
            times.append(1e3 * (time.perf_counter() - began))
        assert guard.changed[0] == changed * (commands + 1)
        found[name] = float(np.median(times[1:]))
    return found


def tracking_error(run: str, episodes: int, seed: int) -> dict[str, float]:
    """How far, in metres, the robot strays from the path of its plan (not from where on it it should be), on unguarded
    roll-outs in the maze without hazards, over the steps before the goal is reached: quantiles."""
    import planners
    import robots
    from robots.straying import straying

    planner, task = planners.load(run.format(maze="large")), robots.make("pointmaze-large")
    controller = planner.controller(task.spec, seed=seed)
    strayed = straying(task, controller, episodes, seed)
    return {f"q{100 * q:g}": float(np.quantile(strayed, q)) for q in (0.5, 0.9, 0.95, 0.99)}


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a row from those of its shards."""
    keys = {"margin", "success", "trapped"} & parts[0]["per_episode"].keys()
    every = {key: np.concatenate([part["per_episode"][key] for part in parts]) for key in keys}
    reach = [s for part in parts for s in part["per_episode"]["first_reach_steps"] if s is not None]
    margin = every["margin"].astype(float)
    figures = {
        "episodes": len(margin),
        "safe_success": float((every["success"] & (margin >= 0)).mean()),
        "success": float(every["success"].mean()),
        "violating_episodes": int((margin < 0).sum()),
        "worst_margin": float(margin.min()),
        "first_reach_steps": float(np.mean(reach)) if reach else None,
        "decision_p50_ms": float(np.median([part["decision_ms"]["p50"] for part in parts])),
    }
    if "trapped" in every:
        figures["trapped"] = float(every["trapped"].mean())
    if "traps" in parts[0]["per_episode"]:
        figures["local_traps"] = int(sum(sum(part["per_episode"]["traps"]) for part in parts))
    if "filter" in parts[0]:
        figures["filter_changed"] = float(np.mean([part["filter"]["changed_rate"] for part in parts]))
        figures["filter_infeasible_steps"] = int(sum(part["filter"]["infeasible_steps"] for part in parts))
    return figures


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    heads = ["", "safe success", "success", "episodes with a violation", "worst margin, m", "trapped", "local traps"]
    heads += ["first reach", "filter acts"]
    lines = [f"| {' | '.join(heads)} |".replace("|  |", "| |"), "| --- " * len(heads) + "|"]
    for name, r in results["rows"].items():
        changed = f"{100 * r['filter_changed']:.1f} %" if "filter_changed" in r else ""
        reach = f"{r['first_reach_steps']:.0f}" if r["first_reach_steps"] else "-"
        traps, trapped = r.get("local_traps", ""), f"{100 * r['trapped']:.1f} %" if "trapped" in r else ""
        lines.append(
            f"| {name} | {100 * r['safe_success']:.1f} % | {100 * r['success']:.1f} % | {r['violating_episodes']} of "
            f"{r['episodes']} | {r['worst_margin']:+.3f} | {trapped} | {traps} | {reach} | {changed} |"
        )
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", default="", help="words, separated by +; rows whose name holds one of them")
    parser.add_argument("--exact", action="store_true", help="--rows are whole names: 'moving, correct' without its filter's row")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--run", default=RUN, help="its {maze} is large, or medium for two robots")
    parser.add_argument("--plans", type=int, default=20, help="plans timed; 0: none")
    parser.add_argument("--strays", type=int, default=20, help="episodes in which the tracking error is measured; 0: none")
    parser.add_argument("--out", default=str(ROOT / "docs" / "results" / "safety.json"))
    parser.add_argument("--filter", action="store_true", help="measure the filter's time alone")
    options = parser.parse_args()
    if options.filter:
        print(json.dumps(filter_times()))
        return
    words = options.rows.split("+")
    rows = [row for row in ROWS if (row.name in words if options.exact else any(word in row.name for word in words))]
    times = plan_times(options.run, options.plans) if options.plans else {}
    error = tracking_error(options.run, options.strays, options.seed) if options.strays else {}
    parts: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    out, size = Path(options.out), min(BATCH, max(1, options.episodes))
    results: dict[str, Any] = {"seed": options.seed, "plan_ms": times, "tracking_error": error, "rows": {}}
    out.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(shard, row, options.seed + k, min(size, options.episodes - k), options.run)
            for row in rows
            for k in range(0, options.episodes, size)
        ]
        for job in jobs:
            name, metrics, seconds = job.result()
            parts[name].append(metrics)
            results["rows"][name] = merged(parts[name])
            print(f"{name}: {results['rows'][name]['episodes']} episodes, {seconds:.0f} s", flush=True)
            out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(times | error))
    print(table(results))


if __name__ == "__main__":
    main()
