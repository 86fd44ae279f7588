"""What every reader refuses before reading: missing things, unknown things, and things that run code when loaded."""

import io
import json
import pickle

import numpy as np
import pytest
import torch
import zarr

import offline
from offline.formats import detect
from pilotwave.errors import UserError


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["data.pkl", "data.hdf5", "data.npz", "data"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickles_are_refused_and_never_run(tmp_path, name, protocol):
    trap, path = tmp_path / "sprung", tmp_path / name
    path.write_bytes(pickle.dumps({"actions": Trap(trap)}, protocol=protocol))
    with pytest.raises(UserError) as error:
        offline.read(path)
    assert "\n" not in str(error.value)
    assert ("a pickle, which can run code" in str(error.value)) or (protocol == 0 and name != "data.pkl")
    assert not trap.exists()


def test_torch_files_are_refused(tmp_path):
    for name, new in (("a.pt", True), ("b.npz", True), ("c.pth", False)):
        torch.save({"actions": torch.zeros(3)}, tmp_path / name, _use_new_zipfile_serialization=new)
        with pytest.raises(UserError, match="a pickle, which can run code"):
            offline.read(tmp_path / name)


def test_object_arrays_are_refused_and_never_run(tmp_path):
    trap = tmp_path / "sprung"
    objects = np.empty(2, object)
    objects[:] = [Trap(trap), 1]
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "b.npz", observations=np.zeros((2, 3)), actions=objects)
    for name in ("a.npy", "b.npz"):
        with pytest.raises(UserError, match="pickled objects, which can run code"):
            offline.read(tmp_path / name)
    assert not trap.exists()


@pytest.mark.parametrize("consolidated", [False, True])
def test_the_pickle_codec_of_zarr_is_refused_and_never_run(tmp_path, consolidated):
    trap, path = tmp_path / "sprung", tmp_path / "a.zarr"
    root = zarr.open_group(str(path), mode="w", zarr_format=2)
    root.create_array("data/action", data=np.zeros((4, 2), np.float32))
    root.create_array("meta/episode_ends", data=np.array([4]))
    root.create_array("data/state", data=np.zeros((4, 2), np.float32), chunks=(4, 2))
    array = json.loads((path / "data/state/.zarray").read_text())
    array |= {"dtype": "|O", "filters": [{"id": "pickle", "protocol": 5}], "compressor": None, "shape": [4]}
    array |= {"chunks": [4], "fill_value": None}
    if consolidated:
        files = {str(f.relative_to(path)): json.loads(f.read_text()) for f in path.rglob(".z*")}
        files["data/state/.zarray"] = array
        (path / ".zmetadata").write_text(json.dumps({"zarr_consolidated_format": 1, "metadata": files}))
    else:
        (path / "data/state/.zarray").write_text(json.dumps(array))
    (path / "data/state/0").write_bytes(pickle.dumps([Trap(trap)]))
    with pytest.raises(UserError, match="pickled objects, which can run code"):
        offline.read(path)
    assert not trap.exists()


def test_a_folder_of_pickles_is_refused(tmp_path):
    (tmp_path / "episode_0.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match="a pickle"):
        offline.read(tmp_path)


def test_unknown_things_list_what_is_known(tmp_path):
    (tmp_path / "notes.txt").write_text("not data")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match=r"no known data format .*known: D4RL HDF5.*LeRobot v3"):
            offline.read(path)
    with pytest.raises(UserError, match="did you mean 'lerobot_v3'"):
        offline.read(tmp_path, format="lerobot3")
    with pytest.raises(UserError, match="did you mean 'd4rl'"):
        offline.write(offline.TrajectoryStore({}, np.array([1])), tmp_path / "x", "d4r")


def test_plain_npz_and_zip_are_not_taken_for_data(tmp_path):
    np.savez(tmp_path / "a.npz", weights=np.zeros(3))
    with pytest.raises(UserError, match="no known data format"):
        detect(tmp_path / "a.npz")
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((3, 2)))
    (tmp_path / "b.pt").write_bytes(buffer.getvalue())  # plain data under a pickle's name
    assert offline.read(tmp_path / "b.pt").steps == 3


def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path):
    store = offline.TrajectoryStore(
        {"observation": np.zeros((4, 2), np.float32), "action": np.zeros((4, 1), np.float32)}, np.array([4]), dt=0.1
    )
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        offline.write(store, tmp_path / "file" / "inside.hdf5", "d4rl")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(UserError, match="the folder is not empty"):
        offline.write(store, tmp_path / "full", "lerobot_v3")
    store.columns["action"][2] = np.nan
    with pytest.raises(UserError, match="NaN in 'action', episode 0, step 2"):
        offline.write(store, tmp_path / "nan.hdf5", "robomimic")
    store.columns["action"][2] = 0
    store.dt = None
    with pytest.raises(UserError, match="no dt known"):
        offline.write(store, tmp_path / "lerobot", "lerobot_v3")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]


def _d4rl(path):
    import h5py

    with h5py.File(path, "w") as file:
        file.update({"observations": np.zeros((9, 3)), "actions": np.ones((9, 2)), "timeouts": np.arange(9) % 3 == 2})


def _npz(path):
    np.savez_compressed(path, observations=np.zeros((9, 3)), actions=np.ones((9, 2)), terminals=np.arange(9) % 3 == 2)


def _npy(path):
    np.save(path, np.ones((3, 3, 2)))


@pytest.mark.parametrize(("make", "name"), [(_d4rl, "a.hdf5"), (_npz, "a.npz"), (_npy, "a.npy")])
def test_damaged_bytes_end_in_one_line(tmp_path, make, name):
    path, generator, errors = tmp_path / name, np.random.default_rng(0), []
    make(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for trial in range(60):
        damaged = whole.copy()
        start = int(generator.integers(len(whole)))
        if trial % 3 == 0:
            damaged = damaged[:start]
        elif trial % 3 == 1:
            damaged[start : start + 100] = 0
        else:
            damaged[generator.integers(0, len(whole), 20)] = generator.integers(0, 256, 20)
        path.write_bytes(damaged.tobytes())
        try:
            offline.read(path)
        except UserError as error:
            errors.append(str(error))
    assert len(errors) > 20
    assert not any("\n" in error for error in errors)
