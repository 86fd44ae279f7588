"""Runs the commands of the results table and writes what they measured to docs/results/*.json, docs/results.md and README.

    python benchmarks/results.py            # every row
    python benchmarks/results.py pusht      # the rows whose name holds a word
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "results"


@dataclass(frozen=True)
class Result:
    """One row: what is measured, by which command, which figures of its JSON are shown (label: keys), beside which others."""

    name: str
    command: str
    figures: dict[str, str | tuple[str, ...]]
    beside: str = ""
    first_screen: bool = True  # in the README too


SUCCESS = {"success": "success_rate", "return": "return_mean", "latched return": "latched_return_mean"}
SUCCESS |= {"first reach step": "first_reach_steps_mean", "decision p99 ms": "decision_ms.p99"}
FIXED = {"D4RL score": "normalized_return_mean", "latched": "normalized_latched_return_mean", "success": "success_rate"}
DEMONSTRATOR = "the demonstrator {} on the same goal; Diffuser {}, Hierarchical Diffuser {} (published)"


def dream(task: str, what: str = "imagined", options: str = "episodes=50 seed=0", first_screen: bool = True) -> Result:
    """The errors of a world model beside those of the one-step network, at some steps (lists count from 0)."""
    models = f"checkpoints/{task}-diffusion-world-model baseline=checkpoints/{task}-one-step"
    run = f"pilotwave dream {models} {options}"
    figures: dict[str, str | tuple[str, ...]] = {}
    for step in (1, 8, 16, 32, 64, 100):
        figures[f"step {step}:"] = f"state_error.{step - 1}", f"baseline.state_error.{step - 1}"
    figures["reward, step 8:"] = "reward_error.7", "baseline.reward_error.7"
    beside = "error in deviations of the data / that of the one-step network"
    return Result(f"{task}, {what}", run, figures, beside, first_screen)


def maze(size: str, *scores: str) -> list[Result]:
    """The rows of one maze: random goals, D4RL's goal, and the diffused actions in place of the PD law."""
    run = f"pilotwave rollout checkpoints/pointmaze-{size}-diffuser episodes=200 seed=0 num_envs=100"
    return [
        Result(f"pointmaze-{size}, random starts and goals", run, SUCCESS),
        Result(f"pointmaze-{size}, D4RL's goal", f"{run} task.goal=fixed", FIXED, DEMONSTRATOR.format(*scores), size == "large"),
        Result(f"pointmaze-{size}, its own actions", f"{run} controller.track=actions", SUCCESS, "", False),
    ]


POLICY = "actions=checkpoints/pusht-diffusion-policy"
PARTS = ("left arm", "right arm", "left hand", "right hand")
METHODS = ("policy", "linear_regression", "hold_last_action")
HELD_OUT = {part: tuple(f"held_out.groups.{part}.{method}.mae" for method in METHODS) for part in PARTS}

RESULTS = [
    *maze("umaze", "141.9", "113.9", "128.4"),
    *maze("medium", "158.3", "121.5", "135.6"),
    *maze("large", "210.3", "123.0", "155.8"),
    Result(
        "pusht",
        "pilotwave rollout checkpoints/pusht-diffusion-policy episodes=200 seed=100000",
        {"mean of max clip(coverage / 0.95)": "score_mean", "success": "success_rate", "p50 ms": "decision_ms.p50"},
        "the people who demonstrated: 0.892; Diffusion Policy 0.95 best, 0.91 mean of the last ten (published)",
    ),
    Result(
        "adroit-door",
        "pilotwave rollout checkpoints/adroit-door-diffusion-policy episodes=200 seed=0",
        {"D4RL score": "normalized_return_mean", "success": "success_rate", "p50 ms": "decision_ms.p50"},
        "the people, in 269 steps: 29.3, cut to 200 steps: 7.7; methods that learn from the recordings alone: below 6 (published)",
    ),
    Result(
        "adroit-door, other doors",
        "pilotwave rollout checkpoints/adroit-door-diffusion-policy episodes=200 seed=50000",
        {"D4RL score": "normalized_return_mean", "success": "success_rate", "p50 ms": "decision_ms.p50"},
        first_screen=False,
    ),
    Result(
        "Unitree G1, 10 held-out episodes",
        "pilotwave train policy=diffusion_policy data=data/g1_bottle_lerobot out=runs/g1 policy.observations=4 "
        "policy.past_actions=8 policy.forecast=linear policy.horizon=32 policy.execute=32 policy.normalizer=gaussian "
        "policy.observation_noise=0.2 policy.network.width=384 policy.network.depth=2 +policy.network.dropout=0.2 "
        "train.steps=2000 train.weight_decay=0.1 train.held_out=10 seed=0",
        HELD_OUT,
        "policy / linear regression / last action held: mean absolute error over chunks of 32 steps (1.07 s), rad (arms) or "
        "share of the range (hands)",
        first_screen=False,
    ),
    dream("pointmaze-large"),
    dream("pusht", "held-out episodes imagined"),
    dream("pusht", "fresh episodes imagined", f"episodes=50 seed=0 {POLICY}", False),
    dream("pusht", "300 fresh episodes imagined", f"episodes=300 seed=0 {POLICY}", False),
]


def value(metrics: dict[str, Any], keys: str | tuple[str, ...]) -> str:
    """Figures of the JSON by their dotted keys, short."""
    return " / ".join(_value(metrics, key) for key in ([keys] if isinstance(keys, str) else keys))


def _value(metrics: dict[str, Any], key: str) -> str:
    for part in key.split("."):
        if isinstance(metrics, list):
            metrics = metrics[int(part)]
        else:
            metrics = metrics.get(part) if isinstance(metrics, dict) else None  # type: ignore[assignment]
    return "-" if metrics is None else f"{metrics:.4g}"


def file_of(result: Result) -> Path:
    """Where a row's JSON lies."""
    return OUT / f"{result.name.replace(', ', '-').replace(' ', '-').replace(chr(39), '')}.json"


def measure(result: Result) -> None:
    """Runs a row's command in the repository, its JSON into docs/results."""
    target = file_of(result)
    words = shlex.split(result.command)
    subprocess.run([sys.executable, "-m", *words, f"json={target}"], cwd=ROOT, check=True)
    metrics = json.loads(target.read_text())
    metrics.pop("per_episode", None)  # long, and the same command makes it again
    target.write_text(json.dumps(metrics | {"command": result.command}, indent=1) + "\n")


def table(results: Sequence[Result]) -> str:
    """The rows of the JSON files that are there."""
    rows = ["| what | measured | beside it | command |", "| --- | --- | --- | --- |"]
    for result in results:
        file = file_of(result)
        if file.exists():
            metrics = json.loads(file.read_text())
            shown = ", ".join(f"{name} {value(metrics, keys)}" for name, keys in result.figures.items())
            rows.append(f"| {result.name} | {shown} | {result.beside} | `{result.command}` |")
    return "\n".join(rows)


def main() -> None:
    """Measure the chosen rows and write the tables between their marks."""
    OUT.mkdir(exist_ok=True)
    for result in RESULTS:
        if all(word in result.name for word in sys.argv[1:]):
            measure(result)
    for path, results in {
        ROOT / "docs" / "results.md": RESULTS,
        ROOT / "README.md": [result for result in RESULTS if result.first_screen],
    }.items():
        before, _, rest = path.read_text().partition("<!-- table -->")
        after = rest.partition("<!-- end -->")[2]
        path.write_text(f"{before}<!-- table -->\n{table(results)}\n<!-- end -->{after}")


if __name__ == "__main__":
    main()
