"""Planners through the commands: collect, train, rollout, on a few steps of the small maze."""

import json

import pytest

from pilotwave.cli import main
from planners import load

NETWORK = ["planner.network.width=16", "planner.network.depth=1"]
TINY = {
    "contrastive": ["planner.horizon=6", "planner.network.heads=2", *NETWORK],
    "latent": ["planner.skills=2", "planner.critic.reach=8", "planner.energy.network.width=16", *NETWORK],
    "transformer": ["planner.horizon=5", "planner.network.heads=2", "planner.actions=false", *NETWORK],
}


@pytest.mark.parametrize("name", TINY)
def test_it_trains_and_rolls_out(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["collect", "task=pointmaze-umaze", "steps=600", "out=data.hdf5"]) == 0
    training = ["task=pointmaze-umaze", "data=data.hdf5", "out=run", "train.steps=2", "train.batch=8", "train.compile=off"]
    assert main(["train", f"planner={name}", *TINY[name], *training]) == 0
    few = ["episodes=2", "horizon=40", "timing_decisions=1", "json=out.json", "controller.samples=2"]
    assert main(["rollout", "run", *few]) == 0
    metrics = json.loads((tmp_path / "out.json").read_text())
    assert metrics["episodes"] == 2
    assert metrics["evaluations"] > 1
    plan = load("run").plan([1.0, 1.0, 0.0, 0.0], goal=[3.0, 1.0], samples=2)
    assert plan.observations.shape[0] == 2


def test_a_speed_limit_of_the_users_is_kept_by_the_filter_and_judged_on_the_motion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["collect", "task=pointmaze-umaze", "steps=600", "out=data.hdf5"]) == 0
    training = ["task=pointmaze-umaze", "data=data.hdf5", "out=run", "train.steps=2", "train.batch=8", "train.compile=off"]
    assert main(["train", "planner=diffuser", "planner.horizon=8", "planner.network.heads=2", *NETWORK, *training]) == 0
    limit = "barriers=[{shape: superellipse, center: [0, 0], radii: [0.5, 0.5], features: [2, 3], inside: true}]"
    few = ["episodes=4", "horizon=60", "timing_decisions=0", "json=out.json", limit]
    found = {}
    for active in ("false", "true"):
        assert main(["rollout", "run", *few, f"filter.active={active}"]) == 0
        found[active] = json.loads((tmp_path / "out.json").read_text())
    assert found["false"]["violations"]["episode_rate"] == 1.0
    assert found["true"]["violations"]["episode_rate"] == 0.0
    assert 0 < found["true"]["violations"]["worst_margin"] < 0.1
    assert found["true"]["filter"]["changed_rate"] > 0
