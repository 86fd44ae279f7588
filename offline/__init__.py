"""Recorded data in (formats, windows, normalizers, collection), training out (trainer, checkpoints).

Names are imported when first used, so that `import offline` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offline.algorithm import Algorithm, DataSpec, algorithms, build, register
    from offline.checkpoint import export_checkpoint, load_run, save_run, update_card
    from offline.formats import formats_known, read, write
    from offline.inspection import inspect
    from offline.normalizer import Normalizer
    from offline.retiming import retime
    from offline.store import TrajectoryStore
    from offline.tables import sampler_table
    from offline.trainer import Interrupted, TrainConfig, train
    from offline.windows import Windows

_HOME = {  # public name -> module it lives in
    "Algorithm": "algorithm",
    "DataSpec": "algorithm",
    "Interrupted": "trainer",
    "Normalizer": "normalizer",
    "TrainConfig": "trainer",
    "TrajectoryStore": "store",
    "Windows": "windows",
    "algorithms": "algorithm",
    "build": "algorithm",
    "export_checkpoint": "checkpoint",
    "formats_known": "formats",
    "inspect": "inspection",
    "load_run": "checkpoint",
    "read": "formats",
    "register": "algorithm",
    "retime": "retiming",
    "sampler_table": "tables",
    "save_run": "checkpoint",
    "train": "trainer",
    "update_card": "checkpoint",
    "write": "formats",
}

__all__ = [
    "Algorithm",
    "DataSpec",
    "Interrupted",
    "Normalizer",
    "TrainConfig",
    "TrajectoryStore",
    "Windows",
    "algorithms",
    "build",
    "export_checkpoint",
    "formats_known",
    "inspect",
    "load_run",
    "read",
    "register",
    "retime",
    "sampler_table",
    "save_run",
    "train",
    "update_card",
    "write",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'offline' has no attribute '{name}'")
    return getattr(import_module(f"offline.{_HOME[name]}"), name)
