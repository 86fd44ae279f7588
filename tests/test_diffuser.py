"""Diffuser: pins hold, shapes are the contract's, guidance tilts, and a small training plans straight lines."""

import numpy as np
import pytest
import torch

import offline
import robots
from offline import DataSpec, TrajectoryStore, Windows
from offline.returns import scaled_returns
from pilotwave.config import compose
from pilotwave.errors import UserError
from planners import Diffuser


def config(**changes):
    plain = compose("train", ["planner=diffuser"]).planner
    from omegaconf import OmegaConf

    settings = OmegaConf.to_container(plain, resolve=True)
    settings |= {"horizon": 8, "network": {"name": "mlp", "width": 64, "depth": 2}}
    settings |= {"sampler": {"name": "ddim", "steps": 5}}
    return settings | changes


def spec(goal_dim=2):
    return DataSpec(task="toy", observation_dim=4, action_dim=2, dt=0.1, goal_dim=goal_dim)


@pytest.fixture
def store():
    """Straight constant-velocity paths in the unit square, 20 steps an episode."""
    rng = np.random.default_rng(0)
    starts, velocity = rng.uniform(-1, 1, (200, 1, 2)), rng.uniform(-1, 1, (200, 1, 2))
    steps = np.arange(20)[None, :, None] * 0.1
    position = starts + velocity * steps
    observation = np.concatenate([position, np.broadcast_to(velocity, position.shape)], -1).reshape(-1, 4)
    columns = {
        "observation": observation.astype(np.float32),
        "action": np.zeros((4000, 2), np.float32),
        "reward": observation[:, 0].astype(np.float32),
    }
    return TrajectoryStore(columns, np.arange(1, 201) * 20, {}, 0.1, "toy", {})


def build(store=None, goal_dim=2, **changes):
    torch.manual_seed(0)
    planner = Diffuser(spec(goal_dim), config(**changes))
    if store is not None:
        planner.prepare(store)
    return planner.eval()


def test_plan_has_the_contracts_shapes_and_keeps_its_pins(store):
    planner = build(store)
    observation, goal = np.array([0.1, -0.2, 0.5, 0.0]), np.array([0.4, 0.3])
    plan = planner.plan(observation, goal, samples=3, generator=torch.Generator().manual_seed(0))
    assert plan.observations.shape == (3, 8, 4)
    assert plan.actions.shape == (3, 8, 2)
    assert plan.values.shape == (3,)
    assert (np.diff(plan.values) <= 0).all()
    np.testing.assert_allclose(plan.observations[:, 0], np.broadcast_to(observation, (3, 4)), atol=1e-5)
    np.testing.assert_allclose(plan.observations[:, -1, :2], np.broadcast_to(goal, (3, 2)), atol=1e-5)
    batch = planner.plan(np.stack([observation, observation]), goal, samples=3)
    assert batch.observations.shape == (2, 3, 8, 4)


def test_same_generator_same_plan(store):
    planner = build(store)
    plans = [
        planner.plan(np.zeros(4), np.ones(2), samples=2, generator=torch.Generator().manual_seed(7)).observations for _ in range(2)
    ]
    np.testing.assert_array_equal(*plans)


def test_loss_ignores_what_is_known(store):
    planner = build(store)
    batch = planner.windows(store, "cpu").gather(torch.arange(16))
    loss, info = planner.loss(batch, torch.Generator().manual_seed(0))
    again, _ = planner.loss(batch, torch.Generator().manual_seed(0))
    assert torch.isfinite(loss)
    assert info["loss"].requires_grad is False
    assert torch.equal(loss, again)


def test_first_action_weight_scales_the_first_action_alone(store):
    heavy, plain = build(store, first_action_weight=10.0), build(store)
    heavy.load_state_dict(plain.state_dict())
    batch = plain.windows(store, "cpu").gather(torch.arange(64))
    losses = [p.loss(batch, torch.Generator().manual_seed(0))[0].item() for p in (heavy, plain)]
    # the untrained network predicts zero, so each noisy entry's expected error is the same and the first action has 2
    # of the 8 * 6 - 4 - 2 noisy entries
    assert losses[0] > losses[1]
    noisy = 8 * 6 - 4 - 2
    ratio = losses[0] / losses[1]
    assert ratio == pytest.approx((noisy - 2 + 2 * 10) / noisy, rel=0.25)


def test_values_may_be_learned_without_noise(store):
    value = {"scale": 0.0, "discount": 0.9, "clean": 1.0, "network": {"name": "mlp", "width": 16, "depth": 1}}
    planner = build(store, goal_dim=0, value=value)
    for parameter in planner.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = planner.windows(store, "cpu").gather(torch.arange(64))
    _, info = planner.loss(batch, torch.Generator().manual_seed(0))
    expected = (planner._value(planner.pack(batch), torch.zeros(())) - batch["return"][:, 0]).square().mean()
    torch.testing.assert_close(info["value_loss"], expected.detach())


def test_value_guidance_raises_the_value(store):
    value = {"scale": 0.0, "discount": 0.9, "network": {"name": "mlp", "width": 64, "depth": 1}}
    planner = build(store, goal_dim=0, value=value)
    windows = planner.windows(store, "cpu")
    optimizer = torch.optim.Adam(planner.parameters(), 2e-3)
    planner.train()
    for step in range(250):
        generator = torch.Generator().manual_seed(step)
        loss, info = planner.loss(windows.sample(128, generator), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert info["value_loss"] < 0.8  # of a unit variance
    planner.eval()
    means = []
    for scale in (0.0, 1.0):
        plan = planner.plan(np.zeros((64, 4)), samples=1, guidance=scale, generator=torch.Generator().manual_seed(0))
        means.append(plan.observations[:, 0, -1, 0].mean())
    # reward is the x coordinate: guided plans end further right
    assert means[1] > means[0] + 0.02
    # and so do those that the value chose on their way, all together and not only the best
    planner.value_config["steer"] = "difference"
    sampler = {"name": "dpmpp_2m_sde", "steps": 8}
    for scale in (0.0, 4.0):
        planner.value_config["scale"] = scale  # as guidance=scale
        plan = planner.plan(np.zeros((4, 4)), samples=64, sampler=sampler, generator=torch.Generator().manual_seed(0))
        means.append(plan.observations[:, :, -1, 0].mean())
        np.testing.assert_allclose(plan.observations[:, :, 0], 0, atol=1e-5)
    assert means[3] > means[2] + 0.02
    again = planner.plan(np.zeros((4, 4)), samples=64, sampler=sampler, guidance=0.0, generator=torch.Generator().manual_seed(0))
    assert again.observations[:, :, -1, 0].mean() == means[2]


def test_guidance_is_refused_where_nothing_guides(store):
    task = robots.make("pointmaze-umaze")
    with pytest.raises(UserError, match=r"controller.guidance scales a value network"):
        build(store).controller(task.spec, guidance=1.0)
    value = {"scale": 0.1, "discount": 0.9, "network": {"name": "mlp", "width": 64, "depth": 1}}
    with pytest.raises(UserError, match=r"without controller.safety"):
        build(store, goal_dim=0, value=value).controller(task.spec, guidance=1.0, safety="correct")


def test_steering_by_value_refuses_goals_and_unknown_potentials():
    value = {"scale": 1.0, "discount": 0.9, "network": {"name": "mlp", "width": 8, "depth": 1}}
    with pytest.raises(UserError, match="did you mean 'difference'"):
        build(goal_dim=0, value=value | {"steer": "diference"})
    with pytest.raises(UserError, match="goals at tokens of their own"):
        build(value=value | {"steer": "max"})


def test_a_short_training_plans_straight_lines(store):
    network = {"name": "transformer", "width": 64, "depth": 2, "heads": 2}
    planner = build(store, arrivals="last", surprise_levels=[], network=network)
    settings = offline.TrainConfig(steps=400, batch=128, lr=2e-3, warmup=20, ema_decay=0.98, device="cpu")
    windows = planner.windows(store, "cpu")
    optimizer = torch.optim.Adam(planner.parameters(), settings.lr)
    planner.train()
    for step in range(settings.steps):
        generator = torch.Generator().manual_seed(step)
        loss, _ = planner.loss(windows.sample(settings.batch, generator), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    planner.eval()
    start, velocity = np.array([0.0, 0.0]), np.array([0.5, -0.3])
    goal = start + velocity * 0.7
    plan = planner.plan(np.r_[start, velocity], goal, samples=32, generator=torch.Generator().manual_seed(0))
    middle = plan.observations[:, :, :2].mean(0)
    straight = start + velocity * 0.1 * np.arange(8)[:, None]
    assert np.abs(middle - straight).max() < 0.12  # the way is 0.41 long


def test_durations_are_those_of_the_data(store):
    """On paths of constant velocity v, the goal o + 0.1 k v is reached at token k and never else."""
    planner = build(store)
    windows = planner.windows(store, "cpu")
    optimizer = torch.optim.Adam(planner.durations.parameters(), 3e-3)
    for step in range(300):
        generator = torch.Generator().manual_seed(step)
        loss, info = planner.loss(windows.sample(128, generator), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert info["duration_loss"] < 0.9  # log 7 = 1.9 before
    o = np.tile([0.0, 0.0, 0.6, -0.6], (7, 1)).astype(np.float32)
    k = np.arange(1, 8)
    goal = o[:, :2] + 0.1 * k[:, None] * o[:, 2:]
    plan = planner.eval().plan(o, goal.astype(np.float32), samples=5, generator=torch.Generator().manual_seed(0))
    assert plan.arrivals.shape == (7, 5)
    assert np.abs(plan.arrivals - k[:, None]).mean() < 0.6


def test_surprise_grows_with_the_distance_from_the_data(store):
    """Of a perfect denoiser of one known trajectory, the surprise is the squared distance times the mean SNR."""
    planner = build(store, goal_dim=0, surprise_levels=[0.2, 0.4])
    mode = torch.randn(1, 8, 6, generator=torch.Generator().manual_seed(0))
    planner.denoiser.forward = lambda x, t, condition=None: mode.expand_as(x)
    snr = planner.denoiser.schedule.snr(torch.tensor([0.2, 0.4])).mean()
    x = mode + torch.tensor([0.0, 0.1, 0.3])[:, None, None]
    expected = snr * torch.tensor([0.0, 0.01, 0.09])
    torch.testing.assert_close(planner.surprise(x, None), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"horizon": 1}, "at least 2"), ({"arrivals": "lst"}, "did you mean 'last'"), ({"stride": 0}, "at least 2")],
)
def test_bad_settings_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        build(**changes)


def test_bad_observations_and_goals_are_named(store):
    planner = build(store)
    for observation, goal, words in (
        (np.zeros(3), np.zeros(2), "observation must have 4"),
        (np.zeros(4), None, "needs a goal of 2"),
        (np.zeros(4), np.zeros(3), "goal must have 2"),
        (np.full(4, np.nan), np.zeros(2), "NaN"),
    ):
        with pytest.raises(UserError, match=words):
            planner.plan(observation, goal)


def test_value_guidance_needs_rewards(store):
    columns = {key: value for key, value in store.columns.items() if key != "reward"}
    bare = TrajectoryStore(columns, store.episode_ends, {}, 0.1, "toy", {})
    value = {"scale": 0.1, "discount": 0.9, "network": {"name": "mlp", "width": 32, "depth": 1}}
    with pytest.raises(UserError, match="rewards"):
        build(store, value=value).windows(bare, "cpu")


def test_returns_are_discounted_within_episodes(store):
    got = scaled_returns(store, 0.5).double().numpy()
    rewards = store.columns["reward"].astype(np.float64).reshape(200, 20)
    weights = 0.5 ** np.arange(20)
    raw = np.stack([(rewards[:, i:] * weights[: 20 - i]).sum(1) for i in range(20)], 1).reshape(-1)
    np.testing.assert_allclose(got, (raw - raw.mean()) / raw.std(), atol=1e-5)


def test_windows_are_normalized_and_strided(store):
    planner = build(store, stride=2)
    windows = planner.windows(store, "cpu")
    assert isinstance(windows, Windows)
    first = windows.gather(torch.tensor([0]))["observation"][0]
    expected = planner.normalizer.normalize("observation", torch.as_tensor(store.columns["observation"][0:16:2]))
    torch.testing.assert_close(first, expected)
