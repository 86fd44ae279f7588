"""Trajectory Diffuser: the proposer is causal and learns steps, refining from level 0 changes nothing and from 1 forgets it."""

import json

import numpy as np
import pytest
import torch
import toy_planner
from omegaconf import OmegaConf
from toy_planner import seeded, straight_paths, train

from offline import load_run, save_run
from offline.returns import scaled_returns
from pilotwave.cli import main
from pilotwave.config import compose
from pilotwave.errors import UserError
from planners import TrajectoryDiffuser

START, GOAL = np.array([0.1, -0.2], np.float32), np.array([0.4, 0.3], np.float32)


def config(**changes):
    settings = OmegaConf.to_container(compose("train", ["planner=trajectory_diffuser"]).planner, resolve=True)
    settings |= {"horizon": 6, "stride": 2, "network": {"name": "mlp", "width": 48, "depth": 1, "shortcut": True}}
    network = {"name": "transformer", "width": 32, "depth": 1, "heads": 2}
    settings["proposer"] = {"temperature": 1.0, "weight": 0.2, "network": network}
    return settings | changes


@pytest.fixture(scope="module")
def store():
    return straight_paths("x velocity", observed=("position",))


def build(store, goal_dim=2, trained_like=False, **changes):
    return toy_planner.build(TrajectoryDiffuser, config(**changes), store, goal_dim, trained_like)


def asked(planner, samples=3):
    """Normalized observation, goal and arrival tokens, `samples` of each."""
    o, g = (planner.normalizer.normalize("observation", torch.as_tensor(part)) for part in (START, GOAL))
    return o.expand(samples, 2), g.expand(samples, 2), torch.arange(1, samples + 1)


def test_plans_have_the_contracts_shapes_and_keep_their_pins(store):
    planner = build(store, trained_like=True)
    plan = planner.plan(np.stack([START, -START]), GOAL, samples=3, generator=seeded())
    assert [part.shape for part in (plan.observations, plan.actions, plan.values, plan.arrivals)] == [
        (2, 3, 6, 2),
        (2, 3, 6, 2),
        (2, 3),
        (2, 3),
    ]
    np.testing.assert_allclose(plan.observations[:, :, 0], np.stack([START, -START])[:, None].repeat(3, 1), atol=1e-5)
    at_arrival = plan.observations[np.arange(2)[:, None], np.arange(3), plan.arrivals, :2]
    np.testing.assert_allclose(at_arrival, np.broadcast_to(GOAL, (2, 3, 2)), atol=1e-5)
    assert planner.plan(START, GOAL, samples=3).actions.shape == (3, 6, 2)


def test_without_refinement_the_plan_is_the_proposal(store):
    planner = build(store, trained_like=True, arrivals="last")
    plan = planner.plan(START, GOAL, samples=3, generator=seeded(), level=0.0)
    o, g, _ = asked(planner)
    proposal = planner.propose(o, g, torch.full((3,), 5), seeded())
    proposal = planner.normalizer.denormalize("observation", proposal).numpy()
    order = [int(np.abs(proposal - way).sum((1, 2)).argmin()) for way in plan.observations]
    assert sorted(order) == [0, 1, 2]
    np.testing.assert_allclose(plan.observations, proposal[order], atol=1e-5)
    assert planner.table(level=0.0).evaluations == 0


def test_what_is_refined_stays_near_the_proposal_the_lower_the_level(store):
    """Of a denoiser that predicts 0, DDIM in one step to 0 leaves nothing; of one that knows x_0 it gives that back."""
    planner = build(store)
    proposal = torch.randn(3, 6, 2, generator=seeded())
    o, g, arrival = asked(planner)
    truth = proposal + 0.1
    planner.refiner.denoiser.forward = lambda x, t, condition=None: truth
    table = planner.table({"name": "ddim", "steps": 1}, level=0.5)
    refined = planner.refiner.sample_plans(o, g, arrival, table, seeded(), begin=proposal)
    free = ~planner.refiner.layout.levels(planner.refiner.clean(arrival, 3, o.device))
    torch.testing.assert_close(refined[free], truth[free])
    # a denoiser that leaves what it is given to its scale: what comes out is the proposal and as much noise as the level has
    schedule, moved = planner.refiner.denoiser.schedule, []
    planner.refiner.denoiser.forward = lambda x, t, condition=None: x / schedule.alpha(t.amax())
    for level in (0.1, 0.3):
        table = planner.table({"name": "ddim", "steps": 1}, level=level)
        refined = planner.refiner.sample_plans(o, g, arrival, table, seeded(), begin=proposal)
        moved.append((refined - proposal)[free].std())
        t = torch.tensor(level)
        torch.testing.assert_close(moved[-1], schedule.sigma(t) / schedule.alpha(t), rtol=0.3, atol=0)
    assert moved[0] < moved[1]


def test_the_table_is_the_samplers_from_the_level_down(store):
    planner = build(store)
    table = planner.table({"name": "ddim", "steps": 4}, level=0.6)
    torch.testing.assert_close(torch.stack([row.t for row in table.rows]).float(), torch.tensor([0.6, 0.45, 0.3, 0.15]))
    assert float(table.rows[-1].t_next) == 0.0


def test_the_proposer_does_not_look_ahead(store):
    planner = build(store, trained_like=True)
    o, wanted = torch.randn(2, 6, 2, generator=seeded()), torch.randn(2, 6, 3, generator=seeded(1))
    later = o.clone()
    later[:, 4:] = 5.0
    one, other = planner.proposer(o, wanted), planner.proposer(later, wanted)
    for a, b in zip(one, other):
        torch.testing.assert_close(a[:, :4], b[:, :4])
    assert (one[0][:, 4:] - other[0][:, 4:]).abs().max() > 0.01
    # and so shorter beginnings have the same future as whole windows
    torch.testing.assert_close(planner.proposer(o[:, :3], wanted[:, :3])[0], one[0][:, :3])


def test_the_proposers_loss_is_the_gaussian_likelihood(store):
    planner = build(store, trained_like=True)
    planner.proposer.step.copy_(torch.tensor([0.1, 0.4]))
    o, wanted = torch.randn(5, 6, 2, generator=seeded()), torch.randn(5, 6, 3, generator=seeded(1))
    mean, log_deviation = planner.proposer(o[:, :-1], wanted[:, :-1])
    step = planner.proposer.step
    density = torch.distributions.Normal(o[:, :-1] + step * mean, step * log_deviation.exp()).log_prob(o[:, 1:])
    constant = 0.5 * np.log(2 * np.pi) + step.log().mean()
    torch.testing.assert_close(planner.proposer.loss(o, wanted), -density.mean() - constant)


def test_a_short_training_proposes_ways_to_the_goal(store):
    planner = build(store, proposer=config()["proposer"] | {"temperature": 0.0, "weight": 1.0})
    assert set(train(planner, store, 120)) == {"loss", "duration_loss", "proposer_loss", "inverse_loss"}
    goals, arrival = torch.tensor([[0.3, 0.1], [-0.2, 0.2], [0.0, -0.3]]), torch.full((3,), 4)
    x = planner.propose(torch.zeros(3, 2), goals, arrival)
    assert (x[:, 4] - goals).norm(dim=-1).max() < 0.15  # the data spans 2
    assert (x[:, 2] - goals / 2).norm(dim=-1).max() < 0.15
    plan = planner.plan(START, GOAL, samples=8, generator=seeded(), level=0.0)
    way = plan.observations[:, : plan.arrivals.min() + 1]
    np.testing.assert_allclose(plan.actions[:, : way.shape[1] - 1], np.diff(way, axis=1) / 0.2, atol=0.25)


def test_without_goals_more_return_is_proposed_where_more_is_asked_for(store, tmp_path):
    planner = build(store, goal_dim=0)
    assert set(train(planner, store, 80)) == {"loss", "proposer_loss", "inverse_loss"}
    target, got = planner.target.clone(), []
    assert (scaled_returns(store, 0.99) <= target).float().mean() == pytest.approx(0.95, abs=0.001)
    for wanted in (-1.5, 1.5):
        planner.target.fill_(wanted)
        got.append(planner.propose(torch.zeros(64, 2), None, None, seeded())[:, -1, 0].mean())
    assert got[1] > got[0] + 0.3  # rewards are steps along x
    planner.target.copy_(target)
    plan = planner.plan(START, samples=2, generator=seeded())
    assert plan.arrivals is None
    save_run(tmp_path / "run", planner)
    again = load_run(tmp_path / "run", kind="planner").plan(START, samples=2, generator=seeded())
    np.testing.assert_array_equal(plan.observations, again.observations)


def test_bad_levels_are_named(store):
    with pytest.raises(UserError, match=r"planner\.level=1\.5"):
        build(store, level=1.5)


def test_the_proposers_calls_count_as_evaluations(store):
    class Task:
        dt, action_low, action_high = 0.1, -np.ones(2), np.ones(2)

    planner = build(store)
    assert [planner.controller(Task, level=level).evaluations for level in (0.0, 0.5)] == [5, 8]


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "umaze.hdf5"
    assert main(["collect", "task=pointmaze-umaze", "steps=3000", f"out={path}"]) == 0
    return path


@pytest.mark.parametrize("planner", ["forcing", "decision_diffuser", "trajectory_diffuser"])
def test_the_commands_train_and_roll_out(planner, collected, tmp_path):
    small = ["planner.network.width=16", "planner.network.depth=1", "planner.network.heads=2", "planner.horizon=6"]
    training = ["task=pointmaze-umaze", f"data={collected}", f"out={tmp_path}/run", "train.steps=3", "train.batch=8"]
    assert main(["train", f"planner={planner}", *training, *small]) == 0
    few = ["episodes=2", "horizon=20", "timing_decisions=1", "sampler.steps=2", f"json={tmp_path}/out.json"]
    assert main(["rollout", f"{tmp_path}/run", *few, "controller.samples=2"]) == 0
    metrics = json.loads((tmp_path / "out.json").read_text())
    assert (metrics["episodes"], metrics["horizon"]) == (2, 20)
    assert metrics["evaluations"] >= 2
