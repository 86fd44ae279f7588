"""Transformer denoiser with adaptive layer norm and a level for every token.

Sources: DiT (Peebles and Xie 2023), with one modulation shared by all blocks and a learned offset a block
(PixArt-alpha, Chen et al. 2024, section 2.3): one for every token in every block would cost as much as the blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffusion.networks._attention import attention, checked_heads
from diffusion.networks._embedding import FourierFeatures, LevelEmbedding


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def _spread(rows: Tensor, pattern: Tensor | None) -> Tensor:
    """The row of each token: (B, U, C), one-hot (B, H, U) -> (B, H, C). A product, so that its gradient is one too."""
    return rows if pattern is None else pattern.to(rows.dtype) @ rows


class Block(nn.Module):
    """Attention and MLP, each modulated by (shift, scale, gate) a token."""

    def __init__(self, width: int, heads: int, expansion: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = checked_heads(width, heads), causal
        self.norm_1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm_2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, expansion * width), nn.GELU(approximate="tanh"), nn.Linear(expansion * width, width)
        )
        self.offset = nn.Parameter(torch.zeros(6 * width))

    def forward(self, x: Tensor, modulation: Tensor, pattern: Tensor | None) -> Tensor:
        modulation = _spread(modulation + self.offset, pattern)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, dim=-1)
        qkv = self.qkv(modulate(self.norm_1(x), shift_1, scale_1))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        attended = rearrange(attention(q, k, v, self.causal), "b h n d -> b n (h d)")
        x = x + gate_1 * self.project(attended)
        return x + gate_2 * self.mlp(modulate(self.norm_2(x), shift_2, scale_2))


class Transformer(nn.Module):
    """(B, H, features), levels (B, H, groups), condition (B, condition_dim) -> (B, H, features).

    Trajectories may be shorter than the horizon.

    With a one-hot `pattern` (B, H, U), levels are (B, U, groups) and token h has row pattern[h] of them.
    """

    shares_levels = True

    def __init__(
        self,
        features: int,
        horizon: int,
        groups: int,
        condition_dim: int = 0,
        outputs: int = 0,
        width: int = 256,
        depth: int = 2,
        heads: int = 4,
        expansion: int = 4,
        causal: bool = False,
        fourier: int = 0,
    ) -> None:
        super().__init__()
        self.fourier = FourierFeatures(features, fourier)
        self.embed = nn.Linear(self.fourier.output_dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(horizon, width))
        self.level = LevelEmbedding(groups, width)
        self.condition = nn.Linear(condition_dim, width) if condition_dim else None
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(width, heads, expansion, causal) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.last_modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, outputs or features)
        for layer in (self.modulation, self.last_modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None, pattern: Tensor | None = None) -> Tensor:
        c = self.level(t)
        if self.condition is not None:
            assert condition is not None, "this network needs a condition"
            c = c + self.condition(condition.to(c.dtype))[:, None]
        c = F.silu(c)
        h = self.embed(self.fourier(x).to(c.dtype)) + self.position[: x.shape[1]]
        modulation = self.modulation(c)
        for block in self.blocks:
            h = block(h, modulation, pattern)
        shift, scale = _spread(self.last_modulation(c), pattern).chunk(2, dim=-1)
        return self.out(modulate(self.norm(h), shift, scale))
