"""Which voxels of a stack the scanner did not reconstruct.

The declared PixelPaddingValue is stored before rescale, often with the wrong sign (63536 for −2000), sometimes names a
value that no pixel has, and is smeared by lossy compression. So what lies in a gap below the image counts too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ctsr.io.dicom.elements import number, short
from ctsr.io.dicom.pixels import Stored
from ctsr.io.dicom.records import Slice

__all__ = ["Padding", "find_padding"]

_TISSUE = (-900.0, 3071.0)  # HU; a padding value declared in here would wipe out the patient
_GAP, _GAP_BELOW = 300, -1100  # HU; of 13 paddings the nearest to the image was −1453 | −1047 … −3024 | −1024
_LEAST_COVER = 0.9  # of the pixels outside the reconstruction circle, which are 21 % of an image or more
_MUCH_INSIDE = 0.05  # of the circle
_NOWHERE = -(1 << 31)  # HU
_ZERO = 1 << 15  # index of 0 HU in a histogram


@dataclass(frozen=True, slots=True, eq=False)
class Padding:
    """Padding of a stack of K slices.

    below: HU under which every voxel is padding, where a gap shows it. declared: (K, 2) least and greatest HU that
    each slice declares, the least above the greatest where it declares none. slices: those that hold any.
    lowest: their least HU. source: "declared", "detected" or "none".
    histogram: (65536,) of the HU of all other voxels, rounded, from −32768 on, in a quarter of the rows.
    """

    below: int
    declared: np.ndarray
    slices: list[int]
    n_voxels: int
    lowest: float
    source: str
    value_stored: int | None
    histogram: np.ndarray

    def mask(self, image: np.ndarray, k: int) -> np.ndarray:
        """(rows, columns) which voxels of `image`, slice k in HU, are padding."""
        return _mask(image, self.below, self.declared[k])


def find_padding(
    hu: np.ndarray, extremes: np.ndarray, slices: Sequence[Slice], facts: Sequence[Stored]
) -> tuple[Padding, list[str]]:
    """Padding of `hu`, (K, rows, columns), with least and greatest HU `extremes`, (K, 2); and warnings."""
    warnings: list[str] = []
    declared = np.tile(np.array([1, 0], np.float64 if hu.dtype.kind == "f" else np.int64), (len(slices), 1))
    stored = [_declared(s, fact) for s, fact in zip(slices, facts, strict=True)]
    for k, (s, ends) in enumerate(zip(slices, stored, strict=True)):
        low, high = np.array(ends or (math.nan, math.nan)) * (s.slope or 1.0) + (s.intercept or 0.0)
        if ends is None and 0x00280120 in s.header:
            warnings.append(f"PixelPaddingValue is no value of {facts[k].bits} bits: ignored")
        elif _TISSUE[0] < high and low < _TISSUE[1]:
            warnings.append(f"PixelPaddingValue stands for {low:g} HU, which is tissue: ignored")
        elif ends is not None:
            declared[k] = low, high

    outside = _outside_circle(slices[0])
    n_circle = len(hu) * _count(~outside)
    lowest = extremes[:, 0]
    histogram = _histogram(hu, 4)  # of 300 slices 30 ms; of all rows 130
    lower, upper = _gap(histogram)
    if any(_count(hu[k] < lower + 1) != _count(hu[k] < upper - 1) for k in np.flatnonzero(lowest < upper)):
        histogram = _histogram(hu, 1)  # rows that were left out reach into the gap
        lower, upper = _gap(histogram)
    below = (lower + upper) // 2
    n_covered = sum(_count((hu[k] < below) & outside) for k in np.flatnonzero(lowest < below))
    if n_covered < _LEAST_COVER * len(hu) * _count(outside):
        below = _NOWHERE  # what lies so low does not fill the place of padding

    least, greatest = declared.T
    holds = (least <= greatest) & (least <= extremes[:, 1]) & (greatest >= lowest)
    n_voxels = n_inside = n_declared = 0
    found = []
    for k in np.flatnonzero(holds | (lowest < below)).tolist():
        mask = _mask(hu[k], below, declared[k])
        if n := _count(mask):
            found.append(k)
            n_voxels += n
            n_inside += _count(mask & ~outside)
            n_declared += n if below == _NOWHERE else _count(_mask(hu[k], _NOWHERE, declared[k]))
    ends_in_hu = [(-np.inf, below - 1), *map(tuple, np.unique(declared[holds], axis=0))]
    for first, last in np.rint(np.clip(ends_in_hu, -_ZERO, _ZERO - 1)).astype(int) + _ZERO:
        histogram[first : last + 1] = 0

    if n_inside > _MUCH_INSIDE * n_circle:
        warnings.append(f"padding fills {n_inside / n_circle:.0%} of the circle of the image")
    if not found:
        return Padding(below, declared, found, 0, math.inf, "none", None, histogram), warnings
    s, value = slices[found[0]], (stored[found[0]] or (None,))[0]
    source = "declared" if 2 * n_declared > n_voxels else "detected"
    if source == "detected" or value is None:
        value = round((lowest[found[0]] - (s.intercept or 0.0)) / (s.slope or 1.0))
    least_hu = float(lowest[found].min())
    return Padding(below, declared, found, n_voxels, least_hu, source, value, histogram), warnings


def _mask(image: np.ndarray, below: int, declared: np.ndarray) -> np.ndarray:
    low, high = declared.tolist()  # Python's numbers: against a float64 numpy would convert the image
    mask: np.ndarray = image < below if low > high else image == low
    if low < high:
        mask = (image >= low) & (image <= high)
    return mask if low > high or below == _NOWHERE else mask | (image < below)


def _declared(s: Slice, fact: Stored) -> tuple[int, int] | None:
    """Least and greatest stored value that a slice declares as padding; None where none that it can store."""
    ends = [short(s.header, tag) for tag in (0x00280120, 0x00280121) if tag in s.header]
    low = -(1 << fact.bits - 1) if fact.is_signed else 0
    wraps = 1 << 15 if fact.is_signed else 1 << 16
    values = [(v & 0xFFFF) - (1 << 16 if v & 0xFFFF >= wraps else 0) for v in ends if v is not None]
    is_whole = len(values) == len(ends) and 0x00280120 in s.header
    is_stored = all(low <= v < low + (1 << fact.bits) for v in values)
    return (min(values), max(values)) if is_whole and is_stored else None


def _histogram(hu: np.ndarray, step: int) -> np.ndarray:
    """(65536,) counts of the rounded HU, from −32768 on, in every `step`-th row."""
    counts = np.zeros(1 << 16, dtype=np.int64)
    for k, image in enumerate(hu):
        part = image[k % step :: step]
        if part.dtype != np.int16:
            part = np.clip(np.rint(part), -_ZERO, _ZERO - 1).astype(np.int16)
        counts += np.bincount(part.view(np.uint16).ravel(), minlength=1 << 16)
    return np.roll(counts, _ZERO)


def _outside_circle(s: Slice) -> np.ndarray:
    """(rows, columns) which pixels lie outside the circle that was reconstructed."""
    rows, columns = s.shape
    y = (np.arange(rows) - (rows - 1) / 2)[:, None] * s.pixel_spacing[0]
    x = (np.arange(columns) - (columns - 1) / 2) * s.pixel_spacing[1]
    diameter = min(rows * s.pixel_spacing[0], columns * s.pixel_spacing[1])
    told = number(s.header, 0x00181100)  # ReconstructionDiameter
    outside: np.ndarray = np.hypot(x, y) > min(diameter, told or diameter) / 2
    return outside


def _gap(histogram: np.ndarray) -> tuple[int, int]:
    """The HU on both sides of the lowest gap that may divide padding from the image; far down where there is none."""
    values = np.flatnonzero(histogram) - _ZERO
    gaps = np.flatnonzero((np.diff(values) >= _GAP) & (values[:-1] < _GAP_BELOW))
    return (int(values[gaps[0]]), int(values[gaps[0] + 1])) if gaps.size else (_NOWHERE, _NOWHERE)


def _count(mask: np.ndarray) -> int:
    return int(np.count_nonzero(mask))
