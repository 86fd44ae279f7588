"""Distance to the answer of many small steps from the same noise, against evaluations, on the shipped checkpoints: solvers with
steps uniform in t, the best of all solvers and spacings in hindsight, and the tuned tables.

    python benchmarks/sampling_error.py          # docs/results/sampling_error.csv and docs/media/sampling_error.png

Root of the mean squared distance over all numbers of normalized plans or chunks of actions, in decisions of 4 episodes from seed
30000, which neither training nor `pilotwave tune` has seen. The reference is DPM-Solver++ 2M with 128 steps.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

import robots
from diffusion import solver
from diffusion.search import Problem, hand_made
from offline.tables import table_file
from pilotwave.commands.tune import calls_of
from pilotwave.config import read_yaml
from pilotwave.runs import load

ROOT = Path(__file__).resolve().parent.parent
OUT, PLOT = ROOT / "docs" / "results" / "sampling_error.csv", ROOT / "docs" / "media" / "sampling_error.png"
SETTINGS = {  # what is tried: some decisions of the 4 episodes
    "pointmaze-large-diffuser": {"samples": 16, "controller": {"samples": 2}},
    "pusht-diffusion-policy": {"samples": 32, "controller": {}},
}
EVALUATIONS = (1, 2, 3, 4, 5, 8, 10, 20, 50, 100)
DRAWN = {"ddim": "DDIM", "dpmpp_2m": "DPM-Solver++ 2M", "unipc_2": "UniPC 2", "unipc_3": "UniPC 3", "heun": "Heun"}
MOST_TRIED = 5  # evaluations up to which all solvers and spacings are tried
BEST, TUNED = "best of all, in hindsight", "tuned"
Line = tuple[str, str, int, str, float]  # checkpoint, sampler, evaluations, what it is, error


def measured(name: str, settings: dict[str, Any]) -> list[Line]:
    """The lines of one checkpoint."""
    folder = ROOT / "checkpoints" / name
    config, learned = read_yaml(folder / "config.yaml"), load(folder, ("planner", "policy"))
    task = robots.make(config["task"], **config["task_options"])
    calls = calls_of(learned, task, OmegaConf.create({"seed": 30000, "episodes": 4, **settings}), 0)
    problem = Problem(calls, learned.denoiser.schedule)
    lines: list[Line] = []
    for n in EVALUATIONS:
        for sampler in DRAWN:
            steps = next((k for k in range(n, 0, -1) if solver(sampler, problem.schedule, k).evaluations == n), None)
            if steps is not None:
                lines.append((name, sampler, n, "uniform", problem.error(solver(sampler, problem.schedule, steps))))
        if n <= MOST_TRIED:
            errors = {key: problem.error(table) for key, table in hand_made(problem, n).items()}
            best = min(errors, key=errors.__getitem__)
            lines.append((name, BEST, n, best, errors[best]))
        if table_file(folder, n).exists():
            lines.append((name, TUNED, n, "", problem.error(learned.table({"name": TUNED, "steps": n}))))
        print(name, n, *(f"{line[1]} {line[4]:.4f}" for line in lines if line[2] == n), flush=True)
    return lines


def plot(path: Path, lines: list[Line]) -> None:
    """A panel a checkpoint."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(line[0] for line in lines))
    figure = Figure(figsize=(5.6 * len(names), 4.2), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for sampler, label in {**DRAWN, BEST: BEST, TUNED: TUNED}.items():
            points = [(n, error) for checkpoint, each, n, _, error in lines if (checkpoint, each) == (name, sampler)]
            if points:
                style = {BEST: {"ls": ":", "color": "0.3"}, TUNED: {"color": "k", "lw": 2}}.get(sampler, {})
                panel.plot(*zip(*points), marker="o", ms=3, **{"lw": 1.2, **style}, label=label)
        panel.set(xscale="log", yscale="log", xlabel="evaluations", ylabel="distance to 128 steps, normalized", title=name)
        panel.set_xticks(EVALUATIONS, [str(n) for n in EVALUATIONS])
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [line for name, settings in SETTINGS.items() for line in measured(name, settings)]
    with arguments.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("checkpoint", "sampler", "evaluations", "steps", "error"))
        writer.writerows((*line[:4], f"{line[4]:.5f}") for line in lines)
    plot(arguments.plot, lines)


if __name__ == "__main__":
    main()
