"""OGBench's npz and plain .npy."""

import numpy as np
import pytest

import offline
from pilotwave.errors import UserError


def ogbench(lengths=(4, 6)):
    n = sum(lengths)
    terminals = np.zeros(n, np.float32)
    terminals[np.cumsum(lengths) - 1] = 1
    generator = np.random.default_rng(0)
    return {
        "observations": generator.normal(size=(n, 3)).astype(np.float32),
        "actions": generator.normal(size=(n, 2)).astype(np.float32),
        "terminals": terminals,
        "qpos": generator.normal(size=(n, 4)),
    }


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_ogbench(tmp_path, save):
    data = ogbench()
    save(tmp_path / "maze.npz", **data)
    store = offline.read(tmp_path / "maze.npz")
    assert store.metadata["format"] == "ogbench"
    assert store.episode_ends.tolist() == [4, 10]
    np.testing.assert_array_equal(store.columns["observation"], data["observations"])
    np.testing.assert_array_equal(store.columns["qpos"], data["qpos"])
    assert "terminal" not in store.columns


def test_ogbench_pixels_and_column_major(tmp_path):
    data = ogbench()
    data["observations"] = np.arange(10 * 8 * 8 * 3, dtype=np.uint8).reshape(10, 8, 8, 3)
    data["qpos"] = np.asfortranarray(data["qpos"])
    np.savez(tmp_path / "a.npz", **data)
    store = offline.read(tmp_path / "a.npz", images=True)
    np.testing.assert_array_equal(store.columns["image"], data["observations"])
    np.testing.assert_array_equal(store.columns["qpos"], data["qpos"])
    joined = offline.read(tmp_path / "a.npz", observation_keys=["qpos"])
    assert joined.columns["observation"].shape == (10, 4)


def test_ogbench_damage_is_named(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **{**ogbench(), "actions": np.zeros((9, 2))})
    with pytest.raises(UserError, match="unequal column lengths"):
        offline.read(path)
    np.savez(path, **{k: v[:0] for k, v in ogbench().items()})
    with pytest.raises(UserError, match="the data set is empty"):
        offline.read(path)
    np.savez(path, **ogbench())
    whole = bytearray(path.read_bytes())
    place = whole.find(ogbench()["observations"].tobytes()[:16])
    whole[place : place + 16] = b"x" * 16
    path.write_bytes(whole)
    with pytest.raises(UserError, match="damaged npz"):
        offline.read(path)
    path.write_bytes(bytes(whole[:300]))
    with pytest.raises(UserError, match=r"truncated|no known data format"):
        offline.read(path)


def test_npy_files_and_folders(tmp_path):
    poses = np.random.default_rng(0).normal(size=(3, 5, 7))
    np.save(tmp_path / "pouring.npy", poses)
    store = offline.read(tmp_path / "pouring.npy")
    assert store.episode_ends.tolist() == [5, 10, 15]
    np.testing.assert_array_equal(store.columns["observation"], poses.reshape(15, 7).astype(np.float32))
    np.save(tmp_path / "opening.npy", poses[0])
    both = offline.read(tmp_path)
    assert both.episodes == 4
    assert both.metadata["per_episode"]["tasks"] == [["opening"], ["pouring"], ["pouring"], ["pouring"]]


def test_npy_columns(tmp_path):
    actions, observations = np.arange(20.0).reshape(10, 2), np.ones((10, 3))
    np.save(tmp_path / "actions.npy", actions)
    np.save(tmp_path / "observations.npy", observations)
    np.save(tmp_path / "episode_ends.npy", np.array([4, 10]))
    store = offline.read(tmp_path)
    assert store.episode_ends.tolist() == [4, 10]
    np.testing.assert_array_equal(store.columns["action"], actions.astype(np.float32))
    (tmp_path / "episode_ends.npy").unlink()
    with pytest.raises(UserError, match=r"or rows and episode_ends\.npy"):
        offline.read(tmp_path)
    np.save(tmp_path / "actions.npy", actions.reshape(2, 5, 2))
    np.save(tmp_path / "observations.npy", observations.reshape(2, 5, 3))
    assert offline.read(tmp_path).episode_ends.tolist() == [5, 10]


def test_npy_mistakes_are_named(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"expected numbers \(episodes, steps, features\)"):
        offline.read(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.zeros((0, 5, 7)))
    with pytest.raises(UserError, match="the data set is empty"):
        offline.read(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.zeros((2, 5, 7)))
    np.save(tmp_path / "b.npy", np.zeros((2, 5, 6)))
    with pytest.raises(UserError, match="different feature counts"):
        offline.read(tmp_path)
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"truncated or damaged \.npy"):
        offline.read(tmp_path / "a.npy")
