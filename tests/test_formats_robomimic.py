import importlib.util
import json
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

import offline
from pilotwave.errors import UserError


def save(path, lengths=(4, 3, 5), seed=0, change=None):
    generator = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20}})
        data.attrs["total"] = sum(lengths)
        for i, length in zip((0, 2, 10), lengths):  # numbers with a gap, which as text would sort 0, 10, 2
            demo = data.create_group(f"demo_{i}")
            demo.attrs["num_samples"] = length
            demo["actions"] = np.full((length, 7), float(i))
            demo["rewards"] = np.zeros(length)
            demo["dones"] = np.arange(length) == length - 1
            demo["states"] = generator.normal(size=(length, 9))
            for where in ("obs", "next_obs"):
                demo[f"{where}/object"] = generator.normal(size=(length, 3))
                demo[f"{where}/arm_pos"] = generator.normal(size=(length, 2))
                demo[f"{where}/front_image"] = generator.integers(0, 256, (length, 8, 8, 3), dtype=np.uint8)
        file["mask/train"] = np.array(["demo_10", "demo_0"], dtype="S")
        file["mask/valid"] = np.array(["demo_2"], dtype="S")
        if change:
            change(file)
    return path


def test_reads_demonstrations_in_number_order(tmp_path):
    path = save(tmp_path / "a.hdf5")
    store = offline.read(path, images=True)
    assert store.metadata["format"] == "robomimic"
    assert store.metadata["per_episode"]["name"] == ["demo_0", "demo_2", "demo_10"]
    assert store.metadata["filters"] == {"train": [0, 2], "valid": [1]}
    assert (store.episode_ends.tolist(), store.dt) == ([4, 7, 12], 0.05)
    assert store.names["observation"] == ["arm_pos.0", "arm_pos.1", "object.0", "object.1", "object.2"]
    assert store.columns["action"][:, 0].tolist() == [0.0] * 4 + [2.0] * 3 + [10.0] * 5
    assert store.columns["front_image"].shape == (12, 8, 8, 3)
    assert store.columns["states"].shape == (12, 9)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(
            store.episode(2)["observation"][:, 2:], file["data/demo_10/obs/object"][:].astype(np.float32)
        )
    train = store.select(store.metadata["filters"]["train"])
    assert train.metadata["per_episode"]["name"] == ["demo_0", "demo_10"]
    one = offline.read(path, observation_keys=["object"])
    assert one.columns["observation"].shape == (12, 3)


def test_write_and_read_again(tmp_path):
    store = offline.read(save(tmp_path / "a.hdf5"), images=True)
    again = offline.read(offline.write(store, tmp_path / "b.hdf5", "robomimic"), images=True)
    assert set(again.columns) == set(store.columns)
    for name, column in store.columns.items():
        np.testing.assert_array_equal(again.columns[name], column)
    for field in ("filters", "env_args", "observation_parts"):
        assert again.metadata[field] == store.metadata[field]
    assert (again.names, again.dt) == (store.names, store.dt)


_THEIRS = """
import importlib.util, sys
from unittest.mock import MagicMock
if importlib.util.find_spec("torchvision") is None:  # imported by robomimic's models, not used by its data set
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.models"):
        sys.modules[name] = MagicMock()
import numpy as np
from robomimic.utils import file_utils, obs_utils
from robomimic.utils.dataset import SequenceDataset
obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": ["arm_pos", "object"], "rgb": ["front_image"]}})
assert file_utils.get_env_metadata_from_dataset(sys.argv[1])["env_name"] == "Lift"
for name in ("", "train"):
    data = SequenceDataset(sys.argv[1], obs_keys=["arm_pos", "object", "front_image"],
        dataset_keys=["actions", "rewards", "dones"], frame_stack=2, seq_length=3, hdf5_cache_mode=None,
        filter_by_attribute=name or None)
    items = [data[i] for i in range(len(data))]
    np.savez(sys.argv[2] + name + ".npz", actions=[x["actions"] for x in items],
        object=[x["obs"]["object"] for x in items], next=[x["next_obs"]["object"] for x in items],
        image=[x["obs"]["front_image"] for x in items])
"""


@pytest.mark.skipif(importlib.util.find_spec("robomimic") is None, reason="robomimic is not installed")
def test_robomimic_itself_reads_what_is_written(tmp_path):
    store = offline.read(save(tmp_path / "a.hdf5"), images=True)
    offline.write(store, tmp_path / "b.hdf5", "robomimic")
    command = [sys.executable, "-c", _THEIRS, str(tmp_path / "b.hdf5"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    for name, episodes in (("", [0, 1, 2]), ("train", [0, 2])):
        theirs, chosen = np.load(tmp_path / f"out{name}.npz"), store.select(episodes)
        # Their windows: every step of every episode as the second of two stacked frames, then two more.
        columns = ["observation", "action", "front_image"]
        windows = offline.Windows(chosen, 4, columns=columns, pad_before=1, pad_after=2)
        ours = windows.gather(torch.arange(len(windows)))
        assert theirs["actions"].shape == (chosen.steps, 4, 7)
        np.testing.assert_array_equal(theirs["actions"], ours["action"].numpy())
        np.testing.assert_array_equal(theirs["object"], ours["observation"][..., 2:].numpy())
        np.testing.assert_array_equal(theirs["image"], ours["front_image"].numpy())
        np.testing.assert_array_equal(theirs["next"][:, 1:-1], theirs["object"][:, 2:])


def _drop(file):
    del file["data/demo_2/obs/object"]


def _extra(file):
    file["data/demo_10/obs/more"] = np.zeros((5, 1))


def _short(file):
    del file["data/demo_2/rewards"]
    file["data/demo_2/rewards"] = np.zeros(2)


def _wide(file):
    del file["data/demo_2/obs/object"]
    file["data/demo_2/obs/object"] = np.zeros((3, 4))


def _nan(file):
    file["data/demo_10/actions"][3, 6] = np.nan


def _stated(file):
    file["data/demo_10"].attrs["num_samples"] = 99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, "episodes of unequal keys: demo_2 lacks 'obs/object', which demo_0 has"),
        (_extra, "episodes of unequal keys: demo_10 has 'obs/more', which demo_0 lacks"),
        (_short, "unequal column lengths in demo_2: 'rewards' 2, 'actions' 3"),
        (_wide, r"'obs/object' has shape \(3,\) and \(4,\) a step in different episodes"),
        (_nan, "NaN in 'action', episode 2, step 3, feature 6"),
        (_stated, "demo_10 has 5 steps, its num_samples says 99"),
    ],
)
def test_bad_content_is_named(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        offline.read(save(tmp_path / "a.hdf5", change=change))
