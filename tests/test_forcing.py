"""Diffusion Forcing: levels by token, min-SNR weights, causality, stabilized history, guidance to goals and rewards."""

import numpy as np
import pytest
import torch
import toy_planner
from omegaconf import OmegaConf
from toy_planner import GOAL, START, seeded, straight_paths, train

from diffusion import level_matrices, sample
from offline import TrajectoryStore, load_run, save_run
from pilotwave.config import compose
from pilotwave.errors import UserError
from planners import DiffusionForcing
from planners.forcing import LEVELS


def config(**changes):
    settings = OmegaConf.to_container(compose("train", ["planner=forcing"]).planner, resolve=True)
    settings |= {"horizon": 6, "stride": 2, "sampler": {"name": "ddim", "steps": 5}}
    settings["network"] = {"name": "transformer", "width": 32, "depth": 2, "heads": 2, "causal": True}
    return settings | changes


@pytest.fixture(scope="module")
def store():
    return straight_paths()


def build(store, goal_dim=2, trained_like=False, **changes):
    return toy_planner.build(DiffusionForcing, config(**changes), store, goal_dim, trained_like)


def test_independent_levels_are_uniform_and_uncorrelated():
    levels = LEVELS["independent"]((20_000, 3, 2), seeded()).flatten(1)
    torch.testing.assert_close(levels.mean(0), torch.full((6,), 0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(levels.T.cov(), torch.eye(6) / 12, atol=0.003, rtol=0)


def test_mixed_levels_are_one_a_window_in_half_of_them():
    levels = LEVELS["mixed"]((2000, 3, 2), seeded())
    same = (levels == levels[:, :1, :1]).flatten(1).all(1)
    assert same.float().mean() == 0.5
    assert levels[same][:, 0, 0].var() == pytest.approx(1 / 12, rel=0.1)


def test_the_loss_is_the_datas_error_weighted_by_the_clipped_snr(store, monkeypatch):
    """Of a network that outputs 0 it is the mean of min(SNR, 5) x_0^2, token by token."""
    planner = build(store, duration_weight=0.0)
    monkeypatch.setattr(planner.inverse_dynamics, "loss", lambda o, a: torch.zeros(()))
    levels = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.95])[None, :, None]
    monkeypatch.setitem(LEVELS, "independent", lambda shape, generator: levels.expand(shape))
    batch = planner.windows(store, "cpu").gather(torch.arange(0, 3000, 30))
    loss, _ = planner.loss(batch, seeded())
    snr = planner.denoiser.schedule.snr(levels)
    assert (snr > 5).any()
    assert (snr < 5).any()
    torch.testing.assert_close(loss, (snr.clamp(max=5) * batch["observation"] ** 2).mean())


def test_the_past_does_not_see_the_future(store):
    planner = build(store, trained_like=True)
    x, t = torch.randn(2, 6, 4, generator=seeded()), torch.rand(2, 6, 1, generator=seeded(1))
    later_x, later_t = x.clone(), t.clone()
    later_x[:, 4:], later_t[:, 4:] = 3.0, 0.1
    one, other = planner.denoiser(x, t), planner.denoiser(later_x, later_t)
    torch.testing.assert_close(one[:, :4], other[:, :4])
    assert (one[:, 4:] - other[:, 4:]).abs().max() > 0.01


def test_guidance_carries_the_goal_into_the_past(store):
    planner = build(store, trained_like=True)
    goal = torch.ones(1, 2)

    def log_p(x):
        t = torch.full((1, 6, 4), 0.5)
        return planner.log_arrives(planner.denoise(x, t), t, goal, torch.tensor([4])).sum()

    x = torch.randn(1, 6, 4, generator=seeded()).requires_grad_()
    moved = torch.autograd.grad(log_p(x), x)[0].abs().amax(-1)[0]
    assert (moved[:5] > 0).all()  # the tokens up to the one that is to arrive
    assert moved[5] == 0


def test_goals_are_as_likely_as_an_unsure_prediction_allows(store):
    planner = build(store)
    d, goal = torch.zeros(2, 6, 4), torch.tensor([[0.3, 0.4], [0.3, 0.4]])
    for level in (0.0, 0.3, 1.0):
        a, s = (f(torch.tensor(level)) for f in (planner.denoiser.schedule.alpha, planner.denoiser.schedule.sigma))
        variance = 0.1**2 + s**2 / (a**2 + s**2)
        got = planner.log_arrives(d, torch.full((1, 6, 4), level), goal, torch.tensor([2, 5]))
        torch.testing.assert_close(got, -(0.25 / (2 * variance)).expand(2))


def test_known_tokens_are_shown_as_slightly_noisy(store):
    """alpha(h) x at level h for what is clean, the state itself for what is noisier than h."""
    planner, seen = build(store, history_level=0.1), {}
    planner.denoiser.forward = lambda x, t, condition=None: seen.update(x=x, t=t) or x
    x, t = torch.ones(1, 6, 4), torch.tensor([0.0, 0.0, 0.05, 0.2, 0.5, 1.0])[None, :, None].expand(1, 6, 4)
    planner.denoise(x, t)
    schedule = planner.denoiser.schedule
    assert seen["t"][0, :, 0].tolist() == pytest.approx([0.1, 0.1, 0.1, 0.2, 0.5, 1.0])
    torch.testing.assert_close(seen["x"][0, :2], schedule.alpha(torch.tensor(0.1)).expand(2, 4))
    torch.testing.assert_close(seen["x"][0, 3:], torch.ones(3, 4))


@pytest.mark.parametrize(
    ("matrix", "rows"),
    [({"name": "full_sequence"}, 5), ({"name": "pyramid", "delay": 1}, 10), ({"name": "autoregressive"}, 30)],
)
def test_every_matrix_makes_plans_from_the_first_observation(store, matrix, rows):
    planner = build(store, trained_like=True, matrix=matrix)
    table = planner.table()
    assert table.evaluations == rows
    levels = torch.stack([row.t for row in table.rows])[:, 0]
    wanted = getattr(level_matrices, matrix["name"])(5, 6, **{k: v for k, v in matrix.items() if k != "name"})[:-1, 0]
    torch.testing.assert_close(levels[:, 1:, :1].double(), wanted[:, 1:].double())
    assert (levels[:, 0] == 0).all()
    plan = planner.plan(np.stack([START, -START]), GOAL, samples=3, generator=seeded())
    assert [part.shape for part in (plan.observations, plan.actions, plan.values, plan.arrivals)] == [
        (2, 3, 6, 4),
        (2, 3, 6, 2),
        (2, 3),
        (2, 3),
    ]
    np.testing.assert_allclose(plan.observations[:, :, 0], np.stack([START, -START])[:, None].repeat(3, 1), atol=1e-5)
    assert (np.diff(plan.values, axis=1) <= 0).all()


def test_autoregressive_tokens_do_not_depend_on_the_horizon(store):
    """What is generated first is generated without what comes later, given no guidance."""
    planner, noise = build(store, trained_like=True, matrix={"name": "autoregressive"}), torch.randn(1, 6, 4, generator=seeded())
    plans = []
    for horizon in (6, 4):
        planner.H = horizon
        plans.append(sample(planner.denoise, planner.table(), noise[:, :horizon]))
    torch.testing.assert_close(plans[0][:, :4], plans[1], atol=1e-5, rtol=1e-4)


def test_a_short_training_is_guided_to_goals(store):
    planner = build(store)
    assert set(train(planner, store, 150)) == {"loss", "inverse_loss", "duration_loss"}
    o = np.zeros((16, 4), np.float32)
    o[:, 2:] = 0.6
    goal = np.full((16, 2), 0.48, np.float32)  # where the velocity leads in four tokens
    miss = {}
    for scale in (0.0, 8.0):
        plan = planner.plan(o, goal, samples=4, generator=seeded(), guidance=scale)
        x = plan.observations[..., 1:, :2]
        miss[scale] = np.linalg.norm(x - 0.48, axis=-1).min(-1).mean()
    assert miss[8.0] < 0.7 * miss[0.0]


def test_without_goals_plans_are_guided_to_rewards(store, tmp_path):
    planner = build(store, goal_dim=0)
    assert set(train(planner, store, 100)) == {"loss", "inverse_loss"}
    means = []
    for scale in (0.0, 0.5):
        plan = planner.plan(np.zeros((32, 4), np.float32), samples=2, generator=seeded(), guidance=scale)
        means.append(plan.observations[..., 1:, 0].mean())
    assert plan.arrivals is None
    assert means[1] > means[0] + 0.05  # the reward is the x coordinate
    save_run(tmp_path / "run", planner)
    again = load_run(tmp_path / "run", kind="planner")
    plans = [p.plan(START, samples=2, generator=seeded()).observations for p in (planner, again)]
    np.testing.assert_array_equal(*plans)


def test_tokens_hold_returns_to_go_where_they_are_asked_for(store):
    planner = build(store, goal_dim=0, discount=0.5)
    window = planner.windows(store, "cpu").gather(torch.tensor([0]))  # begins an episode of 30 steps
    returns = planner.normalizer.denormalize("reward", window["reward"])[0, :, 0].numpy()
    rewards, tokens = store.columns["reward"][:30], np.arange(planner.H)
    expected = [(0.5 ** np.arange(30 - k) * rewards[k:]).sum() for k in tokens * planner.stride]
    np.testing.assert_allclose(returns, expected, atol=1e-4)


def test_rewards_are_needed_without_goals(store):
    columns = {key: value for key, value in store.columns.items() if key != "reward"}
    with pytest.raises(UserError, match="has no rewards"):
        build(TrajectoryStore(columns, store.episode_ends, {}, 0.1, "toy", {}), goal_dim=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"horizon": 1}, "at least 2"),
        ({"levels": "independant"}, "did you mean 'independent'"),
        ({"matrix": {"name": "piramid"}}, "did you mean 'pyramid'"),
    ],
)
def test_bad_settings_are_named(store, changes, words):
    with pytest.raises(UserError, match=words):
        build(store, **changes)
