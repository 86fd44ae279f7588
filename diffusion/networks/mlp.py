"""Residual MLP over a flattened chunk: the cheapest denoiser for short horizons, and the fastest to train on a CPU.

Sources: the residual MLP of IDQL (Hansen-Estruch et al. 2023); adaptive layer norm for levels (Peebles and Xie 2023).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.networks._embedding import LevelEmbedding


class ResidualBlock(nn.Module):
    def __init__(self, width: int, expansion: int, dropout: float, level_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.modulation = nn.Linear(level_width, 2 * width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.modulation, self.down):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        return h + self.down(self.dropout(F.gelu(self.up(self.norm(h) * (1 + scale) + shift), approximate="tanh")))


class ResidualMLP(nn.Module):
    """(B, H, features), levels (B, H, groups), condition (B, condition_dim) -> (B, H, features).

    Every token's level goes in, so known tokens are told from noisy ones. `shortcut` adds a linear map of all inputs to
    the output: what is linear in them is then learnt at once, and the blocks learn the rest. `precise` keeps the first and
    the last layer in float32 under autocast, for inputs whose fourth digit counts.
    """

    def __init__(
        self,
        features: int,
        horizon: int,
        groups: int,
        condition_dim: int = 0,
        outputs: int = 0,
        width: int = 512,
        depth: int = 4,
        expansion: int = 2,
        dropout: float = 0.0,
        level_width: int = 128,
        shortcut: bool = False,
        precise: bool = False,
    ) -> None:
        super().__init__()
        outputs = outputs or features
        self.shape, self.precise = (horizon, outputs), precise
        # the highest level of the chunk as sinusoids, every token's level as it is
        self.level = LevelEmbedding(1, level_width)
        inputs = horizon * features + horizon * groups + condition_dim
        self.embed = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, expansion, dropout, level_width) for _ in range(depth))
        self.add_level = nn.Linear(level_width, width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, horizon * outputs)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.shortcut = nn.Linear(inputs, horizon * outputs, bias=False) if shortcut else None
        if self.shortcut is not None:
            nn.init.zeros_(self.shortcut.weight)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        level = self.level(t.flatten(1).amax(dim=1, keepdim=True))
        parts = [x.flatten(1), t.flatten(1)] + ([] if condition is None else [condition])
        dtype = self.embed.weight.dtype if self.precise else level.dtype
        inputs = torch.cat([part.to(dtype) for part in parts], dim=-1)
        with self._precision(x):
            h = self.embed(inputs)
        h = h + self.add_level(level)
        c = F.silu(level)
        for block in self.blocks:
            h = block(h, c)
        h = F.gelu(self.norm(h), approximate="tanh")
        with self._precision(x):
            out = self.out(h.to(dtype))
            if self.shortcut is not None:
                out = out + self.shortcut(inputs)
        return out.view(-1, *self.shape)

    def _precision(self, x: Tensor) -> AbstractContextManager[object]:
        return torch.autocast(x.device.type, enabled=False) if self.precise else nullcontext()
