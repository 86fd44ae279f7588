"""Policies: observation -> the next chunk of actions."""

from pathlib import Path
from typing import Any

from offline import load_run
from policies.diffusion_policy import DiffusionPolicy

__all__ = ["DiffusionPolicy", "load"]


def load(path: str | Path, *, ema: bool = True, device: str = "cpu") -> Any:
    """The policy of a run directory or checkpoint folder, ready to use. Errors: `UserError` naming what is wrong."""
    return load_run(path, kind="policy", ema=ema, device=device)
