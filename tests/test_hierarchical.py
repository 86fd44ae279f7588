"""Hierarchical Diffuser: pins are exact, jumps join, only what is asked for is filled in, and each level learns its own task."""

import numpy as np
import pytest
import torch
import toy_planner
from omegaconf import OmegaConf
from toy_planner import GOAL, START, seeded, straight_paths

from offline import load_run, save_run
from pilotwave.config import compose
from pilotwave.errors import UserError
from planners import HierarchicalDiffuser
from planners.plan import Plan


def config(**changes):
    settings = OmegaConf.to_container(compose("train", ["planner=hierarchical"]).planner, resolve=True)
    settings |= {"horizon": 5, "jump": 6, "points": 3, "network": {"name": "mlp", "width": 64, "depth": 2}}
    settings["low"] = {"network": {"name": "mlp", "width": 64, "depth": 2}, "sampler": {"name": "ddim", "steps": 5}}
    settings["sampler"] = {"name": "ddim", "steps": 5}
    return settings | changes


@pytest.fixture(scope="module")
def store():
    return straight_paths(episodes=200, length=40)


def build(store, trained_like=False, **changes):
    return toy_planner.build(HierarchicalDiffuser, config(**changes), store, trained_like=trained_like)


@pytest.fixture(scope="module")
def planner(store):
    return build(store, trained_like=True)


def test_plans_run_through_every_subgoal_and_keep_their_pins(planner):
    coarse = planner.high.plan(START, GOAL, samples=6, generator=seeded())
    plan = planner.plan(START, GOAL, samples=6, generator=seeded())
    assert plan.observations.shape == (6, 4 * 3 + 1, 4)
    assert plan.actions.shape == (6, 4 * 3 + 1, 2)
    np.testing.assert_array_equal(plan.observations[:, ::3], coarse.observations)
    np.testing.assert_array_equal(plan.values, coarse.values)
    np.testing.assert_array_equal(plan.arrivals, 3 * coarse.arrivals)
    np.testing.assert_allclose(plan.observations[:, 0], np.broadcast_to(START, (6, 4)), atol=1e-5)
    at_arrival = plan.observations[np.arange(6), plan.arrivals, :2]
    np.testing.assert_allclose(at_arrival, np.broadcast_to(GOAL, (6, 2)), atol=1e-5)
    batch = planner.plan(np.stack([START, START]), GOAL, samples=6, generator=seeded())
    assert batch.observations.shape == (2, 6, 13, 4)
    assert batch.actions.shape == (2, 6, 13, 2)


def test_a_jump_does_not_depend_on_the_others(planner):
    subgoals = np.cumsum(np.full((2, 5, 4), 0.1, np.float32), axis=1)
    subgoals[1, 2:] += 1
    one, other = (planner.fill(Plan(way[None], None, np.zeros(1)), generator=seeded()) for way in subgoals)
    np.testing.assert_allclose(one.observations[:, :4], other.observations[:, :4], atol=1e-5)
    np.testing.assert_allclose(one.actions[:, :3], other.actions[:, :3], atol=1e-5)
    assert np.abs(one.actions[:, 3:6] - other.actions[:, 3:6]).max() > 0.01


def test_of_the_jumps_only_the_first_are_filled_in(planner):
    subgoals = np.cumsum(np.full((1, 5, 4), 0.1, np.float32), axis=1)
    plan = planner.fill(Plan(subgoals, None, np.zeros(1)), segments=1, generator=seeded())
    straight = subgoals[:, :1] + np.arange(13)[None, :, None] / 12 * (subgoals[:, 4:] - subgoals[:, :1])
    assert np.abs(plan.observations[:, 1:3] - straight[:, 1:3]).max() > 0.01
    np.testing.assert_allclose(plan.observations[:, 3:], straight[:, 3:], atol=1e-5)
    assert plan.actions[:, :3].all()
    assert not plan.actions[:, 3:].any()


def test_only_the_best_plans_are_filled_in_until_they_arrive(planner):
    subgoals = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    arrivals = np.array([[2, 4, 1], [4, 3, 2]])
    plan = planner.fill(Plan(subgoals, None, np.zeros((2, 3)), arrivals), filled=1, generator=seeded())
    moved = np.abs(plan.actions).max(-1).reshape(2, 3, 13)[..., :12].reshape(2, 3, 4, 3).max(-1) > 0
    np.testing.assert_array_equal(moved, [[[1, 1, 0, 0], [0] * 4, [0] * 4], [[1] * 4, [0] * 4, [0] * 4]])


def test_both_levels_learn_and_the_way_between_subgoals_is_the_datas(store):
    network = {"name": "mlp", "width": 32, "depth": 1, "shortcut": True}
    planner = build(store, low={"network": network, "prediction": "data", "sampler": {"name": "ddim", "steps": 5}})
    windows, optimizer = planner.windows(store, "cpu"), torch.optim.Adam(planner.parameters(), 4e-3)
    assert windows.gather(torch.tensor([0]))["observation"].shape == (1, 13, 4)
    planner.train()
    for step in range(220):
        loss, info = planner.loss(windows.sample(64, seeded(step)), seeded(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert set(info) == {"loss", "duration_loss", "low_loss"}
    planner.eval()
    velocity = np.array([0.6, -0.4], np.float32)
    subgoals = np.array([[0, 0, *velocity], [*(0.6 * velocity), *velocity]], np.float32)[None]
    plan = planner.fill(Plan(np.repeat(subgoals, 16, 0), None, np.zeros(16), None), generator=seeded())
    expected = np.arange(4)[:, None] * 0.2 * velocity
    assert np.abs(plan.observations[..., :2].mean(0)[:4] - expected).max() < 0.08  # the data spans 10
    assert np.abs(plan.actions[:, :3].mean((0, 1)) - velocity).max() < 0.1


def test_windows_of_both_levels_show_the_same_steps(store, planner):
    """Token k of the high level is token k m of the window: K steps on."""
    window = planner.windows(store, "cpu").gather(torch.tensor([5]))["observation"][:, :: planner.m]
    torch.testing.assert_close(window, planner.high.windows(store, "cpu").gather(torch.tensor([5]))["observation"])


def test_a_run_loads_as_it_was_saved(tmp_path, store, planner):
    save_run(tmp_path / "run", planner)
    again = load_run(tmp_path / "run", kind="planner")
    plans = [p.plan(START, GOAL, samples=2, generator=seeded()) for p in (planner, again)]
    np.testing.assert_array_equal(plans[0].observations, plans[1].observations)


def test_the_controller_counts_both_levels_evaluations(planner):
    class Task:
        dt, action_low, action_high = 0.1, -np.ones(2), np.ones(2)

    controller = planner.controller(Task, segments=1, samples=3)
    assert (controller.evaluations, controller.dt) == (10, pytest.approx(0.2))
    chunk = controller.act({"state": START[None, None], "goal": GOAL[None, None]}, 0)
    assert chunk.references.shape == (1, 13, 4)


def test_jumps_must_be_whole_numbers_of_points(store):
    with pytest.raises(UserError, match=r"jump=6 must be a multiple of planner\.points=4"):
        build(store, points=4)


def test_dense_actions_and_values_at_both_levels(store):
    network, value = {"name": "mlp", "width": 64, "depth": 2}, {"scale": 0.3, "discount": 0.5}
    value["network"] = {"name": "mlp", "width": 32, "depth": 1}
    low = {"network": network, "sampler": {"name": "ddim", "steps": 5}, "value": value}
    changes = {"dense": True, "arrivals": "last", "surprise_levels": [], "value": value, "low": low, "windows": 2}
    planner = toy_planner.build(HierarchicalDiffuser, config(**changes), store, goal_dim=0)
    window = planner.windows(store, "cpu").gather(torch.tensor([7]))
    assert window["observation"].shape == (1, 15, 4)  # 5 subgoals and the 3 actions after each
    seen = {}
    planner.high.loss = lambda batch, generator: (seen.update(batch), (torch.zeros(()), {}))[1]
    assert "low_loss" in planner.loss(window, seeded())[1]
    torch.testing.assert_close(seen["beside"], window["action"].reshape(1, 5, 6))
    torch.testing.assert_close(seen["return"], window["return"][:, ::3])
    del planner.high.loss

    for parameter in planner.eval().parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    states = np.random.default_rng(0).uniform(-0.5, 0.5, (8, 4)).astype(np.float32)
    plans = []
    for scale in (0.0, 0.3):
        planner.low.value_config["scale"] = scale
        plans.append(planner.plan(states, samples=4, generator=seeded(), filled=1, segments=1))
    # guidance moves what lies between subgoals, and not these
    np.testing.assert_array_equal(plans[0].observations[:, 0, ::3], plans[1].observations[:, 0, ::3])
    assert np.abs(plans[0].observations[:, 0, 1:3] - plans[1].observations[:, 0, 1:3]).min() > 1e-6
    assert plans[1].actions.shape == (8, 4, 13, 2)
    assert (np.diff(plans[1].values, axis=1) <= 0).all()
