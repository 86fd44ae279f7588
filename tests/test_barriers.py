"""Barriers: values and gradients against independent ones, on arrays and tensors; programs and projections against
scipy's; whatever is projected satisfies every barrier or is reported."""

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from pilotwave.errors import UserError
from robots.barriers import (
    Box,
    Complement,
    Custom,
    Grid,
    HalfSpace,
    Polygon,
    Separation,
    Sum,
    Superellipse,
    build,
    from_rows,
    least_change,
    limits,
    project,
    values,
)

CORNERS = [(0, 0), (2, 0), (2, 2), (1, 0.5), (0, 2)]
NODES = np.stack(np.meshgrid(np.arange(31) * 0.1, np.arange(31) * 0.1, indexing="ij"), -1)
SHAPES = {
    "ellipse": Superellipse((1.0, 2.0), (1.0, 0.5)),
    "quartic": Superellipse((1.0, 2.0), (1.0, 1.0), 4.0),
    "moving": Superellipse((1.0, 0.0), (0.6, 0.9), 3.0, features=[1, 3], velocity=(0.3, -0.2)),
    "box": Box((0.0, 0.0), (1.0, 2.0)),
    "polygon": Polygon(CORNERS),
    "polygon, clockwise": Polygon(CORNERS[::-1]),
    "half-space": HalfSpace((1.0, 2.0), 0.5),
    "speed": Complement(Superellipse((0.0, 0.0), (3.0, 3.0)), features=slice(2, 4)),
    "separation": Separation(0.5),
    "grid": Grid(np.linalg.norm(NODES - 1.5, axis=-1) - 0.5, (0.0, 0.0), 0.1),
    "joint limit": limits((-1.0, -0.5), (1.0, 2.0), slice(1, 3))[1],
    "sum": Sum([HalfSpace((1.0, 0.0), 2.0), Superellipse((0.0, 0.0), (1.0, 0.5), features=[1, 3])], [1.0, 2.5]),
    "custom": Custom(lambda p: (p * p).sum(-1) - 1.0),
}


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), time=st.floats(0, 2))
def test_gradients_match_finite_differences_and_autograd(name, seed, time):
    barrier, x = SHAPES[name], np.random.default_rng(seed).uniform(-1, 3, (20, 4))
    _, gradient = barrier.both(x, time)
    step = 1e-6
    shift = step * np.eye(4)
    numeric = np.stack([(barrier.value(x + s, time) - barrier.value(x - s, time)) / (2 * step) for s in shift], -1)
    # a kink of the distance may lie between the two points; there the slopes to either side differ
    smooth = np.abs(barrier.value(x + step, time) + barrier.value(x - step, time) - 2 * barrier.value(x, time)) < 1e-9
    np.testing.assert_allclose(gradient[smooth], numeric[smooth], atol=1e-5)
    tensor = torch.tensor(x, requires_grad=True)
    if name != "custom":
        barrier.value(tensor, time).sum().backward()
        np.testing.assert_allclose(tensor.grad, gradient, atol=1e-9)
    np.testing.assert_allclose(barrier.value(torch.tensor(x), time), barrier.value(x, time), atol=1e-12)
    np.testing.assert_allclose(barrier.gradient(torch.tensor(x), time), gradient, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in ("custom", "grid")])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_step_changes_the_value_by_no_more_than_its_length(name, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(-2, 4, (2, 50, 4))
    change = np.abs(SHAPES[name].value(x) - SHAPES[name].value(y))
    longest = np.sqrt(2) if name == "separation" else 1.0
    assert (change <= longest * np.linalg.norm(x - y, axis=1) + 1e-12).all()


def test_distances_agree_with_shapely():
    x = np.random.default_rng(0).uniform(-1, 3, (200, 2))
    for barrier, shape in ((Polygon(CORNERS), shapely.Polygon(CORNERS)), (Box((0, 0), (1, 2)), shapely.box(0, 0, 1, 2))):
        points = shapely.points(x)
        signed = shapely.distance(points, shape) - shapely.distance(points, shape.exterior) * shapely.contains(shape, points)
        np.testing.assert_allclose(barrier.value(x), signed, atol=1e-12)


def test_superellipse_has_safediffusers_set_and_never_more_than_the_distance():
    rng = np.random.default_rng(1)
    x, angle = rng.uniform(-2, 4, (500, 2)), np.linspace(0, 2 * np.pi, 2001)
    for power in (2.0, 4.0):
        barrier = Superellipse((1.0, 0.5), (1.0, 0.6), power)
        published = (((x - (1.0, 0.5)) / (1.0, 0.6)) ** power).sum(1) - 1
        np.testing.assert_array_equal(barrier.value(x) > 0, published > 0)
        c, s = np.cos(angle), np.sin(angle)
        outline = np.stack([np.sign(c) * np.abs(c) ** (2 / power), np.sign(s) * np.abs(s) ** (2 / power)], -1)
        outline = (1.0, 0.5) + outline * (1.0, 0.6)
        np.testing.assert_allclose(barrier.value(outline), 0, atol=1e-9)
        distance = np.linalg.norm(x[:, None] - outline, axis=-1).min(1)
        assert (barrier.value(x) <= distance + 1e-9).all()
    value, gradient = Superellipse((1.0, 0.5), (1.0, 0.6)).both(np.array([[1.0, 0.5]]))
    assert value[0] == pytest.approx(-0.6)
    assert np.linalg.norm(gradient) > 0.5  # a way out of the very middle


def test_rows_are_one_set_for_each_robot_and_move():
    rows = np.zeros((3, 2, 7))
    rows[..., 0] = np.arange(6).reshape(3, 2)
    rows[..., 2:4], rows[..., 4], rows[..., 5] = 0.5, 2.0, 1.0
    path = np.zeros((3, 5, 4))
    b = values(from_rows(rows), path, np.arange(5.0))
    np.testing.assert_allclose(b, np.abs(rows[:, None, :, 0] + np.arange(5.0)[None, :, None]) - 0.5)


def test_limits_leave_out_what_is_unbounded():
    x = np.array([[0.5, 2.0, -4.0]])
    b = values(limits((-1.0, -np.inf), (1.0, 3.0), slice(1, 3)), x)
    np.testing.assert_allclose(b, [[-1.0, 3.0, 7.0]])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(1, 4), K=st.integers(1, 5))
def test_least_change_is_the_quadratic_programs_solution(seed, d, K):
    rng = np.random.default_rng(seed)
    target, G = rng.normal(size=d), rng.normal(size=(K, d))
    h = G @ rng.normal(size=d) - rng.uniform(0, 1, K)  # feasible
    y, feasible = least_change(target[None], G[None], h[None])
    assert feasible.all()
    assert (G @ y[0] >= h - 1e-6).all()
    other = minimize(
        lambda v: ((v - target) ** 2).sum(), np.zeros(d), jac=lambda v: 2 * (v - target), method="SLSQP",
        constraints={"type": "ineq", "fun": lambda v: G @ v - h, "jac": lambda v: G}, options={"ftol": 1e-12},
    )  # fmt: skip
    if other.success:
        np.testing.assert_allclose(y[0], other.x, atol=1e-4)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_least_change_reports_what_has_no_solution(d):
    unit = np.eye(d)[0]
    G, h = np.stack([unit, -unit, unit])[None], np.array([[1.0, 1.0, 0.0]])
    assert not least_change(np.zeros((1, d)), G, h)[1].any()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["array", "tensor"]), margin=st.floats(0, 0.2))
def test_projected_trajectories_are_safe_or_reported(seed, kind, margin):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, 16, 6)).cumsum(1) * 0.5 + rng.normal(size=(3, 16, 6))
    rows = np.concatenate([rng.uniform(-2, 2, (3, 3, 2)), rng.uniform(0.3, 1.5, (3, 3, 2))], -1)
    rows = np.concatenate([rows, rng.choice([2.0, 4.0], (3, 3, 1)), rng.normal(size=(3, 3, 2))], -1)
    barriers = [
        *from_rows(rows),
        Polygon(CORNERS),
        HalfSpace((0.0, 1.0), 4.0),
        Complement(Superellipse((0.0, 0.0), (1.5, 1.5)), features=slice(2, 4)),
    ]
    time = np.arange(16) * 0.1
    given = x if kind == "array" else torch.tensor(x)
    y, safe = project(given, barriers, margin, time)
    worst = values(barriers, y, time).min(-1) if kind == "array" else values(barriers, y, time).amin(-1).numpy()
    assert (worst[np.asarray(safe)] >= margin - 1e-5).all()
    assert (worst[~np.asarray(safe)] < margin).all()
    assert np.asarray(safe).mean() > 0.5
    np.testing.assert_array_equal(np.asarray(y)[..., 4:], x[..., 4:])  # features that no barrier reads
    untouched = (values(barriers, x, time) >= margin + 1e-5).all(-1)
    np.testing.assert_array_equal(np.asarray(y)[untouched], x[untouched])


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), margin=st.floats(0, 0.2), time=st.floats(0, 2))
def test_states_projected_to_each_shape_are_safe_or_reported(name, seed, margin, time):
    x = np.random.default_rng(seed).uniform(-1, 3, (40, 4))
    y, safe = project(x, [SHAPES[name]], margin, time)
    b = SHAPES[name].value(y, time)
    assert (b[safe] >= margin - 1e-5).all()
    assert (b[~safe] < margin).all()
    assert safe.mean() > 0.9


def test_the_projection_is_close_to_the_nearest_safe_point():
    """Of convex obstacles in float32, against a search over their outlines."""
    rng = np.random.default_rng(3)
    barrier = Superellipse((0.0, 0.0), (1.0, 1.0), 4.0)
    x = rng.uniform(-0.9, 0.9, (30, 2)).astype(np.float32)
    y, safe = project(x, [barrier])
    assert y.dtype == np.float32
    assert safe.all()
    angle = np.linspace(0, 2 * np.pi, 20001)
    c, s = np.cos(angle), np.sin(angle)
    outline = np.stack([np.sign(c) * np.abs(c) ** 0.5, np.sign(s) * np.abs(s) ** 0.5], -1)
    nearest = np.linalg.norm(x[:, None] - outline, axis=-1).min(1)
    assert (np.linalg.norm(y - x, axis=1) <= 1.25 * nearest).all()


def test_what_cannot_be_made_safe_is_reported():
    inside_two = [HalfSpace((1.0, 0.0), -1.0), HalfSpace((-1.0, 0.0), -1.0)]  # x <= -1 and x >= 1
    _, safe = project(np.zeros((2, 3, 2)), inside_two)
    assert not safe.any()


def test_barriers_from_settings():
    box = {"shape": "box", "low": [0, 0], "high": [1, 2]}
    grid = {"shape": "grid", "values": [[-1.0, 1.0], [-1.0, 1.0]], "origin": [0, 0], "spacing": 2.0}
    both = {"shape": "sum", "terms": [{"shape": "half_space", "normal": [1], "offset": 1, "features": [k]} for k in (0, 2)]}
    barriers = build([{**box, "features": [0, 2]}, {**box, "inside": True}, grid, {**both, "weights": [1, 3]}], 3)
    np.testing.assert_allclose(values(barriers, np.array([[2.0, 9.0, -1.0]]))[0, 3], (-1 + 3 * 2) / 4)
    np.testing.assert_allclose(values(barriers, np.array([[2.0, 9.0, 1.0]]))[0, 0], 1.0)
    np.testing.assert_allclose(values(barriers, np.array([[0.5, 0.2, 0.0]]))[0, 1], 0.2)
    np.testing.assert_allclose(values(barriers, np.array([[1.0, 1.5, 0.0]]))[0, 2], 0.5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("box", "a list such as"),
        (["box"], "is written as"),
        ([{"shape": "bx"}], "did you mean 'box'"),
        ([{"shape": "box", "low": [0, 0], "hgh": [1, 1]}], "did you mean 'high'"),
        ([{"shape": "half_space"}], "missing"),
        ([{"shape": "box", "low": [3, 0], "high": [1, 1]}], "low must be below high"),
        ([{"shape": "box", "low": [0], "high": [1, 1]}], "2 of them"),
        ([{"shape": "box", "low": [float("nan"), 0], "high": [1, 1]}], "2 of them"),
        ([{"shape": "box", "low": [0, 0], "high": [1, 1], "inside": "no"}], "true or false"),
        ([{"shape": "box", "low": [0, 0], "high": [1, 1], "features": [0, 4]}], "from 0 to 3"),
        ([{"shape": "box", "low": [0, 0], "high": [1, 1], "features": [1, 1]}], "each once"),
        ([{"shape": "box", "low": [], "high": [], "features": []}], "at least one"),
        ([{"shape": "box", "low": [0, 0], "high": [1, 1], "velocity": [1]}], "velocity"),
        ([{"shape": "superellipse", "center": [0, 0], "radii": [1, 0]}], "above 0"),
        ([{"shape": "superellipse", "center": [0, 0], "radii": [1, 1], "power": 1}], "at least 2"),
        ([{"shape": "polygon", "vertices": [[0, 0], [1, 0]]}], "3 vertices"),
        ([{"shape": "polygon", "vertices": [[0, 0], [1, 0], [1, 0], [0, 1]]}], "unlike the next"),
        ([{"shape": "polygon", "vertices": [[0, 0], [1, 0], [0]]}], "finite numbers"),
        ([{"shape": "polygon", "vertices": 3}], "fit together"),
        ([{"shape": "grid", "values": [[1, 1]], "origin": [0, 0], "spacing": 1}], "at least 2 nodes"),
        ([{"shape": "grid", "values": [[1, 1], [1]], "origin": [0, 0], "spacing": 1}], "fit together"),
        ([{"shape": "grid", "values": [[1, 1], [1, 1]], "origin": [0, 0], "spacing": 0}], "spacing above 0"),
        ([{"shape": "half_space", "normal": [0, 0], "offset": 1}], "point somewhere"),
        ([{"shape": "half_space", "normal": [1, 0], "offset": "far"}], "a finite number"),
        ([{"shape": "sum", "terms": []}], "at least one term"),
        ([{"shape": "sum", "terms": [{"shape": "bx"}]}], "did you mean 'box'"),
        ([{"shape": "sum", "terms": [{"shape": "half_space", "normal": [1, 0], "offset": 1}], "weights": [0]}], "above 0"),
        ([{"shape": "separation", "distance": 0.5, "features": [0, 1, 2]}], "two halves"),
    ],
)
def test_barriers_that_cannot_be_are_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        build(wrong, 4)
