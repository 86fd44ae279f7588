"""SafeDiffuser on a small untrained Diffuser: whatever it draws, the paths are safe or said not to be, the pins hold, and the
controller carries hazards from the observation to the plan."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import robots
from offline import DataSpec, TrajectoryStore
from pilotwave.config import compose
from pilotwave.errors import UserError
from planners import Diffuser
from planners.diffuser import UNSAFE
from planners.places import Places
from planners.plan import Plan
from planners.safe import FAR, METHODS, Constraint, SafeController, SafeDiffuser
from robots.barriers import HalfSpace, Superellipse, from_rows, values


@pytest.fixture(scope="module")
def diffuser():
    """Untrained, of pointmaze-large's shape and units, its plans noise all over the maze."""
    settings = OmegaConf.to_container(compose("train", ["planner=diffuser"]).planner, resolve=True)
    settings |= {"horizon": 8, "stride": 16, "network": {"name": "mlp", "width": 32, "depth": 1}}
    settings |= {"sampler": {"name": "ddim", "steps": 4}}
    spec = DataSpec(task="pointmaze-large", observation_dim=4, action_dim=2, dt=0.01, goal_dim=2)
    torch.manual_seed(0)
    planner = Diffuser(spec, settings)
    rng = np.random.default_rng(0)
    observation = np.concatenate([rng.uniform(0, 10, (400, 2)), rng.normal(size=(400, 2))], 1).astype(np.float32)
    columns = {"observation": observation, "action": np.zeros((400, 2), np.float32)}
    planner.prepare(TrajectoryStore(columns, np.array([400]), {}, 0.01, "toy", {}))
    planner.longest_step.fill_(100.0)
    return planner.eval()


def hazards(*rows):
    return np.array([[[*row, 0.0, 0.0] for row in rows]], dtype=np.float32)


START, GOAL = np.array([[1.0, 1.0, 0.0, 0.0]], np.float32), np.array([[8.0, 9.0]], np.float32)
TWO = hazards((4.5, 5.3, 1.0, 1.0, 2.0), (1.5, 4.8, 1.0, 1.0, 4.0))


@pytest.mark.parametrize("method", METHODS)
def test_paths_are_safe_to_the_margin_or_said_not_to_be(diffuser, method):
    planner = SafeDiffuser(diffuser, method, margin=0.07, reach=100.0)
    plan = planner.plan(START, GOAL, 12, hazards=TWO, generator=torch.Generator().manual_seed(0))
    assert plan.observations.shape == (1, 12, 7 * 4 + 1, 4)
    b = values(from_rows(TWO), plan.observations.reshape(1, -1, 4).astype(float)).min(-1).reshape(12, -1)
    safe = plan.values[0] > -UNSAFE / 2
    assert safe.any()
    assert (b[safe] >= 0.07 - 1e-3).all()
    np.testing.assert_allclose(plan.observations[0, :, 0], np.repeat(START, 12, 0), atol=1e-4)
    ends = np.linalg.norm(plan.observations[0, :, -1, :2] - GOAL, axis=1)
    assert (ends < 1e-3).all()
    unguarded = diffuser.plan(START, GOAL, 12, generator=torch.Generator().manual_seed(0))
    assert values(from_rows(TWO), unguarded.observations.reshape(1, -1, 4).astype(float)).min() < 0


def test_states_are_held_while_sampling_as_each_method_says(diffuser):
    inside = torch.tensor([[4.5, 5.0, 0.0, 0.0]]).repeat(8, 1)[None]
    x = torch.cat([diffuser.normalizer.normalize("observation", inside), torch.zeros(1, 8, 2)], -1)

    def depth(method, t):
        constraint = Constraint(SafeDiffuser(diffuser, method, margin=0.05, hard=0.3, depth=1.0), from_rows(TWO))
        states = diffuser.normalizer.denormalize("observation", constraint.during(x, torch.tensor(t))[..., :4])
        return float(values(from_rows(TWO), states).min())

    assert depth("ros", 0.9) == pytest.approx(0.05, abs=1e-3)
    assert depth("res", 0.9) == pytest.approx(-0.7, abs=1e-3)
    assert depth("res", 0.2) == pytest.approx(0.05, abs=1e-3)
    assert depth("tvs", 0.3) == pytest.approx(0.05 - 0.3, abs=1e-3)
    assert depth("tvs", 0.0) == pytest.approx(0.05, abs=1e-3)
    assert depth("correct", 0.0) == pytest.approx(-0.7, abs=1e-3)


def test_a_plan_bent_too_far_counts_as_one_through_the_obstacle(diffuser):
    straight = torch.linspace(0, 1, 8)[:, None] * torch.tensor([[6.0, 0.0, 0.0, 0.0]]) + torch.tensor([1.0, 5.3, 0, 0])
    wall = from_rows(hazards((4.5, 6.0, 1.0, 1.0, 2.0)))  # moved by 0.35 to stay 0.05 away
    for reach, expected in ((0.25, False), (0.45, True)):
        constraint = Constraint(SafeDiffuser(diffuser, "correct", reach=reach), wall)
        assert bool(constraint.after(straight[None], None).safe[0]) is expected


def test_moving_hazards_are_met_where_they_will_be(diffuser):
    constraint = Constraint(
        SafeDiffuser(diffuser, "correct", margin=0.0, ahead=10.0, reach=10.0),
        [Superellipse((0.0, 5.0), (0.5, 0.5), velocity=(2.0, 0.0))],
    )
    still = torch.tensor([1.12, 5.05, 0.0, 0.0]).repeat(1, 8, 1)  # the hazard is there after 0.56 s, in the path's middle
    path = constraint.after(still, None).path[0, :, :2]
    moved = (path - still[0, :1, :2]).norm(dim=-1)
    assert moved[0] == 0
    assert moved[14] > 0.3
    assert moved[-1] == 0


def test_a_robot_inside_the_margin_may_leave_it(diffuser):
    planner = SafeDiffuser(diffuser, "correct", margin=0.1, reach=100.0)
    start = np.array([[4.5, 6.34, 0.0, 0.0]], np.float32)  # 0.04 from the ellipse
    plan = planner.plan(start, GOAL, 8, hazards=TWO, generator=torch.Generator().manual_seed(0))
    assert plan.values.max() > -UNSAFE / 2


def test_constant_barriers_hold_without_any_hazards(diffuser):
    planner = SafeDiffuser(diffuser, "correct", reach=100.0)
    plan = planner.plan(
        START, np.array([[3.0, 9.0]]), 4, barriers=[HalfSpace((1.0, 0.0), 5.0)], generator=torch.Generator().manual_seed(0)
    )
    assert plan.observations[..., 0].max() <= 5.0 - 0.05 + 1e-4
    assert planner.plan(START, GOAL, 2, generator=torch.Generator().manual_seed(0)).values.min() > -UNSAFE / 2


def test_the_controller_takes_hazards_from_the_observation_and_stands_without_a_safe_plan(diffuser):
    task = robots.make("pointmaze-large-hazards")
    controller = diffuser.controller(task.spec, safety="correct", samples=4)
    assert isinstance(controller, SafeController)
    controller.reset(2)
    history = {
        "state": np.repeat(START, 2, 0)[:, None],
        "goal": np.repeat(GOAL, 2, 0)[:, None],
        # far from the first robot, over all the ways of the second
        "hazards": np.concatenate([hazards((50.0, 50.0, 1.0, 1.0, 2.0)), hazards((4.5, 5.0, 3.0, 3.0, 2.0))])[:, None],
    }
    controller.likely = -UNSAFE / 2
    chunk = controller.act(history, 0)
    np.testing.assert_array_equal(controller.waiting, [False, True])
    np.testing.assert_allclose(chunk.references[1], np.repeat(START, chunk.references.shape[1], 0), atol=1e-5)
    assert np.ptp(chunk.references[0, :, 0]) > 1
    assert chunk.dt == pytest.approx(0.04)


def test_a_plan_that_a_hazard_moved_into_is_given_up(diffuser):
    task = robots.make("pointmaze-large-hazards")
    controller = diffuser.controller(task.spec, safety="correct", samples=4)
    controller.likely, controller.planner.reach = -np.inf, 100.0
    history = {"state": START[:, None], "goal": GOAL[:, None], "hazards": TWO[:, None]}
    before = controller.act(history, 0).references.copy()
    np.testing.assert_array_equal(controller.act(history, 16).plan, controller.plan.observations[:, 0, :, :2])
    farthest = before[0, np.linalg.norm(before[0, :, :2] - START[0, :2], axis=1).argmax(), :2]
    moved = hazards((*farthest, 0.5, 0.5, 2.0), (1.5, 4.8, 1.0, 1.0, 4.0))
    assert values(from_rows(moved), START.astype(float)).min() > 0.1
    controller.act({**history, "hazards": moved[:, None]}, 16)
    assert controller.begun[0] == 16


def test_what_does_not_fit_is_refused(diffuser):
    task = robots.make("pointmaze-large-hazards")
    with pytest.raises(UserError, match="safety"):
        diffuser.controller(task.spec, safety="rso")
    with pytest.raises(UserError, match="margin: nothing holds it"):
        diffuser.controller(task.spec, margin=0.1)
    with pytest.raises(UserError, match="are of plans without goals"):
        diffuser.controller(task.spec, safety="correct", rising=0.5)


@pytest.fixture
def straight_lines(diffuser):
    """A controller whose plans are straight lines to where it asks, so that it must pass a hazard by way of a third place."""
    controller = diffuser.controller(robots.make("pointmaze-large-hazards").spec, safety="correct", samples=8)
    # chords of the ways keep clear too
    places = controller.planner.places = Places(np.ones((100, 100), bool), np.zeros(2), 0.1, clearance=0.4)

    def plan(observation, goal, samples=1, *, barriers=(), hazards=None, sampler=None, generator=None):
        share = np.linspace(0, 1, controller.planner.H)[:, None]
        path = observation[:, None, :2] + share * (goal - observation[:, :2])[:, None]
        path = np.concatenate([path, np.zeros_like(path)], -1)
        unsafe = (values(from_rows(hazards), path.astype(float)) < 0).any((1, 2)) | (places.away(path[..., :2]) > 0).any(1)
        every = np.repeat(path[:, None], samples, 1).astype(np.float32)
        arrivals = np.full((len(path), samples), 7)
        return Plan(every, None, np.repeat((-1.0 - UNSAFE * unsafe)[:, None], samples, 1), arrivals)

    controller.planner.plan = plan
    return controller


def followed(controller, state, goal, hazard):
    """The path of a robot that carries out perfectly what the controller plans."""
    controller.reset(1)
    path = [state[0, :2]]
    for step in range(0, 4000, 16):
        seen = {"state": state[:, None], "goal": goal[:, None], "hazards": hazard[:, None]}
        planned = controller.act(seen, step).references
        path += list(planned[0, :4, :2])
        state = planned[:, 4].copy()
        state[:, 2:] = 0
        if np.linalg.norm(state[0, :2] - goal) < 0.5:
            break
    return np.stack(path)


def test_a_closed_way_is_gone_round(straight_lines):
    state, goal = np.array([[4.0, 1.0, 0.0, 0.0]], np.float32), np.array([[4.0, 9.0]], np.float32)
    closed = hazards((4.0, 5.0, 1.5, 1.5, 2.0))
    path = followed(straight_lines, state, goal, closed)
    assert np.linalg.norm(path[-1] - goal[0]) < 0.7
    assert values(from_rows(closed), path[None].astype(float)).min() >= 0


def test_ways_pass_local_traps_until_nothing_else_is_left(straight_lines):
    goal, none = np.array([8.0, 5.0], np.float32), np.zeros((0, 7))
    straight_lines.reset(1)
    straight = straight_lines._way(0, np.array([2.0, 5.0]), goal, none)
    assert np.abs(straight[:, 1] - 5).max() < 0.3
    straight_lines.traps[0, 0, :4], straight_lines.trapped[0] = (5.0, 5.0, 0.25, 0.25), 1
    round_it = straight_lines._way(0, np.array([2.0, 5.0]), goal, none)
    assert values(from_rows(straight_lines.traps[:, :1]), round_it[None]).min() > 0
    straight_lines.traps[0, 1, :4], straight_lines.trapped[0] = (5.0, 5.0, 0.25, 60.0), 2
    np.testing.assert_array_equal(straight_lines._way(0, np.array([2.0, 5.0]), goal, none), straight)


def test_plans_that_leave_the_places_of_the_data_count_as_unsafe(diffuser):
    path = torch.linspace(0, 1, 8)[:, None] * torch.tensor([[6.0, 0.0, 0.0, 0.0]]) + torch.tensor([1.0, 5.0, 0, 0])
    seen = np.ones((100, 100), bool)
    for wall, expected in ((3, True), (8, False)):
        parted = seen.copy()
        parted[40 : 40 + wall] = False
        constraint = Constraint(SafeDiffuser(diffuser, "correct", places=Places(parted, np.zeros(2), 0.1)), [FAR])
        assert bool(constraint.after(path[None], None).safe[0]) is expected
    # the robot itself may stand where no demonstration was
    within = SafeDiffuser(diffuser, "correct", places=Places(seen, np.array([1.5, 0.0]), 0.1))
    assert bool(Constraint(within, [FAR]).after(path[None], None).safe[0])
