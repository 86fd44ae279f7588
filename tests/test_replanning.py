"""Deciding at every step loses no return: a plan that works is kept."""

from pathlib import Path

import pytest

import planners
import robots
from robots.rollout import rollout

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "pointmaze-umaze-diffuser"


@pytest.mark.slow
def test_deciding_at_every_step_loses_no_return():
    planner = planners.load(CHECKPOINT)
    task = robots.make("pointmaze-umaze")
    returns = {}
    for every in (0, 1):
        controller = planner.controller(task.spec, replan_every=every, samples=4, seed=0)
        returns[every] = rollout(task, controller, 10, seed=500)["return_mean"]
    assert returns[1] > 0.95 * returns[0]
