"""Adroit door: a 24-joint hand turns a latch and opens a door.

Simulator: gymnasium-robotics' AdroitHandDoor-v1 (Rajeswaran et al. 2018, "Learning Complex Dexterous Manipulation with
Deep Reinforcement Learning and Demonstrations"; D4RL's door), MuJoCo, 5 steps of 2 ms an action. Observation (39):
hand joints (27), latch, door hinge, palm (3), handle (3), palm minus handle (3), door open (+-1). Action (28): actuator
targets, -1..1 over each actuator's range; recorded actions pass these limits and are clipped here as there.
Reset (`reset(seed)`): hand and door at rest in the model's initial pose, the door frame at uniform x -0.3..-0.2,
y 0.25..0.35, z 0.252..0.35. Horizon 200 (as registered there and in D4RL); no early end. Reward: D4RL's,
-0.1 |palm - handle| - 0.1 (hinge - 1.57)^2 - 1e-5 |qvel|^2, plus 2, 8 and 10 with the hinge past 0.2, 1.0 and 1.35 rad
(gymnasium-robotics 1.2.1 to 1.4.2 has the first term's sign wrong, 0.3 to 0.5 normalized points too many; the recorded
rewards agree with D4RL's). Success: the hinge at 1.35 rad or more. Metric: D4RL's normalized return, the mean of
100 (return - random) / (expert - random) with random -56.512833, expert 2880.5693087298737 (D4RL, d4rl/infos.py).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from pilotwave.errors import UserError
from robots.controller import Observation
from robots.tasks.base import BoolArray, Info, Task, TaskSpec, checked_horizon

REFERENCE = (-56.512833, 2880.5693087298737)
OPEN = 1.35
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION


def door_reward(observation: np.ndarray, velocity: np.ndarray) -> float:
    """D4RL's dense reward of an observation (39,) and joint velocities (30,)."""
    hinge, reach = observation[28], observation[35:38]
    bonus = 2.0 * (hinge > 0.2) + 8.0 * (hinge > 1.0) + 10.0 * (hinge > OPEN)
    cost = 0.1 * np.linalg.norm(reach) + 0.1 * (hinge - 1.57) ** 2 + 1e-5 * velocity @ velocity
    return float(bonus - cost)


class AdroitDoor(Task):
    """See the module. One model serves all copies; each has its own `MjData` and door position, swapped in to step."""

    def __init__(self, horizon: int | None = None):
        # its import prints a notice about the dense reward, which is not used here (see the module)
        with contextlib.redirect_stderr(io.StringIO()):
            from gymnasium_robotics.envs.adroit_hand.adroit_door import DEFAULT_CAMERA_CONFIG, AdroitHandDoorEnv

        self._env = AdroitHandDoorEnv(reward_type="sparse")
        model = self._env.model
        self._camera_config = DEFAULT_CAMERA_CONFIG
        joints = [model.joint(j).name for j in range(model.njnt)]
        xyz = ("x", "y", "z")
        names = (
            *joints[1:-2],
            "latch",
            "door_hinge",
            *(f"palm_{a}" for a in xyz),
            *(f"handle_{a}" for a in xyz),
            *(f"palm_to_handle_{a}" for a in xyz),
            "door_open",
        )
        self.spec = TaskSpec(
            name="adroit-door",
            observation_dim=39,
            action_dim=28,
            horizon=checked_horizon(horizon, 200),
            dt=float(self._env.dt),
            action_low=-np.ones(28),
            action_high=np.ones(28),
            observation_names=names,
            action_names=tuple(model.actuator(a).name for a in range(model.nu)),
            score="normalized_return",
            source="gymnasium-robotics AdroitHandDoor-v1; Rajeswaran et al. 2018; D4RL",
            reference=REFERENCE,
            options={"horizon": checked_horizon(horizon, 200)},
        )
        self._datas: list[Any] = []
        self._doors = np.zeros((0, 3))
        self._last = np.zeros((0, 39))
        self._renderer: Any = None

    def reset(self, seeds: Sequence[int]) -> Observation:
        self._size(len(seeds))
        for i, seed in enumerate(seeds):
            self._env.data = self._datas[i]
            self._last[i], _ = self._env.reset(seed=int(seed))
            self._doors[i] = self._model_door
        return self.observation()

    def reset_from(self, initial_states: Mapping[str, np.ndarray]) -> Observation:
        """Start n episodes from recorded states: {"qpos": (n, 30), "qvel": (n, 30), "door_body_pos": (n, 3)}."""
        states = {key: np.asarray(value, dtype=np.float64) for key, value in initial_states.items()}
        widths = {"qpos": 30, "qvel": 30, "door_body_pos": 3}
        for key, width in widths.items():
            if key not in states or states[key].shape != (len(states["qpos"]), width):
                found = states[key].shape if key in states else "nothing"
                raise UserError(f"adroit-door: initial state '{key}' has {found}; right is (n, {width})")
        self._size(len(states["qpos"]))
        for i in range(len(self._datas)):
            self._env.data = self._datas[i]
            self._env.reset(seed=0)
            self._env.set_env_state({key: states[key][i] for key in widths})
            self._last[i], self._doors[i] = self._env._get_obs(), self._model_door
        return self.observation()

    def step(self, actions: np.ndarray) -> tuple[Observation, np.ndarray, BoolArray, Info]:
        n = len(self._datas)
        actions = self._actions(actions, n)
        reward = np.zeros(n)
        for i in range(n):
            self._select(i)
            self._last[i] = self._env.step(actions[i])[0]
            reward[i] = door_reward(self._last[i], self._env.data.qvel)
        hinge = self._last[:, 28].copy()
        return self.observation(), reward, np.zeros(n, dtype=bool), {"success": hinge >= OPEN, "door_angle": hinge}

    def observation(self) -> Observation:
        return {"state": self._last.astype(np.float32)}

    def snapshot(self) -> Any:
        model = self._env.model
        states = np.empty((len(self._datas), mujoco.mj_stateSize(model, _STATE)))
        for data, state in zip(self._datas, states):
            mujoco.mj_getState(model, data, state, _STATE)
        return states, self._doors.copy()

    def restore(self, snapshot: Any) -> Observation:
        states, doors = snapshot
        self._size(len(states))
        self._doors = doors.copy()
        for i, state in enumerate(states):
            self._select(i)
            mujoco.mj_setState(self._env.model, self._env.data, state, _STATE)
            mujoco.mj_forward(self._env.model, self._env.data)
            # the forward pass moved the solver's warm start
            mujoco.mj_setState(self._env.model, self._env.data, state, _STATE)
            self._last[i] = self._env._get_obs()
        return self.observation()

    def render(self, i: int = 0) -> NDArray[np.uint8]:
        from robots.video import offscreen

        if self._renderer is None:
            self._env.model.vis.quality.shadowsize = 1024
            self._renderer = offscreen(self._env.model, 480, 480) or False
        self._select(i)
        if self._renderer is False:
            return self._draw_top()
        camera = mujoco.MjvCamera()
        for key, value in self._camera_config.items():
            setattr(camera, key, value)
        self._renderer.update_scene(self._env.data, camera=camera)
        return self._renderer.render()

    def _draw_top(self) -> NDArray[np.uint8]:
        """From above, drawn: the door as a line from its hinge past the handle, the handle, and the hand's bodies."""
        import cv2

        model, data = self._env.model, self._env.data
        hinge = data.xanchor[model.joint("door_hinge").id][:2]
        handle = data.site_xpos[self._env.handle_site_id][:2]
        middle, scale = self._model_door[:2] - (0.0, 0.25), 480 / 1.4

        def pixel(point: np.ndarray) -> list[int]:
            return [round(240 + scale * (point[0] - middle[0])), round(240 - scale * (point[1] - middle[1]))]

        picture = np.full((480, 480, 3), 245, dtype=np.uint8)
        cv2.line(picture, pixel(hinge), pixel(hinge + 1.2 * (handle - hinge)), (150, 90, 40), 6, cv2.LINE_AA)
        cv2.circle(picture, pixel(handle), 7, (90, 90, 90), -1, cv2.LINE_AA)
        for body in range(model.body("forearm").id, model.nbody):
            if model.body(body).rootid == model.body("forearm").rootid:
                cv2.circle(picture, pixel(data.xpos[body][:2]), 5, (220, 150, 100), -1, cv2.LINE_AA)
        angle = data.qpos[self._env.door_hinge_addrs]
        cv2.putText(picture, f"hinge {angle:.2f} rad", (12, 28), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (60, 60, 60), 1)
        return picture

    def close(self) -> None:
        if self._renderer:
            self._renderer.close()
        self._renderer = None
        self._env.close()

    @property
    def model(self) -> Any:
        """The MuJoCo model of all copies."""
        return self._env.model

    @property
    def datas(self) -> Sequence[Any]:
        """The `MjData` of each copy; for reading."""
        return self._datas

    @property
    def palm(self) -> int:
        """The number of the palm's site in the model."""
        return int(self._env.grasp_site_id)

    @property
    def doors(self) -> np.ndarray:
        """Where the door frames stand (n, 3), m."""
        return self._doors

    @property
    def _model_door(self) -> np.ndarray:
        return self._env.model.body_pos[self._env.door_body_id]

    def _select(self, i: int) -> None:
        """Make copy i the environment's own."""
        self._env.data = self._datas[i]
        self._env.model.body_pos[self._env.door_body_id] = self._doors[i]

    def _size(self, n: int) -> None:
        while len(self._datas) < n:
            self._datas.append(mujoco.MjData(self._env.model))
        del self._datas[n:]
        self._doors, self._last = np.zeros((n, 3)), np.zeros((n, self.spec.observation_dim))
