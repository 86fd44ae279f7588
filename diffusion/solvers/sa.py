"""SA-Solver (Xue et al. 2023): stochastic Adams methods, a predictor through s predictions and a corrector through c (algorithm 1).

tau(t) is the stochasticity: 0 the probability-flow ODE, 1 the reverse SDE of DDPM. The corrector keeps the predictor's noise.
With two predictions the mean of lambda is taken as that of a straight line, as in the paper's code.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._adams import adams
from diffusion.tableau import Row
from pilotwave.errors import UserError


def sa(
    schedule: NoiseSchedule,
    levels: Tensor,
    tau: float = 1.0,
    between: Sequence[float] = (0.2, 0.8),
    predictor: int = 2,
    corrector: int = 2,
) -> list[Row]:
    """tau where a step begins at a level in `between`, 0 elsewhere (section 6.1); corrector 0: none."""
    if not 1 <= predictor <= 4 or corrector not in (0, 2, 3, 4):
        raise UserError(f"sa takes a predictor of 1 to 4 predictions and a corrector of 0, 2, 3 or 4; got {predictor}, {corrector}")
    if tau < 0:
        raise UserError(f"sa's tau must not be negative; got {tau}")
    low, high = between
    inside = (levels[:-1] >= low) & (levels[:-1] <= high)
    return adams(schedule, levels, predictor, corrector, tau=tau * inside.double() if tau else None, average="bh1")
