"""PushT: a round pusher moves a T-shaped block onto its outline.

Simulator: `gym-pusht` (pymunk), after Florence et al. 2021 (Implicit Behavioral Cloning) and Chi et al. 2023 (Diffusion
Policy), https://github.com/huggingface/gym-pusht. World 512 x 512 pixels; an action is the pusher's absolute target
(x, y) in 0..512, followed by a PD law (kp 100, kv 20) at 100 Hz; actions come at 10 Hz.
Observation "state": (agent x, agent y, 9 key points x, y), 20 numbers, as Diffusion Policy's low-dimensional task has
them. gym-pusht itself offers 8 corner points; the 9 points of the recorded demonstrations (`keypoint` of
pusht_cchi_v7_replay) are constants in the block's frame, and `KEYPOINTS` are their medians over the 25,650 recorded
steps (median error 2e-5 pixels, 99 % below 0.04). Image task: "state" is the agent's position alone, "image"
(96, 96, 3) uint8 as gym-pusht draws it.
Reset (gym-pusht, `reset(seed)`): agent uniform over the whole numbers 50..449 in both coordinates, block over
100..399, block angle uniform(-pi, pi). Horizon 300; an episode ends when the coverage passes 0.95.
Reward: clip(coverage / 0.95, 0, 1), coverage the share of the goal area that the block covers. Success: coverage above
0.95. Metric: the mean over episodes of the largest reward (Diffusion Policy's test score). The demonstrators: 0.892 on
the recorded states, which end one step early; played back here 0.946, and 0.971 with the last target held to step 300.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robots.controller import Observation
from robots.tasks.base import BoolArray, Info, Task, TaskSpec, checked_horizon

KEYPOINTS = np.array(
    [
        (9.2698, 90.0410),
        (-60.9835, -1.1867),
        (60.9128, -1.3934),
        (-0.2705, 25.5436),
        (-14.0649, 122.8159),
        (39.0027, 32.8574),
        (-39.9664, 32.7297),
        (-16.8243, 62.8632),
        (23.5415, -1.7003),
    ]
)
"""(9, 2) in the block's frame (origin and axes of its body, pixels)."""
T_SHAPE = np.array([(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)], float)
"""The block's outline (8, 2) in its own frame: gym-pusht's two boxes."""
GOAL = np.array([256.0, 256.0, np.pi / 4])
SIZE = 512
COVERAGE = 0.95


def keypoints(pose: np.ndarray) -> np.ndarray:
    """Key points (..., 9, 2) of block poses (..., 3): x, y, angle in radians."""
    return _placed(KEYPOINTS, np.asarray(pose))


def _placed(points: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Points (k, 2) of the block's frame in the world, (..., k, 2)."""
    c, s = np.cos(pose[..., 2]), np.sin(pose[..., 2])
    rotation = np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)
    return pose[..., None, :2] + np.einsum("...ij,kj->...ki", rotation, points)


def poses(points: np.ndarray) -> np.ndarray:
    """Block poses (..., 3) that fit key points (..., 9, 2) best: rotation and translation of least squares (Kabsch 1976)."""
    middle, own = points.mean(-2), KEYPOINTS.mean(0)
    turned, own_turned = points - middle[..., None, :], KEYPOINTS - own
    cross = (own_turned[:, 0] * turned[..., 1] - own_turned[:, 1] * turned[..., 0]).sum(-1)
    angle = np.arctan2(cross, (own_turned * turned).sum((-2, -1)))
    c, s = np.cos(angle), np.sin(angle)
    offset = np.stack([c * own[0] - s * own[1], s * own[0] + c * own[1]], -1)
    return np.concatenate([middle - offset, angle[..., None]], -1)


def coverage(pose: np.ndarray) -> np.ndarray:
    """The share (n,) of the goal area that blocks at poses (n, 3) cover."""
    import shapely

    block, goal = shapely.polygons(_placed(T_SHAPE, pose)), shapely.polygons(_placed(T_SHAPE, GOAL))
    return shapely.area(shapely.intersection(block, goal)) / shapely.area(goal)


def _get(env: Any) -> tuple[float, ...]:
    """The ten numbers of an environment's motion: agent position, velocity, block position, angle, velocity, spin."""
    agent, block = env.agent, env.block
    return (*agent.position, *agent.velocity, *block.position, block.angle, *block.velocity, block.angular_velocity)


def _put(env: Any, state: Sequence[float]) -> None:
    """Write the numbers of `_get` into an environment that has just been set up."""
    agent, block = env.agent, env.block
    values = [float(value) for value in state]
    agent.position, agent.velocity = (values[0], values[1]), (values[2], values[3])
    # the angle turns the block about its centre of mass and moves its origin, so it comes before the position
    block.angle = values[6]
    block.position = (values[4], values[5])
    block.velocity, block.angular_velocity = (values[7], values[8]), values[9]
    env.space.reindex_shapes_for_body(block)
    env.space.reindex_shapes_for_body(agent)


class PushT(Task):
    """See the module. images: observe 96 x 96 pictures and the agent's position in place of the key points."""

    def __init__(self, images: bool = False, horizon: int | None = None):
        self.images = images
        points = tuple(f"keypoint{k}_{axis}" for k in range(len(KEYPOINTS)) for axis in "xy")
        names = ("agent_x", "agent_y", *(() if images else points))
        self.spec = TaskSpec(
            name="pusht-image" if images else "pusht",
            observation_dim=len(names),
            action_dim=2,
            horizon=checked_horizon(horizon, 300),
            dt=0.1,
            action_low=np.zeros(2),
            action_high=np.full(2, float(SIZE)),
            observation_names=names,
            action_names=("target_x", "target_y"),
            score="max_reward",
            source="gym-pusht; Chi et al. 2023, Diffusion Policy",
            images={"image": (96, 96, 3)} if images else {},
            options={"horizon": checked_horizon(horizon, 300)},
        )
        self._envs: list[Any] = []
        self._done = np.zeros(0, dtype=bool)
        self._drawn: PushT | None = None

    def reset(self, seeds: Sequence[int]) -> Observation:
        self._size(len(seeds))
        for env, seed in zip(self._envs, seeds):
            env.reset(seed=int(seed))
        return self.observation()

    def reset_to(self, states: np.ndarray) -> Observation:
        """Start at states (n, 5): agent x, y, block x, y, angle, as the demonstrations record them; all at rest."""
        self._size(len(states))
        for env, state in zip(self._envs, np.asarray(states, dtype=np.float64)):
            env._setup()
            _put(env, (*state[:2], 0.0, 0.0, *state[2:], 0.0, 0.0, 0.0))
        return self.observation()

    def step(self, actions: np.ndarray) -> tuple[Observation, np.ndarray, BoolArray, Info]:
        n = len(self._envs)
        actions = self._actions(actions, n)
        reward, coverage = np.zeros(n), np.zeros(n)
        contacts = np.zeros(n, dtype=np.int64)
        for i, env in enumerate(self._envs):
            if self._done[i]:
                coverage[i] = env._get_coverage()
                continue
            _, reward[i], self._done[i], _, info = env.step(actions[i])
            coverage[i], contacts[i] = info["coverage"], info["n_contacts"]
        info = {"success": coverage > COVERAGE, "coverage": coverage, "pose": self._poses(), "contacts": contacts}
        return self.observation(), reward, self._done.copy(), info

    def observation(self) -> Observation:
        agents = np.array([tuple(env.agent.position) for env in self._envs]).reshape(-1, 2)
        if self.images:
            pictures = [env._get_img(env._draw(), 96, 96) for env in self._envs]
            return {"state": agents.astype(np.float32), "image": np.array(pictures, dtype=np.uint8)}
        points = keypoints(self._poses()).reshape(len(agents), -1)
        return {"state": np.concatenate([agents, points], axis=1).astype(np.float32)}

    def render(self, i: int = 0) -> NDArray[np.uint8]:
        env = self._envs[i]
        return np.array(env._get_img(env._draw(), SIZE, SIZE, render_action=True), dtype=np.uint8)

    def to_pixels(self, points: np.ndarray) -> np.ndarray:
        return np.asarray(points, dtype=np.float64)

    def rewards(self, states: np.ndarray) -> np.ndarray | None:
        """clip(coverage / 0.95) of the poses that fit the key points; the image task's state does not hold the block."""
        if self.images:
            return None
        return np.clip(coverage(poses(states[:, 2:].reshape(-1, 9, 2).astype(np.float64))) / COVERAGE, 0.0, 1.0)

    def reset_recorded(self, rows: Mapping[str, np.ndarray]) -> Observation:
        observed = rows["observation"]
        block = rows["state"][:, 2:] if "state" in rows else poses(observed[:, 2:].reshape(-1, 9, 2))
        return self.reset_to(np.concatenate([observed[:, :2], block], axis=1))

    def draw(self, state: np.ndarray) -> NDArray[np.uint8] | None:
        """The scene with the block where the key points fit best, and the key points themselves, as they were imagined."""
        if self.images:
            return None
        import cv2

        if self._drawn is None:
            self._drawn = PushT()
        points = state[2:].reshape(9, 2).astype(np.float64)
        self._drawn.reset_to(np.concatenate([state[:2], poses(points)])[None])
        picture = np.ascontiguousarray(self._drawn.render(0))
        for point in np.clip(points, -SIZE, 2 * SIZE).round().astype(int).tolist():
            cv2.circle(picture, point, 5, (214, 60, 50), -1, cv2.LINE_AA)
        return picture

    def snapshot(self) -> Any:
        """Poses and velocities of agents and blocks (n, 10), and who is done.

        The solver's cached contact impulses cannot be copied (pymunk's own copy of a space goes astray). So that this
        copy and a restored one go the same way to the last bit, they are dropped here too.
        """
        states = np.array([_get(env) for env in self._envs]).reshape(-1, 10)
        self.restore((states, self._done))
        return states, self._done.copy()

    def restore(self, snapshot: Any) -> Observation:
        states, done = snapshot
        self._size(len(states))
        self._done = done.copy()
        for env, state in zip(self._envs, states):
            env._setup()
            _put(env, state)
        return self.observation()

    def close(self) -> None:
        for env in self._envs:
            env.close()
        if self._drawn is not None:
            self._drawn.close()
        self._envs, self._drawn = [], None

    def _size(self, n: int) -> None:
        """Have n environments, each set up."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pygame's import warns of pkg_resources
            from gym_pusht.envs.pusht import PushTEnv
        while len(self._envs) < n:
            env = PushTEnv(obs_type="state", render_mode="rgb_array")
            env._setup()
            self._envs.append(env)
        for env in self._envs[n:]:
            env.close()
        self._envs = self._envs[:n]
        self._done = np.zeros(n, dtype=bool)

    def _poses(self) -> np.ndarray:
        """Block poses (n, 3)."""
        return np.array([(*env.block.position, env.block.angle) for env in self._envs]).reshape(-1, 3)
