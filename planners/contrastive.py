"""CDiffuser (Shan et al. 2024, "Contrastive Diffuser", arXiv 2402.02772): Diffuser, whose generated states are pulled towards
states of high return and pushed away from states of low return, while it learns.

    p+(s) ~ 1 / (1 + exp(sigma (xi - v(s))))           which recorded states are drawn as positive, v their return in [0, 1]
    p-(s) ~ 1 / (1 + exp(sigma (v(s) - zeta)))         and which as negative
    L_c = - log sum_k exp(sim(f(x), f(s+_k)) / T) / sum_k exp(sim(f(x), f(s-_k)) / T)
    L = L_Diffuser + lambda L_c

x are the states that the denoiser predicts from a noisy trajectory, sim is the cosine, f is learned. Planning is Diffuser's, with
the value network's guidance where rewards are recorded (its loss is the paper's L_v). Here L_c takes `contrast.windows` windows of
a batch, noised anew, and draws from all states of the batch.

Return in [0, 1]: where rewards are recorded, the share of recorded states whose discounted return to go is lower. Where the task
has goals, each window is given one: the place at its arrival token, as in Diffuser's loss. Then v(s | g) = discount^k for a state s
whose window first comes within `contrast.arrive` of g at k tokens later, 0 if it does not; f(s, g) sees the goal. So high-return
states are those from which g was soon reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion import Tableau
from diffusion.networks import FourierFeatures
from offline import Algorithm, DataSpec, Normalizer, Windows, register
from offline.returns import returns_to_go, tokens_until
from pilotwave.errors import UserError
from planners.controller import PlanController, overlaid
from planners.diffuser import Diffuser
from planners.plan import Plan

if TYPE_CHECKING:
    from offline.store import TrajectoryStore


def return_contrast(generated: Tensor, positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """L_c of every generated state: embeddings (B, H, E), (B, K, E), (B, K, E) -> (B, H)."""
    x, *drawn = (nn.functional.normalize(part, dim=-1) for part in (generated, positive, negative))
    pull, push = ((x @ states.transpose(1, 2) / temperature).logsumexp(-1) for states in drawn)
    return push - pull


class Embedding(nn.Module):
    """f: normalized states, and goals where there are any, (..., Do + Dg) -> (..., E)."""

    def __init__(self, inputs: int, width: int, outputs: int = 32, fourier: int = 4) -> None:
        super().__init__()
        self.fourier = FourierFeatures(inputs, fourier)
        self.mlp = nn.Sequential(nn.Linear(self.fourier.output_dim, width), nn.SiLU(), nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.fourier(x)).float()


@register
class ContrastiveDiffuser(Algorithm):
    """Config (configs/planner/contrastive.yaml): Diffuser's, and contrast {weight (lambda), sigma, high (xi), low (zeta),
    drawn (K), temperature (T), windows, width, discount, arrive}, `arrive` in the task's units.
    """

    kind, name = "planner", "contrastive"

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__(spec, config)
        self.diffuser = Diffuser(spec, config)
        self.H, self.stride = self.diffuser.H, self.diffuser.stride
        self.contrast: dict[str, Any] = dict(config["contrast"])
        high, low = self.contrast["high"], self.contrast["low"]
        if not 0 <= low < high <= 1:
            raise UserError(f"planner.contrast.low={low}, high={high}; 0 <= low < high <= 1 is needed, of values scaled to 0 to 1")
        self.embed = Embedding(spec.observation_dim + spec.goal_dim, int(self.contrast["width"]))

    @property
    def normalizer(self) -> Normalizer:
        """The Diffuser's."""
        return self.diffuser.normalizer

    # -- training ------------------------------------------------------------------------------------------------------

    def prepare(self, store: TrajectoryStore) -> None:
        self.diffuser.prepare(store)

    def windows(self, store: TrajectoryStore, device: torch.device | str) -> Windows:
        windows = self.diffuser.windows(store, device)
        if not self.spec.goal_dim:
            returns = returns_to_go(store, float(self.contrast["discount"]))
            lower, upper = (np.searchsorted(np.sort(returns), returns, side) for side in ("left", "right"))
            rank = (lower + upper) / (2 * len(returns))  # of equal returns, the middle
            windows.columns["rank"] = torch.as_tensor(rank, dtype=torch.float32, device=windows.device)
        return windows

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        loss, info = self.diffuser.loss(batch, generator)
        contrast = self.contrast_loss(batch, generator)
        return loss + float(self.contrast["weight"]) * contrast, info | {"contrast_loss": contrast.detach()}

    def contrast_loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """L_c over the states until arrival of the batch's first windows."""
        diffuser, observation = self.diffuser, batch["observation"]
        x_0 = diffuser.pack(batch)[: int(self.contrast["windows"])]
        n, device = len(x_0), x_0.device
        arrival = diffuser.arrivals.train(n, self.H, generator).to(device) if self.spec.goal_dim else None
        clean = diffuser.clean(arrival, n, device)
        t = torch.rand(n, 1, 1, generator=generator, device=device)
        noisy = diffuser.denoiser.schedule.add_noise(x_0, torch.randn(x_0.shape, generator=generator, device=device), t)
        x_t = torch.where(diffuser.layout.levels(clean), x_0, noisy)
        generated = diffuser.denoiser(x_t, t * (~clean).to(t.dtype))[..., : self.spec.observation_dim]

        until = torch.ones(n, self.H, dtype=torch.bool, device=device)
        if arrival is None:
            goal, value = None, batch["rank"].flatten().expand(n, -1)
        else:
            goal = observation[torch.arange(n, device=device), arrival]
            value = self.values(observation, goal).flatten(1)
            goal = goal[:, : self.spec.goal_dim]
            until = torch.arange(self.H, device=device) <= arrival[:, None]
        positive, negative = (observation.flatten(0, 1)[rows] for rows in self.draw(value, generator))
        x, high, low = (self._embedded(states, goal) for states in (generated, positive, negative))
        each = return_contrast(x, high, low, float(self.contrast["temperature"]))
        return (each * until).sum() / until.sum()

    def values(self, observation: Tensor, goal: Tensor) -> Tensor:
        """v(s | g) of the states of windows (B, H, Do) for the places of goal observations (n, Do): (n, B, H)."""
        places, to = (self.normalizer.denormalize("observation", part)[..., : self.spec.goal_dim] for part in (observation, goal))
        near = (places - to[:, None, None]).norm(dim=-1) <= float(self.contrast["arrive"])
        return float(self.contrast["discount"]) ** tokens_until(near)

    def draw(self, value: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Positive and negative states by their values (n, N): two times (n, K) of the N."""
        c, k = self.contrast, int(self.contrast["drawn"])
        p = (torch.sigmoid(c["sigma"] * (value - c["high"])), torch.sigmoid(c["sigma"] * (c["low"] - value)))
        positive, negative = (torch.multinomial(each, k, replacement=True, generator=generator) for each in p)
        return positive, negative

    def _embedded(self, states: Tensor, goal: Tensor | None) -> Tensor:
        """f of states (n, K, Do) for goals (n, Dg)."""
        return self.embed(states if goal is None else torch.cat([states, goal[:, None].expand(-1, states.shape[1], -1)], -1))

    # -- planning ------------------------------------------------------------------------------------------------------

    def table(self, sampler: Mapping[str, Any] | None = None) -> Tableau:
        """The Diffuser's sampler."""
        return self.diffuser.table(sampler)

    def plan(
        self,
        observation: np.ndarray,
        goal: np.ndarray | None = None,
        samples: int = 1,
        *,
        sampler: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> Plan:
        """As Diffuser.plan."""
        return self.diffuser.plan(observation, goal, samples, sampler=sampler, generator=generator)

    def controller(
        self,
        task_spec: Any,
        *,
        sampler: Mapping[str, Any] | None = None,
        replan_every: int | None = None,
        samples: int | None = None,
        track: str | None = None,
        deviation: float | None = None,
        lookahead: float | None = None,
        seed: int = 0,
    ) -> PlanController:
        """This planner for roll-outs and robots; see Diffuser's."""
        given = {"replan_every": replan_every, "samples": samples, "track": track, "deviation": deviation}
        control = overlaid(self.config["control"], **given, lookahead=lookahead)
        return PlanController(self, task_spec, sampler or self.config["sampler"], seed=seed, **control)
