"""Deciding at every step loses no return: a plan that works is kept. So it is when other robots' episodes have ended."""

from pathlib import Path

import numpy as np
import pytest
import torch

import planners
import robots
from offline import DataSpec
from pilotwave.errors import UserError
from planners.controller import PlanController
from planners.plan import Plan
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


class Leaning:
    """A planner of the hopper whose actions are a function of the state, and which plans further than it is asked again."""

    H, stride = 3, 1
    spec = DataSpec("hopper", 11, 3, 0.008)

    def plan(self, observation, goal, samples, **options):
        actions = np.tanh(observation[:, None, None, [5, 6, 7]] * np.arange(1, 4)[:, None])
        states = np.repeat(observation[:, None, None], 3, 2)
        return Plan(states, actions, np.zeros((len(observation), 1)))


def test_plans_go_on_when_other_robots_have_fallen():
    task = robots.make("hopper")
    settings = {"replan_every": 2, "samples": 1, "track": "actions", "kp": 0.0, "kd": 0.0, "evaluations": 1}
    together = rollout(task, PlanController(Leaning(), task.spec, {}, **settings), 6, timing_decisions=0)["per_episode"]
    alone = [rollout(task, PlanController(Leaning(), task.spec, {}, **settings), 1, seed=i)["return_mean"] for i in range(6)]
    assert len(set(together["length"])) > 1
    np.testing.assert_array_equal(together["return"], alone)


def test_networks_compute_in_the_asked_precision_where_the_hardware_does(monkeypatch):
    class Network(Leaning, torch.nn.Linear):
        def plan(self, observation, goal, samples, **options):
            self.computed = self(torch.zeros(1, 2)).dtype
            return super().plan(observation, goal, samples)

    task, network = robots.make("hopper"), Network(2, 2)
    settings = {"replan_every": 1, "samples": 1, "track": "actions", "kp": 0.0, "kd": 0.0, "evaluations": 1}
    for hardware, precision, dtype in (
        (True, "fp32", torch.float32), (True, "bf16", torch.bfloat16), (False, "bf16", torch.float32)
    ):  # fmt: skip
        monkeypatch.setattr("planners.controller.has_bf16", lambda device, known=hardware: known)
        controller = PlanController(network, task.spec, {}, precision=precision, **settings)
        controller.act({"state": np.zeros((1, 1, 11), np.float32)}, 0)
        assert network.computed == dtype
    with pytest.raises(UserError, match=r"precision.*did you mean 'bf16'"):
        PlanController(network, task.spec, {}, precision="bf61", **settings)
