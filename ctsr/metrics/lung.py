"""Lung densitometry: how much of a lung is nearly air (emphysema), and its 15th percentile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Densitometry", "densitometry"]


@dataclass(frozen=True, slots=True)
class Densitometry:
    """Shares of the lung's voxels below two limits, percent, and the 15th percentile, HU."""

    below_950: float
    below_910: float
    p15: float


def densitometry(hu: np.ndarray, lung: np.ndarray) -> Densitometry | None:
    """Densitometry of (D, H, W) HU in a given lung mask (the reference's); None where the mask is empty."""
    values = hu[lung].astype(np.float64)
    if values.size == 0:
        return None
    below_950, below_910 = (100 * np.count_nonzero(values < limit) / values.size for limit in (-950, -910))
    return Densitometry(below_950, below_910, float(np.percentile(values, 15)))
