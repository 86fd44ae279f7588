"""Training throughput of a transformer denoiser: the trainer's step against the plain float32 eager loop.

    python benchmarks/training_throughput.py [rounds=7] [steps=5] [threads=2] [precision=auto] [compile=auto]

Both train the same Diffuser (width 256, depth 2, horizon 32, batch 128) on the same random walks. The plain loop is
what research code writes: a `Dataset` and `DataLoader` of windows, every token's level embedded and modulated on its
own, float32, AdamW as it comes, clipping, an average kept parameter by parameter, `loss.item()` in every step. The two
are run in turn, `steps` steps a round, so that whatever else the machine does falls on both; figures are medians over
the rounds, ratios are medians of the rounds' ratios, with the lowest and highest. On a machine that is busy with other
things the ratio of processor time (with threads=1) is the one to look at.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffusion.denoiser import Denoiser
from offline import Algorithm, DataSpec, TrainConfig, TrajectoryStore, build
from offline.hardware import has_bf16
from offline.trainer import Stepper, accelerator_for, compile_networks
from pilotwave.config import compose, plain
from pilotwave.errors import nearest

SPEC = DataSpec(task="random-walk", observation_dim=8, action_dim=4, dt=0.1, goal_dim=2)
NETWORK = {"name": "transformer", "width": 256, "depth": 2}
DEFAULTS = {"rounds": 7, "steps": 5, "threads": 2, "precision": "auto", "compile": "auto", "json": None}


def walks(episodes: int = 200, length: int = 200) -> TrajectoryStore:
    rng = np.random.default_rng(0)
    columns = {
        "observation": rng.normal(size=(episodes * length, 8)).cumsum(0).astype(np.float32),
        "action": rng.uniform(-1, 1, size=(episodes * length, 4)).astype(np.float32),
    }
    return TrajectoryStore(columns, length * np.arange(1, episodes + 1), dt=0.1, source="random walks")


def diffuser(store: TrajectoryStore) -> Algorithm:
    import planners.diffuser  # noqa: F401  registers it

    config = plain(compose("train", ["planner=diffuser"]).planner) | {"horizon": 32, "network": NETWORK}
    algorithm = build("planner", "diffuser", SPEC, config, seed=0)
    algorithm.prepare(store)
    return algorithm.train()


class PlainWindows(Dataset):
    """One window an item, for the loader to collate."""

    def __init__(self, algorithm: Algorithm, store: TrajectoryStore) -> None:
        self.windows = algorithm.windows(store, "cpu")
        self.columns = {name: column.numpy() for name, column in self.windows.columns.items()}
        self.first = self.windows.first.tolist()

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rows = slice(self.first[index], self.first[index] + self.windows.horizon)
        window = {name: torch.from_numpy(column[rows]) for name, column in self.columns.items()}
        return {**window, "valid": torch.ones(self.windows.horizon, dtype=torch.bool)}


def plain_loop(store: TrajectoryStore, config: TrainConfig) -> Iterator[None]:
    """One step each time it is asked."""
    algorithm = diffuser(store)
    for module in algorithm.modules():
        if isinstance(module, Denoiser):
            module.share_levels = False
    loader = DataLoader(PlainWindows(algorithm, store), batch_size=config.batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(algorithm.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    averages = {name: p.detach().clone() for name, p in algorithm.named_parameters()}
    generator, losses = torch.Generator().manual_seed(0), []
    while True:
        for batch in loader:
            loss, _ = algorithm.loss(batch, generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(algorithm.parameters(), config.gradient_clip)
            optimizer.step()
            with torch.no_grad():
                for name, p in algorithm.named_parameters():
                    averages[name].mul_(config.ema_decay).add_(p, alpha=1 - config.ema_decay)
            losses.append(loss.item())
            yield


def trainer_loop(store: TrajectoryStore, config: TrainConfig) -> Iterator[None]:
    algorithm = diffuser(store)
    accelerator = accelerator_for(config)
    compile_networks(algorithm, config, accelerator.device)
    stepper = Stepper(algorithm, algorithm.windows(store, accelerator.device), config, accelerator)
    for k in range(config.steps):
        stepper.step(k)
        yield


def seconds(loop: Iterator[None], steps: int) -> tuple[float, float]:
    """(wall, processor) seconds a step."""
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
        next(loop)
    return (time.perf_counter() - wall) / steps, (time.process_time() - processor) / steps


def products() -> dict[str, float]:
    """Speed of one matrix product of the network's shape, in GFLOP/s: what either loop could reach at best."""
    speeds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(4096, 256, dtype=dtype), torch.randn(1024, 256, dtype=dtype)
        times = []
        for _ in range(10):
            began = time.perf_counter()
            torch.nn.functional.linear(a, b)
            times.append(time.perf_counter() - began)
        speeds[str(dtype).removeprefix("torch.")] = 2 * 4096 * 256 * 1024 / min(times) / 1e9
    return speeds


def main(arguments: list[str]) -> dict[str, Any]:
    given = OmegaConf.from_dotlist(arguments)
    for key in given:
        if key not in DEFAULTS:
            raise nearest("option", str(key), DEFAULTS)
    options: dict[str, Any] = {**DEFAULTS, **dict(given)}  # type: ignore[arg-type]
    torch.set_num_threads(options["threads"])
    config = TrainConfig(precision=options["precision"], compile=options["compile"], device="cpu")
    store = walks()
    loops = {"plain float32 eager": plain_loop(store, config), "trainer": trainer_loop(store, config)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    for name, loop in loops.items():
        print(f"{name}: first steps", file=sys.stderr)
        seconds(loop, 2)  # allocations, and compilation where there is one
    for i in range(options["rounds"]):
        for name, loop in loops.items():
            times[name].append(seconds(loop, options["steps"]))
        print(f"round {i + 1}: " + ", ".join(f"{t[-1][0]:.3f} s a step" for t in times.values()), file=sys.stderr)
    result: dict[str, Any] = {f"{n} (steps/s)": 1 / statistics.median(t[0] for t in ts) for n, ts in times.items()}
    for i, kind in enumerate(("ratio", "ratio of processor time")):
        ratios = [a[i] / b[i] for a, b in zip(*times.values())]
        result |= {kind: statistics.median(ratios), f"{kind}, lowest": min(ratios), f"{kind}, highest": max(ratios)}
    result |= {"threads": options["threads"], "bf16 hardware": has_bf16(torch.device("cpu"))}
    result |= {f"{name} product (GFLOP/s)": speed for name, speed in products().items()}
    return {**result, "precision": "bf16" if accelerator_for(config).mixed_precision == "bf16" else "fp32"}


if __name__ == "__main__":
    result = main(sys.argv[1:])
    for key, value in result.items():
        print(f"{key:34} {value:.3g}" if isinstance(value, float) else f"{key:34} {value}")
    paths = [a.removeprefix("json=") for a in sys.argv[1:] if a.startswith("json=")]
    for path in paths:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")
