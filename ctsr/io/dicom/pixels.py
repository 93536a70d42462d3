"""Stored values of CT slices, whatever their encoding: bits masked, signs extended, nothing filled in."""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ctsr.errors import InputError
from ctsr.io.atomic import input_error
from ctsr.io.dicom.decoder import JPEG, JPEG_2000, JPEG_LS, DecodeError, Decoder, codestream
from ctsr.io.dicom.elements import number, quiet, short, text
from ctsr.io.dicom.frames import NATIVE
from ctsr.io.dicom.header import BIG_ENDIAN, DEFLATED
from ctsr.io.dicom.records import DicomFile, Slice
from ctsr.io.dicom.source import read_bytes

__all__ = ["Stored", "check_stored", "fingerprint", "is_lossy", "read_pixels"]

RLE = "1.2.840.10008.1.2.5"
_ROOT = "1.2.840.10008.1.2.4."
_LOSSY = frozenset(_ROOT + n for n in ("50", "51", "53", "55", "81"))
_PERHAPS_LOSSY = frozenset(_ROOT + n for n in ("91", "203"))  # JPEG 2000, HTJ2K
# what pydicom raises on fragments that contradict themselves
_DAMAGED = (ValueError, RuntimeError, IndexError, KeyError, AttributeError, EOFError, struct.error)


@dataclass(frozen=True, slots=True)
class Stored:
    """Of one slice: least and greatest stored value, whether values are signed, their bits, whether loss is known."""

    low: int
    high: int
    is_signed: bool
    bits: int
    is_lossy: bool


def check_stored(slices: Sequence[Slice]) -> list[str]:
    """Refuse, from headers alone, values that can't be read rightly or have no known scale in HU; returns warnings.

    InputError names the first file.
    """
    warnings = []
    for s in slices:
        if reason := _fault(s):
            raise InputError(reason, path=s.file.name)
        if s.rescale_type == "US":
            warnings.append("RescaleType is US (unspecified): taken as HU")
    n_bare = sum(s.slope is None for s in slices)
    if 0 < n_bare < len(slices):
        raise InputError(f"{n_bare} of {len(slices)} slices have no RescaleSlope", path=slices[0].file.name)
    return warnings[:1]


def _fault(s: Slice) -> str:
    """Why the stored values of a slice are not to be trusted; "" where they are."""
    allocated, stored, high = (short(s.header, tag) for tag in (0x00280100, 0x00280101, 0x00280102))
    if s.transfer_syntax not in NATIVE | JPEG | JPEG_LS | JPEG_2000 | {RLE}:
        from pydicom.uid import UID

        return f"transfer syntax {UID(s.transfer_syntax).name} is not read: convert it to a lossless one"
    if allocated != 16 and (allocated != 8 or s.transfer_syntax not in JPEG):
        return f"BitsAllocated is {allocated}, not 16"
    if stored is None or not 8 <= stored <= allocated or high != stored - 1:
        return f"BitsStored {stored} and HighBit {high} do not fit together"
    if short(s.header, 0x00280103) not in (0, 1):
        return "PixelRepresentation is neither 0 nor 1"
    if 0x00283000 in s.header:
        return "has a Modality LUT instead of a rescale"
    if s.rescale_type not in ("", "HU") and (s.rescale_type != "US" or s.image_type[:1] == ("DERIVED",)):
        named = s.rescale_type if re.fullmatch("[A-Z_]{1,16}", s.rescale_type) else "something else"
        return f"values are {named} by RescaleType, not HU"
    if (s.slope is None) != (s.intercept is None):
        return f"has no {'RescaleSlope' if s.slope is None else 'RescaleIntercept'}"
    if s.slope is not None and not 0 < s.slope < math.inf:
        return f"RescaleSlope is {s.slope:g}"
    return ""


def is_lossy(s: Slice, *, is_reversible: bool = False) -> bool:
    """Whether the pixels were once compressed with loss, by the header; is_reversible: their codestream is not."""
    told = text(s.header, 0x00282110)
    perhaps = s.transfer_syntax in _PERHAPS_LOSSY and told != "00" and not is_reversible
    return told == "01" or s.transfer_syntax in _LOSSY or perhaps


def fingerprint(s: Slice) -> tuple[object, ...]:
    """Equal for two slices that hold the same bytes as HU of the same scale. InputError."""
    coded = (short(s.header, tag) for tag in (0x00280101, 0x00280103))  # BitsStored, PixelRepresentation
    scale = (s.slope, s.intercept, s.transfer_syntax, *coded)
    if not _is_plain(s):
        return (*scale, s.frame, _digest(s.file, s.pixel_offset))
    pixels = np.empty(s.shape, dtype=np.int16)
    _read_plain(s, pixels)
    return (*scale, hashlib.sha256(pixels.data).digest())


@lru_cache(maxsize=1024)
def _digest(file: DicomFile, start: int) -> bytes:
    return hashlib.sha256(memoryview(read_bytes(file))[start:]).digest()


def read_pixels(slices: Sequence[Slice], *, workers: int = 1) -> tuple[np.ndarray, list[Stored]]:
    """(K, rows, columns) the slices' stored values, 16 bit, and what is known of each slice.

    The array is int16; a slice that is not signed is to be seen as uint16. Slices have one shape, and their headers
    have passed `check_stored`. workers: threads, each with a decoding process of its own where one is needed.
    InputError: cut short, damaged, or not what its header says.
    """
    values = np.empty((len(slices), *slices[0].shape), dtype=np.int16)
    facts: dict[int, Stored] = {}

    def fill(first: int) -> None:
        file, frames = None, []  # of the last object that was read whole
        with Decoder() as decoder:
            for k in range(first, len(slices), workers):
                s = slices[k]
                if not _is_plain(s) and file != s.file:
                    file, frames = s.file, _frames(s)
                facts[k] = _read(s, frames, values[k], decoder)

    with ThreadPoolExecutor(workers) as pool:
        list((pool.map if workers > 1 else map)(fill, range(workers)))
    return values, [facts[k] for k in range(len(slices))]


def _read(s: Slice, frames: Sequence[Any], out: np.ndarray, decoder: Decoder) -> Stored:
    """Fill `out` with a slice, from the frames of its object where these were read whole."""
    is_signed = short(s.header, 0x00280103) == 1
    bits, loss = short(s.header, 0x00280101) or 16, is_lossy(s)
    if _is_plain(s):
        _read_plain(s, out)
    elif s.transfer_syntax in NATIVE:
        out[...] = np.frombuffer(frames[s.frame or 0], dtype=out.dtype).reshape(out.shape)
    else:
        precision, is_reversible = _decode(s, frames[s.frame or 0], out, decoder, is_signed=is_signed)
        bits, loss = min(bits, precision), is_lossy(s, is_reversible=is_reversible)
    if s.transfer_syntax == BIG_ENDIAN:
        out.byteswap(inplace=True)
    values = out if is_signed else out.view(np.uint16)
    if bits < 16:  # the standard lets unused bits hold anything; overlays were kept there until 2004
        values <<= 16 - bits
        values >>= 16 - bits  # of a signed type: extends the sign
    return Stored(int(values.min()), int(values.max()), is_signed, bits, loss)


def _is_plain(s: Slice) -> bool:
    """Whether the pixels stand as they are in a file of their own."""
    return s.file.member is None and s.transfer_syntax in NATIVE - {DEFLATED}


def _read_plain(s: Slice, out: np.ndarray) -> None:
    """Uncompressed pixels straight from the file into place."""
    try:
        with s.file.path.open("rb", buffering=0) as file:
            file.seek(s.pixel_offset + (s.frame or 0) * out.nbytes)
            n_read = file.readinto(out.data.cast("B")) or 0
    except OSError as exc:
        raise input_error(exc, s.file.name) from exc
    if n_read < out.nbytes:
        raise InputError(f"pixel data are cut short ({n_read} of {out.nbytes} bytes)", path=s.file.name)


def _frames(s: Slice) -> list[Any]:
    """The frames of an object, compressed or not; one may lie in several fragments, with or without offsets."""
    from pydicom.encaps import generate_frames

    expected = int(number(s.header, 0x00280008) or 1)
    data = memoryview(read_bytes(s.file))[s.pixel_offset :]
    if s.transfer_syntax in NATIVE:
        n_bytes = 2 * s.shape[0] * s.shape[1]
        if len(data) < n_bytes * expected:
            raise InputError("pixel data are cut short", path=s.file.name)
        return [data[k * n_bytes : (k + 1) * n_bytes] for k in range(expected)]
    try:
        with quiet():
            frames = list(generate_frames(bytes(data), number_of_frames=expected))
    except _DAMAGED as exc:
        raise InputError("compressed pixel data are damaged", path=s.file.name) from exc
    if len(frames) != expected:
        raise InputError(f"compressed pixel data hold {len(frames)} frames, not {expected}", path=s.file.name)
    return frames


def _decode(
    s: Slice, frame: bytes, out: np.ndarray, decoder: Decoder, *, is_signed: bool
) -> tuple[int, bool]:
    """Fill `out` from a compressed frame; returns the codestream's precision, and whether it is known as lossless."""
    rows, columns = out.shape
    try:
        if s.transfer_syntax == RLE:
            _unpack_rle(frame, out)
            return 16, True
        found = codestream(frame)
        if (found.height, found.width, found.components) != (rows, columns, 1):
            held = f"{found.width} × {found.height} × {found.components} values"
            raise DecodeError(f"compressed data hold {held}, the header says {columns} × {rows}")
        if not 2 <= found.precision <= 16:
            raise DecodeError(f"compressed data have {found.precision} bits, at most 16 are read")
        if found.is_signed and not is_signed:
            raise DecodeError("compressed data are signed, the header says unsigned")
        decoder.decode(frame, s.transfer_syntax, found, out)
    except DecodeError as exc:
        raise InputError(str(exc), path=s.file.name) from exc
    return found.precision, bool(found.is_reversible)


def _unpack_rle(frame: bytes, out: np.ndarray) -> None:
    """PS3.5 Annex G: a segment for the upper bytes, one for the lower ones, each in runs and copies."""
    try:
        n_segments, *starts = struct.unpack_from("<3L", frame)
        if n_segments != 2:
            raise DecodeError(f"RLE data have {n_segments} segments, 16 bits take 2")
        planes = out.view(np.uint8).reshape(*out.shape, 2)
        for at, plane in zip(starts, (1, 0), strict=True):  # `out` is little endian, as every machine here
            unpacked = bytearray()
            while len(unpacked) < out.size:
                head = frame[at]
                if head < 128:
                    unpacked += frame[at + 1 : at + 2 + head]
                    at += 2 + head
                else:  # 128 is no operation
                    unpacked += frame[at + 1 : at + 2] * (257 - head) if head > 128 else b""
                    at += 2 if head > 128 else 1
            planes[..., plane] = np.frombuffer(unpacked, np.uint8, out.size).reshape(out.shape)
    except (struct.error, IndexError):
        raise DecodeError("RLE data are damaged") from None
