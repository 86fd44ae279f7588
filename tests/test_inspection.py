import io
import json

import h5py
import numpy as np
import pytest
from rich.console import Console

import offline
from offline.inspection import describe, inspect
from offline.store import TrajectoryStore
from pilotwave.errors import UserError


def walk(lengths=(400, 500, 300), seed=0, width=3):
    generator, n = np.random.default_rng(seed), sum(lengths)
    columns = {
        "observation": np.concatenate([generator.normal(size=(k, width)).cumsum(0) / 30 for k in lengths]),
        "action": generator.uniform(-1, 1, (n, 2)),
    }
    columns = {name: column.astype(np.float32) for name, column in columns.items()}
    return TrajectoryStore(columns, np.cumsum(lengths), dt=0.1, source="walk")


def text(report) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(report)
    return out.getvalue()


def test_a_good_data_set_has_nothing_to_say():
    store = walk()
    report = describe(store)
    assert (report.problems, report.notes) == ([], [])
    assert (report.episodes, report.steps, report.seconds) == (3, 1200, pytest.approx(120))
    assert report.lengths == {"min": 300, "mean": 400, "max": 500}
    for name, values in store.columns.items():
        features = report.columns[name].features
        np.testing.assert_allclose([f.min for f in features], values.min(0))
        np.testing.assert_allclose([f.max for f in features], values.max(0))
        np.testing.assert_allclose([f.mean for f in features], values.mean(0, dtype=np.float64), atol=1e-9)
        np.testing.assert_allclose([f.std for f in features], values.std(0, dtype=np.float64))
    assert "3 episodes (300 to 500, mean 400.0), 1200 steps, 0.1 s a step" in text(report)
    assert "no problems found" in text(report)


def test_a_file_is_read_even_where_it_cannot_be_trained_on(tmp_path):
    actions = np.zeros((10, 2))
    actions[4, 1] = np.nan
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file.update({"observations": np.random.default_rng(0).normal(size=(10, 3)), "actions": actions})
        file["timeouts"] = np.arange(10) % 5 == 4
    report = inspect(tmp_path / "a.hdf5")
    assert report.problems == ["NaN in 'action', episode 0, step 4, feature 1; repair or leave out that episode"]
    assert [f.not_finite for f in report.columns["action"].features] == [0, 1]
    assert "problem: NaN in 'action'" in text(report)
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["columns"]["action"]["features"][0]["constant"] is True
    with pytest.raises(UserError, match="no such file"):
        inspect(tmp_path / "b.hdf5")


def test_broken_episodes_are_a_problem_not_a_crash():
    store = walk()
    for ends in ([], [0], [400, 300, 1200], [400, 400, 1200], [400, 1000]):
        store.episode_ends = np.asarray(ends, np.int64)
        assert len(describe(store).problems) == 1


def spoil(store: TrajectoryStore, name: str) -> None:
    observation, action = store.columns["observation"], store.columns["action"]
    turns = np.linspace(0, 40, 1200, dtype=np.float32)
    if name == "constant":
        observation[:, 1] = 5
        store.names["observation"] = ["x", "height", "y"]
    elif name == "still":
        action[400:900] = action[400]
    elif name == "repeated":
        observation[900:], action[900:] = observation[:300], action[:300]
        observation[300:400], action[300:400] = 0.5, 0.5
        store.episode_ends = np.array([300, 900, 1200])
    elif name == "outlier":
        observation[450, 2] = 900
    elif name == "clipped":
        action[7, 0] = 1.3
    elif name == "degrees":
        store.names["observation"] = ["shoulder_pan", "elbow", "grip"]
        observation[:, :2] = np.sin(turns)[:, None] * 80
    elif name == "mixed":
        store.names |= {"observation": ["elbow_flex", "b", "c"], "action": ["elbow_flex", "v"]}
        observation[:, 0] = np.sin(turns)
        action[:, 0] = np.sin(turns) * 180 / np.pi / 10
        observation[:, 0] /= 10
    elif name == "wraps":
        observation[:, 0] = np.angle(np.exp(1j * turns))
    elif name == "quaternion":
        half = turns / 2
        rotation = np.stack([np.cos(half), *(np.sin(half) * axis for axis in (0.6, 0.48, 0.64))], axis=1)
        rotation[600:] *= -1
        store.columns["observation"] = np.concatenate([observation, rotation], axis=1)
    elif name == "short":
        store.episode_ends = np.array([400, 404, 800, 1200])
    elif name == "unmarked":
        store.episode_ends = np.array([1200])
        observation[400:] += 50
        observation[900:] -= 80
    elif name == "timestamps":
        store.columns["timestamp"] = np.concatenate([np.arange(n) * 0.1 for n in (400, 500, 300)])
        store.columns["timestamp"][410:900] += 0.5
    elif name == "extra":
        store.columns["infos/speed"] = np.where(np.arange(1200) == 3, np.nan, turns)
    elif name == "no dt":
        store.dt = None
    elif name == "no actions":
        del store.columns["action"]


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("constant", "'observation' never changes in 1 features: height"),
        ("still", "'action' stands still through 1 whole episodes, as episode 1"),
        ("repeated", "1 episodes repeat another, as 2 repeats 0"),
        ("outlier", "far outliers in 1 features, as 2 = 900 at episode 1, step 50"),
        ("clipped", "of the actions lie beyond -1 to 1 (to 1.3)"),
        ("degrees", "'observation' seems to hold degrees (shoulder_pan, elbow)"),
        ("mixed", "differ in degrees and radians: elbow_flex"),
        ("wraps", "'observation' has angles that wrap around: 0"),
        ("quaternion", "'observation' features 3 to 6 are a quaternion, its sign flips 1 times within episodes"),
        ("short", "1 very short episodes, as 1 with 4 steps"),
        ("unmarked", "jumps at 2 places, as after episode 0, step 399: an unmarked episode end?"),
        ("timestamps", "1 uneven time steps, as 0.6 s after episode 1, step 9"),
        ("extra", "'infos/speed' holds 1 values that are NaN or infinite"),
        ("no dt", "the time a step takes is not recorded"),
        ("no actions", "no 'action' column"),
    ],
)
def test_suspicious_things_are_noted(name, note):
    store = walk()
    spoil(store, name)
    report = describe(store)
    assert report.problems == []
    assert any(note in line for line in report.notes), report.notes
    allowed = 2 if name in ("unmarked", "mixed", "repeated", "outlier") else 1
    assert len(report.notes) <= allowed, report.notes
    assert note[:40] in text(report)


def test_limits_of_a_task(tmp_path):
    store = walk()
    offline.write(store, tmp_path / "a.hdf5", "d4rl")
    for limit, note in (
        (2.0, None),
        (0.8, "actions reach 1.25 times"),
        (0.01, "other units?"),
        ([1, 1, 1], "shape (2,)"),
    ):
        high = np.broadcast_to(np.asarray(limit, float), (2,)) if np.ndim(limit) == 0 else np.asarray(limit, float)
        notes = inspect(tmp_path / "a.hdf5", action_low=-high, action_high=high).notes
        assert [note in line for line in notes if "action" in line] == ([True] if note else [])
