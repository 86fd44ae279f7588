"""World models: what is known and asked for, alignment of actions and rewards, roll-outs, and that both models learn."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import offline
import world_models
from offline import DataSpec, TrajectoryStore
from pilotwave.config import compose
from pilotwave.errors import UserError

SPEC = DataSpec(task="toy", observation_dim=4, action_dim=2, dt=0.1)
NAMES = ("diffusion_world_model", "one_step")


def double_integrator(episodes=60, steps=40, seed=0):
    """(position, velocity) pushed by random forces, p += v / 10, v += a / 10; the reward is the first force."""
    rng = np.random.default_rng(seed)
    action = rng.uniform(-1, 1, (episodes, steps, 2))
    state = np.zeros((episodes, steps, 4))
    state[:, 0] = rng.uniform(-1, 1, (episodes, 4))
    for i in range(1, steps):
        state[:, i, :2] = state[:, i - 1, :2] + 0.1 * state[:, i - 1, 2:]
        state[:, i, 2:] = state[:, i - 1, 2:] + 0.1 * action[:, i - 1]
    columns = {"observation": state.reshape(-1, 4), "action": action.reshape(-1, 2), "reward": action[..., 0].reshape(-1)}
    columns = {name: column.astype(np.float32) for name, column in columns.items()}
    return TrajectoryStore(columns, np.arange(1, episodes + 1) * steps, {}, 0.1, "toy", {})


def build(name, store=None, **changes):
    settings = OmegaConf.to_container(compose("train", [f"world_model={name}"]).world_model, resolve=True)
    settings |= {"network": {"name": "mlp", "width": 64, "depth": 2}} | ({"horizon": 8} if name != "one_step" else {})
    model = offline.build("world_model", name, SPEC, settings | changes, seed=0)
    if store is not None:
        model.prepare(store)
    return model.eval()


def fit(model, store, steps=400, lr=3e-3):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    windows = model.windows(store, "cpu")
    optimizer = torch.optim.AdamW(model.train().parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        loss, _ = model.loss(windows.sample(64, generator), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.fixture(scope="module")
def store():
    return double_integrator()


@pytest.fixture(scope="module")
def trained(store):
    return {name: fit(build(name, store), store) for name in NAMES}


def test_differences_are_measured_within_episodes(store):
    model = build("diffusion_world_model", store, history=2, forecast="hold")
    o = store.columns["observation"].reshape(60, 40, 4)

    def spread(k):
        return np.sqrt(((o[:, k:] - o[:, :-k]) ** 2).mean((0, 1)))

    np.testing.assert_allclose(model.difference[0].numpy(), spread(1), rtol=0.05)
    for error in model.error.numpy():
        np.testing.assert_allclose(error[0], spread(1), rtol=0.05)
        np.testing.assert_allclose(error[7], spread(8), rtol=0.05)
    np.testing.assert_allclose(model.deviation.numpy(), o.reshape(-1, 4).std(0), rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_linear_forecast_is_exact_where_the_world_is_linear_and_ignores_contacts(name):
    store = double_integrator()
    # one window in ten hits something
    struck = np.random.default_rng(0).random(store.steps) < 0.01
    store.columns["observation"][struck] += 5.0
    model = build(name, store, history=2)
    clear = double_integrator(episodes=20, seed=1)
    o = clear.columns["observation"].reshape(20, 40, 4)
    a = model.normalizer.normalize("action", torch.from_numpy(clear.columns["action"].reshape(20, 40, 2)))
    for known in (True, False):
        mask = torch.tensor([[known, True]]).expand(20, -1)
        forecast, error = model.forecast(torch.from_numpy(o[:, :2]), mask, a[:, : 1 + model.T])
        np.testing.assert_allclose(forecast.numpy(), o[:, 2 : 2 + model.T], atol=2e-3)
    # what is hidden does not count
    noise = torch.from_numpy(o[:, :2]) + torch.tensor([[[100.0], [0.0]]])
    np.testing.assert_array_equal(model.forecast(noise, mask, a[:, : 1 + model.T])[0].numpy(), forecast.numpy())
    assert (error > 0.05).all()


def test_a_fresh_model_predicts_its_forecast(store):
    model = build("diffusion_world_model", store, forecast="hold", sampler={"name": "ddim", "steps": 2})
    observations, _ = model.rollout(np.full(4, 0.5), np.zeros((20, 2)))
    np.testing.assert_allclose(observations, 0.5, atol=1e-5)


def test_levels_say_what_is_known():
    model = build("diffusion_world_model", history=3, horizon=4)
    observation, reward, action = range(3)
    clean = model.clean(torch.tensor([[True, True, True], [False, False, True]]))
    assert clean.shape == (2, 7, 4)
    assert clean[:, :, 3].all()  # the forecast
    assert not clean[:, 3:, [observation, reward]].any()
    assert clean[:, 3:, action].all()
    assert clean[0, :3].all()
    # only the present is known: earlier observations are asked for, and so are the actions between them
    assert clean[1, :3, observation].tolist() == [False, False, True]
    assert clean[1, :3, action].tolist() == [True, False, False]


def test_training_hides_the_past_of_some_windows_and_never_the_present():
    model = build("diffusion_world_model", history=3, horizon=4, forget=0.5)
    valid = torch.ones(400, 7, dtype=torch.bool)
    valid[:50, 0] = False
    known = model.known_past(valid, torch.Generator().manual_seed(0))
    assert known[:, -1].all()
    assert not known[:50, 0].any()
    assert 0.4 < known[50:, 0].float().mean() < 0.6
    assert (known[50:, 0] == known[50:, 1]).all()


@pytest.mark.parametrize("name", NAMES)
def test_rollout_shapes(store, name):
    model = build(name, store, history=3)
    actions = np.zeros((5, 19, 2), np.float32)
    for observation, past in (
        (np.zeros((5, 4)), None),
        (np.zeros(4), None),
        (np.zeros((5, 2, 4)), np.zeros((5, 1, 2))),
        (np.zeros((5, 6, 4)), np.zeros((5, 5, 2))),
    ):
        observations, rewards = model.rollout(observation, actions, past)
        assert observations.shape == (5, 19, 4)
        assert rewards.shape == (5, 19)
    observations, rewards = model.rollout(np.zeros(4), actions[0])
    assert observations.shape == (19, 4)
    assert rewards.shape == (19,)
    assert build(name, reward=False).rollout(np.zeros(4), actions[0])[1] is None


@pytest.mark.parametrize("name", NAMES)
def test_a_longer_rollout_begins_like_a_shorter_one(trained, name):
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 24, 2)).astype(np.float32)
    start = np.random.default_rng(1).uniform(-1, 1, (3, 4)).astype(np.float32)
    short, long = (trained[name].rollout(start, actions[:, :n], seed=3)[0] for n in (8, 24))
    np.testing.assert_allclose(long[:, :8], short, atol=1e-5)
    # past the horizon it goes on from its own prediction
    again = trained["one_step"].rollout(long[:, 7], actions[:, 8:])[0]
    if name == "one_step":
        np.testing.assert_allclose(long[:, 8:], again, atol=1e-5)
    else:
        assert np.abs(long[:, 8:] - again).mean() < 0.3


@pytest.mark.parametrize("name", NAMES)
def test_models_learn_the_dynamics_and_the_rewards(trained, name):
    fresh = double_integrator(episodes=20, seed=1)
    o = fresh.columns["observation"].reshape(20, 40, 4)
    a, r = fresh.columns["action"].reshape(20, 40, 2), fresh.columns["reward"].reshape(20, 40)
    imagined, rewards = trained[name].rollout(o[:, 0], a[:, :24])
    deviation = trained[name].deviation.numpy()

    def error(prediction):
        return np.sqrt((((prediction - o[:, 1:25]) / deviation) ** 2).mean(-1)).mean(0)

    still = error(np.repeat(o[:, :1], 24, 1))
    straight = o[:, :1] + np.arange(1, 25)[None, :, None] * 0.1 * np.concatenate([o[:, :1, 2:], np.zeros((20, 1, 2))], -1)
    assert (error(imagined)[3:] < 0.5 * np.minimum(still, error(straight))[3:]).all()
    assert np.abs(rewards - r[:, :24]).mean() < 0.35 * np.abs(r).mean()


@pytest.mark.parametrize("name", NAMES)
def test_an_action_changes_the_steps_after_it(trained, name):
    actions = np.zeros((1, 8, 2), np.float32)
    pushed = actions.copy()
    pushed[:, 4, 0] = 1.0
    start = np.zeros(4, np.float32)
    (before, r_before), (after, r_after) = (trained[name].rollout(start, a, seed=0) for a in (actions, pushed))
    change = (after - before)[0, :, 2]
    # o_1..o_4 come before the push at a_4, o_5 carries it whole
    assert np.abs(change[:4]).max() < 0.03
    np.testing.assert_allclose(change[4:], 0.1, atol=0.04)
    np.testing.assert_allclose((r_after - r_before)[0], [0, 0, 0, 0, 1, 0, 0, 0], atol=0.3)




def test_samples_are_averaged_and_seeds_matter(store, trained):
    model = trained["diffusion_world_model"]
    actions = np.zeros((4, 8, 2), np.float32)
    spread = [model.rollout(np.zeros(4), actions, seed=s)[0] for s in range(3)]
    np.testing.assert_array_equal(spread[0], model.rollout(np.zeros(4), actions, seed=0)[0])
    assert np.abs(spread[0] - spread[1]).max() > 0
    one = np.std([model.rollout(np.zeros(4), actions, seed=s)[0] for s in range(8)], axis=0).mean()
    model.samples = 16
    many = np.std([model.rollout(np.zeros(4), actions, seed=s)[0] for s in range(8)], axis=0).mean()
    model.samples = 1
    assert many < 0.5 * one


def test_the_sampler_can_be_changed(trained):
    model = trained["diffusion_world_model"]
    assert model.evaluations == model.config["sampler"]["steps"]
    model.choose({"name": "heun", "steps": 3})
    assert model.evaluations == 5
    assert np.isfinite(model.rollout(np.zeros(4), np.zeros((8, 2)))[0]).all()
    model.choose(model.config["sampler"])


@pytest.mark.parametrize("name", NAMES)
def test_a_run_comes_back(store, trained, name, tmp_path):
    offline.save_run(tmp_path / "run", trained[name])
    again = world_models.load(tmp_path / "run", device="cpu")
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 12, 2))
    for ours, theirs in zip(trained[name].rollout(np.ones(4), actions), again.rollout(np.ones(4), actions)):
        np.testing.assert_array_equal(ours, theirs)


def test_errors_in_one_line(store):
    model = build("diffusion_world_model", store)
    for arguments, words in (
        ((np.zeros(3), np.zeros((5, 2))), "observation must have 4 features"),
        ((np.zeros(4), np.zeros((5, 3))), "actions must have 2 features"),
        ((np.full(4, np.nan), np.zeros((5, 2))), "NaN"),
        ((np.zeros((3, 4)), np.zeros((2, 5, 2))), "3 observations for 2"),
        ((np.zeros((2, 3, 4)), np.zeros((2, 5, 2)), np.zeros((2, 1, 2))), r"past_actions must be \(B, 2"),
    ):
        with pytest.raises(UserError, match=words):
            model.rollout(*arguments)
    with pytest.raises(UserError, match="horizon of 1"):
        build("one_step", horizon=4)
    with pytest.raises(UserError, match="at least 1"):
        build("diffusion_world_model", history=0)
    bare = TrajectoryStore({k: v for k, v in store.columns.items() if k != "reward"}, store.episode_ends)
    with pytest.raises(UserError, match="reward=false"):
        build("one_step", bare)
