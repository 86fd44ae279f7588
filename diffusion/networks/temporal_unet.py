"""Temporal U-Net (Janner et al. 2022, appendix C): residual blocks of 1-D convolutions along the horizon.

The level, and a policy's condition with it, scales and shifts between the two convolutions (Chi et al. 2023, FiLM).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.networks._embedding import FourierFeatures, LevelEmbedding


class ConvBlock(nn.Sequential):
    """Conv1d, GroupNorm, Mish: (B, C, H) -> (B, C', H)."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        groups = 8 if outputs % 8 == 0 else 1
        convolution = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2)
        super().__init__(convolution, nn.GroupNorm(groups, outputs), nn.Mish())


class ResidualTemporalBlock(nn.Module):
    """Two convolutions with scale and shift from the embedding between them, and a skip."""

    def __init__(self, inputs: int, outputs: int, embedding: int, kernel: int) -> None:
        super().__init__()
        self.conv_1, self.conv_2 = ConvBlock(inputs, outputs, kernel), ConvBlock(outputs, outputs, kernel)
        self.film = nn.Linear(embedding, 2 * outputs)
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.film(F.mish(c))[..., None].chunk(2, dim=1)
        return self.conv_2(self.conv_1(x) * (1 + scale) + shift) + self.skip(x)


class Blocks(nn.ModuleList):
    """Residual blocks one after the other, with the same embedding."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self:
            x = block(x, c)
        return x


class TemporalUNet(nn.Module):
    """(B, H, features), levels (B, H, groups), condition (B, condition_dim) -> (B, H, features), for any horizon H.

    The horizon is padded inside to what the strides divide. Each token's levels join its features, and the highest
    level of the trajectory is the one that is embedded.
    """

    def __init__(
        self,
        features: int,
        horizon: int,
        groups: int,
        condition_dim: int = 0,
        outputs: int = 0,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2, 4),
        kernel: int = 5,
        fourier: int = 0,
    ) -> None:
        super().__init__()
        self.fourier = FourierFeatures(features, fourier)
        embedding = 4 * width
        self.level = LevelEmbedding(1, embedding)
        self.condition = nn.Linear(condition_dim, embedding) if condition_dim else None
        widths = [width * m for m in multipliers]
        pairs = list(zip([self.fourier.output_dim + groups, *widths[:-1]], widths, strict=True))
        self.factor = 2 ** (len(widths) - 1)

        def block(inputs: int, outputs: int) -> ResidualTemporalBlock:
            return ResidualTemporalBlock(inputs, outputs, embedding, kernel)

        self.downs = nn.ModuleList(Blocks([block(i, o), block(o, o)]) for i, o in pairs)
        self.shrinks = nn.ModuleList(nn.Conv1d(o, o, 3, stride=2, padding=1) for o in widths[:-1])
        self.middle = Blocks([block(widths[-1], widths[-1]), block(widths[-1], widths[-1])])
        self.grows = nn.ModuleList(nn.ConvTranspose1d(o, i, 4, stride=2, padding=1) for i, o in reversed(list(pairwise(widths))))
        self.ups = nn.ModuleList(Blocks([block(2 * i, i), block(i, i)]) for i in reversed(widths[:-1]))
        self.last = nn.Sequential(ConvBlock(width, width, kernel), nn.Conv1d(width, outputs or features, 1))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        horizon = x.shape[1]
        c = self.level(t.flatten(1).amax(dim=1, keepdim=True))
        if self.condition is not None:
            assert condition is not None, "this network needs a condition"
            c = c + self.condition(condition.to(c.dtype))
        h = torch.cat([self.fourier(x), t], dim=-1).to(c.dtype).transpose(1, 2)
        h = F.pad(h, (0, -horizon % self.factor), mode="replicate")
        skips: list[Tensor] = []
        for level, down in enumerate(self.downs):
            h = down(h, c)
            if level < len(self.shrinks):
                skips.append(h)
                h = self.shrinks[level](h)
        h = self.middle(h, c)
        for grow, up in zip(self.grows, self.ups):
            h = up(torch.cat([grow(h), skips.pop()], dim=1), c)
        return self.last(h).transpose(1, 2)[:, :horizon]
