"""A sampler is a table of numbers (idea 4), and one executor runs every table.

A row of a `Tableau`, with x the state, d_1, d_2, ... the earlier predictions (newest first) and z fresh noise:

    y = P_x x + sum_j P_j d_j + P_z z        where to evaluate
    d = D(y, t)                              one network evaluation (a row may have none)
    x = U_x x + sum_j U_j d_j + U_d d + U_z z

A coefficient is a Python float, or a tensor over the tokens (horizon, features) when levels differ by token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Coefficient = float | Tensor
Denoise = Callable[[Tensor, Tensor], Tensor]
Guide = Callable[[Tensor, Tensor, Tensor], Tensor]
Constrain = Callable[[Tensor, Tensor], Tensor]
Select = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One row; `t` is the level evaluated at, `t_next` that of the state it leaves. `P is None`: y = x."""

    t: Tensor
    t_next: Tensor
    U_x: Coefficient
    U_d: Coefficient = 0.0
    U: Sequence[Coefficient] = ()
    U_z: Coefficient = 0.0
    P: tuple[Coefficient, Sequence[Coefficient], Coefficient] | None = None
    evaluate: bool = True


@dataclass(frozen=True)
class Tableau:
    """The rows of a sampler, in order, and how many earlier predictions they look back on."""

    name: str
    rows: tuple[Row, ...]
    order: int = 1
    evaluations: int = field(init=False)
    memory: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "evaluations", sum(row.evaluate for row in self.rows))
        reach = (max(len(row.U), len(row.P[1]) if row.P else 0) for row in self.rows)
        object.__setattr__(self, "memory", max(reach, default=0))

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tableau:
        """The same table with its tensors on a device, in the precision of the samples. Floats stay floats."""

        def move(c: Coefficient) -> Coefficient:
            return c.to(device, dtype) if isinstance(c, Tensor) else c

        rows = tuple(
            Row(
                row.t.to(device, dtype),
                row.t_next.to(device, dtype),
                move(row.U_x),
                move(row.U_d),
                tuple(move(c) for c in row.U),
                move(row.U_z),
                row.P and (move(row.P[0]), tuple(move(c) for c in row.P[1]), move(row.P[2])),
                row.evaluate,
            )
            for row in self.rows
        )
        return Tableau(self.name, rows, self.order)


def _is_zero(c: Coefficient) -> bool:
    return isinstance(c, float) and c == 0.0


def _combine(
    x: Tensor, c_x: Coefficient, history: Sequence[Tensor], c: Sequence[Coefficient], c_z: Coefficient,
    generator: torch.Generator | None,
) -> Tensor:  # fmt: skip
    """c_x x + sum_j c_j d_j + c_z z."""
    y = x * c_x
    for d_j, c_j in zip(history, c, strict=False):
        if not _is_zero(c_j):
            y = y + c_j * d_j if isinstance(c_j, Tensor) else torch.add(y, d_j, alpha=c_j)
    if not _is_zero(c_z):
        z = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
        y = y + c_z * z
    return y


def sample(
    denoise: Denoise,
    table: Tableau,
    x_T: Tensor,
    generator: torch.Generator | None = None,
    guide: Guide | None = None,
    constrain: Constrain | None = None,
    select: Select | None = None,
) -> Tensor:
    """Run a table from x_T (already scaled by sigma(1)) and return the clean sample, of x_T's shape.

    denoise(x, t) -> predicted clean x, t broadcasting against x's leading axes; guide(d, y, t) -> changed prediction;
    constrain(x, t) -> changed state, after every update and so after the last; select(x, d, t) -> indices (B,) of the
    batch members that go on, drawn after each evaluation. No gradients are recorded unless the caller's mode does.
    """
    table = table.to(x_T.device, x_T.dtype)
    x, history = x_T, []  # type: Tensor, list[Tensor]
    for row in table.rows:
        y = x if row.P is None else _combine(x, row.P[0], history, row.P[1], row.P[2], generator)
        if row.evaluate:
            d = denoise(y, row.t)
            if guide is not None:
                d = guide(d, y, row.t)
            if select is not None:
                keep = select(x, d, row.t)
                x, d, history = x[keep], d[keep], [h[keep] for h in history]
            x = _combine(x, row.U_x, [d, *history], [row.U_d, *row.U], row.U_z, generator)
            history = [d, *history][: table.memory]
        else:
            x = _combine(x, row.U_x, history, row.U, row.U_z, generator)
        if constrain is not None:
            x = constrain(x, row.t_next)
    return x
