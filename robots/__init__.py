"""Tasks, simulators, hardware and the control loop. Never imports torch; simulators are imported when used."""

from robots.controller import Chunk, Controller, Observation, Tracker
from robots.inference import Factory
from robots.loop import DeployReport, Limits, LoopConfig, bare_loop, deploy
from robots.mujoco_robot import MujocoRobot
from robots.robot import Adapter, Outcome, Robot
from robots.tasks import Task, TaskSpec, make, register
from robots.tasks import names as task_names
from robots.tracking import DirectTracker, PDTracker

__all__ = [
    "Adapter",
    "Chunk",
    "Controller",
    "DeployReport",
    "DirectTracker",
    "Factory",
    "Limits",
    "LoopConfig",
    "MujocoRobot",
    "Observation",
    "Outcome",
    "PDTracker",
    "Robot",
    "Task",
    "TaskSpec",
    "Tracker",
    "bare_loop",
    "deploy",
    "make",
    "register",
    "task_names",
]
