"""The control loop's period beside a bare sleeping loop, on the same machine, in one run.

    python benchmarks/control_loop.py [--seconds 20] [--frequency 100] [--policy RUN] [--json FILE]

Rows: a loop that only sleeps (before and after); the control loop driving pointmaze-large in real time while its
inference process computes without a pause (decisions of 50 ms of matrix products, and of 2 s); the same without
real-time scheduling; with --policy, a trained planner or policy instead. late: woke over a tenth of a period after the
deadline; missed: the period was over before its command was sent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import robots
from robots import Chunk, Factory, Limits, MujocoRobot, PDTracker, bare_loop, deploy


class Busy:
    """A planner that computes for `seconds` a decision and then asks for a small circle around the robot."""

    history, replan_every, evaluations = 1, 0, 1

    def __init__(self, seconds: float) -> None:
        self.seconds, self.tracker = seconds, PDTracker(1.0, 1.0)
        self._matrix = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32) / 16

    def reset(self, n: int) -> None:
        """Keeps nothing."""

    def act(self, history: Mapping[str, np.ndarray], step: int) -> Chunk:
        until, product = time.monotonic() + self.seconds, self._matrix
        while time.monotonic() < until:
            product = np.tanh(product @ self._matrix)
        angle = np.linspace(0.0, 2 * np.pi, 200)
        circle = 0.05 * np.stack([1 - np.cos(angle), np.sin(angle), np.sin(angle), np.cos(angle)], axis=1)
        centre = np.concatenate([history["state"][0, -1, :2], np.zeros(2)])
        return Chunk((centre + circle)[None], 0.02)


def learned(run: str) -> Any:
    """The controller of a run, as `pilotwave deploy` makes it."""
    from pilotwave.runs import compose_for, controller, load, run_folder, task_of

    folder = run_folder(run)
    cfg = compose_for("deploy", [f"policy={run}"], folder)
    return controller(load(folder, ("planner", "policy"), device="cpu"), task_of(cfg, folder).spec, cfg)


def row(name: str, result: Mapping[str, Any]) -> str:
    """One line of the table."""
    period = result["period_ms"]
    figures = "".join(f"{period[k]:>9.3f}" for k in ("p50", "p99", "max"))
    work = result.get("work_ms") or {}
    rest = "".join(f"{work[k]:>9.3f}" for k in ("p50", "max")) if work else " " * 18
    counts = f"{result['late_periods']:>6} {result['missed_deadlines']:>7} {result['ticks']:>6}"
    return f"{name:<34}{figures} {counts}{rest}  {result.get('scheduling', 'normal')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--frequency", type=float, default=100.0)
    parser.add_argument("--policy", help="a run directory or checkpoint folder of pointmaze-large")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{platform.system()} {platform.release()}, {os.cpu_count()} cores{load}; {args.frequency:g} Hz, ms")
    print(f"{'':<34}{'p50':>9}{'p99':>9}{'max':>9} {'late':>6} {'missed':>7} {'ticks':>6}{'work p50':>9}{'max':>9}")
    cases: list[tuple[str, Factory, dict[str, Any]]] = [
        ("planner computing, 50 ms each", Factory("control_loop:Busy", (0.05,)), {}),
        ("the same, ordinary scheduling", Factory("control_loop:Busy", (0.05,)), {"realtime_priority": None}),
        ("planner computing, 2 s each", Factory("control_loop:Busy", (2.0,)), {}),
    ]
    if args.policy:
        cases.append(("policy", Factory("control_loop:learned", (args.policy,)), {"replan": None}))
        cases.append(("policy, delayed by 2 s", Factory("control_loop:learned", (args.policy,)), {"delay": 2.0}))
    results: dict[str, Any] = {}

    def show(name: str, result: Mapping[str, Any]) -> None:
        results[name] = result
        print(row(name, result), flush=True)

    period = 1.0 / args.frequency
    show("bare sleeping loop", bare_loop(period, args.seconds))
    for name, factory, settings in cases:
        task = robots.make("pointmaze-large", goal="chain")
        limits = Limits(task.spec.action_low, task.spec.action_high)
        shared = {"seconds": args.seconds, "frequency": args.frequency, "step_seconds": task.spec.dt, "replan": 0.0}
        report = deploy(MujocoRobot(task), factory, limits=limits, **(shared | settings))
        assert not report.violations, "a command was outside of its limits"
        show(name, report.to_json())
    show("bare sleeping loop, again", bare_loop(period, args.seconds))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
