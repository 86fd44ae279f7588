"""Errors meant for people: one line, what was wrong and what would be right. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in what the user gave (a name, path, shape or value). The command line prints it and exits with 2."""


def nearest(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for an unknown `name` among `known` names of a `kind` ("task", "solver"), and the nearest."""
    choices = sorted(known)
    close = get_close_matches(name, choices, n=1, cutoff=0.4)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return UserError(f"unknown {kind} '{name}'; {hint}known: {', '.join(choices)}")


def require(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """UserError unless a setting is a finite number from `low` to `high`."""
    if not (low <= value <= high and abs(value) < float("inf")):
        wanted = f"at least {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
        raise UserError(f"{name} is {value}; it must be {wanted}")
