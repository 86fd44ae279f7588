"""Trajectory Transformer: bins and back, attention to the past alone, beam search against every sequence there is."""

from itertools import product

import numpy as np
import pytest
import torch
import toy_planner
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from toy_planner import GOAL, START, seeded, straight_paths, train

from diffusion.networks import GPT
from offline import TrajectoryStore, load_run, save_run
from offline.returns import returns_to_go
from pilotwave.config import compose
from pilotwave.errors import UserError
from planners import TrajectoryTransformer
from planners.transformer import Discretizer


def config(**changes):
    settings = OmegaConf.to_container(compose("train", ["planner=transformer"]).planner, resolve=True)
    settings |= {"horizon": 5, "stride": 2, "bins": {"number": 40, "kind": "uniform"}, "arrive": 0.3, "discount": 0.9}
    return settings | {"network": {"width": 32, "depth": 2, "heads": 2, "expansion": 2}} | changes


@pytest.fixture(scope="module")
def store():
    return straight_paths("x velocity")


def build(store, goal_dim=2, **changes):
    return toy_planner.build(TrajectoryTransformer, config(**changes), store, goal_dim)


# -- bins --------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.sampled_from(["uniform", "quantile"]))
def test_numbers_come_back_to_within_their_bin(seed, bins, kind):
    rows = np.random.default_rng(seed).normal(size=(200, 3)) * [1.0, 10.0, 0.1]
    discretizer = Discretizer(3, bins)
    discretizer.fit(rows, kind)
    x = torch.as_tensor(rows, dtype=torch.float32)
    codes = discretizer.encode(x)
    assert codes.min() >= 0
    assert codes.max() < bins
    width = discretizer.edges.diff(dim=1)[torch.arange(3), codes]
    assert ((discretizer.decode(codes) - x).abs() <= 0.5 * width + 1e-5).all()
    torch.testing.assert_close(discretizer.encode(discretizer.decode(codes)), codes)
    if kind == "quantile":
        counts = np.stack([np.bincount(column, minlength=bins) for column in codes.T.numpy()])
        assert np.ptp(counts, axis=1).max() <= 2 + 200 // bins * 0.1
    beyond = discretizer.encode(torch.tensor([[-1e6] * 3, [1e6] * 3]))
    assert beyond.tolist() == [[0] * 3, [bins - 1] * 3]


# -- the network -------------------------------------------------------------------------------------------------------


def test_tokens_attend_to_the_past_alone_and_the_cache_changes_nothing():
    torch.manual_seed(0)
    network = GPT(11, 9, 11, width=16, depth=2, heads=2).eval()
    tokens = torch.randint(11, (3, 9), generator=seeded())
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    whole, other = network(tokens), network(changed)
    torch.testing.assert_close(whole[:, :5], other[:, :5])
    assert ((whole[:, 5:] - other[:, 5:]).abs().amax((0, 2)) > 1e-3).all()  # and to all of it
    logits, cache = network.extend(tokens[:, :4], None)
    parts = [logits]
    for i in range(4, 9):
        logits, cache = network.extend(tokens[:, i : i + 1], cache)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


# -- beam search -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """One coordinate, one action, 3 bins, 3 steps, a goal: 3^5 sequences from a state on."""
    rng = np.random.default_rng(0)
    columns = {
        "observation": rng.uniform(0, 3, (60, 1)).astype(np.float32),
        "action": rng.uniform(0, 3, (60, 1)).astype(np.float32),
    }
    columns["reward"] = rng.uniform(0, 1, 60).astype(np.float32)
    store = TrajectoryStore(columns, np.array([60]), {}, 0.1, "tiny", {})

    def made(goal_dim=1, **changes):
        planner = build(store, goal_dim, horizon=3, bins={"number": 3, "kind": "uniform"}, **changes)
        for parameter in planner.network.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        return planner

    return made


def likelihoods(planner, prefix, sequences):
    tokens = torch.cat([prefix.expand(len(sequences), -1), sequences], 1)
    each = planner.network(tokens[:, :-1]).log_softmax(-1).gather(2, (tokens[:, 1:] % 3)[..., None])[..., 0]
    return each[:, prefix.shape[1] - 1 :]


@torch.no_grad()
def test_the_best_beam_is_the_best_of_all_sequences(tiny):
    planner = tiny(arrive=-1.0)  # none arrives
    feature = torch.tensor([1, 0, 1, 0, 1])  # a_0 s_1 a_1 s_2 a_2
    every = torch.tensor(list(product(range(3), repeat=5))) + 3 * feature
    prefix = torch.tensor([[7, 1], [6, 2]])  # goals and first states
    bins, score = planner._likeliest(prefix, torch.tensor([[9.0], [9.0]]), 81)
    for i in range(2):
        truth = likelihoods(planner, prefix[i : i + 1], every).sum(1)
        torch.testing.assert_close(score.view(2, -1)[i], truth.topk(81).values)
        best = bins.view(2, 81, 3, 2)[i, 0]
        assert best.flatten()[1:].tolist() == (every[truth.argmax()] % 3).tolist()
        assert best[0, 0] == prefix[i, 1]


@torch.no_grad()
def test_plans_that_have_arrived_cost_no_more(tiny):
    planner = tiny(arrive=0.6)
    prefix, goal = torch.tensor([[7, 0]]), torch.tensor([[2.6]])
    feature = torch.tensor([1, 0, 1, 0, 1])
    every = torch.tensor(list(product(range(3), repeat=5))) + 3 * feature
    each = likelihoods(planner, prefix, every)
    middles = planner.discretizer.decode(torch.arange(3)[:, None].expand(3, 2))[:, 0]
    near = ((middles - goal[0]).abs() <= 0.6)[every[:, [1, 3]]]  # s_1, s_2
    until = torch.where(near[:, 0], 2, torch.where(near[:, 1], 4, 5))
    truth = (each * (torch.arange(5) < until[:, None])).sum(1)
    _, score = planner._likeliest(prefix, goal, 81)
    assert score[0] == pytest.approx(truth.max().item(), abs=1e-5)
    assert near.any()


@torch.no_grad()
def test_where_rewards_count_the_beams_keep_the_greatest_returns(tiny):
    planner = tiny(goal_dim=0, expand=4, top=3)
    bins, value = planner._rewarding(torch.tensor([[0], [2]]), 5, seeded())
    x = planner.discretizer.decode(bins).view(2, 5, 3, 4)
    kept = 0.9**2
    gained = x[..., 0, 2] + kept * x[..., 1, 2] + kept**2 * x[..., 2, 3]
    torch.testing.assert_close(value.view(2, 5), gained)
    assert (value.view(2, 5).diff(dim=1) <= 0).all()
    assert bins.view(2, 5, 3, 4)[:, :, 0, 0].tolist() == [[0] * 5, [2] * 5]
    alone = planner._rewarding(torch.tensor([[0], [2]]).repeat_interleave(20, 0), 1, seeded())[1].view(2, 20)
    assert (value.view(2, 5)[:, 0] >= alone.mean(1)).all()  # wider search is no worse than the average narrow one


# -- the planner -------------------------------------------------------------------------------------------------------


def test_rewards_and_returns_are_parts_of_the_sequence(store):
    planner = build(store, goal_dim=0)
    rows, returns, reward = planner._rows(store), returns_to_go(store, 0.9), store.columns["reward"]
    assert rows.shape == (9000, 8)
    np.testing.assert_allclose(rows[:, 7], returns)
    np.testing.assert_allclose(rows[10, 6], reward[10] + 0.9 * reward[11], rtol=1e-5)
    np.testing.assert_allclose(rows[28, 6], reward[28] + 0.9 * reward[29], rtol=1e-5)
    np.testing.assert_allclose(rows[29, 6], reward[29], rtol=1e-5)  # the episode's last
    batch = planner.windows(store, "cpu").gather(torch.tensor([0]))
    back = planner._open(planner.sequence(batch["bins"], None))
    torch.testing.assert_close(back, batch["bins"])


def test_what_comes_after_the_goal_is_no_part_of_the_loss(store):
    planner = build(store)
    batch = planner.windows(store, "cpu").sample(8, seeded())
    loss, _ = planner.loss(batch, seeded(3))
    arrival = torch.randint(1, 5, (8,), generator=seeded(3))
    other = dict(batch, bins=batch["bins"].clone())
    for i, k in enumerate(arrival):
        other["bins"][i, k + 1 :] = 0
    torch.testing.assert_close(planner.loss(other, seeded(3))[0], loss)
    goal = batch["bins"][torch.arange(8), arrival, :2]
    assert planner.sequence(batch["bins"], goal)[:, :2].tolist() == (goal + 40 * torch.tensor([6, 7])).tolist()


def test_a_short_training_plans_to_goals(store):
    planner = build(store, actions=False)
    assert train(planner, store, 300)["loss"] < 2.0
    start = np.array([[0.0, 0.0, 0.7, 0.0], [0.0, 0.0, 0.0, -0.7]], np.float32)
    goal = np.array([[0.5, 0.0], [0.0, -0.5]], np.float32)
    plan = planner.plan(start, goal, samples=4)
    assert [part.shape for part in (plan.observations, plan.values, plan.arrivals)] == [(2, 4, 5, 4), (2, 4), (2, 4)]
    assert plan.actions is None
    np.testing.assert_array_equal(plan.observations[:, :, 0], np.repeat(start[:, None], 4, 1))
    assert (np.linalg.norm(plan.observations[:, 0, -1, :2] - goal, axis=1) <= 0.3).all()
    assert (np.diff(plan.values, axis=1) <= 0).all()
    with pytest.raises(UserError, match="needs a goal of 2"):
        planner.plan(start)


def test_a_short_training_plans_for_rewards(store):
    planner = build(store, goal_dim=0)
    train(planner, store, 150)
    plan = planner.plan(np.zeros((3, 4), np.float32), samples=4, generator=seeded())
    assert [part.shape for part in (plan.observations, plan.actions, plan.values)] == [(3, 4, 5, 4), (3, 4, 5, 2), (3, 4)]
    assert plan.arrivals is None


def test_a_run_loads_and_its_controller_acts(tmp_path, store):
    save_run(tmp_path / "run", build(store))
    planner = load_run(tmp_path / "run", kind="planner")

    class Task:
        dt, action_low, action_high = 0.1, -np.ones(2), np.ones(2)

    for track, width in (("pd", 4), ("actions", 2)):
        controller = planner.controller(Task, samples=2, track=track)
        chunk = controller.act({"state": START[None, None], "goal": GOAL[None, None]}, 0)
        assert chunk.references.shape == (1, 5, width)
    assert controller.evaluations == 5 * 6 - 4
    with pytest.raises(UserError, match="samples no diffusion"):
        planner.controller(Task, sampler={"steps": 3})
    with pytest.raises(UserError, match="did you mean 'uniform'"):
        build(store, bins={"number": 4, "kind": "unifrom"})
