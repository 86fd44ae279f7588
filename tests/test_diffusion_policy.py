"""Diffusion Policy: shapes, limits, images, retiming, and a small training that imitates a known law."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from offline import DataSpec, TrajectoryStore, retime
from pilotwave.config import compose
from pilotwave.errors import UserError
from policies import DiffusionPolicy


def config(**changes):
    plain = OmegaConf.to_container(compose("train", ["policy=diffusion_policy"]).policy, resolve=True)
    plain |= {"network": {"name": "mlp", "width": 64, "depth": 2}, "horizon": 8, "execute": 4}
    return plain | {"sampler": {"name": "euler", "steps": 5}} | changes


def toy_store(images=False, episodes=20, length=30):
    """Observations on a circle; the action is a quarter turn of the observation."""
    rng = np.random.default_rng(0)
    phase = rng.uniform(0, 2 * np.pi, (episodes, 1)) + 0.1 * np.arange(length)
    observation = np.stack([np.cos(phase), np.sin(phase)], -1).reshape(-1, 2).astype(np.float32)
    columns = {"observation": observation, "action": (observation @ np.array([[0, 1], [-1, 0]])).astype(np.float32)}
    if images:
        columns["image"] = rng.integers(0, 255, (episodes * length, 48, 48, 3), np.uint8)
    return TrajectoryStore(columns, np.arange(1, episodes + 1) * length, {}, 0.1, "toy", {})


def build(store, images=False, limits=(), **changes):
    torch.manual_seed(0)
    low, high = tuple(-v for v in limits), tuple(limits)
    pictures = {"image": (48, 48, 3)} if images else {}
    spec = DataSpec("toy", 2, 2, 0.1, action_low=low, action_high=high, images=pictures)
    policy = DiffusionPolicy(spec, config(**changes))
    policy.prepare(store)
    return policy.eval()


def train(policy, store, steps=300):
    windows = policy.windows(store, "cpu")
    optimizer = torch.optim.Adam(policy.parameters(), 2e-3)
    policy.train()
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        loss, _ = policy.loss(windows.sample(128, generator), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy.eval()


def test_act_has_the_contracts_shapes():
    policy = build(toy_store())
    assert policy.act(np.zeros((2, 2))).shape == (4, 2)
    assert policy.act(np.zeros((5, 2, 2))).shape == (5, 4, 2)
    with pytest.raises(UserError, match=r"\(2, 2\)"):
        policy.act(np.zeros((3, 2)))


def test_it_imitates_the_law_that_made_the_data():
    store = toy_store()
    policy = train(build(store), store)
    angle = np.array([0.3, 2.0, 4.0])[:, None] + np.array([-0.1, 0.0])
    history = np.stack([np.cos(angle), np.sin(angle)], -1)
    actions = policy.act(history, torch.Generator().manual_seed(0))
    future = angle[:, -1:] + 0.1 * np.arange(4)
    expected = np.stack([-np.sin(future), np.cos(future)], -1)
    assert np.abs(actions - expected).max() < 0.2


def test_commands_stay_inside_the_limits():
    store = toy_store()
    policy = build(store, limits=(0.3, 0.3))
    actions = policy.act(np.random.default_rng(0).normal(size=(20, 2, 2)))
    assert np.abs(actions).max() <= 0.3 + 1e-6
    windows = policy.windows(store, "cpu")
    recorded = policy.normalizer.denormalize("action", windows.columns["action"])
    assert recorded.abs().max() <= 0.3 + 1e-5  # learnt as carried out


def test_images_condition_the_actions():
    store = toy_store(images=True)
    policy = train(build(store, images=True), store, steps=3)
    history = {"observation": np.zeros((2, 2)), "image": np.zeros((2, 48, 48, 3), np.uint8)}
    bright = history | {"image": np.full((2, 48, 48, 3), 255, np.uint8)}
    bright["image"][:, :24] = 0
    same = [policy.act(h, torch.Generator().manual_seed(0)) for h in (history, history, bright)]
    np.testing.assert_array_equal(same[0], same[1])
    assert not np.array_equal(same[0], same[2])


def test_past_actions_of_the_chunk_are_not_executed():
    """The window's first To - 1 actions lie before the observation: an act at phase p starts with the action at p."""
    store = toy_store()
    policy = train(build(store, observations=3), store)
    angle = np.array([1.0 - 0.2, 1.0 - 0.1, 1.0])
    actions = policy.act(np.stack([np.cos(angle), np.sin(angle)], -1), torch.Generator().manual_seed(0))
    assert np.abs(actions[0] - [-np.sin(1.0), np.cos(1.0)]).max() < 0.2


@pytest.mark.parametrize("changes", [{"execute": 8}, {"execute": 0}, {"observations": 0}])
def test_horizons_that_cannot_hold_the_chunk_are_named(changes):
    with pytest.raises(UserError, match=r"policy\.horizon"):
        build(toy_store(), **changes)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.3, 4), st.lists(st.integers(2, 30), min_size=1, max_size=5))
def test_retimed_episodes_keep_their_path_and_borders(speed, lengths):
    ends = np.cumsum(lengths)
    line = np.concatenate([np.arange(n) + 1000.0 * i for i, n in enumerate(lengths)]).astype(np.float32)
    store = TrajectoryStore({"observation": line[:, None], "action": line[:, None]}, ends, {}, 0.1, "toy", {})
    fast = retime(store, speed)
    assert fast.episodes == len(lengths)
    for i, n in enumerate(lengths):
        got = fast.episode(i)["observation"][:, 0] - 1000.0 * i
        expected = np.arange(0, n - 1 + 1e-9, speed)
        np.testing.assert_allclose(got, expected, atol=2e-3)


def test_retiming_needs_a_positive_speed():
    with pytest.raises(UserError, match="above 0"):
        retime(toy_store(), 0.0)
