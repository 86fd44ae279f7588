"""World models: observation and actions -> imagined futures."""

from pathlib import Path
from typing import Any

from offline import load_run
from world_models.base import WorldModel
from world_models.control_affine import ControlAffine
from world_models.diffusion_world_model import DiffusionWorldModel
from world_models.dream import Recording, compare, dream, record, replay
from world_models.one_step import OneStep

__all__ = [
    "ControlAffine",
    "DiffusionWorldModel",
    "OneStep",
    "Recording",
    "WorldModel",
    "compare",
    "dream",
    "load",
    "record",
    "replay",
]


def load(path: str | Path, *, ema: bool = True, device: str = "auto") -> Any:
    """The world model of a run directory or checkpoint, ready to use. Errors: `UserError` for what is wrong with it."""
    return load_run(path, kind="world_model", ema=ema, device=device)
