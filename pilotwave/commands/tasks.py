"""`pilotwave tasks`: what there is, from the packaged configurations alone (fast: no simulator, no torch)."""

from __future__ import annotations

from collections.abc import Sequence

from pilotwave.config import groups, summary
from pilotwave.console import table
from pilotwave.errors import UserError


def run(overrides: Sequence[str]) -> None:
    """Print the options of every group, tasks first."""
    if overrides:
        raise UserError(f"cannot read '{overrides[0]}'; 'pilotwave tasks' takes no settings")
    for group, names in sorted(groups().items(), key=lambda entry: entry[0] != "task"):
        table((group, "what it is"), [(f"{group}={name}", summary(group, name)) for name in names if name != "none"])
