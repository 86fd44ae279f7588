"""A map of what demonstrations join, for goals farther away than any of them shows.

Search on the Replay Buffer (Eysenbach, Salakhutdinov and Levine 2019, arXiv 1906.05253): places of the data are nodes, a
learned distance makes the edges, and a shortest path leads from node to node to the goal. Here the distance is a
distribution over tokens, of which the last stands for "not within a window": p(k | o, g), k = 1 .. H - 1 or never, learned
from places that a window comes to (k tokens later) and as many that other windows come to (never). So a wall parts two
places that are near each other and that no demonstration joins. A few wrong edges would draw all shortest ways to them, so
there are several networks, as there, of which the most pessimistic counts; edges hold both ways (the robot must be able to
go back); and they are short, since most wrong ones are long.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.csgraph import shortest_path
from torch import Tensor, nn

from planners.diffuser import Durations


class Roadmap(nn.Module):
    """`nodes` places of the data, (nodes, Dg) normalized, and the learned reach between places.

    horizon: H, tokens of the windows. sure: how likely a place must be a window's own, rather than another's, for
    an edge. near: the longest edge, as a share of a window. ensemble: networks.
    """

    nodes: Tensor

    def __init__(self, goal_dim: int, horizon: int, nodes: int, sure: float = 0.7, near: float = 0.6, ensemble: int = 3) -> None:
        super().__init__()
        self.H, self.sure, self.near = horizon, sure, near
        self.register_buffer("nodes", torch.zeros(nodes, goal_dim))
        # H outcomes: tokens 1 .. H - 1, never
        self.reach = nn.ModuleList(Durations(2 * goal_dim, horizon + 1, 128, fourier=6) for _ in range(ensemble))
        self._distance: Tensor | None = None

    def place(self, recorded: Tensor) -> None:
        """Nodes from recorded places (N, Dg), evenly over the data."""
        rows = torch.linspace(0, len(recorded) - 1, len(self.nodes)).long()
        self.nodes.copy_(recorded[rows])

    def loss(self, places: Tensor, generator: torch.Generator) -> Tensor:
        """Cross-entropy of when windows (B, H, Dg) come to places: their own later ones, and other windows'."""
        b, device = len(places), places.device
        goals = torch.cat([places[:, 1:], places[:, 1:].roll(1, 0)], 1)
        token = torch.arange(self.H - 1, device=device).expand(b, -1)
        token = torch.cat([token, torch.full_like(token, self.H - 1)], 1)
        pairs = torch.cat([places[:, :1].expand_as(goals), goals], -1).flatten(0, 1)
        losses = [F.cross_entropy(reach(pairs).float(), token.flatten()) for reach in self.reach]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def tokens(self, here: Tensor, there: Tensor) -> Tensor:
        """Mean tokens (n, m) between places here (n, Dg) and there (m, Dg), the slower way; infinite where not sure."""
        return torch.maximum(self._tokens(here, there), self._tokens(there, here).T)

    def _tokens(self, here: Tensor, there: Tensor) -> Tensor:
        pairs = torch.cat(torch.broadcast_tensors(here[:, None], there[None]), -1)
        every = [torch.cat([reach(rows).float().softmax(-1) for rows in pairs.split(64)]) for reach in self.reach]
        p = torch.stack(every)
        mean = ((p[..., :-1] * torch.arange(1, self.H, device=p.device)).sum(-1) / p[..., :-1].sum(-1)).amax(0)
        sure = (p[..., -1].amax(0) <= 1 - self.sure) & (mean <= self.near * (self.H - 1))
        return torch.where(sure, mean, torch.inf)

    @property
    def distance(self) -> Tensor:
        """Tokens (nodes, nodes) on the shortest ways; computed when first asked for."""
        if self._distance is None:
            edges = self.tokens(self.nodes, self.nodes).cpu().double().numpy()
            np.fill_diagonal(edges, 0.0)
            self._distance = torch.as_tensor(shortest_path(edges), dtype=torch.float32, device=self.nodes.device)
        return self._distance

    def next_node(self, here: Tensor, there: Tensor) -> Tensor:
        """The node (B,) to go to next from places here (B, Dg) to there (B, Dg); -1: to the goal itself.

        So it is where the goal is in reach, or where nothing is.
        """
        begin = self.tokens(here, self.nodes)  # (B, nodes)
        end = self.tokens(self.nodes, there).T  # (B, nodes)
        onward = (self.distance[None] + end[:, None]).amin(-1)
        total, node = (begin + onward).min(1)
        direct = self.tokens(here, there).diagonal()
        return torch.where(total.isinf() | (direct <= total), -1, node)
