import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offline.store import Space, TrajectoryStore
from offline.windows import Windows
from pilotwave.errors import UserError


def make(lengths) -> TrajectoryStore:
    n = int(sum(lengths))
    episode = np.repeat(np.arange(len(lengths)), lengths)
    step = np.concatenate([np.arange(length) for length in lengths])
    columns = {
        "observation": np.stack([episode, step], axis=1).astype(np.float32),
        "action": np.arange(n, dtype=np.float32)[:, None],
        "flag": np.arange(n) % 2 == 0,
        "image": np.arange(n * 12, dtype=np.uint8).reshape(n, 2, 2, 3),
    }
    return TrajectoryStore(columns, np.cumsum(lengths))


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    horizon, stride = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    return lengths, horizon, stride, draw(st.integers(0, horizon - 1)), draw(st.integers(0, horizon - 1))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_windows_are_exactly_those_of_the_definition(case):
    lengths, horizon, stride, before, after = case
    store = make(lengths)
    expected = []
    for e, length in enumerate(lengths):
        for start in range(-before * stride, length):
            steps = [start + j * stride for j in range(horizon)]
            real = [0 <= s < length for s in steps]
            if steps[-1] <= length - 1 + after * stride and any(real):
                expected.append(([(e, min(max(s, 0), length - 1)) for s in steps], real))
    if not expected:
        with pytest.raises(UserError, match="no window fits"):
            Windows(store, horizon, columns=["observation"], stride=stride, pad_before=before, pad_after=after)
        return
    windows = Windows(store, horizon, columns=["observation"], stride=stride, pad_before=before, pad_after=after)
    got = windows.gather(torch.arange(len(windows)))
    assert got["observation"].tolist() == [[[float(e), float(s)] for e, s in steps] for steps, _ in expected]
    assert got["valid"].tolist() == [real for _, real in expected]


@settings(max_examples=50, deadline=None)
@given(cases(), st.integers(0, 2**31))
def test_samples_stay_inside_one_episode(case, seed):
    lengths, horizon, stride, before, after = case
    try:
        windows = Windows(make(lengths), horizon, stride=stride, pad_before=before, pad_after=after)
    except UserError:
        return
    batch = windows.sample(16, torch.Generator().manual_seed(seed))
    assert (batch["observation"][:, :, 0] == batch["observation"][:, :1, 0]).all()
    assert batch["valid"].any(dim=1).all()
    inner = batch["valid"][:, 1:] & batch["valid"][:, :-1]
    assert ((batch["observation"][..., 1].diff(dim=1) == stride) | ~inner).all()


def test_shapes_types_and_replaced_columns():
    windows = Windows(make([4, 6]), 3, columns=["observation", "action", "flag", "image"])
    batch = windows.gather(torch.tensor([0, 5]))
    assert batch["image"].shape == (2, 3, 2, 2, 3)
    assert batch["image"].dtype == torch.uint8
    assert batch["flag"].dtype == torch.bool
    assert batch["valid"].all()
    windows.columns["action"] = windows.columns["action"] * 10
    assert windows.gather(torch.tensor([0]))["action"].flatten().tolist() == [0, 10, 20]


def test_sampling_is_uniform_and_repeats():
    windows = Windows(make([4, 6]), 3)
    counts = torch.zeros(len(windows))
    generator = torch.Generator().manual_seed(0)
    first = windows.sample(6000, generator)["action"][:, 0, 0]
    counts = torch.bincount(first.long(), minlength=10)
    assert sorted(counts.nonzero().flatten().tolist()) == [0, 1, 4, 5, 6, 7]
    assert (counts[counts > 0] - 1000).abs().max() < 200
    again = windows.sample(6000, torch.Generator().manual_seed(0))["action"][:, 0, 0]
    assert torch.equal(first, again)


def test_double_precision_and_mapped_columns_come_as_float32(tmp_path, monkeypatch):
    monkeypatch.setenv("PILOTWAVE_CACHE", str(tmp_path))
    store = make([5])
    store.columns["plain"] = np.arange(5, dtype=np.float64)[:, None]
    store.columns["mapped"] = Space(0).empty((5, 1), np.float64)
    store.columns["mapped"][:] = store.columns["plain"]
    batch = Windows(store, 5, columns=["plain", "mapped"]).gather(torch.tensor([0]))
    assert batch["plain"].dtype == batch["mapped"].dtype == torch.float32
    assert torch.equal(batch["plain"], batch["mapped"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 9}, "9 tokens of stride 1 need 9 steps, the longest of 2 episodes has 6"),
        ({"horizon": 3, "stride": 3}, "3 tokens of stride 3 need 7 steps, the longest of 2 episodes has 6"),
        ({"horizon": 0}, "horizon 0 and stride 1 must be at least 1"),
        ({"horizon": -4}, "horizon -4"),
        ({"horizon": 3, "stride": 0}, "stride 0"),
        ({"horizon": 3, "pad_after": 3}, "0 to horizon - 1 = 2"),
        ({"horizon": 3, "columns": ["actoin"]}, "did you mean 'action'"),
    ],
)
def test_bad_requests_are_named(options, message):
    with pytest.raises(UserError, match=message):
        Windows(make([4, 6]), **options)


def test_nan_in_a_chosen_column_is_refused():
    store = make([4])
    store.columns["extra"] = np.array([0, 1, np.nan, 3])
    Windows(store, 2)
    with pytest.raises(UserError, match="NaN in 'extra', episode 0, step 2"):
        Windows(store, 2, columns=["extra"])
