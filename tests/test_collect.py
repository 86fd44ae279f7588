"""Collection: D4RL's columns, physically continuous episodes, the same file every time, whole or not at all."""

from __future__ import annotations

import time

import h5py
import numpy as np
import pytest

import robots
from pilotwave.errors import UserError
from robots.collect import collect
from robots.tasks.pointmaze import cell_of


def read(path):
    with h5py.File(path) as file:
        found: list[str] = []
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
        return {name: file[name][:] for name in found}, dict(file.attrs)


@pytest.fixture(scope="module")
def umaze(tmp_path_factory):
    path = tmp_path_factory.mktemp("collect") / "umaze.hdf5"
    facts = collect("pointmaze-umaze", 8_000, path, seed=3)
    return path, facts


def test_columns_are_d4rls(umaze):
    data, attributes = read(umaze[0])
    shapes = {name: column.shape for name, column in data.items()}
    n = 8_000
    assert shapes == {
        "observations": (n, 4), "actions": (n, 2), "rewards": (n,), "terminals": (n,), "timeouts": (n,),
        "infos/goal": (n, 2), "infos/qpos": (n, 2), "infos/qvel": (n, 2),
    }  # fmt: skip
    assert data["observations"].dtype == data["actions"].dtype == np.float32
    assert not data["terminals"].any()
    assert data["timeouts"][-1]
    assert data["timeouts"].sum() == umaze[1]["episodes"] == 4
    assert attributes["task"] == "pointmaze-umaze"
    assert attributes["dt"] == 0.01
    assert np.abs(data["actions"]).max() <= 1


def test_recorded_actions_lead_to_recorded_states_and_rewards(umaze):
    """Every step inside an episode is the simulator's, across changes of goal too: nothing is teleported."""
    data, _ = read(umaze[0])
    inside = np.flatnonzero(~data["timeouts"])[::17]
    task = robots.make("pointmaze-umaze", goal="fixed")
    fixed = np.tile(task.maze.goal, (len(inside), 1))
    task.reset_to(data["observations"][inside], fixed)
    obs, reward, _, _ = task.step(data["actions"][inside])
    np.testing.assert_allclose(obs["state"], data["observations"][inside + 1], atol=1e-5)
    np.testing.assert_array_equal(reward, data["rewards"][inside])
    changes = (np.diff(data["infos/goal"], axis=0) != 0).any(axis=1)
    assert (changes & ~data["timeouts"][:-1]).sum() == umaze[1]["goals_reached"]
    jumps = np.linalg.norm(np.diff(data["observations"][:, :2], axis=0), axis=1)
    assert jumps[~data["timeouts"][:-1]].max() < 0.08


def test_the_data_covers_the_maze_and_reaches_its_goals(umaze):
    data, _ = read(umaze[0])
    task = robots.make("pointmaze-umaze")
    visited = np.unique(cell_of(data["observations"][:, :2]), axis=0)
    np.testing.assert_array_equal(visited, task.maze.cells)
    assert umaze[1]["goals_reached"] > 60
    # D4RL's noise: the clipped PD action plus 0.5, so that even a held direction varies from step to step
    change = np.abs(np.diff(data["actions"], axis=0)).mean()
    assert 0.2 < change < 0.8


def test_noise_can_be_left_out(tmp_path):
    collect("pointmaze-umaze", 2_000, tmp_path / "calm.hdf5", noise=0.0)
    data, _ = read(tmp_path / "calm.hdf5")
    assert np.abs(np.diff(data["actions"], axis=0)).mean() < 0.15


def test_same_arguments_same_data(umaze, tmp_path):
    collect("pointmaze-umaze", 8_000, tmp_path / "again.hdf5", seed=3)
    first, again = read(umaze[0])[0], read(tmp_path / "again.hdf5")[0]
    for name, column in first.items():
        np.testing.assert_array_equal(column, again[name])
    collect("pointmaze-umaze", 8_000, tmp_path / "other.hdf5", seed=4)
    assert not np.array_equal(first["actions"], read(tmp_path / "other.hdf5")[0]["actions"])


@pytest.mark.parametrize("steps", [1, 3, 10, 1001])
def test_any_number_of_steps(steps, tmp_path):
    calls = []
    facts = collect("pointmaze-medium", steps, tmp_path / "few.hdf5", progress=lambda *args: calls.append(args))
    data, _ = read(tmp_path / "few.hdf5")
    assert {len(column) for column in data.values()} == {steps}
    assert data["timeouts"].sum() == facts["episodes"]
    assert calls[-1] == (steps, steps)


def test_a_maze_of_the_users(tmp_path):
    (tmp_path / "mine.txt").write_text("#######\n#OOOOO#\n#O###O#\n#OOOOO#\n#######\n")
    facts = collect(str(tmp_path / "mine.txt"), 3_000, tmp_path / "mine.hdf5", goal="chain")
    assert facts["goals_reached"] > 10
    assert read(tmp_path / "mine.hdf5")[1]["task"] == "pointmaze"


def test_mistakes_are_named_and_leave_nothing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="steps=0"):
        collect("pointmaze-umaze", 0, tmp_path / "a.hdf5")
    with pytest.raises(UserError, match="noise=-1"):
        collect("pointmaze-umaze", 10, tmp_path / "a.hdf5", noise=-1)
    with pytest.raises(UserError, match="no scripted controller for task 'pusht'"):
        collect("pusht", 10, tmp_path / "a.hdf5")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        collect("pointmaze-umaze", 10, tmp_path / "file" / "a.hdf5")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect("pointmaze-umaze", 10_000, tmp_path / "a.hdf5", progress=stop)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]


@pytest.mark.slow
def test_fifteen_thousand_steps_a_second(tmp_path):
    began = time.perf_counter()
    collect("pointmaze-large", 200_000, tmp_path / "large.hdf5")
    assert 200_000 / (time.perf_counter() - began) > 15_000
