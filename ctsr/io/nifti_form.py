"""Where a NIfTI file says that its voxels lie: sform and qform, and whether the two can be believed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ctsr.core.geometry import corners
from ctsr.errors import GeometryError, InputError

__all__ = [
    "CONVERT",
    "MM_PER_UNIT",
    "checked_affine",
    "first_fault",
    "is_tilted",
    "nearest_rotation",
    "orientation",
    "quaternion",
]

CONVERT = "convert the DICOM series, with ctsr convert"
MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown (taken as mm), metre, mm, micron
_SCALE_TOLERANCE = 1e-3  # pixdim against the sform's columns, relative
_FORM_TOLERANCE = 0.1  # mm at the farthest corner, sform against qform
_SHEAR_ROUNDING = 1e-4  # cosine between two axes that rounding explains, and the most that ITK opens
_SHEAR_LIMIT = 1e-2  # cosine; 0.6 degrees. More is a tilted gantry
_SPACING_RANGE = (0.01, 50.0)  # mm
_INPLANE_LIMIT = 10.0  # mm; two of the three spacings are below
_SLICE_MINIMUM = 0.05  # mm; the largest spacing is above
_ORIGIN_LIMIT = 1e5  # mm


def first_fault(path: str, checks: list[tuple[Any, ...]], error: type[InputError] = InputError) -> None:
    """Raise for the first check that is wrong. checks: (is wrong, what was found[, what to do])."""
    for is_wrong, finding, *hint in checks:
        if is_wrong:
            raise error(finding, path=path, hint="".join(hint))


def orientation(
    h: np.void, shape: tuple[int, int, int], *, form: str | None, path: str, notes: list[str]
) -> tuple[np.ndarray, int]:
    """(4, 4) affine in mm and the code of the form it comes from."""
    pixdim = np.asarray(h["pixdim"], np.float64)
    sform_code, qform_code, unit = int(h["sform_code"]), int(h["qform_code"]), int(h["xyzt_units"]) & 7
    odd = next((i for i in (1, 2, 3) if not (np.isfinite(pixdim[i]) and pixdim[i] > 0)), 0)
    chosen = {"sform": sform_code, "qform": qform_code}.get(form or "", 1)
    first_fault(
        path,
        [
            (unit not in MM_PER_UNIT, f"xyzt_units = {unit} is no unit of length"),
            (odd > 0, f"pixdim[{odd}] = {pixdim[odd]:g}, a length > 0 expected"),
            (not 0 <= sform_code <= 5, f"sform_code = {sform_code}, 0…5 expected"),
            (not 0 <= qform_code <= 5, f"qform_code = {qform_code}, 0…5 expected"),
            (sform_code == qform_code == 0, "no orientation: sform and qform codes are 0", CONVERT),
            (chosen == 0, f"{form} was asked for, its code is 0"),
        ],
        GeometryError,
    )
    scale = MM_PER_UNIT[unit]
    if unit != 2:
        word = {0: "unknown, taken as mm", 1: "metres, turned into mm", 3: "microns, turned into mm"}[unit]
        notes.append(f"unit of length: {word}")
    if form == "qform" or sform_code == 0:
        return checked_affine(_qform(h, pixdim, path) * _in_mm(scale), path=path, notes=notes), qform_code
    sform = np.vstack([np.asarray(h["srow"], np.float64), [0, 0, 0, 1]])
    affine = checked_affine(sform * _in_mm(scale), path=path, notes=notes)
    if form is None:
        spacing = np.linalg.norm(sform[:3, :3], axis=0)
        if (off := np.abs(spacing / pixdim[1:4] - 1)).max() > _SCALE_TOLERANCE:
            i = int(off.argmax())
            reason = f"axis {i}: pixdim says {pixdim[i + 1] * scale:g} mm, sform {spacing[i] * scale:g} mm"
            raise GeometryError(reason, path=path, hint="--form sform or --form qform decides")
        if qform_code:
            _compare(affine, _qform(h, pixdim, path) * _in_mm(scale), h, shape, path)
    return affine, sform_code


def _in_mm(scale: float) -> np.ndarray:
    return np.array([[scale], [scale], [scale], [1.0]])


def _qform(h: np.void, pixdim: np.ndarray, path: str) -> np.ndarray:
    """(4, 4) in the file's unit: rotation of the quaternion, pixdim, qoffset (nifti1.h, method 2)."""
    q = np.asarray(h["quatern"], np.float64)
    excess = float(q @ q) - 1
    qoffset = np.asarray(h["qoffset"], np.float64)
    first_fault(
        path,
        [
            (not math.isfinite(excess), f"quaternion is {q.tolist()}"),
            (excess > 1e-5, f"quaternion has b² + c² + d² = {1 + excess:.6g}, at most 1 expected"),
            (not np.isfinite(qoffset).all(), f"qoffset is {qoffset.tolist()}"),
            (pixdim[0] not in (-1, 0, 1), f"pixdim[0] (qfac) = {pixdim[0]:g}, -1 or 1 expected"),
        ],
        GeometryError,
    )
    a = math.sqrt(max(0.0, -excess))
    b, c, d = q / max(1.0, math.sqrt(1 + excess))
    affine = np.eye(4)
    affine[:3, :3] = [
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ]
    affine[:3, :3] *= pixdim[1:4] * [1, 1, -1 if pixdim[0] < 0 else 1]
    affine[:3, 3] = qoffset
    return affine


def _compare(
    affine: np.ndarray, qform: np.ndarray, h: np.void, shape: tuple[int, int, int], path: str
) -> None:
    """Refuse an sform and a qform that put the patient in two places; shear, foreign to a qform, aside."""
    unsheared = affine.copy()
    unsheared[:3, :3] = nearest_rotation(affine) * np.linalg.norm(affine[:3, :3], axis=0)
    away = float(np.linalg.norm(corners(unsheared, shape) - corners(qform, shape), axis=1).max())
    # The quaternion's a² is what b² + c² + d² leave of 1: near a half turn (a = 0, the usual order of CT)
    # float32 leaves a uncertain by up to √(2·10⁻⁷), which turns the whole volume by twice that.
    rounding = 2e-7 if h["quatern"].dtype.itemsize == 4 else 0.0
    a = math.sqrt(max(rounding, 1 - float(np.sum(np.asarray(h["quatern"], np.float64) ** 2))))
    extent = float(np.linalg.norm(np.linalg.norm(affine[:3, :3], axis=0) * shape))
    if away > _FORM_TOLERANCE + (2 * extent * rounding / a if a else 0.0):
        shown = " and ".join(
            f"{name} [{'; '.join(' '.join(f'{x:.5g}' for x in row) for row in m[:3])}]"
            for name, m in (("sform", affine), ("qform", qform))
        )
        reason = f"sform and qform lie {away:.3g} mm apart, {_FORM_TOLERANCE} mm allowed: {shown}"
        raise GeometryError(reason, path=path, hint="--form sform or --form qform decides")


def checked_affine(affine: np.ndarray, *, path: str | None = None, notes: list[str]) -> np.ndarray:
    """`affine` (4, 4) where it is a grid that a patient could lie in, else GeometryError.

    Spacings are bounded, axes perpendicular to 10⁻⁴ (to 10⁻² with a note), the origin is within 100 m.
    """
    if not np.isfinite(affine).all():
        raise GeometryError(f"the affine is not finite: {affine[:3].tolist()}", path=path)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    low, middle, high = sorted(spacing)
    zero = int(spacing.argmin())
    sizes = " × ".join(f"{s:.4g}" for s in spacing)
    in_range = (
        _SPACING_RANGE[0] <= low and middle <= _INPLANE_LIMIT and _SLICE_MINIMUM <= high <= _SPACING_RANGE[1]
    )
    if low == 0:
        raise GeometryError(f"the sform has a zero column (axis {zero})", path=path)
    if not in_range:
        (lowest, highest), inplane = _SPACING_RANGE, _INPLANE_LIMIT
        allowed = f"{lowest:g}…{inplane:g} in plane and {_SLICE_MINIMUM:g}…{highest:g} between slices"
        raise GeometryError(f"voxels of {sizes} mm, {allowed} expected", path=path, hint="is the unit right?")
    if np.abs(affine[:3, 3]).max() > _ORIGIN_LIMIT:
        raise GeometryError(f"the origin lies {np.abs(affine[:3, 3]).max():.3g} mm away", path=path)
    if (shear := _shear(affine)) > _SHEAR_LIMIT:
        if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
            raise GeometryError("the affine is singular: axes run the same way", path=path)
        reason = f"sheared by {math.degrees(math.asin(min(1.0, shear))):.1f}° (gantry tilt)"
        raise GeometryError(reason, path=path, hint=CONVERT)
    if shear > _SHEAR_ROUNDING:
        notes.append(f"axes are sheared by {math.degrees(shear):.3f}°: the sform is kept as it is")
    return affine


def is_tilted(affine: np.ndarray) -> bool:
    """Whether the axes are sheared as by a tilted gantry: more than rounding or a careless writer explains."""
    return _shear(affine) > _SHEAR_LIMIT


def _shear(affine: np.ndarray) -> float:
    """Largest cosine between two axes."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.abs(directions.T @ directions)[np.triu_indices(3, 1)].max())


def nearest_rotation(affine: np.ndarray) -> np.ndarray:
    """(3, 3) orthogonal matrix nearest to the axes' directions (polar decomposition); keeps a reflection."""
    u, _, vt = np.linalg.svd(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    return np.asarray(u @ vt)


def quaternion(r: np.ndarray) -> np.ndarray:
    """(3,) b, c, d of a rotation's unit quaternion, its a ≥ 0 (Bar-Itzhack 2000: the top eigenvector)."""
    k = np.array(
        [
            [r[0, 0] - r[1, 1] - r[2, 2], 0, 0, 0],
            [r[0, 1] + r[1, 0], r[1, 1] - r[0, 0] - r[2, 2], 0, 0],
            [r[0, 2] + r[2, 0], r[1, 2] + r[2, 1], r[2, 2] - r[0, 0] - r[1, 1], 0],
            [r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1], r[0, 0] + r[1, 1] + r[2, 2]],
        ]
    )
    b, c, d, a = np.linalg.eigh(k, UPLO="L")[1][:, -1]
    return np.array([b, c, d]) * (-1.0 if a < 0 else 1.0)
