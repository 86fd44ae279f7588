"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pilotwave.errors import UserError


def checked_heads(width: int, heads: int) -> int:
    """heads, among which a width must divide."""
    if heads < 1 or width % heads:
        raise UserError(f"a network of width {width} cannot have {heads} heads; the width must be a multiple of them")
    return heads


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, each (B, heads, tokens, d) -> (B, heads, tokens, d).

    torch's fused kernel, but in bfloat16 on a CPU: there its backward pass takes several times as long as the products
    written out, at the lengths that plans have.
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(ahead, -torch.inf)
    return torch.softmax(scores, dim=-1).to(v.dtype) @ v
