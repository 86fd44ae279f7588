"""DEIS (Zhang and Chen 2023), multistep in its form "log-rho": the noise is a polynomial in log(sigma / alpha).

    x_t = (alpha_t / alpha_s) x_s + alpha_t sum_j C_j e_j,     C_j = int_{rho_s}^{rho_t} l_j(log rho) d rho,     rho = sigma / alpha

(eqs. 13-15), with l_j the Lagrange polynomials through the last one, two or three levels. deis_1 is DDIM.
"""

from __future__ import annotations

from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers._adams import adams
from diffusion.tableau import Row


def deis_1(schedule: NoiseSchedule, levels: Tensor) -> list[Row]:
    """First order."""
    return adams(schedule, levels, 1, noise=True)


def deis_2(schedule: NoiseSchedule, levels: Tensor) -> list[Row]:
    """Second order."""
    return adams(schedule, levels, 2, noise=True)


def deis_3(schedule: NoiseSchedule, levels: Tensor) -> list[Row]:
    """Third order."""
    return adams(schedule, levels, 3, noise=True)
