"""Reading and writing CT volumes as NIfTI: the whole file or a refusal, a fresh header, atomic output."""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ctsr.core.volume import Volume
from ctsr.errors import InputError, ResourceError, UsageError
from ctsr.io.atomic import OutputFile, PathLike, atomic_write, input_error
from ctsr.io.hu import volume_of
from ctsr.io.memory import available_bytes
from ctsr.io.nifti_header import Header, build_header, read_header
from ctsr.io.provenance import read_sidecar, record_first, sidecar_length

try:  # 3 to 4 times as fast as zlib, both ways
    from isal import igzip, igzip_threaded, isal_zlib

    _GzipReader: Any = igzip.IGzipFile
    _BROKEN_STREAM: Any = (gzip.BadGzipFile, zlib.error, isal_zlib.error)
except ImportError:  # no wheel for this machine
    igzip_threaded = None  # type: ignore[assignment]
    _GzipReader, _BROKEN_STREAM = gzip.GzipFile, (gzip.BadGzipFile, zlib.error)

__all__ = ["SlabWriter", "read_volume", "write_slabs", "write_volume"]

_LARGEST_EXPANSION = 1032  # deflate can't do more: 258 bytes from 2 bits
_TAIL = 1 << 20  # bytes read past the voxels before giving up on a stream that does not end
_ZEROS_ALLOWED = 1024  # bytes; some writers fill up a block
_PIECE = 1 << 24  # bytes a read: a signal is answered between two
_BLOCK = 1 << 20  # bytes a compressed block: the same whatever pieces the voxels come in
_GZIP_LEVEL = 2  # isal: 61 % of CT at 350 MB/s on one core; levels 1 and 3: 63 and 61 % at 350 and 280 MB/s


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
    if form not in (None, "sform", "qform"):
        raise UsageError(f"--form: {form} is not sform or qform")
    notes = [] if notes is None else notes
    name = os.fspath(path)
    with _unpacked(name, notes) as (stream, most):
        header = read_header(stream.read, name, form=form, notes=notes)
        raw = _voxels(stream, header, most, name)
    return volume_of(
        raw.view(header.dtype),
        header,
        hu_offset=hu_offset,
        slice_thickness=_thickness(name, header, notes),
        allow_labels=allow_labels,
        allow_not_hu=allow_not_hu,
        path=name,
        notes=notes,
    )


@contextlib.contextmanager
def _unpacked(path: str, notes: list[str]) -> Iterator[tuple[Any, int]]:
    """The file as a stream, unpacked on the way, and the most bytes that it can hold.

    Whatever goes wrong while reading comes out as InputError.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise InputError("is a folder", path=path, hint="name a file in it")
        if not stat.S_ISREG(mode):  # before it is opened: a FIFO would hang
            raise InputError("is a FIFO, a socket or a device, a file expected", path=path)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            is_gzip = file.peek(2)[:2] == b"\x1f\x8b"
            if is_gzip != path.lower().endswith(".gz") and size:
                notes.append(f"is {'' if is_gzip else 'not '}compressed, whatever its name says")
            if is_gzip:
                yield _GzipReader(fileobj=file, mode="rb"), _LARGEST_EXPANSION * (size + 1)
            else:
                yield file, size
    except EOFError as exc:
        raise InputError("truncated gzip stream", path=path, hint="copy it again") from exc
    except _BROKEN_STREAM as exc:
        raise InputError(f"damaged gzip stream: {exc}", path=path, hint="copy it again") from exc
    except OSError as exc:
        raise input_error(exc, path) from exc


def _voxels(stream: Any, header: Header, most: int, path: str) -> np.ndarray:
    """(n,) uint8: the voxels' bytes, and nothing but zeros after them up to the end of the stream.

    What the header claims is held against what the file can hold, and against free memory, before it is allocated.
    """
    n, room = header.n_bytes, max(0, most - stream.tell())
    if n > room:
        raise InputError(f"truncated: {n:,} bytes of voxels expected, room for {room:,}", path=path)
    free = available_bytes()
    if free is not None and n > free:
        reason = f"the voxels need {n / 1e9:.2f} GB of memory, {free / 1e9:.2f} GB are free"
        raise ResourceError(reason, path=path)
    raw = np.empty(n, np.uint8)
    found = 0
    while found < n and (got := stream.readinto(raw.data[found : found + _PIECE])):
        found += got
    if found < n:
        raise InputError(f"truncated: {n:,} bytes of voxels expected, {found:,} found", path=path)
    rest = stream.read(_TAIL + 1)  # to the end: only there gzip's checksum and length are compared
    if len(rest) > _ZEROS_ALLOWED or rest.strip(b"\0"):
        count = f"more than {_TAIL:,}" if len(rest) > _TAIL else f"{len(rest):,}"
        raise InputError(f"{count} bytes after the voxels (dim wrong?)", path=path)
    return raw


def _thickness(path: str, header: Header, notes: list[str]) -> float | None:
    """Slice thickness from the sidecar, mm, where it can be one and the sidecar speaks of this grid."""
    sidecar = read_sidecar(path)
    thickness, apart = (sidecar_length(sidecar, k) for k in ("SliceThickness", "SpacingBetweenSlices"))
    if "SliceThickness" in sidecar and thickness is None:
        notes.append("the sidecar's SliceThickness is not a length: ignored (--thickness gives the true one)")
    spacing = np.linalg.norm(header.affine[:3, :3], axis=0)
    if apart is not None and np.abs(spacing / apart - 1).min() > 0.01:
        shown = " × ".join(f"{s:.4g}" for s in spacing)
        notes.append(f"the sidecar speaks of slices {apart:g} mm apart, voxels are {shown} mm: ignored")
        return None
    return thickness


class SlabWriter:
    """Takes the voxels of one volume piece by piece, in the file's order.

    sha256, size (bytes): of the file as it lies on the disk, set when the block that writes it has ended.
    """

    sha256: str = ""
    size: int = 0

    def __init__(self, sink: Any, shape: tuple[int, int, int], dtype: np.dtype) -> None:
        self._sink = sink
        self._dtype = dtype
        self._to_border = _BLOCK - 352  # bytes; the header lies before the voxels
        self.left = math.prod(shape)

    def write(self, piece: np.ndarray) -> None:
        """The next voxels: an array of any shape, taken with its first axis fastest. ValueError on NaN."""
        if piece.dtype != self._dtype:
            raise ValueError(f"a piece of {piece.dtype} in a file of {self._dtype}")
        if piece.size > self.left:
            raise ValueError(f"{piece.size:,} voxels where {self.left:,} are left")
        if piece.dtype.kind == "f" and not np.isfinite(piece).all():
            raise ValueError("voxels that are not finite are not written")
        self.left -= piece.size
        flat = piece.ravel(order="F").astype(self._dtype.newbyteorder("<"), copy=False)
        data = flat.view(np.uint8).data
        while data:  # up to the next block: the compressed file must not depend on the pieces
            taken = data[: self._to_border]
            self._sink.write(taken)
            self._to_border = self._to_border - len(taken) or _BLOCK
            data = data[len(taken) :]


@contextlib.contextmanager
def _packed(file: OutputFile) -> Iterator[Any]:
    """A sink that compresses into `file`, in two threads where isal is there; no time or name in the header."""
    if igzip_threaded is not None:
        sink: Any = igzip_threaded.open(  # type: ignore[no-untyped-call]
            file, "wb", compresslevel=_GZIP_LEVEL, threads=2, block_size=_BLOCK
        )
    else:
        sink = gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0)
    try:
        yield sink
        sink.close()
    except BaseException:
        with contextlib.suppress(Exception):  # ends the threads; the first error is the one to tell
            sink.close()
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
    lower, dtype = os.fspath(path).lower(), np.dtype(dtype)
    if not lower.endswith((".nii", ".nii.gz")):
        raise UsageError("ends in neither .nii nor .nii.gz", path=path)
    header = build_header(shape, dtype, affine, form_code=form_code, slice_axis=slice_axis)
    before = None if record is None else record_first(path, record, overwrite=overwrite)
    with atomic_write(path, overwrite=overwrite, before_commit=before) as file:
        with _packed(file) if lower.endswith(".gz") else contextlib.nullcontext(file) as sink:
            sink.write(memoryview(header))
            writer = SlabWriter(sink, shape, dtype)
            yield writer
            if writer.left:
                raise ValueError(f"{writer.left:,} voxels were never written")
        writer.sha256, writer.size = file.sha256, file.size


def write_volume(
    volume: Volume, path: PathLike, *, overwrite: bool = False, record: Mapping[str, Any] | None = None
) -> str:
    """Write a volume in the type of its data; returns the sha256 of the file, hexadecimal."""
    data, dtype = volume.data, volume.data.dtype.newbyteorder("=")
    step = max(1, _PIECE // max(1, data[:, :, 0].nbytes))
    with write_slabs(
        path,
        volume.shape,
        dtype,
        volume.affine,
        volume.form_code,
        overwrite=overwrite,
        slice_axis=volume.slice_axis,
        record=record,
    ) as writer:
        for k in range(0, volume.shape[2], step):
            writer.write(data[:, :, k : k + step].astype(dtype, copy=False))
    return writer.sha256
