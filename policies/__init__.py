"""Policies: observation -> the next chunk of actions."""

from policies.diffusion_policy import DiffusionPolicy

__all__ = ["DiffusionPolicy"]
