"""How many of a maze planner's plans are free of walls, and how many of those it chooses.

    python benchmarks/plan_feasibility.py checkpoints/pointmaze-large-diffuser [starts=200] [samples=8] [seed=30000]

Rows: arrivals spread evenly over the horizon, and over quantiles of the durations that the planner has learned. The
tokens of a plan are joined by cubics (Hermite, by their positions and velocities); a plan is free of walls when no point of
them, until its arrival, lies more than 0.1 inside a wall. The same test on windows of the data says how strict it is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import planners
import robots
from robots.collect import collect
from robots.tasks.pointmaze import PointMaze, cell_of

QUANTILES = {"durations 0.02 to 0.5": (0.02, 0.5), "durations 0.1 to 0.6": (0.1, 0.6), "durations 0.2 to 0.6": (0.2, 0.6)}


def cubics(states: np.ndarray, seconds: float, points: int = 17) -> np.ndarray:
    """Positions (..., H - 1, points, 2) between tokens (..., H, 4) that are `seconds` apart."""
    w = np.linspace(0, 1, points)[:, None]
    p, v = states[..., None, :2], states[..., None, 2:] * seconds
    p0, p1, v0, v1 = p[..., :-1, :, :], p[..., 1:, :, :], v[..., :-1, :, :], v[..., 1:, :, :]
    return (2 * w**3 - 3 * w**2 + 1) * p0 + (w**3 - 2 * w**2 + w) * v0 + (3 * w**2 - 2 * w**3) * p1 + (w**3 - w**2) * v1


def free(task: PointMaze, states: np.ndarray, arrival: np.ndarray, seconds: float, depth: float = 0.1) -> np.ndarray:
    """Which plans (...,) are free of walls: states (..., H, 4), arrival tokens (...,)."""
    points = cubics(states, seconds)
    inside = np.ones(points.shape[:-1], dtype=bool)
    for offset in depth * np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]]):
        cell = np.clip(cell_of((points + offset).reshape(-1, 2)), 0, np.array(task.maze.walls.shape) - 1)
        inside &= task.maze.walls[cell[:, 0], cell[:, 1]].reshape(inside.shape)
    after = np.arange(1, states.shape[-2]) > arrival[..., None]
    return (~inside.any(-1) | after).all(-1)


def main() -> None:
    options: dict[str, Any] = {"starts": 200, "samples": 8, "seed": 30000}
    options |= {key: int(value) for key, value in (word.split("=") for word in sys.argv[2:])}
    starts, samples = options["starts"], options["samples"]
    planner = planners.load(sys.argv[1])
    task = robots.make(planner.spec.task)
    seconds = planner.stride * task.spec.dt
    observation = task.reset(range(options["seed"], options["seed"] + starts))
    state = planner.normalizer.normalize("observation", torch.as_tensor(observation["state"]))
    full = np.concatenate([observation["goal"], observation["state"][:, 2:]], axis=1)
    goal = planner.normalizer.normalize("observation", torch.as_tensor(full))[:, :2]
    even = planner.H - 1 - torch.arange(samples) * (planner.H - 1) // samples
    cases: dict[str, Tensor] = {"spread evenly": even.expand(starts, -1)}
    for name, (low, high) in QUANTILES.items():
        q = torch.linspace(low, high, samples)
        with torch.no_grad():
            cases[name] = planner.durations.quantiles(torch.cat([state, goal], -1), q)
    print(f"{starts} starts and goals, {samples} plans each; free of walls:")
    print(f"{'arrivals':<24}{'all plans':>10}{'any of them':>13}{'the chosen':>12}{'chosen arrival':>16}")
    for name, arrival in cases.items():
        generator = torch.Generator().manual_seed(0)
        flat = arrival.flatten()
        o, g = state.repeat_interleave(samples, 0), goal.repeat_interleave(samples, 0)
        x = planner.sample_plans(o, g, flat, planner.table(), generator)
        plans = planner.normalizer.denormalize("observation", x[..., :4])
        chosen = planner._values(x, plans, flat).view(starts, samples).argmax(1)[:, None]
        ok = torch.as_tensor(free(task, plans.numpy(), flat.numpy(), seconds)).view(starts, samples)
        figures = ok.float().mean(), ok.any(1).float().mean(), ok.gather(1, chosen).float().mean()
        mean = arrival.gather(1, chosen).float().mean()
        print(f"{name:<24}{figures[0]:>10.3f}{figures[1]:>13.3f}{figures[2]:>12.3f}{mean:>16.1f}", flush=True)
    recorded = demonstrations(task, planner.H, planner.stride)
    last = np.full(len(recorded), planner.H - 1)
    print(f"windows of the demonstrator's own roll-outs: {free(task, recorded, last, seconds).mean():.3f}")


def demonstrations(task: PointMaze, horizon: int, stride: int) -> np.ndarray:
    """Windows (n, H, 4) of the demonstrator."""
    import tempfile

    import h5py

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.hdf5"
        collect(task.spec.name, 50_000, path, seed=1)
        with h5py.File(path) as file:
            states, timeouts = np.asarray(file["observations"]), np.asarray(file["timeouts"])
    begins = np.arange(0, len(states) - (horizon - 1) * stride, 97)
    whole = [i for i in begins if not timeouts[i : i + (horizon - 1) * stride].any()]
    return states[np.array(whole)[:, None] + np.arange(horizon) * stride]


if __name__ == "__main__":
    main()
