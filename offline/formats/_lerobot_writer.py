"""The writer of LeRobot v3 data sets: files that hold many episodes, cameras as video where their size allows."""

from __future__ import annotations

import json
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from offline.store import TrajectoryStore
from pilotwave.errors import UserError

_DATA_BYTES, _VIDEO_BYTES, _CHUNK = 100 * 2**20, 200 * 2**20, 1000  # LeRobot's own limits of a file, files a folder
_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_NAMES = {"observation": "observation.state", "reward": "next.reward", "terminal": "next.done"}
_CODECS = ("libx264", "libsvtav1", "mpeg4")  # the first that this FFmpeg has
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def write(store: TrajectoryStore, path: Path) -> None:
    """A folder that LeRobot's LeRobotDataset(root=...) reads. Needs `dt`. Columns of more than one axis are flattened;
    cameras of three channels and even size become H.264 video (lossy), others PNG in the parquet files."""
    if store.dt is None:
        raise UserError(f"{store.source}: no dt known; LeRobot needs a frame rate: set store.dt, in seconds a step")
    rate = 1.0 / store.dt
    fps: int | float = round(rate) if abs(rate - round(rate)) < 1e-3 else rate
    cameras = {n: c for n, c in store.columns.items() if c.ndim == 4 and c.dtype == np.uint8}
    numbers = {n: c for n, c in store.columns.items() if n not in cameras and c.dtype.kind in "fiub"}
    videos = {n for n, c in cameras.items() if c.shape[-1] == 3 and c.shape[1] % 2 == 0 and c.shape[2] % 2 == 0}
    keys = {n: _NAMES.get(n, n.replace("/", ".")) for n in numbers}
    keys |= {n: f"observation.images.{n.replace('/', '.')}" for n in cameras}
    flat = {n: c.reshape(len(c), -1) for n, c in numbers.items() if n not in ("timestamp", "task_index")}

    tasks = store.metadata.get("per_episode", {}).get("tasks") or [["unknown"]] * store.episodes
    tasks = [list(t) or ["unknown"] for t in tasks]
    known = list(dict.fromkeys(task for listed in tasks for task in listed))
    task_index = np.repeat([known.index(t[0]) for t in tasks], store.lengths)
    frame = np.arange(store.steps) - np.repeat(store.starts, store.lengths)
    episode_index = np.repeat(np.arange(store.episodes), store.lengths)
    bookkeeping = {
        "timestamp": (frame / fps).astype(np.float32),
        "frame_index": frame,
        "episode_index": episode_index,
        "index": np.arange(store.steps),
        "task_index": task_index.astype(np.int64),
    }

    rows = [
        {
            "episode_index": i,
            "tasks": tasks[i],
            "length": int(n),
            "dataset_from_index": int(a),
            "dataset_to_index": int(b),
        }
        for i, (n, a, b) in enumerate(zip(store.lengths, store.starts, store.episode_ends))
    ]
    columns = {keys[n]: c for n, c in flat.items()} | bookkeeping
    pictures = {keys[n]: cameras[n] for n in cameras if n not in videos}
    _write_data(store, path, columns, pictures, rows)
    for name in sorted(videos):
        _write_video(store, path, keys[name], cameras[name], fps, rows)

    features: dict[str, Any] = {}
    for name, column in flat.items():
        features[keys[name]] = _feature(column.dtype, column.shape[1], store.names.get(name))
    for name, column in cameras.items():
        kind = "video" if name in videos else "image"
        shape = list(column.shape[1:])
        features[keys[name]] = {"dtype": kind, "shape": shape, "names": ["height", "width", "channels"]}
    features |= {key: _feature(column.dtype, 1, None) for key, column in bookkeeping.items()}
    arrays = columns | {keys[n]: c for n, c in cameras.items()}
    for row in rows:
        span = slice(row["dataset_from_index"], row["dataset_to_index"])
        for key, array in arrays.items():
            row |= {f"stats/{key}/{name}": v.tolist() for name, v in _statistics(array[span], False).items()}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
    _write_meta(path, rows, known)
    statistics = {k: {n: v.tolist() for n, v in _statistics(a, True).items()} for k, a in arrays.items()}
    _write_json(path / "meta/stats.json", statistics)
    info = {
        "codebase_version": "v3.0",
        "robot_type": store.metadata.get("robot"),
        "total_episodes": store.episodes,
        "total_frames": store.steps,
        "total_tasks": len(known),
        "chunks_size": _CHUNK,
        "data_files_size_in_mb": _DATA_BYTES // 2**20,
        "video_files_size_in_mb": _VIDEO_BYTES // 2**20,
        "fps": fps,
        "splits": {"train": f"0:{store.episodes}"},
        "data_path": _DATA,
        "video_path": _VIDEO if videos else None,
        "features": features,
    }
    _write_json(path / "meta/info.json", info)


def _feature(dtype: np.dtype, width: int, names: list[str] | None) -> dict[str, Any]:
    return {"dtype": dtype.name, "shape": [width], "names": names if names and len(names) == width else None}


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=4))


def _place(number: int) -> tuple[int, int]:
    return divmod(number, _CHUNK)


def _write_data(
    store: TrajectoryStore,
    path: Path,
    columns: dict[str, np.ndarray],
    pictures: dict[str, np.ndarray],
    rows: list[dict[str, Any]],
) -> None:
    """One row group an episode; a new file when one is full. Notes each episode's file in `rows`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    with ExitStack() as stack:
        writer, number, size = None, -1, 0
        for row in rows:
            span = slice(row["dataset_from_index"], row["dataset_to_index"])
            cells = {}
            for key, column in columns.items():
                values = pa.array(np.ascontiguousarray(column[span]).reshape(-1))
                width = column.shape[1] if column.ndim > 1 else 1
                cells[key] = values if width == 1 else pa.FixedSizeListArray.from_arrays(values, width)
            for key, column in pictures.items():
                cells[key] = pa.array([{"bytes": _png(x), "path": None} for x in column[span]], type=image)
            table = pa.table(cells)
            if writer is None or size + table.nbytes > _DATA_BYTES:
                number, size = number + 1, 0
                chunk, file = _place(number)
                target = path / _DATA.format(chunk_index=chunk, file_index=file)
                target.parent.mkdir(parents=True, exist_ok=True)
                stack.close()
                writer = stack.enter_context(pq.ParquetWriter(target, table.schema, compression="snappy"))
            writer.write_table(table)
            size += table.nbytes
            row["data/chunk_index"], row["data/file_index"] = _place(number)


def _png(image: np.ndarray) -> bytes:
    import cv2

    color = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.shape[-1] == 3 else image
    return cv2.imencode(".png", color)[1].tobytes()


def _write_video(store: TrajectoryStore, path: Path, key: str, frames: np.ndarray, fps: float, rows: list[dict[str, Any]]) -> None:
    """Episodes end to end in one video, a new file when one is full. Notes each episode's file and times in `rows`."""
    number, i = 0, 0
    while i < len(rows):
        chunk, file = _place(number)
        target = path / _VIDEO.format(video_key=key, chunk_index=chunk, file_index=file)
        target.parent.mkdir(parents=True, exist_ok=True)
        count = 0
        with _Encoder(target, frames.shape[1:], fps) as encoder:
            while i < len(rows) and (count == 0 or encoder.bytes < _VIDEO_BYTES):
                row = rows[i]
                span = slice(row["dataset_from_index"], row["dataset_to_index"])
                encoder.add(frames[span])
                row[f"videos/{key}/chunk_index"], row[f"videos/{key}/file_index"] = chunk, file
                row[f"videos/{key}/from_timestamp"] = count / fps
                count += row["length"]
                row[f"videos/{key}/to_timestamp"] = count / fps
                i += 1
        number += 1


class _Encoder:
    """A video file, open for frames (T, H, W, 3) uint8."""

    def __init__(self, path: Path, shape: tuple[int, ...], fps: float):
        import av

        codec = next(c for c in _CODECS if c in av.codecs_available)
        self.container = av.open(str(path), "w")
        stream: Any = self.container.add_stream(codec, rate=Fraction(fps).limit_denominator(100_000))
        stream.height, stream.width, stream.pix_fmt = shape[0], shape[1], "yuv420p"
        # A key frame every second frame makes any frame quick to reach, as LeRobot does; no B-frames: times start at 0.
        stream.options = {"g": "2", "crf": "18", "bf": "0"}
        self.stream = stream
        self.bytes = 0

    def add(self, frames: np.ndarray) -> None:
        import av

        for image in frames:
            self._mux(self.stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            self.bytes += packet.size
            self.container.mux(packet)

    def __enter__(self) -> _Encoder:
        return self

    def __exit__(self, *error: object) -> None:
        self._mux(self.stream.encode())
        self.container.close()


def _sampled(array: np.ndarray, most: int) -> np.ndarray:
    return array[np.unique(np.linspace(0, len(array) - 1, min(len(array), most)).astype(int))]


def _statistics(array: np.ndarray, quantiles: bool) -> dict[str, np.ndarray]:
    """LeRobot's statistics of a feature: per number, or per channel (C, 1, 1) in 0..1 for a camera."""
    if array.ndim == 4:
        values = _sampled(array, 100).reshape(-1, array.shape[-1]) / 255.0
    else:
        values = array.reshape(len(array), -1).astype(np.float64)
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    if quantiles:
        found |= {name: np.quantile(_sampled(values, 100_000), q, axis=0) for name, q in _QUANTILES.items()}
    if array.ndim == 4:
        found = {name: value.reshape(-1, 1, 1) for name, value in found.items()}
    return {**found, "count": np.array([len(array)])}


def _write_meta(path: Path, rows: list[dict[str, Any]], tasks: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    episodes = path / "meta/episodes/chunk-000/file-000.parquet"
    episodes.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({key: [row[key] for row in rows] for key in rows[0]}), episodes)
    # LeRobot reads this file with pandas and takes the task from the index: named so in pandas' own schema note.
    index = "__index_level_0__"
    note = {
        "index_columns": [index],
        "column_indexes": [],
        "columns": [
            {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64",
             "metadata": None},
            {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }  # fmt: skip
    table = pa.table({"task_index": np.arange(len(tasks)), index: tasks})
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(note)}), path / "meta/tasks.parquet")
