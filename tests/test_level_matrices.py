"""Matrices of levels: what they are, that every token runs on its own, and that correlated tokens come out with their moments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion import NoiseSchedule, sample, solver, solvers, spaced
from diffusion.level_matrices import autoregressive, full_sequence, pyramid, streaming
from diffusion.solvers import SOLVERS
from pilotwave.errors import UserError
from tests.mixture import elementwise

# solver -> options that take its noise away
DETERMINISTIC: dict[str, dict[str, float]] = {
    **{name: {} for name in ("ddim", "euler", "heun", "midpoint", "ddim_accelerated")},
    **{name: {} for name in ("deis_1", "deis_2", "deis_3", "dpm_1", "dpm_2", "dpm_3")},
    **{name: {} for name in ("dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "dpm_v3", "unipc_1", "unipc_2", "unipc_3")},
    "edm": {"churn": 0},
    "sa": {"tau": 0},
    "conjugate": {},
    "dc": {},
    "recurrent": {"times": 1},
    "splitting": {"noise": 0},
}
# what cannot take such levels, or always draws noise
OTHERS = {"restart": "no levels that fall at different steps", "ddpm": "", "ddpm_accelerated": "", "dpmpp_2m_sde": ""}
KEEP_VARIANCE = ("ddim_accelerated",)  # defined on these schedules alone
SCHEDULES = {
    "vp_linear": NoiseSchedule.vp_linear(),
    "vp_cosine": NoiseSchedule.vp_cosine(),
    "edm": NoiseSchedule.edm(),
    "flow": NoiseSchedule.flow(),
    "from_betas": NoiseSchedule.from_betas(torch.linspace(1e-4, 0.02, 1000)),
}
VP = SCHEDULES["vp_linear"]
MATRICES = {
    "full sequence": lambda t, h: full_sequence(t, h),
    "pyramid": lambda t, h: pyramid(t, h, delay=(len(t) - 1) / 2),
    "autoregressive": lambda t, h: autoregressive(t, h),
    "stream, first": lambda t, h: streaming(t, h, 1, first=True),
    "stream": lambda t, h: streaming(t, h, 1),
}


def test_every_solver_is_known_here():
    new = set(solvers()) - set(DETERMINISTIC) - set(OTHERS)
    assert not new, f"say in tests/test_level_matrices.py whether {new} take levels by token"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- what they are -----------------------------------------------------------------------------------------------------


def test_matrices_are_those_of_the_papers():
    """Entry by entry, written as Diffusion Forcing counts: steps that token j still has to fall at row m."""
    K, H = 6, 4
    for delay in (0, 0.5, 1, 2.5, K):
        left = [[min(max(K + int(delay * j) - m, 0), K) for j in range(H)] for m in range(K + int(delay * (H - 1)) + 1)]
        expected = torch.tensor(left, dtype=torch.float64)[:, None, :, None] / K
        torch.testing.assert_close(pyramid(K, H, delay), expected, rtol=1e-15, atol=1e-15)
    assert torch.equal(full_sequence(K, H), pyramid(K, H, 0))
    assert torch.equal(autoregressive(K, H), pyramid(K, H, K))
    assert torch.equal(pyramid(K, 6, 2, chunk=3)[..., ::3, :], pyramid(K, 2, 2))
    assert autoregressive([1, 0.3, 0], 2)[:, 0, :, 0].tolist() == [[1, 1], [0.3, 1], [0, 1], [0, 0.3], [0, 0]]


def test_rounds_of_a_stream_follow_each_other():
    """A round begins where the first part ends, ends where the next begins a chunk further on, and leaves its first chunk clean."""
    t = spaced(VP, 12, "quadratic")
    first, rounds = streaming(t, 6, 2, first=True), streaming(t, 6, 2)
    assert (len(first), len(rounds)) == (9, 5)
    assert (first[0] == 1).all()
    assert torch.equal(first[-1], rounds[0])
    assert torch.equal(rounds[-1, :, 2:], rounds[0, :, :-2])
    assert (rounds[-1, :, :2] == 0).all()
    assert (rounds[0, :, -2:] == 1).all()


def test_matrices_that_make_no_sense_are_refused():
    for make, what in (
        (lambda: pyramid(5, 0), "horizon of at least 1"),
        (lambda: pyramid(5, 3, delay=-1), "delay of 0 or more"),
        (lambda: pyramid(5, 3, chunk=0), "chunk of at least 1"),
        (lambda: pyramid(0, 3), "levels of a token"),
        (lambda: pyramid([1.0], 3), "levels of a token"),
        (lambda: streaming(12, 6, 4), "chunks that divide its horizon"),
        (lambda: streaming(10, 6, 2), "as many steps or a multiple"),
        (lambda: solver("ddim", VP, pyramid([0.5, 1.0], 3)), "falling; got a tensor"),
        (lambda: solver("ddim", VP, torch.ones(5, 3)), "a matrix of levels must be"),
        (lambda: solver("restart", VP, pyramid(5, 3)), OTHERS["restart"]),
        (lambda: solver("deis_2", SCHEDULES["flow"], pyramid(5, 3)), "not defined at t = 1 of 'flow'"),
        (lambda: solver("ddim_accelerated", SCHEDULES["edm"], pyramid(5, 3)), "keep the variance"),
    ):
        with pytest.raises(UserError, match=what) as error:
            make()
        assert "\n" not in str(error.value)


# -- tokens that are independent ---------------------------------------------------------------------------------------


@st.composite
def falls(draw: st.DrawFn) -> Tensor:
    """(rows, 1, 4, 1): levels that each token falls along in its own time, or rests at; from below 1, to 0 or above it."""
    rows = draw(st.integers(1, 6))
    ratio = st.one_of(st.just(1.0), st.floats(0.4, 0.95), st.just(0.0))
    columns = []
    for _ in range(4):
        t = [draw(st.floats(0.3, 0.98))]
        for _ in range(rows):
            t.append(t[-1] * draw(ratio))
        columns.append(t)
    return torch.tensor(columns, dtype=torch.float64).T[:, None, :, None]


@pytest.mark.parametrize("name", DETERMINISTIC)
@settings(max_examples=4, deadline=None)
@given(levels=falls(), where=st.sampled_from(sorted(SCHEDULES)))
def test_every_token_is_the_run_of_its_own_levels(name, levels, where):
    if name in KEEP_VARIANCE and where in ("edm", "flow"):
        where = "vp_cosine"
    schedule, options = SCHEDULES[where], DETERMINISTIC[name]
    x, denoise = noise(3, 4, 2) * schedule.sigma(levels[0]), elementwise(schedule)
    out = sample(denoise, solver(name, schedule, levels, **options), x)
    for j in range(4):
        alone = sample(denoise, solver(name, schedule, levels[:, 0, j, 0], **options), x[:, j])
        scale = float(alone.abs().max() + x[:, j].abs().max())
        torch.testing.assert_close(out[:, j], alone, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("matrix", ["pyramid", "autoregressive", "stream"])
def test_every_token_is_the_run_of_the_levels_it_falls_along(name, matrix):
    """As if it had not waited, whatever the method remembers; pinned tokens keep every bit."""
    levels, options, pinned = MATRICES[matrix](0.98 * spaced(VP, 8), 4), DETERMINISTIC[name], torch.tensor([[1.0], [1], [0], [1]])
    x, denoise = noise(3, 4, 2), elementwise(VP)

    def watched(y: Tensor, t: Tensor) -> Tensor:
        assert torch.equal(y[:, 2], x[:, 2])
        return denoise(y, t)

    out = sample(watched, solver(name, VP, levels, tokens=pinned, **options), x)
    assert torch.equal(out[:, 2], x[:, 2])
    for j in (0, 1, 3):
        own = levels[:, 0, j, 0].unique().flip(0)
        alone = sample(denoise, solver(name, VP, own, **options), x[:, j]) if len(own) > 1 else x[:, j]
        torch.testing.assert_close(out[:, j], alone, rtol=0, atol=1e-13 * float(x.abs().max()))


# -- tokens that are not -----------------------------------------------------------------------------------------------

MEAN = torch.tensor([0.5, -1.0, 0.3], dtype=torch.float64)
COVARIANCE = 0.4 * 0.8 ** (torch.arange(3.0).double()[:, None] - torch.arange(3.0)).abs()


def posterior(schedule: NoiseSchedule):
    """E[x_0 | x] for x_0 ~ N(MEAN, COVARIANCE) over tokens and x_j = alpha(t_j) x_0j + sigma(t_j) e_j: x (B, 3, 1), t (1, 3, 1)."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        a, s = schedule.alpha(t).flatten(), schedule.sigma(t).flatten()
        seen = torch.outer(a, a) * COVARIANCE + torch.diag(s**2)
        return (MEAN + torch.linalg.solve(seen, (x[..., 0] - a * MEAN).T).T @ (a[:, None] * COVARIANCE))[..., None]

    return denoise


def moments(schedule: NoiseSchedule, t: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Of x_t, t (3,), given x_0 = 1 at the tokens that are known (3,)."""
    a, s, free = schedule.alpha(t), schedule.sigma(t), ~known
    gain = COVARIANCE[free][:, known] @ torch.linalg.inv(COVARIANCE[known][:, known])
    mean, covariance = torch.ones_like(MEAN), torch.zeros_like(COVARIANCE)
    mean[free] = a[free] * (MEAN[free] + gain @ (1 - MEAN[known]))
    within = COVARIANCE[free][:, free] - gain @ COVARIANCE[known][:, free]
    covariance[free.nonzero(), free.nonzero()[:, 0]] = torch.outer(a[free], a[free]) * within + torch.diag(s[free] ** 2)
    return mean, covariance


def error_of(name: str, schedule: NoiseSchedule, matrix: str, steps: int, known: list[bool]) -> float:
    """The largest error of mean and covariance at the end, by the affine map that the sampler is: no Monte Carlo."""
    top = 1.0 if schedule.name != "flow" else 0.98
    t, free = top * spaced(schedule, steps) ** (1 if schedule.name == "edm" else 2), torch.tensor(known).logical_not()
    levels = MATRICES[matrix](t, 3)
    mean, covariance = moments(schedule, levels[0, 0, :, 0], ~free)
    starts = torch.cat([mean[None], mean + torch.diag(free.double())])[..., None]
    table = solver(name, schedule, levels, tokens=free.double()[:, None], **DETERMINISTIC[name])
    out = sample(posterior(schedule), table, starts)[..., 0]
    A, (mean, true) = (out[1:] - out[0]).T, moments(schedule, levels[-1, 0, :, 0], ~free)
    return max(float((out[0] - mean).abs().max()), float((A @ covariance @ A.T - true).abs().max()))


# the moments of splitting are those of a random momentum
CASES = [(name, "vp_linear", "pyramid") for name in DETERMINISTIC if name != "splitting"]
CASES += [(name, "vp_linear", matrix) for name in ("ddim", "dpmpp_2m", "heun") for matrix in MATRICES if matrix != "pyramid"]
CASES += [(name, where, "pyramid") for name in ("ddim", "dpmpp_2m") for where in SCHEDULES if where != "vp_linear"]


@pytest.mark.parametrize(("name", "where", "matrix"), CASES)
def test_correlated_tokens_have_their_moments(name, where, matrix):
    """Four times the steps leave 0.4 of the error at most, 0.25 above the first order, also where a token is known."""
    left, error = (0.4, 0.06) if SOLVERS[name][1] == 1 else (0.25, 0.01)
    few_steps = 24 if name in KEEP_VARIANCE else 12  # expansions in the step want small ones
    for known in ([False] * 3, [False, True, False]):
        few, many = (error_of(name, SCHEDULES[where], matrix, steps, known) for steps in (few_steps, 4 * few_steps))
        assert many < min(left * few, error)
