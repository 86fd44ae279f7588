"""CDiffuser: the contrast of returns, which states it draws, and that it is added to Diffuser's loss and to nothing else."""

import numpy as np
import pytest
import torch
import toy_planner
from omegaconf import OmegaConf
from toy_planner import GOAL, START, seeded, straight_paths

from offline import TrajectoryStore, load_run, save_run
from offline.returns import returns_to_go
from pilotwave.config import compose
from pilotwave.errors import UserError
from planners import ContrastiveDiffuser
from planners.contrastive import return_contrast


def config(**changes):
    settings = OmegaConf.to_container(compose("train", ["planner=contrastive"]).planner, resolve=True)
    settings |= {"horizon": 6, "stride": 2, "network": {"name": "mlp", "width": 32, "depth": 1, "shortcut": True}}
    settings |= {"sampler": {"name": "ddim", "steps": 4}, "surprise_levels": []}
    contrast = settings["contrast"] | {"arrive": 0.2, "discount": 0.9, "width": 32} | changes.pop("contrast", {})
    return settings | {"contrast": contrast} | changes


@pytest.fixture(scope="module")
def store():
    return straight_paths(episodes=200)


def build(store, goal_dim=2, **changes):
    return toy_planner.build(ContrastiveDiffuser, config(**changes), store, goal_dim)


def test_the_contrast_is_the_papers_formula():
    rng = np.random.default_rng(1)
    x, high, low = (rng.normal(size=(2, n, 5)) for n in (3, 4, 4))
    got = return_contrast(*(torch.as_tensor(part) for part in (x, high, low)), 0.3).numpy()

    def similarity(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    for i in range(2):
        for h in range(3):
            pull = sum(np.exp(similarity(x[i, h], s) / 0.3) for s in high[i])
            push = sum(np.exp(similarity(x[i, h], s) / 0.3) for s in low[i])
            np.testing.assert_allclose(got[i, h], -np.log(pull / push))


def test_it_pulls_towards_the_positive_and_away_from_the_negative():
    x = torch.tensor([[[1.0, 1.0]]], requires_grad=True)
    return_contrast(x, torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]), 0.5).sum().backward()
    assert x.grad[0, 0, 0] < 0 < x.grad[0, 0, 1]  # descent goes to the first axis


def test_states_are_drawn_by_the_papers_odds(store):
    planner = build(store, contrast={"drawn": 40_000, "sigma": 6.0, "high": 0.7, "low": 0.4})
    value = torch.tensor([[0.0, 0.3, 0.6, 1.0]])
    odds = (1 / (1 + np.exp(6 * (0.7 - value[0].numpy()))), 1 / (1 + np.exp(6 * (value[0].numpy() - 0.4))))
    for drawn, expected in zip(planner.draw(value, seeded()), odds):
        share = np.bincount(drawn[0], minlength=4) / 40_000
        np.testing.assert_allclose(share, expected / expected.sum(), atol=0.01)


def test_values_of_states_are_how_soon_their_window_reached_the_goal(store):
    planner = build(store)
    window = planner.windows(store, "cpu").gather(torch.arange(0, 3600, 31))["observation"]
    goal = window[:7, 4]
    values = planner.values(window, goal).numpy()
    places, to = (planner.normalizer.denormalize("observation", part)[..., :2].numpy() for part in (window, goal))
    assert values.shape == (7, len(window), 6)
    for g in range(7):
        for w in range(len(window)):
            for h in range(6):
                ahead = np.flatnonzero(np.linalg.norm(places[w, h:] - to[g], axis=1) <= 0.2)
                assert values[g, w, h] == pytest.approx(0.9 ** ahead[0] if len(ahead) else 0.0, abs=1e-6)
    assert (values.max((1, 2)) == 1).all()  # their own windows get there


def test_without_goals_values_are_ranks_of_returns(store):
    planner = build(store, goal_dim=0)
    windows = planner.windows(store, "cpu")
    returns = returns_to_go(store, 0.9)
    for row in (0, 17, 1234, 5999):
        assert windows.columns["rank"][row] == pytest.approx((returns < returns[row]).mean(), abs=2e-4)
    columns = {key: value for key, value in store.columns.items() if key != "reward"}
    with pytest.raises(UserError, match="no rewards"):
        planner.windows(TrajectoryStore(columns, store.episode_ends, {}, 0.1, "toy", {}), "cpu")


@pytest.mark.parametrize("goal_dim", [2, 0])
def test_the_contrast_is_added_to_diffusers_loss(store, goal_dim):
    planner = build(store, goal_dim, contrast={"weight": 0.5})
    batch = planner.windows(store, "cpu").sample(32, seeded())
    loss, info = planner.loss(batch, seeded(1))
    alone, _ = planner.diffuser.loss(batch, seeded(1))
    torch.testing.assert_close(loss - alone, 0.5 * info["contrast_loss"])
    for parameter in planner.diffuser.parameters():  # the first step moves a network's last layer alone
        torch.nn.init.normal_(parameter, std=0.1)
    planner.contrast_loss(batch, seeded(1)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in planner.diffuser.denoiser.network.parameters())


@pytest.mark.parametrize("goal_dim", [2, 0])
def test_high_and_low_states_are_told_apart(store, goal_dim):
    planner = build(store, goal_dim, contrast={"weight": 1.0})
    windows, optimizer = planner.windows(store, "cpu"), torch.optim.Adam(planner.parameters(), 3e-3)
    planner.train()
    for step in range(120):
        loss, info = planner.loss(windows.sample(64, seeded(step)), seeded(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert info["contrast_loss"] < -0.7


def test_plans_are_diffusers_and_a_run_loads(tmp_path, store):
    planner = build(store)
    save_run(tmp_path / "run", planner)
    again = load_run(tmp_path / "run", kind="planner")
    plans = [p.plan(START, GOAL, samples=3, generator=seeded()) for p in (planner, planner.diffuser, again)]
    for plan in plans[1:]:
        np.testing.assert_array_equal(plans[0].observations, plan.observations)

    class Task:
        dt, action_low, action_high = 0.1, -np.ones(2), np.ones(2)

    controller = again.controller(Task, samples=3)
    assert controller.evaluations == 4
    assert controller.act({"state": START[None, None], "goal": GOAL[None, None]}, 0).references.shape == (1, 6, 4)
