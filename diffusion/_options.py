"""The options of schedules, solvers and networks, checked against the signatures that take them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from pilotwave.errors import UserError, nearest


def check_options(what: str, function: Callable[..., Any], options: Iterable[str], given: int = 0) -> None:
    """Raises `UserError` for an option that `function` does not take; its first `given` arguments are no options."""
    known = list(inspect.signature(function).parameters)[given:]
    for option in options:
        if not known:
            raise UserError(f"{what} takes no options; got '{option}'")
        if option not in known:
            raise nearest(f"option of {what}", option, known)
