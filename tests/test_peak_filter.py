"""The filter at learned peaks: barriers and gradients against finite differences, actions against a dense search, labels and
networks against closed forms, and the commands."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import world_models
from offline import DataSpec, TrajectoryStore
from offline.returns import peaks
from pilotwave.cli import main
from robots.barriers import HalfSpace, project
from robots.peak_filter import AtPeak, ControlAffine, Ensemble, PeakFilter, load
from world_models.control_affine import ControlAffine as Learned

DO, DA = 5, 3
ROOF = HalfSpace([1.0], 1.0, features=[0])


def random_model(seed, width=16):
    """Networks of random weights: feature 0 is the height, feature 2 its speed."""
    rng = np.random.default_rng(seed)

    def ensemble(*sizes):
        pairs = pairwise(sizes)
        return Ensemble([(rng.normal(size=(2, i, o)) / i**0.5, rng.normal(size=(2, 1, o)) * 0.3) for i, o in pairs])

    return ControlAffine(
        ensemble(DO, width, DO * (1 + DA)), ensemble(DO, width, width, 1), rng.normal(size=DO), rng.uniform(0.5, 2, DO),
        rng.uniform(0.1, 0.3, DO), 0.3, 0, 2, -np.ones(DA), np.ones(DA),
    )  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_gradients_are_those_of_finite_differences_and_torch_agrees(seed):
    model, rng = random_model(seed), np.random.default_rng(seed + 1)
    barrier, x = AtPeak(ROOF, model, rising=0.1), rng.normal(size=(6, DO))
    x = x[abs(x[:, 2] - 0.1) > 1e-3]  # b leaps where the peak begins to count
    value, gradient = barrier.both(x)
    for i in range(DO):
        step = 1e-5 * np.eye(DO)[i]
        slope = (barrier.value(x + step) - barrier.value(x - step)) / 2e-5
        np.testing.assert_allclose(gradient[:, i], slope, atol=1e-6)
    other_value, other_gradient = barrier.both(torch.as_tensor(x)[None])
    np.testing.assert_allclose(other_value[0], value, atol=1e-9)
    np.testing.assert_allclose(other_gradient[0], gradient, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), margin=st.floats(0.0, 0.3))
def test_actions_keep_the_barrier_or_are_reported_infeasible(seed, margin):
    model, rng = random_model(seed), np.random.default_rng(seed + 1)
    filter = PeakFilter(model, [ROOF], margin=margin, rising=0.1)
    state, wanted = rng.normal(size=(40, DO)), rng.uniform(-1.5, 1.5, (40, DA))
    u = filter({"state": state}, wanted)
    assert (abs(u) <= 1 + 1e-9).all()
    drift, effect = model.step(state)
    h = filter.barriers[0].value(drift + (effect * u[..., None]).sum(1))
    assert (h >= margin - 1e-5)[filter.infeasible == 0].all()
    kept = filter.changed == 0
    np.testing.assert_array_equal(u[kept], wanted[kept].clip(-1, 1))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_projected_states_keep_the_barrier_or_are_said_not_to(seed):
    """What safe plans are made of: `project` with a learned barrier, arrays and tensors alike."""
    barrier, x = AtPeak(ROOF, random_model(seed), rising=0.1), np.random.default_rng(seed).normal(size=(30, DO))
    for states in (x, torch.as_tensor(x)):
        y, safe = project(states, [barrier], 0.02)
        assert (barrier.value(y)[safe] >= 0.02 - 1e-5).all()


def test_the_change_is_the_one_of_least_consequence():
    """Against a dense search over the actions, by the measure that the module states."""
    model, rng = random_model(3), np.random.default_rng(1)
    filter = PeakFilter(model, [ROOF], margin=0.0, rising=0.1, effort=0.1, iterations=8)
    state, wanted = rng.normal(size=(200, DO)), rng.uniform(-1, 1, (200, DA))
    u = filter({"state": state}, wanted)
    drift, effect = model.step(state)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 33)] * DA), -1).reshape(-1, DA)
    seen = np.array([1, 3, 4])  # neither the height nor its speed

    def cost(i, action):
        felt = ((action - wanted[i]) @ effect[i])[..., seen] / model.change[seen]
        return (felt**2).sum(-1) + 0.1 * ((action - wanted[i]) ** 2).sum(-1)

    rows = np.flatnonzero((filter.changed > 0) & (filter.infeasible == 0))
    assert len(rows) >= 5
    for i in rows:
        allowed = filter.barriers[0].value(drift[i] + grid @ effect[i]) >= 0
        assert cost(i, u[i]) <= cost(i, grid[allowed]).min() * 1.05 + 1e-3


def test_the_roof_that_cannot_be_kept_leaves_what_is_most():
    model, state = random_model(5), np.array([[3.0, 0.0, 1.0, 0.0, 0.0]])
    filter = PeakFilter(model, [ROOF])
    u = filter({"state": state}, np.zeros((1, DA)))
    drift, effect = model.step(state)
    assert filter.infeasible.tolist() == [1]
    corners = np.stack(np.meshgrid(*[(-1.0, 1.0)] * DA), -1).reshape(-1, DA)
    h = filter.barriers[0].value(drift + corners @ effect[0])
    assert filter.barriers[0].value(drift + u @ effect[0])[0] >= np.quantile(h, 0.7)


def test_peaks_of_recorded_rises():
    height = np.array([0, 1, 3, 2, 1, 2, 4, 0, 1, 2], np.float32)
    speed = np.array([1, 2, -1, -1, 1, 2, 0, 1, 1, 1], np.float32)
    store = TrajectoryStore({"observation": np.stack([height, speed], 1)}, np.array([7, 10]), {}, 0.1, "toy", {})
    nan = np.nan  # falling, or cut off before the peak
    np.testing.assert_array_equal(peaks(store, 0, 1), np.float32([3, 3, nan, nan, 4, 4, nan, nan, nan, nan]))


def balls(episodes=80, steps=30, seed=0):
    """(height, speed, place) of balls thrown up at random under gravity, pushed sideways by the first of two forces."""
    rng = np.random.default_rng(seed)
    action = rng.uniform(-1, 1, (episodes, steps, 2)).astype(np.float32)
    state = np.zeros((episodes, steps, 3), np.float32)
    state[:, 0] = rng.uniform((0, 1, -1), (1, 3, 1), (episodes, 3))
    for i in range(1, steps):
        z, v, x = state[:, i - 1].T
        state[:, i] = np.stack([z + 0.02 * v, v - 0.2, x + 0.1 * action[:, i - 1, 0]], 1)
    columns = {"observation": state.reshape(-1, 3), "action": action.reshape(-1, 2)}
    return TrajectoryStore(columns, np.arange(1, episodes + 1) * steps, {}, 0.02, "toy", {})


def test_the_model_learns_balls_and_is_the_same_without_torch(tmp_path):
    from offline.checkpoint import save_run
    from pilotwave.config import compose, plain

    store = balls()
    spec = DataSpec(task="toy", observation_dim=3, action_dim=2, dt=0.02, action_low=(-1, -1), action_high=(1, 1))
    config = plain(compose("train", ["world_model=control_affine"]).world_model) | {
        "peak": {"feature": 0, "velocity": 1},
        "width": 48,
    }
    torch.manual_seed(0)
    learned, generator = Learned(spec, config), torch.Generator().manual_seed(0)
    learned.prepare(store)
    windows, optimizer = learned.windows(store, "cpu"), torch.optim.Adam(learned.parameters(), 3e-3)
    for _ in range(300):
        loss, _ = learned.loss(windows.sample(128, generator), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_run(tmp_path, learned.eval(), dict(learned.named_parameters()))
    model = load(tmp_path)
    state = np.array([[0.5, 2.0, 0.3], [0.2, 1.2, -0.5]])
    np.testing.assert_allclose(model.peak(state)[0], [0.5 + 0.22, 0.2 + 0.084], atol=0.03)  # 0.02 (2 + 1.8 + ...)
    drift, effect = model.step(state)
    action = np.array([[0.7, -0.2], [-1.0, 0.4]])
    following = drift + (effect * action[..., None]).sum(1)
    np.testing.assert_allclose(following, [[0.54, 1.8, 0.37], [0.224, 1.0, -0.6]], atol=0.03)
    imagined, rewards = world_models.load(tmp_path).rollout(state, action[:, None])
    np.testing.assert_allclose(imagined[:, 0], following, atol=1e-5)
    assert rewards is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of the hopper from a few steps of its data, by the commands."""
    path = tmp_path_factory.mktemp("hopper")
    data = path / "hopper.hdf5"
    assert main(["collect", "task=hopper", "quality=full-replay", "steps=4000", f"out={data}"]) == 0
    settings = ["world_model.width=32", "train.steps=60", "train.warmup=5", "train.compile=off", "train.device=cpu"]
    assert main(["train", "world_model=control_affine", "task=hopper", f"data={data}", f"out={path / 'run'}", *settings]) == 0
    return path / "run"


def test_the_commands_hold_a_roof(folder, tmp_path):
    out = tmp_path / "out.json"
    common = [
        "checkpoints/hopper-behaviour",
        "episodes=2",
        "horizon=60",
        "timing_decisions=0",
        f"json={out}",
        "controller.explore=false",
    ]
    assert main(["rollout", *common, "task=hopper-roof", "filter=peak", f"filter.model={folder}", "filter.margin=0.2"]) == 0
    metrics = json.loads(out.read_text())
    assert metrics["filter"]["changed_rate"] > 0
    assert metrics["violations"]["worst_margin"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task=hopper-roof", "filter=peak", "filter.model=nowhere"], "nowhere lacks config.yaml"),
        (["task=hopper-roof", "filter=peak", "filter.model=checkpoints/hopper-behaviour"], "is a ppo"),
        (["task=hopper", "filter=peak", "filter.model=FOLDER"], "has no barriers"),
        (["task=hopper-roof", "filter.active=true"], "filter=peak"),
    ],
)
def test_what_cannot_be_filtered_ends_in_one_line(folder, words, said, capsys):
    words = [word.replace("FOLDER", str(folder)) for word in words]
    assert main(["rollout", "checkpoints/hopper-behaviour", *words, "episodes=1", "horizon=2"]) == 2
    assert said in capsys.readouterr().err
