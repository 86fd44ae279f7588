"""FISOR: expectiles, reachability against closed forms, weights, choice, and training through the commands."""

import json

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import expectile

import offline
import robots
from offline import DataSpec, TrajectoryStore
from pilotwave.cli import main
from pilotwave.config import compose, plain
from pilotwave.errors import UserError
from policies import FISOR, load
from policies.fisor import CHOICES, constraint, expectile_loss, feasibility_weights, hamilton_jacobi, reward_weights
from robots.collect import collect
from tests.test_bad_inputs import d4rl

SMALL = {"critic": {"width": 64, "fourier": 0, "target": 0.05}, "network": {"name": "mlp", "width": 8, "depth": 1}}
TILT = {"temperature": 2.0, "largest": 9.0}, {"temperature": 5.0, "largest": 30.0}


def config(**changes):
    return plain(compose("train", ["policy=fisor"]).policy) | SMALL | changes


def build(store, **changes):
    torch.manual_seed(0)
    spec = DataSpec("toy", store.columns["observation"].shape[1], store.columns["action"].shape[1], 0.1)
    policy = FISOR(spec, config(**changes))
    policy.prepare(store)
    return policy


def train(policy, store, steps, lr=5e-3, batch=256):
    windows = policy.windows(store, "cpu")
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        policy.loss(windows.sample(batch, generator), generator)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy.eval()


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 0.95), st.lists(st.floats(-5, 5), min_size=2, max_size=12))
def test_the_loss_is_least_at_scipys_expectile(tau, sample):
    values, grid = torch.tensor(sample, dtype=torch.float64), torch.linspace(-5, 5, 20_001, dtype=torch.float64)
    best = grid[expectile_loss(values[:, None] - grid, tau).mean(0).argmin()]
    assert abs(float(best) - expectile(sample, tau)) < 1e-3


@pytest.mark.parametrize("discount", [0.5, 0.9, 0.99])
def test_reachability_on_a_chain(discount):
    """h = -1 at n states and 1 after them, where the chain ends: from i steps before, V = discount^i (1 + 1) - 1."""
    n = 12
    h, goes_on = torch.full((n + 1,), -1.0), torch.arange(n + 1) < n
    h[-1] = 1.0
    v = torch.zeros(n + 1)
    for _ in range(n + 1):
        v = hamilton_jacobi(h, torch.cat([v[1:], v[:1]]), discount, goes_on)
    torch.testing.assert_close(v, 2 * discount ** torch.arange(n, -1, -1) - 1)


def double_integrator(n, rng, brake=1.0, dt=0.1):
    """n episodes of one step each before x = 1, from everywhere with every force; the margin is that of the state reached."""
    x, v, a = rng.uniform(-1.5, 1.3, n), rng.uniform(-1.5, 1.5, n), brake * rng.uniform(-1, 1, n)
    reached = np.stack([x + dt * v + dt**2 * a / 2, v + dt * a], -1)
    observation = np.stack([np.stack([x, v], -1), reached], 1).reshape(-1, 2).astype(np.float32)
    columns = {
        "observation": observation,
        "action": np.repeat(a[:, None], 2, 0).astype(np.float32),
        "reward": np.zeros(2 * n, np.float32),
        "margin": np.repeat(1 - reached[:, 0], 2).astype(np.float32),
    }
    return TrajectoryStore(columns, 2 * np.arange(1, n + 1), {}, dt, "toy", {})


def test_the_feasible_region_is_that_of_the_braking_distance():
    """A double integrator before a wall at x = 1: it can stop in time where x + v^2 / 2 <= 1 for v > 0, else where x <= 1."""
    store = double_integrator(20_000, np.random.default_rng(0))
    feasibility = config()["feasibility"] | {"discount": 0.97, "expectile": 0.97}
    policy = train(build(store, feasibility=feasibility), store, 800)
    x, v = np.meshgrid(np.linspace(-1.2, 1.2, 49), np.linspace(-1.2, 1.2, 49))
    room = 1 - x - np.maximum(v, 0) ** 2 / 2
    states = torch.as_tensor(np.stack([x, v], -1).reshape(-1, 2), dtype=torch.float32)
    infeasible = (policy.infeasibility(states) > 0).numpy().reshape(x.shape)
    clear = np.abs(room) > 0.15  # what dt, the discount and the network leave open
    assert (infeasible == (room < 0))[clear].mean() > 0.98
    moving = clear & (x < 0.95) & (v > 0.5)  # safe by themselves, and lost
    assert (infeasible & (room < 0))[moving].sum() > 0.9 * (room < 0)[moving].sum() > 20


def test_weights_are_the_papers():
    q_h, v_h = torch.tensor([-0.5, 0.2, 0.1, 0.7, -0.1]), torch.tensor([-0.6, -0.1, 0.3, 0.3, 0.9])
    a_r = torch.tensor([0.4, 0.4, 0.4, 0.4, 3.0])
    w = feasibility_weights(q_h, v_h, a_r, *TILT)
    torch.testing.assert_close(w, torch.tensor([np.exp(0.8), 0.0, np.exp(1.0), np.exp(-2.0), 30.0]).float())
    torch.testing.assert_close(reward_weights(q_h, v_h, a_r, *TILT), torch.tensor([np.exp(0.8)] * 4 + [9.0]).float())


def test_choices():
    q_h = torch.tensor([[-0.5, -0.1, 0.2], [0.3, 0.1, 0.2]])
    q_r = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    assert {name: choose(q_h, q_r).tolist() for name, choose in CHOICES.items()} == {
        "safest": [0, 1], "feasible": [1, 1], "reward": [2, 2],
    }  # fmt: skip


def test_the_policy_carries_out_the_chosen_candidate():
    store = double_integrator(200, np.random.default_rng(0))
    policy = build(store).eval()
    history = {"observation": torch.tensor([[[0.5, 1.0]], [[-1.0, 0.0]]])}

    for name, choice in CHOICES.items():
        seen = []

        def choose(q_h, q_r, choice=choice, seen=seen):
            seen += [q_h, q_r, choice(q_h, q_r)]
            return seen[2]

        actions = policy.sample_actions(history, policy.table(), torch.Generator().manual_seed(0), 16, choose)
        assert actions.shape == (2, 1, 1)
        s = policy.features(policy.normalizer.normalize("observation", history["observation"][:, -1]))
        q = policy.q(torch.cat([s, policy.normalizer.normalize("action", actions).flatten(1)], 1))
        q_h, q_r = q[:, :2].amax(1), q[:, 2:].amin(1)
        torch.testing.assert_close(q_h, seen[0][torch.arange(2), seen[2]], msg=name)
        torch.testing.assert_close(q_r, seen[1][torch.arange(2), seen[2]], msg=name)
        assert seen[0].shape == (2, 16)
        assert seen[0].std(1).min() > 1e-3


def test_what_is_beyond_the_region_is_worth_nothing():
    """A reward behind the wall: with `inside`, values do not lead there; without, they do."""
    store = double_integrator(4000, np.random.default_rng(0))
    store.columns["reward"] = (store.columns["margin"] < 0).astype(np.float32)
    at_the_wall = torch.tensor([[0.95, 1.0]])
    values = {}
    for inside in (True, False):
        policy = train(build(store, inside=inside), store, 150)
        s = policy.features(policy.normalizer.normalize("observation", at_the_wall))
        values[inside] = policy.v(s)[0, 1].item()
    assert abs(values[True]) < 0.1 < 0.5 < values[False]


def test_steps_after_an_end_for_good_count_nothing():
    """Episodes that end for good enter with their chunks cut short; those that end by time, only whole."""
    n = 6
    columns = {
        "observation": np.random.default_rng(0).normal(size=(2 * n, 2)).astype(np.float32),
        "action": np.zeros((2 * n, 1), np.float32),
        "reward": np.ones(2 * n, np.float32),
        "cost": (np.arange(2 * n) % 3 == 0).astype(np.float32),
        "terminal": np.arange(2 * n) == n - 1,
    }
    store = TrajectoryStore(columns, [n, 2 * n], {}, 0.1, "toy", {})
    policy = build(store, execute=2)
    windows = policy.windows(store, "cpu")
    batch = windows.gather(torch.arange(len(windows)))
    alone = {key: part[(windows.episode == 0) | batch["valid"][:, 2]] for key, part in batch.items()}
    losses = [policy.loss(b, torch.Generator().manual_seed(0))[1] for b in (batch, alone)]
    for key in ("v_h_loss", "q_h_loss", "v_r_loss", "q_r_loss"):  # means over the batch
        torch.testing.assert_close(losses[0][key] * len(batch["h"]), losses[1][key] * len(alone["h"]))
    assert len(alone["h"]) == n + n - 2


def test_constraints_of_margins_and_of_costs():
    def h(**columns):
        return constraint(TrajectoryStore(columns, [3], {}, 0.1, "toy", {}), {"scale": 0.5, "reserve": 0.1, "broken": 25.0})

    np.testing.assert_allclose(h(margin=np.array([9.0, 0.35, -0.4])), [-1, -0.5, 1], rtol=1e-6)
    np.testing.assert_array_equal(h(cost=np.array([0.0, 2.0, 0.0])), [-1, 25, -1])
    with pytest.raises(UserError, match="toy has neither margins nor costs"):
        h(reward=np.zeros(3))


# -- through the commands ----------------------------------------------------------------------------------------------
TASK = "task=pointmaze-large-hazards"
TINY = [
    "policy=fisor", "policy.critic.width=8", "policy.network.width=8", "policy.network.depth=1",
    "train.steps=2", "train.batch=8", "train.device=cpu", "train.compile=off",
]  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("fisor") / "hazards.hdf5"
    assert main(["collect", TASK, "task.goal=fixed", "steps=6000", f"out={path}"]) == 0
    return path


def test_collection_records_margins_and_costs(recorded, capsys):
    store = offline.read(recorded)
    margin, cost = store.columns["margin"], store.columns["cost"]
    np.testing.assert_array_equal(cost > 0, margin < 0)
    assert 0 < cost.mean() < 0.5
    inside = np.setdiff1d(np.arange(store.steps - 1), store.episode_ends - 1)
    task = robots.make("pointmaze-large-hazards")
    task.reset_to(store.columns["observation"][inside[::50]], np.tile(task.maze.goal, (len(inside[::50]), 1)))
    info = task.step(store.columns["action"][inside[::50]])[3]
    np.testing.assert_allclose(info["margin"], margin[inside[::50]], atol=1e-4)
    np.testing.assert_allclose(task.margins(store.columns["observation"])[inside + 1], margin[inside], atol=1e-5)
    assert main(["data", str(recorded)]) == 0
    assert "margin" in capsys.readouterr().out


def test_it_trains_and_rolls_out(recorded, tmp_path):
    out, result = tmp_path / "run", tmp_path / "out.json"
    assert main(["train", *TINY, TASK, "task.goal=fixed", f"data={recorded}", f"out={out}"]) == 0
    few = ["episodes=2", "horizon=20", "timing_decisions=1", "controller.candidates=3", "controller.choice=safest"]
    assert main(["rollout", str(out), *few, f"json={result}"]) == 0
    metrics = json.loads(result.read_text())
    assert metrics["task_options"]["goal"] == "fixed"
    assert metrics["violations"]["episode_rate"] >= 0
    assert metrics["evaluations"] == 5
    assert load(out).act(np.zeros((1, 4))).shape == (10, 2)
    assert main(["rollout", str(out), TASK, *few]) == 0  # the task by name too


def test_data_without_constraints_takes_the_tasks_or_is_refused(recorded, tmp_path, capsys):
    bare = tmp_path / "bare.hdf5"
    with h5py.File(recorded) as old, h5py.File(bare, "w") as new:
        for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
            new[key] = old[key][:]
    assert main(["train", *TINY, TASK, f"data={bare}", f"out={tmp_path / 'a'}"]) == 0
    for task in ("task=pointmaze-large", "task=pointmaze-large-random-hazards"):  # none, and none that the state tells of
        assert main(["train", *TINY, task, f"data={bare}", f"out={tmp_path / 'b'}"]) == 2
        error = capsys.readouterr().err
        assert "bare.hdf5 has neither margins nor costs" in error
        assert error.count("pilotwave: error: ") == 1
    assert not (tmp_path / "b" / "model.safetensors").exists()


@pytest.mark.parametrize(("costs", "words"), [(np.zeros(40), "no step"), (np.ones(40), "every step"), (np.zeros(39), "unequal")])
def test_costs_that_teach_nothing_are_refused(costs, words, tmp_path, capsys):
    path = d4rl(tmp_path / "dsrl.hdf5", costs=costs.astype(np.float32))
    assert main(["train", *TINY, "task=pointmaze-large", f"data={path}", f"out={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "dsrl.hdf5" in error


def test_dsrl_costs_are_read(tmp_path):
    costs = np.arange(40) % 7 == 0
    store = offline.read(d4rl(tmp_path / "dsrl.hdf5", costs=costs.astype(np.float64)))
    np.testing.assert_array_equal(store.columns["cost"], costs)
    offline.write(store, tmp_path / "again.hdf5", "d4rl")
    np.testing.assert_array_equal(offline.read(tmp_path / "again.hdf5").columns["cost"], costs)


def test_locomotion_under_a_roof_records_margins(tmp_path):
    from robots import behaviour

    policies = behaviour.load("checkpoints/hopper-behaviour")
    path = tmp_path / "roof.hdf5"
    facts = collect("hopper-roof", 300, path, behaviour=policies, quality="medium")
    columns = offline.read(path).columns
    height = columns["observation"][:, 0]
    episode = offline.read(path).episode_ends
    inside = np.setdiff1d(np.arange(299), episode - 1)
    np.testing.assert_allclose(columns["margin"][inside], 1.5 - height[inside + 1], atol=1e-5)
    assert facts["unsafe_steps"] == int((columns["margin"] < 0).sum())


@pytest.mark.parametrize(
    "setting", ["policy.weights=cost", "policy.choice=best", "policy.feasibility.expectile=1", "policy.execute=0"]
)
def test_bad_settings_are_named(setting, recorded, tmp_path, capsys):
    assert main(["train", *TINY, TASK, f"data={recorded}", f"out={tmp_path / 'run'}", setting]) == 2
    assert setting.partition("=")[0] in capsys.readouterr().err
