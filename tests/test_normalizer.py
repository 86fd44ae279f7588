import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from offline.normalizer import Normalizer, statistics
from pilotwave.errors import UserError


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(1, 20), st.integers(1, 5)), elements=st.floats(-1e4, 1e4, width=32)
    ),
    st.sampled_from(["limits", "gaussian", "none"]),
)
def test_round_trip_on_the_data(data, mode):
    normalizer = Normalizer.fit({"action": data}, mode)
    y = normalizer.normalize("action", torch.from_numpy(data))
    assert torch.isfinite(y).all()
    back = normalizer.denormalize("action", y).numpy()
    # Float32 keeps about 7 digits of the largest value of a column.
    np.testing.assert_allclose(back, data, rtol=1e-5, atol=4e-6 * max(1e-3, np.abs(data).max()))
    if mode == "limits":
        assert y.abs().max() <= 1 + 1e-3


def test_limits_and_gaussian_do_what_they_say():
    data = np.random.default_rng(0).normal(3.0, 5.0, (1000, 3))
    x = torch.from_numpy(data).float()
    limits = Normalizer.fit({"a": data}, "limits").normalize("a", x)
    assert torch.allclose(limits.amin(0), -torch.ones(3), atol=1e-5)
    assert torch.allclose(limits.amax(0), torch.ones(3), atol=1e-5)
    gaussian = Normalizer.fit({"a": data}, "gaussian").normalize("a", x)
    assert torch.allclose(gaussian.mean(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose(gaussian.std(0, correction=0), torch.ones(3), atol=1e-4)


@pytest.mark.parametrize("mode", ["limits", "gaussian"])
def test_constant_columns_go_to_zero_and_come_back_exact(mode):
    data = np.stack([np.full(50, 0.1), np.linspace(-1, 1, 50), np.zeros(50)], axis=1).astype(np.float32)
    normalizer = Normalizer.fit({"a": data}, mode)
    y = normalizer.normalize("a", torch.from_numpy(data))
    assert (y[:, [0, 2]] == 0).all()
    back = normalizer.denormalize("a", y + torch.tensor([0.3, 0.0, -0.3]))  # a network is never exactly 0 there
    assert np.array_equal(back[:, [0, 2]].numpy(), data[:, [0, 2]])
    far = normalizer.normalize("a", torch.tensor([[9.0, 0.0, 9.0]]))
    assert (far[:, [0, 2]] == 0).all()


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float32, (8, 2), elements=st.floats(-3.0, 3.0, width=32)))
def test_angles_become_cosine_and_sine(angles):
    data = np.concatenate([np.arange(8, dtype=np.float32)[:, None], angles], axis=1)
    normalizer = Normalizer.fit({"o": data}, {"o": {"mode": "limits", "angles": [1, 2]}})
    assert normalizer.width("o") == 5
    y = normalizer.normalize("o", torch.from_numpy(data))
    assert y.shape == (8, 5)
    assert torch.allclose(y[:, 1] ** 2 + y[:, 3] ** 2, torch.ones(8), atol=1e-5)
    assert torch.allclose(normalizer.denormalize("o", 0.5 * y)[:, 1:], torch.from_numpy(angles), atol=1e-5)


def test_angles_meet_at_pi():
    normalizer = Normalizer.fit({"o": np.array([[-3.1], [3.1]])}, {"o": {"angles": [0]}})
    a, b = (normalizer.normalize("o", torch.tensor([[s * (math.pi - 1e-3)]])) for s in (1.0, -1.0))
    assert (a - b).abs().max() < 3e-3


def test_quaternions_are_one_rotation_with_either_sign():
    generator = np.random.default_rng(0)
    q = generator.normal([0.0, 1.0, 0.0, 0.0], 0.2, (200, 4))  # w near 0: "w >= 0" would flip back and forth
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    q *= generator.choice([-1.0, 1.0], (200, 1))
    data = np.concatenate([generator.normal(size=(200, 3)), q], axis=1).astype(np.float32)
    normalizer = Normalizer.fit({"o": data}, {"o": {"quaternions": [[3, 4, 5, 6]]}})
    x = torch.from_numpy(data)
    y = normalizer.normalize("o", x)
    assert y.shape == x.shape
    assert torch.allclose(y[:, 3:], normalizer.normalize("o", torch.cat([x[:, :3], -x[:, 3:]], 1))[:, 3:])
    assert (y[:, 3:] @ y[:, 3:].T > 0).float().mean() > 0.99
    back = normalizer.denormalize("o", torch.cat([y[:, :3], 1.7 * y[:, 3:]], 1))
    assert torch.allclose(back[:, 3:].norm(dim=1), torch.ones(200), atol=1e-6)
    assert torch.allclose((back[:, 3:] * x[:, 3:]).sum(1).abs(), torch.ones(200), atol=1e-5)
    assert torch.allclose(back[:, :3], x[:, :3], atol=1e-5)


def test_state_is_restored_from_shapes(tmp_path):
    from safetensors.torch import load_file, save_file

    data = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    modes = {"observation.state": {"mode": "gaussian", "angles": [5], "quaternions": [[0, 1, 2, 3]]}}
    fitted = Normalizer.fit({"observation.state": data, "action": data[:, :2]}, modes)
    save_file(fitted.state_dict(), tmp_path / "n.safetensors")
    loaded = Normalizer.from_shapes({"observation.state": 6, "action": 2})
    loaded.load_state_dict(load_file(tmp_path / "n.safetensors"))
    x = torch.from_numpy(data)
    assert loaded.width("observation.state") == fitted.width("observation.state") == 7
    y = fitted.normalize("observation.state", x)
    assert torch.equal(y, loaded.normalize("observation.state", x))
    assert torch.equal(fitted.denormalize("observation.state", y), loaded.denormalize("observation.state", y))
    assert Normalizer.from_shapes({"observation.state": 6}, modes).width("observation.state") == 7


def test_it_traces_without_branches_on_data():
    data = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    group = Normalizer.fit({"o": data}, {"o": {"angles": [4, 5], "quaternions": [[0, 1, 2, 3]]}})
    program = torch.export.export(_Both(group), (torch.from_numpy(data),))
    assert torch.allclose(program.module()(torch.from_numpy(data)), _Both(group)(torch.from_numpy(data)), atol=1e-6)


class _Both(torch.nn.Module):
    def __init__(self, normalizer):
        super().__init__()
        self.normalizer = normalizer

    def forward(self, x):
        return self.normalizer.denormalize("o", self.normalizer.normalize("o", x))


def test_statistics_of_far_away_data_keep_their_digits():
    data = (1e6 + np.random.default_rng(0).normal(size=(1000, 1))).astype(np.float64)
    low, high, mean, std = statistics("x", data)
    np.testing.assert_allclose([low[0], high[0], mean[0], std[0]], [data.min(), data.max(), data.mean(), data.std()])


@pytest.mark.parametrize(
    ("data", "modes", "message"),
    [
        (np.zeros((0, 2)), "limits", "no data to normalize 'a'"),
        (np.array([[1.0, np.nan]]), "limits", "NaN or infinity in 'a', feature 1"),
        (np.zeros((3, 2)), "limit", "did you mean 'limits'"),
        (np.zeros((3, 2)), {"b": "limits"}, "unknown normalizer group 'b'"),
        (np.zeros((3, 2)), {"a": {"angle": [0]}}, "did you mean 'angles'"),
        (np.zeros((3, 2)), {"a": {"angles": [2]}}, "must be distinct and below 2"),
        (np.zeros((3, 4)), {"a": {"quaternions": [[0, 1, 2]]}}, "a quaternion needs 4 columns"),
    ],
)
def test_bad_requests_are_named(data, modes, message):
    with pytest.raises(UserError, match=message):
        Normalizer.fit({"a": data}, modes)
