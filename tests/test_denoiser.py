"""The denoiser: every prediction means the same data, the loss is what it says, and training on it learns a mixture."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from diffusion import PREDICTIONS, WEIGHTINGS, Denoiser, Layout, NoiseSchedule, sample, solver
from diffusion.networks import build_network
from pilotwave.errors import UserError
from tests.mixture import PLANE

SCHEDULES = {"vp": NoiseSchedule.vp_linear(), "edm": NoiseSchedule.edm(), "flow": NoiseSchedule.flow()}
LAYOUT = Layout(observation=2, action=3)
B, H, F, G = 6, 4, LAYOUT.features, len(LAYOUT.groups)

predictions = pytest.mark.parametrize("prediction", PREDICTIONS)


class Probe(nn.Module):
    """A network that keeps what it was called with and answers with its parameter, (H, F)."""

    def __init__(self, value: float = 0.3) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.full((H, F), value, dtype=torch.float64))
        self.x, self.t, self.condition = torch.empty(0), torch.empty(0), None

    def forward(self, x: Tensor, t: Tensor, condition=None) -> Tensor:
        self.x, self.t, self.condition = x, t, condition
        return self.answer.expand(x.shape)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*(shape or (B, H, F)), dtype=torch.float64, generator=seeded(seed))


def make(prediction: str = "data", schedule: str = "vp", value: float = 0.3) -> Denoiser:
    return Denoiser(Probe(value), SCHEDULES[schedule], LAYOUT, prediction)


# -- predictions -------------------------------------------------------------------------------------------------------


@predictions
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_targets_are_inverted_exactly(prediction, schedule):
    x_0, eps = data(50, 3), data(50, 3, seed=2)
    t = torch.linspace(0, 0.999, 50, dtype=torch.float64)[:, None]
    a, s, p = schedule.alpha(t), schedule.sigma(t), PREDICTIONS[prediction]
    torch.testing.assert_close(p.data(a * x_0 + s * eps, p.target(x_0, eps, a, s), a, s), x_0, rtol=1e-9, atol=1e-9)


@predictions
def test_data_error_is_the_derivative_by_the_output(prediction):
    schedule, t = SCHEDULES["flow"], torch.linspace(0.01, 0.9, 9, dtype=torch.float64)
    a, s, out = schedule.alpha(t), schedule.sigma(t), torch.zeros(9, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(PREDICTIONS[prediction].data(torch.ones_like(t), out, a, s).sum(), out)
    torch.testing.assert_close(slope.abs(), PREDICTIONS[prediction].data_error(a, s))


def test_v_of_edm_is_karras_preconditioning():
    """D = c_skip x - c_out F(c_in x) with sigma_data = 1 (Karras et al. 2022, table 1)."""
    denoiser, x, t = make("v", "edm"), data(), torch.tensor(0.7, dtype=torch.float64)
    s = SCHEDULES["edm"].sigma(t)
    out = denoiser(x, t)
    network = denoiser.network
    torch.testing.assert_close(out, x / (1 + s**2) - s / torch.sqrt(1 + s**2) * network.answer)
    torch.testing.assert_close(network.x, x / torch.sqrt(1 + s**2))


@pytest.mark.parametrize("prediction", ["noise", "v", "flow"])
def test_clean_tokens_come_back_as_they_are(prediction):
    x, t = data(), torch.zeros(B, H, G, dtype=torch.float64)
    t[:, 2:, 1] = 0.5
    out = make(prediction)(x, t)
    assert torch.equal(out[:, :2], x[:, :2])
    assert torch.equal(out[:, 2:, :2], x[:, 2:, :2])
    assert not torch.isclose(out[:, 2:, 2:], x[:, 2:, 2:]).any()


# -- levels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (B,), (B, H), (B, H, G), (1, H, G), (B, 1, 1), (B, H, F)])
def test_levels_of_every_shape_reach_the_network_by_group(shape):
    t = torch.rand(shape, dtype=torch.float64, generator=seeded())
    if shape == (B, H, F):
        t = LAYOUT.levels(t[..., :G])
    denoiser, x = make("flow", "flow"), data()
    out = denoiser(x, t)
    levels = t[..., [0, 2]] if shape == (B, H, F) else t.reshape(t.shape + (1,) * (3 - t.ndim))
    assert torch.equal(denoiser.network.t, levels.expand(B, H, G))
    spread = LAYOUT.levels(levels.expand(B, H, G))
    torch.testing.assert_close(out, x - spread * 0.3)


def test_the_condition_is_passed_on():
    denoiser, condition = make(), object()
    denoiser(data(), torch.tensor(0.5), condition)
    assert denoiser.network.condition is condition


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "schedule"),
    [pair for pair in itertools.product(PREDICTIONS, SCHEDULES) if pair != ("noise", "flow")],  # that one is refused
)
def test_loss_is_the_mean_squared_error_of_the_output(prediction, schedule):
    denoiser, x_0, t = make(prediction, schedule), data(), torch.linspace(0.1, 0.9, B, dtype=torch.float64)
    loss = denoiser.loss(x_0, seeded(5), levels=t)
    eps = torch.randn(x_0.shape, dtype=torch.float64, generator=seeded(5))
    a, s = (f(t)[:, None, None] for f in (SCHEDULES[schedule].alpha, SCHEDULES[schedule].sigma))
    norm = torch.sqrt(a**2 + s**2)
    target = {"data": x_0, "noise": eps, "v": (a * eps - s * x_0) / norm, "flow": eps - x_0}[prediction]
    torch.testing.assert_close(loss, ((0.3 - target) ** 2).mean())
    torch.testing.assert_close(denoiser.network.x, (a * x_0 + s * eps) / norm)


@predictions
@pytest.mark.parametrize("gamma", [5.0, 0.5])
def test_min_snr_weighs_the_data_s_error_whatever_is_predicted(prediction, gamma):
    """min(SNR, gamma) on the squared error of x_0 (Hang et al. 2023, eq. 7)."""
    denoiser, x_0, t = make(prediction), data(), torch.linspace(0.1, 0.9, B, dtype=torch.float64)
    loss = denoiser.loss(x_0, seeded(5), levels=t, weighting="min_snr", gamma=gamma)
    eps = torch.randn(x_0.shape, dtype=torch.float64, generator=seeded(5))
    schedule = SCHEDULES["vp"]
    error = (denoiser(schedule.add_noise(x_0, eps, t[:, None, None]), t) - x_0) ** 2
    torch.testing.assert_close(loss, (schedule.snr(t).clamp(max=gamma)[:, None, None] * error).mean())


@predictions
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_clean_tokens_are_seen_and_not_learnt(prediction, weighting):
    clean = torch.zeros(H, G, dtype=torch.bool)
    clean[0], clean[:, 0] = True, True
    denoiser, x_0 = make(prediction), data()
    loss = denoiser.loss(x_0, seeded(), clean=clean, weighting=weighting)
    loss.backward()
    network, mask = denoiser.network, LAYOUT.levels(clean)
    assert torch.equal(network.x[:, mask], x_0[:, mask])
    assert (network.t[:, clean] == 0).all()
    assert (network.t[:, ~clean] > 0).all()
    assert (network.answer.grad[mask] == 0).all()
    assert (network.answer.grad[~mask] != 0).all()
    assert torch.isfinite(loss)


def test_the_loss_is_a_mean_over_what_is_learnt():
    """Neither clean tokens nor padding dilute it; a weight of 10 counts ten times."""
    denoiser, x_0, t = make(), data(), torch.full((B,), 0.5, dtype=torch.float64)
    error = (0.3 - x_0) ** 2
    clean = torch.zeros(B, H, G, dtype=torch.bool)
    clean[:3, :2] = True
    noisy = ~LAYOUT.levels(clean)
    torch.testing.assert_close(denoiser.loss(x_0, seeded(), levels=t, clean=clean), error[noisy].mean())
    valid = torch.ones(B, H, 1, dtype=torch.float64)
    valid[1:, 1:] = 0
    keep = valid.bool().expand_as(error)
    torch.testing.assert_close(denoiser.loss(x_0, seeded(), levels=t, weight=valid), error[keep].mean())
    first = torch.ones(H, F, dtype=torch.float64)
    first[0, LAYOUT["action"]] = 10
    torch.testing.assert_close(denoiser.loss(x_0, seeded(), levels=t, weight=first), (first * error).mean())
    assert denoiser.loss(x_0, seeded(), levels=t, weight=0 * first) == 0


def test_levels_are_stratified_over_the_batch():
    denoiser, x_0 = make(), data(64, H, F)
    denoiser.loss(x_0, seeded(3), t_min=1e-3)
    t = denoiser.network.t[:, 0, 0]
    assert (denoiser.network.t == t[:, None, None]).all()
    assert t.min() >= 1e-3
    assert t.max() <= 1
    assert not torch.equal(t, t.sort().values)
    gaps = t.sort().values.diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, 0.999 / 64), rtol=1e-3, atol=0)


def test_levels_of_every_token_can_be_given():
    denoiser, t = make(), torch.rand(B, H, G, dtype=torch.float64, generator=seeded())
    denoiser.loss(data(), seeded(), levels=t)
    assert torch.equal(denoiser.network.t, t)
    denoiser.loss(data(), seeded(), levels=t[..., 0])
    assert torch.equal(denoiser.network.t, t[..., :1].expand(B, H, G))


@pytest.mark.parametrize("prediction", ["noise", "v", "flow"])
def test_all_chance_comes_from_the_generator(prediction):
    """For outputs that hold the noise: under a data prediction the probe's constant answer errs by the same everywhere."""
    denoiser, x_0, before = make(prediction), data(), torch.get_rng_state()
    losses, levels = [], []
    for seed in (1, 1, 2):
        losses.append(denoiser.loss(x_0, seeded(seed)))
        levels.append(denoiser.network.t)
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(levels[0], levels[1])
    assert not torch.isclose(levels[0], levels[2]).any()
    assert torch.equal(before, torch.get_rng_state())


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="did you mean 'noise'"):
        make("noises")
    with pytest.raises(UserError, match="did you mean 'min_snr'"):
        make().loss(data(), seeded(), weighting="minsnr")
    with pytest.raises(UserError, match="pure noise"):
        make("noise", "flow")


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "schedule", "weighting"),
    [("noise", "vp", "plain"), ("v", "edm", "plain"), ("flow", "flow", "plain"), ("data", "vp", "min_snr")],
)
def test_training_learns_a_mixture(prediction, schedule, weighting):
    """A small network on two tokens of one feature, trained for 400 steps: samples have the mixture's moments.

    At t = 1 an error of the predicted noise is sigma / alpha = 152 times as large in the data. From starts that training hardly
    met one number in a hundred then ends up to hundreds away, whatever the solver and its steps; as DDPM does (Ho et al. 2020),
    predictions are clipped to the data.
    """
    torch.manual_seed(0)
    layout, generator = Layout(state=1), seeded()
    network = build_network("mlp", 1, 2, 1, width=64, depth=2, level_width=32)
    denoiser = Denoiser(network, SCHEDULES[schedule], layout, prediction)
    optimizer = torch.optim.Adam(denoiser.parameters(), 4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    x_0 = PLANE.draw(400 * 256, generator).float().view(400, 256, 2, 1)
    for batch in x_0:
        optimizer.zero_grad()
        denoiser.loss(batch, generator, weighting=weighting).backward()
        optimizer.step()
        decay.step()
    x_T = torch.randn(4000, 2, 1, generator=generator) * denoiser.schedule.sigma(torch.ones(()))
    low, high = x_0.amin((0, 1)), x_0.amax((0, 1))

    def clip(d: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return d.clamp(low, high)

    with torch.no_grad():
        table, guide = solver("dpmpp_2m", denoiser.schedule, 25), clip if prediction == "noise" else None
        x = sample(denoiser, table, x_T, guide=guide)[..., 0].double()
    torch.testing.assert_close(x.mean(0), PLANE.mean(), rtol=0, atol=0.1)
    torch.testing.assert_close(x.T.cov(), PLANE.covariance(), rtol=0, atol=0.12)
