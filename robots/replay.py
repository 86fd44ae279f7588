"""adroit-door demonstrations carried over, in the simulator, to other doors and speeds: data of the task's own resets.

People took 269 steps on average, an episode has 200. A replay takes the demonstration of one of the nearest doors and

    1. follows it `speed` times as fast, and, since a faster hand lags further behind its position servos, leads them by
       more: command = hold + gain (recorded command - hold), where hold is the command that keeps the joints where they
       were in the demonstration's own replay;
    2. moves the hand's path with the door: over the first part of the motion the commands of arm and wrist take up the
       joint displacement that moves the palm by the difference of the doors' positions, by the Jacobian of the palm,
       damped, its rotation held down (Nakamura and Hanafusa 1986; transfer of a demonstration to a new object pose as
       in MimicGen, Mandlekar et al. 2023).

It is open loop, so many fail: each door is tried several times and the best episode is kept, if it opened the door. Noise
disturbs what is carried out, not what is recorded, so that the data show the way back (DART, Laskey et al. 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from pilotwave.errors import UserError
from robots.tasks.adroit import AdroitDoor

Progress = Callable[[int, int], None]
NOISE = 0.02  # of the actuators' half ranges
ATTEMPTS, NEAREST, DOORS = 4, 3, 25  # replays a door, of the nearest demonstrations, doors at a time
SPEED, GAIN = (1.6, 2.3), (0.75, 0.95)  # ranges drawn from; the gain is a share of the speed
_ARM, _ROTATION, _DAMPING, _RAMP = 6, 0.05, 0.02, 0.3  # joints that move the palm; m a rad; m a rad; of the motion


@dataclass(frozen=True)
class Demonstrations:
    """Actions (T_i, 28) of each episode, and where it began: "qpos", "qvel" (E, 30), "door_body_pos" (E, 3)."""

    actions: Sequence[np.ndarray]
    initial: Mapping[str, np.ndarray]


class DoorReplay:
    """Commands for other doors out of demonstrations, which are replayed once to learn joint positions and Jacobians."""

    def __init__(self, task: AdroitDoor, demonstrations: Demonstrations) -> None:
        self.doors = np.asarray(demonstrations.initial["door_body_pos"], np.float64)
        self.actions = [np.clip(np.asarray(a, np.float64), -1, 1) for a in demonstrations.actions]
        model = task.model
        joint = model.actuator_trnid[:, 0]
        position, velocity = model.jnt_qposadr[joint], model.jnt_dofadr[joint]
        low, high = model.actuator_ctrlrange.T
        # a servo's force is gain * control + bias_0 + bias_1 * joint position: no force where the control is
        slope = -model.actuator_biasprm[:, 1] / model.actuator_gainprm[:, 0] * 2 / (high - low)
        offset = -model.actuator_biasprm[:, 0] / model.actuator_gainprm[:, 0] * 2 / (high - low)
        offset -= (low + high) / (high - low)
        length, count = max(map(len, self.actions)), len(self.actions)
        self.hold = np.zeros((count, length, len(joint)))
        self.to_palm = np.zeros((count, length, _ARM, 3))  # command a metre
        moved, turned = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        task.reset_from(demonstrations.initial)
        for t in range(length):
            for i, data in enumerate(task.datas):
                self.hold[i, t] = slope * data.qpos[position] + offset
                mujoco.mj_jacSite(model, data, moved, turned, task.palm)
                jacobian = np.concatenate([moved[:, velocity[:_ARM]], _ROTATION * turned[:, velocity[:_ARM]]])
                damped = jacobian.T @ jacobian + _DAMPING**2 * np.eye(_ARM)
                self.to_palm[i, t] = slope[:_ARM, None] * np.linalg.solve(damped, jacobian[:3].T)
            task.step(np.stack([a[min(t, len(a) - 1)] for a in self.actions]))

    def nearest(self, door: np.ndarray, count: int) -> NDArray[np.int64]:
        """The `count` demonstrations whose doors stood nearest to `door` (3,), nearest first."""
        return np.linalg.norm(self.doors - door, axis=1).argsort()[:count]

    def commands(self, demonstration: int, door: np.ndarray, speed: float, gain: float, steps: int) -> np.ndarray:
        """Actions (steps, 28), the last one held where the demonstration ends before."""
        action = self.actions[demonstration]
        length = len(action)
        hold = self.hold[demonstration, :length]
        command = hold + gain * (action - hold)
        ramp = np.minimum(np.arange(length) / (_RAMP * length), 1)[:, None]
        command[:, :_ARM] += ramp * (self.to_palm[demonstration, :length] @ (door - self.doors[demonstration]))
        where = np.minimum(np.arange(steps) * speed, length - 1)
        low = where.astype(np.int64)
        high, weight = np.minimum(low + 1, length - 1), (where - low)[:, None]
        return np.clip((1 - weight) * command[low] + weight * command[high], -1, 1)


def door_replays(
    task: AdroitDoor,
    steps: int,
    seed: int,
    noise: float,
    progress: Progress | None,
    demonstrations: Demonstrations | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """At least `steps` steps of whole episodes that opened the door: D4RL's columns, and facts about them.

    "actions" are the commands before noise. The doors are the task's own resets, their seeds drawn from `seed`.
    """
    if demonstrations is None:
        raise UserError("adroit-door is recorded by replaying people: give demonstrations=PATH (D4RL's door-human)")
    replay, rng, horizon = DoorReplay(task, demonstrations), np.random.default_rng(seed), task.spec.horizon
    kept: list[dict[str, np.ndarray]] = []
    tried = opened = 0
    while len(kept) * horizon < steps:
        # far from the small seeds that roll-outs use
        task.reset(np.repeat(rng.integers(2**30, 2**31, DOORS), ATTEMPTS).tolist())
        doors = task.doors.copy()
        n = len(doors)
        demonstration = np.array([rng.choice(replay.nearest(door, NEAREST)) for door in doors])
        speed = rng.uniform(*SPEED, n)
        gain = speed * rng.uniform(*GAIN, n)
        plans = zip(demonstration.tolist(), doors, speed.tolist(), gain.tolist())
        commands = np.stack([replay.commands(*plan, steps=horizon) for plan in plans], axis=1)
        observations, rewards = np.empty((horizon, n, task.spec.observation_dim), np.float32), np.empty((horizon, n))
        success = np.zeros(n, bool)
        for t in range(horizon):
            observations[t] = task.observation()["state"]
            _, rewards[t], _, info = task.step(commands[t] + noise * rng.standard_normal(commands[t].shape))
            success |= info["success"]
        returns = np.where(success, rewards.sum(0), -np.inf).reshape(DOORS, ATTEMPTS)
        best = returns.argmax(1) + ATTEMPTS * np.arange(DOORS)
        for i in best[success[best]]:
            episode = {"observations": observations[:, i], "actions": commands[:, i], "rewards": rewards[:, i]}
            about = {"initial_states/door_body_pos": doors[i], "replay/demonstration": demonstration[i]}
            kept.append(episode | about | {"replay/speed": speed[i], "replay/gain": gain[i]})
        tried, opened = tried + n, opened + int(success.sum())
        if progress is not None:
            progress(min(steps, len(kept) * horizon), steps)
        if tried >= 40 * ATTEMPTS * DOORS and not kept:
            raise UserError(f"none of {tried} replays opened the door; are these demonstrations of adroit-door?")
    kept = kept[: -(-steps // horizon)]
    rows = {key: np.concatenate([e[key] for e in kept]).astype(np.float32) for key in ("observations", "actions", "rewards")}
    timeouts = np.zeros(len(rows["rewards"]), dtype=bool)
    timeouts[horizon - 1 :: horizon] = True
    about = {key: np.stack([e[key] for e in kept]) for key in kept[0] if "/" in key}
    data = rows | {"terminals": np.zeros_like(timeouts), "timeouts": timeouts} | about
    facts = {"controller": "replays of demonstrations, carried over to other doors and speeds", "noise": noise}
    facts |= {"demonstrations": len(replay.actions), "steps": len(timeouts), "episodes": len(kept)}
    mean = float(rows["rewards"].sum() / len(kept))
    return data, facts | {"replays_tried": tried, "replays_opened": opened, "return_mean": mean}
