"""Demonstrations carried out faster or slower: the same motion, sampled at another speed."""

from __future__ import annotations

import numpy as np

from offline.store import TrajectoryStore
from pilotwave.errors import UserError


def retime(store: TrajectoryStore, speed: float) -> TrajectoryStore:
    """Every episode at `speed` times its recorded speed: step i of the result is the record at step i * speed.

    Floating columns are interpolated linearly between recorded steps (an action is held in the record, so a position
    target between two is one too), the others take the nearer step. The control period `dt` stays. It suits robots
    whose actions are positions; commands that are forces do not carry over to another speed. Errors: `UserError` for
    a speed that is not positive.
    """
    if not speed > 0:
        raise UserError(f"speed is {speed}; it must be above 0, with 1 the recorded speed")
    if speed == 1:
        return store
    position: list[np.ndarray] = []
    ends: list[int] = []
    for start, end in zip(store.starts, store.episode_ends, strict=True):
        steps = np.arange(0, end - start - 1 + 1e-9, speed)
        position.append(start + steps)
        ends.append(len(steps) + (ends[-1] if ends else 0))
    where = np.concatenate(position)
    low = np.floor(where).astype(np.int64)
    # an episode's last step has nothing after it
    high = np.minimum(low + 1, np.repeat(store.episode_ends - 1, np.diff([0, *ends])))
    weight = where - low
    columns = {}
    for name, column in store.columns.items():
        if np.issubdtype(column.dtype, np.floating):
            w = weight.reshape(-1, *[1] * (column.ndim - 1)).astype(column.dtype)
            columns[name] = (1 - w) * column[low] + w * column[high]
        else:
            columns[name] = column[np.where(weight < 0.5, low, high)]
    return TrajectoryStore(
        columns, np.asarray(ends, np.int64), store.names, store.dt, store.source, {**store.metadata, "speed": speed}
    )
