"""Training-free guidance: TFG (Ye et al. 2024, algorithm 1), a family that holds DPS, LGD, FreeDoM, UGD and MPGD.

f is a positive function of clean data, so that samples should follow p(x_0) f(x_0). With r^2 = sigma^2 / (alpha^2 + sigma^2), the
variance that x_0 keeps given x_t where the data are of unit variance, and f~(x) = E f(x + gamma r delta), delta ~ N(0, I):

    d <- D(x_t) + rho_t (sigma^2 / alpha) grad_{x_t} log f~(D(x_t)) + Delta,
    Delta = 0, then Delta <- Delta + mu_t grad_d log f~(D(x_t) + Delta)      `iterations` times

The paper adds both to the next state; here they change the prediction, which any solver can use. With DDPM and one iteration it is
the same thing: a rho_t proportional to the paper's beta_t is our constant rho, such a mu_t ours proportional to r^2. In these units
rho = 1 weighs f by Bayes' rule. The recurrence is rows of the table: `solver("recurrent", schedule, steps, times=N_recur)`.

All of it is approximate, since log E[f(x_0) | x_t] is not log f~(D(x_t)). It is exact for Gaussian data with log f linear (rho 1),
and for data N(0, I) with any f (rho 1, gamma 1, many draws).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion.guidance._gradient import LogP, gradient, shift
from diffusion.schedule import NoiseSchedule
from diffusion.tableau import Denoise
from pilotwave.errors import UserError, nearest

# how rho_t and mu_t go with the level, from r^2 = sigma^2 / (alpha^2 + sigma^2), as sampling goes on
STRUCTURES: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like,
    "decrease": lambda r2: r2,
    "increase": lambda r2: 1 - r2,
}


@dataclass(frozen=True)
class Settings:
    """Where in the family: strengths rho and mu, `iterations` N_iter, smoothing gamma with so many `draws`, and N_recur."""

    rho: float = 0.0
    mu: float = 0.0
    gamma: float = 0.0
    iterations: int = 1
    draws: int = 4
    recur: int = 1
    rho_structure: str = "constant"
    mu_structure: str = "decrease"

    def __post_init__(self) -> None:
        for structure in (self.rho_structure, self.mu_structure):
            if structure not in STRUCTURES:
                raise nearest("structure of training-free guidance", structure, STRUCTURES)
        if min(self.rho, self.mu, self.gamma) < 0 or min(self.iterations, self.draws, self.recur) < 1:
            raise UserError("training-free guidance wants rho, mu, gamma >= 0 and iterations, draws, recur >= 1")


# Each method's place (Ye et al. 2024). What a method has of rho and mu together weighs f once; `search` finds better.
METHODS: dict[str, Settings] = {
    "dps": Settings(rho=1.0),  # Chung et al. 2023
    "lgd": Settings(rho=1.0, gamma=1.0),  # Song et al. 2023
    "freedom": Settings(rho=1.0, recur=2),  # Yu et al. 2023
    "mpgd": Settings(mu=1.0),  # He et al. 2024
    "ugd": Settings(rho=0.5, mu=0.125, iterations=4, recur=2),  # Bansal et al. 2023
    "tfg": Settings(rho=0.25, mu=0.0625, gamma=0.25, iterations=4),  # where the search begins
}


class TrainingFree:
    """`sample(guide.denoise, table, x_T)`, or as a hook `sample(denoise, table, x_T, guide=guide)`.

    log_f: clean x (B, ...) -> (B,). The hook evaluates the network once more where rho is not 0; `denoise` never does. Draws of
    the smoothing come from the generator.
    """

    def __init__(
        self,
        denoise: Denoise,
        log_f: LogP,
        schedule: NoiseSchedule,
        settings: Settings,
        generator: torch.Generator | None = None,
    ) -> None:
        self._denoise, self.log_f, self.schedule, self.settings, self.generator = denoise, log_f, schedule, settings, generator

    def __call__(self, d: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return self.denoise(y, t) if self.settings.rho else self._on_clean(d, t, self._smoothed(d, t))

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided D(x_t)."""
        if not self.settings.rho:
            return self(self._denoise(x, t), x, t)
        log_f, found = self._smoothed(x, t), []

        def through(x: Tensor) -> Tensor:
            found.append(self._denoise(x, t))
            return log_f(found[0])

        rho = self.settings.rho * STRUCTURES[self.settings.rho_structure](self._r2(t))
        moved = rho * shift(self.schedule, t) * gradient(through, x)
        return self._on_clean(found[0].detach(), t, log_f) + moved

    def _on_clean(self, d: Tensor, t: Tensor, log_f: LogP) -> Tensor:
        """d + Delta."""
        if not self.settings.mu:
            return d
        mu = self.settings.mu * STRUCTURES[self.settings.mu_structure](self._r2(t))
        for _ in range(self.settings.iterations):
            d = d + mu * gradient(log_f, d)
        return d

    def _r2(self, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return sigma**2 / (alpha**2 + sigma**2)

    def _smoothed(self, x: Tensor, t: Tensor) -> LogP:
        """log f~, with the same draws wherever it is evaluated."""
        settings = self.settings
        if not settings.gamma:
            return self.log_f
        spread = settings.gamma * self._r2(t).sqrt()
        draws = [spread * torch.empty_like(x).normal_(generator=self.generator) for _ in range(settings.draws)]
        return lambda d: torch.stack([self.log_f(d + each) for each in draws]).logsumexp(0) - math.log(settings.draws)


def search(
    score: Callable[[Settings], float],
    start: Settings,
    over: Sequence[str] = ("rho", "mu", "gamma"),
    beam: int = 2,
    rounds: int = 6,
    factor: float = 2.0,
) -> list[tuple[float, Settings]]:
    """The best settings found and their scores (higher is better), best first: the beam search of Ye et al. 2024.

    Each round multiplies one of `over` by `factor` in every setting of the beam, scores what is new, and keeps the `beam` best of
    all; it ends when nothing better is found. A strength that starts at 0 stays there, so a search from METHODS["dps"] tunes DPS.
    """
    scores = {start: score(start)}
    kept = [start]
    for _ in range(rounds):
        for settings in kept:
            for name in over:
                other = replace(settings, **{name: factor * getattr(settings, name)})
                if other not in scores:
                    scores[other] = score(other)
        best = sorted(scores, key=lambda settings: -scores[settings])[:beam]
        if best == kept:
            break
        kept = best
    return [(scores[settings], settings) for settings in kept]
