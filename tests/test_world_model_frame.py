"""The frame of a rigid body: what turns and moves with the scene, what is exact, and what is refused."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import offline
from offline import DataSpec, TrajectoryStore
from pilotwave.config import compose
from pilotwave.errors import UserError
from world_models.frame import BodyFrame, build_frame

SHAPE = np.array([[-0.5, 6.0], [-6.5, -4.0], [5.5, -4.0], [1.5, 2.0]])  # about their mean


def scene(poses, free):
    """Observations (..., 10) of a free point and the body at poses (..., 3)."""
    c, s = np.cos(poses[..., 2]), np.sin(poses[..., 2])
    turn = np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)
    points = np.einsum("...ij,kj->...ki", turn, SHAPE) + poses[..., None, :2]
    return np.concatenate([free, points.reshape(*points.shape[:-2], -1)], -1).astype(np.float32)


def moved(points, angle, shift):
    """Points (..., 2 n) of a plane that is turned and shifted."""
    c, s = np.cos(angle), np.sin(angle)
    pairs = points.reshape(*points.shape[:-1], -1, 2) @ np.array([[c, s], [-s, c]]) + shift
    return pairs.reshape(points.shape).astype(np.float32)


@pytest.fixture
def observations():
    rng = np.random.default_rng(0)
    poses = np.concatenate([rng.uniform(-20, 20, (7, 5, 2)), rng.uniform(-3.1, 3.1, (7, 5, 1))], -1)
    return scene(poses, rng.uniform(-20, 20, (7, 5, 2)))


@pytest.fixture
def frame(observations):
    frame = build_frame(10, 2, [[2, 10]])
    frame.fit(torch.from_numpy(observations.reshape(-1, 10)))
    return frame


def test_the_mean_shape_is_the_body(frame):
    learnt = frame.shape[0].numpy()
    distances = [np.linalg.norm(p[:, None] - p[None], axis=-1) for p in (SHAPE, learnt)]
    np.testing.assert_allclose(*distances, atol=1e-4)
    np.testing.assert_allclose(float(frame.radius), np.sqrt((SHAPE**2).sum(1).mean()), rtol=1e-5)


def test_states_come_back_as_observations(frame, observations):
    o = torch.from_numpy(observations)
    origin = frame.origin(o[:, 0])
    state = frame.enter(o, origin)
    assert state.shape == (7, 5, 5)
    # the body is at home in its own coordinates
    np.testing.assert_allclose(state[:, 0, 2:].numpy(), 0, atol=1e-5)
    np.testing.assert_allclose(frame.leave(state, origin).numpy(), observations, atol=1e-4)
    # all three of its numbers are lengths: moving one by d moves its points by d, in the root mean square
    for k in (2, 3, 4):
        nudged = state.clone()
        nudged[..., k] += 1e-2
        change = (frame.leave(nudged, origin) - frame.leave(state, origin))[..., 2:].unflatten(-1, (-1, 2))
        np.testing.assert_allclose(change.square().sum(-1).mean(-1).sqrt().numpy(), 1e-2, rtol=2e-2)


def test_states_do_not_see_where_the_scene_lies(frame, observations):
    action = np.random.default_rng(1).uniform(-20, 20, (7, 4, 2)).astype(np.float32)
    seen = []
    for o, a in ((observations, action), (moved(observations, 2.0, [30.0, -7.0]), moved(action, 2.0, [30.0, -7.0]))):
        origin = frame.origin(torch.from_numpy(o)[:, 0])
        seen.append((frame.enter(torch.from_numpy(o), origin), frame.enter_actions(torch.from_numpy(a), origin)))
    for here, there in zip(*seen):
        np.testing.assert_allclose(here.numpy(), there.numpy(), atol=1e-4)


def test_a_turn_through_the_back_is_a_small_one(frame):
    poses = np.array([[[0.0, 0.0, np.pi - 0.1], [0.0, 0.0, -np.pi + 0.1]]])
    o = torch.from_numpy(scene(poses, np.zeros((1, 2, 2))))
    state = frame.enter(o, frame.origin(o[:, 0]))
    np.testing.assert_allclose(state[0, 1, 4].item(), 0.2 * float(frame.radius), rtol=1e-4)


@pytest.mark.parametrize("name", ["diffusion_world_model", "one_step"])
def test_a_carried_body_is_forecast_wherever_it_goes(name):
    """The body follows the targets in its own frame: linear there, and not in the world's coordinates."""
    rng = np.random.default_rng(0)

    def episodes(n, steps=30):
        poses, targets = np.zeros((n, steps, 3)), np.zeros((n, steps, 2))
        poses[:, 0] = np.concatenate([rng.uniform(-20, 20, (n, 2)), rng.uniform(-3, 3, (n, 1))], -1)
        for i in range(steps):
            c, s = np.cos(poses[:, i, 2]), np.sin(poses[:, i, 2])
            own = rng.uniform(-3, 3, (n, 2))
            # targets are points of the world; the pose turns by what lies across the body
            targets[:, i] = poses[:, i, :2] + np.stack([c * own[:, 0] - s * own[:, 1], s * own[:, 0] + c * own[:, 1]], -1)
            if i + 1 < steps:
                poses[:, i + 1, :2] = poses[:, i, :2] + 0.1 * (targets[:, i] - poses[:, i, :2])
                poses[:, i + 1, 2] = poses[:, i, 2] + 0.01 * own[:, 1]
        return scene(poses, targets), targets.astype(np.float32)

    o, a = episodes(40)
    store = TrajectoryStore({"observation": o.reshape(-1, 10), "action": a.reshape(-1, 2)}, np.arange(1, 41) * 30, {}, 0.1, "t", {})
    settings = OmegaConf.to_container(compose("train", [f"world_model={name}"]).world_model, resolve=True)
    settings |= {"bodies": [[2, 10]], "reward": False, "history": 1, "horizon": 1}
    model = offline.build("world_model", name, DataSpec("toy", 10, 2, 0.1), settings, seed=0)
    model.prepare(store)
    seen = model.scene(torch.from_numpy(o[:, 3:4]), torch.ones(40, 1, dtype=torch.bool), torch.from_numpy(a[:, 3:4]))
    forecast = model.step(seen.past, seen.known, seen.action).forecast
    body = model.frame.leave(forecast[:, None], seen.origin)[:, 0, 2:]
    np.testing.assert_allclose(body.numpy(), o[:, 4, 2:], atol=5e-3)


def test_recentring_is_entering_there(frame, observations):
    action = torch.from_numpy(np.random.default_rng(1).uniform(-20, 20, (7, 3, 2)).astype(np.float32))
    o = torch.from_numpy(observations)
    here, there = frame.origin(o[:, 0]), frame.origin(o[:, 2])
    state = frame.enter(o, here)
    moved, pushed = frame.recentre(state, frame.enter_actions(action, here), state[:, 2])
    np.testing.assert_allclose(moved.numpy(), frame.enter(o, there).numpy(), atol=1e-4)
    np.testing.assert_allclose(pushed.numpy(), frame.enter_actions(action, there).numpy(), atol=1e-4)
    back = frame.uncentre(moved[:, 4], state[:, 2])
    np.testing.assert_allclose(frame.leave(back[:, None], here)[:, 0].numpy(), observations[:, 4], atol=1e-4)


@pytest.mark.parametrize("bodies", [[[2, 11]], [[2, 5]], [[2, 4]], [[2, 8], [6, 10]], [[3, 9]], [[0, 12]]])
def test_impossible_bodies_end_in_one_line(bodies):
    with pytest.raises(UserError, match=r"world_model\.bodies="):
        BodyFrame(10, 2, bodies)
