"""Decision Diffuser: what is wanted, classifier-free guidance at weights 0 and 1, low temperatures, goals and returns."""

import numpy as np
import pytest
import torch
import toy_planner
from omegaconf import OmegaConf
from toy_planner import seeded, straight_paths, train

from diffusion import inpaint
from offline import load_run, save_run
from offline.returns import scaled_returns
from pilotwave.config import compose
from pilotwave.errors import UserError
from planners import DecisionDiffuser

START, GOAL = np.array([0.1, -0.2], np.float32), np.array([0.4, 0.3], np.float32)


def config(**changes):
    settings = OmegaConf.to_container(compose("train", ["planner=decision_diffuser"]).planner, resolve=True)
    settings |= {"horizon": 6, "stride": 2, "sampler": {"name": "ddim", "steps": 5}}
    settings["network"] = {"name": "mlp", "width": 48, "depth": 1, "shortcut": True}
    settings["wanted"] = {"discount": 0.9, "quantile": 0.9, "dropout": 0.25, "width": 16}
    return settings | changes


@pytest.fixture(scope="module")
def store():
    return straight_paths("x velocity", observed=("position",))


def build(store, goal_dim=2, trained_like=False, **changes):
    return toy_planner.build(DecisionDiffuser, config(**changes), store, goal_dim, trained_like)


def test_plans_have_the_contracts_shapes_and_keep_the_start(store):
    planner = build(store, trained_like=True)
    plan = planner.plan(np.stack([START, -START]), GOAL, samples=3, generator=seeded())
    assert [part.shape for part in (plan.observations, plan.actions, plan.values, plan.arrivals)] == [
        (2, 3, 6, 2),
        (2, 3, 6, 2),
        (2, 3),
        (2, 3),
    ]
    np.testing.assert_allclose(plan.observations[:, :, 0], np.stack([START, -START])[:, None].repeat(3, 1), atol=1e-5)
    assert (np.diff(plan.values, axis=1) <= 0).all()
    with pytest.raises(UserError, match="needs a goal of 2"):
        planner.plan(START)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_at_weights_0_and_1_guidance_is_one_of_its_two_models(store, weight):
    planner = build(store, trained_like=True, temperature=1.0)
    o, y = torch.randn(5, 2, generator=seeded(1)), torch.randn(5, 3, generator=seeded(2))
    x = planner.sample_plans(o, y, planner.table(), weight, seeded())
    known = torch.zeros(5, 6, 2)
    known[:, 0] = o
    alone = inpaint(
        planner.denoiser, planner.table(), known, planner.clean(5, o.device), seeded(), condition=weight * planner.condition(y)
    )
    torch.testing.assert_close(x, alone)
    other = planner.sample_plans(o, y, planner.table(), 1 - weight, seeded())
    assert (x - other).abs().max() > 0.01


def test_a_temperature_of_0_leaves_no_chance(store):
    cold, warm = (build(store, trained_like=True, temperature=a) for a in (0.0, 0.5))
    sampler = {"name": "ddpm", "steps": 5}
    plans = [p.plan(START, GOAL, samples=1, sampler=sampler, generator=seeded(s)) for p in (cold, warm) for s in (0, 1)]
    np.testing.assert_array_equal(plans[0].observations, plans[1].observations)
    assert np.abs(plans[2].observations - plans[3].observations).max() > 0.01


def test_what_is_wanted_is_the_goal_and_its_discounted_return(store):
    planner = build(store)
    y = planner.wanted(torch.tensor([[0.1, 0.2], [0.3, 0.4]]), torch.tensor([1, 5]))
    torch.testing.assert_close(y, torch.tensor([[0.1, 0.2, 2 * 0.9 - 1], [0.3, 0.4, 2 * 0.9**5 - 1]]))


def test_conditions_are_dropped_as_often_as_asked(store, monkeypatch):
    planner, seen = build(store, wanted=config()["wanted"] | {"dropout": 0.3}), []
    loss = planner.denoiser.loss
    monkeypatch.setattr(
        planner.denoiser, "loss", lambda *a, condition, **k: seen.append(condition) or loss(*a, **k, condition=condition)
    )
    planner.loss(planner.windows(store, "cpu").gather(torch.arange(4000)), seeded())
    assert (seen[0] == 0).all(1).float().mean() == pytest.approx(0.3, abs=0.02)


def test_the_return_asked_for_is_a_quantile_of_the_datas(store):
    planner = build(store, goal_dim=0)
    returns = scaled_returns(store, 0.9)
    assert (returns <= planner.target).float().mean() == pytest.approx(0.9, abs=0.001)
    batch = planner.windows(store, "cpu").gather(torch.arange(0, 2000, 20))
    rows = planner.windows(store, "cpu").first[torch.arange(0, 2000, 20)]
    torch.testing.assert_close(batch["return"][:, 0], returns[rows])


def test_a_short_training_goes_where_it_is_asked_to(store):
    planner = build(store, network={"name": "transformer", "width": 48, "depth": 2, "heads": 2})
    assert set(train(planner, store, 150, batch=128)) == {"loss", "inverse_loss", "duration_loss"}
    goals, arrival = 0.6 * torch.rand(64, 2, generator=seeded(1)) - 0.3, torch.full((64,), 4)
    y, o = planner.wanted(goals, arrival), torch.zeros(64, 2)
    miss = []
    for weight in (0.0, 1.2):
        x = planner.sample_plans(o, y, planner.table(), weight, seeded())
        miss.append((x[:, 4] - goals).norm(dim=-1).mean())
    assert miss[1] < 0.6 * miss[0]
    way = planner.normalizer.denormalize("observation", x)
    actions = planner.normalizer.denormalize("action", planner.inverse_dynamics.along(x))
    assert (actions[:, :-1] - way.diff(dim=1) / 0.2).abs().mean() < 0.15


def test_without_goals_more_return_is_got_where_more_is_asked_for(store, tmp_path):
    planner = build(store, goal_dim=0)
    assert set(train(planner, store, 100, batch=128)) == {"loss", "inverse_loss"}
    got = []
    for wanted in (-1.5, 1.5):
        x = planner.sample_plans(torch.zeros(64, 2), torch.full((64, 1), wanted), planner.table(), 1.2, seeded())
        got.append(x[:, -1, 0].mean())  # rewards are steps along x
    assert got[1] > got[0] + 0.3
    plan = planner.plan(START, samples=2, generator=seeded())
    assert plan.arrivals is None
    save_run(tmp_path / "run", planner)
    again = load_run(tmp_path / "run", kind="planner").plan(START, samples=2, generator=seeded())
    np.testing.assert_array_equal(plan.observations, again.observations)


def test_guidance_doubles_the_evaluations(store):
    class Task:
        dt, action_low, action_high = 0.1, -np.ones(2), np.ones(2)

    planner = build(store)
    assert [planner.controller(Task, guidance=w).evaluations for w in (None, 1.0, 2.0)] == [10, 5, 10]


def test_bad_settings_are_named(store):
    with pytest.raises(UserError, match="at least 2 and 1"):
        build(store, horizon=1)
