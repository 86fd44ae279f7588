import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import offline
from offline.formats._lerobot_writer import _Encoder
from pilotwave.errors import UserError

H, W = 32, 48


def picture(episode: int, step: int) -> np.ndarray:
    """A flat grey that names episode and step, even after lossy coding."""
    return np.full((H, W, 3), 20 + 60 * episode + 10 * step, np.uint8)


def save_v21(path: Path, lengths=(4, 6), video=True) -> Path:
    (path / "meta").mkdir(parents=True)
    features = {
        "observation.state": {"dtype": "float32", "shape": [3], "names": [["a", "b", "c"]]},
        "action": {"dtype": "float32", "shape": [2], "names": {"motors": ["u", "v"]}},
        "next.reward": {"dtype": "float32", "shape": [1], "names": None},
        "index": {"dtype": "int64", "shape": [1], "names": None},
        "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    }
    if video:
        features["observation.images.top"] = {"dtype": "video", "shape": [H, W, 3], "names": ["height", "width", "c"]}
    data, videos = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet", None
    if video:
        videos = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    info = {"codebase_version": "v2.1", "fps": 10, "chunks_size": 1000, "robot_type": "arm", "features": features}
    (path / "meta/info.json").write_text(json.dumps({**info, "data_path": data, "video_path": videos}))
    lines = [{"episode_index": i, "tasks": [f"task {i}"], "length": n} for i, n in enumerate(lengths)]
    (path / "meta/episodes.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    row = 0
    for i, n in enumerate(lengths):
        file = path / data.format(episode_chunk=0, episode_index=i)
        file.parent.mkdir(parents=True, exist_ok=True)
        state = np.arange(row * 3, (row + n) * 3, dtype=np.float32)
        columns = {
            "observation.state": pa.FixedSizeListArray.from_arrays(pa.array(state), 3),
            "action": pa.array([[float(i), float(t)] for t in range(n)], pa.list_(pa.float32())),
            "next.reward": pa.array(np.ones(n, np.float32)),
            "index": pa.array(np.arange(row, row + n)),
            "episode_index": pa.array(np.full(n, i)),
        }
        pq.write_table(pa.table(columns), file)
        row += n
        if video:
            clip = path / str(videos).format(episode_chunk=0, episode_index=i, video_key="observation.images.top")
            clip.parent.mkdir(parents=True, exist_ok=True)
            with _Encoder(clip, (H, W), 10) as encoder:
                encoder.add(np.stack([picture(i, t) for t in range(n)]))
    return path


def check_pictures(images: np.ndarray, lengths=(4, 6)) -> None:
    expected = np.concatenate([[picture(i, t) for t in range(n)] for i, n in enumerate(lengths)])
    assert images.dtype == np.uint8
    assert np.abs(images.astype(int) - expected).max() <= 3


def test_v21_with_video(tmp_path):
    path = save_v21(tmp_path / "set")
    store = offline.read(path, images=True)
    assert store.metadata["format"] == "lerobot_v2"
    assert (store.episode_ends.tolist(), store.dt) == ([4, 10], 0.1)
    np.testing.assert_array_equal(store.columns["observation"], np.arange(30, dtype=np.float32).reshape(10, 3))
    assert store.columns["action"][5].tolist() == [1.0, 1.0]
    assert store.names == {"observation": ["a", "b", "c"], "action": ["u", "v"]}
    assert store.columns["reward"].tolist() == [1.0] * 10
    assert store.metadata["per_episode"]["tasks"] == [["task 0"], ["task 1"]]
    check_pictures(store.columns["top"])
    assert "top" not in offline.read(path).columns


@pytest.mark.parametrize("size", [(H, W), (H + 1, W)])  # odd sizes cannot be yuv420p video: PNG
def test_v3_write_and_read_again(tmp_path, size, monkeypatch):
    import offline.formats._lerobot_writer as writer

    monkeypatch.setattr(writer, "_DATA_BYTES", 500)  # several data and video files
    monkeypatch.setattr(writer, "_VIDEO_BYTES", 1)
    store = offline.read(save_v21(tmp_path / "set"), images=True)
    store = store.select([1, 0, 1])
    store.columns["top"] = np.ascontiguousarray(np.resize(store.columns["top"], (16, *size, 3)))
    store.columns["top"][:] = store.columns["top"][:, :1, :1]
    store.columns["terminal"] = np.arange(16) == 15
    store.columns["infos/pose"] = np.arange(32.0).reshape(16, 2)
    path = offline.write(store, tmp_path / "new", "lerobot_v3")
    again = offline.read(path, images=True)
    assert again.metadata["format"] == "lerobot_v3"
    for name in ("observation", "action", "reward", "terminal"):
        np.testing.assert_array_equal(again.columns[name], store.columns[name])
    np.testing.assert_array_equal(again.columns["infos.pose"], store.columns["infos/pose"])
    assert again.episode_ends.tolist() == [6, 10, 16]
    assert (again.names, again.dt) == (store.names, store.dt)
    assert again.metadata["per_episode"] == store.metadata["per_episode"]
    error = np.abs(again.columns["top"].astype(int) - store.columns["top"]).max()
    assert error <= 3 if size == (H, W) else error == 0
    assert len(list(path.glob("data/*/*.parquet"))) > 1
    assert bool(list(path.glob("videos/**/*.mp4"))) == (size == (H, W))


def test_v3_episodes_of_one_file_are_found_by_time(tmp_path):
    store = offline.read(save_v21(tmp_path / "set"), images=True)
    path = offline.write(store, tmp_path / "new", "lerobot_v3")
    assert len(list(path.glob("videos/**/*.mp4"))) == 1
    check_pictures(offline.read(path, images=True).columns["top"])
    listing = path / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(listing).to_pylist()
    key = "videos/observation.images.top/"
    assert [(r[key + "from_timestamp"], r[key + "to_timestamp"]) for r in rows] == [(0.0, 0.4), (0.4, 1.0)]
    swapped = [dict(r) for r in rows]  # episode 0 lies second in the video
    for row, begin in zip(swapped, (0.6, 0.0)):
        row[key + "from_timestamp"] = begin
    pq.write_table(pa.Table.from_pylist(swapped), listing)
    again = offline.read(path, images=True)
    np.testing.assert_allclose(again.episode(0)["top"][:, 0, 0, 0], [100, 110, 120, 130], atol=3)


def test_it_is_the_layout_that_lerobot_expects(tmp_path):
    path = offline.write(offline.read(save_v21(tmp_path / "set"), images=True), tmp_path / "new", "lerobot_v3")
    info = json.loads((path / "meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["total_frames"]) == ("v3.0", 10, 10)
    assert info["features"]["observation.state"] == {"dtype": "float32", "shape": [3], "names": ["a", "b", "c"]}
    schema = pq.read_schema(path / "data/chunk-000/file-000.parquet")
    assert set(schema.names) == {k for k, f in info["features"].items() if f["dtype"] != "video"}
    assert json.loads(pq.read_schema(path / "meta/tasks.parquet").metadata[b"pandas"])["index_columns"]
    stats = json.loads((path / "meta/stats.json").read_text())
    assert stats["observation.state"]["mean"] == [13.5, 14.5, 15.5]
    assert np.shape(stats["observation.images.top"]["mean"]) == (3, 1, 1)


@pytest.mark.slow
@pytest.mark.skipif("LEROBOT_PYTHON" not in os.environ, reason="set LEROBOT_PYTHON to a Python with lerobot 0.4.4")
def test_lerobot_itself_reads_what_is_written(tmp_path):
    path = offline.write(offline.read(save_v21(tmp_path / "set", video=False)), tmp_path / "new", "lerobot_v3")
    code = (
        "import sys; from lerobot.datasets.lerobot_dataset import LeRobotDataset\n"
        "d = LeRobotDataset('local/set', root=sys.argv[1])\n"
        "assert len(d) == 10 and d.num_episodes == 2 and d[5]['observation.state'].tolist() == [15., 16., 17.]\n"
        "assert d[5]['task'] == 'task 1' and d.meta.stats['action']['max'].tolist() == [1., 5.]\n"
    )
    done = subprocess.run([os.environ["LEROBOT_PYTHON"], "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _edit(path: Path, change) -> None:
    file = path / "data/chunk-000/episode_000001.parquet"
    pq.write_table(change(pq.read_table(file)), file)


def _swap(path: Path) -> None:
    first, second = (path / f"data/chunk-000/episode_00000{i}.parquet" for i in (0, 1))
    tables = pq.read_table(first), pq.read_table(second)
    pq.write_table(tables[1], first)
    pq.write_table(tables[0], second)


def _edit_info(path: Path, **values) -> None:
    info = json.loads((path / "meta/info.json").read_text())
    (path / "meta/info.json").write_text(json.dumps({**info, **values}))


BAD = {
    "lacks column 'action'.*unequal keys": lambda p: _edit(p, lambda t: t.drop_columns(["action"])),
    "episode 1 has 5 rows of data, meta lists 6": lambda p: _edit(p, lambda t: t.slice(0, 5)),
    "rows are not in the order": lambda p: _swap(p),
    "'action' should have 2 numbers a step": lambda p: _edit(
        p, lambda t: t.set_column(1, "action", pa.array([[0.0]] * 6, pa.list_(pa.float32())))
    ),
    "'next.reward' has 1 empty cells, the first in row 6": lambda p: _edit(
        p, lambda t: t.set_column(2, "next.reward", pa.array([1.0, 1, None, 1, 1, 1], pa.float32()))
    ),
    "NaN in 'action', episode 1, step 0, feature 0 .u.": lambda p: _edit(
        p, lambda t: t.set_column(1, "action", pa.array([[np.nan, 0.0]] * 6, pa.list_(pa.float32())))
    ),
    "column 'next.reward' is double, in other files float": lambda p: _edit(
        p, lambda t: t.set_column(2, "next.reward", pa.array(np.ones(6)))
    ),
    "episode_000001.parquet: no such file": lambda p: (p / "data/chunk-000/episode_000001.parquet").unlink(),
    "episode_000001.parquet: truncated or damaged": lambda p: (p / "data/chunk-000/episode_000001.parquet").write_bytes(
        b"PAR1 nothing"
    ),
    "info.json: not readable JSON": lambda p: (p / "meta/info.json").write_text("{"),
    "positive 'fps'": lambda p: _edit_info(p, fps=0),
    "path template .* cannot be filled in": lambda p: _edit_info(p, data_path="{episode_index.__class__}"),
    "the data set is empty": lambda p: (p / "meta/episodes.jsonl").write_text(""),
    "damaged episode list": lambda p: (p / "meta/episodes.jsonl").write_text('{"length": 3}'),
    "episodes.jsonl: no such file": lambda p: (p / "meta/episodes.jsonl").unlink(),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_content_is_named(tmp_path, message):
    path = save_v21(tmp_path / "set", video=False)
    BAD[message](path)
    with pytest.raises(UserError, match=message):
        offline.read(path)


def test_bad_videos_are_named_only_when_asked_for(tmp_path):
    path = save_v21(tmp_path / "set")
    clip = path / "videos/chunk-000/observation.images.top/episode_000001.mp4"
    with _Encoder(clip, (H, W), 10) as encoder:
        encoder.add(np.stack([picture(1, 0)] * 4))
    with pytest.raises(UserError, match="4 frames for the 6 steps of episode 1"):
        offline.read(path, images=True)
    clip.write_bytes(b"not a video")
    with pytest.raises(UserError, match="damaged video"):
        offline.read(path, images=["top"])
    clip.unlink()
    with pytest.raises(UserError, match="no such video"):
        offline.read(path, images=True)
    assert offline.read(path).steps == 10
