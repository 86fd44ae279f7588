"""The filter keeps an exact double integrator out of obstacles whatever is commanded, and changes nothing needlessly."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotwave.errors import UserError
from robots.barriers import Complement, HalfSpace, Sum, Superellipse, from_rows, values
from robots.safety_filter import LinearModel, SafetyFilter


def ball(dt=0.01, damping=0.25, force=24.0, d=2):
    """A mass with damping, pushed in d directions, as MuJoCo's Euler steps it."""
    slow = 1 / (1 + damping * dt)
    eye, none = np.eye(d), np.zeros((d, d))
    A = np.block([[eye, dt * slow * eye], [none, slow * eye]])
    B = np.concatenate([dt * dt * slow * force * eye, dt * slow * force * eye])
    return LinearModel(A, B, dt, -np.ones(d), np.ones(d), slice(0, d), slice(d, 2 * d))


def obstacles(rng, n, K, speed):
    shape = [rng.uniform(-3, 3, (n, K, 2)), rng.uniform(0.3, 1.0, (n, K, 2)), rng.choice([2.0, 4.0], (n, K, 1))]
    return np.concatenate([*shape, speed * rng.uniform(-1, 1, (n, K, 2))], -1)


def drive(model, filter, rows, state, wanted, steps):
    """Steps through moving hazards: the smallest barrier, the states and the actions on the way."""
    smallest = np.inf
    for k in range(steps):
        u = filter({"state": state, "hazards": rows}, wanted(k, state))
        assert (np.abs(u) <= 1 + 1e-9).all()
        state = state @ model.A.T + u @ model.B.T
        rows[..., :2] += model.dt * rows[..., 5:]
        smallest = min(smallest, values(from_rows(rows), state).min())
    return smallest, state


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_random_commands_never_lead_into_random_obstacles(seed):
    rng, model = np.random.default_rng(seed), ball()
    rows, state = obstacles(rng, 40, 4, 0.0), np.zeros((40, 4))
    state[:, :2] = rng.uniform(-3, 3, (40, 2))
    clear = (values(from_rows(rows), state) > 0.05).all(-1)
    rows, state = rows[clear], state[clear]
    target = rng.uniform(-4, 4, (4, len(state), 2))
    filter = SafetyFilter(model, margin=0.01)

    def wanted(k, s):
        return 5 * (target[k // 50] - s[:, :2]) - 0.5 * s[:, 2:] + rng.normal(size=(len(s), 2))

    smallest, _ = drive(model, filter, rows, state, wanted, 200)
    assert smallest >= 0.01 - 1e-6
    assert filter.infeasible.sum() == 0
    assert filter.changed.sum() > 0


def test_one_moving_obstacle_is_kept_away_from():
    rng, model = np.random.default_rng(0), ball()
    rows = obstacles(rng, 30, 1, 0.7)
    state = np.concatenate([rng.uniform(-3, 3, (30, 2)), np.zeros((30, 2))], 1)
    clear = (values(from_rows(rows), state) > 0.1).all(-1)
    filter = SafetyFilter(model)
    smallest, _ = drive(model, filter, rows[clear], state[clear], lambda k, s: -5 * s[:, :2], 300)
    assert smallest >= 0.01 - 1e-6


def test_actions_far_from_obstacles_pass_unchanged():
    rows = obstacles(np.random.default_rng(0), 5, 2, 0.0)
    rows[..., 0] += 100
    actions = np.random.default_rng(1).uniform(-1, 1, (5, 2))
    filter = SafetyFilter(ball())
    np.testing.assert_array_equal(filter({"state": np.zeros((5, 4)), "hazards": rows}, actions), actions)
    assert (filter.changed == 0).all()


def test_the_change_is_the_least_one():
    """Against a dense search over the actions, where one obstacle is close."""
    model, rng = ball(), np.random.default_rng(2)
    rows = np.array([[[1.0, 0.0, 0.8, 0.8, 2.0, 0.0, 0.0]]])
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 81)] * 2), -1).reshape(-1, 2)
    filter = SafetyFilter(model)
    for _ in range(5):
        state = np.concatenate([[0.0], rng.uniform(-0.3, 0.3, 1), rng.uniform(1.5, 2.2, 1), rng.uniform(-1, 1, 1)])[None]
        wanted = np.array([[1.0, rng.uniform(-1, 1)]])
        drift = np.repeat(state @ model.A.T, len(grid), 0)
        after = filter._after(np.repeat(rows, len(grid), 0), drift, grid)[0]
        allowed = (after >= filter.margin).all(-1)
        if not allowed.any():
            continue
        filter.reset(1)
        u = filter({"state": state, "hazards": rows}, wanted)
        nearest = np.linalg.norm(grid[allowed] - wanted, axis=1).min()
        assert np.linalg.norm(u - wanted) <= nearest + 0.02


def test_a_state_past_saving_pushes_off_and_is_reported():
    rows = np.array([[[1.0, 0.0, 0.8, 0.8, 2.0, 0.0, 0.0]]])
    state = np.array([[0.1, 0.0, 5.0, 0.0]])
    filter = SafetyFilter(ball())
    u = filter({"state": state, "hazards": rows}, np.array([[1.0, 0.0]]))
    assert u[0, 0] == -1.0
    assert filter.infeasible.tolist() == [1]


def test_walls_of_three_dimensions_hold():
    """Three constant barriers and three actions, more active at once than the closed form covers."""
    model = ball(d=3)
    walls = [HalfSpace(axis, 1.0, features=slice(0, 3)) for axis in np.eye(3)]
    filter, state = SafetyFilter(model, walls), np.zeros((2, 6))
    for _ in range(150):
        state = state @ model.A.T + filter({"state": state}, np.ones((2, 3))) @ model.B.T
    assert values(walls, state).min() >= 0.01 - 1e-6
    assert values(walls, state).max() < 0.05


def test_gamma_slows_the_approach():
    rows = np.array([[[2.0, 0.0, 0.8, 0.8, 2.0, 0.0, 0.0]]])
    ends = []
    for gamma in (0.02, 1.0):
        filter = SafetyFilter(ball(), gamma=gamma)
        ends.append(drive(ball(), filter, rows.copy(), np.zeros((1, 4)), lambda k, s: np.ones((1, 2)) * (1, 0), 60)[1])
    assert ends[0][0, 0] < ends[1][0, 0] - 0.02


def test_identified_models_are_the_true_ones():
    model, rng = ball(), np.random.default_rng(0)
    states, actions = rng.normal(size=(50, 4)), rng.uniform(-1, 1, (50, 2))
    found = LinearModel.identify(states, actions, states @ model.A.T + actions @ model.B.T, model.dt, model.low, model.high)
    np.testing.assert_allclose(found.A, model.A, atol=1e-9)
    np.testing.assert_allclose(found.B, model.B, atol=1e-9)
    assert found.deceleration == pytest.approx(24.0, rel=0.01)


def test_a_steady_force_that_the_model_does_not_know_is_held():
    """Half the limit pushes towards the obstacle, as a wall or the wind would."""
    model = ball()
    rows = np.array([[[1.0, 0.0, 0.8, 0.8, 2.0, 0.0, 0.0]]])
    filter, state, smallest = SafetyFilter(model, margin=0.02), np.zeros((1, 4)), np.inf
    wind = np.array([[0.5, 0.0]]) @ model.B.T
    for _ in range(200):
        u = filter({"state": state, "hazards": rows}, np.array([[0.3, 0.2]]))
        state = state @ model.A.T + u @ model.B.T + wind
        smallest = min(smallest, values(from_rows(rows), state).min())
    assert smallest > 0.0


@pytest.mark.parametrize("d", [2, 3])
def test_speed_limits_hold_beside_walls(d):
    """A speed limit, another for one direction, a wall, and a limit that falls towards it, whatever is commanded."""
    model, rng, n = ball(d=d), np.random.default_rng(d), 8
    disc = Superellipse(np.zeros(d), np.ones(d), features=slice(d, 2 * d))
    wall = HalfSpace(np.eye(d)[1], 1.0, features=slice(0, d))
    slow = Complement(disc, features=disc.features)
    near = Sum([HalfSpace(np.eye(d)[1], 0.6, features=slice(0, d)), slow])  # 0.6 m/s at the wall
    held = [slow, HalfSpace([1.0], 0.4, features=[d]), wall, near]
    filter, state, target = SafetyFilter(model, held), np.zeros((n, 2 * d)), rng.uniform(-3, 3, (n, d))
    fastest = 0.0
    for k in range(150):
        target = rng.uniform(-3, 3, (n, d)) if k % 50 == 49 else target
        wanted = (5 * (target - state[:, :d]) - 0.5 * state[:, d:]).clip(-1, 1)
        state = state @ model.A.T + filter({"state": state}, wanted) @ model.B.T
        assert values(held, state).min() >= 0.01 - 1e-6
        fastest = max(fastest, np.linalg.norm(state[:, d:], axis=1).max())
    assert filter.infeasible.sum() == 0
    assert fastest > 0.9  # and no slower than it must be


def test_a_robot_that_is_too_fast_already_slows_down():
    model = ball()
    disc = Superellipse(np.zeros(2), np.ones(2), features=slice(2, 4))
    filter, state = SafetyFilter(model, [Complement(disc, features=disc.features)]), np.array([[0.0, 0.0, 1.5, 0.0]])
    for _ in range(5):
        state = state @ model.A.T + filter({"state": state}, np.array([[1.0, 0.0]])) @ model.B.T
    assert 0.9 < state[0, 2] <= 0.99 + 1e-6
    assert 0 < filter.infeasible[0] < 5


@pytest.mark.parametrize(
    ("barrier", "options", "said"),
    [
        (HalfSpace([1.0], 1.0, features=[4]), {}, "the filter's model moves"),
        (HalfSpace([1.0], 1.0, features=[2], velocity=[1.0]), {}, "on velocities moves"),
        (HalfSpace([1.0], 1.0, features=[0]), {"margin": float("nan")}, "filter.margin is nan"),
        (HalfSpace([1.0], 1.0, features=[0]), {"margin": -0.1}, "at least 0"),
        (HalfSpace([1.0], 1.0, features=[0]), {"gamma": 1.5}, "filter.gamma"),
        (HalfSpace([1.0], 1.0, features=[0]), {"reserve": 0.0}, "filter.reserve"),
    ],
)
def test_what_the_filter_cannot_hold_is_refused(barrier, options, said):
    with pytest.raises(UserError, match=said):
        SafetyFilter(replace(ball(), A=np.eye(5)), [barrier], **options)
