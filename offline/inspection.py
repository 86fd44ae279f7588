"""What a data set holds, and what is wrong or suspicious in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offline.formats import read
from offline.store import CORE_COLUMNS, TrajectoryStore, blocks
from pilotwave.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_SHOWN = 40  # features of a column listed one by one on the screen; the JSON has all
_MOST = 200_000  # rows looked at where a sample is enough (quantiles)


@dataclass
class Feature:
    """One number of a column: its range and moments over finite values, in the data's units."""

    name: str
    min: float
    max: float
    mean: float
    std: float
    constant: bool
    not_finite: int


@dataclass
class Column:
    """A column: shape of one step, type, and its features; a camera has one feature, its pixels (sampled)."""

    shape: list[int]
    dtype: str
    features: list[Feature]


@dataclass
class Report:
    """What `inspect` found. `problems` forbid training; `notes` are worth a look. Prints with rich."""

    path: str
    format: str
    episodes: int
    steps: int
    lengths: dict[str, float]  # min, mean, max
    dt: float | None
    seconds: float | None
    bytes: int
    cameras: list[str]
    columns: dict[str, Column] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what is not finite is null."""
        return _plain(asdict(self))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        yield Text(self.path, "bold")
        time = f"{self.dt:.4g} s a step, {_duration(self.seconds or 0.0)}" if self.dt else "step time unknown"
        span = "{min:.0f} to {max:.0f}, mean {mean:.1f}".format(**self.lengths)
        yield Text(f"{self.format}: {self.episodes} episodes ({span}), {self.steps} steps, {time}")
        if self.cameras:
            yield Text(f"cameras: {', '.join(self.cameras)}")

        def grid(*heads: str) -> Table:
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
            for i, head in enumerate(heads):
                table.add_column(head, justify="left" if i == 0 else "right", overflow="fold")
            return table

        overview = grid("column", "a step", "type", "min", "max", "mean", "std", "constant", "not finite")
        for name, column in self.columns.items():
            overview.add_row(name, "x".join(map(str, column.shape)) or "1", column.dtype, *_summary(column.features))
        yield overview
        for name in ("observation", "action"):
            features = self.columns[name].features if name in self.columns else []
            if len(features) < 2:
                continue
            table = grid(name, "min", "max", "mean", "std")
            for f in features[:_SHOWN]:
                values = [f"{v:.4g}" for v in (f.min, f.max, f.mean, f.std)]
                table.add_row(f.name, *values, style="dim" if f.constant else "")
            if len(features) > _SHOWN:
                table.add_row(f"... and {len(features) - _SHOWN} more")
            yield table
        for label, style, found in (("problem", "bold red", self.problems), ("note", "yellow", self.notes)):
            for line in found:
                yield Text.assemble((f"{label}: ", style), line)
        if not self.problems:
            yield Text("no problems found" if not self.notes else "no problems found beside the notes", "green")


def _summary(features: Sequence[Feature]) -> list[str]:
    values = (
        min(f.min for f in features),
        max(f.max for f in features),
        float(np.mean([f.mean for f in features])),
        float(np.sqrt(np.mean([f.std**2 for f in features]))),
    )
    constant, missing = sum(f.constant for f in features), sum(f.not_finite for f in features)
    return [*(f"{v:.4g}" for v in values), str(constant or "-"), str(missing or "-")]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def inspect(
    path: str | Path,
    *,
    format: str | None = None,
    observation_keys: Sequence[str] | None = None,
    images: bool | Sequence[str] = False,
    action_low: Sequence[float] | None = None,
    action_high: Sequence[float] | None = None,
) -> Report:
    """Reads the data at `path` and reports on it; with a task's action limits, also on actions beyond them.

    Raises UserError when it cannot be read at all; what can be read but not trained on is in the report's problems.
    """
    store = read(path, format=format, observation_keys=observation_keys, images=images, validate=False)
    report = describe(store)
    if action_low is not None and action_high is not None and not report.problems:
        report.notes += _beyond(store, np.asarray(action_low), np.asarray(action_high))
    return report


def describe(store: TrajectoryStore) -> Report:
    """The report on a store already read."""
    lengths = store.lengths if store.episodes else np.zeros(1)
    report = Report(
        path=store.source,
        format=str(store.metadata.get("format", "in memory")),
        episodes=store.episodes,
        steps=store.steps,
        lengths={"min": float(lengths.min()), "mean": float(lengths.mean()), "max": float(lengths.max())},
        dt=store.dt,
        seconds=store.steps * store.dt if store.dt else None,
        bytes=store.nbytes,
        cameras=list(store.metadata.get("cameras", [])),
        columns={name: _column(name, values, store.names.get(name)) for name, values in store.columns.items()},
    )
    try:
        store.validate()
    except UserError as error:
        report.problems.append(str(error).removeprefix(f"{store.source}: "))
    whole = store.episodes and lengths.min() > 0 and all(len(c) == store.steps for c in store.columns.values())
    if whole:  # the checks go by episode and row, which must be there
        for check in CHECKS:
            report.notes += list(check(store, report))
    return report


def _column(name: str, values: np.ndarray, names: Sequence[str] | None) -> Column:
    shape = list(values.shape[1:])
    if values.ndim == 4:
        values = values[:: max(1, len(values) // 200)].reshape(-1, 1)
    width = int(np.prod(values.shape[1:]))
    low, high = np.full(width, np.inf), np.full(width, -np.inf)
    total, square = np.zeros(width), np.zeros(width)
    count, missing = np.zeros(width, np.int64), np.zeros(width, np.int64)
    shift: Any = None
    for _, part in blocks(values):
        block = np.asarray(part, np.float64).reshape(len(part), width)
        finite = np.isfinite(block)
        kept = np.where(finite, block, np.nan)
        if shift is None and finite.any():
            shift = np.nan_to_num(kept[np.argmax(finite.any(axis=1))])
        low = np.fmin(low, np.where(finite, block, np.inf).min(axis=0))
        high = np.fmax(high, np.where(finite, block, -np.inf).max(axis=0))
        centred = np.where(finite, block - (0.0 if shift is None else shift), 0.0)
        total, square = total + centred.sum(axis=0), square + np.square(centred).sum(axis=0)
        count, missing = count + finite.sum(axis=0), missing + (~finite).sum(axis=0)
    some = np.maximum(count, 1)
    mean = total / some
    std = np.sqrt(np.maximum(square / some - np.square(mean), 0.0))
    mean = np.where(count > 0, mean + (0.0 if shift is None else shift), np.nan)
    low, high = np.where(count > 0, low, np.nan), np.where(count > 0, high, np.nan)
    labels = list(names) if names and len(names) == width else [name if width == 1 else str(i) for i in range(width)]
    constant = (low == high) & (count > 1)
    rows = zip(labels, low.tolist(), high.tolist(), mean.tolist(), std.tolist(), constant.tolist(), missing.tolist())
    features = [Feature(*row) for row in rows]
    return Column(shape, str(values.dtype), features)


# ---- what is suspicious: one function a question, each yields lines ----


def _numbers(store: TrajectoryStore) -> dict[str, np.ndarray]:
    """Columns of floating vectors, as (N, F)."""
    return {
        name: column.reshape(len(column), -1)
        for name, column in store.columns.items()
        if column.dtype.kind == "f" and column.ndim <= 3
    }


def _inside(store: TrajectoryStore) -> np.ndarray:
    """(N - 1,) True where rows i and i + 1 are of one episode."""
    inside = np.ones(max(store.steps - 1, 0), bool)
    inside[store.episode_ends[:-1] - 1] = False
    return inside


def _at(store: TrajectoryStore, row: int) -> str:
    episode = int(np.searchsorted(store.episode_ends, row, side="right"))
    return f"episode {episode}, step {row - int(store.starts[episode])}"


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:6]) + (f" and {len(labels) - 6} more" if len(labels) > 6 else "")


def _incomplete(store: TrajectoryStore, report: Report) -> Iterator[str]:
    for name in ("observation", "action"):
        if name not in store.columns:
            yield f"no '{name}' column: only what needs none can be trained"
    if store.dt is None:
        yield "the time a step takes is not recorded: give the task, or dt"
    if store.metadata.get("ends_marked") is False:
        yield "no end is marked at the last step: the last episode may be cut short"
    if skipped := store.metadata.get("not_read"):
        yield f"not read, as they do not go by step: {_listed(skipped)}"


def _not_finite(store: TrajectoryStore, report: Report) -> Iterator[str]:
    for name, column in report.columns.items():
        count = sum(f.not_finite for f in column.features)
        if count and name not in CORE_COLUMNS:
            yield f"'{name}' holds {count} values that are NaN or infinite"


def _constant(store: TrajectoryStore, report: Report) -> Iterator[str]:
    for name, column in report.columns.items():
        labels = [f.name for f in column.features if f.constant]
        if labels and name != "terminal":
            which = "" if len(column.features) == 1 else f" in {len(labels)} features: {_listed(labels)}"
            yield f"'{name}' never changes{which}"


def _lengths(store: TrajectoryStore, report: Report) -> Iterator[str]:
    lengths, median = store.lengths, float(np.median(store.lengths))
    for label, odd in (("short", lengths < median / 10), ("long", lengths > 10 * median)):
        if odd.any():
            i = int(np.argmax(odd))
            yield f"{int(odd.sum())} very {label} episodes, as {i} with {lengths[i]} steps (median {median:.0f})"


def _still(store: TrajectoryStore, report: Report) -> Iterator[str]:
    for name in ("observation", "action"):
        if name not in store.columns:
            continue
        column = store.columns[name]
        still = [
            i
            for i, (a, b) in enumerate(zip(store.starts.tolist(), store.episode_ends.tolist()))
            if b - a > 1 and np.array_equal(column[a + 1 : b], column[a : b - 1])
        ]
        if still:
            yield f"'{name}' stands still through {len(still)} whole episodes, as episode {still[0]}"


def _repeated(store: TrajectoryStore, report: Report) -> Iterator[str]:
    seen: dict[bytes, int] = {}
    pairs = []
    names = [name for name in ("observation", "action") if name in store.columns]
    for i, (a, b) in enumerate(zip(store.starts.tolist(), store.episode_ends.tolist())):
        digest = hashlib.sha256()
        for name in names:
            digest.update(np.ascontiguousarray(store.columns[name][a:b]).tobytes())
        first = seen.setdefault(digest.digest(), i)
        if first != i:
            pairs.append((first, i))
    if pairs and names:
        a, b = pairs[0]
        yield f"{len(pairs)} episodes repeat another, as {b} repeats {a}: held-out episodes may be in the training set"


def _outliers(store: TrajectoryStore, report: Report) -> Iterator[str]:
    if store.steps < 1000:
        return
    for name, values in _numbers(store).items():
        sample = values[:: max(1, len(values) // _MOST)]
        with np.errstate(invalid="ignore"):
            low, high = np.nanquantile(sample, [0.001, 0.999], axis=0)
        margin = 10 * (high - low)
        found = [
            i
            for i, f in enumerate(report.columns[name].features)
            if margin[i] > 0 and (f.max > high[i] + margin[i] or f.min < low[i] - margin[i])
        ]
        if found:
            i = found[0]
            row = int(np.nanargmax(np.abs(values[:, i] - (low[i] + high[i]) / 2)))
            label = report.columns[name].features[i].name
            yield (
                f"'{name}' has far outliers in {len(found)} features, as {label} = {values[row, i]:.4g} at "
                f"{_at(store, row)} (99.8 % lie within {low[i]:.4g} to {high[i]:.4g}): they would stretch 'limits'"
            )


def _unit_actions(store: TrajectoryStore, report: Report) -> Iterator[str]:
    """Actions made for -1..1 that pass it."""
    if "action" not in store.columns or store.columns["action"].dtype.kind != "f":
        return
    size = np.abs(store.columns["action"])
    outside = float(np.mean(size > 1.0))
    if 0 < outside < 0.1 and float(np.nanmax(size)) > 1.001:
        yield (
            f"{outside:.2%} of the actions lie beyond -1 to 1 (to {float(np.nanmax(size)):.4g}): if these are the "
            "task's limits, the simulator clips them"
        )


def _beyond(store: TrajectoryStore, low: np.ndarray, high: np.ndarray) -> Iterator[str]:
    """Actions beyond a task's limits; far beyond is a mix-up of units."""
    action = store.columns.get("action")
    if action is None or action.shape[1:] != low.shape:
        yield f"actions have shape {None if action is None else action.shape[1:]}, the task's {low.shape}"
        return
    middle, half = (low + high) / 2, (high - low) / 2
    reach = np.max(np.abs(action - middle) / np.where(half > 0, half, 1.0), axis=0)
    if reach.max() > 3:
        i = int(reach.argmax())
        yield f"action {i} reaches {reach[i]:.3g} times the task's limits {low[i]:.4g} to {high[i]:.4g}: other units?"
    elif reach.max() > 1.001:
        yield f"actions reach {reach.max():.3g} times the task's limits: the simulator clips them"


_ANGULAR = ("angle", "joint", "roll", "pitch", "yaw", "theta", "shoulder", "elbow", "wrist", "knee", "hip", "ankle")


def _degrees(store: TrajectoryStore, report: Report) -> Iterator[str]:
    """Features named like angles whose numbers are degrees, and angles that differ between columns by 57.3."""
    ranges: dict[str, dict[str, float]] = {}
    for name in ("observation", "action"):
        if name in report.columns and store.names.get(name):
            features = [f for f in report.columns[name].features if any(a in f.name.lower() for a in _ANGULAR)]
            ranges[name] = {f.name: f.std for f in features if f.std > 0}
            degrees = [f.name for f in features if max(abs(f.min), abs(f.max)) > 4 * np.pi]
            if degrees:
                yield f"'{name}' seems to hold degrees ({_listed(degrees)}): use one unit everywhere"
    shared = set(ranges.get("observation", {})) & set(ranges.get("action", {}))
    ratios = {n: ranges["action"][n] / ranges["observation"][n] for n in sorted(shared)}
    mixed = [n for n, r in ratios.items() if 45 < max(r, 1 / r) < 72]  # 180 / pi = 57.3
    if mixed:
        yield f"observation and action seem to differ in degrees and radians: {_listed(mixed)}"


def _angles(store: TrajectoryStore, report: Report) -> Iterator[str]:
    """Angles that wrap around: jumps by one turn within an episode."""
    inside = _inside(store)
    for name, values in _numbers(store).items():
        features = report.columns[name].features
        wrapped = []
        for i, f in enumerate(features):
            turn = next((t for t in (2 * np.pi, 360.0) if 0.8 * t < f.max - f.min <= 1.02 * t), None)
            if turn and np.any(np.abs(np.abs(np.diff(values[:, i])[inside]) - turn) < 0.05 * turn):
                wrapped.append(f"{i} ({f.name})" if f.name != str(i) else str(i))
        if wrapped:
            yield f"'{name}' has angles that wrap around: {_listed(wrapped)}; name them as angles to the normalizer"


def _unit_fours(values: np.ndarray) -> list[int]:
    """First columns of four neighbours that have unit norm, vary, and are no one-hot code."""
    sample = np.asarray(values[:: max(1, len(values) // _MOST)], np.float64)
    starts: list[int] = []
    for i in range(sample.shape[1] - 3):
        q = sample[:, i : i + 4]
        unit = np.all(np.abs(np.linalg.norm(q, axis=1) - 1) < 1e-3)
        varied = np.ptp(q, axis=0).max() > 1e-3 and not np.all((q == 0) | (q == 1))
        if unit and varied and (not starts or i >= starts[-1] + 4):
            starts.append(i)
    return starts


def _quaternions(store: TrajectoryStore, report: Report) -> Iterator[str]:
    inside = _inside(store)
    for name, values in _numbers(store).items():
        for i in _unit_fours(values):
            q = np.asarray(values[:, i : i + 4], np.float64)
            flips = int(np.sum((np.sum(q[1:] * q[:-1], axis=1) < 0) & inside))
            signs = f", its sign flips {flips} times within episodes" if flips else ""
            yield f"'{name}' features {i} to {i + 3} are a quaternion{signs}; name it to the normalizer"


def _jumps(store: TrajectoryStore, report: Report) -> Iterator[str]:
    """Places where most of the observation jumps at once: a missing episode end."""
    values = _numbers(store).get("observation")
    if values is None or store.steps < 100:
        return
    values = np.delete(values, [c for i in _unit_fours(values) for c in range(i, i + 4)], axis=1)
    if values.shape[1] < 2:
        return
    change = np.abs(np.diff(values, axis=0))
    usual = np.quantile(change[:: max(1, len(change) // _MOST)], 0.99, axis=0)
    far = (change > 20 * usual) & (usual > 0)
    rows = np.flatnonzero((far.sum(axis=1) > max(1, 0.5 * int((usual > 0).sum()))) & _inside(store))
    if len(rows):
        where = _at(store, int(rows[0]))
        yield f"the observation jumps at {len(rows)} places, as after {where}: an unmarked episode end?"


def _timestamps(store: TrajectoryStore, report: Report) -> Iterator[str]:
    stamps = store.columns.get("timestamp")
    if stamps is None or store.dt is None or store.steps < 2:
        return
    gaps = np.diff(np.asarray(stamps, np.float64).reshape(-1))
    inside = _inside(store)
    odd = (np.abs(gaps - store.dt) > 0.2 * store.dt) & inside
    if odd.any():
        row = int(np.argmax(odd))
        yield f"{int(odd.sum())} uneven time steps, as {gaps[row]:.4g} s after {_at(store, row)} (dt {store.dt:.4g} s)"


CHECKS: tuple[Callable[[TrajectoryStore, Report], Iterator[str]], ...] = (
    _incomplete,
    _not_finite,
    _constant,
    _lengths,
    _still,
    _repeated,
    _outliers,
    _unit_actions,
    _degrees,
    _angles,
    _quaternions,
    _jumps,
    _timestamps,
)
