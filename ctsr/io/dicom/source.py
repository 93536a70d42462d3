"""The DICOM objects of a folder, an archive or a file: the header of each, and its bytes.

Nothing outside the source is opened, and nothing is unpacked to the disk.
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
from functools import lru_cache
from pathlib import Path
from typing import IO

from ctsr.errors import InputError
from ctsr.io.atomic import input_error
from ctsr.io.dicom.header import DIRECTORY, Header, Known, NotRead, parse, plain
from ctsr.io.dicom.records import DicomFile, Skipped

__all__ = ["Header", "damage", "find", "read_bytes"]

_OBJECT = (1 << 31) + (1 << 22)  # bytes; pixel data of more than 2 GiB are refused
_FILES, _MEMBERS, _ARCHIVE = 2_000_000, 200_000, 1 << 36
_TABLE = 1 << 25  # bytes of an archive's table of contents: 200,000 members with names of 120 characters
_RATIO, _RATIO_FROM = 200, 50_000_000  # a member that inflates so much, and is so large, is a bomb
# what zipfile and zlib raise on damaged bytes
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, struct.error, ValueError, RuntimeError)


def find(source: Path) -> Iterator[Header | Skipped]:
    """Every object below `source`, a folder, a zip archive, a DICOMDIR or a file, in the order of names.

    A DICOMDIR stands for the folder it lies in. Links are followed only within the folder given; archives in a
    folder or in an archive are not opened. InputError: absent, damaged, or over the limits.
    """
    try:
        mode = source.stat().st_mode
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise InputError("is a FIFO, a socket or a device", path=source, hint="name a file or a folder")
        start = b""
        if stat.S_ISREG(mode):
            with source.open("rb") as opened:
                start = opened.read(4)
    except OSError as exc:
        raise input_error(exc, source) from exc
    if stat.S_ISDIR(mode):
        yield from _folder(source)
    elif start in (b"PK\x03\x04", b"PK\x05\x06"):
        yield from _members(source)
    else:
        found = _look(DicomFile(source.name, source), {})
        is_directory = isinstance(found, Header) and found.sop_class == DIRECTORY
        yield from _folder(source.parent) if is_directory else (found,)


def read_bytes(file: DicomFile) -> bytes:
    """The bytes of an object; a deflated one comes inflated, as explicit VR little endian. InputError."""
    try:
        with _opened(file) as (stream, size):
            if size > _OBJECT:
                raise InputError(f"holds {size:,} bytes, at most {_OBJECT:,} are read", path=file.name)
            return plain(stream.read(size))
    except NotRead as exc:
        raise InputError(str(exc), path=file.name) from exc
    except OSError as exc:
        raise input_error(exc, file.name) from exc
    except _DAMAGED as exc:
        raise InputError("damaged in the archive", path=file.name) from exc


def _folder(root: Path) -> Iterator[Header | Skipped]:
    inside, known = root.resolve(), Known()
    waiting, n_files = [root], 0
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=lambda e: e.name)
        except OSError as exc:
            shown = folder.relative_to(root).as_posix() if folder != root else root.name
            yield Skipped(shown, input_error(exc, folder).reason)
            continue
        below = []
        for entry in entries:
            path = Path(entry.path)
            name = path.relative_to(root).as_posix()
            if (n_files := n_files + 1) > _FILES:
                reason = f"holds more than {_FILES:,} files"
                raise InputError(reason, path=root, hint="name a folder below it")
            if reason := _left_out(entry, inside):
                yield Skipped(name, reason)
            elif entry.is_dir(follow_symlinks=False):
                below.append(path)
            else:
                yield _look(DicomFile(name, path), known)
        waiting += reversed(below)


def _left_out(entry: os.DirEntry[str], inside: Path) -> str:
    """Why an entry of a folder is not looked into; "" where it is."""
    if _is_hidden(entry.name):
        return "hidden"
    try:
        if entry.is_symlink() and entry.is_dir():
            return "a link to a folder"
        if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(inside):
            return "a link that leaves the folder"
        is_either = entry.is_dir() or entry.is_file()
        return "" if is_either else "no file or folder (FIFO, socket, device, dead link)"
    except (OSError, RuntimeError):  # a loop of links
        return "a link that leads nowhere"


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _members(source: Path) -> Iterator[Header | Skipped]:
    known = Known()
    for index, member in enumerate(_archive(source, source.stat().st_mtime_ns).infolist()):
        name = member.filename
        if member.is_dir():
            continue
        if reason := _unsafe(member):
            yield Skipped(re.sub(r"[^\w./ -]", "?", name), reason)
        elif any(map(_is_hidden, name.split("/"))):
            yield Skipped(name, "hidden")
        else:
            yield _look(DicomFile(name, source, index), known)


def _unsafe(member: zipfile.ZipInfo) -> str:
    """Why a member of an archive is not opened; "" where it may be."""
    name, raw, n_bytes = member.filename, member.orig_filename, member.file_size
    if re.match("/|[A-Za-z]:", name) or "\\" in raw or "\0" in raw or ".." in name.split("/"):
        return "its name in the archive leaves the archive"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "a link in an archive"
    if member.flag_bits & 1:
        return "encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # LZMA takes what it asks for
        return f"compressed by method {member.compress_type}, which is not read"
    if n_bytes > _RATIO_FROM and n_bytes > _RATIO * max(member.compress_size, 1):
        return f"{member.compress_size:,} bytes that inflate to {n_bytes:,}"
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
    n_members, total = len(archive.infolist()), sum(member.file_size for member in archive.infolist())
    if n_members > _MEMBERS or total > _ARCHIVE:
        found = f"holds {n_members:,} files of {total / 2**30:.1f} GiB in all"
        raise InputError(f"{found}; at most {_MEMBERS:,} and 64 GiB are read", path=path, hint="unpack it")
    return archive


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


def _look(file: DicomFile, known: Known) -> Header | Skipped:
    try:
        with _opened(file) as (stream, size):
            return parse(file, stream, size, known)
    except NotRead as exc:
        reason = str(exc)
    except OSError as exc:
        reason = input_error(exc, file.name).reason
    except Exception as exc:  # whatever the bytes did to pydicom or zipfile: the file is left out, and told
        reason = damage(exc)
    return Skipped(file.name, reason)


def damage(exc: Exception) -> str:
    """The reason for which a file is left out that pydicom or zipfile failed on."""
    is_deep = isinstance(exc, RecursionError)
    return "sequences nested too deep" if is_deep else f"damaged ({type(exc).__name__})"
