"""Slice profiles, the thickening operator, its projection, z-matrices, simulation, phantoms."""
