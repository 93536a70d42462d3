"""Thin-slice CT from thick-slice CT."""

__version__ = "0.1.0"
