"""A trajectory is one tensor (batch, horizon, features); a Layout names the slices of its last axis."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pilotwave.errors import UserError


class Layout:
    """Named groups of features, in order: `Layout(observation=4, action=2)`.

    `layout["action"]` is the group's slice, `layout.groups` the names, `layout.features` the total width.
    """

    def __init__(self, **sizes: int) -> None:
        if not sizes or any(size <= 0 for size in sizes.values()):
            raise UserError(f"a layout needs groups of at least one feature; got {sizes}")
        self.sizes = dict(sizes)
        self.groups = tuple(sizes)
        self.features = sum(sizes.values())
        self._slices: dict[str, slice] = {}
        start = 0
        for name, size in sizes.items():
            self._slices[name] = slice(start, start + size)
            start += size
        self.group_of_feature = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(sizes.values())))

    def __getitem__(self, group: str) -> slice:
        return self._slices[group]

    def __contains__(self, group: str) -> bool:
        return group in self._slices

    def __repr__(self) -> str:
        return f"Layout({', '.join(f'{k}={v}' for k, v in self.sizes.items())})"

    def pack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The groups' tensors (..., size of group), concatenated in the layout's order to (..., features)."""
        return torch.cat([parts[name] for name in self.groups], dim=-1)

    def unpack(self, x: Tensor) -> dict[str, Tensor]:
        """The inverse of `pack`: views of x (..., features), one a group."""
        return {name: x[..., s] for name, s in self._slices.items()}

    def levels(self, clean: Tensor) -> Tensor:
        """Group masks or levels (..., groups) spread over the features: (..., features)."""
        return clean.index_select(-1, self.group_of_feature.to(clean.device))
