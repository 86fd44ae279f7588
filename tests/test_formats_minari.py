import json

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

import offline
from pilotwave.errors import UserError


class Space(gym.Env):
    observation_space: spaces.Space = spaces.Box(-9, 9, (3,), np.float64)
    action_space: spaces.Space = spaces.Box(-1, 1, (2,), np.float32)


GOAL = spaces.Dict(
    {
        "observation": spaces.Box(-9, 9, (3,), np.float64),
        "achieved_goal": spaces.Box(-9, 9, (2,), np.float64),
        "desired_goal": spaces.Box(-9, 9, (2,), np.float64),
    }
)


def save(monkeypatch, root, observe, space, form="hdf5", lengths=(4, 6)):
    """A data set made by Minari itself, in its own root; returns its folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    buffers = []
    for e, length in enumerate(lengths):
        steps = np.arange(length)
        buffers.append(
            EpisodeBuffer(
                id=e,
                observations=observe(e, length + 1),
                actions=[np.array([e, t], np.float32) / 10 for t in steps],
                rewards=[float(t) for t in steps],
                terminations=[bool(e == 0 and t == length - 1) for t in steps],
                truncations=[bool(e == 1 and t == length - 1) for t in steps],
                infos={"distance": np.arange(length + 1, dtype=np.float64)} if form == "hdf5" else None,
            )
        )
    minari.create_dataset_from_buffers(
        "test/made-v0",
        buffers,
        observation_space=space,
        action_space=Space.action_space,
        data_format=form,
        author="a",
        author_email="a@b.c",
        code_permalink="x",
        algorithm_name="x",
    )
    return root / "test/made-v0"


def plain(e, n):
    return [np.array([e, t, 0.5]) for t in range(n)]


def goals(e, n):
    return {
        "observation": [np.array([e, t, 0.5]) for t in range(n)],
        "achieved_goal": [np.array([t, t]) / 1.0 for t in range(n)],
        "desired_goal": [np.array([9.0, e]) for _ in range(n)],
    }


@pytest.mark.parametrize("form", ["hdf5", "arrow"])
def test_vectors(monkeypatch, tmp_path, form):
    path = save(monkeypatch, tmp_path, plain, Space.observation_space, form)
    for folder in (path, path / "data"):
        store = offline.read(folder)
        assert store.metadata["format"] == "minari"
        assert store.episode_ends.tolist() == [4, 10]
        assert store.columns["observation"][:, 1].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
        assert store.columns["action"].shape == (10, 2)
        assert store.columns["terminal"].tolist() == [False] * 3 + [True] + [False] * 6
        assert store.columns["reward"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]


def test_goal_tasks(monkeypatch, tmp_path):
    store = offline.read(save(monkeypatch, tmp_path, goals, GOAL))
    assert store.columns["observation"].shape == (10, 3)
    assert store.columns["goal"][:, 1].tolist() == [0.0] * 4 + [1.0] * 6
    assert store.columns["achieved_goal"].shape == (10, 2)
    assert store.columns["infos/distance"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    joined = offline.read(tmp_path / "test/made-v0", observation_keys=["observation", "desired_goal"])
    assert joined.columns["observation"].shape == (10, 5)


def test_images(monkeypatch, tmp_path):
    space = spaces.Dict({"pixels": spaces.Box(0, 255, (16, 16, 3), np.uint8), "arm": spaces.Box(-9, 9, (2,))})

    def observe(e, n):
        return {
            "pixels": [np.full((16, 16, 3), 20 * t + e, np.uint8) for t in range(n)],
            "arm": [np.array([t, t], np.float32) for t in range(n)],
        }

    store = offline.read(save(monkeypatch, tmp_path, observe, space), images=True)
    assert store.columns["observation"].shape == (10, 2)
    assert np.abs(store.columns["pixels"][:4, 0, 0, 0].astype(int) - [0, 20, 40, 60]).max() <= 2


def test_no_environment_is_built_from_the_file(monkeypatch, tmp_path):
    path = save(monkeypatch, tmp_path, plain, Space.observation_space)
    metadata = json.loads((path / "data/metadata.json").read_text())
    del metadata["observation_space"], metadata["action_space"]
    trap = tmp_path / "sprung"
    spec = {"id": "Trap-v0", "entry_point": "os:system", "kwargs": {"command": f"touch {trap}"}}
    (path / "data/metadata.json").write_text(json.dumps({**metadata, "env_spec": json.dumps(spec)}))
    assert offline.read(path).steps == 10
    assert not trap.exists()


def test_damage_is_named(monkeypatch, tmp_path):
    path = save(monkeypatch, tmp_path, plain, Space.observation_space)
    data = path / "data/main_data.hdf5"
    with h5py.File(data, "a") as file:
        actions = file["episode_1/actions"][:]
        actions[2] = np.nan
        file["episode_1/actions"][:] = actions
    with pytest.raises(UserError, match="NaN in 'action', episode 1, step 2"):
        offline.read(path)
    with h5py.File(data, "a") as file:
        del file["episode_1/actions"]
        file["episode_1/actions"] = np.zeros((3, 2))
    with pytest.raises(UserError, match="unequal column lengths in episode 1: 'action' 3, 'rewards' 6"):
        offline.read(path)
    with h5py.File(data, "a") as file:
        del file["episode_1"]
    with pytest.raises(UserError, match="damaged or unknown Minari data"):
        offline.read(path)
    data.write_bytes(data.read_bytes()[:3000])
    with pytest.raises(UserError, match="truncated or damaged HDF5"):
        offline.read(path)
    metadata = json.loads((path / "data/metadata.json").read_text())
    (path / "data/metadata.json").write_text(json.dumps({**metadata, "total_episodes": 0}))
    with pytest.raises(UserError, match="the data set is empty"):
        offline.read(path)
