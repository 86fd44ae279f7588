"""`pilotwave demo`: demonstrations, a planner, roll-outs and a real-time drive, by the commands that a user types."""

from __future__ import annotations

import importlib
import json
import shlex
import time
from collections.abc import Sequence

from pilotwave.config import compose
from pilotwave.console import writable_folder
from pilotwave.report import write_report


def run(overrides: Sequence[str]) -> int:
    """Run every command and write the report; 1 when fewer goals than `success` were reached."""
    cfg = compose("demo", overrides)
    out = writable_folder(cfg.out)
    task, seed, trained = f"task={cfg.task}", f"seed={cfg.seed}", str(out / "run")
    commands = {
        "collect": [task, f"steps={cfg.collect_steps}", f"out={out}/demonstrations.hdf5", seed],
        "train": [
            f"planner={cfg.planner}",
            task,
            f"data={out}/demonstrations.hdf5",
            f"out={trained}",
            *([f"train.steps={cfg.train_steps}"] if cfg.train_steps else []),
            seed,
        ],
        "rollout": [trained, f"episodes={cfg.episodes}", seed, f"json={out}/rollout.json", f"video={out}/rollout.mp4"],
        "deploy": [
            "robot=mujoco",
            f"policy={trained}",
            "task.goal=chain",
            f"seconds={cfg.seconds}",
            seed,
            f"json={out}/drive.json",
            f"video={out}/drive.mp4",
        ],
    }
    took = {}
    for name, words in commands.items():
        print(f"\n$ pilotwave {name} {shlex.join(words)}\n", flush=True)
        began = time.monotonic()
        settings = [f"run={word}" if word == trained else word for word in words]
        importlib.import_module(f"pilotwave.commands.{name}").run(settings)
        took[name] = time.monotonic() - began
    metrics = json.loads((out / "rollout.json").read_text(encoding="utf-8"))
    lines = {name: f"pilotwave {name} {shlex.join(words)}" for name, words in commands.items()}
    write_report(out, lines, took, metrics)
    reached = metrics["success_rate"]
    print(f"\n{reached:.0%} of {cfg.episodes} random goals reached; see {out}/report.md, {out}/drive.mp4")
    return 0 if reached >= cfg.success else 1
