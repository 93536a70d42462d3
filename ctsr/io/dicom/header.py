"""The header of one DICOM object, parsed from its first bytes, in little time and memory whatever they are.

Elements are read as they are stored, and only from memory: the first `_HEAD_SIZES` bytes of the object. What they
may cost is bounded by their count, before pydicom makes objects of them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import IO, TYPE_CHECKING, Any

from ctsr.io.dicom.elements import text
from ctsr.io.dicom.records import DicomFile

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["BIG_ENDIAN", "CT_CLASSES", "DEFLATED", "DIRECTORY", "EXPLICIT", "IMPLICIT", "Header", "NotRead"]
__all__ += ["Known", "parse", "plain"]

CT_CLASSES = {  # the SOP classes that can hold a CT volume; the value: whether it is multi-frame
    "1.2.840.10008.5.1.4.1.1.2": False,  # CT Image
    "1.2.840.10008.5.1.4.1.1.2.1": True,  # Enhanced CT Image
    "1.2.840.10008.5.1.4.1.1.2.2": True,  # Legacy Converted Enhanced CT Image
}
DIRECTORY = "1.2.840.10008.1.3.10"  # SOP class of a DICOMDIR
IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
_STORAGE = b"1.2.840.10008.5.1.4.1.1"  # every SOP class of a stored object begins so

_HEAD_SIZES = (1 << 16, 1 << 19, 1 << 22)  # a plain CT header is 2–20 kB, an enhanced one 1–2 kB a frame
_INFLATED = 1 << 26  # a deflated object: 500 times a 512 × 512 slice's header, 128 slices
_ELEMENTS = 200_000  # at all levels; a plain header holds up to 500, an enhanced one 50 a frame
_ITEMS = 50_000  # of sequences, 8 a frame; each costs pydicom 1 kB and 20 µs
_LEVELS = 100  # of sequences; pydicom comes to Python's limit at 150
_LONGEST = 1 << 16  # bytes of a value that is kept; longer ones are overlays, icons, curves
_PER_FRAME = 0x52009230
_UNDEFINED = 0xFFFFFFFF
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # VRs with a length of four bytes
Known = dict[Any, Any]  # by tag, the last element read


@dataclass(frozen=True, slots=True, eq=False)
class Header:
    """One DICOM object, parsed up to its pixel data.

    dataset: without pixel data, private groups, overlays and values longer than 64 KiB. sop_class: "" where absent.
    pixels: where the pixel data start in `read_bytes(file)`, and their length, bytes (None: in fragments);
        None where there are none. size: of the whole object, bytes. has_meta: has a file meta group.
    """

    file: DicomFile
    dataset: Dataset
    sop_class: str
    transfer_syntax: str
    pixels: tuple[int, int | None] | None
    size: int
    has_meta: bool


class NotRead(Exception):
    """An object that is left out; the reason is its text."""


def parse(file: DicomFile, stream: IO[bytes], size: int, known: Known) -> Header:
    """The header of an object of `size` bytes that starts where `stream` stands.

    known: what objects before this one held; equal elements are shared with them. Raises NotRead where it is none or
    goes over a limit.
    """
    from pydicom.dataset import Dataset

    head = stream.read(_HEAD_SIZES[0])
    if head[128:132] != b"DICM" and _STORAGE not in head:
        raise NotRead("not DICOM")
    meta = _parse_meta(head)
    if meta.transfer_syntax == DEFLATED:
        whole = plain(head + stream.read(_INFLATED))
        stream, size = BytesIO(whole), len(whole)
        head = stream.read(_HEAD_SIZES[0])
    for longer in (*_HEAD_SIZES[1:], 0):
        elements, pixels = _elements(head, meta)
        sop_class = text(Dataset(elements), 0x00080016) or meta.sop_class
        if pixels or len(head) == size or sop_class not in CT_CLASSES:
            break
        if not longer:
            raise NotRead(f"a header of more than {_HEAD_SIZES[-1] >> 20} MiB")
        head += stream.read(longer - len(head))
    if head[128:132] != b"DICM" and not sop_class.startswith(_STORAGE.decode()):
        raise NotRead("not DICOM")
    for tag, element in elements.items():  # slices of one series differ in a few; a raw one nobody can change
        if known.get(tag) == element:
            elements[tag] = known[tag]
        known[tag] = elements[tag]
    dataset = Dataset(elements)
    dataset.set_original_encoding(meta.is_implicit, meta.is_little_endian)
    return Header(file, dataset, sop_class, meta.transfer_syntax, pixels, size, meta.is_there)


def plain(data: bytes) -> bytes:
    """A whole object inflated, as explicit VR little endian, where it is deflated; else as it is. Raises NotRead."""
    meta = _parse_meta(data[: _HEAD_SIZES[0]])
    if meta.transfer_syntax != DEFLATED:
        return data
    body = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[meta.start :], _INFLATED + 1)
    if len(body) > _INFLATED:
        raise NotRead(f"inflates to more than {_INFLATED >> 20} MiB")
    named = data[: meta.start].replace(DEFLATED.encode(), EXPLICIT.encode().ljust(len(DEFLATED), b"\0"))
    return named + body


@dataclass(frozen=True, slots=True)
class _Meta:
    """How the data set that starts at byte `start` is encoded; is_there: said so by a file meta group."""

    start: int
    sop_class: str
    transfer_syntax: str
    is_implicit: bool
    is_little_endian: bool
    is_there: bool


def _parse_meta(data: bytes) -> _Meta:
    """The encoding as the data set's first element shows it: some files say another one, some say none."""
    from pydicom.dataset import Dataset

    start = 132 if data[128:132] == b"DICM" else 0
    elements: dict[Any, Any] = {}
    for tag, value, length, element in _walk(data, start, is_implicit=False, is_little_endian=True):
        if tag >> 16 != 2 or length is None:
            break
        elements[tag] = element
        start = value + length
    group_2 = Dataset(elements)
    sop_class, syntax = text(group_2, 0x00020002), text(group_2, 0x00020010)
    if syntax == DEFLATED:
        return _Meta(start, sop_class, syntax, False, True, True)
    group, vr = data[start : start + 2], data[start + 4 : start + 6]
    is_implicit = not (vr.isalpha() and vr.isupper())
    is_little_endian = syntax != BIG_ENDIAN if syntax else is_implicit or group[1:] < b"\4"  # group < 1024
    guessed = IMPLICIT if is_implicit else EXPLICIT if is_little_endian else BIG_ENDIAN
    return _Meta(start, sop_class, syntax or guessed, is_implicit, is_little_endian, bool(syntax))


def _elements(head: bytes, meta: _Meta) -> tuple[dict[Any, Any], tuple[int, int | None] | None]:
    """The elements to keep, by tag, and the pixel data's start and length where `head` reaches them."""
    item = b"\xfe\xff\x00\xe0" if meta.is_little_endian else b"\xff\xfe\xe0\x00"
    if len(head) > _HEAD_SIZES[0] and (n_items := head.count(item)) > _ITEMS:
        raise NotRead(f"{n_items:,} sequence items in its header, at most {_ITEMS:,} are read")
    elements: dict[Any, Any] = {}
    walk = _walk(head, meta.start, is_implicit=meta.is_implicit, is_little_endian=meta.is_little_endian)
    for tag, start, length, element in walk:
        if tag == 0x7FE00010:
            return elements, (start, length)
        if tag > 0x7FE00000:  # itself a group length; behind it other kinds of pixels
            break
        if element is not None:
            elements[element.tag] = element
    return elements, None


def _walk(
    data: bytes, at: int, *, is_implicit: bool, is_little_endian: bool
) -> Iterator[tuple[int, int, int | None, Any]]:
    """Each top-level element: tag, where its value starts, its length (None: undefined), and the element, raw.

    The element is None for what is not kept, and for pixel data. A sequence is kept as bytes, which pydicom parses
    when it is asked for; one of undefined length is passed through here to find its end.
    """
    from pydicom.dataelem import RawDataElement, empty_value_for_VR
    from pydicom.tag import BaseTag

    def raw(tag: int, vr: bytes | None, start: int, end: int) -> Any:
        length = end - start
        is_foreign = tag & 0x10000 or tag >> 24 in (0x50, 0x60)  # private, a curve or an overlay
        if is_foreign or (length > _LONGEST and tag != _PER_FRAME):  # 10,000 slices have to fit memory
            return None
        named = vr.decode() if vr else None
        value: Any = data[start:end] if length else empty_value_for_VR(named, raw=True)
        return RawDataElement(BaseTag(tag), named, length, value, 0, vr is None, is_little_endian)

    order = "<" if is_little_endian else ">"
    short, long = struct.Struct(order + "HH2sH").unpack_from, struct.Struct(order + "L").unpack_from
    around: list[tuple[int, bytes | None, int, bool]] = []  # open sequences: tag, VR, start; encoding outside
    n_elements = 0
    while at + 12 <= len(data):
        group, number, encoded, length = short(data, at)
        tag, start, vr = group << 16 | number, at + 8, encoded
        if is_implicit or group == 0xFFFE or not encoded.isalpha():  # some change to implicit in the middle
            vr = None
            (length,) = long(data, at + 4)
        elif encoded in _LONG:
            start = at + 12
            (length,) = long(data, at + 8)
        if (n_elements := n_elements + 1) > _ELEMENTS:
            raise NotRead(f"more than {_ELEMENTS:,} elements in its header")
        if not around and tag >= 0x7FE00000:
            yield tag, start, None if length == _UNDEFINED else length, None
        elif tag == 0xFFFEE0DD and around:  # a sequence ends
            first, vr, begin, is_implicit = around.pop()
            if not around:
                yield first, begin, None, raw(first, vr, begin, at)
            length = 0
        elif length == _UNDEFINED:
            if group != 0xFFFE:
                vr = None if vr == b"UN" else vr  # PS3.5, 6.2.2: whatever is around it, it is implicit
                around.append((tag, vr, start, is_implicit))
                is_implicit = vr is None
            if len(around) > _LEVELS:
                raise NotRead("sequences nested too deep")
            length = 0
        elif start + length > len(data):
            return
        elif not around:
            yield tag, start, length, raw(tag, vr, start, start + length)
        at = start + length
