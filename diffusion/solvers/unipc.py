"""UniPC (Zhao et al. 2023): a predictor through p data predictions and a corrector through p + 1, of order p + 1 together.

    x_t = (sigma_t / sigma_s) x_s + alpha_t (1 - e^-h) d_s + alpha_t B(h) sum_m rho_m (d_m - d_s) / r_m
    r_m = (lambda_m - lambda_s) / h

(eqs. 3 and 8, data prediction). The rho_m solve the order conditions (theorem 3.1); where there is one, rho = 1/2 whatever h, and
B(h) matters: "bh1" is h, "bh2" is 1 - e^-h. The corrector needs the prediction that the next step needs anyway.
"""

from __future__ import annotations

from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._adams import adams
from diffusion.tableau import Row
from pilotwave.errors import nearest


def _unipc(schedule: NoiseSchedule, levels: Tensor, p: int, variant: str) -> list[Row]:
    if variant not in ("bh1", "bh2"):
        raise nearest("unipc variant", variant, ("bh1", "bh2"))
    return adams(schedule, levels, p, p + 1, average=variant)


def unipc_1(schedule: NoiseSchedule, levels: Tensor, variant: str = "bh2") -> list[Row]:
    """Predictor DDIM, corrector through two predictions: order 2."""
    return _unipc(schedule, levels, 1, variant)


def unipc_2(schedule: NoiseSchedule, levels: Tensor, variant: str = "bh2") -> list[Row]:
    """Two predictions and three: order 3."""
    return _unipc(schedule, levels, 2, variant)


def unipc_3(schedule: NoiseSchedule, levels: Tensor, variant: str = "bh2") -> list[Row]:
    """Three predictions and four: order 4."""
    return _unipc(schedule, levels, 3, variant)
