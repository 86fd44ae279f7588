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
    settings |= {"network": {"name": "mlp", "width": 64, "depth": 2}}
    settings |= {} if name == "one_step" else {"horizon": 8, "samples": 1}
    model = offline.build("world_model", name, SPEC, settings | changes, seed=0)
    if store is not None:
        model.prepare(store)
    return model.eval()


def fit(model, store, steps=200, lr=3e-3):
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

    def moved(k):
        return np.sqrt(((o[:, k:] - o[:, :-k]) ** 2).mean((0, 1)))

    np.testing.assert_allclose(model.difference[0].numpy(), moved(1), rtol=0.05)
    for error, usual in zip(model.error.numpy(), model.usual.numpy()):
        np.testing.assert_allclose(error, moved(1), rtol=0.05)
        np.testing.assert_allclose(usual[0], moved(1), rtol=0.05)
        np.testing.assert_allclose(usual[7], moved(8), rtol=0.05)
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
    a = torch.from_numpy(clear.columns["action"].reshape(20, 40, 2))[:, :2]
    past, noise = torch.from_numpy(o[:, :2]), torch.tensor([[[100.0], [0.0]]])
    for known in (True, False):
        mask = torch.tensor([[known, True]]).expand(20, -1)
        step = model.step(past, mask, a)
        np.testing.assert_allclose(step.forecast.numpy(), o[:, 2], atol=2e-3)
    # what is hidden does not count
    np.testing.assert_array_equal(model.step(past + noise, mask, a).condition.numpy(), step.condition.numpy())
    assert (step.scale > 0.05).all()
    # nor does autocast round it
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(model.step(past, mask, a).forecast.numpy(), step.forecast.numpy())


def test_a_fresh_model_predicts_its_forecast(store):
    model = build("diffusion_world_model", store, forecast="hold", sampler={"name": "ddim", "steps": 2})
    observations, _ = model.rollout(np.full(4, 0.5), np.zeros((20, 2)))
    np.testing.assert_allclose(observations, 0.5, atol=1e-5)


def test_the_forecast_is_carried_on(store):
    """A linear world is known to its last step, and the noisy states are 0 beside that."""
    model = build("diffusion_world_model", store)
    o = torch.from_numpy(store.columns["observation"].reshape(60, 40, 4))
    a = torch.from_numpy(store.columns["action"].reshape(60, 40, 2))
    outlook = model.outlook(o[:, :1], torch.ones(60, 1, dtype=torch.bool), a[:, :8])
    np.testing.assert_allclose(outlook.forecast.numpy(), o[:, 1:9], atol=2e-3)


def test_pure_noise_says_nothing_and_clean_states_say_all(store):
    """What the cell sees beside a step's condition: 0 at t = 1, and at t = 0 where the clean state lies."""
    model = build("diffusion_world_model", store, forecast="hold")
    o = torch.from_numpy(store.columns["observation"].reshape(60, 40, 4))
    a = torch.from_numpy(store.columns["action"].reshape(60, 40, 2))
    outlook = model.outlook(o[:, :1], torch.ones(60, 1, dtype=torch.bool), a[:, :8])
    simulator = model.denoiser.network
    seen = []
    simulator.cell.register_forward_pre_hook(lambda cell, inputs: seen.append(inputs[0][:, 0].detach()))
    x_0 = model.pack(outlook, (o[:, 1:9] - outlook.forecast) / outlook.usual, a[:, :8, :1])
    noise, clean = torch.randn(x_0.shape), model.clean.expand(60, 8, 3)
    actions = model.layout.levels(clean)
    simulator(torch.where(actions, x_0, noise), (~clean).float(), outlook)
    assert all((each == 0).all() for each in seen)
    seen.clear()
    simulator(x_0, torch.zeros(60, 8, 3), outlook)
    # the fresh cell corrects nothing: every estimate is o_0, and the clean state lies o_k - o_0 from it
    for k, each in enumerate(seen):
        np.testing.assert_allclose(each.numpy(), ((o[:, k + 1] - o[:, 0]) / outlook.usual[:, k]).numpy(), atol=1e-5)


def test_every_token_has_its_own_level(store):
    """Clean states up to k, noise after: what the cell sees of each is its own."""
    model = build("diffusion_world_model", store, forecast="hold")
    o = torch.from_numpy(store.columns["observation"].reshape(60, 40, 4))
    a = torch.from_numpy(store.columns["action"].reshape(60, 40, 2))
    outlook = model.outlook(o[:, :1], torch.ones(60, 1, dtype=torch.bool), a[:, :8])
    x_0 = model.pack(outlook, (o[:, 1:9] - outlook.forecast) / outlook.usual, a[:, :8, :1])
    t = torch.zeros(60, 8, 3)
    t[:, 3:, [0, 2]] = 1.0
    seen = []
    model.denoiser.network.cell.register_forward_pre_hook(lambda cell, inputs: seen.append(inputs))
    model.denoiser(x_0, t, outlook)
    for k, (state, level, _) in enumerate(seen):
        assert (state == 0).all() == (k >= 3)
        assert (level == float(k >= 3)).all()


def test_actions_are_clean_tokens_and_rewards_noisy_ones_of_one_denoiser(trained, store):
    """The actions that count are those of x, whatever the scene was made with; rewards are denoised with the states."""
    model = trained["diffusion_world_model"]
    o = torch.from_numpy(store.columns["observation"].reshape(60, 40, 4))
    a = torch.from_numpy(store.columns["action"].reshape(60, 40, 2))
    known = torch.ones(60, 1, dtype=torch.bool)
    outlook, other = model.outlook(o[:, :1], known, a[:, :8]), model.outlook(o[:, :1], known, a[:, 8:16])
    other.forecast, other.usual = outlook.forecast, outlook.usual
    x = model.pack(outlook, torch.randn(60, 8, 4), torch.randn(60, 8, 1))
    clean = model.clean.expand(60, 8, 3)
    with torch.no_grad():
        d, same = (model.denoiser(x, (~clean).float(), scene) for scene in (outlook, other))
        torch.testing.assert_close(d, same)
        torch.testing.assert_close(d[..., model.layout["action"]], x[..., model.layout["action"]])
        # a reward that is known is believed
        t = (~clean).float() * 1e-3
        x[..., model.layout["reward"]] = model.normalizer.normalize("reward", a[:, :8, :1])
        r = model.denoiser(x, t, outlook)[..., model.layout["reward"]]
    assert (r - x[..., model.layout["reward"]]).square().mean().sqrt() < 0.3


def test_levels_favour_noise_as_configured(store):
    for noise in (1.0, 2.0, 4.0):
        levels = build("diffusion_world_model", noise=noise).levels(4000, torch.Generator().manual_seed(0))
        assert 0 < levels.min() <= levels.max() <= 1
        # the mean of the density noise t^(noise - 1)
        np.testing.assert_allclose(levels.mean().item(), noise / (noise + 1), atol=1e-3)


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


@pytest.mark.parametrize("name", NAMES)
def test_the_past_counts_where_velocities_are_hidden(store, name):
    hidden = store.select(range(store.episodes))
    hidden.columns = {**store.columns, "observation": store.columns["observation"][:, [0, 1, 0, 1]]}
    model = fit(build(name, hidden, history=2, forget=0.3), hidden, steps=100)
    o = hidden.columns["observation"].reshape(60, 40, 4)
    a = hidden.columns["action"].reshape(60, 40, 2)

    def error(*history):
        return np.abs(model.rollout(history[0], a[:, 1:9], *history[1:])[0] - o[:, 2:10]).mean()

    # with the past the world is linear, and the forecast exact
    assert error(o[:, :2], a[:, :1]) < 0.01 * error(o[:, 1])
    # observations without the actions between them were never trained on, and count as the last one alone
    assert error(o[:, :2]) == pytest.approx(error(o[:, 1]))


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
