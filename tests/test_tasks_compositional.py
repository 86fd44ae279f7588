"""The compositional maze: what is shown is near, what is asked for is far."""

import h5py
import numpy as np
import pytest

import robots
from pilotwave.errors import UserError
from robots.collect import collect
from robots.tasks.compositional import LONGEST
from robots.tasks.pointmaze import cell_of


def moves(task, a, b):
    """Moves from cell to cell between positions (n, 2)."""
    index = [task.maze.index[tuple(cell_of(p).T)] for p in (a, b)]
    return task.maze.distance[index[0], index[1]]


def test_goals_are_far_and_episodes_reproducible():
    task = robots.make("pointmaze-compositional")
    observation = task.reset(range(300))
    away = moves(task, observation["state"][:, :2], observation["goal"])
    assert away.min() >= 12
    assert away.max() > 24
    assert len(np.unique(cell_of(observation["goal"]), axis=0)) > 60
    np.testing.assert_array_equal(task.reset([7])["goal"][0], observation["goal"][7])
    again = robots.make(task.spec.name, **task.spec.options)
    np.testing.assert_array_equal(again.reset([7])["goal"][0], observation["goal"][7])
    assert task.spec.horizon == 1300


def test_where_nothing_is_that_far_the_goal_is_the_farthest_cell():
    task = robots.make("pointmaze-compositional", maze="umaze", reach=1, apart=50)
    observation = task.reset(range(50))
    away = moves(task, observation["state"][:, :2], observation["goal"])
    start = task.maze.index[tuple(cell_of(observation["state"][:, :2]).T)]
    np.testing.assert_array_equal(away, task.maze.distance.max(1)[start])


@pytest.mark.parametrize("options", [{"reach": 0}, {"reach": 13}])
def test_impossible_distances_are_named(options):
    with pytest.raises(UserError, match="reach <= apart"):
        robots.make("pointmaze-compositional", **options)


def test_demonstrations_are_short_and_end_at_their_goals(tmp_path):
    facts = collect("pointmaze-compositional", 6000, tmp_path / "a.hdf5", seed=3)
    task = robots.make("pointmaze-compositional")
    with h5py.File(tmp_path / "a.hdf5") as file:
        states, goals, ends = np.asarray(file["observations"]), np.asarray(file["infos/goal"]), np.flatnonzero(file["timeouts"])
        actions = np.asarray(file["actions"])
    assert (len(states), len(ends), facts["reach"]) == (6000, facts["episodes"], 4)
    begins = np.concatenate([[0], ends[:-1] + 1])
    assert (ends - begins < LONGEST).all()
    away = moves(task, states[begins, :2], goals[begins])
    assert set(away) == {1, 2, 3, 4}
    for begin, end in zip(begins[:-1], ends[:-1]):
        assert (goals[begin : end + 1] == goals[begin]).all()
        distance = np.linalg.norm(states[begin : end + 1, :2] - goals[begin], axis=1)
        assert distance[-1] < 0.1 < distance[:-1].min()
    # each step is the simulator's answer to the recorded action
    task.reset_to(states[begins[:-1]], goals[begins[:-1]])
    np.testing.assert_allclose(task.step(actions[begins[:-1]])[0]["state"], states[begins[:-1] + 1], atol=1e-4)
    collect("pointmaze-compositional", 6000, tmp_path / "b.hdf5", seed=3)
    assert (tmp_path / "a.hdf5").read_bytes() == (tmp_path / "b.hdf5").read_bytes()
