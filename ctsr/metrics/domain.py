"""Whether a thick volume is one of those that the weights were trained for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["measured", "noise_level", "outside_domain"]

_SOFT = (-50.0, 200.0)  # HU: where noise is measured
_SLICES = 16  # at least so many evenly spread slices are looked at
_MARGIN = 0.02  # a range's ends are meant to two digits
_MAD_PER_SIGMA = 0.6745

_WORDS = {
    "factor": ("factor", ""),
    "input_spacing_mm": ("slice spacing", " mm"),
    "in_plane_spacing_mm": ("in-plane spacing", " mm"),
    "relative_width": ("slice thickness / spacing", ""),
    "noise_hu": ("noise in soft tissue", " HU"),
    "highest_hu": ("highest value", " HU"),
}


def measured(
    y: np.ndarray, *, factor: float, spacing: float, in_plane: float, rho: float
) -> dict[str, float | None]:
    """What is compared with a model's ranges, of a thick volume (n, H, W), HU, thinned by `factor`; lengths in mm.

    None: could not be measured.
    """
    values = (factor, spacing, in_plane, rho, noise_level(y), float(y.max()))
    return dict(zip(_WORDS, values, strict=True))


def noise_level(y: np.ndarray) -> float | None:
    """Standard deviation of the noise in soft tissue, HU; None where there is too little of it.

    From the median absolute second difference in plane: edges are rare, so the median does not see them. For
    white noise a second difference has √6 times its deviation; the noise of a smooth kernel reads lower.
    """
    step = max(1, len(y) // _SLICES)
    found = []
    for slice_ in y[::step]:
        rows = slice_.astype(np.float32)
        left, middle, right = rows[:, :-2], rows[:, 1:-1], rows[:, 2:]
        mean = (left + middle + right) / 3
        soft = (mean > _SOFT[0]) & (mean < _SOFT[1])
        found.append((left - 2 * middle + right)[soft])
    differences = np.concatenate(found)
    if differences.size < 1000:
        return None
    return float(np.median(np.abs(differences)) / _MAD_PER_SIGMA / np.sqrt(6))


def outside_domain(found: Mapping[str, float | None], ranges: Mapping[str, Sequence[float]]) -> list[str]:
    """A line for every quantity outside its (lowest, highest); quantities without a range are not judged."""
    findings = []
    for key, (words, unit) in _WORDS.items():
        value = found[key]
        if key not in ranges or value is None:
            continue
        low, high = ranges[key]
        if not low - _MARGIN * abs(low) - 1e-9 <= value <= high + _MARGIN * abs(high) + 1e-9:
            findings.append(f"{words} {value:.4g}{unit}, trained for {low:.4g}…{high:.4g}")
    return findings
