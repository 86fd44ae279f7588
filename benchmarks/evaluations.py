"""Score against evaluations a decision, on the shipped checkpoints: solvers, the tuned tables, and DDPM with 100 steps beside.

    python benchmarks/evaluations.py                     # docs/results/evaluations.csv and docs/media/evaluations.png
    python benchmarks/evaluations.py --checkpoint pusht-diffusion-policy --episodes 1000 --seed 20000 \
        --rows ddpm:100 tuned:5 --out /tmp/pusht.csv

A row is `pilotwave rollout checkpoints/NAME episodes=200 seed=SEED num_envs=100 sampler=SAMPLER sampler.steps=N`; rows that the CSV
has already are not run again. `difference` is to DDPM's row, episode by episode (same seeds), in points (hundredths); errors are
standard errors over episodes. `scores` are the episodes' own. Tuned rows want the checkpoint's tuned_N.safetensors.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
OUT, PLOT = ROOT / "docs" / "results" / "evaluations.csv", ROOT / "docs" / "media" / "evaluations.png"
SEEDS = {"pointmaze-large-diffuser": 0, "pusht-diffusion-policy": 100000}
PANELS = [
    ("pointmaze-large-diffuser", "score", "success rate"),
    ("pointmaze-large-diffuser", "return", "return"),
    ("pusht-diffusion-policy", "score", "mean of max clip(coverage / 0.95)"),
]
SAMPLERS = {"ddim": "DDIM", "dpmpp_2m": "DPM-Solver++ 2M", "unipc_2": "UniPC 2", "tuned": "tuned"}
REFERENCE = ("ddpm", 100)
EVALUATIONS = (1, 2, 3, 4, 5, 8, 10, 20, 50, 100)
BATCH = 100
COLUMNS = [
    "checkpoint", "sampler", "evaluations", "episodes", "seed", "metric", "score_mean", "score_error", "difference",
    "difference_error", "success_rate", "return_mean", "return_error", "first_reach_steps_mean", "scores",
]  # fmt: skip


@dataclass(frozen=True, order=True)
class Row:
    """One row, named by what tells it from the others; the cheap ones come first."""

    evaluations: int
    checkpoint: str
    sampler: str
    episodes: int
    seed: int

    @classmethod
    def of(cls, line: dict[str, str]) -> Row:
        return cls(int(line["evaluations"]), line["checkpoint"], line["sampler"], int(line["episodes"]), int(line["seed"]))

    def reference(self) -> Row:
        return Row(REFERENCE[1], self.checkpoint, REFERENCE[0], self.episodes, self.seed)


Table = dict[Row, dict[str, Any]]


def measure(row: Row) -> tuple[Row, dict[str, Any]]:
    """The row's line but for the difference; one thread."""
    import torch

    torch.set_num_threads(1)
    import robots
    from pilotwave.config import read_yaml
    from pilotwave.runs import load
    from robots.rollout import rollout

    folder = ROOT / "checkpoints" / row.checkpoint
    config, learned = read_yaml(folder / "config.yaml"), load(folder, ("planner", "policy"))
    task = robots.make(config["task"], **config["task_options"])
    controller = learned.controller(task.spec, sampler={"name": row.sampler, "steps": row.evaluations})
    assert controller.evaluations == row.evaluations, f"{row}: {controller.evaluations} evaluations"
    metrics = rollout(task, controller, row.episodes, row.seed, num_envs=BATCH)
    scores = metrics["per_episode"]["score"]
    line = {key: metrics[key] for key in ("score_mean", "success_rate", "return_mean", "first_reach_steps_mean")}
    line |= {"metric": metrics["score"], "scores": " ".join(f"{score:.4g}" for score in scores)}
    returns = metrics["per_episode"]["return"]
    return row, line | {"score_error": standard_error(scores), "return_error": standard_error(returns)}


def standard_error(values: Any) -> float:
    """Of the mean of one number an episode."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def numbers(line: dict[str, Any]) -> np.ndarray:
    return np.array(line["scores"].split(), float)


def read(path: Path) -> Table:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {Row.of(line): dict(line) for line in csv.DictReader(file)}


def write(path: Path, table: Table) -> None:
    """The whole table, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row, line in sorted(table.items(), key=lambda entry: (entry[0].checkpoint, entry[0].sampler, entry[0])):
            if row.reference() in table and row != row.reference():
                difference = 100 * (numbers(line) - numbers(table[row.reference()]))
                line |= {"difference": difference.mean(), "difference_error": standard_error(difference)}
            cells = {**vars(row), **line}
            writer.writerow({key: short(cells.get(key)) for key in COLUMNS})
    os.replace(temporary, path)


def short(value: Any) -> Any:
    return f"{value:.4f}" if isinstance(value, float) else value


def plot(path: Path, table: Table) -> None:
    """A figure against evaluations, a panel each, bars of one standard error."""
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(row.checkpoint == panel[0] for row in table)]
    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    for panel, (name, key, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for i, (sampler, title) in enumerate(SAMPLERS.items()):
            rows = sorted(row for row in table if (row.checkpoint, row.sampler) == (name, sampler))
            if rows:
                x, mean, error = np.array([(row.evaluations, *_figure(table[row], key)) for row in rows]).T
                panel.errorbar(x * 1.02 ** (i - 1.5), mean, error, marker="o", ms=3, lw=1.2, capsize=2, label=title)
        for row, line in table.items():
            if row.checkpoint == name and row == row.reference():
                mean, error = _figure(line, key)
                panel.axhline(mean, color="0.4", lw=1, ls="--", label=f"DDPM, {row.evaluations}")
                panel.axhspan(mean - error, mean + error, color="0.4", alpha=0.15, lw=0)
        panel.set(xscale="log", xlabel="evaluations a decision", ylabel=label, title=name)
        panel.set_xticks(EVALUATIONS, [str(n) for n in EVALUATIONS])
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _figure(line: dict[str, Any], key: str) -> tuple[float, float]:
    return float(line[f"{key}_mean"]), float(line[f"{key}_error"])


def wanted(arguments: argparse.Namespace) -> list[Row]:
    """The rows asked for, in that order, but tuned ones without a table."""
    rows = []
    for sampler, evaluations in arguments.rows:
        for name in arguments.checkpoint or SEEDS:
            seed = SEEDS.get(name, 0) if arguments.seed is None else arguments.seed
            tuned = ROOT / "checkpoints" / name / f"tuned_{evaluations}.safetensors"
            if sampler == "tuned" and not tuned.exists():
                print(f"left out: {name} has no {tuned.name}; pilotwave tune checkpoints/{name} evaluations={evaluations}")
                continue
            rows.append(Row(evaluations, name, sampler, arguments.episodes, seed))
    return rows


def results(rows: Iterable[Row], workers: int) -> Iterable[tuple[Row, dict[str, Any]]]:
    if workers == 1:
        yield from map(measure, rows)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for future in as_completed([pool.submit(measure, row) for row in rows]):
            yield future.result()


def row_of(word: str) -> tuple[str, int]:
    sampler, _, evaluations = word.partition(":")
    return sampler, int(evaluations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [(sampler, n) for n in EVALUATIONS for sampler in SAMPLERS] + [REFERENCE]
    parser.add_argument("--checkpoint", nargs="+", help="names below checkpoints/")
    parser.add_argument("--rows", nargs="+", type=row_of, default=every, metavar="SAMPLER:EVALUATIONS")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--seed", type=int, help="of the first episode; the reported ones' by default")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--plot", type=Path, help="FILE.png; docs/media/evaluations.png where the table goes to its own place")
    arguments = parser.parse_args()
    picture = arguments.plot or (PLOT if arguments.out == OUT else None)
    table = read(arguments.out)
    for row, line in results([row for row in wanted(arguments) if row not in table], arguments.workers):
        table[row] = line
        write(arguments.out, table)
        score = f"{line['score_mean']:.4f} +- {line['score_error']:.4f}"
        print(f"{row.checkpoint} {row.sampler} {row.evaluations}: {score}", flush=True)
    write(arguments.out, table)
    if picture is not None and table:
        plot(picture, table)


if __name__ == "__main__":
    main()
