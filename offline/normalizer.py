"""Per-feature normalization, kept in buffers so that it is saved, loaded and exported with the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offline.store import blocks
from pilotwave.errors import UserError, nearest

Mode = str | Mapping[str, Any]
_TINY = 1e-6  # spread below this share of the magnitude is rounding, not information


def _limits(low: np.ndarray, high: np.ndarray, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (low + high) / 2, (high - low) / 2


def _gaussian(low: np.ndarray, high: np.ndarray, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return mean, std


def _none(low: np.ndarray, high: np.ndarray, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros_like(mean), np.ones_like(std)


MODES = {"limits": _limits, "gaussian": _gaussian, "none": _none}  # name -> (offset, scale) from the statistics


class _Group(nn.Module):
    """One group of `features` columns: y = (x - offset) / scale, after angles and quaternions are encoded.

    Encoded width: features + number of angles. An angle's column holds its cosine; the sines follow at the end.
    """

    offset: Tensor
    scale: Tensor
    inverse: Tensor
    angle: Tensor
    quaternion: Tensor
    reference: Tensor

    def __init__(self, features: int, mode: Mode = "limits"):
        super().__init__()
        self.features = features
        self.register_buffer("offset", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("inverse", torch.ones(features))  # 0 for a constant column
        self.register_buffer("angle", torch.zeros(features, dtype=torch.bool))
        self.register_buffer("quaternion", torch.full((features,), -1, dtype=torch.int64))  # which quaternion, or -1
        self.register_buffer("reference", torch.zeros(features))  # mean quaternion; q and -q go to its hemisphere
        options: dict[str, Any] = {"mode": mode} if isinstance(mode, str) else dict(mode)
        self.mode = options.pop("mode", "limits")
        if self.mode not in MODES:
            raise nearest("normalization", str(self.mode), MODES)
        angles, quaternions = options.pop("angles", ()), options.pop("quaternions", ())
        if options:
            raise nearest("normalizer option", next(iter(options)), ("mode", "angles", "quaternions"))
        self._declare(angles, quaternions)

    def _declare(self, angles: Sequence[int], quaternions: Sequence[Sequence[int]]) -> None:
        used = [*angles, *(c for q in quaternions for c in q)]
        if any(not 0 <= c < self.features for c in used) or len(set(used)) != len(used):
            raise UserError(f"angle and quaternion columns {used} must be distinct and below {self.features}")
        if any(len(q) != 4 for q in quaternions):
            raise UserError(f"a quaternion needs 4 columns; got {[list(q) for q in quaternions]}")
        self.angle[list(angles)] = True
        for i, columns in enumerate(quaternions):
            self.quaternion[list(columns)] = i
            self.reference[list(columns)] = 0.5
        self._refresh()

    def _refresh(self) -> None:
        """The structure as plain Python lists, so that an exported graph has no branches on data."""
        self.angles: list[int] = torch.nonzero(self.angle).flatten().tolist()
        ids = self.quaternion.tolist()
        self.quaternions = [[c for c, q in enumerate(ids) if q == i] for i in range(max(ids, default=-1) + 1)]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh()

    @property
    def width(self) -> int:
        return self.features + len(self.angles)

    def fit(self, name: str, data: np.ndarray) -> None:
        """Sets the buffers from `data` (N, features)."""
        special = self.angle.numpy() | (self.quaternion.numpy() >= 0)
        low, high, mean, std = statistics(name, data)
        offset, scale = MODES[self.mode](low, high, mean, std)
        constant = (high - low) <= np.maximum(_TINY * np.maximum(np.abs(low), np.abs(high)), 1e-12)
        if self.mode != "none":
            offset, scale = np.where(constant, low, offset), np.where(constant, 0.0, scale)
        offset, scale = np.where(special, 0.0, offset), np.where(special, 1.0, scale)
        for columns in self.quaternions:
            moment = np.zeros((4, 4))
            for _, part in blocks(data):
                q = np.asarray(part[:, columns], np.float64)
                moment += q.T @ q
            # The mean that ignores signs: Markley et al., "Averaging Quaternions", JGCD 2007, eq. 12-13.
            mean_q = np.linalg.eigh(moment)[1][:, -1]
            self.reference[columns] = torch.from_numpy(mean_q * np.sign(mean_q[np.argmax(np.abs(mean_q))])).float()
        self.offset.copy_(torch.from_numpy(offset))
        self.scale.copy_(torch.from_numpy(scale))
        self.inverse.copy_(torch.from_numpy(np.divide(1.0, scale, out=np.zeros_like(scale), where=scale != 0)))

    def encode(self, x: Tensor) -> Tensor:
        y = (x - self.offset) * self.inverse
        if not self.angles and not self.quaternions:
            return y
        parts = list(y.unbind(-1))
        for columns in self.quaternions:
            q = x[..., columns]
            q = q / q.norm(dim=-1, keepdim=True).clamp_min(1e-8)
            side = (q * self.reference[columns]).sum(-1, keepdim=True)
            q = torch.where(side < 0, -q, q)
            for i, c in enumerate(columns):
                parts[c] = q[..., i]
        for c in self.angles:
            parts[c] = torch.cos(x[..., c])
            parts.append(torch.sin(x[..., c]))
        return torch.stack(parts, dim=-1)

    def decode(self, y: Tensor) -> Tensor:
        x = y[..., : self.features] * self.scale + self.offset
        if not self.angles and not self.quaternions:
            return x
        parts = list(x.unbind(-1))
        for columns in self.quaternions:
            q = y[..., columns]
            q = q / q.norm(dim=-1, keepdim=True).clamp_min(1e-8)
            for i, c in enumerate(columns):
                parts[c] = q[..., i]
        for i, c in enumerate(self.angles):
            parts[c] = torch.atan2(y[..., self.features + i], y[..., c])
        return torch.stack(parts, dim=-1)


class Normalizer(nn.Module):
    """Maps each group of features to what a network likes, and back.

    Modes a group: "limits" (the data's range to [-1, 1]), "gaussian" (mean 0, standard deviation 1), "none"; or a
    mapping {"mode": ..., "angles": [columns], "quaternions": [[four columns], ...]}. An angle in radians becomes its
    cosine and sine (one more feature, at the end) and comes back in (-pi, pi]; a quaternion is brought to unit norm
    and to the mean's hemisphere (q and -q are one rotation), and comes back with unit norm. A constant column goes to
    0 and comes back exact. All state is in buffers.
    """

    def __init__(self, groups: Mapping[str, int], modes: Mapping[str, Mode] | Mode = "limits"):
        super().__init__()
        single = isinstance(modes, str) or "mode" in modes
        if not single:
            for name in modes:
                if name not in groups:
                    raise nearest("normalizer group", str(name), groups)
        self.groups = nn.ModuleDict()
        for name, features in groups.items():
            mode = modes if single else modes.get(name, "limits")  # type: ignore[union-attr]
            self.groups[_key(name)] = _Group(features, mode)  # type: ignore[arg-type]

    @classmethod
    def from_shapes(cls, groups: Mapping[str, int], modes: Mapping[str, Mode] | Mode = "limits") -> Normalizer:
        """An identity of the right shapes (name -> features), to be filled by `load_state_dict`."""
        return cls(groups, modes)

    @classmethod
    def fit(cls, data: Mapping[str, np.ndarray | Tensor], modes: Mapping[str, Mode] | Mode = "limits") -> Normalizer:
        """The normalizer of `data`: name -> (..., F). Raises UserError on NaN or empty data."""
        flat = {name: _rows(values) for name, values in data.items()}
        normalizer = cls({name: rows.shape[1] for name, rows in flat.items()}, modes)
        for name, rows in flat.items():
            normalizer.group(name).fit(name, rows)
        return normalizer

    def group(self, name: str) -> _Group:
        """The group's module: offset, scale (F,), angles, quaternions."""
        if _key(name) not in self.groups:
            raise nearest("normalizer group", name, self.groups)
        return self.groups[_key(name)]  # type: ignore[return-value]

    def width(self, group: str) -> int:
        """Features after normalization: F plus one for every angle."""
        return self.group(group).width

    def normalize(self, group: str, x: Tensor) -> Tensor:
        """(..., F) in the data's units -> (..., width)."""
        return self.group(group).encode(x)

    def denormalize(self, group: str, x: Tensor) -> Tensor:
        """(..., width) -> (..., F) in the data's units."""
        return self.group(group).decode(x)

    def forward(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every known group of `x` normalized; other entries untouched."""
        return {k: self.normalize(k, v) if _key(k) in self.groups else v for k, v in x.items()}


def _key(name: str) -> str:
    return name.replace(".", "/")  # a module's name cannot hold a dot


def _rows(values: np.ndarray | Tensor) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asanyarray(values)
    return array.reshape(-1, 1) if array.ndim == 1 else array.reshape(-1, array.shape[-1])


def statistics(name: str, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Minimum, maximum, mean and standard deviation (F,) of `data` (N, F), in float64 and in pieces."""
    if len(data) == 0:
        raise UserError(f"no data to normalize '{name}' by; give at least one row")
    low, high, total, square = None, None, 0.0, 0.0
    shift = np.asarray(data[0], np.float64)  # sums around a value of the data keep their digits
    for _, part in blocks(data):
        block = np.asarray(part, np.float64)
        low = block.min(0) if low is None else np.minimum(low, block.min(0))
        high = block.max(0) if high is None else np.maximum(high, block.max(0))
        total, square = total + (block - shift).sum(0), square + np.square(block - shift).sum(0)
    assert low is not None
    assert high is not None
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        bad = int(np.argmax(~(np.isfinite(low) & np.isfinite(high))))
        raise UserError(f"NaN or infinity in '{name}', feature {bad}; a normalizer needs finite data")
    mean = total / len(data)
    std = np.sqrt(np.maximum(square / len(data) - np.square(mean), 0.0))
    return low, high, shift + mean, std
