"""Recorded data in (formats, windows, normalizers, collection), training out (trainer, checkpoints)."""

from offline.algorithm import Algorithm, DataSpec, algorithms, register

__all__ = ["Algorithm", "DataSpec", "algorithms", "register"]
