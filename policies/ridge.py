"""Ridge regression from running sums, its penalty chosen by cross-validation (Hastie et al. 2009, section 3.4.1)."""

from __future__ import annotations

import torch
from torch import Tensor

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # a row, on standardized inputs


class Ridge:
    """Linear regression with a penalty, from running sums: the data passes once, whatever its size.

    `add` takes inputs x (B, F), outputs y (B, G) and the fold (B,) of each row; `fit` chooses the penalty of every
    output by cross-validation over the folds.
    """

    def __init__(self, folds: int) -> None:
        self.folds = folds
        self.sums: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, x: Tensor, y: Tensor, fold: Tensor) -> None:
        x, y = x.double(), y.double()
        if not self.sums:
            # about the first batch's mean, or the sums of squares would lose the small differences
            self.x0, self.y0 = x.mean(0), y.mean(0)
            zeros = x.new_zeros
            f, g = x.shape[1] + 1, y.shape[1]
            self.sums = [(zeros(f, f), zeros(f, g), zeros(g)) for _ in range(self.folds)]
        x, y = torch.cat([x - self.x0, torch.ones_like(x[:, :1])], dim=1), y - self.y0
        for k, (xx, xy, yy) in enumerate(self.sums):
            rows = fold == k
            xx += x[rows].T @ x[rows]
            xy += x[rows].T @ y[rows]
            yy += y[rows].square().sum(0)

    def fit(self) -> Ridge:
        total = [torch.stack(parts).sum(0) for parts in zip(*self.sums, strict=True)]
        choice = torch.zeros(len(total[2]), dtype=torch.int64)
        if self.folds > 1:
            errors = torch.zeros(len(PENALTIES), len(total[2]), dtype=torch.float64)
            for xx, xy, yy in self.sums:
                for i, (w, b) in enumerate(self._solutions(total[0] - xx, total[1] - xy)):
                    wb = torch.cat([w, b[None]])
                    errors[i] += yy - 2 * (wb * xy).sum(0) + (wb * (xx @ wb)).sum(0)
            choice = errors.argmin(0)
        solutions = self._solutions(total[0], total[1])
        columns = torch.arange(len(choice))
        self.w = torch.stack([w for w, _ in solutions])[choice, :, columns].T
        self.b = torch.stack([b for _, b in solutions])[choice, columns]
        self.penalty = torch.tensor(PENALTIES)[choice]
        return self

    @staticmethod
    def _solutions(xx: Tensor, xy: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(weights (F, G), offset (G,)) for every penalty, from the sums; the last input is the constant 1."""
        n = xx[-1, -1]
        mean_x, mean_y = xx[-1, :-1] / n, xy[-1] / n
        covariance = xx[:-1, :-1] / n - torch.outer(mean_x, mean_x)
        scale = covariance.diagonal().clamp_min(0).sqrt()
        inverse = torch.where(scale > 1e-9, 1 / scale.clamp_min(1e-9), 0.0)  # a constant input has no say
        values, vectors = torch.linalg.eigh(covariance * inverse * inverse[:, None])
        rotated = vectors.T @ (inverse[:, None] * (xy[:-1] / n - torch.outer(mean_x, mean_y)))
        weights = [inverse[:, None] * (vectors @ (rotated / (values.clamp_min(0) + p)[:, None])) for p in PENALTIES]
        return [(w, mean_y - mean_x @ w) for w in weights]

    def predict(self, x: Tensor) -> Tensor:
        """(B, F) -> (B, G)."""
        return ((x.double() - self.x0) @ self.w + self.b + self.y0).float()
