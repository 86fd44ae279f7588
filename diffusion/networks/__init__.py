"""Networks that denoise, by name, called as network(x (B, H, F), levels (B, H, G), condition (B, C) or None)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from diffusion._options import check_options
from diffusion.networks._embedding import FourierFeatures
from diffusion.networks.gpt import GPT
from diffusion.networks.image import ImageEncoder
from diffusion.networks.mlp import ResidualMLP
from diffusion.networks.temporal_unet import TemporalUNet
from diffusion.networks.transformer import Transformer
from pilotwave.errors import nearest

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": ResidualMLP,
    "transformer": Transformer,
    "unet": TemporalUNet,
}


def build_network(
    name: str, features: int, horizon: int, groups: int, condition_dim: int = 0, outputs: int = 0, **config: Any
) -> nn.Module:
    """The network called `name`; `config` are its own arguments, those that are None at its defaults. Unknown names and
    arguments raise `UserError`.

    outputs: how many a token, as many as features where 0.
    """
    if name not in NETWORKS:
        raise nearest("network", name, NETWORKS)
    config = {key: value for key, value in config.items() if value is not None}
    check_options(f"network '{name}'", NETWORKS[name], config, given=5)
    return NETWORKS[name](features, horizon, groups, condition_dim, outputs, **config)


__all__ = ["GPT", "NETWORKS", "FourierFeatures", "ImageEncoder", "ResidualMLP", "TemporalUNet", "Transformer", "build_network"]
