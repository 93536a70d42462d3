"""The NIfTI header as one checked record: what it says is right, or the file is refused.

Versions 1 and 2, both byte orders. Nothing is repaired: of a header that contradicts itself other readers
take one of the two answers without a word, and not all of them the same one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctsr.core.geometry import corners
from ctsr.errors import GeometryError, InputError, UsageError

__all__ = ["LABEL_INTENT", "MM_PER_UNIT", "Header", "build_header", "checked_affine", "read_header"]

_VERSION_1 = (
    "sizeof_hdr:i4 data_type:S10 db_name:S18 extents:i4 session_error:i2 regular:S1 dim_info:u1 dim:8i2 "
    "intent_p:3f4 intent_code:i2 datatype:i2 bitpix:i2 slice_start:i2 pixdim:8f4 vox_offset:f4 scl_slope:f4 "
    "scl_inter:f4 slice_end:i2 slice_code:u1 xyzt_units:u1 cal:2f4 slice_duration:f4 toffset:f4 gl:2i4 "
    "descrip:S80 aux_file:S24 qform_code:i2 sform_code:i2 quatern:3f4 qoffset:3f4 srow:(3,4)f4 "
    "intent_name:S16 magic:S4"
)
_VERSION_2 = (
    "sizeof_hdr:i4 magic:S8 datatype:i2 bitpix:i2 dim:8i8 intent_p:3f8 pixdim:8f8 vox_offset:i8 scl_slope:f8 "
    "scl_inter:f8 cal:2f8 slice_duration:f8 toffset:f8 slice_start:i8 slice_end:i8 descrip:S80 aux_file:S24 "
    "qform_code:i4 sform_code:i4 quatern:3f8 qoffset:3f8 srow:(3,4)f8 slice_code:i4 xyzt_units:i4 "
    "intent_code:i4 intent_name:S16 dim_info:u1 unused:S15"
)


def _struct(fields: str, order: Any) -> np.dtype:
    pairs = (field.split(":") for field in fields.split())
    return np.dtype([(name, kind) for name, kind in pairs]).newbyteorder(order)


_FIELDS = {348: _VERSION_1, 540: _VERSION_2}
_MAGIC = {348: b"n+1", 540: b"n+2\0\r\n\x1a\n"}
_TYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
_WRITABLE = {np.dtype(kind): code for code, kind in _TYPES.items() if code < 1024}
_NOT_CT = {
    1: "a bit mask",
    128: "an RGB image",
    1536: "a 128-bit image",
    2304: "an RGBA image",
    **dict.fromkeys((32, 1792, 2048), "a complex image"),
}
MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown (taken as mm), metre, mm, micron
LABEL_INTENT = 1002
CONVERT = "convert the DICOM series with ctsr convert"
_LARGEST_SIDE = 32767  # dim is int16 in version 1

_SCALE_TOLERANCE = 1e-3  # pixdim against the sform's columns, relative
_FORM_TOLERANCE = 0.1  # mm at the farthest corner, sform against qform
_SHEAR_ROUNDING = 1e-4  # cosine between two axes that rounding explains, and the most that ITK opens
_SHEAR_LIMIT = 1e-2  # cosine; 0.6 degrees. More is a tilted gantry
_SPACING_RANGE = (0.01, 50.0)  # mm
_INPLANE_LIMIT = 10.0  # mm; two of the three spacings are below
_SLICE_MINIMUM = 0.05  # mm; the largest spacing is above
_ORIGIN_LIMIT = 1e5  # mm


@dataclass(frozen=True, slots=True, eq=False)
class Header:
    """What a NIfTI file holds and where it lies, checked.

    shape: (I, J, K). affine: (4, 4) float64, index → RAS+ mm.
    dtype: as stored, with its byte order. slope, inter: HU = slope · stored + inter.
    form_code: of the form that the affine comes from. slice_axis: from dim_info, None where it says nothing.
    voxel_offset: byte at which the voxels start. intent: NIfTI's intent code.
    slice_thickness: mm, from the sidecar; None where there is none.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    dtype: np.dtype
    slope: float
    inter: float
    form_code: int
    slice_axis: int | None
    voxel_offset: int
    intent: int
    slice_thickness: float | None = None

    @property
    def n_bytes(self) -> int:
        """Size of the voxels, bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def spacing(self) -> np.ndarray:
        """Distance between neighbouring voxel centres along each axis, mm, (3,)."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))


@np.errstate(all="ignore")  # a damaged header holds any number; what comes of it is checked
def read_header(read: Callable[[int], bytes], path: str, *, form: str | None, notes: list[str]) -> Header:
    """The header at the start of a stream; leaves the stream where the voxels start.

    read: gives the next n bytes, fewer only at the end. form: "sform" or "qform" where the user chose one.
    """
    start = read(348)
    size, order = _size_and_order(start, path)
    start += read(size + 4 - len(start))
    if len(start) < size + 4:
        raise InputError(f"truncated: {len(start)} of {size + 4} header bytes", path=path)
    h = np.frombuffer(start[:size], _struct(_FIELDS[size], order))[0]
    if h["magic"] != _MAGIC[size]:
        raise _wrong_magic(bytes(h["magic"]), _MAGIC[size], path)
    dim, code = [int(d) for d in h["dim"]], int(h["datatype"])
    slope, inter = float(h["scl_slope"]), float(h["scl_inter"])
    offset = float(h["vox_offset"])
    side = next((i for i in range(1, 8) if i <= dim[0] and dim[i] < 1), 0)
    _first_fault(
        path,
        [
            (not 1 <= dim[0] <= 7, f"dim[0] = {dim[0]} is not 3"),
            (dim[0] < 3, f"{dim[0]}D image, a volume has 3 axes"),
            (side > 0, f"dim[{side}] = {dim[side]}, at least 1 expected"),
            (dim[0] > 3 and dim[4] > 1, f"4D series of {dim[4]} volumes, one expected", "split it first"),
            (any(d > 1 for d in dim[5 : dim[0] + 1]), f"{dim[0]}D image, a volume has 3 axes"),
            (code in _NOT_CT, f"{_NOT_CT.get(code)}, not CT (datatype = {code})"),
            (code not in _TYPES, f"datatype = {code} is none that NIfTI knows"),
            (
                code in _TYPES and h["bitpix"] != np.dtype(_TYPES.get(code, "u1")).itemsize * 8,
                f"bitpix = {h['bitpix']} does not fit datatype = {code}",
            ),
            (
                not (math.isfinite(slope) and math.isfinite(inter)),
                f"scl_slope = {slope:g}, scl_inter = {inter:g}",
            ),
            (slope == 0 and inter != 0, f"scl_slope = 0 with scl_inter = {inter:g}"),
            (slope != 0 and not 1e-6 <= abs(slope) <= 1e3, f"scl_slope = {slope:g} is outside 1e-6…1000"),
            (
                not (math.isfinite(offset) and offset == int(offset) and offset >= size + 4),
                f"vox_offset = {offset:g}, a whole number from {size + 4} on expected",
            ),
        ],
    )
    if slope < 0:
        notes.append(f"scl_slope = {slope:g} is negative: stored values run against HU")
    if int(h["intent_code"]) not in (0, LABEL_INTENT):
        notes.append(f"intent code {h['intent_code']} is ignored")
    _read_extensions(read, start[size:], int(offset) - size - 4, order, path, notes)
    i, j, k = dim[1:4]
    affine, form_code = _orientation(h, (i, j, k), form=form, path=path, notes=notes)
    slice_axis = (int(h["dim_info"]) >> 4 & 3) - 1
    return Header(
        shape=(i, j, k),
        affine=affine,
        dtype=np.dtype(_TYPES[code]).newbyteorder(order),  # type: ignore[arg-type]
        slope=slope or 1.0,  # 0 and 0 mean: not scaled
        inter=inter,
        form_code=form_code,
        slice_axis=slice_axis if slice_axis >= 0 else None,
        voxel_offset=int(offset),
        intent=int(h["intent_code"]),
    )


def _first_fault(path: str, checks: list[tuple[Any, ...]], error: type[InputError] = InputError) -> None:
    """Raise for the first check that is wrong. checks: (is wrong, what was found[, what to do])."""
    for is_wrong, finding, *hint in checks:
        if is_wrong:
            raise error(finding, path=path, hint="".join(hint))


def _size_and_order(start: bytes, path: str) -> tuple[int, str]:
    for order in "<>":
        size = int(np.frombuffer(start[:4], f"{order}i4")[0]) if len(start) >= 4 else 0
        if size in _FIELDS:
            return size, order
    if start[344:347] in (b"n+1", b"ni1"):
        raise InputError(
            f"sizeof_hdr = {int.from_bytes(start[:4], 'little', signed=True)}, 348 expected", path=path
        )
    raise _foreign(start, path)


_DICOM = ("a DICOM file, not NIfTI", "ctsr convert FOLDER turns a series into NIfTI")
_NRRD = ("an NRRD file, not NIfTI", "save it as .nii.gz, for example with 3D Slicer")
_META = ("a MetaImage, not NIfTI", "save it as .nii.gz, for example with 3D Slicer")
_PAIR = ("one half of a .hdr/.img pair, a single .nii file expected", "nib-convert x.hdr x.nii.gz")
_FOREIGN = (  # where, what stands there; what it is, what to do
    (128, b"DICM", *_DICOM),
    (0, b"NRRD", *_NRRD),
    (0, b"ObjectType", *_META),
    (0, b"NDims", *_META),
    (0, b"\x1f\x8b", "gzip inside gzip", "unpack it once"),
    (0, b"PK\x03\x04", "a zip archive, not NIfTI", "unpack it first"),
    (0, b"BZh", "bzip2, not NIfTI", "unpack it first"),
    (0, b"\xfd7zXZ", "xz, not NIfTI", "unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "zstd, not NIfTI", "unpack it first"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the image", "git lfs pull"),
)
_SUFFIXES = {
    ".dcm": _DICOM,
    ".nrrd": _NRRD,
    ".nhdr": _NRRD,
    ".mha": _META,
    ".mhd": _META,
    ".img": _PAIR,
}


def _foreign(start: bytes, path: str) -> InputError:
    """What a file is that is no NIfTI file: by its first bytes, else by its name."""
    if not start:
        return InputError("is empty", path=path)
    for where, mark, kind, hint in _FOREIGN:
        if start[where : where + len(mark)] == mark:
            return InputError(kind, path=path, hint=hint)
    if named := _SUFFIXES.get(os.path.splitext(path.lower().removesuffix(".gz"))[1]):
        return InputError(named[0], path=path, hint=named[1])
    shown = "".join(chr(c) if 32 <= c < 127 and chr(c) not in '"\\' else f"\\x{c:02x}" for c in start[:8])
    return InputError(f'not a NIfTI file (starts with "{shown}")', path=path)


def _wrong_magic(found: bytes, expected: bytes, path: str) -> InputError:
    if found in (b"ni1", b"ni2"):
        return InputError(f"magic is {found.decode()}: {_PAIR[0]}", path=path, hint=_PAIR[1])
    if not found:
        reason = "no orientation: an Analyze 7.5 file, which does not say left from right"
        return GeometryError(reason, path=path, hint=CONVERT)
    return InputError(f"magic is {ascii(found)[1:]}, {ascii(expected)[1:]} expected", path=path)


def _read_extensions(
    read: Callable[[int], bytes], flag: bytes, left: int, order: str, path: str, notes: list[str]
) -> None:
    """Step over header extensions, which must fill the space up to the voxels exactly."""
    if (flag[0] != 0) != (left > 0):
        raise InputError(
            f"vox_offset leaves {left} bytes, the header says {'' if flag[0] else 'no '}extensions", path=path
        )
    count = 0
    while left:
        head = read(8)
        size = int(np.frombuffer(head[:4], f"{order}i4")[0]) if len(head) == 8 else 0
        if size < 16 or size % 16 or size > left:
            raise InputError(f"extension of {size} bytes, a multiple of 16 up to {left} expected", path=path)
        skip = size - 8
        while skip:  # in pieces: a claimed size is not a reason to allocate it
            got = len(read(min(skip, 1 << 20)))
            if not got:
                raise InputError("truncated inside a header extension", path=path)
            skip -= got
        left -= size
        count += 1
    if count:
        notes.append(f"{count} header extension(s) are not carried over")


def _orientation(
    h: np.void, shape: tuple[int, int, int], *, form: str | None, path: str, notes: list[str]
) -> tuple[np.ndarray, int]:
    """(4, 4) affine in mm and the code of the form it comes from."""
    pixdim = np.asarray(h["pixdim"], np.float64)
    sform_code, qform_code, unit = int(h["sform_code"]), int(h["qform_code"]), int(h["xyzt_units"]) & 7
    odd = next((i for i in (1, 2, 3) if not (np.isfinite(pixdim[i]) and pixdim[i] > 0)), 0)
    chosen = {"sform": sform_code, "qform": qform_code}.get(form or "", 1)
    _first_fault(
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
    _first_fault(
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
    unsheared[:3, :3] = _nearest_rotation(affine) * np.linalg.norm(affine[:3, :3], axis=0)
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
    cosines = np.abs((affine[:3, :3] / spacing).T @ (affine[:3, :3] / spacing))[np.triu_indices(3, 1)]
    if (shear := float(cosines.max())) > _SHEAR_LIMIT:
        if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
            raise GeometryError("the affine is singular: axes run the same way", path=path)
        reason = f"sheared by {math.degrees(math.asin(min(1.0, shear))):.1f}° (gantry tilt)"
        raise GeometryError(reason, path=path, hint=CONVERT)
    if shear > _SHEAR_ROUNDING:
        notes.append(f"axes are sheared by {math.degrees(shear):.3f}°: the sform is kept as it is")
    return affine


def _nearest_rotation(affine: np.ndarray) -> np.ndarray:
    """(3, 3) orthogonal matrix nearest to the axes' directions (polar decomposition); keeps a reflection."""
    u, _, vt = np.linalg.svd(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    return np.asarray(u @ vt)


def build_header(
    shape: tuple[int, ...],
    dtype: np.dtype,
    affine: np.ndarray,
    *,
    form_code: int,
    slice_axis: int | None = None,
) -> bytes:
    """The 352 bytes before the voxels of a .nii file: little-endian, slope 1, sform = qform, mm.

    Always a fresh header: nothing of an input's header, where a name may hide, is carried over. Where the
    affine is slightly sheared the qform has the nearest rotation, so that readers which want one open it.
    """
    if max(shape) > _LARGEST_SIDE:
        raise UsageError(f"{max(shape)} voxels along an axis, NIfTI-1 holds {_LARGEST_SIDE}")
    code = _WRITABLE.get(dtype.newbyteorder("="))
    if code is None:
        known = ", ".join(sorted(str(t) for t in _WRITABLE))
        raise UsageError(f"{dtype} voxels can't be stored, one of {known} expected")
    h = np.zeros((), _struct(_VERSION_1, "<"))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    rotation = _nearest_rotation(affine)
    qfac = -1.0 if np.linalg.det(rotation) < 0 else 1.0
    h["sizeof_hdr"], h["magic"], h["regular"], h["descrip"] = 348, _MAGIC[348], b"r", b"ctsr"
    h["dim"] = (3, *shape, 1, 1, 1, 1)
    h["pixdim"] = (qfac, *spacing, 1, 1, 1, 1)
    h["datatype"], h["bitpix"] = code, dtype.itemsize * 8
    h["vox_offset"], h["scl_slope"], h["scl_inter"] = 352, 1, 0
    h["xyzt_units"] = 2
    h["dim_info"] = 0 if slice_axis is None else slice_axis + 1 << 4
    h["qform_code"] = h["sform_code"] = form_code
    h["quatern"] = _quaternion(rotation * [1, 1, qfac])
    h["qoffset"] = affine[:3, 3]
    h["srow"] = affine[:3]
    return h.tobytes() + bytes(4)


def _quaternion(r: np.ndarray) -> np.ndarray:
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
