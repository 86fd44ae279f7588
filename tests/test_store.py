import numpy as np
import pytest

from offline.store import Space, TrajectoryStore, is_mapped
from pilotwave.errors import UserError


def make(lengths=(3, 5, 2), **extra) -> TrajectoryStore:
    n = sum(lengths)
    columns = {
        "observation": np.arange(n * 2, dtype=np.float32).reshape(n, 2),
        "action": np.arange(n, dtype=np.float32).reshape(n, 1),
    }
    return TrajectoryStore({**columns, **extra}, np.cumsum(lengths), {"observation": ["x", "y"]}, 0.1, "made")


def test_episodes_and_lengths():
    store = make()
    assert (store.episodes, store.steps) == (3, 10)
    assert store.starts.tolist() == [0, 3, 8]
    assert store.lengths.tolist() == [3, 5, 2]
    assert store.episode(1)["action"][:, 0].tolist() == [3, 4, 5, 6, 7]
    with pytest.raises(UserError, match="no episode 3"):
        store.episode(3)


def test_select_keeps_order_and_remaps_metadata():
    store = make()
    store.metadata = {"per_episode": {"name": ["a", "b", "c"]}, "filters": {"train": [0, 2], "valid": [1]}}
    chosen = store.select([2, 0])
    assert chosen.columns["action"][:, 0].tolist() == [8, 9, 0, 1, 2]
    assert chosen.episode_ends.tolist() == [2, 5]
    assert chosen.metadata == {"per_episode": {"name": ["c", "a"]}, "filters": {"train": [1, 0], "valid": []}}
    assert np.shares_memory(store.select([1, 2]).columns["action"], store.columns["action"])


@pytest.mark.parametrize("episodes", [[], [3], [-1]])
def test_select_refuses_what_is_not_there(episodes):
    with pytest.raises(UserError, match="episodes must be 0 to 2"):
        make().select(episodes)


def test_split_is_by_episode_and_repeats():
    store = make(lengths=(3, 5, 2, 4, 1))
    train, held = store.split(2, seed=3)
    again, _ = store.split(2, seed=3)
    assert (train.episodes, held.episodes) == (3, 2)
    rows = np.concatenate([train.columns["action"][:, 0], held.columns["action"][:, 0]])
    assert sorted(rows.tolist()) == list(range(15))
    np.testing.assert_array_equal(train.columns["action"], again.columns["action"])
    with pytest.raises(UserError, match="cannot hold out 5 of 5"):
        store.split(5, seed=0)


def test_validate_names_episode_and_step():
    store = make()
    store.validate()
    store.columns["action"][6, 0] = np.nan
    with pytest.raises(UserError, match="NaN in 'action', episode 1, step 3, feature 0"):
        store.validate()
    store = make()
    store.columns["observation"][9, 1] = np.inf
    with pytest.raises(UserError, match=r"an infinite value in 'observation', episode 2, step 1, feature 1 \(y\)"):
        store.validate()


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([], "the data set is empty"),
        ([0], "the data set is empty"),
        ([3, 3, 10], "episode 1 is empty"),
        ([5, 3, 10], "episode ends must increase; end 1 is 3, after 5"),
        ([3, 8], "column 'observation' has 10 rows, the episodes have 8"),
    ],
)
def test_validate_refuses_bad_episodes(ends, message):
    store = make()
    store.episode_ends = np.asarray(ends, np.int64)
    with pytest.raises(UserError, match=message):
        store.validate()


def test_columns_past_the_budget_are_mapped_and_leave_no_file(tmp_path):
    space = Space(budget=100, folder=tmp_path / "cache")
    small, large = space.empty((5, 2), np.float32), space.empty((1000, 3), np.float32)
    large[:] = 7
    assert not is_mapped(small)
    assert is_mapped(large)
    assert is_mapped(large[10:20])
    assert list((tmp_path / "cache").iterdir()) == []
    assert large.sum() == 21000


def test_selecting_from_mapped_columns_stays_mapped(tmp_path, monkeypatch):
    monkeypatch.setenv("PILOTWAVE_CACHE", str(tmp_path))
    store = make()
    mapped = Space(0).empty((10, 4), np.float64)
    mapped[:] = np.arange(10)[:, None]
    store.columns["extra"] = mapped
    chosen = store.select([2, 0])
    assert is_mapped(chosen.columns["extra"])
    assert not is_mapped(chosen.columns["action"])
    assert chosen.columns["extra"][:, 0].tolist() == [8, 9, 0, 1, 2]


def test_no_room_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no room for"):
        Space(0, tmp_path).empty((2**50,), np.uint8)
