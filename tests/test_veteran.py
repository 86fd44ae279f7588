"""Diffusion Veteran: candidates keep the start, the critic ranks them, inverse dynamics gives the actions."""

import numpy as np
import pytest
import torch
import toy_planner
from omegaconf import OmegaConf
from toy_planner import GOAL, START, seeded, straight_paths, train

from offline import TrajectoryStore, load_run, save_run
from offline.returns import returns_to_go
from pilotwave.config import compose
from pilotwave.errors import UserError
from planners import Veteran
from planners.plan import ended


def config(**changes):
    settings = OmegaConf.to_container(compose("train", ["planner=veteran"]).planner, resolve=True)
    settings |= {"horizon": 5, "stride": 2, "network": {"name": "mlp", "width": 32, "depth": 1, "shortcut": True}}
    settings |= {"sampler": {"name": "ddim", "steps": 4}, "critic": {"discount": 0.9, "reach": 8, "width": 64}, "arrive": 0.05}
    return settings | changes


@pytest.fixture(scope="module")
def store():
    return straight_paths()


def build(store, goal_dim=2, **changes):
    return toy_planner.build(Veteran, config(**changes), store, goal_dim)


def test_plans_have_the_contracts_shapes_and_keep_the_start(store):
    planner = build(store)
    plan = planner.plan(START, GOAL, samples=7, generator=seeded())
    assert [part.shape for part in (plan.observations, plan.actions, plan.values, plan.arrivals)] == [
        (7, 5, 4),
        (7, 5, 2),
        (7,),
        (7,),
    ]
    np.testing.assert_allclose(plan.observations[:, 0], np.broadcast_to(START, (7, 4)), atol=1e-5)
    batch = planner.plan(np.stack([START, START]), GOAL, samples=7, generator=seeded())
    assert batch.observations.shape == (2, 7, 5, 4)
    assert batch.actions.shape == (2, 7, 5, 2)
    with pytest.raises(UserError, match="goal must have 2"):
        planner.plan(START, np.zeros(3))


def test_candidates_are_ranked_by_the_critic(store):
    planner = build(store)
    # a critic that is known: the last token's x coordinate, for one goal, and minus it for the other
    planner.critic = LastX()
    for sign, goal in ((1, [3.0, 9.0]), (-1, [-3.0, 9.0])):
        plan = planner.plan(np.stack([START, -START]), np.array(goal), samples=20, generator=seeded())
        x = planner.normalizer.normalize("observation", torch.as_tensor(plan.observations))[..., -1, 0].numpy()
        np.testing.assert_allclose(plan.values, sign * x, atol=1e-5)
        assert (np.diff(plan.values, axis=1) <= 0).all()
        assert (x.std(1) > 0.1).all()
    unranked = planner.candidates.plan(np.stack([START, -START]), None, samples=20, generator=seeded()).observations
    for ranked, drawn in zip(plan.observations, unranked):  # none is lost and none made up
        np.testing.assert_allclose(np.sort(ranked[:, -1, 0]), np.sort(drawn[:, -1, 0]), atol=1e-5)


class LastX(torch.nn.Module):
    def forward(self, x, goal):
        return x[:, -1, 0] * goal[:, 0].sign()


def test_plans_end_where_they_pass_the_goal():
    states = torch.zeros(2, 5, 4)
    states[:, :, 0], states[:, :, 2] = torch.arange(5) * 0.5, 5.0
    goal = torch.tensor([[1.1, 0.2], [9.0, 9.0]])
    reached, arrival, nearest = ended(states, goal, 0.3)
    assert arrival.tolist() == [2, 4]
    torch.testing.assert_close(nearest, torch.tensor([0.05**0.5, (49 + 81.0) ** 0.5]))
    torch.testing.assert_close(reached[0, 2:], torch.tensor([1.1, 0.2, 0.0, 0.0]).expand(3, 4))
    torch.testing.assert_close(reached[0, :2], states[0, :2])
    torch.testing.assert_close(reached[1], states[1])
    # who is there already stays, but the first token is where the robot is
    reached, arrival, _ = ended(states, torch.zeros(2, 2), 0.3)
    assert arrival.tolist() == [0, 0]
    torch.testing.assert_close(reached[:, 0], states[:, 0])
    assert not reached[:, 1:].any()


def test_a_short_training_values_plans_by_where_they_lead_and_knows_their_actions(store):
    planner = build(store)
    info = train(planner, store, 200, batch=128)
    assert info["critic_loss"] < 0.06
    assert info["inverse_loss"] < 0.02
    # straight ways in eight directions, and goals ahead on each of them: the way that leads there is worth most
    angle = np.arange(8) * np.pi / 4
    velocity = 0.7 * np.stack([np.cos(angle), np.sin(angle)], 1)
    position = velocity[:, None] * 0.2 * np.arange(5)[:, None]
    ways = np.concatenate([position, np.broadcast_to(velocity[:, None], position.shape)], -1).astype(np.float32)
    goals = np.concatenate([1.2 * velocity, velocity], 1).astype(np.float32)
    x, g = (planner.normalizer.normalize("observation", torch.as_tensor(part)) for part in (ways, goals))
    with torch.no_grad():
        values = torch.stack([planner.critic(x, goal.expand(8, 2)) for goal in g[:, :2]])
        actions = planner.normalizer.denormalize("action", planner.inverse_dynamics.along(x))
    across = (values.argmax(1) - torch.arange(8)) % 8
    assert ((across <= 1) | (across == 7)).all()
    assert (values.diagonal() > values.roll(4, 1).diagonal() + 0.1).all()  # than the opposite way
    np.testing.assert_allclose(actions, np.broadcast_to(velocity[:, None], actions.shape), atol=0.15)


def test_returns_are_those_of_the_recorded_future(store):
    planner = build(store, arrive=0.2)
    window = planner.windows(store, "cpu").gather(torch.arange(0, 4200, 21))["observation"]
    goal, returns = planner._returns(window, seeded())
    places = planner.normalizer.denormalize("observation", window)[..., :2].numpy()
    full = torch.cat([goal, torch.zeros_like(goal)], 1)
    to = planner.normalizer.denormalize("observation", full)[:, :2].numpy()
    assert places.shape[1] == 9
    for way, g, value in zip(places, to, returns.numpy()):
        reached = np.flatnonzero(np.linalg.norm(way - g, axis=1) <= 0.2)
        assert value == pytest.approx(0.9 ** reached[0] if len(reached) else 0.0, abs=1e-6)
    assert 0.3 < (returns > 0).float().mean() < 0.9  # own goals are reached, most of the others' are not


def test_without_goals_the_critic_learns_the_recorded_returns(store):
    planner = build(store, goal_dim=0)
    batch = planner.windows(store, "cpu").gather(torch.arange(0, 2000, 20))
    raw = returns_to_go(store, 0.9)
    expected = (raw - raw.mean()) / raw.std()
    rows = planner.windows(store, "cpu").first[torch.arange(0, 2000, 20)]
    np.testing.assert_allclose(batch["return"][:, 0], expected[rows], atol=1e-5)
    info = train(planner, store, 150, batch=128)
    assert info["critic_loss"] < 0.3
    plan = planner.plan(np.zeros((2, 4), np.float32), samples=3)
    assert plan.arrivals is None
    columns = {key: value for key, value in store.columns.items() if key != "reward"}
    bare = TrajectoryStore(columns, store.episode_ends, {}, 0.1, "toy", {})
    with pytest.raises(UserError, match="no rewards"):
        planner.windows(bare, "cpu")


def test_candidates_can_be_pinned_at_the_goal(store):
    planner = build(store, pin_goal=True)
    plan = planner.plan(START, GOAL, samples=6, generator=seeded())
    at_arrival = plan.observations[np.arange(6), plan.arrivals, :2]
    assert (np.linalg.norm(at_arrival - GOAL, axis=1) <= 0.05 + 1e-5).all()


def test_a_run_loads_and_its_controller_acts(tmp_path, store):
    save_run(tmp_path / "run", build(store))
    planner = load_run(tmp_path / "run", kind="planner")

    class Task:
        dt, action_low, action_high = 0.1, -np.ones(2), np.ones(2)

    for track, width in (("pd", 4), ("actions", 2)):
        controller = planner.controller(Task, samples=3, track=track)
        chunk = controller.act({"state": START[None, None], "goal": GOAL[None, None]}, 0)
        assert chunk.references.shape == (1, 5, width)
