"""Recorded data in (formats, windows, normalizers, collection), training out (trainer, checkpoints)."""

from offline.algorithm import Algorithm, DataSpec, algorithms, build, register
from offline.checkpoint import export_checkpoint, load_run, save_run, update_card
from offline.trainer import Interrupted, TrainConfig, train

__all__ = [
    "Algorithm",
    "DataSpec",
    "Interrupted",
    "TrainConfig",
    "algorithms",
    "build",
    "export_checkpoint",
    "load_run",
    "register",
    "save_run",
    "train",
    "update_card",
]
