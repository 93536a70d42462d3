"""Volumes, their geometry and the grids along z. NumPy only."""
