"""Whether a thick volume is one of those that the weights were trained for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Measured", "noise_level", "outside_domain"]

SOFT = (-50.0, 200.0)  # HU: where noise is measured
SLICES = 16  # at least so many evenly spread slices are looked at
MARGIN = 0.02  # a range's ends are meant to two digits
MAD_PER_SIGMA = 0.6745

_WORDS = {
    "input_spacing_mm": ("slice spacing", "mm"),
    "in_plane_spacing_mm": ("in-plane spacing", "mm"),
    "relative_width": ("slice thickness / spacing", ""),
    "noise_hu": ("noise in soft tissue", "HU"),
    "highest_hu": ("highest value", "HU"),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """What is compared with a model's ranges; None: could not be measured."""

    input_spacing_mm: float
    in_plane_spacing_mm: float
    relative_width: float
    noise_hu: float | None
    highest_hu: float

    @classmethod
    def of(cls, y: np.ndarray, *, spacing: float, in_plane: float, rho: float) -> Measured:
        """From the thick volume (n, H, W), HU, and its lengths in mm."""
        return cls(spacing, in_plane, rho, noise_level(y), float(y.max()))


def noise_level(y: np.ndarray) -> float | None:
    """Standard deviation of the noise in soft tissue, HU; None where there is too little of it.

    From the median absolute second difference in plane: edges are rare, so the median does not see them. For
    white noise a second difference has √6 times its deviation; the noise of a smooth kernel reads lower.
    """
    step = max(1, len(y) // SLICES)
    found = []
    for slice_ in y[::step]:
        rows = slice_.astype(np.float32)
        left, middle, right = rows[:, :-2], rows[:, 1:-1], rows[:, 2:]
        mean = (left + middle + right) / 3
        soft = (mean > SOFT[0]) & (mean < SOFT[1])
        found.append((left - 2 * middle + right)[soft])
    differences = np.concatenate(found)
    if differences.size < 1000:
        return None
    return float(np.median(np.abs(differences)) / MAD_PER_SIGMA / np.sqrt(6))


def outside_domain(measured: Measured, ranges: Mapping[str, Sequence[float]]) -> list[str]:
    """A line for every quantity outside its (lowest, highest); quantities without a range are not judged."""
    findings = []
    for key, (words, unit) in _WORDS.items():
        value = getattr(measured, key)
        if key not in ranges or value is None:
            continue
        low, high = ranges[key]
        if not low - MARGIN * abs(low) - 1e-9 <= value <= high + MARGIN * abs(high) + 1e-9:
            findings.append(
                f"{words} {value:.4g}{' ' + unit if unit else ''}, trained for {low:.4g}…{high:.4g}"
            )
    return findings
