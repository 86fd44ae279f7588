import h5py
import numpy as np
import pytest

import offline
from pilotwave.errors import UserError


def arrays(lengths=(4, 6), seed=0):
    n, generator = sum(lengths), np.random.default_rng(seed)
    timeouts = np.zeros(n, bool)
    timeouts[np.cumsum(lengths) - 1] = True
    terminals = np.zeros(n, bool)
    terminals[lengths[0] - 1] = True
    return {
        "observations": generator.normal(size=(n, 3)).astype(np.float32),
        "actions": generator.normal(size=(n, 2)).astype(np.float32),
        "rewards": np.arange(n, dtype=np.float32),
        "terminals": terminals,
        "timeouts": timeouts & ~terminals,
        "infos/goal": np.ones((n, 2)),
        "infos/qpos": generator.normal(size=(n, 2)),
        "initial_states/qpos": generator.normal(size=(len(lengths), 5)),
    }


def save(path, data, **attributes):
    with h5py.File(path, "w") as file:
        for key, value in data.items():
            file[key] = value
        file.attrs.update(attributes)
    return path


def test_reads_every_column(tmp_path):
    data = arrays()
    store = offline.read(save(tmp_path / "maze.bin", data, dt=0.02))  # by content: the suffix says nothing
    assert store.metadata["format"] == "d4rl"
    assert store.episode_ends.tolist() == [4, 10]
    assert store.dt == 0.02
    np.testing.assert_array_equal(store.columns["observation"], data["observations"])
    np.testing.assert_array_equal(store.columns["action"], data["actions"])
    np.testing.assert_array_equal(store.columns["infos/qpos"], data["infos/qpos"])
    assert store.columns["goal"].dtype == np.float32
    assert store.columns["terminal"].tolist() == [False] * 3 + [True] + [False] * 6
    assert store.columns["reward"].shape == (10,)
    np.testing.assert_array_equal(store.metadata["per_episode"]["initial_states/qpos"], data["initial_states/qpos"])


def test_ends_without_timeouts_and_an_open_last_episode(tmp_path):
    data = arrays()
    del data["timeouts"]
    store = offline.read(save(tmp_path / "a.hdf5", data))
    assert store.episode_ends.tolist() == [4, 10]
    assert store.metadata["ends_marked"] is False


def test_observation_keys_choose_features(tmp_path):
    data = arrays()
    store = offline.read(save(tmp_path / "a.hdf5", data), observation_keys=["infos/qpos", "observations[1:3]"])
    np.testing.assert_array_equal(
        store.columns["observation"], np.hstack([data["infos/qpos"], data["observations"][:, 1:]]).astype(np.float32)
    )
    assert store.names["observation"] == ["infos/qpos.0", "infos/qpos.1", "observations.1", "observations.2"]
    with pytest.raises(UserError, match="did you mean 'infos/qpos'"):
        offline.read(tmp_path / "a.hdf5", observation_keys=["infos/qpo"])
    with pytest.raises(UserError, match="takes no feature"):
        offline.read(tmp_path / "a.hdf5", observation_keys=["observations[3]"])


def test_write_and_read_again(tmp_path):
    store = offline.read(save(tmp_path / "a.hdf5", arrays(), dt=0.1))
    store.names["action"] = ["left", "right"]
    again = offline.read(offline.write(store, tmp_path / "new" / "b.hdf5", "d4rl"))
    assert set(again.columns) == set(store.columns)
    for name, column in store.columns.items():
        np.testing.assert_array_equal(again.columns[name], column)
        assert again.columns[name].dtype == column.dtype
    np.testing.assert_array_equal(again.episode_ends, store.episode_ends)
    assert (again.dt, again.names["action"]) == (store.dt, store.names["action"])
    assert again.metadata["per_episode"] == store.metadata["per_episode"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["b.hdf5"]


def test_larger_than_the_budget_is_mapped_and_equal(tmp_path, monkeypatch):
    from offline.store import is_mapped

    monkeypatch.setenv("PILOTWAVE_CACHE", str(tmp_path / "cache"))
    path = save(tmp_path / "a.hdf5", arrays())
    plain, mapped = offline.read(path), offline.read(path, memory_budget_bytes=0)
    assert all(is_mapped(column) for column in mapped.columns.values())
    for name, column in plain.columns.items():
        np.testing.assert_array_equal(mapped.columns[name], column)


def test_damage_is_named(tmp_path):
    path = save(tmp_path / "a.hdf5", {**arrays(), "padding": np.zeros(20_000)})
    whole = path.read_bytes()
    for share in (0.05, 0.3, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match="truncated or damaged HDF5"):
            offline.read(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="the file is empty"):
        offline.read(path)
    with pytest.raises(UserError, match=r"no such file or folder; beside it: a\.hdf5"):
        offline.read(tmp_path / "b.hdf5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": np.zeros((9, 2), np.float32)}, "unequal column lengths: 'actions' 9"),
        ({"infos/qpos": np.zeros((9, 2))}, "unequal column lengths: 'infos/qpos' 9"),
        ({"actions": np.where(np.arange(20).reshape(10, 2) == 13, np.nan, 0)}, "NaN in 'action', episode 1, step 2, f"),
        ({k: v[:0] for k, v in arrays().items()}, "the data set is empty"),
    ],
)
def test_bad_content_is_named(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        offline.read(save(tmp_path / "a.hdf5", {**arrays(), **change}))
