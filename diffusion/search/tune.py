"""The best table for a denoiser and a number of evaluations: all hand-made ones, then evolution, a predictor and gradients.

What is found is never worse on the problem than the best hand-made table, since that stays in the choice throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import torch

from diffusion.optimal_steps import optimal_steps
from diffusion.schedule import NoiseSchedule
from diffusion.search.bespoke import bespoke, unrolled
from diffusion.search.candidate import METHODS, Candidate
from diffusion.search.evolutionary import evolve
from diffusion.search.predictor import predict_and_try
from diffusion.search.problem import Problem
from diffusion.solvers import SOLVERS, solver
from diffusion.solvers._spacing import SPACINGS
from diffusion.tableau import Tableau
from pilotwave.errors import UserError

FIRST = tuple(method for method in METHODS if method[1] in (0, method[0] + 1) and method[2] != "bh1")  # evolution starts with
TOP = 3  # spacings, by the error of DPM-Solver++ 2M, that it starts with
OPTIMAL = "optimal"  # the spacing that dynamic programming finds
Levels = dict[str, list[float]]


@dataclass(frozen=True)
class Tuned:
    """The table, the best hand-made one and its name, and the error after each stage: {"hand-made": ..., "evolution": ...}."""

    table: Tableau
    best_hand_made: Tableau
    hand_made: str
    errors: dict[str, float]


def spacings(problem: Problem, steps: int) -> Levels:
    """Levels (steps + 1) by the name of their spacing, those of Optimal Stepsize among them (fitted to the largest call)."""
    schedule = problem.schedule
    found = {name: spacing(schedule, steps).tolist() for name, spacing in SPACINGS.items()}
    call = max(problem.calls, key=lambda call: call.x_T.numel())
    found[OPTIMAL] = optimal_steps(call.predict, schedule, call.x_T, steps, max(50, 2 * steps), constrain=call.constrain)
    return {name: levels for name, levels in found.items() if all(t > s for t, s in pairwise(levels))}


def hand_made(problem: Problem, evaluations: int, levels: dict[int, Levels] | None = None) -> dict[str, Tableau]:
    """Every solver without noise, at every spacing, with exactly so many evaluations, by name: "unipc_2 log_snr".

    A table that is another's under a second name is left out, and a solver that the schedule does not define. `levels` is
    filled with what `spacings` gives for the numbers of steps.
    """
    levels = {} if levels is None else levels
    found: dict[str, Tableau] = {}
    known = set()
    for name in SOLVERS:  # the plainest first, whose name a table keeps
        steps = _steps(name, problem.schedule, evaluations)
        if steps is None:
            continue
        if steps not in levels:
            levels[steps] = spacings(problem, steps)
        for spacing, chosen in levels[steps].items():
            table = solver(name, problem.schedule, chosen)
            numbers = torch.cat([part.flatten() for part in unrolled(table)])
            same = tuple(numbers.mul(1e9).round().tolist())
            if same not in known and bool(numbers.isfinite().all()):
                known.add(same)
                found[f"{name} {spacing}"] = table
    return found


def _steps(name: str, schedule: NoiseSchedule, evaluations: int) -> int | None:
    """How many steps of a solver cost so many evaluations; None where none do, or where it adds noise or is not defined."""
    for steps in range(evaluations, 0, -1):
        try:
            table = solver(name, schedule, steps)
        except UserError:
            return None
        if table.stochastic:
            return None
        if table.evaluations == evaluations:
            return steps
    return None


def tune(
    problem: Problem,
    evaluations: int,
    *,
    seed: int = 0,
    generations: int = 8,
    stages: int = 6,
    iterations: int = 300,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tuned:
    """The table of `evaluations` network calls whose error on the problem is least; the same for the same seed.

    generations, stages and iterations: of `evolve`, `predict_and_try` and `bespoke`, 0 to leave one out. progress: called with
    (tables tried and iterations done, all of them).
    """
    if evaluations < 1:
        raise UserError(f"evaluations is {evaluations}; at least 1 is needed")
    levels: dict[int, Levels] = {}
    random, tables = Random(seed), hand_made(problem, evaluations, levels)
    own = levels[evaluations]
    seeds = len(FIRST) * min(TOP, len(own))
    total = len(tables) + len(own) + (seeds + 16 * generations + 12 * stages if evaluations > 1 else 0) + iterations
    done = 0

    def tick() -> None:
        nonlocal done
        done = min(done + 1, total)
        progress(done, total)

    def error(table: Tableau) -> float:
        tick()
        return problem.error(table)

    tried = {name: error(table) for name, table in tables.items()}
    best_made = min(tried, key=tried.__getitem__)
    best, errors = tables[best_made], {"hand-made": tried[best_made]}
    if evaluations > 1 and (generations or stages):  # one step leaves no choice of levels or methods
        ranked = {name: error(solver("dpmpp_2m", problem.schedule, levels)) for name, levels in own.items()}
        top = sorted(ranked, key=ranked.__getitem__)[:TOP]
        first = [Candidate.uniform(own[name], method) for name in top for method in FIRST]
        found = evolve(problem, first, random, generations=generations, tick=tick)
        for stage in ("evolution", "predictor"):
            if stage == "predictor":
                found = predict_and_try(problem, found, random, stages=stages, tick=tick)
            candidate = min(found, key=found.__getitem__)
            if found[candidate] < min(errors.values()):
                best = candidate.table(problem.schedule)
            errors[stage] = min(found[candidate], *errors.values())
    if iterations:
        best = bespoke(problem, best, iterations=iterations, generator=torch.Generator().manual_seed(seed), tick=tick)
        errors["bespoke"] = problem.error(best)
    progress(total, total)
    return Tuned(best, tables[best_made], best_made, errors)
