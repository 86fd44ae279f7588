"""What users get wrong: one line that says what was wrong and what would be right, exit code 2, nothing left behind."""

import pickle
import shutil

import h5py
import numpy as np
import pytest

from pilotwave.cli import main

TINY = [
    "planner=diffuser",
    "task=pointmaze-umaze",
    "planner.horizon=8",
    "planner.stride=1",
    "planner.network.width=16",
    "planner.network.depth=1",
    "planner.network.heads=2",
    "train.steps=1",
    "train.batch=4",
    "train.device=cpu",
]


def d4rl(path, observation_dim=4, action_dim=2, steps=40, **changes):
    """A D4RL file of two episodes; `changes` replace columns."""
    rng = np.random.default_rng(0)
    columns = {
        "observations": rng.normal(size=(steps, observation_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (steps, action_dim)).astype(np.float32),
        "rewards": np.zeros(steps, np.float32),
        "terminals": np.zeros(steps, bool),
        "timeouts": np.arange(steps) % 20 == 19,
    } | changes
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            file[name] = column
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return d4rl(tmp_path_factory.mktemp("data") / "umaze.hdf5")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run of one step: everything that a long one has."""
    out = tmp_path_factory.mktemp("runs") / "umaze"
    assert main(["train", *TINY, f"data={data}", f"out={out}"]) == 0
    return out


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail properly and returns its one line."""

    def check(*words):
        assert main(list(map(str, words))) == 2
        error = capsys.readouterr().err
        assert error.startswith("pilotwave: error: ")
        assert error.count("\n") == 1
        return error

    return check


def train(refused, data, out, *words):
    """The error of a training, which must leave no model behind."""
    error = refused("train", *TINY, f"data={data}", f"out={out}", *words)
    assert not (out / "model.safetensors").exists()
    return error


def test_missing_file(refused, tmp_path):
    missing = tmp_path / "nowhere.hdf5"
    assert "nowhere.hdf5" in refused("data", missing)
    assert "nowhere.hdf5" in train(refused, missing, tmp_path / "run")


def test_truncated_hdf5(refused, data, tmp_path):
    whole = data.read_bytes()
    (tmp_path / "cut.hdf5").write_bytes(whole[: len(whole) // 2])
    assert "cut.hdf5" in refused("data", tmp_path / "cut.hdf5")
    assert "cut.hdf5" in train(refused, tmp_path / "cut.hdf5", tmp_path / "run")


def test_nan_in_actions(refused, tmp_path):
    actions = np.zeros((40, 2), np.float32)
    actions[25, 1] = np.nan
    error = train(refused, d4rl(tmp_path / "nan.hdf5", actions=actions), tmp_path / "run")
    assert "NaN in 'action', episode 1, step 5" in error


def test_episodes_of_unequal_keys(refused, tmp_path):
    with h5py.File(tmp_path / "robomimic.hdf5", "w") as file:
        file.create_group("data").attrs["env_args"] = '{"env_name": "none", "type": 1, "env_kwargs": {}}'
        for i, keys in enumerate((("eef", "gripper"), ("eef",))):
            demo = file.create_group(f"data/demo_{i}")
            demo.attrs["num_samples"] = 5
            demo["actions"] = np.zeros((5, 2))
            for key in keys:
                demo[f"obs/{key}"] = np.zeros((5, 2))
    error = train(refused, tmp_path / "robomimic.hdf5", tmp_path / "run")
    assert "demo_1" in error
    assert "gripper" in error


def test_empty_data_set(refused, tmp_path):
    path = d4rl(tmp_path / "empty.hdf5", steps=0)
    assert "empty" in train(refused, path, tmp_path / "run")


def test_wrong_feature_count_for_a_task(refused, tmp_path):
    error = train(refused, d4rl(tmp_path / "wide.hdf5", observation_dim=7, action_dim=3), tmp_path / "run")
    assert "7 observation and 3 action features" in error
    assert "4 and 2" in error


@pytest.mark.parametrize(
    ("word", "right"),
    [
        ("task=pointmaze-larg", "pointmaze-large"),
        ("planner=difuser", "diffuser"),
        ("planner.horizn=8", "planner.horizon"),
        ("planner.control.track=pdd", "pd"),
        ("trian.steps=1", "train"),
        ("train.stesp=1", "train.steps"),
    ],
)
def test_unknown_task_planner_and_key(refused, data, tmp_path, word, right):
    said = train(refused, data, tmp_path / "runs" / "run", word)
    assert f"did you mean '{right}'?" in said
    assert "control.track" not in word or "unknown planner.control.track" in said
    assert not (tmp_path / "runs").exists()  # nothing is left of a run that never began


@pytest.mark.parametrize(
    ("word", "right"),
    [
        ("sampler=dpmp_2m", "dpmpp_2m"),
        ("task=pointmaze-umase", "pointmaze-umaze"),
        ("epsiodes=3", "episodes"),
        ("sampler.step=3", "sampler.steps"),
        ("controller.sampels=3", "controller.samples"),
        ("task.gaol=fixed", "task.goal"),
        ("task.goal=fixd", "fixed"),
    ],
)
def test_unknown_sampler_and_keys_of_a_rollout(refused, trained, word, right):
    assert f"did you mean '{right}'?" in refused("rollout", trained, word)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("controller.samples=many", "controller.samples is 'many'; it must be a whole number"),
        ("controller.samples=2.5", "controller.samples is '2.5'; it must be a whole number"),
        ("controller.deviation=far", "controller.deviation is 'far'; it must be a number"),
        ("controller.deviation=-1", "controller.deviation is -1; it must be at least 0"),
        ("controller.places=3", "controller.places is '3'; it must be true or false"),
        ("controller.safety=5", "controller.safety is '5'; it must be a word"),
        ("controller.margin=-0.1", "controller.margin is -0.1; it must be at least 0"),
        ("controller.barriers=box", "controller.barriers is 'box'; it must be a list"),
        ("controller.barriers=[box]", "a barrier is written as"),
        ("barriers=[{shape: box, low: [2, 2], high: [1, 3]}]", "low must be below high"),
        ("barriers=[{shape: box, low: [nan, 2], high: [3, 3]}]", "barriers.0.low.0 is not a number"),
        ("filter.margin=nan", "filter.margin is not a number"),
        ("filter.gamma=1.5", "filter.gamma is 1.5; it must be from 0.001 to 1"),
        ("filter.barriers=[{shape: half_space, normal: [1], offset: 1, features: [9]}]", "from 0 to 3"),
    ],
)
def test_settings_of_safety_that_cannot_be(refused, trained, word, said):
    held = "=[{shape: box, low: [1, 1], high: [2, 2]}]"
    safe = ["filter.active=true", "controller.safety=correct", "controller.barriers" + held, "filter.barriers" + held]
    assert said in refused("rollout", trained, *safe, word)


def test_safety_with_nothing_to_hold(refused, trained):
    assert "pointmaze-umaze has no hazards to plan past; add barriers=" in refused("rollout", trained, "controller.safety=correct")
    assert "pointmaze-umaze has no barriers to hold; add barriers=" in refused("rollout", trained, "filter.active=true")


def test_a_checkpoint_of_another_task(refused, trained):
    error = refused("rollout", trained, "task=adroit-door")
    assert "pointmaze-umaze (4 observations, 2 actions)" in error
    assert "adroit-door (39 observations, 28 actions)" in error
    assert "not for pointmaze-large" in refused("rollout", trained, "task=pointmaze-large")


def test_a_checkpoint_of_another_kind(refused, trained):
    assert "is a planner; this command takes a world model" in refused("dream", trained)


def test_tampered_safetensors(refused, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    content = bytearray((run / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (run / "model.safetensors").write_bytes(content)
    assert "sha256" in refused("rollout", run)


def test_zero_steps(refused, data, tmp_path):
    assert "train.steps is 0; it must be at least 1" in train(refused, data, tmp_path / "run", "train.steps=0")
    assert "steps is 0" in refused("collect", "task=pointmaze-umaze", "steps=0", f"out={tmp_path}/out.hdf5")


def test_negative_horizon(refused, data, trained, tmp_path):
    assert "planner.horizon is -8" in train(refused, data, tmp_path / "run", "planner.horizon=-8")
    assert "horizon is -1" in refused("rollout", trained, "horizon=-1")
    assert "task.horizon is -1" in refused("rollout", trained, "task.horizon=-1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["planner.network.heads=3"], "a network of width 16 cannot have 3 heads"),
        (["planner.value={scale: 1}"], "planner.value lacks discount"),
        (["planner=hierarchical", "planner.jump=0"], "planner.jump is 0; it must be at least 1"),
        (["planner=transformer", "planner.bins.number=1"], "planner.bins.number is 1; it must be at least 2"),
        (["planner=veteran", "planner.critic.discount=1.5"], "planner.critic.discount is 1.5; it must be at most 1"),
        (["planner=contrastive", "planner.contrast.high=0.1"], "planner.contrast.low=0.4, high=0.1"),
    ],
)
def test_settings_of_a_planner_that_cannot_be(refused, data, tmp_path, words, said):
    out = tmp_path / "run"
    words = [*TINY, *words] if words[0].startswith("planner.") else ["task=pointmaze-umaze", *words]
    assert said in refused("train", *words, f"data={data}", f"out={out}")
    assert not (out / "model.safetensors").exists()


def test_a_window_longer_than_every_episode(refused, data, tmp_path):
    error = train(refused, data, tmp_path / "run", "planner.horizon=32")
    assert "32" in error
    assert "20" in error


def test_an_unwritable_folder(refused, data, trained, tmp_path):
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "run"
    assert "cannot write into the folder" in train(refused, data, below)
    assert "cannot write into the folder" in refused("rollout", trained, f"json={below}/out.json")
    assert "cannot write into the folder" in refused("collect", "task=pointmaze-umaze", f"out={below}/out.hdf5")


class _Mischief:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["data.pkl", "data.hdf5", "data.npy", "data.npz", "data.zarr"])
def test_a_pickle_where_data_was_expected(refused, tmp_path, name):
    trap = tmp_path / "trap"
    (tmp_path / name).write_bytes(pickle.dumps(_Mischief(trap)))
    refused("data", tmp_path / name)
    train(refused, tmp_path / name, tmp_path / "run")
    assert not trap.exists()


def test_a_pickle_where_a_run_was_expected(refused, tmp_path):
    trap = tmp_path / "trap"
    (tmp_path / "model.pt").write_bytes(pickle.dumps(_Mischief(trap)))
    refused("rollout", tmp_path / "model.pt")
    assert not trap.exists()
