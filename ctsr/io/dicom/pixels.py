"""Stored values of CT slices, whatever their encoding: bits masked, signs extended, nothing filled in."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO

import numpy as np

from ctsr.errors import InputError
from ctsr.io.atomic import input_error
from ctsr.io.dicom.decoder import JPEG, JPEG_2000, JPEG_LS, DecodeError, Decoder, codestream
from ctsr.io.dicom.elements import integer, quiet, short, text
from ctsr.io.dicom.records import DicomFile, Slice
from ctsr.io.dicom.source import BIG_ENDIAN, DEFLATED, EXPLICIT, IMPLICIT, read_bytes

__all__ = ["Stored", "check_pixels", "read_pixels"]

NATIVE = frozenset({IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED})
RLE = "1.2.840.10008.1.2.5"
_ROOT = "1.2.840.10008.1.2.4."
_JPEG_XL = _ROOT + "11"  # 110 to 112, too new for pydicom's names
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


def check_pixels(slices: Sequence[Slice]) -> None:
    """Refuse, from headers alone, pixel data that can't be read rightly. InputError names the first file."""
    for s in slices:
        allocated, stored, high = (short(s.header, tag) for tag in (0x00280100, 0x00280101, 0x00280102))
        if s.transfer_syntax not in NATIVE | JPEG | JPEG_LS | JPEG_2000 | {RLE}:
            from pydicom.uid import UID

            name = "JPEG XL" if s.transfer_syntax.startswith(_JPEG_XL) else UID(s.transfer_syntax).name
            raise InputError(
                f"transfer syntax {name} is not read", path=s.file.name, hint="convert it to a lossless one"
            )
        if allocated != 16 and (allocated != 8 or s.transfer_syntax not in JPEG):
            raise InputError(f"BitsAllocated is {allocated}, not 16", path=s.file.name)
        if stored is None or not 8 <= stored <= allocated or high != stored - 1:
            raise InputError(f"BitsStored {stored} and HighBit {high} do not fit together", path=s.file.name)
        if short(s.header, 0x00280103) not in (0, 1):
            raise InputError("PixelRepresentation is neither 0 nor 1", path=s.file.name)


def read_pixels(slices: Sequence[Slice], *, workers: int = 1) -> tuple[np.ndarray, list[Stored]]:
    """(K, rows, columns) the slices' stored values, 16 bit, and what is known of each slice.

    The array is int16; a slice that is not signed is to be seen as uint16. Slices have one shape, and their headers
    have passed `check_pixels`. workers: threads, each with a decoding process of its own where one is needed.
    InputError: cut short, damaged, or not what its header says.
    """
    rows, columns = slices[0].shape
    values = np.empty((len(slices), rows, columns), dtype=np.int16)
    facts: list[Stored | None] = [None] * len(slices)

    def fill(first: int) -> None:
        with ExitStack() as stack:
            read = _reader(stack)
            for k in range(first, len(slices), workers):
                facts[k] = read(slices[k], values[k])

    if workers == 1:
        fill(0)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, range(workers)))
    return values, [f for f in facts if f is not None]


def _reader(stack: ExitStack) -> Callable[[Slice, np.ndarray], Stored]:
    """A function that fills one slice; it keeps the last object's frames, and a decoder that `stack` closes."""
    decoder = stack.enter_context(Decoder())
    last: tuple[DicomFile, bytes | list[bytes]] | None = None

    def read(s: Slice, out: np.ndarray) -> Stored:
        nonlocal last
        is_signed = short(s.header, 0x00280103) == 1
        bits = short(s.header, 0x00280101) or 16
        is_lossy = text(s.header, 0x00282110) == "01" or s.transfer_syntax in _LOSSY
        is_native = s.transfer_syntax in NATIVE
        if s.pixel_offset is not None:
            _read_plain(s, out)
        else:
            if last is None or last[0] != s.file:
                data = _pixel_data(s)
                last = s.file, data if is_native else _frames(s, data)
            if is_native:
                _copy(s, last[1], out)  # type: ignore[arg-type]  # bytes, where the syntax is native
            else:
                frame = last[1][s.frame or 0]
                precision, is_known_lossy = _decode(s, frame, out, decoder, is_signed=is_signed)  # type: ignore[arg-type]
                bits, is_lossy = min(bits, precision), is_lossy or is_known_lossy
        if s.transfer_syntax == BIG_ENDIAN:
            out.byteswap(inplace=True)
        values = out if is_signed else out.view(np.uint16)
        if bits < 16:  # the standard lets unused bits hold anything; overlays were kept there until 2004
            values <<= 16 - bits
            values >>= 16 - bits  # of a signed type: extends the sign
        return Stored(int(values.min()), int(values.max()), is_signed, bits, is_lossy)

    return read


def _read_plain(s: Slice, out: np.ndarray) -> None:
    """Uncompressed pixels straight from the file into place."""
    try:
        with s.file.path.open("rb", buffering=0) as file:
            file.seek(s.pixel_offset or 0)
            n_read = file.readinto(out.data.cast("B")) or 0
    except OSError as exc:
        raise input_error(exc, s.file.name) from exc
    _check_length(s, n_read, out)


def _copy(s: Slice, data: bytes, out: np.ndarray) -> None:
    start = (s.frame or 0) * out.nbytes
    part = data[start : start + out.nbytes]
    _check_length(s, len(part), out)
    out[...] = np.frombuffer(part, dtype=out.dtype).reshape(out.shape)


def _check_length(s: Slice, n_bytes: int, out: np.ndarray) -> None:
    if n_bytes < out.nbytes:
        raise InputError(f"pixel data are cut short ({n_bytes} of {out.nbytes} bytes)", path=s.file.name)


def _pixel_data(s: Slice) -> bytes:
    """The value of PixelData as it is encoded, from an object that is read whole."""
    from pydicom import dcmread

    whole = read_bytes(s.file)
    try:
        with quiet():
            return bytes(dcmread(BytesIO(whole), force=True, specific_tags=[0x7FE00010])[0x7FE00010].value)
    except (*_DAMAGED, TypeError, OSError) as exc:
        raise InputError(f"pixel data can't be found ({type(exc).__name__})", path=s.file.name) from exc


def _frames(s: Slice, data: bytes) -> list[bytes]:
    """The compressed frames of an object; a frame may lie in several fragments, with or without offsets."""
    from pydicom.encaps import generate_frames

    expected = 1 if s.frame is None else integer(s.header, 0x00280008) or 1
    try:
        with quiet():
            frames = list(generate_frames(data, number_of_frames=expected))
    except _DAMAGED as exc:
        raise InputError("compressed pixel data are damaged", path=s.file.name) from exc
    if len(frames) != expected:
        raise InputError(f"compressed pixel data hold {len(frames)} frames, not {expected}", path=s.file.name)
    return frames


def _decode(
    s: Slice, frame: bytes, out: np.ndarray, decoder: Decoder, *, is_signed: bool
) -> tuple[int, bool]:
    """Fill `out` from a compressed frame; returns the codestream's precision, and whether it lost something."""
    try:
        if s.transfer_syntax == RLE:
            _unpack_rle(frame, out)
            return 16, False
        found = codestream(frame)
        rows, columns = out.shape
        if (found.height, found.width, found.components) != (rows, columns, 1):
            raise DecodeError(
                f"compressed data hold {found.width} × {found.height} × {found.components} values, "
                f"the header says {columns} × {rows}"
            )
        if not 2 <= found.precision <= 16:
            raise DecodeError(f"compressed data have {found.precision} bits, at most 16 are read")
        if found.is_signed and not is_signed:
            raise DecodeError("compressed data are signed, the header says unsigned")
        decoder.decode(frame, s.transfer_syntax, found, out)
    except DecodeError as exc:
        raise InputError(str(exc), path=s.file.name) from exc
    declared_lossless = text(s.header, 0x00282110) == "00" or found.is_reversible
    return found.precision, s.transfer_syntax in _PERHAPS_LOSSY and not declared_lossless


def _unpack_rle(frame: bytes, out: np.ndarray) -> None:
    """PS3.5 Annex G: a segment for the upper bytes, one for the lower ones, each in runs and copies."""
    try:
        n_segments, *starts = struct.unpack_from("<3L", frame)
        if n_segments != 2:
            raise DecodeError(f"RLE data have {n_segments} segments, 16 bits take 2")
        planes = out.view(np.uint8).reshape(*out.shape, 2)
        for start, plane in zip(
            starts, (1, 0), strict=True
        ):  # the array is little endian, as every machine here
            unpacked, at = bytearray(), start
            while len(unpacked) < out.size:
                head = frame[at]
                if head < 128:
                    unpacked += frame[at + 1 : at + 2 + head]
                    at += 2 + head
                elif head > 128:
                    unpacked += frame[at + 1 : at + 2] * (257 - head)
                    at += 2
                else:
                    at += 1
            planes[..., plane] = np.frombuffer(unpacked, np.uint8, out.size).reshape(out.shape)
    except (struct.error, IndexError):
        raise DecodeError("RLE data are damaged") from None
