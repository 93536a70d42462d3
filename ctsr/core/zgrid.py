"""The grid of thin slices that belongs to a stack of thick ones, and back.

N slices of spacing s cover the slab [0, N·s]. The thin grid has spacing s/F and is centred on that slab, so
both stacks share their edges: this is how a scanner reconstructs two thicknesses of one acquisition.
Lengths along z are in units of the thick spacing unless a name says mm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["ZGrid", "shifted_affine", "thick_count"]

_WHOLE = 1e-6  # a count this near to a whole number is that number: 22 × 2.5 = 55


@dataclass(frozen=True, slots=True)
class ZGrid:
    """`n` thick slices and the `m` thin ones that cover the same slab.

    factor: thick spacing / thin spacing, > 0 (a real number).
    """

    n: int
    factor: float

    @property
    def m(self) -> int:
        """Number of thin slices: ⌊n·F + ½⌋, not Python's half-to-even."""
        return max(1, math.floor(self.n * self.factor + 0.5 + 1e-9))

    @property
    def first(self) -> float:
        """Index, on the thick grid, of the first thin slice's centre (−0.25 for F = 2)."""
        return (self.n - self.m / self.factor) / 2 + 1 / (2 * self.factor) - 0.5

    @property
    def centres(self) -> np.ndarray:
        """(m,) thin centres in thick-slice units from the slab's edge."""
        return self.first + 0.5 + np.arange(self.m) / self.factor

    @property
    def edges(self) -> np.ndarray:
        """(m + 1,) borders of the thin slabs in thick-slice units from the slab's edge."""
        return self.first + 0.5 + (np.arange(self.m + 1) - 0.5) / self.factor

    @property
    def thick_centres(self) -> np.ndarray:
        """(n,) thick centres in thick-slice units from the slab's edge."""
        return np.arange(self.n) + 0.5

    def affine(self, thick_affine: np.ndarray, axis: int) -> np.ndarray:
        """The affine of the thin stack. `axis`: which array axis the slices lie along."""
        return shifted_affine(thick_affine, axis, first=self.first, step=1 / self.factor)


def shifted_affine(affine: np.ndarray, axis: int, *, first: float, step: float) -> np.ndarray:
    """The affine of a grid whose index 0 lies at `first` and whose slices are `step` apart, in the old index.

    Nothing but the column of `axis` and the origin moves, so an oblique direction does not turn.
    """
    moved = np.array(affine, dtype=np.float64)
    moved[:3, 3] += first * affine[:3, axis]
    moved[:3, axis] *= step
    return moved


def thick_count(m: int, factor: float) -> int:
    """How many thick slices `m` thin ones fill: the largest n for which n·F is a whole number ≤ m.

    The thin slices that are left over are dropped by the caller. Where no n·F is whole, as many as fit.
    """
    most = math.floor(m / factor + _WHOLE)
    for n in range(most, 0, -1):
        if abs(n * factor - round(n * factor)) < _WHOLE * n:
            return n
    return most
