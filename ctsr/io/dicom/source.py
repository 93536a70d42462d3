"""The DICOM objects of a folder, an archive or a file: parsed headers, and the bytes of each.

Everything is bounded, whatever the bytes are: the header is parsed from the first `_HEAD_SIZES` bytes of an
object, from memory, and the memory that its elements and items may take is limited by their count.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ctsr.errors import InputError
from ctsr.io.atomic import input_error
from ctsr.io.dicom.elements import text
from ctsr.io.dicom.records import DicomFile, Skipped

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = [
    "BIG_ENDIAN",
    "CT_CLASSES",
    "DEFLATED",
    "EXPLICIT",
    "IMPLICIT",
    "Header",
    "damage",
    "find",
    "read_bytes",
]

CT_CLASSES = {  # the SOP classes that can hold a CT volume; the value: whether it is multi-frame
    "1.2.840.10008.5.1.4.1.1.2": False,  # CT Image
    "1.2.840.10008.5.1.4.1.1.2.1": True,  # Enhanced CT Image
    "1.2.840.10008.5.1.4.1.1.2.2": True,  # Legacy Converted Enhanced CT Image
}

IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
DIRECTORY = "1.2.840.10008.1.3.10"  # SOP class of a DICOMDIR
_STORAGE = b"1.2.840.10008.5.1.4.1.1"  # every SOP class of a stored object begins so

_HEAD_SIZES = (1 << 16, 1 << 19, 1 << 22)  # a plain CT header is 2–20 kB, an enhanced one 1–2 kB a frame
_INFLATED = 1 << 26  # a deflated object: 500 times a 512 × 512 slice's header, 128 slices
_OBJECT = (1 << 31) + _HEAD_SIZES[-1]  # pixel data of more than 2 GiB are refused
_ELEMENTS = 20_000  # at the top level; real headers hold up to 500
_ITEMS = 50_000  # of sequences, 8 a frame; each costs pydicom 1 kB and 20 µs
_LONGEST = 1 << 16  # bytes of a value that is kept; longer ones are overlays, icons, curves
_PER_FRAME = 0x52009230
_Known = dict[Any, Any]  # by tag, the last element read
_UNDEFINED = 0xFFFFFFFF
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # VRs with a length of four bytes

_FILES, _MEMBERS, _ARCHIVE = 2_000_000, 200_000, 1 << 36
_TABLE = 1 << 25  # bytes of an archive's table of contents: 200,000 members with names of 120 characters
_RATIO, _RATIO_FROM = 200, 50_000_000  # a member that inflates so much, and is so large, is a bomb


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


class _NotRead(Exception):
    """An object that is left out; the reason is its text."""


def find(source: Path) -> Iterator[Header | Skipped]:
    """Every object below `source`, a folder, a zip archive, a DICOMDIR or a file, in the order of names.

    A DICOMDIR stands for the folder it lies in. Links are followed only within the folder given; archives in a
    folder or in an archive are not opened. InputError: absent, damaged, or over the limits.
    """
    try:
        mode = source.stat().st_mode
        if stat.S_ISDIR(mode):
            yield from _folder(source)
            return
        if not stat.S_ISREG(mode):
            raise InputError("is a FIFO, a socket or a device", path=source, hint="name a file or a folder")
        with source.open("rb") as opened:
            start = opened.read(4)
    except OSError as exc:
        raise input_error(exc, source) from exc
    if start in (b"PK\x03\x04", b"PK\x05\x06"):
        yield from _members(source)
        return
    found = _look(DicomFile(source.name, source), {})
    if isinstance(found, Header) and found.sop_class == DIRECTORY:
        yield from _folder(source.parent)
    else:
        yield found


def read_bytes(file: DicomFile) -> bytes:
    """The bytes of an object; a deflated one comes inflated, as explicit VR little endian. InputError."""
    try:
        with _opened(file) as (stream, size):
            if size > _OBJECT:
                raise InputError(f"holds {size:,} bytes, at most {_OBJECT:,} are read", path=file.name)
            data = stream.read(size)
            return _plain(data, _parse_meta(data))
    except _NotRead as exc:
        raise InputError(str(exc), path=file.name) from exc
    except OSError as exc:
        raise input_error(exc, file.name) from exc
    except _DAMAGED as exc:
        raise InputError("damaged in the archive", path=file.name) from exc


def _folder(root: Path) -> Iterator[Header | Skipped]:
    inside, known = root.resolve(), _Known()
    waiting, n_files = [root], 0
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=lambda e: e.name)
        except OSError as exc:
            yield Skipped(_shown(folder, root), input_error(exc, folder).reason)
            continue
        below = []
        for entry in entries:
            path = Path(entry.path)
            if (n_files := n_files + 1) > _FILES:
                raise InputError(
                    f"holds more than {_FILES:,} files", path=root, hint="name a folder below it"
                )
            if reason := _left_out(entry, inside):
                yield Skipped(_shown(path, root), reason)
            elif entry.is_dir(follow_symlinks=False):
                below.append(path)
            else:
                yield _look(DicomFile(_shown(path, root), path), known)
        waiting += reversed(below)


def _shown(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else root.name


def _left_out(entry: os.DirEntry[str], inside: Path) -> str:
    """Why an entry of a folder is not looked into; "" where it is."""
    if entry.name.startswith(".") or entry.name == "__MACOSX":
        return "hidden"
    try:
        if entry.is_symlink():
            if entry.is_dir():
                return "a link to a folder"
            if not Path(entry.path).resolve().is_relative_to(inside):
                return "a link that leaves the folder"
        return (
            "" if entry.is_dir() or entry.is_file() else "no file or folder (FIFO, socket, device, dead link)"
        )
    except (OSError, RuntimeError):  # a loop of links
        return "a link that leads nowhere"


def _members(source: Path) -> Iterator[Header | Skipped]:
    known = _Known()
    for index, member in enumerate(_archive(source, source.stat().st_mtime_ns).infolist()):
        if member.is_dir():
            continue
        name = member.filename
        if reason := _unsafe(member):
            yield Skipped(re.sub(r"[^\w./ -]", "?", name), reason)
        elif any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):
            yield Skipped(name, "hidden")
        else:
            yield _look(DicomFile(name, source, index), known)


def _unsafe(member: zipfile.ZipInfo) -> str:
    """Why a member of an archive is not opened; "" where it may be."""
    name, raw = member.filename, member.orig_filename
    if (
        name.startswith("/")
        or "\\" in raw
        or "\0" in raw
        or re.match("[A-Za-z]:", name)
        or ".." in name.split("/")
    ):
        return "its name in the archive leaves the archive"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "a link in an archive"
    if member.flag_bits & 1:
        return "encrypted"
    if member.compress_type not in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    ):  # LZMA takes the memory it asks for
        return f"compressed by method {member.compress_type}, which is not read"
    if member.file_size > _RATIO_FROM and member.file_size > _RATIO * max(member.compress_size, 1):
        return f"{member.compress_size:,} bytes that inflate to {member.file_size:,}"
    return ""


@lru_cache(maxsize=1)
def _archive(path: Path, modified: int) -> zipfile.ZipFile:
    """The archive, its table of contents read once. InputError where damaged or over the limits."""
    try:
        with path.open("rb") as opened:  # the table is bounded before it is read
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size - (1 << 16) - 22))
            tail = opened.read()
        end = tail[tail.rfind(b"PK\x05\x06") :]
        table = struct.unpack("<L", end[12:16])[0] if len(end) >= 22 else 0
        if table == 0xFFFFFFFF and (at := tail.rfind(b"PK\x06\x06")) >= 0:  # zip64
            table = struct.unpack("<Q", tail[at + 40 : at + 48])[0]
        if table > _TABLE:
            raise InputError(f"its table of contents takes {table:,} bytes", path=path, hint="unpack it")
        archive = zipfile.ZipFile(path)
    except OSError as exc:
        raise input_error(exc, path) from exc
    except _DAMAGED as exc:
        raise InputError("damaged zip archive", path=path, hint="copy it again") from exc
    total = sum(member.file_size for member in archive.infolist())
    if len(archive.infolist()) > _MEMBERS or total > _ARCHIVE:
        found = f"{len(archive.infolist()):,} files of {total / 2**30:.1f} GiB in all"
        raise InputError(
            f"holds {found}; at most {_MEMBERS:,} and 64 GiB are read", path=path, hint="unpack it"
        )
    return archive


# what zipfile and pydicom raise on damaged bytes, of every class there is
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    struct.error,
    NotImplementedError,
    ValueError,
    RuntimeError,
)


@contextlib.contextmanager
def _opened(file: DicomFile) -> Iterator[tuple[IO[bytes], int]]:
    """An object's stream, and its size as the disk or the archive says."""
    if file.member is None:
        with file.path.open("rb") as stream:
            yield stream, os.fstat(stream.fileno()).st_size
    else:
        archive = _archive(file.path, file.path.stat().st_mtime_ns)
        member = archive.infolist()[file.member]
        with archive.open(member) as stream:
            yield stream, member.file_size


def _look(file: DicomFile, known: _Known) -> Header | Skipped:
    try:
        with _opened(file) as (stream, size):
            return _parse(file, stream, size, known)
    except _NotRead as exc:
        reason = str(exc)
    except OSError as exc:
        reason = input_error(exc, file.name).reason
    except (
        Exception
    ) as exc:  # whatever the bytes did to pydicom or zipfile: this file is left out, and listed
        reason = damage(exc)
    return Skipped(file.name, reason)


def damage(exc: Exception) -> str:
    """The reason for which a file is left out that pydicom or zipfile failed on."""
    return (
        "sequences nested too deep" if isinstance(exc, RecursionError) else f"damaged ({type(exc).__name__})"
    )


def _parse(file: DicomFile, stream: IO[bytes], size: int, known: _Known) -> Header:
    from pydicom.dataset import Dataset

    head = stream.read(_HEAD_SIZES[0])
    if head[128:132] != b"DICM" and _STORAGE not in head:
        raise _NotRead("not DICOM")
    meta = _parse_meta(head)
    if meta.transfer_syntax == DEFLATED:
        whole = _plain(head + stream.read(_INFLATED), meta)
        stream, size = BytesIO(whole), len(whole)
        head = stream.read(_HEAD_SIZES[0])
    for longer in (*_HEAD_SIZES[1:], 0):
        elements, pixels = _elements(head, meta, is_whole=len(head) == size)
        sop_class = text(Dataset(elements), 0x00080016) or meta.sop_class
        if pixels or len(head) == size or sop_class not in CT_CLASSES:
            break
        if not longer:
            raise _NotRead(f"a header of more than {_HEAD_SIZES[-1] >> 20} MiB")
        head += stream.read(longer - len(head))
    if head[128:132] != b"DICM" and not sop_class.startswith(_STORAGE.decode()):
        raise _NotRead("not DICOM")
    _share(elements, known)
    dataset = Dataset(elements)
    dataset.set_original_encoding(meta.is_implicit, meta.is_little_endian)
    return Header(file, dataset, sop_class, meta.transfer_syntax, pixels, size, meta.is_there)


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


def _plain(data: bytes, meta: _Meta) -> bytes:
    """An object inflated, as explicit VR little endian, where it is deflated; else as it is."""
    if meta.transfer_syntax != DEFLATED:
        return data
    body = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[meta.start :], _INFLATED + 1)
    if len(body) > _INFLATED:
        raise _NotRead(f"inflates to more than {_INFLATED >> 20} MiB")
    named = data[: meta.start].replace(DEFLATED.encode(), EXPLICIT.encode().ljust(len(DEFLATED), b"\0"))
    return named + body


def _elements(
    head: bytes, meta: _Meta, *, is_whole: bool
) -> tuple[dict[Any, Any], tuple[int, int | None] | None]:
    """The elements to keep, by tag, and the pixel data's start and length where `head` reaches them."""
    item = b"\xfe\xff\x00\xe0" if meta.is_little_endian else b"\xff\xfe\xe0\x00"
    if len(head) > _HEAD_SIZES[0] and (n_items := head.count(item)) > _ITEMS:
        raise _NotRead(f"{n_items:,} sequence items in its header, at most {_ITEMS:,} are read")
    elements: dict[Any, Any] = {}
    walk = _walk(head, meta.start, is_implicit=meta.is_implicit, is_little_endian=meta.is_little_endian)
    try:
        for n, (tag, start, length, element) in enumerate(walk):
            if tag == 0x7FE00010:
                return elements, (start, length)
            if tag > 0x7FE00000:  # itself a group length; behind it other kinds of pixels
                break
            if n == _ELEMENTS:
                raise _NotRead(f"more than {_ELEMENTS:,} elements in its header")
            if element is not None:
                elements[element.tag] = element
    except (EOFError, OSError, struct.error):  # pydicom at the end of bytes, in the middle of a sequence
        if is_whole:
            raise
    return elements, None


def _share(elements: dict[Any, Any], known: _Known) -> None:
    """Put an element of an earlier object in place of its equal: slices of one series differ in a few."""
    for tag, element in elements.items():
        if isinstance(element, tuple) and known.get(tag) == element:  # a raw one, which nobody can change
            elements[tag] = known[tag]
        else:
            known[tag] = element


def _walk(
    data: bytes, at: int, *, is_implicit: bool, is_little_endian: bool
) -> Iterator[tuple[int, int, int | None, Any]]:
    """Each top-level element: tag, where its value starts, its length (None: undefined), and the element, raw.

    pydicom reads on only where the length of a sequence is undefined. This takes a third of its time, a half of the
    time of a scan. The element is None for what is not kept, and for pixel data.
    """
    from pydicom.dataelem import RawDataElement, empty_value_for_VR
    from pydicom.filereader import data_element_generator
    from pydicom.tag import BaseTag

    short, long = (
        struct.Struct(("<" if is_little_endian else ">") + form).unpack_from for form in ("HH2sH", "L")
    )
    while at + 12 <= len(data):
        group, number, encoded, length = short(data, at)
        tag, start, vr = group << 16 | number, at + 8, None
        if encoded in _LONG and not is_implicit:
            vr, start = encoded.decode("ascii"), at + 12
            (length,) = long(data, at + 8)
        elif is_implicit or not encoded.isalpha():  # some writers change to implicit in the middle
            (length,) = long(data, at + 4)
        else:
            vr = encoded.decode("ascii")
        if tag >= 0x7FE00000:
            yield tag, start, None if length == _UNDEFINED else length, None
        elif length == _UNDEFINED:
            stream = BytesIO(data)
            stream.seek(at)
            element = next(data_element_generator(stream, vr is None, is_little_endian), None)
            if element is None:
                return
            yield tag, start, None, element if _is_kept(tag, 0) else None
            at = stream.tell()
            continue
        elif start + length > len(data):
            return
        elif _is_kept(tag, length):
            value: Any = data[start : start + length] if length else empty_value_for_VR(vr, raw=True)
            raw = RawDataElement(BaseTag(tag), vr, length, value, 0, vr is None, is_little_endian)
            yield tag, start, length, raw
        else:
            yield tag, start, length, None
        at = start + length


def _is_kept(tag: int, length: int) -> bool:
    """Not private, no overlay, no curve, not long: none of them is read, and 10,000 slices have to fit memory."""
    return not tag & 0x10000 and tag >> 24 not in (0x50, 0x60) and (length <= _LONGEST or tag == _PER_FRAME)
