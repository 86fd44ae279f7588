"""Windows of a fixed number of tokens, gathered by index on the device: no per-item loader, no workers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from offline.store import TrajectoryStore, is_mapped
from pilotwave.errors import UserError, nearest


class Windows:
    """All windows of `horizon` tokens, `stride` steps apart, each inside one episode.

    A window may start up to `pad_before` tokens before the episode's first step and run up to `pad_after` tokens past
    its last one. Such tokens repeat the border step and are marked False in "valid". A window always holds at least
    one real step.

    columns: name -> (N, ...) tensor on the device; replace one to normalize it once, before training. A memory-mapped
    column stays on the CPU and only what is gathered travels to the device.

    Raises UserError for impossible numbers, unknown columns, NaN in a chosen column, and when no window fits.
    """

    def __init__(
        self,
        store: TrajectoryStore,
        horizon: int,
        *,
        columns: Sequence[str] = ("observation", "action"),
        stride: int = 1,
        pad_before: int = 0,
        pad_after: int = 0,
        device: str | torch.device = "cpu",
    ):
        if horizon < 1 or stride < 1:
            raise UserError(f"horizon {horizon} and stride {stride} must be at least 1")
        if not (0 <= pad_before < horizon and 0 <= pad_after < horizon):
            raise UserError(f"paddings {pad_before} and {pad_after} must be 0 to horizon - 1 = {horizon - 1}")
        for name in columns:
            if name not in store.columns:
                raise nearest("column", name, store.columns)
        store.check_finite(columns)
        self.horizon, self.stride, self.device = horizon, stride, torch.device(device)

        lengths = store.lengths
        earliest = -pad_before * stride
        latest = lengths - 1 + (pad_after - (horizon - 1)) * stride  # last start, relative to the episode's first step
        counts = np.maximum(latest - earliest + 1, 0)
        episode = np.repeat(np.arange(store.episodes), counts)
        start = np.arange(len(episode)) - np.repeat(np.cumsum(counts) - counts, counts) + earliest
        # With a stride longer than the episode all tokens can fall on padding: first token at or after step 0 decides.
        first_inside = np.where(start < 0, start % stride, start)
        kept = first_inside < lengths[episode]
        episode, start = episode[kept], start[kept]
        if len(episode) == 0:
            need = (horizon - 1 - pad_before - pad_after) * stride + 1
            raise UserError(
                f"no window fits: {horizon} tokens of stride {stride} need {max(need, 1)} steps, the longest of "
                f"{store.episodes} episodes has {int(lengths.max())}; shorten the horizon or stride, or allow padding"
            )
        self.episode = torch.from_numpy(episode).to(self.device)  # (W,) the episode of each window
        self.first = torch.from_numpy(start + store.starts[episode]).to(self.device)  # (W,) row of the first token
        self.starts = torch.from_numpy(store.starts).to(self.device)
        self.ends = torch.from_numpy(store.episode_ends).to(self.device)
        self._offsets = torch.arange(horizon, device=self.device) * stride
        self.columns: dict[str, Tensor] = {name: self._tensor(store.columns[name]) for name in columns}

    def _tensor(self, column: np.ndarray) -> Tensor:
        with warnings.catch_warnings():  # read-only arrays: nothing here writes to them
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch.from_numpy(np.asarray(column))
        if is_mapped(column):
            return tensor
        return (tensor.float() if tensor.dtype == torch.float64 else tensor).to(self.device)

    def __len__(self) -> int:
        return len(self.first)

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the store (B, horizon) and which of them are real (B, horizon), for windows `index` (B,)."""
        index = index.to(self.device)
        episode = self.episode[index]
        low, high = self.starts[episode, None], self.ends[episode, None] - 1
        rows = self.first[index, None] + self._offsets
        return torch.minimum(torch.maximum(rows, low), high), (rows >= low) & (rows <= high)

    def gather(self, index: Tensor) -> dict[str, Tensor]:
        """Windows `index` (B,): every column as (B, horizon, ...), and "valid" (B, horizon), False on padding."""
        rows, valid = self.rows(index)
        flat, out = rows.reshape(-1), {}
        for name, column in self.columns.items():
            picked = column.index_select(0, flat.to(column.device)).to(self.device)
            picked = picked.float() if picked.dtype == torch.float64 else picked
            out[name] = picked.unflatten(0, rows.shape)
        return {**out, "valid": valid}

    def sample(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`batch` windows drawn uniformly, with replacement, by `generator`; as `gather`."""
        return self.gather(torch.randint(len(self), (batch,), generator=generator, device=generator.device))
