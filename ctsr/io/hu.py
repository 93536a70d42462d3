"""Stored numbers to HU, and the refusal of numbers that can't be HU.

All of it works on the flat stream of voxels in the file's order (i fastest), in pieces: nothing as large as a
volume is held beside a result of another type.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ctsr.core.volume import AIR, PADDING_LIMIT, Volume
from ctsr.errors import InputError
from ctsr.io.nifti_header import Header

__all__ = ["volume_of"]

_PIECE = 1 << 20  # voxels
_LARGEST_HU = 1e5  # metal saturates at 3071 or 32767; nothing real is beyond

_RUNS, _RUN = 64, 4096  # a sample: so many runs of so many voxels, enough for shares to 1 %
_PEAK_VOXELS = 256  # a few voxels of bone look like an offset too
_LABEL_VALUES = 128  # TotalSegmentator has 118; a grey picture 256
_LABEL_FLATNESS = 0.8  # share of neighbours that are equal; CT with noise is below 0.1


def volume_of(
    stored: np.ndarray,
    header: Header,
    *,
    hu_offset: float = 0.0,
    slice_thickness: float | None = None,
    allow_labels: bool = False,
    allow_not_hu: bool = False,
    path: str | None = None,
    notes: list[str],
) -> Volume:
    """The volume of stored values (n,), i fastest, in HU; InputError where they can't be HU.

    The array is `stored` itself where it holds HU (a foreign byte order is turned in place), int16 where whole
    numbers come out that fit, else float32. A result keeps the stored type, but for those that others do not read.
    """
    hu = _to_hu(stored, header, inter=header.inter + hu_offset, path=path)
    runs = _sample(hu)
    values = runs[runs > PADDING_LIMIT]
    if header.is_label or _looks_labelled(runs, values):
        if not allow_labels:
            found = f"{np.unique(runs).size} whole numbers from {runs.min():g} to {runs.max():g}"
            raise InputError(f"label map ({found}), not CT", path=path)
    elif not allow_not_hu:
        _refuse_what_is_not_hu(values, is_byte=hu.dtype.itemsize == 1, path=path, notes=notes)
    native = header.dtype.newbyteorder("=")
    is_common = (native.kind in "iu" and native.itemsize <= 4) or native in (np.float32, np.float64)
    return Volume(
        hu.reshape(header.shape, order="F"),
        header.affine,
        slice_thickness=slice_thickness,
        slice_axis=header.slice_axis,
        stored_dtype=native if is_common else hu.dtype,
        form_code=header.form_code,
    )


def _pieces(n: int) -> Iterator[slice]:
    return (slice(start, start + _PIECE) for start in range(0, n, _PIECE))


def _to_hu(stored: np.ndarray, header: Header, *, inter: float, path: str | None) -> np.ndarray:
    slope = header.slope
    if not stored.dtype.isnative:
        stored = stored.byteswap(inplace=True).view(stored.dtype.newbyteorder("="))
    low, high = _range(stored, header.shape, path)
    low, high = sorted((slope * low + inter, slope * high + inter))
    if low < -_LARGEST_HU or high > _LARGEST_HU:
        raise InputError(f"values from {low:.6g} to {high:.6g}: HU lie within ±{_LARGEST_HU:g}", path=path)
    is_integer = stored.dtype.kind in "iu"
    is_fit = stored.dtype == np.float32 or (is_integer and stored.dtype.itemsize < 8)
    if (slope, inter) == (1.0, 0.0) and is_fit:
        return stored
    is_whole = is_integer and slope == int(slope) and inter == int(inter) and -32768 <= low <= high <= 32767
    hu = np.empty(stored.size, np.int16 if is_whole else np.float32)
    for piece in _pieces(stored.size):
        hu[piece] = stored[piece].astype(np.float64) * slope + inter
    return hu


def _range(stored: np.ndarray, shape: tuple[int, int, int], path: str | None) -> tuple[float, float]:
    """Smallest and largest value; refuses what is not finite, with the count and the first place."""
    with np.errstate(invalid="ignore"):
        ends = [(float(stored[p].min()), float(stored[p].max())) for p in _pieces(stored.size)]
    if not np.isfinite(ends).all():  # min and max carry NaN along
        bad = np.concatenate(
            [np.flatnonzero(~np.isfinite(stored[p])) + p.start for p in _pieces(stored.size)]
        )
        place = ",".join(str(int(x)) for x in np.unravel_index(bad[0], shape, order="F"))
        are = "voxels are" if bad.size > 1 else "voxel is"
        raise InputError(f"{bad.size:,} {are} not finite (first at {place})", path=path)
    lows, highs = zip(*ends, strict=True)
    return min(lows), max(highs)


def _refuse_what_is_not_hu(values: np.ndarray, *, is_byte: bool, path: str | None, notes: list[str]) -> None:
    """Look at a sample of values as one who knows CT would; a volume that is constant or has no air gets a note.

    An offset of 1000 or 1024 is told by its peaks, with the option that mends it.
    """
    if not values.size:
        notes.append("all voxels are scanner padding")
        return
    low, high = float(values.min()), float(values.max())
    fault, hint = "", "convert the DICOM series again, with ctsr convert"
    if low == high:
        notes.append(f"all voxels are {low:g} HU")
    elif low >= -1 and high <= 1:
        fault = f"values {low:.3g}…{high:.3g}: not HU, but a picture scaled to 1"
    elif low >= 0 and high <= 255.5 and (is_byte or _looks_clipped(values)):
        fault = f"values {low:.4g}…{high:.4g}: not HU, but a picture of 8 bits"
    elif low >= 0 and (offset := _likely_offset(values)):
        fault = f"no value below 0 and tissue near 1000: HU with {offset} added"
        hint = f"likely --hu-offset -{offset}: air must come out near -1000"
    elif low > AIR + 100:
        notes.append(f"no air: the lowest value is {low:g} HU")
    if fault:
        raise InputError(fault, path=path, hint=hint)


def _sample(hu: np.ndarray) -> np.ndarray:
    """(runs, voxels): runs of neighbours from all over the volume, all of it where it is small."""
    if hu.size <= _RUNS * _RUN:
        return hu[None]
    spread = (np.arange(_RUNS) * 0.6180339887498949) % 1  # golden ratio: in step with no row and no slice
    return np.stack([hu[s : s + _RUN] for s in (spread * (hu.size - _RUN)).astype(np.int64)])


def _looks_labelled(runs: np.ndarray, values: np.ndarray) -> bool:
    """Few whole numbers from 0 on without noise: neighbours are nearly always equal."""
    if values.min(initial=0) < 0 or (runs.dtype.kind == "f" and not np.array_equal(runs, np.rint(runs))):
        return False
    same = np.mean(runs[:, 1:] == runs[:, :-1]) if runs.shape[1] > 1 else 0.0
    return bool(2 <= np.unique(runs).size <= _LABEL_VALUES and same >= _LABEL_FLATNESS)


def _looks_clipped(values: np.ndarray) -> bool:
    """A window of grey values: many voxels at the very bottom 0, or a last one at 255."""
    return bool(np.mean(values == 0) > 0.02 or (values.min() == 0 and values.max() >= 254.5))


def _likely_offset(values: np.ndarray) -> int:
    """1024 or 1000 where soft tissue lies near 1000 and not near 0; 0 where the values may be HU.

    Bone and contrast without air are all ≥ 0 too, but fall off from 0 up; tissue with an offset is a peak, and
    a peak takes many voxels to be seen.
    """
    tissue = np.mean((values > 850) & (values < 1250))
    between = np.mean((values > 350) & (values < 700))
    if values.size < _PEAK_VOXELS or tissue < 0.05 or tissue < 2 * between:
        return 0
    # air: 24 where 1024 was added, 0 where 1000 was; an exact 0 may be padding or a clipped value in both
    below, around = np.histogram(values, bins=[0.5, 12, 36])[0] / [11.5, 24]
    return 1000 if below > around else 1024
