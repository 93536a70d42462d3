"""Stored numbers to HU, and the refusal of numbers that can't be HU.

All of it works on the flat stream of voxels in the file's order (i fastest), in pieces: nothing as large as a
volume is held beside a result of another type.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ctsr.core.volume import AIR, PADDING_LIMIT
from ctsr.errors import InputError, ResourceError

__all__ = ["kept_dtype", "refuse_what_is_not_hu", "to_hu"]

_PIECE = 1 << 20  # voxels
_LARGEST_HU = 1e5  # metal saturates at 3071 or 32767; nothing real is beyond

_RUNS, _RUN = 64, 4096  # a sample: so many runs of so many voxels, enough for shares to 1 %
_PEAK_VOXELS = 256  # a few voxels of bone look like an offset too
_LABEL_VALUES = 128  # TotalSegmentator has 118; a grey picture 256
_LABEL_FLATNESS = 0.8  # share of neighbours that are equal; CT with noise is below 0.1


def kept_dtype(stored: np.dtype, hu: np.ndarray) -> np.dtype:
    """The type that a result may be stored in: the input's, but for those that other readers do not know."""
    native = stored.newbyteorder("=")
    is_common = (native.kind in "iu" and native.itemsize <= 4) or native in (np.float32, np.float64)
    return native if is_common else hu.dtype


def _pieces(n: int) -> Iterator[slice]:
    return (slice(start, start + _PIECE) for start in range(0, n, _PIECE))


def to_hu(
    stored: np.ndarray, shape: tuple[int, int, int], *, slope: float, inter: float, path: str | None = None
) -> np.ndarray:
    """HU of a flat stream of stored values, (n,): slope · stored + inter.

    Returned without a copy where it holds HU already (a foreign byte order is turned in place); int16 where
    whole numbers come out that fit; else float32.
    Refuses NaN and infinity, and values beyond ±10⁵.
    """
    if not stored.dtype.isnative:
        stored = stored.byteswap(inplace=True).view(stored.dtype.newbyteorder("="))
    low, high = _range(stored, shape, path)
    ends = sorted((slope * low + inter, slope * high + inter))
    if ends[0] < -_LARGEST_HU or ends[1] > _LARGEST_HU:
        raise InputError(
            f"values from {ends[0]:.6g} to {ends[1]:.6g}: HU lie within ±{_LARGEST_HU:g}", path=path
        )
    kind, itemsize = stored.dtype.kind, stored.dtype.itemsize
    is_scaled = (slope, inter) != (1.0, 0.0)
    if not is_scaled and ((kind in "iu" and itemsize < 8) or stored.dtype == np.float32):
        return stored
    is_whole = kind in "iu" and slope == int(slope) and inter == int(inter)
    dtype: np.dtype = np.dtype(np.float32)
    if is_whole and ends[0] >= -32768 and ends[1] <= 32767:
        dtype = np.dtype(np.int16)
    elif is_whole and not is_scaled:  # int64: within ±10⁵, so int32 holds it
        dtype = np.dtype(np.int32)
    try:
        hu = np.empty(stored.size, dtype)
    except MemoryError as exc:
        raise ResourceError(
            f"{stored.size * dtype.itemsize:,} bytes of memory for the voxels can't be had", path=path
        ) from exc
    for piece in _pieces(stored.size):
        hu[piece] = stored[piece].astype(np.float64) * slope + inter
    return hu


def _range(stored: np.ndarray, shape: tuple[int, int, int], path: str | None) -> tuple[float, float]:
    """Smallest and largest value; refuses what is not finite, with the count and the first place."""
    lows, highs = [], []
    with np.errstate(invalid="ignore"):
        for piece in _pieces(stored.size):
            lows.append(float(stored[piece].min()))
            highs.append(float(stored[piece].max()))
    if not np.isfinite([lows, highs]).all():  # min and max carry NaN along
        bad = [np.flatnonzero(~np.isfinite(stored[piece])) + piece.start for piece in _pieces(stored.size)]
        count, first = sum(b.size for b in bad), next(int(b[0]) for b in bad if b.size)
        place = ",".join(str(int(x)) for x in np.unravel_index(first, shape, order="F"))
        raise InputError(
            f"{count:,} voxel{'s are' if count > 1 else ' is'} not finite (first at {place})", path=path
        )
    return min(lows), max(highs)


def refuse_what_is_not_hu(
    hu: np.ndarray,
    *,
    stored_dtype: np.dtype,
    is_label: bool = False,
    allow_labels: bool = False,
    allow_not_hu: bool = False,
    path: str | None = None,
    notes: list[str],
) -> None:
    """Look at the values as one who knows CT would; InputError where they are labels, or not HU.

    hu: (n,) in the file's order. is_label: the file itself says so. An offset of 1000 or 1024 is told by its
    peaks, with the option that mends it. A volume that is constant or has no air gets a note.
    """
    runs = _sample(hu)
    values = runs[runs > PADDING_LIMIT]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    is_label = is_label or (low >= 0 and _looks_labelled(runs))
    if is_label and not allow_labels:
        raise InputError(
            f"label map ({np.unique(values).size} whole numbers from {low:g} to {high:g}), not CT", path=path
        )
    if is_label or allow_not_hu:
        return
    if low == high:
        notes.append(f"all voxels are {low:g} HU" if values.size else "all voxels are scanner padding")
        return
    fault = ""
    hint = "convert the DICOM series again, with ctsr convert"
    if low >= -1 and high <= 1:
        fault = f"values {low:.3g}…{high:.3g}: not HU, but a picture scaled to 1"
    elif low >= 0 and high <= 255.5 and (stored_dtype.itemsize == 1 or _looks_clipped(values)):
        fault = f"values {low:.4g}…{high:.4g}: not HU, but a picture of 8 bits"
    elif low >= 0 and (offset := _likely_offset(values)):
        fault = f"no value below 0 and tissue near 1000: HU with {offset} added"
        hint = f"likely --hu-offset -{offset}: air must come out near -1000"
    if fault:
        raise InputError(fault, path=path, hint=hint)
    if low > AIR + 100:
        notes.append(f"no air: the lowest value is {low:g} HU")


def _sample(hu: np.ndarray) -> np.ndarray:
    """(runs, voxels): runs of neighbours from all over the volume, all of it where it is small."""
    if hu.size <= _RUNS * _RUN:
        return hu[None]
    spread = (np.arange(_RUNS) * 0.6180339887498949) % 1  # golden ratio: in step with no row and no slice
    starts = (spread * (hu.size - _RUN)).astype(np.int64)
    return np.stack([hu[s : s + _RUN] for s in starts])


def _looks_labelled(runs: np.ndarray) -> bool:
    """Few whole numbers without noise: neighbours are nearly always equal."""
    if runs.dtype.kind == "f" and not np.array_equal(runs, np.rint(runs)):
        return False
    distinct = np.unique(runs).size
    same = np.mean(runs[:, 1:] == runs[:, :-1]) if runs.shape[1] > 1 else 0.0
    return bool(2 <= distinct <= _LABEL_VALUES and same >= _LABEL_FLATNESS)


def _looks_clipped(values: np.ndarray) -> bool:
    """A window of grey values: many voxels at the very bottom 0, or a last one at 255."""
    return bool(np.mean(values == 0) > 0.02 or (values.min() == 0 and values.max() >= 254.5))


def _likely_offset(values: np.ndarray) -> int:
    """1024 or 1000 where soft tissue lies near 1000 and not near 0; 0 where the values may be HU.

    Bone and contrast without air are all ≥ 0 too, but fall off from 0 up; tissue with an offset is a peak, and
    a peak takes many voxels to be seen.
    """
    if values.size < _PEAK_VOXELS:
        return 0
    tissue = np.mean((values > 850) & (values < 1250))
    between = np.mean((values > 350) & (values < 700))
    if tissue < 0.05 or tissue < 2 * between:
        return 0
    # air: 24 where 1024 was added, 0 where 1000 was; an exact 0 may be padding or a clipped value in both
    below, around = np.histogram(values, bins=[0.5, 12, 36])[0] / [11.5, 24]
    return 1000 if below > around else 1024
