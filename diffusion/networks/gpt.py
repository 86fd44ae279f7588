"""A decoder of discrete tokens (Radford et al. 2018): causal attention, learned positions, logits of the next token."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from diffusion.networks._attention import attention, checked_heads

Cache = list[tuple[Tensor, Tensor]]  # of each block, keys and values (B, heads, tokens, d) of what came before


class CausalBlock(nn.Module):
    def __init__(self, width: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.heads = checked_heads(width, heads)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, expansion * width), nn.GELU("tanh"), nn.Linear(expansion * width, width))

    def forward(self, x: Tensor, before: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = rearrange(self.qkv(self.norm_1(x)), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if before is not None:
            k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
        attended = attention(q, k, v, causal=before is None)
        x = x + self.project(rearrange(attended, "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm_2(x)), (k, v)


class GPT(nn.Module):
    """Tokens (B, T) below `vocabulary` -> logits (B, T, outputs) of the token that follows each of them, T at most `length`."""

    def __init__(
        self, vocabulary: int, length: int, outputs: int, width: int = 128, depth: int = 4, heads: int = 4, expansion: int = 4
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(CausalBlock(width, heads, expansion) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.extend(tokens, None)[0]

    def extend(self, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """As `forward`, after what the cache holds (then one token at a time), and the cache with these tokens too."""
        begun = 0 if cache is None else cache[0][0].shape[2]
        x = self.embed(tokens) + self.position[begun : begun + tokens.shape[1]]
        held: Cache = []
        for i, block in enumerate(self.blocks):
            x, kept = block(x, None if cache is None else cache[i])
            held.append(kept)
        return self.out(self.norm(x)), held
