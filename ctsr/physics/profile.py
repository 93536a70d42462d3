"""Slice profiles: how a thick slice weighs what lies along z.

A profile p(z) has unit area. What the computations need is the kernel that takes thin slices (FWHM t') to
thick ones (FWHM t); its variance is the difference of both variances. Each kernel is given by its integral,
so that the share of a thin slab is exact, not sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy.special import ndtr

from ctsr.errors import UsageError

__all__ = ["FWHM_PER_SIGMA", "ProfileKind", "SliceProfile"]

FWHM_PER_SIGMA = math.sqrt(8 * math.log(2))


class ProfileKind(StrEnum):
    """The shapes a slice profile can have."""

    GAUSSIAN = "gaussian"
    BOX = "box"
    TRIANGLE = "triangle"
    FILE = "file"


@dataclass(frozen=True, slots=True, eq=False)
class SliceProfile:
    """The shape of a slice's sensitivity along z; how wide it is comes with each use.

    kind: `gaussian`, `triangle` (FWHM = slice thickness), `box` (width = slice thickness) or `file`.
    table: (k, 2) float64, for `file`: position (mm from the slice's centre, rising) and weight of the
        thin-to-thick kernel.
    """

    kind: ProfileKind = ProfileKind.GAUSSIAN
    table: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", ProfileKind(self.kind))
        if (self.kind is ProfileKind.FILE) != (self.table is not None):
            raise ValueError("a table of weights belongs to the profile kind `file`, and to that alone")
        if self.table is None:
            return
        table = np.asarray(self.table, dtype=np.float64)
        if table.ndim != 2 or table.shape[1] != 2 or len(table) < 3 or not np.isfinite(table).all():
            raise UsageError("a profile table has two columns (mm, weight) and at least three rows")
        if (np.diff(table[:, 0]) <= 0).any() or (table[:, 1] < 0).any() or not table[:, 1].any():
            raise UsageError("a profile table has rising positions and weights that are not negative")
        area, centre, variance = _moments(table)
        width = FWHM_PER_SIGMA * math.sqrt(variance)
        if abs(centre) > 0.05 * width:
            raise UsageError(
                f"the profile's centre of mass lies at {centre:.3g} mm, expected 0 ± {0.05 * width:.2g} mm"
            )
        object.__setattr__(self, "table", np.column_stack([table[:, 0], table[:, 1] / area]))

    def kernel_fwhm(self, thickness: float, thin_thickness: float) -> float:
        """FWHM, mm, of the Gaussian that has the variance of the thin-to-thick kernel."""
        if self.table is not None:
            return FWHM_PER_SIGMA * math.sqrt(_moments(self.table)[2])
        return math.sqrt(max(thickness**2 - thin_thickness**2, 0.0))

    def integral(
        self, thickness: float, thin_thickness: float, slab: float
    ) -> Callable[[np.ndarray], np.ndarray]:
        """The kernel's integral from −∞ to u (mm), rising from 0 to 1.

        slab: width of the thin slabs it will be differenced over, mm; what that averaging adds to the
        variance is taken off beforehand, down to a tenth of a slab.
        """
        if self.table is not None:
            fine = np.linspace(self.table[0, 0], self.table[-1, 0], 4001)
            density = np.interp(fine, self.table[:, 0], self.table[:, 1])
            total = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
            return lambda u: np.interp(u, fine, total / total[-1])
        if self.kind is ProfileKind.BOX:
            return lambda u: np.clip(u / thickness + 0.5, 0.0, 1.0)
        per_variance = 6.0 if self.kind is ProfileKind.TRIANGLE else FWHM_PER_SIGMA**2
        variance = max((thickness**2 - thin_thickness**2) / per_variance - slab**2 / 12, (slab / 10) ** 2)
        if self.kind is ProfileKind.TRIANGLE:
            half_base = math.sqrt(6 * variance)
            return lambda u: _triangle_integral(u / half_base)
        sigma = math.sqrt(variance)
        return lambda u: ndtr(u / sigma)


def _moments(table: np.ndarray) -> tuple[float, float, float]:
    """Area, mean (mm) and variance (mm²) of a table of (mm, weight), by the trapezium rule."""
    z, weight = table.T

    def integral(of: np.ndarray) -> float:
        return float(((of[1:] + of[:-1]) / 2 * np.diff(z)).sum())  # np.trapezoid is not in NumPy 1.26

    area = integral(weight)
    mean = integral(z * weight) / area
    return area, mean, integral((z - mean) ** 2 * weight) / area


def _triangle_integral(u: np.ndarray) -> np.ndarray:
    """Integral of the unit triangle on [−1, 1]."""
    u = np.clip(u, -1.0, 1.0)
    return np.where(u < 0, (1 + u) ** 2 / 2, 1 - (1 - u) ** 2 / 2)
