"""Hazards: published places, safe and connected starts and goals, margins of what was executed, each seed its own."""

import numpy as np
import pytest

import robots
from pilotwave.errors import UserError
from robots.barriers import from_rows, values
from robots.collect import Demonstrator
from robots.rollout import rollout
from robots.safety_filter import SafetyFilter
from robots.tasks.hazards import CLEAR
from robots.tasks.pointmaze import cell_of

NAMES = ["hazards", "narrow", "random-hazards", "moving-hazards"]


def make(name, **options):
    return robots.make(f"pointmaze-large-{name}", **options)


def test_the_published_two_lie_where_safediffuser_has_them():
    """Its code: b = (obs_0 - (5 - 0.5))^2 + (obs_1 - (5.8 - 0.5))^2 - 1, and power 4 about (2 - 0.5, 5.3 - 0.5)."""
    task = make("hazards")
    hazards = task.reset([0])["hazards"].astype(float)
    x = np.random.default_rng(0).uniform(0, 10, (1, 500, 2))
    b = values(from_rows(hazards), x)
    published = [((x - (4.5, 5.3)) ** 2).sum(-1) - 1, ((x - (1.5, 4.8)) ** 4).sum(-1) - 1]
    np.testing.assert_array_equal(b > 0, np.stack(published, -1) > 0)


@pytest.mark.parametrize("name", NAMES)
def test_starts_and_goals_are_clear_and_joined(name):
    task = make(name)
    observation = task.reset(range(30))
    barriers = from_rows(observation["hazards"])
    for places in (observation["state"][:, :2], observation["goal"]):
        assert values(barriers, places.astype(float)).min() >= CLEAR - 1e-5
    row, column = cell_of(observation["state"][:, :2]).T
    assert not task.maze.walls[row, column].any()
    # a flood over coarse cells of the maze's floor, hazards cut out, as another way to ask whether a way exists
    for i in range(5):
        middle = task._grid.reshape(-1, 2)
        free = task._open.reshape(-1) & (values(from_rows(task._hazards[i].everywhere()), middle[None]).min(-1)[0] >= 0.05)
        free = free.reshape(task._open.shape)
        reached = np.zeros_like(free)
        reached[tuple(np.rint(observation["state"][i, :2] / 0.05).astype(int))] = True
        for _ in range(2000):
            wider = reached.copy()
            wider[1:] |= reached[:-1]
            wider[:-1] |= reached[1:]
            wider[:, 1:] |= reached[:, :-1]
            wider[:, :-1] |= reached[:, 1:]
            wider &= free
            if (wider == reached).all():
                break
            reached = wider
        assert reached[tuple(np.rint(observation["goal"][i] / 0.05).astype(int))]


@pytest.mark.parametrize("name", NAMES)
def test_episodes_depend_on_their_own_seed_alone_and_repeat(name):
    task = make(name)
    together = task.reset([3, 4, 5])
    alone = task.reset([5])
    for key, value in alone.items():
        np.testing.assert_array_equal(value[0], together[key][2])
    states = []
    snapshot = task.snapshot()
    for _ in range(2):
        task.restore(snapshot)
        for _ in range(20):
            observation, _, _, info = task.step(np.array([[0.5, -1.0]]))
        states.append((observation["state"], observation["hazards"], info["margin"]))
    for first, second in zip(*states):
        np.testing.assert_array_equal(first, second)


def test_the_unguarded_mazes_observation_and_goal_stay_and_hazards_differ_by_episode():
    observation = make("random-hazards").reset([0, 1])
    assert observation["state"].shape == (2, 4)
    assert observation["goal"].shape == (2, 2)
    assert observation["hazards"].shape == (2, 2, 7)
    assert (observation["hazards"][0] != observation["hazards"][1]).any()


def test_moving_hazards_move_as_their_velocity_says_and_never_close_a_corridor():
    task = make("moving-hazards")
    before = task.reset([0])["hazards"]
    steps = [task.step(np.zeros((1, 2)))[0]["hazards"] for _ in range(400)]
    np.testing.assert_allclose(steps[0][..., :2] - before[..., :2], 0.01 * before[..., 5:], atol=1e-4)
    np.testing.assert_allclose(steps[-1], before, atol=1e-4)  # one period
    swings = np.array(steps)[:, 0, :, 1]
    # corridors beside them: columns 3.4 to 4.2 and 5.4 to 6.2
    assert swings.min() - 0.8 >= 3.4 + 0.29
    assert swings.max() + 0.8 <= 6.2 - 0.29


def test_margin_is_the_executed_states_and_decides_the_score():
    task = make("hazards", horizon=60)

    class Right:
        """Full force towards the ellipse."""

        replan_every, history, evaluations = 1, 1, 0
        tracker = robots.DirectTracker()

        def reset(self, n):
            pass

        def act(self, history, step):
            state = history["state"][:, -1, :2]
            return robots.Chunk((np.array([4.5, 5.3]) - state)[:, None], 0.01)

    start = np.array([[4.8, 7.0, 0.0, 0.0]])
    task.reset = lambda seeds: task.reset_to(start, np.array([[4.8, 8.0]]))
    bare = rollout(task, Right(), 1, 0)
    assert bare["violations"]["episode_rate"] == 1
    assert bare["violations"]["worst_margin"] < -0.3
    assert bare["per_episode"]["margin"] == [pytest.approx(bare["violations"]["worst_margin"])]
    guarded = rollout(task, Right(), 1, 0, guard=SafetyFilter(task.linear_model(), margin=0.02))
    assert guarded["violations"]["episode_rate"] == 0
    assert 0.015 < guarded["violations"]["worst_margin"] < 0.1
    assert guarded["filter"]["changed_rate"] > 0
    assert guarded["filter"]["infeasible_steps"] == 0


def test_the_balls_model_is_the_simulators():
    task = make("hazards")
    model = task.linear_model()
    rng = np.random.default_rng(0)
    state = np.array([[3.0, 1.8, 1.0, -0.5]])
    task.reset_to(state, state[:, :2])
    for _ in range(5):
        u = rng.uniform(-1, 1, (1, 2))
        expected = task._state[:, 1:] @ model.A.T + u @ model.B.T
        task.step(u)
        np.testing.assert_allclose(task._state[:, 1:], expected, atol=1e-9)


def test_hazards_are_drawn():
    task = make("hazards")
    task.reset([0])
    plain = robots.make("pointmaze-large")
    plain.reset_to(task._state[:, 1:], task._goal)
    row = task.to_pixels(np.array([[4.5, 6.0], [7.0, 1.0]])).round().astype(int)
    pictures = task.render(0), plain.render(0)
    assert (pictures[0][row[0, 1], row[0, 0]] != pictures[1][row[0, 1], row[0, 0]]).any()
    assert (pictures[0][row[1, 1], row[1, 0]] == pictures[1][row[1, 1], row[1, 0]]).all()


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="chain"):
        make("hazards", goal="chain")
    with pytest.raises(UserError, match="published"):
        robots.tasks.hazards.HazardMaze("publishd")


@pytest.mark.parametrize("name", NAMES)
def test_the_filter_alone_keeps_a_driver_out_that_knows_of_no_hazards(name):
    """Walls included, which the filter does not know: it is met at full speed beside them."""
    task = make(name, horizon=200)
    driver = Demonstrator(task, 0.5)
    bare = rollout(task, driver, 16, 20020, num_envs=16)
    guarded = rollout(task, driver, 16, 20020, num_envs=16, guard=SafetyFilter(task.linear_model(), margin=0.02))
    assert bare["violations"]["episode_rate"] > 0
    assert guarded["violations"]["worst_margin"] > 0.01
