"""Trajectory Transformer (Janner, Li and Levine 2021, "Offline Reinforcement Learning as One Big Sequence Modeling Problem",
arXiv 2106.02039): the sequence-model baseline without diffusion.

Every number of a trajectory is one of V bins, and the bins are one sequence, which a GPT predicts (section 3.1, eq. 1):

    tau = (s_t^1 .. s_t^Do, a_t^1 .. a_t^Da, r_t, R_t), t = 0 .. H - 1        R_t, the return to go from t
    L   = - sum_i log P(tau_i | tau_1 .. tau_(i - 1))

Planning is beam search (algorithm 1): the sequences are extended bin by bin and the best kept.

  - Where the task has goals (section 3.2), tau begins with the goal, and the best are the likeliest. Here the goal of a recorded
    window is a later place of its own, any, not the last; what follows it is no part of the sequence, which ends there, and so
    do plans that come within `arrive`.
  - Where rewards are recorded, the best have the greatest r_0 + d r_1 + .. + d^t R_t. Each beam tries `expand` actions a step,
    drawn among the `top` likeliest bins; rewards, returns and states are their likeliest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.networks import GPT
from offline import Algorithm, DataSpec, Normalizer, Windows, register
from offline.returns import returns_to_go
from pilotwave.errors import UserError, nearest, require
from planners.controller import PlanController, overlaid
from planners.plan import Plan, Question, ended

if TYPE_CHECKING:
    from diffusion.networks.gpt import Cache
    from offline.store import TrajectoryStore

BINS = {  # edges (V + 1, D) of the bins of rows (N, D)
    "uniform": lambda rows, v: np.linspace(rows.min(0), rows.max(0), v + 1),
    "quantile": lambda rows, v: np.quantile(rows, np.linspace(0, 1, v + 1), axis=0),
}


class Discretizer(nn.Module):
    """Numbers (..., D) to bins 0 .. V - 1 and back, to the middles of their bins."""

    edges: Tensor

    def __init__(self, features: int, bins: int) -> None:
        super().__init__()
        self.register_buffer("edges", torch.zeros(features, bins + 1))

    def fit(self, rows: np.ndarray, kind: str) -> None:
        """Bins of rows (N, D): all as wide ("uniform"), or holding as many each ("quantile")."""
        edges = BINS[kind](np.asarray(rows, np.float64), self.edges.shape[1] - 1)
        self.edges.copy_(torch.as_tensor(edges.T, dtype=torch.float32))

    def encode(self, x: Tensor) -> Tensor:
        inner = self.edges[:, 1:-1].contiguous()
        rows = x.reshape(-1, x.shape[-1]).T.contiguous()
        return torch.searchsorted(inner, rows, right=True).T.reshape(x.shape)

    def decode(self, bins: Tensor) -> Tensor:
        middles = (self.edges[:, 1:] + self.edges[:, :-1]) / 2
        return middles[torch.arange(len(middles), device=bins.device), bins]


@dataclass
class Beams:
    """Sequences (N, T) in the making, with what the network has seen of them and expects next, log P (N, V)."""

    network: GPT
    tokens: Tensor
    cache: Cache
    expected: Tensor

    @classmethod
    def begin(cls, network: GPT, tokens: Tensor) -> Beams:
        logits, cache = network.extend(tokens, None)
        return cls(network, tokens, cache, logits[:, -1].log_softmax(-1))

    def take(self, rows: Tensor) -> None:
        """Go on with these of the sequences."""
        self.tokens, self.expected = self.tokens[rows], self.expected[rows]
        self.cache = [(k[rows], v[rows]) for k, v in self.cache]

    def append(self, token: Tensor) -> None:
        """Tokens (N,), as the network's vocabulary has them."""
        self.tokens = torch.cat([self.tokens, token[:, None]], 1)
        if self.tokens.shape[1] < len(self.network.position):
            logits, self.cache = self.network.extend(token[:, None], self.cache)
            self.expected = logits[:, -1].log_softmax(-1)


@register
class TrajectoryTransformer(Algorithm):
    """Config (configs/planner/transformer.yaml): horizon H, stride, `actions`, bins {number V, kind}, network {width, depth, ..},
    `discount` a step, expand, top; `arrive`, in the task's units.
    """

    kind, name = "planner", "transformer"

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__(spec, config)
        self.H, self.stride = int(config["horizon"]), int(config["stride"])
        if self.H < 2 or self.stride < 1:
            raise UserError(f"planner.horizon={self.H}, planner.stride={self.stride}; at least 2 and 1 are needed")
        require("planner.bins.number", int(config["bins"]["number"]), 2)
        self.V, self.bins = int(config["bins"]["number"]), str(config["bins"]["kind"])
        if self.bins not in BINS:
            raise nearest("planner.bins.kind", self.bins, BINS)
        self.acts = spec.action_dim if config["actions"] else 0
        self.D = spec.observation_dim + self.acts + (0 if spec.goal_dim else 2)  # tokens a step
        self.discretizer = Discretizer(self.D, self.V)
        self.units = Normalizer.from_shapes({"observation": spec.observation_dim})  # the task's: bins need no others
        # each feature has bins of its own in the vocabulary, and so has the goal's
        self.network = GPT((self.D + spec.goal_dim) * self.V, spec.goal_dim + self.H * self.D, self.V, **config["network"])

    # -- training ------------------------------------------------------------------------------------------------------

    def prepare(self, store: TrajectoryStore) -> None:
        self.discretizer.fit(self._rows(store), self.bins)

    def _rows(self, store: TrajectoryStore) -> np.ndarray:
        """s, a, r, R of every step, (N, D). r is the discounted sum of the rewards until the next token."""
        parts = [store.columns["observation"]] + ([store.columns["action"]] if self.acts else [])
        if not self.spec.goal_dim:
            discount = float(self.config["discount"])
            returns = returns_to_go(store, discount)
            end = np.repeat(store.episode_ends, store.lengths)
            later = np.arange(store.steps) + self.stride
            left = np.where(later < end, returns[np.minimum(later, store.steps - 1)], 0.0)
            parts += [(returns - discount**self.stride * left)[:, None], returns[:, None]]
        return np.concatenate(parts, 1)

    def windows(self, store: TrajectoryStore, device: torch.device | str) -> Windows:
        """Of H tokens; where rewards count, past the ends of episodes, which are no part of the loss."""
        past = 0 if self.spec.goal_dim else self.H - 1
        windows = Windows(store, self.H, columns=[], stride=self.stride, pad_after=past, device=device)
        rows = torch.as_tensor(self._rows(store), dtype=torch.float32)
        windows.columns["bins"] = self.discretizer.to(device).encode(rows.to(windows.device))
        return windows

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        bins, counts = batch["bins"], batch["valid"]
        b, device, goal = len(bins), bins.device, None
        if self.spec.goal_dim:
            arrival = torch.randint(1, self.H, (b,), generator=generator, device=generator.device).to(device)
            goal = bins[torch.arange(b, device=device), arrival, : self.spec.goal_dim]
            counts = counts & (torch.arange(self.H, device=device) <= arrival[:, None])
        tokens = self.sequence(bins, goal)
        logits = self.network(tokens[:, :-1])[:, self.spec.goal_dim + self.spec.observation_dim - 1 :].float()
        asked = bins.flatten(1)[:, self.spec.observation_dim :]
        counts = counts.repeat_interleave(self.D, 1)[:, self.spec.observation_dim :]
        loss = F.cross_entropy(logits[counts], asked[counts])
        return loss, {"loss": loss.detach()}

    def sequence(self, bins: Tensor, goal: Tensor | None) -> Tensor:
        """Bins (B, T, D) and those of the goal (B, Dg) as tokens of the vocabulary (B, Dg + T D)."""
        tokens = (bins + self.V * torch.arange(self.D, device=bins.device)).flatten(1)
        if goal is None:
            return tokens
        return torch.cat([goal + self.V * torch.arange(self.D, self.D + self.spec.goal_dim, device=bins.device), tokens], 1)

    # -- planning ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def plan(
        self,
        observation: np.ndarray,
        goal: np.ndarray | None = None,
        samples: int = 4,
        *,
        sampler: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> Plan:
        """Plans from observations (Do,) or (B, Do) to goals (Dg,) or (B, Dg), in the task's units: the `samples` beams, best first.

        Returns a Plan of (samples, H, ...) or (B, samples, H, ...), valued by log-likelihood until arrival, or by return.
        sampler: none, as `controller` passes on.
        """
        question = Question.of(self.spec, self.units, observation, goal, samples, self.discretizer.edges.device)
        begin, to, d = question.observation, question.goal, self.spec.goal_dim
        first, ahead = self._bins(begin[::samples]), None if to is None else self._bins(to[::samples])
        tokens = self.sequence(nn.functional.pad(first, (0, self.D - first.shape[1]))[:, None], ahead)
        prefix = tokens[:, : d + self.spec.observation_dim]
        if to is None:
            bins, values = self._rewarding(prefix, samples, generator)
        else:
            bins, values = self._likeliest(prefix, to[::samples], samples)
        x = self.discretizer.decode(bins)
        parts = x.split([self.spec.observation_dim, self.acts, self.D - self.spec.observation_dim - self.acts], -1)
        observations, actions = torch.cat([begin[:, None], parts[0][:, 1:]], 1), parts[1] if self.acts else None
        arrivals = None
        if to is not None:
            observations, arrivals, _ = ended(observations, to, float(self.config["arrive"]))
        return question.best_first(values, observations, actions, arrivals)

    def _bins(self, x: Tensor) -> Tensor:
        """Bins of the first features, those of x (B, F)."""
        padded = nn.functional.pad(x, (0, self.D - x.shape[1]))
        return self.discretizer.encode(padded)[:, : x.shape[1]]

    def _likeliest(self, prefix: Tensor, goal: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Algorithm 1: bins (B * width, H, D) and their log-likelihoods (B * width,), from tokens (B, P) to goals (B, Dg)."""
        beams, b, rows = Beams.begin(self.network, prefix), len(prefix), torch.arange(len(prefix), device=prefix.device)
        score, ended = torch.zeros(b, 1, device=prefix.device), torch.zeros(b, 1, dtype=torch.bool, device=prefix.device)
        for i in range(self.spec.observation_dim, self.H * self.D):
            # a plan that has arrived goes on at no cost, in one way
            expected = torch.where(ended[..., None], -torch.inf, beams.expected.view(b, -1, self.V))
            expected[..., 0] = torch.where(ended, 0.0, expected[..., 0])
            score, best = (score[..., None] + expected).flatten(1).topk(min(width, expected[0].numel()))
            parent, token = best // self.V, best % self.V
            beams.take((parent + rows[:, None] * ended.shape[1]).flatten())
            beams.append((token + i % self.D * self.V).flatten())
            ended = ended.gather(1, parent)
            if i % self.D == self.spec.observation_dim - 1:
                place = self._features(beams.tokens)[:, -1, : goal.shape[1]].view(b, -1, goal.shape[1])
                ended = ended | ((place - goal[:, None]).norm(dim=-1) <= float(self.config["arrive"]))
        return self._open(beams.tokens), score.flatten()

    def _rewarding(self, prefix: Tensor, width: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Bins (B * width, H, D) and returns (B * width,): the beams of greatest reward so far and return to go."""
        b, expand, kept = len(prefix), int(self.config["expand"]), float(self.config["discount"]) ** self.stride
        beams = Beams.begin(self.network, prefix)
        beams.take(torch.arange(b, device=prefix.device).repeat_interleave(width))
        gained = value = torch.zeros(b * width, device=prefix.device)
        for h in range(self.H):
            each = torch.arange(b * width, device=prefix.device).repeat_interleave(expand)
            beams.take(each)
            for i in range(self.spec.observation_dim, self.D):
                self._draw(beams, i, int(self.config["top"]) if i < self.D - 2 else 1, generator)
            r, to_go = self._features(beams.tokens)[:, -1, -2:].unbind(1)
            value, gained = gained[each] + kept**h * to_go, gained[each] + kept**h * r
            value, best = value.view(b, -1).topk(width)
            best = (best + torch.arange(b, device=best.device)[:, None] * width * expand).flatten()
            beams.take(best)
            gained, value = gained[best], value.flatten()
            for i in range(self.spec.observation_dim if h < self.H - 1 else 0):
                self._draw(beams, i, 1, generator)
        return self._open(beams.tokens), value

    def _draw(self, beams: Beams, feature: int, top: int, generator: torch.Generator | None) -> None:
        """One more bin of each beam, of this feature, among the `top` likeliest."""
        likeliest = beams.expected.topk(min(top, self.V))
        chosen = torch.multinomial(likeliest.values.exp(), 1, generator=generator)
        beams.append(likeliest.indices.gather(1, chosen)[:, 0] + feature * self.V)

    def _open(self, tokens: Tensor) -> Tensor:
        """The inverse of `sequence` for whole sequences: bins (N, H, D)."""
        return tokens[:, self.spec.goal_dim :].unflatten(1, (-1, self.D)) % self.V

    def _features(self, tokens: Tensor) -> Tensor:
        """The numbers (N, T, D) of sequences, the last step filled up with bins 0."""
        tokens = nn.functional.pad(tokens, (0, -(tokens.shape[1] - self.spec.goal_dim) % self.D))
        return self.discretizer.decode(self._open(tokens))

    def controller(
        self,
        task_spec: Any,
        *,
        sampler: Mapping[str, Any] | None = None,
        replan_every: int | None = None,
        samples: int | None = None,
        track: str | None = None,
        deviation: float | None = None,
        seed: int = 0,
    ) -> PlanController:
        """This planner for roll-outs and robots; see Diffuser's. samples: the beams."""
        if sampler:
            raise UserError("sampler: planner 'transformer' samples no diffusion; leave it out")
        given = {"replan_every": replan_every, "samples": samples, "track": track, "deviation": deviation}
        control = overlaid(self.config["control"], **given)
        calls = self.H * self.D - self.spec.observation_dim  # with the prefix, and without the last token
        return PlanController(self, task_spec, {}, seed=seed, evaluations=calls, **control)
