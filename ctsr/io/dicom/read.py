"""A stack of CT slices → one volume in HU, with what has been found and changed on the way.

Values: HU = slope · stored + intercept, of every slice by itself. Padding, the area that the scanner did not
reconstruct, is found, replaced by one value and never averaged with tissue. Gantry tilt is taken out by shifting
each slice within its own plane: what lies along z stays as it was measured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctsr.core.volume import PADDING_LIMIT, Volume
from ctsr.errors import InputError
from ctsr.io.dicom.elements import number
from ctsr.io.dicom.grid import Grid, fit_grid
from ctsr.io.dicom.padding import Padding, find_padding
from ctsr.io.dicom.pixels import Stored, check_stored, read_pixels
from ctsr.io.dicom.records import Slice, Stack
from ctsr.io.dicom.sidecar import attributes

__all__ = ["DicomVolume", "read_stack"]

_PLAUSIBLE = (-3100.0, 32767.0)  # HU; GE's padding is −3024, extended-scale metal 30,710
_DENSEST = 30_710  # HU, the end of the extended scale
_NO_AIR = -500.0  # HU; a CT without anything below is suspect
_NEW_PADDING = -2000  # HU; where there was none, and a shifted slice has no value


@dataclass(frozen=True, slots=True, eq=False)
class DicomVolume:
    """A volume in HU read from slices.

    technical: for a JSON sidecar, nothing that identifies the patient. warnings: what a user should know.
    padding_value: HU that padding has in `volume`, at most −1500; None where it was replaced or there is none.
    """

    volume: Volume
    technical: dict[str, Any]
    warnings: tuple[str, ...]
    padding_value: int | None


def read_stack(
    stack: Stack, *, keep_tilt: bool = False, pad_hu: float | None = -1024.0, workers: int = 1
) -> DicomVolume:
    """The volume of `stack`: data (I, J, K) in Fortran order, int16 where HU are integers, slice axis 2.

    keep_tilt: a tilted stack stays as it is, under a sheared affine. pad_hu: HU that padding gets; None: padding
    stays padding, at or below −1500 HU. workers: threads for decoding.
    Raises GeometryError where the slices form no grid, InputError where pixels or their scale can't be trusted.
    Memory: 2 bytes a voxel, 4 more where HU are no 16-bit integers, twice that while a tilt is taken out.
    """
    if pad_hu is not None and not _holds(np.int16, np.array(pad_hu)):
        raise ValueError(f"pad_hu is {pad_hu:g}, outside 16 bit")
    slices = stack.slices
    grid = fit_grid(slices)
    warnings = [*stack.warnings, *grid.warnings, *check_stored(slices)]
    stored, facts = read_pixels(slices, workers=workers)
    hu, extremes = _to_hu(stored, slices, facts, warnings)
    del stored
    padding, more = find_padding(hu, extremes, slices, facts)
    warnings += more
    _check_plausible(padding.histogram, extremes, warnings)

    removes_tilt = grid.tilt_deg > 0 and not keep_tilt
    padding_value = None
    if pad_hu is not None:
        fill = pad_hu if hu.dtype.kind == "f" else round(pad_hu)
    else:
        lowest = padding.lowest if padding.n_voxels else _NEW_PADDING
        fill = max(math.floor(min(lowest, PADDING_LIMIT)), -(1 << 15))
        padding_value = fill if padding.n_voxels or removes_tilt else None
    if removes_tilt:
        hu = _upright(hu, grid, padding, fill)
    else:
        for k in padding.slices:
            np.copyto(hu[k], np.array(fill).astype(hu.dtype), where=padding.mask(hu[k], k))
    is_wide = hu.dtype == np.int32 and _holds(np.int16, hu)  # only padding had made it wider
    data = hu.astype(np.int16) if is_wide else hu
    affine = grid.affine(keep_tilt=keep_tilt)
    thickness = Counter(s.thickness for s in slices).most_common(1)[0][0]
    tilt_deg = round(grid.tilt_deg, 4)
    technical = {
        **attributes(slices),
        "affine": affine.tolist(),
        "n_slices": len(slices),
        "sheared": tilt_deg > 0 and keep_tilt,
        "spacing_mm": [round(v, 6) for v in (*grid.pixel_spacing[::-1], grid.spacing)],
        "thickness_over_spacing": round(thickness / grid.spacing, 4) if thickness else None,
        "tilt_deg": tilt_deg,
        "tilt_removed_deg": 0.0 if keep_tilt else tilt_deg,
        "hu": {"min": data.min().item(), "max": data.max().item()}
        | {f"p{q:g}": _percentile(padding.histogram, q) for q in (0.1, 50.0, 99.9)},
        "lossy": any(f.is_lossy for f in facts),
        "padding": {"source": padding.source, "value_stored": padding.value_stored}
        | {"voxels": padding.n_voxels, "hu": fill if padding.n_voxels else None},
    }
    tag = number(slices[0].header, 0x00181120)
    if tag is not None and abs(abs(tag) - grid.tilt_deg) > 0.5:
        told = f"{grid.tilt_deg:.1f}° by the positions, {abs(tag):.1f}° by GantryDetectorTilt"
        warnings.append(f"tilt is {told}")
    volume = Volume(data.transpose(2, 1, 0), affine, slice_thickness=thickness, slice_axis=2)
    return DicomVolume(volume, technical, tuple(dict.fromkeys(warnings)), padding_value)


def _to_hu(
    stored: np.ndarray, slices: Sequence[Slice], facts: Sequence[Stored], warnings: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """HU in place of `stored` where they are 16-bit integers, else in a new array, and (K, 2) least and greatest HU."""
    if slices[0].slope is None:
        is_hu = min(f.low for f in facts) <= -900 and all(f.is_signed for f in facts)
        if not is_hu and any(s.rescale_type != "HU" for s in slices):
            reason = "has no RescaleIntercept, and stored values are not HU"
            raise InputError(reason, path=slices[0].file.name)
        warnings.append("no RescaleSlope and RescaleIntercept: stored values taken as HU")
    scales = [(s.slope or 1.0, s.intercept or 0.0) for s in slices]
    ends = [[f.low * m + b, f.high * m + b] for f, (m, b) in zip(facts, scales, strict=True)]
    extremes = np.array(ends, dtype=np.float64)
    is_whole = all(m.is_integer() and b.is_integer() for m, b in scales)
    if is_whole and _holds(np.int16, extremes):
        bits = stored.view(np.uint16)  # modulo 2^16 the sum is right for both signs, as its result fits
        for k, (m, b) in enumerate(scales):
            if m != 1:
                np.multiply(bits[k], np.uint16(int(m) % 65536), out=bits[k])
            if b != 0:
                np.add(bits[k], np.uint16(int(b) % 65536), out=bits[k])
        return stored, extremes
    hu = np.empty(stored.shape, dtype=np.int32 if is_whole and _holds(np.int32, extremes) else np.float32)
    for k, (f, (m, b)) in enumerate(zip(facts, scales, strict=True)):
        values = stored[k] if f.is_signed else stored[k].view(np.uint16)
        hu[k] = values.astype(np.float64) * m + b
    return hu, extremes


def _holds(kind: type[np.integer[Any]], values: np.ndarray) -> bool:
    return bool(values.min() >= np.iinfo(kind).min and values.max() <= np.iinfo(kind).max)


def _check_plausible(histogram: np.ndarray, extremes: np.ndarray, warnings: list[str]) -> None:
    if not histogram.any():
        raise InputError("holds nothing but padding")
    low, high = _percentile(histogram, 0.1), _percentile(histogram, 99.9)
    if low < _PLAUSIBLE[0] or high >= _PLAUSIBLE[1]:
        reason = f"HU range {extremes.min():g}..{extremes.max():g} is not CT (broken compression?)"
        raise InputError(reason, hint="look at the series in a viewer")
    if (most := extremes.max()) > _DENSEST:
        warnings.append(f"values up to {most:g} HU: negative ones, if the header has their sign wrong")
    if low > _NO_AIR:
        warnings.append(f"no air in the image: the lowest values are {low:g} HU, so they may not be HU")


def _percentile(histogram: np.ndarray, q: float) -> float:
    rising = np.cumsum(histogram)
    return float(np.searchsorted(rising, q / 100 * rising[-1])) - (1 << 15)


def _upright(hu: np.ndarray, grid: Grid, padding: Padding, fill: float) -> np.ndarray:
    """Slices shifted within their plane into the upright frame; what touches padding or has no value is `fill`."""
    low, (columns, rows, n) = grid.upright
    out = np.empty((n, rows, columns), dtype=hu.dtype)
    for k, (right, down) in enumerate(grid.shifts - low):
        image = hu[k].astype(np.float64)
        if k in padding.slices:
            image[padding.mask(hu[k], k)] = np.nan
        image = _shifted(_shifted(image, down, rows).T, right, columns).T
        image = np.where(np.isnan(image), fill, image)
        out[k] = np.rint(image) if hu.dtype.kind == "i" else image
    return out


def _shifted(image: np.ndarray, by: float, n: int) -> np.ndarray:
    """(n, …) `image` moved by `by` ≥ 0 along its first axis, linearly; NaN where it has no two neighbours."""
    whole = math.floor(by + 1e-6)
    part = by - whole
    if part > 1e-6:  # a whole shift needs no neighbour
        edge = np.full((1, image.shape[1]), np.nan)
        image = (1 - part) * np.concatenate([image, edge]) + part * np.concatenate([edge, image])
    out = np.full((n, image.shape[1]), np.nan)
    out[whole : whole + len(image)] = image
    return out
