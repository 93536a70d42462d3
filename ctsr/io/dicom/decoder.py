"""Compressed frames → stored values, by SimpleITK's GDCM in a process of its own.

GDCM reads a file that is written here and holds nothing but the frame, so no foreign header reaches it and it has no
rescale to apply. A codestream that brings it down ends that process, one that it chews on for ever ends with it,
and what it says on stderr stays there. The codestream's own header is checked first: it must not ask for more
memory than the image has pixels.
"""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, cast

if TYPE_CHECKING:
    import numpy as np

__all__ = ["JPEG", "JPEG_2000", "JPEG_LS", "Codestream", "DecodeError", "Decoder", "codestream"]

_ROOT = "1.2.840.10008.1.2.4."
JPEG = frozenset(_ROOT + n for n in ("50", "51", "53", "55", "57", "70"))
JPEG_LS = frozenset(_ROOT + n for n in ("80", "81"))
JPEG_2000 = frozenset(_ROOT + n for n in ("90", "91", "201", "202", "203"))
_SECONDS_PER_FRAME, _SECONDS_PER_PIXEL = 5.0, 5e-6  # 100 times what 512 × 512 of JPEG 2000, the slowest, take
_MEMORY = 1 << 31  # bytes of addresses; SimpleITK takes 0.6 GiB of them, a frame at most some MiB
_NO_IMAGE = 0xFFFFFFFF


class DecodeError(Exception):
    """A frame that can't be decoded, and why; the caller knows the file's name."""


@dataclass(frozen=True, slots=True)
class Codestream:
    """What a compressed frame says of itself. is_reversible: None where the kind of file decides it."""

    width: int
    height: int
    components: int
    precision: int
    is_signed: bool = False
    is_reversible: bool | None = None


def codestream(frame: bytes) -> Codestream:
    """The header of a JPEG, JPEG-LS or JPEG 2000 codestream; raises DecodeError where there is none."""
    try:
        start = frame[:4096].find(b"\xff\x4f\xff\x51")  # SOC and SIZ; a JP2 file's boxes may stand before
        return _jpeg_2000(frame, start) if start >= 0 else _jpeg(frame)
    except (struct.error, IndexError):
        raise DecodeError("compressed data hold no header of a codestream") from None


def _jpeg_2000(frame: bytes, start: int) -> Codestream:
    """ISO/IEC 15444-1 A.5.1 (SIZ) and A.6.1 (COD)."""
    length, _, x1, y1, x0, y0 = struct.unpack_from(">HHIIII", frame, start + 4)
    components, depth = struct.unpack_from(">HB", frame, start + 40)
    at, is_reversible = start + 4 + length, None
    while frame[at] == 0xFF and frame[at + 1] != 0x90:  # up to the first tile
        if frame[at + 1] == 0x52:
            is_reversible = frame[at + 13] == 1
        at += 2 + int(struct.unpack_from(">H", frame, at + 2)[0])
    return Codestream(x1 - x0, y1 - y0, components, (depth & 0x7F) + 1, bool(depth & 0x80), is_reversible)


def _jpeg(frame: bytes) -> Codestream:
    """ISO/IEC 10918-1 B.2.2 (SOF) and 14495-1 C.2.2 (SOF55)."""
    at = 2
    while True:
        if frame[at] != 0xFF:
            raise IndexError
        marker = frame[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            precision, height, width, components = struct.unpack_from(">BHHB", frame, at + 4)
            return Codestream(width, height, components, precision)
        at += 2 + int(struct.unpack_from(">H", frame, at + 2)[0])


class Decoder:
    """The decoding process; it starts with the first frame. A context manager, for one thread."""

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="ctsr-", ignore_cleanup_errors=True)
        self._process: subprocess.Popen[bytes] | None = None
        return self

    def __exit__(self, *failure: object) -> None:
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(OSError):
                self._process.communicate()
        self._folder.cleanup()

    def decode(self, frame: bytes, syntax: str, found: Codestream, out: np.ndarray) -> None:
        """Fill `out`, (rows, columns) of 16 bit, with the frame's values; unsigned unless the codestream is signed."""
        path = Path(self._folder.name, "frame.dcm")
        path.write_bytes(_minimal_file(frame, syntax, found))
        if self._process is None:
            # -P: the modules beside this one are not to be found
            command = [sys.executable, "-P", __file__, str(path)]
            pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere)
        process = self._process
        asks, answers = cast(BinaryIO, process.stdin), cast(BinaryIO, process.stdout)
        watch = threading.Timer(_SECONDS_PER_FRAME + _SECONDS_PER_PIXEL * out.size, process.kill)
        watch.start()
        try:
            asks.write(b"\n")
            asks.flush()
            (n_bytes,) = struct.unpack("<I", answers.read(4))
            values = answers.read(n_bytes) if n_bytes == out.nbytes else b""
        except (OSError, struct.error):
            raise DecodeError("the decoder broke down on the compressed data") from None
        finally:
            watch.cancel()
        if n_bytes != out.nbytes:
            raise DecodeError("the compressed data can't be decoded")
        if len(values) < n_bytes:
            raise DecodeError("the decoder broke down on the compressed data")
        out.data.cast("B")[:] = values  # 16 bits, little endian, as every machine here


def _minimal_file(frame: bytes, syntax: str, found: Codestream) -> bytes:
    """A secondary capture, explicit little endian but for the frame, with no more than decoding needs."""
    capture, uid, bits = b"1.2.840.10008.5.1.4.1.1.7", b"2.25.1", found.precision

    def elements(group: int, values: dict[int, bytes | int]) -> bytes:
        data = b""
        for number, value in values.items():
            vr = b"US" if isinstance(value, int) else b"CS" if group == 0x28 else b"UI"
            stored = struct.pack("<H", value) if isinstance(value, int) else value
            stored += (b" " if vr == b"CS" else b"\0") * (len(stored) % 2)
            data += struct.pack("<HH2sH", group, number, vr, len(stored)) + stored
        return data

    meta = elements(2, {2: capture, 3: uid, 0x10: syntax.encode()})
    body = elements(8, {0x16: capture, 0x18: uid})
    body += elements(0x28, {2: 1, 4: b"MONOCHROME2", 0x10: found.height, 0x11: found.width})
    allocated = 8 if bits <= 8 else 16
    body += elements(0x28, {0x100: allocated, 0x101: bits, 0x102: bits - 1, 0x103: int(found.is_signed)})
    body += struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, 0xFFFFFFFF)
    frame += b"\0" * (len(frame) % 2)
    for item, value in ((0xE000, b""), (0xE000, frame), (0xE0DD, b"")):  # the first: an empty offset table
        body += struct.pack("<HHI", 0xFFFE, item, len(value)) + value
    length = struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta))
    return b"\0" * 128 + b"DICM" + length + meta + body


def _serve(path: str) -> None:
    """In the other process: for each line that comes, decode `path` and send size and values as 16 bit."""
    import SimpleITK

    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    sitk: Any = SimpleITK
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(path)
    for _ in iter(sys.stdin.buffer.readline, b""):
        try:
            image = reader.Execute()  # named: the view does not keep it alive
            values = sitk.GetArrayViewFromImage(image).astype("<u2").tobytes()
            answer = struct.pack("<I", len(values)) + values
        except RuntimeError:
            answer = struct.pack("<I", _NO_IMAGE)
        sys.stdout.buffer.write(answer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve(sys.argv[1])
