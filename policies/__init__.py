"""Policies: observation -> the next chunk of actions."""

from pathlib import Path
from typing import Any

from offline import load_run
from policies.diffusion_policy import DiffusionPolicy
from policies.fisor import FISOR
from policies.held_out import held_out_error

__all__ = ["FISOR", "DiffusionPolicy", "held_out_error", "load"]


def load(path: str | Path, *, ema: bool = True, device: str = "cpu") -> Any:
    """The policy of a run directory or checkpoint folder, ready to use. Errors: `UserError` naming what is wrong."""
    return load_run(path, kind="policy", ema=ema, device=device)
