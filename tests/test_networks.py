"""Networks: shapes, what they depend on, and that the whole of sampling can be traced and exported."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from diffusion import Denoiser, Layout, NoiseSchedule, Tableau, sample, solver
from diffusion.networks import NETWORKS, ImageEncoder, build_network
from pilotwave.errors import UserError

SMALL = {
    "mlp": {"width": 32, "depth": 2, "level_width": 16},
    "transformer": {"width": 32, "depth": 2, "heads": 2},
    "unet": {"width": 8, "multipliers": [1, 2]},
}
F, G = 5, 2
every = pytest.mark.parametrize("name", NETWORKS)


def make(name: str, horizon: int = 8, condition_dim: int = 0, **config) -> nn.Module:
    """A small network with no weight left at zero, so that all of it takes part."""
    torch.manual_seed(0)
    network = build_network(name, F, horizon, G, condition_dim, **{**SMALL[name], **config})
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


def inputs(horizon: int = 8, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, horizon, F, generator=generator), torch.rand(batch, horizon, G, generator=generator)


@every
@pytest.mark.parametrize("horizon", [1, 8, 13])
@pytest.mark.parametrize("condition_dim", [0, 4])
def test_shapes(name, horizon, condition_dim):
    network, (x, t) = make(name, horizon, condition_dim), inputs(horizon)
    out = network(x, t, torch.randn(3, condition_dim) if condition_dim else None)
    assert out.shape == x.shape
    assert torch.isfinite(out).all()


@every
def test_trajectories_of_a_batch_do_not_mix(name):
    network, (x, t) = make(name), inputs()
    torch.testing.assert_close(network(x, t)[1:2], network(x[1:2], t[1:2]), rtol=1e-4, atol=1e-5)


@every
def test_every_input_counts(name):
    """Each number of x, each token's level and each number of the condition moves the output."""
    network, (x, t) = make(name, condition_dim=4), inputs(batch=1)
    c = torch.randn(1, 4)
    t[:, 3] = 1.0  # the highest
    for value in (x, t, c):
        value.requires_grad_()
    network(x, t, c).square().sum().backward()
    for value in (x, t, c):
        assert (value.grad.abs() > 0).all()


@every
def test_every_parameter_learns(name):
    network, (x, t) = make(name, condition_dim=4), inputs()
    network.train()(x, t, torch.randn(3, 4)).square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert (parameter.grad != 0).any(), key


@every
def test_a_fresh_network_is_calm(name):
    """Outputs before training are of the size of a target's spread or less."""
    network, (x, t) = build_network(name, F, 8, G, **SMALL[name]), inputs(batch=64)
    assert network(x, t).std() < 1


def test_the_unet_takes_any_horizon():
    network = make("unet", 16)
    for horizon in (1, 2, 5, 16, 23):
        x, t = inputs(horizon)
        assert network(x, t).shape == x.shape


def test_a_causal_transformer_does_not_look_ahead():
    x, t = inputs()
    later = x.clone()
    later[:, 5:] += 1
    causal, full = make("transformer", causal=True), make("transformer")
    assert torch.equal(causal(x, t)[:, :5], causal(later, t)[:, :5])
    assert not torch.isclose(full(x, t)[:, :5], full(later, t)[:, :5]).any()


@every
def test_half_precision_is_close(name):
    """bfloat16 rounds by 2^-9, once an operation; phases that were rounded too would be off by radians."""
    config = {} if name == "mlp" else {"fourier": 4}
    network, (x, t) = make(name, **config), inputs(batch=64)
    denoiser = Denoiser(network, NoiseSchedule.vp_linear(), Layout(observation=2, action=3), "v")
    single = denoiser(x, t)
    denoiser.to(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in network.parameters())
    half = denoiser(x, t)
    assert half.dtype == torch.float32
    assert (half - single).norm() < 0.02 * single.norm()
    # back in float32 only the weights are rounded
    assert (denoiser.float()(x, t) - single).norm() < 0.02 * single.norm()


def test_unknown_networks_and_options_are_named():
    with pytest.raises(UserError, match="did you mean 'unet'"):
        build_network("u-net", F, 8, G)
    with pytest.raises(UserError, match="option of network 'mlp' 'widht'; did you mean 'width'"):
        build_network("mlp", F, 8, G, widht=3)


# -- images ------------------------------------------------------------------------------------------------------------


def test_image_encoder():
    torch.manual_seed(0)
    encoder = ImageEncoder((16, 32), keypoints=7).eval()
    image = torch.randint(0, 256, (2, 40, 56, 3), dtype=torch.uint8)
    out = encoder(image)
    assert out.shape == (2, encoder.output_dim) == (2, 14)
    assert out.abs().max() <= 1
    torch.testing.assert_close(encoder(image.float() / 255), out, rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    assert all((p.grad != 0).any() for p in encoder.parameters() if p is not encoder.maps.bias)


def test_image_encoder_looks_at_the_middle():
    torch.manual_seed(0)
    encoder, image = ImageEncoder((16, 32), keypoints=4, crop=32), torch.rand(1, 48, 40, 3)
    cropped = encoder(image)
    encoder.crop = None
    assert torch.equal(cropped, encoder(image[:, 8:40, 4:36]))


def test_spatial_softmax_finds_what_is_bright():
    """With the first colour, a hundred times as bright, as the feature map."""
    encoder = ImageEncoder((16,), keypoints=1)
    encoder.stem, encoder.stages, encoder.maps = nn.Conv2d(3, 3, 1), nn.Identity(), nn.Conv2d(3, 1, 1)
    nn.init.dirac_(encoder.stem.weight)
    nn.init.zeros_(encoder.stem.bias)
    with torch.no_grad():
        encoder.maps.weight.copy_(torch.tensor([100.0, 0, 0])[None, :, None, None])
    image = torch.zeros(2, 21, 41, 3)
    image[0, 20, 10, 0] = image[1, 5, 40, 0] = 1
    image[:, 0, 0, 1] = 1  # another colour, which that map does not see
    torch.testing.assert_close(encoder(image), torch.tensor([[-0.5, 1.0], [1.0, -0.5]]))


# -- one graph ---------------------------------------------------------------------------------------------------------


class Sampler(nn.Module):
    def __init__(self, denoiser: Denoiser, table: Tableau) -> None:
        super().__init__()
        self.denoiser, self.table = denoiser, table

    def forward(self, x: Tensor) -> Tensor:
        return sample(self.denoiser, self.table, x)


def sampler(name: str, method: str, schedule: NoiseSchedule) -> Sampler:
    layout, tokens = Layout(observation=2, action=3), torch.ones(8, 2)
    tokens[0, 0] = 0
    table = solver(method, schedule, 3, tokens=tokens, layout=layout)
    return Sampler(Denoiser(make(name), schedule, layout, "v"), table).eval().requires_grad_(False)


graphs = pytest.mark.parametrize(
    ("name", "method", "schedule"),
    [
        ("mlp", "dpmpp_2m", NoiseSchedule.vp_cosine()),
        ("transformer", "heun", NoiseSchedule.flow()),
        ("unet", "ddim", NoiseSchedule.from_betas([0.1, 0.2, 0.3, 0.4])),
    ],
)


@graphs
def test_sampling_exports_as_one_graph(name, method, schedule):
    module, (x, other) = sampler(name, method, schedule), (inputs()[0], inputs(batch=6)[0][3:])
    program = torch.export.export(module, (x,))
    # eager comes after, so that nothing made while exporting may linger
    torch.testing.assert_close(program.module()(other), module(other), rtol=1e-4, atol=1e-5)
    assert not any("cond" in str(node.target) for node in program.graph.nodes)


@graphs
def test_sampling_traces_as_one_graph(name, method, schedule):
    module, (x, other) = sampler(name, method, schedule), (inputs()[0], inputs(batch=6)[0][3:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, (x,))
    torch.testing.assert_close(traced(other), module(other), rtol=1e-4, atol=1e-5)


def test_pinned_tokens_pass_through_the_whole_sampler():
    module, (x, _) = sampler("mlp", "dpmpp_2m", NoiseSchedule.vp_linear()), inputs()
    out = module(x)
    assert torch.equal(out[:, 0, :2], x[:, 0, :2])
    assert not torch.isclose(out[:, 1:], x[:, 1:]).all()
