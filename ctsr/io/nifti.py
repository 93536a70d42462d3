"""Reading and writing CT volumes as NIfTI: the whole file or a refusal, a fresh header, atomic output."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import math
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ctsr.core.volume import Volume
from ctsr.errors import InputError, ResourceError, UsageError
from ctsr.io.atomic import OutputFile, PathLike, atomic_write, input_error
from ctsr.io.hu import kept_dtype, refuse_what_is_not_hu, to_hu
from ctsr.io.memory import available_bytes
from ctsr.io.nifti_form import CONVERT
from ctsr.io.nifti_header import LABEL_INTENT, Header, build_header, read_header
from ctsr.io.provenance import read_sidecar, record_first, sidecar_length

try:  # 3 to 4 times as fast as zlib, both ways
    from isal import igzip, igzip_threaded, isal_zlib

    _GzipReader: Any = igzip.IGzipFile
    _BROKEN_STREAM: Any = (zlib.error, isal_zlib.error)
except ImportError:  # no wheel for this machine
    igzip_threaded = None  # type: ignore[assignment]
    _GzipReader, _BROKEN_STREAM = gzip.GzipFile, zlib.error

__all__ = ["Header", "SlabWriter", "read_geometry", "read_volume", "write_slabs", "write_volume"]

_LARGEST_EXPANSION = 1032  # deflate can't do more: 258 bytes from 2 bits
_TAIL = 1 << 20  # bytes read past the voxels before giving up on a stream that does not end
_ZEROS_ALLOWED = 1024  # bytes; some writers fill up a block
_PIECE = 1 << 24  # bytes a read: a signal is answered between two
_BLOCK = 1 << 20  # bytes a compressed block: the same whatever pieces the voxels come in
_GZIP_LEVEL = (
    2  # isal: 61 % of CT at 350 MB/s on one core; levels 1 and 3 give 63 and 61 % at 350 and 280 MB/s
)
_FORMS = (None, "sform", "qform")


def read_volume(
    path: PathLike,
    *,
    form: str | None = None,
    hu_offset: float = 0.0,
    allow_labels: bool = False,
    allow_not_hu: bool = False,
    notes: list[str] | None = None,
) -> Volume:
    """The CT volume of a .nii or .nii.gz file, in HU, read to the last byte and checked.

    form: "sform" or "qform" where the two disagree and the user chose. hu_offset: HU added to every voxel.
    allow_labels, allow_not_hu: do not refuse label maps, or values that can't be HU.
    notes: gets a line for everything that was taken as it is but should be known.
    The array is the file's own bytes where they are HU already (no second copy), else int16 or float32.
    Raises InputError or GeometryError for what can't be trusted, ResourceError where memory is too small.
    """
    if not math.isfinite(hu_offset):
        raise UsageError(f"--hu-offset: {hu_offset} is not a number of HU")
    notes = [] if notes is None else notes
    name = os.fspath(path)
    with _open(name, notes) as source:
        header = source.header(form, notes)
        raw = source.voxels(header.n_bytes)
    stored = raw.view(header.dtype)
    inter = header.inter + hu_offset
    hu = to_hu(stored, header.shape, slope=header.slope, inter=inter, path=name)
    refuse_what_is_not_hu(
        hu,
        stored_dtype=stored.dtype if (header.slope, inter) == (1.0, 0.0) else hu.dtype,
        is_label=header.intent == LABEL_INTENT,
        allow_labels=allow_labels,
        allow_not_hu=allow_not_hu,
        path=name,
        notes=notes,
    )
    return Volume(
        hu.reshape(header.shape, order="F"),
        header.affine,
        slice_thickness=_thickness(name, header, notes),
        slice_axis=header.slice_axis,
        stored_dtype=kept_dtype(header.dtype, hu),
        form_code=header.form_code,
    )


def read_geometry(path: PathLike, *, form: str | None = None, notes: list[str] | None = None) -> Header:
    """What a NIfTI file's header says, without reading the voxels: for plans and dry runs.

    An uncompressed file's size is checked; the voxels of a compressed one may still turn out to be damaged.
    """
    notes = [] if notes is None else notes
    name = os.fspath(path)
    with _open(name, notes) as source:
        header = source.header(form, notes)
    return replace(header, slice_thickness=_thickness(name, header, notes))


def _thickness(path: str, header: Header, notes: list[str]) -> float | None:
    """Slice thickness from the sidecar, mm, where it can be one and the sidecar speaks of this grid."""
    sidecar = read_sidecar(path)
    thickness, apart = (sidecar_length(sidecar, k) for k in ("SliceThickness", "SpacingBetweenSlices"))
    if "SliceThickness" in sidecar and thickness is None:
        notes.append("the sidecar's SliceThickness is not a length: ignored (--thickness gives the true one)")
    if apart is not None and np.abs(header.spacing / apart - 1).min() > 0.01:
        spacing = " × ".join(f"{s:.4g}" for s in header.spacing)
        notes.append(f"the sidecar speaks of slices {apart:g} mm apart, voxels are {spacing} mm: ignored")
        return None
    return thickness


@dataclass(slots=True)
class _Source:
    """An open file, unpacked on the way; counts what passes, so that an error can say how far it came."""

    file: Any  # has readinto
    path: str
    size: int  # bytes on the disk
    is_gzip: bool
    passed: int = 0
    wanted: int = 348

    def read(self, n: int) -> bytes:
        """The next n bytes, fewer only at the end."""
        buffer = bytearray(n)
        return bytes(buffer[: self.fill(memoryview(buffer))])

    def fill(self, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer):
            got = self.file.readinto(buffer[done : done + _PIECE])
            if not got:
                break
            done += got
            self.passed += got
        return done

    def header(self, form: str | None, notes: list[str]) -> Header:
        """The checked header; what it claims is held against the file's size before it is allocated."""
        if form not in _FORMS:
            raise UsageError(f"--form: {form} is not sform or qform")
        header = read_header(self.read, self.path, form=form, notes=notes)
        self.wanted = header.voxel_offset + header.n_bytes
        if self.is_gzip and self.wanted > _LARGEST_EXPANSION * (self.size + 1):
            dims = "×".join(map(str, header.shape))
            reason = f"{dims} voxels are {self.wanted:,} bytes, more than {self.size:,} packed ones can hold"
            raise InputError(reason, path=self.path)
        if not self.is_gzip and self.wanted > self.size:
            raise self._truncated(header.n_bytes, max(0, self.size - header.voxel_offset))
        return header

    def _truncated(self, n: int, found: int) -> InputError:
        return InputError(f"truncated: {n:,} bytes of voxels expected, {found:,} found", path=self.path)

    def voxels(self, n: int) -> np.ndarray:
        """(n,) uint8: the voxels' bytes, and nothing but zeros after them up to the end of the stream."""
        free = available_bytes()
        needed = f"the voxels need {n / 1e9:.2f} GB of memory"
        if free is not None and n > free:
            raise ResourceError(f"{needed}, {free / 1e9:.2f} GB are free", path=self.path)
        try:
            raw = np.empty(n, np.uint8)
        except MemoryError as exc:
            raise ResourceError(f"{needed}, it can't be had", path=self.path) from exc
        if (found := self.fill(raw.data)) < n:
            raise self._truncated(n, found)
        rest = self.read(_TAIL + 1)  # to the end: only there gzip's checksum and length are compared
        if len(rest) > _ZEROS_ALLOWED or rest.strip(b"\0"):
            count = f"more than {_TAIL:,}" if len(rest) > _TAIL else f"{len(rest):,}"
            raise InputError(f"{count} bytes after the voxels (dim wrong?)", path=self.path)
        return raw


@contextlib.contextmanager
def _open(path: str, notes: list[str]) -> Iterator[_Source]:
    """The file as a stream; whatever goes wrong while reading it comes out as InputError."""
    source = None
    try:
        _refuse_by_kind(path)
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(4)
            file.seek(0)
            is_gzip = start[:2] == b"\x1f\x8b"
            if is_gzip != path.lower().endswith(".gz") and size:
                notes.append(f"is {'' if is_gzip else 'not '}compressed, whatever its name says")
            if is_gzip and len(start) == 4 and start[3] & 0xE0:  # RFC 1952: must be zero
                raise InputError("damaged gzip header (reserved flags are set)", path=path)
            if is_gzip:
                source = _Source(_GzipReader(fileobj=file, mode="rb"), path, size, is_gzip=True)
            else:
                source = _Source(file, path, size, is_gzip=False)
            yield source
    except EOFError as exc:
        share = source.passed / source.wanted if source else 0.0
        reason = f"truncated gzip stream at {share:.0%}" if share < 1 else "gzip stream without an end"
        raise InputError(reason, path=path, hint="copy it again") from exc
    except gzip.BadGzipFile as exc:
        reason = "damaged file: gzip checksum or length does not match"
        if "not a gzip" in str(exc).lower():  # the first stream had its magic: this comes after it
            reason = "bytes follow the end of the gzip stream"
        raise InputError(reason, path=path, hint="copy it again") from exc
    except _BROKEN_STREAM as exc:
        raise InputError("damaged gzip stream", path=path, hint="copy it again") from exc
    except OSError as exc:
        raise input_error(exc, path) from exc


def _refuse_by_kind(path: str) -> None:
    """Refuse, before opening, what is no regular file (a FIFO would hang)."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        is_dicom = _holds_dicom(path)
        kind, hint = ("a folder with DICOM in it", CONVERT) if is_dicom else ("a folder", "name a file in it")
        raise InputError(f"is {kind}", path=path, hint=hint)
    if not stat.S_ISREG(mode):
        raise InputError("is a FIFO, a socket or a device, a file expected", path=path)


def _holds_dicom(folder: str, at_most: int = 50) -> bool:
    """Whether one of the first files below a folder starts as DICOM does."""
    files = (Path(here, name) for here, _, names in os.walk(folder) for name in names)
    for file in filter(Path.is_file, itertools.islice(files, at_most)):
        with contextlib.suppress(OSError), file.open("rb") as opened:
            if opened.read(132)[128:] == b"DICM":
                return True
    return False


class _Sink(Protocol):
    def write(self, data: memoryview, /) -> int: ...


class SlabWriter:
    """Takes the voxels of one volume piece by piece, in the file's order.

    sha256, size (bytes): of the file as it lies on the disk, set when the block that writes it has ended.
    """

    sha256: str = ""
    size: int = 0

    def __init__(self, sink: _Sink, shape: tuple[int, int, int], dtype: np.dtype) -> None:
        self._sink = sink
        self._dtype = dtype
        self._left = math.prod(shape)

    def write(self, piece: np.ndarray) -> None:
        """The next voxels: an array of any shape, taken with its first axis fastest. ValueError on NaN."""
        if piece.dtype != self._dtype:
            raise ValueError(f"a piece of {piece.dtype} in a file of {self._dtype}")
        if piece.size > self._left:
            raise ValueError(f"{piece.size:,} voxels where {self._left:,} are left")
        if piece.dtype.kind == "f" and not np.isfinite(piece).all():
            raise ValueError("voxels that are not finite are not written")
        flat = piece.ravel(order="F").astype(self._dtype.newbyteorder("<"), copy=False)
        self._left -= flat.size
        self._sink.write(flat.data.cast("B") if flat.dtype.isnative else memoryview(flat.tobytes()))

    def finish(self) -> None:
        if self._left:
            raise ValueError(f"{self._left:,} voxels were never written")


class _Blocks:
    """Gathers bytes into blocks of one size, so that the compressed file does not depend on the pieces."""

    def __init__(self, packer: Any) -> None:
        self._packer = packer
        self._waiting = bytearray()

    def write(self, data: memoryview, /) -> int:
        view = data
        while view:
            taken = view[: _BLOCK - len(self._waiting)]
            self._waiting += taken
            view = view[len(taken) :]
            if len(self._waiting) == _BLOCK:
                self.flush()
        return len(data)

    def flush(self) -> None:
        self._packer.write(bytes(self._waiting))
        self._waiting.clear()


@contextlib.contextmanager
def _packed(file: OutputFile) -> Iterator[_Sink]:
    """A sink that compresses into `file`, in two threads where isal is there; no time or name in the header.

    The bytes do not depend on the number of threads: blocks have one size, and each is given the one before.
    """
    if igzip_threaded is not None:
        packer: Any = igzip_threaded.open(  # type: ignore[no-untyped-call]
            file, "wb", compresslevel=_GZIP_LEVEL, threads=2, block_size=_BLOCK
        )
    else:
        packer = gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0)
    blocks = _Blocks(packer)
    try:
        yield blocks
        blocks.flush()
        packer.close()
    except BaseException:
        with contextlib.suppress(Exception):  # ends the thread; the first error is the one to tell
            packer.close()
        raise


@contextlib.contextmanager
def write_slabs(
    path: PathLike,
    shape: tuple[int, int, int],
    dtype: np.dtype,
    affine: np.ndarray,
    form_code: int = 1,
    *,
    overwrite: bool = False,
    slice_axis: int | None = None,
    record: Mapping[str, Any] | None = None,
) -> Iterator[SlabWriter]:
    """A .nii or .nii.gz file, written in pieces, that appears whole at the end of the block or not at all.

    shape, dtype, affine: of the whole volume, (I, J, K), index → RAS+ mm. form_code: of sform and qform.
    record: a provenance record, put beside the image just before it; it may be filled during the block.
    The same voxels give the same bytes, whatever pieces they come in.
    """
    lower = os.fspath(path).lower()
    if not lower.endswith((".nii", ".nii.gz")):
        raise UsageError("ends in neither .nii nor .nii.gz", path=path)
    header = build_header(shape, np.dtype(dtype), affine, form_code=form_code, slice_axis=slice_axis)
    before = None if record is None else record_first(path, record, overwrite=overwrite)
    with atomic_write(path, overwrite=overwrite, before_commit=before) as file:
        packed = _packed(file) if lower.endswith(".gz") else contextlib.nullcontext(file)
        with packed as sink:
            sink.write(memoryview(header))
            writer = SlabWriter(sink, shape, np.dtype(dtype))
            yield writer
            writer.finish()
        writer.sha256, writer.size = file.sha256, file.size


def write_volume(
    volume: Volume, path: PathLike, *, overwrite: bool = False, record: Mapping[str, Any] | None = None
) -> str:
    """Write a volume in the type of its data; returns the sha256 of the file, hexadecimal."""
    data = volume.data
    step = max(1, _PIECE // max(1, data[:, :, 0].nbytes))
    with write_slabs(
        path,
        volume.shape,
        data.dtype.newbyteorder("="),
        volume.affine,
        volume.form_code,
        overwrite=overwrite,
        slice_axis=volume.slice_axis,
        record=record,
    ) as writer:
        for k in range(0, volume.shape[2], step):
            writer.write(data[:, :, k : k + step].astype(data.dtype.newbyteorder("="), copy=False))
    return writer.sha256
