"""PushT: gym-pusht's simulator, Diffusion Policy's observation."""

from __future__ import annotations

import numpy as np
import pytest

import robots
from pilotwave.errors import UserError
from robots.tasks.pusht import KEYPOINTS, keypoints


def test_reset_and_steps_are_gym_pushts():
    from gym_pusht.envs.pusht import PushTEnv

    task, env = robots.make("pusht"), PushTEnv(obs_type="state")
    obs = task.reset([7, 8])
    theirs, _ = env.reset(seed=8)
    rng = np.random.default_rng(0)
    for _ in range(15):
        np.testing.assert_allclose(obs["state"][1, :2], theirs[:2], rtol=1e-6)
        np.testing.assert_allclose(obs["state"][1, 2:], keypoints(theirs[2:5]).ravel(), rtol=1e-5)
        action = rng.uniform(100, 400, (2, 2))
        obs, reward, _, info = task.step(action)
        theirs, their_reward, _, _, their_info = env.step(action[1])
        assert reward[1] == pytest.approx(their_reward)
        assert info["coverage"][1] == pytest.approx(their_info["coverage"])


def test_keypoints_follow_the_block():
    # a quarter turn sends the block's (x, y) to (-y, x)
    turned = keypoints(np.array([100.0, 200.0, np.pi / 2]))
    np.testing.assert_allclose(turned, np.stack([100 - KEYPOINTS[:, 1], 200 + KEYPOINTS[:, 0]], -1))
    # all nine lie on the T: a bar of 120 x 30 and a stem of 30 x 90 (pixels), up to the rounding of where they were put
    x, y = KEYPOINTS.T
    bar = (np.abs(x) <= 62) & (y >= -2) & (y <= 32)
    stem = (np.abs(x) <= 17) & (y >= 28) & (y <= 123)
    assert (
        bar | stem | (np.abs(KEYPOINTS - (39.0, 32.8)).max(1) < 1) | (np.abs(KEYPOINTS - (-40, 32.7)).max(1) < 1)
    ).all()


def test_covering_the_goal_ends_the_episode_and_the_copy_rests():
    task = robots.make("pusht")
    goal = np.array([256, 256, np.pi / 4])
    task.reset_to(np.array([[50, 50, *goal], [50, 50, 150, 150, 0.0]]))
    target = np.full((2, 2), 60.0)
    obs, reward, terminated, info = task.step(target)
    np.testing.assert_array_equal(terminated, [True, False])
    np.testing.assert_array_equal(info["success"], [True, False])
    assert reward[0] == 1.0
    assert 0 <= reward[1] < 0.2
    later, reward, terminated, info = task.step(np.full((2, 2), 400.0))
    np.testing.assert_array_equal(later["state"][0], obs["state"][0])
    assert not np.array_equal(later["state"][1], obs["state"][1])
    np.testing.assert_array_equal(terminated, [True, False])
    assert reward[0] == 0.0
    assert info["success"][0]


def test_reset_to_places_agent_and_block_exactly():
    task = robots.make("pusht")
    state = np.array([[111.0, 222.0, 300.0, 200.0, 2.0]])
    obs = task.reset_to(state)
    np.testing.assert_allclose(obs["state"][0, :2], state[0, :2])
    np.testing.assert_allclose(obs["state"][0, 2:], keypoints(state[0, 2:]).ravel(), rtol=1e-6)


def test_snapshot_gives_the_same_future_in_contact():
    task = robots.make("pusht")
    task.reset(range(3))
    rng = np.random.default_rng(0)

    def poke() -> np.ndarray:
        return np.clip(task.observation()["state"][:, 2:4] + rng.normal(0, 60, (3, 2)), 0, 512)

    for _ in range(15):
        task.step(poke())
    kept = task.snapshot()
    actions = [poke() for _ in range(10)]
    live = [task.step(action)[0]["state"] for action in actions]
    for _ in range(2):
        task.restore(kept)
        again = [task.step(action)[0]["state"] for action in actions]
        np.testing.assert_array_equal(live, again)
    assert np.abs(live[-1] - live[0])[:, 2:].max() > 1  # the block moved


def test_images_show_the_state_and_hide_the_block_from_it():
    task = robots.make("pusht-image")
    obs = task.reset([0, 1])
    assert obs["state"].shape == (2, 2) == (2, task.spec.observation_dim)
    assert obs["image"].shape == (2, *task.spec.images["image"])
    assert obs["image"].dtype == np.uint8
    assert not np.array_equal(obs["image"][0], obs["image"][1])
    column, row = np.rint(obs["state"][0] * 96 / 512).astype(int)
    blue = obs["image"][0, row, column].astype(int)
    assert blue[2] > blue[0] + 50  # gym-pusht draws the agent in royal blue


def test_actions_are_clipped_to_the_table_and_checked():
    task = robots.make("pusht")
    obs = task.reset([0, 0])
    obs, *_ = task.step(np.array([[-500.0, 900.0], [0.0, 512.0]]))
    np.testing.assert_array_equal(obs["state"][0], obs["state"][1])
    with pytest.raises(UserError, match="finite"):
        task.step(np.array([[np.inf, 0], [0, 0]]))
