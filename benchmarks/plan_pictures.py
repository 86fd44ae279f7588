"""Plans of every shipped planner on the same maze, from the same start to the same goal: docs/planners/plans.png.

    python benchmarks/plan_pictures.py                          # pointmaze-medium, the farthest goal of episodes 20000 to 20049
    python benchmarks/plan_pictures.py pointmaze-large 20003 --out /tmp/plans.png

Each panel shows what one planner's controller chooses from: its `control.samples` plans until they arrive, the best of them in
red with its tokens. Nothing is chosen by its looks: the noise is that of seed 0, and every planner with a checkpoint has a panel.
`ldcq` is the latent checkpoint's choice by Q; `safe` is SafeDiffuser over Diffuser, with a hazard in the middle of Diffuser's way.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import planners
import robots
from offline.checkpoint import read_card
from planners.diffuser import Diffuser
from planners.latent import LatentDiffuser
from planners.safe import SafeDiffuser
from robots.barriers import Superellipse

ROOT = Path(__file__).resolve().parents[1]
BEST, OTHER, HAZARD, TITLE = (214, 60, 50), (150, 175, 215), (240, 180, 110), 34
RADIUS, EVERY = 0.25, 4  # metres of the hazard; SafeDiffuser plans this many points a token


def panel(
    task: Any, name: str, plan: planners.Plan, state: np.ndarray, goal: np.ndarray, hazard: np.ndarray | None = None
) -> np.ndarray:
    """The maze with the plans (samples, H, Do), the best on top, and the planner's name above: (H, W, 3)."""
    maze = task.draw_top(state[:2], goal)
    if hazard is not None:
        centre, rim = task.to_pixels(hazard[None] + np.array([[0.0, 0.0], [RADIUS, 0.0]])).round()
        cv2.circle(maze, centre.astype(int).tolist(), round(np.linalg.norm(rim - centre)), HAZARD, -1, cv2.LINE_AA)
    for i in reversed(range(len(plan.observations))):
        end = None if plan.arrivals is None else int(plan.arrivals[i]) + 1
        way = task.to_pixels(plan.observations[i, :end, :2]).round().astype(np.int32)
        cv2.polylines(maze, [way], False, OTHER if i else BEST, 2 if i else 4, cv2.LINE_AA)
        for point in () if i else way[:: 1 if hazard is None else EVERY]:
            cv2.circle(maze, point.tolist(), 5, BEST, -1, cv2.LINE_AA)
    title = np.full((TITLE, maze.shape[1], 3), 255, np.uint8)
    cv2.putText(title, name, (8, TITLE - 10), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (0, 0, 0), 2, cv2.LINE_AA)
    return np.concatenate([title, maze])


def noise() -> torch.Generator:
    """The same for every planner."""
    return torch.Generator().manual_seed(0)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", default="pointmaze-medium")
    parser.add_argument("episode", nargs="?", type=int, default=20034)
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--out", default=str(ROOT / "docs" / "planners" / "plans.png"))
    options = parser.parse_args()
    task = robots.make(options.task)
    first = task.reset([options.episode])
    state, goal = first["state"][0], first["goal"][0]
    panels = []
    for folder in sorted((ROOT / "checkpoints").glob(f"{options.task}-*")):
        if read_card(folder)["kind"] != "planner":
            continue
        planner, name = planners.load(folder), folder.name.removeprefix(f"{options.task}-")
        samples = int(planner.config["control"]["samples"])
        plan = planner.plan(state, goal, samples, generator=noise())
        panels.append(panel(task, name, plan, state, goal))
        if isinstance(planner, LatentDiffuser):
            chosen = planner.plan(state, goal, 24, generator=noise(), selection="q")
            panels.append(panel(task, "ldcq", chosen, state, goal))
        if isinstance(planner, Diffuser):
            end = planner.H - 1 if plan.arrivals is None else int(plan.arrivals[0])
            hazard = plan.observations[0, end // 2, :2].astype(np.float64)
            disc = Superellipse(tuple(hazard), (RADIUS, RADIUS))
            safe = SafeDiffuser(planner, "correct", refine=EVERY)
            plan = safe.plan(state, goal, samples, barriers=[disc], generator=noise())
            panels.append(panel(task, "safe", replace(plan, arrivals=None), state, goal, hazard))  # they stay at the goal
    blank = [np.full_like(panels[0], 255)] * (-len(panels) % options.columns)
    sheet = np.stack(panels + blank).reshape(-1, options.columns, *panels[0].shape)
    sheet = np.concatenate([np.concatenate(list(row), 1) for row in sheet])
    small = cv2.resize(sheet, None, fx=0.75, fy=0.75, interpolation=cv2.INTER_AREA)
    cv2.imwrite(options.out, small[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])


if __name__ == "__main__":
    main()
