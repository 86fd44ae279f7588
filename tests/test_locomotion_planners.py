"""A shipped planner runs: the hopper, for its first steps."""

from pathlib import Path

import planners
import robots
import robots.behaviour
from robots.rollout import rollout

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "hopper-veteran"


def test_a_shipped_planner_hops_where_a_random_policy_falls():
    task = robots.make("hopper", horizon=120)
    planner, random = planners.load(CHECKPOINT), robots.behaviour.load(CHECKPOINT.with_name("hopper-behaviour"))
    returns = [
        rollout(task, controller, 4, seed=20000, timing_decisions=0)["return_mean"]
        for controller in (planner.controller(task.spec, samples=4), random.controller(task.spec, quality="random"))
    ]
    assert returns[0] > 200 > 100 > returns[1]
