import json

import numcodecs
import numpy as np
import pytest
import zarr

import offline
from pilotwave.errors import UserError


def pusht(lengths=(5, 7), seed=0):
    n, generator = sum(lengths), np.random.default_rng(seed)
    return {
        "state": generator.uniform(0, 512, (n, 5)).astype(np.float32),
        "keypoint": generator.uniform(0, 512, (n, 9, 2)).astype(np.float32),
        "action": generator.uniform(0, 512, (n, 2)).astype(np.float32),
        "img": generator.integers(0, 256, (n, 8, 8, 3)).astype(np.float32),
        "n_contacts": np.ones((n, 1), np.float32),
    }


def save(path, data, ends=(5, 12), version=2, **attributes):
    root = zarr.open_group(str(path), mode="w", zarr_format=version, attributes=attributes)
    packed = {"compressors": numcodecs.Blosc("zstd", 5, 2)} if version == 2 else {}
    for key, value in data.items():
        root.create_array(f"data/{key}", data=value, chunks=(4, *value.shape[1:]), **packed)
    root.create_array("meta/episode_ends", data=np.asarray(ends, np.int64))
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_pusht_is_agent_and_keypoints(tmp_path, version):
    data = pusht()
    store = offline.read(save(tmp_path / "a.zarr", data, version=version))
    assert store.metadata["format"] == "zarr"
    assert (store.episode_ends.tolist(), store.dt) == ([5, 12], 0.1)
    expected = np.concatenate([data["state"][:, :2], data["keypoint"].reshape(12, 18)], axis=1)
    np.testing.assert_array_equal(store.columns["observation"], expected)
    np.testing.assert_array_equal(store.columns["state"], data["state"])
    assert store.names["observation"][:4] == ["agent_x", "agent_y", "keypoint_0_x", "keypoint_0_y"]
    assert "image" not in store.columns
    assert store.metadata["cameras"] == ["image"]


def test_images_come_as_bytes_when_asked(tmp_path):
    data = pusht()
    path = save(tmp_path / "a.zarr", data)
    for asked in (True, ["image"]):
        store = offline.read(path, images=asked)
        assert store.columns["image"].dtype == np.uint8
        np.testing.assert_array_equal(store.columns["image"], data["img"])
    with pytest.raises(UserError, match="did you mean 'image'"):
        offline.read(path, images=["imag"])
    unit = save(tmp_path / "b.zarr", {**data, "img": data["img"] / 255})
    np.testing.assert_array_equal(offline.read(unit, images=True).columns["image"], data["img"])
    first = save(tmp_path / "c.zarr", {**data, "img": np.moveaxis(data["img"], -1, 1)})
    np.testing.assert_array_equal(offline.read(first, images=True).columns["image"], data["img"])


def test_other_buffers_join_their_vectors(tmp_path):
    data = {"action": np.zeros((12, 3), np.float32), "b": np.ones((12, 2)), "a": np.arange(12.0)[:, None]}
    store = offline.read(save(tmp_path / "a.zarr", data, fps=20))
    np.testing.assert_array_equal(store.columns["observation"], np.hstack([data["a"], data["b"]]))
    assert store.names["observation"] == ["a", "b.0", "b.1"]
    assert store.dt == 0.05


@pytest.mark.parametrize(
    ("change", "ends", "message"),
    [
        ({}, (5, 3, 12), "episode ends must increase; end 1 is 3, after 5"),
        ({}, (5, 5, 12), "episode 1 is empty"),
        ({}, (5, 11), "has 12 rows, the episodes have 11"),
        ({"action": np.zeros((11, 2), np.float32)}, (5, 12), "unequal column lengths: 'action' 11"),
        ({"action": np.full((12, 2), np.inf, np.float32)}, (5, 12), "an infinite value in 'action', episode 0, step 0"),
        ({}, (), "the data set is empty"),
    ],
)
def test_bad_content_is_named(tmp_path, change, ends, message):
    with pytest.raises(UserError, match=message):
        offline.read(save(tmp_path / "a.zarr", {**pusht(), **change}, ends))


def test_damage_is_named(tmp_path):
    path = save(tmp_path / "a.zarr", pusht())
    chunk = path / "data/action/0.0"
    chunk.write_bytes(chunk.read_bytes()[:10])
    with pytest.raises(UserError, match="damaged Zarr data"):
        offline.read(path)
    (path / "data/action/.zarray").write_text("{")
    with pytest.raises(UserError, match="damaged Zarr metadata"):
        offline.read(path)
    bare = tmp_path / "b.zarr"
    zarr.open_group(str(bare), mode="w", zarr_format=2)
    with pytest.raises(UserError, match="expected data/<key> arrays and meta/episode_ends"):
        offline.read(bare)
    assert json.loads((bare / ".zgroup").read_text())["zarr_format"] == 2
