"""LeRobot data sets: v2.x (one parquet and one video an episode) and v3 (files that hold many episodes).

meta/info.json names the features, the frame rate and the path templates. v2: meta/episodes.jsonl, meta/tasks.jsonl.
v3: meta/episodes/chunk-*/file-*.parquet (rows, files and video times of each episode), meta/tasks.parquet.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offline.formats._common import Format, Options, Source, assemble, read_json
from offline.formats._lerobot_writer import write
from offline.store import TrajectoryStore
from pilotwave.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

RENAME = {"next.reward": "reward", "next.done": "terminal"}
_BOOKKEEPING = ("index", "episode_index", "frame_index")  # implied by the store's episodes


@dataclass
class _Episode:
    index: int
    length: int
    tasks: list[str]
    data: Path
    videos: dict[str, tuple[Path, float]] = field(default_factory=dict)  # key -> (file, time of the first frame)


def _version(path: Path) -> str:
    return str(read_json(path / "meta/info.json").get("codebase_version", "unknown"))


def _matches(major: str, path: Path) -> bool:
    return (path / "meta/info.json").is_file() and _version(path).startswith(major)


def _fill(template: Any, path: Path, **values: Any) -> Path:
    """A path template of info.json, filled in; only plain fields are allowed in it."""
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        if not fields <= set(values):
            raise KeyError(sorted(fields - set(values))[0])
        return path / template.format(**values)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{path}/meta/info.json: path template {template!r} cannot be filled in ({error})") from error


def _episodes_v2(path: Path, info: dict[str, Any], videos: list[str]) -> list[_Episode]:
    listing = path / "meta/episodes.jsonl"
    if not listing.is_file():
        raise UserError(f"{listing}: no such file; a LeRobot v2 data set lists its episodes there")
    try:
        rows = sorted((json.loads(x) for x in listing.read_text().splitlines() if x.strip()), key=_episode_index)
        episodes = []
        for row in rows:
            i = int(row["episode_index"])
            place = {"episode_chunk": i // int(info.get("chunks_size", 1000)), "episode_index": i}
            files = {k: (_fill(info["video_path"], path, video_key=k, **place), 0.0) for k in videos}
            data = _fill(info["data_path"], path, **place)
            episodes.append(_Episode(i, int(row["length"]), list(row.get("tasks", [])), data, files))
        return episodes
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{listing}: damaged episode list ({error!r})") from error


def _episode_index(row: dict[str, Any]) -> int:
    return int(row["episode_index"])


def _episodes_v3(path: Path, info: dict[str, Any], videos: list[str]) -> list[_Episode]:
    files = sorted((path / "meta/episodes").glob("*/*.parquet"))
    if not files:
        raise UserError(f"{path}/meta/episodes: no parquet file; a LeRobot v3 data set lists its episodes there")
    rows: list[dict[str, Any]] = []
    for file in files:
        names = [n for n in _schema(file).names if not n.startswith("stats/")]
        rows += _table([file], names).to_pylist()
    episodes = []
    try:
        for row in sorted(rows, key=_episode_index):
            data = _fill(info["data_path"], path, chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
            found = {}
            for key in videos:
                chunk, number = row[f"videos/{key}/chunk_index"], row[f"videos/{key}/file_index"]
                file = _fill(info["video_path"], path, video_key=key, chunk_index=chunk, file_index=number)
                found[key] = (file, float(row[f"videos/{key}/from_timestamp"]))
            tasks = list(row.get("tasks") or [])
            episodes.append(_Episode(int(row["episode_index"]), int(row["length"]), tasks, data, found))
        return episodes
    except (KeyError, TypeError) as error:
        raise UserError(f"{files[0]}: episode list without {error}") from error


_LISTINGS = {"v2": _episodes_v2, "v3": _episodes_v3}


def read(path: Path, options: Options) -> TrajectoryStore:
    info = read_json(path / "meta/info.json")
    features: dict[str, dict[str, Any]] = info.get("features") or {}
    fps = info.get("fps")
    if not features or not isinstance(fps, int | float) or fps <= 0:
        raise UserError(f"{path}/meta/info.json: needs 'features' and a positive 'fps'")
    videos = [k for k, f in features.items() if f.get("dtype") == "video"] if options.images else []
    episodes = _LISTINGS[_version(path)[:2]](path, info, videos)
    if not episodes:
        raise UserError(f"{path}: the data set is empty; meta lists no episode")
    files = list(dict.fromkeys(e.data for e in episodes))
    numbers = [k for k, f in features.items() if f.get("dtype") not in ("video", "image", "string")]
    _check_files(files, features)
    table = _table(files, numbers)
    lengths = [e.length for e in episodes]
    _check_rows(path, table, episodes)
    sources: dict[str, Source] = {}
    for key in numbers:
        if key not in _BOOKKEEPING:
            values = _numpy(path, key, table.column(key), tuple(features[key].get("shape") or ()))
            sources[key] = Source.of(values, _names(features[key]))
    for key, feature in features.items():
        if feature.get("dtype") in ("video", "image"):
            sources[key] = _pictures(path, key, feature, episodes, files, sum(lengths), float(fps))
    observation = sorted(
        k for k, s in sources.items() if k.startswith("observation.") and s.dtype.kind == "f" and s.low_dimensional
    )
    metadata: dict[str, Any] = {"version": _version(path), "per_episode": {"tasks": [e.tasks for e in episodes]}}
    if info.get("robot_type"):
        metadata["robot"] = info["robot_type"]
    return assemble(
        path,
        sources,
        options,
        np.cumsum(lengths),
        rename=RENAME,
        observation=observation,
        camera=lambda key: key.rsplit(".", 1)[-1],
        dt=1.0 / float(fps),
        metadata=metadata,
        format=f"lerobot_{_version(path)[:2]}",
    )


def _schema(file: Path) -> pa.Schema:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file)
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; the data set is incomplete") from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: truncated or damaged parquet ({_line(error)}); copy or download it again") from error


def _table(files: list[Path], columns: list[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.dataset

    try:
        return pa.dataset.dataset([str(f) for f in files], format="parquet").to_table(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{files[0].parent}: damaged parquet ({_line(error)}); copy or download it again") from error


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0][:160]


def _check_files(files: list[Path], features: dict[str, dict[str, Any]]) -> None:
    """Every file holds every feature that is not a video, with one type."""
    needed = {k for k, f in features.items() if f.get("dtype") != "video"}
    first = None
    for file in files:
        schema = _schema(file)
        if missing := sorted(needed - set(schema.names)):
            raise UserError(f"{file}: lacks column '{missing[0]}' that meta/info.json lists; episodes of unequal keys")
        types = {name: schema.field(name).type for name in needed}
        first = first or types
        if changed := sorted(k for k in needed if types[k] != first[k]):
            raise UserError(f"{file}: column '{changed[0]}' is {types[changed[0]]}, in other files {first[changed[0]]}")


def _check_rows(path: Path, table: pa.Table, episodes: list[_Episode]) -> None:
    """The rows are the listed episodes, in order."""
    if "episode_index" not in table.column_names:
        expected = sum(e.length for e in episodes)
        if table.num_rows != expected:
            raise UserError(f"{path}: {table.num_rows} rows of data, meta lists {expected}")
        return
    index = table.column("episode_index").to_numpy()
    expected_index = np.repeat([e.index for e in episodes], [e.length for e in episodes])
    if np.array_equal(index, expected_index):
        return
    for episode in episodes:
        held = int((index == episode.index).sum())
        if held != episode.length:
            raise UserError(f"{path}: episode {episode.index} has {held} rows of data, meta lists {episode.length}")
    raise UserError(f"{path}: rows are not in the order of the episodes, or belong to none that meta lists")


def _numpy(path: Path, key: str, column: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    """(N, *shape) from a column of numbers or of (nested) lists of them."""
    import pyarrow as pa

    array = column.combine_chunks()
    rows = len(array)
    if array.null_count:
        raise UserError(f"{path}: '{key}' has {array.null_count} empty cells, the first in row {_first_null(array)}")
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    width = int(np.prod(shape)) if shape else 1
    if len(array) != rows * width or array.null_count:
        raise UserError(f"{path}: '{key}' should have {width} numbers a step; its rows differ or hold empty cells")
    values = array.to_numpy(zero_copy_only=False)
    return values if shape in ((), (1,)) else values.reshape(rows, *shape)


def _first_null(array: pa.Array) -> int:
    return int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))


def _names(feature: dict[str, Any]) -> list[str] | None:
    """Feature names, from any of the forms in use: a list, a list in a list, {"motors": [...]}, {"x": 0, ...}."""
    names = feature.get("names")
    if isinstance(names, dict):
        names = next(iter(names.values())) if any(isinstance(v, list) for v in names.values()) else list(names)
    while isinstance(names, list) and len(names) == 1 and isinstance(names[0], list):
        names = names[0]
    width = int(np.prod(feature.get("shape") or (1,)))
    good = isinstance(names, list) and len(names) == width and all(isinstance(n, str) for n in names)
    return names if good else None


def _pictures(
    path: Path,
    key: str,
    feature: dict[str, Any],
    episodes: list[_Episode],
    files: list[Path],
    rows: int,
    fps: float,
) -> Source:
    """A camera as (N, H, W, 3) uint8, decoded only when its pieces are asked for."""
    shape = tuple(feature.get("shape") or ())
    if len(shape) != 3:
        raise UserError(f"{path}: camera '{key}' has shape {shape}; expected (height, width, channels)")
    height, width = shape[1:] if shape[0] in (1, 3) and shape[2] not in (1, 3) else shape[:2]
    size = (int(height), int(width), 3)

    def pieces() -> Iterator[np.ndarray]:
        from_video = feature["dtype"] == "video"
        for piece in _decode_videos(key, episodes, fps) if from_video else _decode_images(key, files):
            if piece.shape[1:] != size:
                raise UserError(f"{path}: camera '{key}' gives frames {piece.shape[1:]}, meta/info.json says {size}")
            yield piece

    return Source((rows, *size), np.dtype(np.uint8), pieces)


def _decode_images(key: str, files: list[Path]) -> Iterator[np.ndarray]:
    import cv2

    for file in files:
        for number, cell in enumerate(_table([file], [key]).column(key).to_pylist()):
            data = (cell or {}).get("bytes")
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
            if image is None:
                raise UserError(f"{file}: row {number} of '{key}' holds no readable image")
            yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB)[None]


def _decode_videos(key: str, episodes: list[_Episode], fps: float) -> Iterator[np.ndarray]:
    """The frames of each episode (T, H, W, 3); a file that holds several episodes is decoded once."""
    current, video = None, None
    for episode in episodes:
        file, begin = episode.videos[key]
        first = round(begin * fps)
        if video is None or file != current or video.ahead is None or video.ahead[0] > first:
            current, video = file, _Video(file, fps)
        frames = video.take(first, episode.length)
        if len(frames) < episode.length:
            raise UserError(f"{file}: {len(frames)} frames for the {episode.length} steps of episode {episode.index}")
        yield np.stack(frames)


class _Video:
    """A video read forwards, one frame ahead."""

    def __init__(self, file: Path, fps: float):
        self.frames = _frames(file, fps)
        self.ahead = next(self.frames, None)

    def take(self, first: int, count: int) -> list[np.ndarray]:
        """The next `count` images from frame number `first` on; fewer where the video ends."""
        taken: list[np.ndarray] = []
        while self.ahead is not None and len(taken) < count:
            if self.ahead[0] >= first:
                taken.append(self.ahead[1])
            self.ahead = next(self.frames, None)
        return taken


def _frames(file: Path, fps: float) -> Iterator[tuple[int, np.ndarray]]:
    """(frame number, RGB image) of a video."""
    import av

    if not file.is_file():
        raise UserError(f"{file}: no such video; the data set is incomplete (read it without images)")
    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                yield round((frame.time or 0.0) * fps), frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, IndexError) as error:
        raise UserError(f"{file}: damaged video ({_line(error)}); copy or download it again") from error


FORMATS = (
    Format("lerobot_v2", "LeRobot v2.x folder (meta/info.json, parquet and video an episode)",
           lambda path: _matches("v2", path), read),
    Format("lerobot_v3", "LeRobot v3 folder (meta/info.json, meta/episodes/*.parquet)",
           lambda path: _matches("v3", path), read, write),
)  # fmt: skip
