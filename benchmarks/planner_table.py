"""Every shipped planner on every task that it has a checkpoint for: the table of docs/planners/comparison.md.

    python benchmarks/planner_table.py                                        # all of them: 200 episodes, seed 0
    python benchmarks/planner_table.py giant veteran                          # those whose name holds one of the words
    python benchmarks/planner_table.py medium --train 1 2                     # further training seeds of these rows
    python benchmarks/planner_table.py --decisions                            # the time of a decision alone, all rows
    python benchmarks/planner_table.py giant --episodes 50 --seed 20000 --out /tmp/tuning.json
    python benchmarks/planner_table.py --replanning                           # how often to decide, medium maze
    python benchmarks/planner_table.py --selection                            # guidance against a choice, locomotion

Each row is one `pilotwave rollout`, whose command is written beside its figures. --train runs the command on the checkpoint's
card once more with seed=N, into runs/planners/CHECKPOINT-seedN (it goes on where it was stopped), and rolls that out
too; the table then shows the mean over training seeds and its range; with --compile the networks are compiled (needs
g++; the same up to rounding). --decisions is for an idle machine, so that times can be compared: three rounds over all rows, 10
decisions each, of which a row's fastest round counts, for what else a machine does only adds. --replanning gives the second table:
decisions at every step, every 16 steps and once, in 50 episodes of the medium maze a row. --selection gives the third: one
Diffuser's plans as drawn, guided by its value network, chosen by it, and both. (A planners.py here would hide the package
`planners` from its neighbours.)
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TASKS: tuple[str, ...] = ("pointmaze-umaze", "pointmaze-medium", "pointmaze-large", "pointmaze-giant", "pointmaze-compositional")
TASKS += ("hopper", "walker2d")
PLANNERS: tuple[str, ...] = ("diffuser", "hierarchical", "veteran", "contrastive", "latent", "ldcq", "transformer")
PLANNERS += ("decision-diffuser", "forcing", "trajectory-diffuser")
VARIANTS = {"ldcq": ("latent", "controller.selection=q", "controller.samples=24")}  # rows that share a checkpoint
KEPT = ("success_rate", "return_mean", "normalized_return_mean", "first_reach_steps_mean", "evaluations", "decision_ms")
KEPT += ("episodes", "seed")
COLUMNS = {
    "success, %": lambda r: 100 * r["success_rate"],
    "return": lambda r: r["return_mean"],
    "normalized": lambda r: r.get("normalized_return_mean"),
    "first reach step": lambda r: r["first_reach_steps_mean"],
}
SELECTION = {  # controller.guidance, controller.samples
    "as drawn": (0.0, 1),
    "guided": (0.1, 1),
    "guided more": (1.0, 1),
    "guided most": (10.0, 1),
    "best of 16": (0.0, 16),
    "guided, best of 16": (0.1, 16),
}
ROUNDS = 3  # of timing decisions
REPLANNING = {"every step": 1, "every 16 steps": 16, "once": 0}


def pilotwave(*words: str) -> None:
    """One command of the project, in its folder."""
    subprocess.run([sys.executable, "-m", "pilotwave", *words], cwd=ROOT, check=True)


def rollout(run: Path, *settings: str) -> dict[str, Any]:
    """The kept figures of one `pilotwave rollout`, with its command and what trained the planner."""
    words = ["rollout", str(run.relative_to(ROOT)), *settings]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "metrics.json"
        pilotwave(*words, f"json={result}")
        metrics = json.loads(result.read_text())
    card = json.loads((run / "card.json").read_text())
    figures = {key: metrics[key] for key in KEPT if key in metrics} | {"command": " ".join(["pilotwave", *words])}
    return figures | {key: card[key] for key in ("parameters", "steps", "training_seconds")}


def train_again(checkpoint: Path, seed: int, *settings: str) -> Path:
    """The run of the checkpoint's own command with another seed and `settings` besides, such as train.compile=on."""
    program, command, *words = shlex.split(json.loads((checkpoint / "card.json").read_text())["command"])
    assert (program, command) == ("pilotwave", "train")
    run = ROOT / "runs" / "planners" / f"{checkpoint.name}-seed{seed}"
    words = [word for word in words if not word.startswith(("out=", "seed="))]
    pilotwave("train", *words, *settings, f"seed={seed}", f"out={run.relative_to(ROOT)}")
    return run


def record(out: Path, row: str = "", figures: dict[str, Any] | None = None, seed: int | None = None) -> dict[str, Any]:
    """All rows in the file `out`, in the table's order, after these figures joined a row (or its seed's); one process at a time."""
    with out.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        results: dict[str, Any] = json.loads(file.read() or "{}")
        if figures and seed is None:
            results[row] = results.get(row, {}) | figures
        elif figures:
            results[row].setdefault("seeds", {})[str(seed)] = figures
        order = [f"{task} {planner}" for task in TASKS for planner in PLANNERS]
        results = {row: results[row] for row in order if row in results}
        file.truncate(0)
        file.write(json.dumps(results, indent=1) + "\n")
    return results


def table(results: dict[str, Any]) -> str:
    """Markdown of the comparison: of each figure its mean over training seeds, and their range where there are several."""
    heads = ["task", "planner", *COLUMNS, "decision p50, ms", "evaluations", "training steps", "parameters", "seeds"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for name, r in results.items():
        seeds = [r, *r.get("seeds", {}).values()]
        cells = name.split()
        for figure in COLUMNS.values():
            values = [value for each in seeds if (value := figure(each)) is not None]
            digits = 1 if values and max(values) <= 100 else 0
            text = f"{sum(values) / len(values):.{digits}f}" if values else "-"
            cells.append(text + (f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""))
        cells += [f"{r['decision_ms']['p50']:.0f}", f"{r['evaluations']}", f"{r['steps']}", f"{r['parameters'] / 1e6:.2f} M"]
        lines.append(f"| {' | '.join([*cells, str(len(seeds))])} |")
    return "\n".join(lines)


def replanning_table(results: dict[str, Any]) -> str:
    """Markdown: how often a decision is made, against what is reached."""
    lines = ["| a decision | success | return | first reach step |", "| --- | --- | --- | --- |"]
    for name, r in results.items():
        lines.append(f"| {name} | {100 * r['success_rate']:.0f} % | {r['return_mean']:.0f} | {r['first_reach_steps_mean']:.0f} |")
    return "\n".join(lines)


def replanning(seed: int, episodes: int) -> dict[str, Any]:
    """The figures of the second table, by interval."""
    checkpoint = ROOT / "checkpoints" / "pointmaze-medium-diffuser"
    common = (f"episodes={episodes}", f"seed={seed}", "timing_decisions=0")
    return {name: rollout(checkpoint, *common, f"controller.replan_every={every}") for name, every in REPLANNING.items()}


def selection(seed: int, episodes: int) -> dict[str, Any]:
    """The figures of the third table, by what happens to plans and task."""
    common = (f"episodes={episodes}", f"seed={seed}", "num_envs=100", "timing_decisions=0")
    return {
        name: {
            task: rollout(
                ROOT / "checkpoints" / f"{task}-diffuser", *common, f"controller.guidance={w}", f"controller.samples={samples}"
            )
            for task in ("hopper", "walker2d")
        }
        for name, (w, samples) in SELECTION.items()
    }


def selection_table(results: dict[str, Any]) -> str:
    """Markdown: normalized returns of guided and of chosen plans."""
    lines = ["| plans | guidance | candidates | hopper | walker2d |", "| --- " * 5 + "|"]
    for name, r in results.items():
        w, samples = SELECTION[name]
        scores = [f"{r[task]['normalized_return_mean']:.1f}" for task in ("hopper", "walker2d")]
        lines.append(f"| {' | '.join([name, f'{w:g}', f'{samples}', *scores])} |")
    return "\n".join(lines)


def write(document: Path, mark: str, text: str) -> None:
    """Put a table between its marks."""
    before, _, rest = document.read_text().partition(f"<!-- {mark} -->")
    document.write_text(f"{before}<!-- {mark} -->\n{text}\n<!-- end{rest.partition('<!-- end')[2]}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--episodes", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, nargs="+", default=[], metavar="SEED")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--decisions", action="store_true")
    parser.add_argument("--replanning", action="store_true")
    parser.add_argument("--selection", action="store_true")
    parser.add_argument("--out", help="where the figures go in place of docs/results, then without tables in docs/planners")
    options = parser.parse_args()
    beside = {"replanning": (replanning, replanning_table, 50), "selection": (selection, selection_table, 200)}
    name = next((each for each in beside if getattr(options, each)), "planners")
    out = Path(options.out or ROOT / "docs" / "results" / f"{name}.json")
    if name in beside:
        measure, as_table, episodes = beside[name]
        results = measure(options.seed, options.episodes or episodes)
        out.write_text(json.dumps(results, indent=1) + "\n")
    else:
        compiled = ("train.compile=on",) if options.compile else ()
        common = (f"episodes={options.episodes or 200}", f"seed={options.seed}", "num_envs=100")
        timed: list[tuple[str, Path, list[str]]] = []
        for task in TASKS:
            for planner in PLANNERS:
                trained, *settings = VARIANTS.get(planner, (planner,))
                checkpoint, row = ROOT / "checkpoints" / f"{task}-{trained}", f"{task} {planner}"
                if not checkpoint.exists() or (options.words and not any(w in f"{task}-{planner}" for w in options.words)):
                    continue
                if (options.decisions or options.train) and row not in record(out):
                    continue
                if options.decisions:
                    timed.append((row, checkpoint, settings))
                elif options.train:
                    for seed in options.train:
                        run = train_again(checkpoint, seed, *compiled)
                        record(out, row, rollout(run, *common, "timing_decisions=0", *settings), seed)
                else:
                    record(out, row, rollout(checkpoint, *common, *settings))
        fastest: dict[str, Any] = {}
        for row, checkpoint, settings in ROUNDS * timed:
            one = rollout(checkpoint, "episodes=1", "horizon=1", f"seed={options.seed}", "timing_decisions=10", *settings)
            fastest[row] = min(one["decision_ms"], fastest.get(row, one["decision_ms"]), key=lambda ms: ms["p50"])
        for row, ms in fastest.items():
            record(out, row, {"decision_ms": ms})
        results, as_table = record(out), table
    text = as_table(results)
    print(text)
    if options.out is None:
        write(ROOT / "docs" / "planners" / "comparison.md", name, text)


if __name__ == "__main__":
    main()
