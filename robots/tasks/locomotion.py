"""Locomotion: a planar cheetah, hopper or walker runs forward as far as it can, and under a roof.

Simulator: MuJoCo with gymnasium's models and its HalfCheetah-v4, Hopper-v4 and Walker2d-v4 (gymnasium/envs/mujoco), step for
step to the last bit; these are Todorov et al. 2012 and Erez et al. 2011's robots with the physics, rewards and ends of the -v2
tasks on which D4RL (Fu et al. 2020) was recorded. (The v5 tasks differ: no reward in the step that falls, and a walker whose
feet have equal friction.) Observation "state": joint positions but the place along the track, then joint velocities, for
hopper and walker clipped to +-10. Action: torques, -1..1 of each motor's gear.
Reset (`reset(seed)`, the same numbers as gymnasium's): joint positions uniform within +-0.005 (cheetah 0.1) of the model's,
velocities uniform within +-0.005 of 0 (cheetah normal of deviation 0.1). Horizon 1000. An episode ends when a hopper's height is
not above 0.7, its angle not within +-0.2 or any other number not within +-100; a walker's height not within 0.8..2, its angle
not within +-1; a cheetah's never. Reward: forward speed, plus 1 a step (not for the cheetah), minus 0.001 |action|^2
(cheetah 0.1), of the action as it is clipped. Success: still up at the end of the horizon.
Metric: D4RL's normalized return, 100 (return - random) / (expert - random), with its reference returns (d4rl/infos.py).

Under a roof (Xiao et al. 2023, "SafeDiffuser"): the height, the first number of the observation, must stay below 1.5
(hopper) or 1.3 m (walker; it starts at 1.25). The roof stops nothing: info["margin"] is the barrier's value, and an episode
violates where it is negative. `Locomotion.barriers` holds it for planners and filters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from pilotwave.errors import UserError, nearest
from robots.barriers import HalfSpace, values
from robots.controller import Observation
from robots.tasks.base import BoolArray, Info, Task, TaskSpec, checked_horizon

_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
_INFINITY = float("inf")


@dataclass(frozen=True)
class Body:
    """A robot's numbers, see the module. frames: simulation steps an action. speed: to which observed velocities are clipped.
    height, angle: of the torso, and bound: of all other numbers, within which it is up. noise: of resets."""

    model: str
    frames: int
    reference: tuple[float, float]
    alive: float = 1.0
    control_cost: float = 1e-3
    speed: float = 10.0
    height: tuple[float, float] = (-_INFINITY, _INFINITY)
    angle: tuple[float, float] = (-_INFINITY, _INFINITY)
    bound: float = _INFINITY
    noise: float = 5e-3
    normal_velocities: bool = False


BODIES: dict[str, Body] = {
    "halfcheetah": Body(
        "half_cheetah.xml", 5, (-280.178953, 12135.0), 0.0, 0.1, speed=_INFINITY, noise=0.1, normal_velocities=True
    ),
    "hopper": Body("hopper.xml", 4, (-20.272305, 3234.3), height=(0.7, _INFINITY), angle=(-0.2, 0.2), bound=100.0),
    "walker2d": Body("walker2d.xml", 4, (1.629008, 4592.3), height=(0.8, 2.0), angle=(-1.0, 1.0)),
}


class Locomotion(Task):
    """See the module. body: a key of BODIES. roof: metres that the height must stay below; None for open sky."""

    def __init__(self, body: str, roof: float | None = None, horizon: int | None = None):
        if body not in BODIES:
            raise nearest("body", str(body), BODIES)
        self.body = BODIES[body]
        path = files("gymnasium").joinpath("envs", "mujoco", "assets", self.body.model)
        self.model = mujoco.MjModel.from_xml_path(str(path))
        joints = [self.model.joint(j).name for j in range(self.model.njnt)]
        horizon = checked_horizon(horizon, 1000)
        motors = [self.model.joint(j).name for j in self.model.actuator_trnid[:, 0]]
        self.spec = TaskSpec(
            name=body if roof is None else f"{body}-roof",
            observation_dim=self.model.nq - 1 + self.model.nv,
            action_dim=self.model.nu,
            horizon=horizon,
            dt=self.model.opt.timestep * self.body.frames,
            action_low=-np.ones(self.model.nu),
            action_high=np.ones(self.model.nu),
            observation_names=(*joints[1:], *(f"{joint}_velocity" for joint in joints)),
            action_names=tuple(f"{motor}_torque" for motor in motors),
            score="normalized_return",
            source="gymnasium's v4 MuJoCo tasks; D4RL (Fu et al. 2020)" + ("" if roof is None else "; SafeDiffuser"),
            reference=self.body.reference,
            barriers=() if roof is None else (HalfSpace([1.0], float(roof), features=[0]),),
            options={"horizon": horizon},
        )  # fmt: skip
        self.barriers = self.spec.barriers
        self._rest = mujoco.MjData(self.model).qpos.copy()
        self._datas: list[Any] = []
        self._down = np.zeros(0, dtype=bool)
        self._steps = np.zeros(0, dtype=np.int64)
        self._renderer: Any = None

    def reset(self, seeds: Sequence[int]) -> Observation:
        self._size(len(seeds))
        return self.restart(np.arange(len(seeds)), seeds)

    def restart(self, copies: np.ndarray, seeds: Sequence[int]) -> Observation:
        """Start new episodes in some copies (k,) alone; the observation is that of all."""
        for i, seed in zip(copies.tolist(), seeds):
            rng, noise = np.random.default_rng(int(seed)), self.body.noise
            position = self._rest + rng.uniform(-noise, noise, self.model.nq)
            normal = self.body.normal_velocities
            velocity = noise * rng.standard_normal(self.model.nv) if normal else rng.uniform(-noise, noise, self.model.nv)
            self._place(i, position, velocity)
        return self.observation()

    def reset_to(self, states: np.ndarray) -> Observation:
        """Start at observations (n, Do), at the place 0 along the track."""
        states = np.asarray(states, dtype=np.float64)
        if states.ndim != 2 or states.shape[1] != self.spec.observation_dim:
            raise UserError(f"{self.spec.name}: states have shape {states.shape}; right is (n, {self.spec.observation_dim})")
        self._size(len(states))
        for i, state in enumerate(states):
            self._place(i, np.concatenate([[0.0], state[: self.model.nq - 1]]), state[self.model.nq - 1 :])
        return self.observation()

    def reset_recorded(self, rows: Mapping[str, np.ndarray]) -> Observation:
        return self.reset_to(rows["observation"])

    def step(self, actions: np.ndarray) -> tuple[Observation, np.ndarray, BoolArray, Info]:
        n, body = len(self._datas), self.body
        actions = self._actions(actions, n)
        reward = np.zeros(n)
        cost = body.control_cost * np.square(actions).sum(1)
        for i in np.flatnonzero(~self._down):
            data = self._datas[i]
            before = data.qpos[0]
            data.ctrl[:] = actions[i]
            mujoco.mj_step(self.model, data, body.frames)
            reward[i] = (data.qpos[0] - before) / self.spec.dt + body.alive - cost[i]
            self._down[i] = not self._up(data)
            self._steps[i] += 1
        observation = self.observation()
        info: Info = {"success": ~self._down & (self._steps >= self.spec.horizon)}
        if self.barriers:
            info["margin"] = values(self.barriers, observation["state"].astype(np.float64)).min(-1)
        return observation, reward, self._down.copy(), info

    def _up(self, data: Any) -> bool:
        """Whether a copy has not fallen."""
        body, height, angle = self.body, data.qpos[1], data.qpos[2]
        up = body.height[0] < height < body.height[1] and body.angle[0] < angle < body.angle[1]
        return bool(up and (abs(data.qpos[2:]) < body.bound).all() and (abs(data.qvel) < body.bound).all())

    def observation(self) -> Observation:
        state = np.empty((len(self._datas), self.spec.observation_dim), dtype=np.float32)
        for i, data in enumerate(self._datas):
            state[i, : self.model.nq - 1] = data.qpos[1:]
            state[i, self.model.nq - 1 :] = np.clip(data.qvel, -self.body.speed, self.body.speed)
        return {"state": state}

    def snapshot(self) -> Any:
        states = np.empty((len(self._datas), mujoco.mj_stateSize(self.model, _STATE)))
        for data, state in zip(self._datas, states):
            mujoco.mj_getState(self.model, data, state, _STATE)
        return states, self._down.copy(), self._steps.copy()

    def restore(self, snapshot: Any) -> Observation:
        states, down, steps = snapshot
        self._size(len(states))
        self._down, self._steps = down.copy(), steps.copy()
        for data, state in zip(self._datas, states):
            mujoco.mj_setState(self.model, data, state, _STATE)
        return self.observation()

    def render(self, i: int = 0) -> NDArray[np.uint8]:
        from robots.video import offscreen

        if self._renderer is None:
            self._renderer = offscreen(self.model, 480, 480) or False
        data = self._datas[i]
        # positions of bodies follow in the next step; a copy's own state must not be touched by drawing
        drawn = mujoco.MjData(self.model)
        drawn.qpos[:], drawn.qvel[:] = data.qpos, data.qvel
        mujoco.mj_forward(self.model, drawn)
        if self._renderer is False:
            return self._draw_side(drawn)
        camera = mujoco.MjvCamera()
        camera.distance, camera.elevation, camera.azimuth = 4.0, -10.0, 90.0
        camera.lookat[:] = drawn.qpos[0], 0.0, 1.0
        self._renderer.update_scene(drawn, camera=camera)
        return self._renderer.render()

    def draw(self, state: np.ndarray) -> NDArray[np.uint8] | None:
        drawn = mujoco.MjData(self.model)
        drawn.qpos[1:] = state[: self.model.nq - 1]
        mujoco.mj_forward(self.model, drawn)
        return self._draw_side(drawn)

    def _draw_side(self, data: Any) -> NDArray[np.uint8]:
        """From the side, drawn: every limb as a thick line, the ground, marks a metre apart, and the roof."""
        import cv2

        scale, picture = 160, np.full((480, 480, 3), 245, dtype=np.uint8)

        def pixel(x: float, z: float) -> list[int]:
            return [round(240 + scale * (x - data.qpos[0])), round(400 - scale * z)]

        cv2.rectangle(picture, (0, 400), (480, 480), (180, 200, 180), -1)
        for mark in range(int(data.qpos[0]) - 3, int(data.qpos[0]) + 4):
            cv2.line(picture, pixel(mark, 0.0), pixel(mark, -0.1), (90, 110, 90), 2, cv2.LINE_AA)
        for barrier in self.barriers:
            assert isinstance(barrier, HalfSpace)
            cv2.line(picture, (0, pixel(0.0, barrier.offset)[1]), (480, pixel(0.0, barrier.offset)[1]), (220, 60, 50), 2)
        for geom in range(1, self.model.ngeom):
            radius, half = self.model.geom_size[geom, :2]
            along = half * data.geom_xmat[geom].reshape(3, 3)[:, 2]
            ends = [data.geom_xpos[geom] + side * along for side in (-1, 1)]
            first, second = (pixel(end[0], end[2]) for end in ends)
            cv2.line(picture, first, second, (200, 130, 90), round(2 * scale * radius), cv2.LINE_AA)
        return picture

    def close(self) -> None:
        if self._renderer:
            self._renderer.close()
        self._renderer = None

    def _place(self, i: int, position: np.ndarray, velocity: np.ndarray) -> None:
        data = self._datas[i]
        mujoco.mj_resetData(self.model, data)
        data.qpos[:], data.qvel[:] = position, velocity
        mujoco.mj_forward(self.model, data)
        self._down[i], self._steps[i] = False, 0

    def _size(self, n: int) -> None:
        while len(self._datas) < n:
            self._datas.append(mujoco.MjData(self.model))
        del self._datas[n:]
        self._down, self._steps = np.zeros(n, dtype=bool), np.zeros(n, dtype=np.int64)
