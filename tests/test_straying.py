"""How far robots stray from planned paths: the distance in closed form, and the measurement where it is known."""

from __future__ import annotations

import numpy as np
import pytest

import robots
from pilotwave.errors import UserError
from robots import Chunk, PDTracker
from robots.straying import distance, straying


def test_the_distance_to_a_path_is_that_to_its_nearest_place():
    path = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 1.0]])  # a corner, with a place given twice
    points = np.array([[1.0, 0.5], [2.0, -3.0], [5.0, 0.5], [-3.0, 4.0], [2.0, 1.0], [1.8, 0.3]])
    np.testing.assert_allclose(distance(points, np.repeat(path[None], len(points), 0)), [0.5, 3.0, 3.0, 5.0, 0.0, 0.2], atol=1e-12)


class Beside:
    """Has every robot stand, and says that its path leads straight on, `off` metres beside it."""

    replan_every, history, evaluations = 5, 1, 1

    def __init__(self, off: float | None) -> None:
        spec = robots.make("pointmaze-umaze").spec
        self.off, self.tracker = off, PDTracker(10.0, 1.0, slice(0, 2), slice(2, 4), spec.action_low, spec.action_high)

    def reset(self, n: int) -> None:
        self.starts: np.ndarray | None = None

    def act(self, history, step):
        state = history["state"][:, -1].astype(np.float64)
        self.starts = state[:, :2] if self.starts is None else self.starts
        rest = np.concatenate([self.starts, np.zeros_like(self.starts)], 1)
        path = None
        if self.off is not None:
            path = self.starts[:, None] + np.array([[-1.0, self.off], [1.0, self.off]])
        return Chunk(np.repeat(rest[:, None], 2, 1), dt=0.1, plan=path)


def test_robots_that_stand_beside_their_paths_stray_by_that_much():
    metres = straying(robots.make("pointmaze-umaze", horizon=30), Beside(0.4), 3)
    assert len(metres) == 3 * 30
    np.testing.assert_allclose(metres, 0.4, atol=0.02)  # the initial velocity carries them a little


def test_what_plans_no_paths_is_refused():
    with pytest.raises(UserError, match="plans no paths"):
        straying(robots.make("pointmaze-umaze", horizon=3), Beside(None), 1)
