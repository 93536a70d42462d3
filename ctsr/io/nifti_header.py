"""The NIfTI header as one checked record: what it says is right, or the file is refused.

Versions 1 and 2, both byte orders. Nothing is repaired: of a header that contradicts itself other readers
take one of the two answers without a word, and not all of them the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from ctsr.core.geometry import corners
from ctsr.errors import GeometryError, InputError, UsageError

__all__ = ["Header", "build_header", "checked_affine", "mm_per_unit", "read_header"]

_FIELDS = {
    348: "sizeof_hdr:i4 data_type:S10 db_name:S18 extents:i4 session_error:i2 regular:S1 dim_info:u1 dim:8i2 "
    "intent_p:3f4 intent_code:i2 datatype:i2 bitpix:i2 slice_start:i2 pixdim:8f4 vox_offset:f4 scl_slope:f4 "
    "scl_inter:f4 slice_end:i2 slice_code:u1 xyzt_units:u1 cal:2f4 slice_duration:f4 toffset:f4 gl:2i4 "
    "descrip:S80 aux_file:S24 qform_code:i2 sform_code:i2 quatern:3f4 qoffset:3f4 srow:(3,4)f4 "
    "intent_name:S16 magic:S4",
    540: "sizeof_hdr:i4 magic:S8 datatype:i2 bitpix:i2 dim:8i8 intent_p:3f8 pixdim:8f8 vox_offset:i8 "
    "scl_slope:f8 scl_inter:f8 cal:2f8 slice_duration:f8 toffset:f8 slice_start:i8 slice_end:i8 descrip:S80 "
    "aux_file:S24 qform_code:i4 sform_code:i4 quatern:3f8 qoffset:3f8 srow:(3,4)f8 slice_code:i4 "
    "xyzt_units:i4 intent_code:i4 intent_name:S16 dim_info:u1 unused:S15",
}
_Order = Literal["little", "big"]
_ORDERS: tuple[_Order, _Order] = ("little", "big")
_MAGIC = {348: b"n+1", 540: b"n+2\0\r\n\x1a\n"}
_CODES = (2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280)
_TYPES = dict(zip(_CODES, ("u1", "i2", "i4", "f4", "f8", "i1", "u2", "u4", "i8", "u8"), strict=True))
_WRITABLE = {np.dtype(kind): code for code, kind in _TYPES.items() if code < 1024}
_NOT_CT = {32: "complex, ", 1792: "complex, ", 2048: "complex, ", 128: "RGB, ", 2304: "RGBA, "}
_UNITS = {
    0: (1.0, "unknown, taken as mm"),
    1: (1000.0, "metres, turned into mm"),
    2: (1.0, ""),
    3: (0.001, "microns, turned into mm"),
}
_LABEL_INTENT = 1002
_LARGEST_SIDE = 32767  # dim is int16 in version 1
_LARGEST_OFFSET = 1 << 24  # bytes; a claimed size is not a reason to allocate it

_SCALE_TOLERANCE = 1e-3  # pixdim against the sform's columns, relative
_FORM_TOLERANCE = 0.1  # mm at the farthest corner, sform against qform
_SHEAR_ROUNDING = 1e-4  # cosine between two axes that rounding explains, and the most that ITK opens
_SHEAR_LIMIT = 1e-2  # cosine; 0.6 degrees. More is a tilted gantry
_ORIGIN_LIMIT = 1e5  # mm

_CONVERT = "convert the DICOM series, with ctsr convert"
_SLICER = "save it as .nii.gz, for example with 3D Slicer"
_PAIR = ("one half of a .hdr/.img pair, a single .nii file expected", "nib-convert x.hdr x.nii.gz")
_ANALYZE = ("no orientation: an Analyze 7.5 file, which does not say left from right", _CONVERT)
_FOREIGN = (  # where, what stands there; what it is, what to do
    (128, b"DICM", "a DICOM file, not NIfTI", "ctsr convert turns a series into NIfTI"),
    (0, b"NRRD", "an NRRD file, not NIfTI", _SLICER),
    (0, b"ObjectType", "a MetaImage, not NIfTI", _SLICER),
    (0, b"NDims", "a MetaImage, not NIfTI", _SLICER),
    (0, b"\x1f\x8b", "gzip inside gzip", "unpack it once"),
    (0, b"PK\x03\x04", "a zip archive, not NIfTI", "unpack it first"),
    (0, b"BZh", "bzip2, not NIfTI", "unpack it first"),
    (0, b"\xfd7zXZ", "xz, not NIfTI", "unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "zstd, not NIfTI", "unpack it first"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the image", "git lfs pull"),
    (344, b"n+1", "sizeof_hdr is neither 348 nor 540", ""),
    (344, b"ni1", "sizeof_hdr is neither 348 nor 540", ""),
)


@dataclass(frozen=True, slots=True, eq=False)
class Header:
    """What a NIfTI file holds and where it lies, checked.

    shape: (I, J, K). affine: (4, 4) float64, index → RAS+ mm.
    dtype: as stored, with its byte order. slope, inter: HU = slope · stored + inter.
    form_code: of the form that the affine comes from. slice_axis: from dim_info, None where it says nothing.
    is_label: whether the file says that its numbers are labels.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    dtype: np.dtype
    slope: float = 1.0
    inter: float = 0.0
    form_code: int = 1
    slice_axis: int | None = None
    is_label: bool = False

    @property
    def n_bytes(self) -> int:
        """Size of the voxels, bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def _refuse(path: str | None, is_wrong: bool, finding: str, hint: str = "") -> None:
    if is_wrong:
        raise GeometryError(finding, path=path, hint=hint)


def _struct(size: int) -> np.dtype:
    pairs = (field.split(":") for field in _FIELDS[size].split())
    return np.dtype([(name, kind) for name, kind in pairs]).newbyteorder("<")


@np.errstate(all="ignore")  # a damaged header holds any number; what comes of it is checked
def read_header(read: Callable[[int], bytes], path: str, *, form: str | None, notes: list[str]) -> Header:
    """The header at the start of a stream; leaves the stream where the voxels start.

    read: gives the next n bytes, fewer only at the end. form: "sform" or "qform" where the user chose one.
    """
    refuse = partial(_refuse, path)
    raw = read(348)
    known = ((s, o) for s in _FIELDS for o in _ORDERS if int.from_bytes(raw[:4], o) == s)
    size, order = next(known, (0, _ORDERS[0]))
    if not size:
        raise _foreign(raw, path)
    raw += read(size + 4 - len(raw))
    refuse(len(raw) < size + 4, f"truncated: {len(raw)} of {size + 4} header bytes")
    h = np.frombuffer(raw[:size], _struct(size).newbyteorder(order))[0]
    if (magic := bytes(h["magic"])) != _MAGIC[size]:
        other = (f"magic is {ascii(magic)[1:]}, {ascii(_MAGIC[size])[1:]} expected", "")
        refuse(True, *{b"ni1": _PAIR, b"ni2": _PAIR, b"": _ANALYZE}.get(magic, other))
    dim, code = h["dim"].tolist(), int(h["datatype"])
    refuse(not 1 <= dim[0] <= 7, f"dim[0] = {dim[0]} is not 3")
    refuse(dim[0] < 3, f"{dim[0]}D image, a volume has 3 axes")
    for i in range(1, dim[0] + 1):
        refuse(dim[i] < 1, f"dim[{i}] = {dim[i]}, at least 1 expected")
    refuse(dim[0] > 3 and dim[4] > 1, f"4D series of {dim[4]} volumes, one expected", "split it first")
    refuse(max(dim[5 : dim[0] + 1], default=1) > 1, f"{dim[0]}D image, a volume has 3 axes")
    refuse(code not in _TYPES, f"datatype = {code}, {_NOT_CT.get(code, '')}no type of CT numbers")
    dtype = np.dtype(_TYPES[code]).newbyteorder(order)
    refuse(h["bitpix"] != dtype.itemsize * 8, f"bitpix = {h['bitpix']} does not fit datatype = {code}")
    slope, inter = float(h["scl_slope"]), float(h["scl_inter"])
    refuse(not math.isfinite(slope + inter), f"scl_slope = {slope:g}, scl_inter = {inter:g}")
    refuse(slope == 0 and inter != 0, f"scl_slope = 0 with scl_inter = {inter:g}")
    refuse(slope != 0 and not 1e-6 <= abs(slope) <= 1e3, f"scl_slope = {slope:g} is outside 1e-6…1000")
    if slope < 0:
        notes.append(f"scl_slope = {slope:g} is negative: stored values run against HU")
    if (intent := int(h["intent_code"])) not in (0, _LABEL_INTENT):
        notes.append(f"intent code {intent} is ignored")
    offset, first = float(h["vox_offset"]), size + 4
    is_offset = offset % 1 == 0 and first <= offset <= _LARGEST_OFFSET
    refuse(not is_offset, f"vox_offset = {offset:g}, a whole number in {first}…{_LARGEST_OFFSET} expected")
    _check_extensions(read(int(offset) - first), int(offset) - first, raw[size] != 0, order, path, notes)
    shape = (dim[1], dim[2], dim[3])
    affine, form_code = _orientation(h, shape, form=form, path=path, notes=notes)
    axis = (int(h["dim_info"]) >> 4 & 3) - 1
    return Header(
        shape,
        affine,
        dtype,
        slope=slope or 1.0,  # 0 and 0 mean: not scaled
        inter=inter,
        form_code=form_code,
        slice_axis=axis if axis >= 0 else None,
        is_label=intent == _LABEL_INTENT,
    )


def _foreign(start: bytes, path: str) -> InputError:
    """What a file is that is no NIfTI file, by its first bytes."""
    if not start:
        return InputError("is empty", path=path)
    for where, mark, kind, hint in _FOREIGN:
        if start[where : where + len(mark)] == mark:
            return InputError(kind, path=path, hint=hint)
    shown = "".join(chr(c) if 32 <= c < 127 and chr(c) not in '"\\' else f"\\x{c:02x}" for c in start[:8])
    return InputError(f'not a NIfTI file (starts with "{shown}")', path=path)


def _check_extensions(
    chain: bytes, expected: int, is_flagged: bool, order: _Order, path: str, notes: list[str]
) -> None:
    """Header extensions must fill the space up to the voxels exactly: else vox_offset is wrong, or they are."""
    refuse = partial(_refuse, path)
    told = "" if is_flagged else "no "
    refuse(
        is_flagged != (expected > 0), f"vox_offset leaves {expected} bytes, the header says {told}extensions"
    )
    refuse(len(chain) < expected, "truncated inside a header extension")
    at = 0
    while at < len(chain):
        step, left = int.from_bytes(chain[at : at + 4], order, signed=True), len(chain) - at
        is_wrong = step < 16 or step % 16 != 0 or step > left
        refuse(is_wrong, f"extension of {step} bytes, a multiple of 16 up to {left} expected")
        at += step
    if chain:
        notes.append("header extensions are not carried over")


def mm_per_unit(xyzt_units: int, *, path: str | None = None, notes: list[str]) -> float:
    """Millimetres in the header's unit of length; what is not mm gets a note."""
    _refuse(path, xyzt_units & 7 not in _UNITS, f"xyzt_units = {xyzt_units & 7} is no unit of length")
    scale, word = _UNITS[xyzt_units & 7]
    if word:
        notes.append(f"unit of length: {word}")
    return scale


def _orientation(
    h: np.void, shape: tuple[int, int, int], *, form: str | None, path: str, notes: list[str]
) -> tuple[np.ndarray, int]:
    """(4, 4) affine in mm and the code of the form it comes from."""
    refuse = partial(_refuse, path)
    scale = mm_per_unit(int(h["xyzt_units"]), path=path, notes=notes)
    in_mm = np.array([[scale], [scale], [scale], [1.0]])
    pixdim = np.asarray(h["pixdim"], np.float64)
    for i in (1, 2, 3):
        refuse(not 0 < pixdim[i] < math.inf, f"pixdim[{i}] = {pixdim[i]:g}, a length > 0 expected")
    codes = {name: int(h[f"{name}_code"]) for name in ("sform", "qform")}
    for name, code in codes.items():
        refuse(not 0 <= code <= 5, f"{name}_code = {code}, 0…5 expected")
    refuse(not any(codes.values()), "no orientation: sform and qform codes are 0", _CONVERT)
    chosen = form or ("sform" if codes["sform"] else "qform")
    refuse(codes[chosen] == 0, f"{form} was asked for, its code is 0")
    if chosen == "qform":
        return checked_affine(in_mm * _qform(h, pixdim, path), path=path, notes=notes), codes["qform"]
    affine = in_mm * np.vstack([np.asarray(h["srow"], np.float64), [0, 0, 0, 1]])
    affine = checked_affine(affine, path=path, notes=notes)
    if form is None:
        spacing, told = np.linalg.norm(affine[:3, :3], axis=0), pixdim[1:4] * scale
        i = int(np.abs(spacing / told - 1).argmax())
        reason = f"axis {i}: pixdim says {told[i]:g} mm, sform {spacing[i]:g} mm"
        hint = "--form sform or --form qform decides"
        refuse(abs(spacing[i] / told[i] - 1) > _SCALE_TOLERANCE, reason, hint)
        if codes["qform"]:
            _compare(affine, in_mm * _qform(h, pixdim, path), h, shape, path)
    return affine, codes["sform"]


def _qform(h: np.void, pixdim: np.ndarray, path: str) -> np.ndarray:
    """(4, 4) in the file's unit: rotation of the quaternion, pixdim, qoffset (nifti1.h, method 2)."""
    refuse = partial(_refuse, path)
    q, qoffset = (np.asarray(h[name], np.float64) for name in ("quatern", "qoffset"))
    excess = float(q @ q) - 1
    refuse(not math.isfinite(excess), f"quaternion is {q.tolist()}")
    refuse(excess > 1e-5, f"quaternion has b² + c² + d² = {1 + excess:.6g}, at most 1 expected")
    refuse(not np.isfinite(qoffset).all(), f"qoffset is {qoffset.tolist()}")
    refuse(pixdim[0] not in (-1, 0, 1), f"pixdim[0] (qfac) = {pixdim[0]:g}, -1 or 1 expected")
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
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    unsheared = affine.copy()
    unsheared[:3, :3] = _nearest_rotation(affine) * spacing
    away = float(np.linalg.norm(corners(unsheared, shape) - corners(qform, shape), axis=1).max())
    # The quaternion's a² is what b² + c² + d² leave of 1: near a half turn (a = 0, the usual order of CT)
    # float32 leaves a uncertain by up to √(2·10⁻⁷), which turns the whole volume by twice that.
    rounding = 2e-7 if h["quatern"].dtype.itemsize == 4 else 0.0
    a = math.sqrt(max(rounding, 1 - float(np.sum(np.asarray(h["quatern"], np.float64) ** 2))))
    turned = 2 * float(np.linalg.norm(spacing * shape)) * rounding / a if a else 0.0
    shown = " and ".join(
        f"{name} [{'; '.join(' '.join(f'{x:.5g}' for x in row) for row in m[:3])}]"
        for name, m in (("sform", affine), ("qform", qform))
    )
    reason = f"sform and qform lie {away:.3g} mm apart, {_FORM_TOLERANCE} mm allowed: {shown}"
    _refuse(path, away > _FORM_TOLERANCE + turned, reason, "--form sform or --form qform decides")


def checked_affine(affine: np.ndarray, *, path: str | None = None, notes: list[str]) -> np.ndarray:
    """`affine` (4, 4) where it is a grid that a patient could lie in, else GeometryError.

    Spacings are 0.01 to 10 mm in plane and 0.05 to 50 mm between slices, axes perpendicular to 10⁻⁴ (to 10⁻²
    with a note), the origin is within 100 m.
    """
    refuse = partial(_refuse, path)
    refuse(not np.isfinite(affine).all(), f"the affine is not finite: {affine[:3].tolist()}")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    low, middle, high = sorted(spacing)
    refuse(low == 0, f"the sform has a zero column (axis {spacing.argmin()})")
    finding = f"voxels of {' × '.join(f'{s:.4g}' for s in spacing)} mm"
    is_in_range = low >= 0.01 and middle <= 10 and 0.05 <= high <= 50
    allowed = "0.01…10 in plane and 0.05…50 between slices expected"
    refuse(not is_in_range, f"{finding}, {allowed}", "is the unit right?")
    away = np.abs(affine[:3, 3]).max()
    refuse(away > _ORIGIN_LIMIT, f"the origin lies {away:.3g} mm away")
    is_singular = abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3
    refuse(is_singular, "the affine is singular: axes run the same way")
    shear = _shear(affine)
    tilt = math.degrees(math.asin(shear))
    refuse(shear > _SHEAR_LIMIT, f"sheared by {tilt:.1f}° (gantry tilt)", _CONVERT)
    if shear > _SHEAR_ROUNDING:
        notes.append(f"axes are sheared by {tilt:.3f}°: the sform is kept as it is")
    return affine


def _shear(affine: np.ndarray) -> float:
    """Largest cosine between two axes."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return min(1.0, float(np.abs(directions.T @ directions)[np.triu_indices(3, 1)].max()))


def _nearest_rotation(affine: np.ndarray) -> np.ndarray:
    """(3, 3) orthogonal matrix nearest to the axes' directions (polar decomposition); keeps a reflection."""
    u, _, vt = np.linalg.svd(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    return np.asarray(u @ vt)


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
    affine is slightly sheared the qform has the nearest rotation, so that readers which want one open it;
    where it is sheared by a tilted gantry there is no qform: a quaternion can't hold a shear.
    """
    if max(shape) > _LARGEST_SIDE:
        raise UsageError(f"{max(shape)} voxels along an axis, NIfTI-1 holds {_LARGEST_SIDE}")
    code = _WRITABLE.get(dtype.newbyteorder("="))
    if code is None:
        known = ", ".join(sorted(str(t) for t in _WRITABLE))
        raise UsageError(f"{dtype} voxels can't be stored, one of {known} expected")
    h = np.zeros((), _struct(348))
    rotation = _nearest_rotation(affine)
    qfac = -1.0 if np.linalg.det(rotation) < 0 else 1.0
    h["sizeof_hdr"], h["magic"], h["regular"], h["descrip"] = 348, _MAGIC[348], b"r", b"ctsr"
    h["dim"] = (3, *shape, 1, 1, 1, 1)
    h["pixdim"] = (qfac, *np.linalg.norm(affine[:3, :3], axis=0), 1, 1, 1, 1)
    h["datatype"], h["bitpix"] = code, dtype.itemsize * 8
    h["vox_offset"], h["scl_slope"], h["xyzt_units"] = 352, 1, 2
    h["dim_info"] = 0 if slice_axis is None else slice_axis + 1 << 4
    h["sform_code"] = form_code
    h["qform_code"] = 0 if _shear(affine) > _SHEAR_LIMIT else form_code
    h["quatern"] = _quaternion(rotation * [1, 1, qfac])
    h["qoffset"], h["srow"] = affine[:3, 3], affine[:3]
    return h.tobytes() + bytes(4)
