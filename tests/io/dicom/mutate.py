"""Damaged copies of DICOM series, the same ones for the same seed, and what a reader must do with each."""

from __future__ import annotations

import io
import random
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom import dcmread, dcmwrite
from pydicom.errors import InvalidDicomError
from pydicom.uid import generate_uid

from ctsr.errors import CtsrError
from ctsr.io.dicom.elements import quiet
from ctsr.io.dicom.read import read_stack
from ctsr.io.dicom.scan import scan

__all__ = ["Outcome", "mutated", "series_from", "try_source", "write"]

HEADER = 8192  # bytes; most damage goes where a parser looks
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
WORDS = (
    b"nan",
    b"inf",
    b"1e999",
    b"-1",
    b"0",
    b"1_0",
    b"9" * 16,
    b"\\\\\\\\",
    b"\xff\xff",
    b"SQ",
    b"UN",
    b"OB",
)
MARKS = (
    b"\xfe\xff\x00\xe0\xff\xff\xff\xff",
    b"\xfe\xff\x0d\xe0\0\0\0\0",
    b"\xfe\xff\xdd\xe0\0\0\0\0",
    b"\xe0\x7f\x10\0",
)


def series_from(path: Path, n: int = 4, step: float = 5.0) -> list[bytes]:
    """A series of n slices made of one file, moved along z; the file alone where it is no image of its own."""
    files = []
    with quiet():
        try:
            for k in range(n):
                data = dcmread(path)
                x, y, z = data.ImagePositionPatient
                data.ImagePositionPatient = [x, y, float(z) + k * step]
                data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
                data.SOPInstanceUID = generate_uid(entropy_srcs=[path.name, str(k)])
                out = io.BytesIO()
                dcmwrite(out, data)
                files.append(out.getvalue())
        except (
            InvalidDicomError,
            AttributeError,
            ValueError,
        ):  # no image, or nothing that pydicom writes again
            return [path.read_bytes()]
    return files


def mutated(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to four faults."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not raw:
            break
        end = min(len(raw), HEADER) if rng.random() < 0.8 else len(raw)
        at = rng.randrange(end)
        rng.choice(FAULTS)(raw, at, rng)
    return bytes(raw)


def _flip(raw: bytearray, at: int, rng: random.Random) -> None:
    for k in range(at, min(len(raw), at + rng.choice((1, 1, 1, 8)))):
        raw[k] ^= 1 << rng.randrange(8)


def _noise(raw: bytearray, at: int, rng: random.Random) -> None:
    raw[at : at + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(1, 64))


def _extreme(raw: bytearray, at: int, rng: random.Random) -> None:
    size = rng.choice((1, 2, 4))
    raw[at : at + size] = (rng.choice(EXTREMES) & (1 << 8 * size) - 1).to_bytes(
        size, rng.choice(("little", "big"))
    )


def _word(raw: bytearray, at: int, rng: random.Random) -> None:
    word = rng.choice(WORDS)
    raw[at : at + len(word)] = word


def _digit(raw: bytearray, at: int, rng: random.Random) -> None:
    """Another digit in a number near by: a value that parses, and is wrong."""
    for k in range(at, min(len(raw), at + 200)):
        if 48 <= raw[k] < 58:
            raw[k] = rng.choice(b"0123456789-.e")
            return


def _cut(raw: bytearray, at: int, rng: random.Random) -> None:
    del raw[rng.randrange(len(raw)) if rng.random() < 0.5 else at :]


def _remove(raw: bytearray, at: int, rng: random.Random) -> None:
    del raw[at : at + rng.randrange(1, 300)]


def _repeat(raw: bytearray, at: int, rng: random.Random) -> None:
    raw[at:at] = raw[at : at + rng.randrange(1, 300)] * rng.choice((1, 2, 50))


def _mark(raw: bytearray, at: int, rng: random.Random) -> None:
    """An item, a delimiter or pixel data where none belongs, once or many times."""
    raw[at:at] = rng.choice(MARKS) * rng.choice((1, 1, 300))


FAULTS: Sequence[Callable[[bytearray, int, random.Random], None]] = (
    _flip, _flip, _noise, _extreme, _extreme, _word, _digit, _digit, _cut, _remove, _repeat, _mark,
)  # fmt: skip


def write(files: Sequence[bytes], folder: Path, rng: random.Random) -> Path:
    """A source of the files, some or all of them damaged: a folder, or now and then an archive, itself damaged."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    seed, which = rng.random(), rng.randrange(len(files))
    everywhere = rng.random() < 0.5  # the same damage in every file keeps the series together
    broken = [
        mutated(data, random.Random(seed)) if everywhere or k == which else data
        for k, data in enumerate(files)
    ]
    if rng.random() < 0.9:
        for k, data in enumerate(broken):
            (folder / f"{k}.dcm").write_bytes(data)
        return folder
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for k, data in enumerate(broken):
            archive.writestr(f"{k}.dcm", data)
    target = folder / "series.zip"
    target.write_bytes(mutated(packed.getvalue(), rng) if rng.random() < 0.5 else packed.getvalue())
    return target


@dataclass(frozen=True)
class Outcome:
    """How one source ended. read: volumes; refused: stacks, series or the source; seconds: for all of it."""

    read: int
    refused: int
    skipped: int
    seconds: float


def try_source(source: Path, n_files: int | None) -> Outcome:
    """Scan a source and read what it holds. Any exception but a CtsrError is a bug, and comes out."""
    start = time.perf_counter()
    try:
        found = scan(source)
    except CtsrError:
        return Outcome(0, 1, 0, time.perf_counter() - start)
    read = refused = 0
    for stack in found.stacks:
        try:
            read_stack(stack)
            read += 1
        except CtsrError:
            refused += 1
    if n_files is not None:
        in_stacks = {s.file for stack in found.stacks for s in stack.slices}
        n_found = len(in_stacks) + sum(r.n_files for r in found.refused)
        n_found += sum(" frame " not in s.name for s in found.skipped)
        assert n_found == n_files, f"{n_found} of {n_files} files have an outcome"
    return Outcome(read, refused + len(found.refused), len(found.skipped), time.perf_counter() - start)
