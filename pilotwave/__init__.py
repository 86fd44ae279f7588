"""Pilotwave: diffusion-based planning and robot control, from recorded demonstrations to a robot that moves."""

__version__ = "0.1.0"
