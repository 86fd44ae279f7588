"""`pilotwave train`: a planner, policy or world model from recorded data."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pilotwave.config import compose
from pilotwave.console import metrics_table, writable, writable_folder, write_json
from pilotwave.errors import UserError

# Where the algorithms of a kind lie: importing the package registers them.
PACKAGES = {"planner": "planners", "policy": "policies", "world_model": "world_models"}


def registered_default(group: str, name: str) -> Mapping[str, Any] | None:
    """The `default_config` of a registered class (a plug-in's) that no file in `configs` describes."""
    from offline.algorithm import algorithms

    default = getattr(algorithms(group).get(name), "default_config", None) if group in PACKAGES else None
    content = default() if callable(default) else default
    return None if content is None else {"name": name, **content}
