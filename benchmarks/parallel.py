"""Parallel Picard iterations (ParaDiGMS) beside the sequential executor: rounds, time and difference, for DDPM and DDIM.

    python benchmarks/parallel.py [--steps 100] [--samples 4] [--repeats 3] [--json out.json] [RUN]

One sample at a time on one thread: of a mixture of Gaussians with its exact denoiser (32 tokens of 6 numbers, vp_linear), and of
the network of RUN, a policy's checkpoint (checkpoints/pusht-diffusion-policy), asked at its task's first observations. Both
executors draw with the same noise in the same run. rounds: calls of the network, with up to `window` rows each; difference:
root mean square between the two samples, the largest of all; ms: the least of the repeats, on average over samples; cpu_ms: the
same in processor time, which other programs on the machine change less.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import policies
import robots
from diffusion import NoiseSchedule, PicardSampler, Tableau, ddpm_deviation, sample, solver
from diffusion.tableau import Denoise
from tests.mixture import elementwise

SAMPLERS = ("ddpm", "ddim")
WINDOWS = (8, 16, 32, 100)
SEED = 100_000  # of the observations, and of the noise

Case = tuple[Denoise, Tensor]


def mixture(samples: int) -> tuple[NoiseSchedule, Iterator[Case]]:
    schedule = NoiseSchedule.vp_linear()
    generator = torch.Generator().manual_seed(SEED)
    denoise = elementwise(schedule)
    return schedule, ((denoise, torch.randn(1, 32, 6, generator=generator)) for _ in range(samples))


def policy(run: str, samples: int) -> tuple[NoiseSchedule, Iterator[Case]]:
    """The denoiser given each first observation, standing still before it."""
    model = policies.load(run)
    task = robots.make(model.spec.task)
    states = torch.as_tensor(task.reset(range(SEED, SEED + samples))["state"]).float()
    task.close()
    generator = torch.Generator().manual_seed(SEED)

    def case(state: Tensor) -> Case:
        known = model.normalizer.normalize("observation", state.expand(1, model.To, -1))
        condition = model.condition(known, {})

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return model.denoiser(x, t, condition.expand(len(x), -1))

        return denoise, torch.randn(1, model.T, model.spec.action_dim, generator=generator)

    return model.denoiser.schedule, (case(state) for state in states)


def timed(run: Callable[[], Tensor], repeats: int) -> tuple[Tensor, float, float]:
    """The result, the least milliseconds, and the least of the processor."""
    wall, cpu = [], []
    for _ in range(repeats):
        start, busy = time.perf_counter(), time.process_time()
        result = run()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - busy)
    return result, 1e3 * min(wall), 1e3 * min(cpu)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def compare(schedule: NoiseSchedule, cases: list[Case], table: Tableau, repeats: int) -> list[dict[str, float | str]]:
    """Rows of the sequential executor, and of the parallel one for every window and tolerance."""
    first: list[tuple[Tensor, float, float]] = []
    for denoise, x_T in cases:
        first.append(timed(lambda denoise=denoise, x_T=x_T: sample(denoise, table, x_T, seeded()), repeats))
    ms, cpu = (float(np.mean([entry[i] for entry in first])) for i in (1, 2))
    rows: list[dict[str, float | str]] = [
        {"executor": "sequential", "rounds": table.evaluations, "difference": 0.0, "ms": ms, "cpu_ms": cpu}
    ]
    settings: list[tuple[str, float, float | Tensor]] = [(f"{tolerance:g}", tolerance, 0.5) for tolerance in (1e-1, 1e-2, 1e-3)]
    settings.append(("tau 0.1", 0.1, ddpm_deviation(schedule, table)))
    for tolerance, value, scale in settings:
        for window in WINDOWS:
            sampler, rounds, differences, walls, cpus = PicardSampler(table, window, value, scale), [], [], [], []
            for (denoise, x_T), (expected, _, _) in zip(cases, first):
                calls = [0]

                def count(x: Tensor, t: Tensor, denoise: Denoise = denoise, calls: list[int] = calls) -> Tensor:
                    calls[0] += 1
                    return denoise(x, t)

                x_0, wall, busy = timed(lambda sampler=sampler, count=count, x_T=x_T: sampler(count, x_T, seeded()), repeats)
                rounds.append(calls[0] / repeats)
                differences.append(float((x_0 - expected).square().mean().sqrt()))
                walls.append(wall)
                cpus.append(busy)
            rows.append(
                {
                    "executor": f"window {window}",
                    "tolerance": tolerance,
                    "rounds": float(np.mean(rounds)),
                    "difference": max(differences),
                    "ms": float(np.mean(walls)),
                    "cpu_ms": float(np.mean(cpus)),
                    "times_fewer_rounds": table.evaluations / float(np.mean(rounds)),
                    "times_faster": ms / float(np.mean(walls)),
                    "times_less_cpu": cpu / float(np.mean(cpus)),
                }
            )
    return rows


def call_cost(case: Case, repeats: int) -> dict[str, float]:
    """Processor milliseconds of one call of the network with as many rows."""
    denoise, x_T = case
    cost = {}
    for rows in (1, *WINDOWS):
        x, t = x_T.expand(rows, -1, -1), torch.full((rows, 1, 1), 0.5)
        cost[str(rows)] = timed(lambda x=x, t=t: [denoise(x, t) for _ in range(20)][-1], repeats)[2] / 20
    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="checkpoints/pusht-diffusion-policy")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, dict[str, list[dict[str, float | str]]]] = {}
    cost: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for name, (schedule, cases) in (("mixture", mixture(args.samples)), (args.run, policy(args.run, args.samples))):
            drawn, result[name] = list(cases), {}
            cost[name] = call_cost(drawn[0], args.repeats)
            print(f"\n{name}: cpu ms of a call with rows", {rows: round(ms, 2) for rows, ms in cost[name].items()})
            for sampler in SAMPLERS:
                result[name][sampler] = rows = compare(schedule, drawn, solver(sampler, schedule, args.steps), args.repeats)
                print(f"\n{name}, {sampler}, {args.steps} steps; faster: in processor time")
                print(f"{'':12} tolerance  rounds  difference       ms   cpu ms   faster")
                for row in rows:
                    print(
                        f"{row['executor']:12} {row.get('tolerance', ''):>9} {row['rounds']:7.1f} {row['difference']:11.1e} "
                        f"{row['ms']:8.1f} {row['cpu_ms']:8.1f} {row.get('times_less_cpu', 1.0):8.2f}"
                    )
    if args.json:
        settings = {"steps": args.steps, "samples": args.samples, "repeats": args.repeats}
        Path(args.json).write_text(json.dumps({**settings, "seed": SEED, "call_cpu_ms": cost, "results": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
