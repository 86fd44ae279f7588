"""The error on held-out episodes: its baselines, its groups of joints, and policies that know their past actions."""

import json

import numpy as np
import pytest
import torch
import yaml
from test_diffusion_policy import build, train

import policies
from offline import TrajectoryStore, load_run, read, save_run, write
from pilotwave.errors import UserError
from policies.controller import PolicyController
from policies.held_out import held_out_error, joint_groups
from policies.ridge import PENALTIES, Ridge

G1 = ["kLeftShoulderPitch", "kLeftElbow", "kLeftWristYaw", "kRightWristYaw", "kLeftHandThumbBend", "kRightHandPinky"]


def noisy_walks(episodes=12, length=40, seed=0):
    """Actions drift with a hidden velocity that turns at a border, so that neither holding nor a line is right."""
    rng = np.random.default_rng(seed)
    a = rng.uniform(-1, 1, (episodes, 2))
    v = 0.15 * rng.choice([-1, 1], (episodes, 2))
    actions = []
    for _ in range(length):
        v = np.where(np.abs(a + v) > 1, -v, v)
        a = a + v
        actions.append(a)
    action = np.stack(actions, 1).reshape(-1, 2).astype(np.float32)
    columns = {"observation": (3 * action - 1).astype(np.float32), "action": action}
    names = {"action": ["left_arm", "right_arm"]}
    return TrajectoryStore(columns, np.arange(1, episodes + 1) * length, names, 0.1, "walks", {})


def test_joints_are_grouped_by_side_and_part():
    assert joint_groups(G1, 6) == {"left arm": [0, 1, 2], "right arm": [3], "left hand": [4], "right hand": [5]}
    so101 = ["shoulder_pan.pos", "elbow_flex.pos", "gripper.pos"]
    assert joint_groups(so101, 3) == {"arm": [0, 1], "hand": [2]}
    assert joint_groups(["base_x", "base_y", "lift"], 3) == {"base": [0, 1], "other": [2]}
    assert joint_groups([], 3) == {"action": [0, 1, 2]}


def test_groups_may_be_given():
    assert joint_groups(G1, 6, {"wrists": "Wrist"}) == {"wrists": [2, 3], "other": [0, 1, 4, 5]}
    for patterns, message in (({"legs": "Hip"}, "finds no action"), ({"arms": "("}, "no regular expression")):
        with pytest.raises(UserError, match=message):
            joint_groups(G1, 6, patterns)
    with pytest.raises(UserError, match="does not name"):
        joint_groups([], 6, {"wrists": "Wrist"})


def test_the_regression_finds_a_line_and_is_that_of_the_normal_equations():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=g) * torch.tensor([1, 1e-3, 10, 1, 1, 0.0]) + 100
    w = torch.randn(6, 2, generator=g)
    y = (x - 100) @ w + torch.tensor([3.0, -5.0])
    ridge = Ridge(5)
    for part in range(0, 500, 100):
        ridge.add(x[part : part + 100], y[part : part + 100], torch.arange(100) % 5)
    assert (ridge.fit().predict(x) - y).abs().max() < 1e-3
    # and with noise: (Z'Z / n + p) w = Z'y / n on standardized inputs
    y = y + 5 * torch.randn(y.shape, generator=g)
    ridge = Ridge(5)
    ridge.add(x, y, torch.arange(500) % 5)
    ridge.fit()
    z = ((x - x.mean(0)) / x.std(0, correction=0).clamp_min(1e-9)).double()
    for k, penalty in enumerate(ridge.penalty.tolist()):
        centred = y[:, k].double() - y[:, k].double().mean()
        expected = z @ torch.linalg.solve(z.T @ z / 500 + penalty * torch.eye(6), z.T @ centred / 500)
        got = ridge.predict(x)[:, k] - y[:, k].mean()
        torch.testing.assert_close(got, expected.float(), atol=1e-3, rtol=1e-3)


def test_the_penalty_grows_where_inputs_only_mislead():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 50, generator=g), torch.randn(60, 1, generator=g)
    ridge = Ridge(5)
    ridge.add(x, y, torch.arange(60) % 5)
    assert ridge.fit().penalty[0] == PENALTIES[-1]


@pytest.mark.parametrize("changes", [{"observations": 1}, {"past_actions": 3}, {"past_actions": 1, "observations": 3}])
def test_holding_is_measured_against_what_was_recorded(changes):
    """The error of holding, computed window by window from the episodes themselves."""
    store = noisy_walks()
    training, held_out = store.split(3, 0)
    policy = build(training, **changes)
    report = held_out_error(policy, training, held_out, samples=2)
    errors = []
    for e in range(held_out.episodes):
        action = held_out.episode(e)["action"]
        errors += [action[t : t + 4] - action[t - 1] for t in range(1, len(action) - 3)]
    assert report["windows"] == len(errors)
    assert report["chunk"] == 4
    hold = report["groups"]["action"]["hold_last_action"]  # the policy was built without names
    np.testing.assert_allclose(hold["mae"], np.abs(errors).mean(), rtol=1e-5)
    np.testing.assert_allclose(hold["rmse"], np.sqrt(np.square(errors).mean()), rtol=1e-5)


@pytest.mark.parametrize(("past", "forecast"), [(0, "hold"), (3, "hold"), (3, "linear")])
def test_a_trained_policy_beats_both_baselines_and_one_sample(past, forecast):
    store = noisy_walks(40)
    training, held_out = store.split(8, 0)
    policy = train(build(training, past_actions=past, forecast=forecast, normalizer="gaussian"), training, 300)
    errors = held_out_error(policy, training, held_out, windows=150)["groups"]["action"]
    for measure in ("mae", "rmse"):
        best = errors["policy"][measure]
        assert best < 0.7 * errors["hold_last_action"][measure]
        assert best < 0.9 * errors["linear_regression"][measure]
        assert best <= errors["one_sample"][measure]


def test_the_report_is_reproducible_and_its_windows_can_be_fewer():
    training, held_out = noisy_walks().split(3, 0)
    policy = build(training, past_actions=2)
    first, again = (held_out_error(policy, training, held_out, samples=4, windows=20) for _ in range(2))
    assert first == again
    assert first["windows"] == 20
    with pytest.raises(UserError, match="even"):
        held_out_error(policy, training, held_out, samples=3)
    short = held_out.select([0])
    short = TrajectoryStore({k: v[:4] for k, v in short.columns.items()}, np.array([4]), {}, 0.1, "short", {})
    with pytest.raises(UserError, match="too short"):
        held_out_error(policy, training, short)


# ------------------------------------------------------------------------------------------------------- past actions
def test_a_chunk_is_relative_to_the_last_action():
    """Moving all past actions and the observations that go with them moves the training pairs' target not at all."""
    policy = build(noisy_walks(), past_actions=3)
    batch = policy.recorded(noisy_walks(), "cpu", ()).gather(torch.arange(50, 60))
    groups = policy._differences(batch["observation"], batch["action"])
    moved = policy._differences(batch["observation"], batch["action"] + 7.0)
    torch.testing.assert_close(groups["action"], moved["action"], atol=1e-5, rtol=0)
    chunk = groups["action"].view(10, 8, 2) + batch["action"][:, 2:3]
    torch.testing.assert_close(chunk, batch["action"][:, 3:])


def test_with_a_linear_forecast_an_untrained_denoiser_left_out_is_the_regression():
    """The forecast, as the policy takes it off and adds it, is the baseline's regression up to the padded windows."""
    store = noisy_walks(40)
    training, held_out = store.split(8, 0)
    policy = build(training, past_actions=3, forecast="linear", normalizer="gaussian")
    policy.denoiser.forward = lambda x, t, condition: torch.zeros_like(x)  # an expected residual of its mean, about 0
    errors = held_out_error(policy, training, held_out, samples=2)["groups"]["action"]
    assert errors["policy"]["rmse"] == pytest.approx(errors["linear_regression"]["rmse"], rel=0.05)
    assert errors["policy"]["rmse"] < 0.95 * errors["hold_last_action"]["rmse"]


def test_what_is_linear_in_the_history_leaves_no_residual():
    """Straight lines of random place and velocity: the last action and one observation before it give both."""
    g = torch.Generator().manual_seed(0)
    a, v = torch.randn(64, 1, 2, generator=g), torch.randn(64, 1, 2, generator=g)
    rows = (a + v * torch.arange(10.0)[:, None]).reshape(-1, 2).numpy()
    store = TrajectoryStore({"observation": rows, "action": rows}, 10 * np.arange(1, 65), {}, 0.1, "lines", {})
    policy = build(store, past_actions=1, observations=1, forecast="linear", horizon=4, execute=4)
    batch = policy.recorded(store, "cpu", (), 0).gather(torch.arange(7 * 64))
    inside = batch["valid"].all(dim=1)
    residual = policy._differences(batch["observation"], batch["action"])["action"][inside]
    assert residual.abs().max() < 1e-3


def test_a_forecast_needs_past_actions_and_a_known_name():
    with pytest.raises(UserError, match="past_actions=1 or more"):
        build(noisy_walks(), forecast="linear")
    with pytest.raises(UserError, match="forecast"):
        build(noisy_walks(), past_actions=2, forecast="linar")


def test_it_acts_on_its_past_actions_and_asks_for_them():
    store = noisy_walks(40)
    policy = train(build(store, past_actions=3, normalizer="gaussian"), store, 300)
    up = np.array([[0.0, 0.0], [0.15, -0.15], [0.3, -0.3]])
    history = {"observation": 3 * up[-2:] - 1, "action": up}
    actions = policy.act(history, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(actions, up[-1] + np.array([0.15, -0.15]) * np.arange(1, 5)[:, None], atol=0.12)
    assert policy.act({k: np.stack([v] * 5) for k, v in history.items()}).shape == (5, 4, 2)
    with pytest.raises(UserError, match=r"'action' must be .*\(3, 2\)"):
        policy.act(history["observation"])


def test_a_controller_remembers_what_was_carried_out():
    policy = build(noisy_walks(), past_actions=3)
    seen = []
    original = policy.sample_actions
    policy.sample_actions = lambda history, *rest: (seen.append(history["action"]), original(history, *rest))[1]
    controller = PolicyController(policy, 0.1, policy.config["sampler"], 2)
    controller.reset(5)
    history = {"state": np.zeros((5, 2, 2), np.float32)}
    first = torch.as_tensor(controller.act(history, 0).references)
    second = torch.as_tensor(controller.act(history, 2).references)
    controller.act(history, 8)  # later than the chunk is long: its last action was held
    torch.testing.assert_close(seen[0], policy.start.expand(5, 3, 2))
    torch.testing.assert_close(seen[1], torch.cat([policy.start.expand(5, 1, 2), first[:, :2]], 1))
    torch.testing.assert_close(seen[2], second[:, [3, 3, 3]])
    controller.reset(2)
    controller.act({"state": np.zeros((2, 2, 2), np.float32)}, 0)
    torch.testing.assert_close(seen[3], policy.start.expand(2, 3, 2))


def test_runs_with_and_without_past_actions_load(tmp_path):
    for past in (0, 3):
        policy = build(noisy_walks(), past_actions=past)
        if not past:
            del policy.config["past_actions"]  # as configurations were before there were any
        save_run(tmp_path / str(past), policy)
        again = load_run(tmp_path / str(past))
        history = {"observation": np.zeros((2, 2)), "action": np.zeros((3, 2))}
        expected, got = (p.act(history, torch.Generator().manual_seed(0)) for p in (policy, again))
        np.testing.assert_array_equal(expected, got)


# -------------------------------------------------------------------------------------------------------- the command
def test_training_reports_the_error_on_episodes_kept_out(tmp_path, capsys):
    from pilotwave.commands.train import run

    store = noisy_walks()
    store.names["observation"] = ["left", "right"]
    write(store, tmp_path / "walks", format="lerobot_v3")
    words = [f"data={tmp_path / 'walks'}", f"out={tmp_path / 'run'}", f"json={tmp_path / 'out.json'}"]
    words += ["policy=diffusion_policy", "policy.past_actions=2", "policy.network.width=32", "policy.execute=4"]
    words += ["train.steps=20", "train.held_out=3", "train.device=cpu", "seed=1"]
    run(words)
    printed = capsys.readouterr().out
    assert "error on 3 held-out episodes" in printed
    assert "linear regression" in printed
    report = json.loads((tmp_path / "out.json").read_text())["held_out"]
    assert set(report["groups"]) == {"left arm", "right arm"}
    assert json.loads((tmp_path / "run" / "card.json").read_text())["held_out"] == report
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["held_out"] == 3
    run([*words, "groups={both: arm}"])  # trained already: measured again
    again = json.loads((tmp_path / "out.json").read_text())["held_out"]["groups"]
    assert set(again) == {"both"}
    # and it is that of the run's averaged weights on the episodes that its seed keeps out
    own = held_out_error(policies.load(tmp_path / "run"), *read(tmp_path / "walks").split(3, 1))
    assert own["groups"] == report["groups"]
