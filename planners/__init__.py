"""Planners: observation (and goal) -> plans over a horizon."""

from planners.diffuser import Diffuser
from planners.plan import Plan

__all__ = ["Diffuser", "Plan"]
