"""Tasks, simulators, hardware and the control loop. Never imports torch; simulators are imported when used."""

from robots.controller import Chunk, Controller, Observation, Tracker
from robots.tasks import Task, TaskSpec, make, register
from robots.tasks import names as task_names
from robots.tracking import DirectTracker, PDTracker

__all__ = [
    "Chunk",
    "Controller",
    "DirectTracker",
    "Observation",
    "PDTracker",
    "Task",
    "TaskSpec",
    "Tracker",
    "make",
    "register",
    "task_names",
]
