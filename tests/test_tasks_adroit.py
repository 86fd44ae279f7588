"""Adroit door: gymnasium-robotics' simulator, D4RL's reward, many copies on one model."""

from __future__ import annotations

import numpy as np
import pytest

import robots
from pilotwave.errors import UserError


@pytest.fixture(scope="module")
def task():
    task = robots.make("adroit-door")
    yield task
    task.close()


def test_steps_are_gymnasium_robotics_and_the_reward_is_d4rls(task):
    from gymnasium_robotics.envs.adroit_hand.adroit_door import AdroitHandDoorEnv

    env = AdroitHandDoorEnv()
    obs = task.reset([3, 4])
    theirs, _ = env.reset(seed=4)
    rng = np.random.default_rng(0)
    for _ in range(20):
        np.testing.assert_allclose(obs["state"][1], theirs, atol=1e-6)
        action = rng.uniform(-1.5, 1.5, (2, 28))
        obs, reward, terminated, info = task.step(action)
        theirs, their_reward, _, _, their_info = env.step(action[1])
        # D4RL punishes the distance of palm and handle; gymnasium-robotics 1.2.1 to 1.4.2 rewards it
        sign = np.sign(their_reward - reward[1])
        assert reward[1] == pytest.approx(their_reward - (0.2 * np.linalg.norm(theirs[35:38]) if sign > 0 else 0))
        assert info["success"][1] == their_info["success"]
    assert not terminated.any()
    env.close()


def test_random_actions_score_zero(task):
    """D4RL's reference return of a random policy is reproduced: the reward and the normalization agree."""
    from robots.rollout import normalized

    task.reset(range(4))
    rng, returns = np.random.default_rng(0), np.zeros(4)
    for _ in range(task.spec.horizon):
        returns += task.step(rng.uniform(-1, 1, (4, 28)))[1]
    np.testing.assert_allclose(normalized(returns, task.spec), 0, atol=0.2)


def test_copies_do_not_touch_each_other(task):
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (10, 3, 28))
    together = [task.reset([5, 6, 7])["state"][1], *(task.step(action)[0]["state"][1] for action in actions)]
    alone = [task.reset([6])["state"][0], *(task.step(action[1:2])[0]["state"][0] for action in actions)]
    np.testing.assert_array_equal(together, alone)


def test_snapshot_gives_the_same_future(task):
    rng = np.random.default_rng(0)
    task.reset([1, 2])
    for _ in range(10):
        task.step(rng.uniform(-1, 1, (2, 28)))
    kept = task.snapshot()
    actions = rng.uniform(-1, 1, (10, 2, 28))
    live = [task.step(action)[0]["state"] for action in actions]
    task.reset([8, 9])
    task.restore(kept)
    np.testing.assert_array_equal(live, [task.step(action)[0]["state"] for action in actions])


def test_reset_from_recorded_states(task):
    obs = task.reset([0, 1])["state"]
    states = {"qpos": np.zeros((2, 30)), "qvel": np.zeros((2, 30))}
    states["door_body_pos"] = np.array([[-0.15, 0.24, 0.38], [-0.25, 0.3, 0.3]])
    states["qpos"][1, 3] = 0.2
    placed = task.reset_from(states)["state"]
    np.testing.assert_allclose(placed[:, 2], [0, 0.2], atol=1e-6)
    # the handle moves with the door frame
    moved = placed[0, 32:35] - placed[1, 32:35]
    np.testing.assert_allclose(moved, states["door_body_pos"][0] - states["door_body_pos"][1], atol=1e-6)
    assert not np.allclose(placed, obs)
    with pytest.raises(UserError, match="door_body_pos"):
        task.reset_from({"qpos": np.zeros((2, 30)), "qvel": np.zeros((2, 30))})


def test_doors_stand_where_the_reset_distribution_says(task):
    handles = task.reset(range(40))["state"][:, 32:35]
    spread = handles.max(axis=0) - handles.min(axis=0)
    limits = np.array([0.1, 0.1, 0.098])
    assert (spread <= limits + 1e-6).all()
    assert (spread > 0.7 * limits).all()


def test_spec_names_every_feature(task):
    assert len(task.spec.observation_names) == len(set(task.spec.observation_names)) == 39
    assert len(task.spec.action_names) == 28
    assert task.spec.horizon == 200
    assert robots.make("adroit-door", horizon=300).spec.horizon == 300
