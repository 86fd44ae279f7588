"""Embedding each distinct level once is the same function as embedding every token's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusion import Denoiser, Layout, NoiseSchedule
from diffusion.networks import build_network

B, H = 3, 12


@pytest.mark.parametrize("known", ["nothing", "the same of all", "each its own"])
@pytest.mark.parametrize("condition_dim", [0, 5])
def test_loss_and_gradients_are_the_same(known, condition_dim):
    torch.manual_seed(0)
    network = build_network("transformer", 4, H, 2, condition_dim, width=16, depth=2, heads=2)
    for p in network.parameters():
        nn.init.normal_(p, std=0.3)
    denoiser = Denoiser(network, NoiseSchedule.vp_cosine(), Layout(observation=3, action=1), "v").double()
    clean = {
        "nothing": None,
        "the same of all": torch.rand(H, 2) < 0.4,
        "each its own": torch.rand(B, H, 2) < 0.4,
    }[known]
    condition = torch.randn(B, condition_dim) if condition_dim else None
    x = torch.randn(B, H, 4, dtype=torch.float64)
    rows, results = [], []
    network.level.register_forward_hook(lambda module, inputs, out: rows.append(out.shape[1]))
    for share in (False, True):
        denoiser.share_levels = share
        loss = denoiser.loss(x, torch.Generator().manual_seed(1), condition=condition, clean=clean)
        results.append((loss, torch.autograd.grad(loss, list(network.parameters()))))
    assert rows == [H, 1 if clean is None else 4]
    torch.testing.assert_close(results[1][0], results[0][0])
    for shared, plain in zip(results[1][1], results[0][1]):
        torch.testing.assert_close(shared, plain, rtol=1e-9, atol=1e-12)


def test_levels_of_every_token_are_not_shared():
    network = build_network("transformer", 4, H, 2, width=16, depth=1, heads=2)
    denoiser = Denoiser(network, NoiseSchedule.vp_cosine(), Layout(observation=3, action=1))
    rows = []
    network.level.register_forward_hook(lambda module, inputs, out: rows.append(out.shape[1]))
    denoiser.loss(torch.randn(B, H, 4), None, levels=torch.rand(B, H))
    assert rows == [H]
