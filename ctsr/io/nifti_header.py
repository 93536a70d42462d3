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

from ctsr.errors import GeometryError, InputError, UsageError
from ctsr.io.nifti_form import CONVERT, first_fault, is_tilted, nearest_rotation, orientation, quaternion

__all__ = ["LABEL_INTENT", "Header", "build_header", "read_header"]

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
LABEL_INTENT = 1002
_LARGEST_SIDE = 32767  # dim is int16 in version 1


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
    first_fault(
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
    affine, form_code = orientation(h, (i, j, k), form=form, path=path, notes=notes)
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


_DICOM = ("a DICOM file, not NIfTI", "ctsr convert turns a series into NIfTI")
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
    where it is sheared by a tilted gantry there is no qform.
    """
    if max(shape) > _LARGEST_SIDE:
        raise UsageError(f"{max(shape)} voxels along an axis, NIfTI-1 holds {_LARGEST_SIDE}")
    code = _WRITABLE.get(dtype.newbyteorder("="))
    if code is None:
        known = ", ".join(sorted(str(t) for t in _WRITABLE))
        raise UsageError(f"{dtype} voxels can't be stored, one of {known} expected")
    h = np.zeros((), _struct(_VERSION_1, "<"))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    rotation = nearest_rotation(affine)
    qfac = -1.0 if np.linalg.det(rotation) < 0 else 1.0
    h["sizeof_hdr"], h["magic"], h["regular"], h["descrip"] = 348, _MAGIC[348], b"r", b"ctsr"
    h["dim"] = (3, *shape, 1, 1, 1, 1)
    h["pixdim"] = (qfac, *spacing, 1, 1, 1, 1)
    h["datatype"], h["bitpix"] = code, dtype.itemsize * 8
    h["vox_offset"], h["scl_slope"], h["scl_inter"] = 352, 1, 0
    h["xyzt_units"] = 2
    h["dim_info"] = 0 if slice_axis is None else slice_axis + 1 << 4
    h["sform_code"] = form_code
    h["qform_code"] = 0 if is_tilted(affine) else form_code  # a quaternion can't hold a shear
    h["quatern"] = quaternion(rotation * [1, 1, qfac])
    h["qoffset"] = affine[:3, 3]
    h["srow"] = affine[:3]
    return h.tobytes() + bytes(4)
