"""A derived series: thin slices as CT images beside their source, in the same patient, study and frame.

One file a slice, explicit VR little endian, stored value = HU. Attributes are copied from the source by name, never
all of them: what is not listed here does not pass. UIDs are digests of all headers and all pixels. So the same input
gives the same files, sending them twice is harmless, and no UID ever stands for two contents.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ctsr.core.geometry import corners
from ctsr.core.volume import Volume
from ctsr.errors import GeometryError, ResourceError, UsageError
from ctsr.io.atomic import OutputFile, PathLike, atomic_folder, check_folder, output_error
from ctsr.io.dicom.derived import ANY_IMAGE, ANY_SERIES, IMPLEMENTATION, headers, uid
from ctsr.io.dicom.elements import quiet
from ctsr.io.dicom.records import Stack
from ctsr.io.provenance import write_record

__all__ = ["RECORD", "check_like", "check_series", "write_series"]

RECORD = "ctsr.json"
_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_DIRECTION, _SPACING = 1e-4, 1e-3  # largest difference: of direction cosines; of pixel spacings, relative
_ON_GRID = 1e-3  # mm
_OURS = re.compile(r"IM\d{6}\.dcm")


def check_series(folder: PathLike, *, overwrite: bool, like: Stack) -> None:
    """Refuse, before hours of work, a folder that `write_series` could not write.

    UsageError: it holds something else than a series that ctsr wrote, or such a one without `overwrite`, or the
    source itself; no such parent. ResourceError: the parent can't be written to.
    """
    target = Path(os.path.realpath(folder))
    if any(Path(os.path.realpath(s.file.path)).is_relative_to(target) for s in like.slices):
        raise UsageError("holds the input itself", path=folder, hint="name another folder")
    check_folder(folder, overwrite=overwrite, is_ours=_is_ours)


def write_series(
    folder: PathLike,
    slabs: Iterable[tuple[int, np.ndarray]],
    like: Stack,
    affine: np.ndarray,
    shape: tuple[int, int, int],
    *,
    padding_value: int | None,
    overwrite: bool,
    record: Mapping[str, Any],
    random_uids: bool = False,
) -> list[str]:
    """Write a volume as CT images IM000001.dcm … with `ctsr.json` beside them; returns what should be known of it.

    slabs: (index of the first slice, (n, rows, columns) HU), together every slice once, in any order. HU are
    rounded half to even and limited to int16, nothing else.
    like: the series that lends patient, study, frame of reference and technique.
    affine: (4, 4), index (column, row, slice) → RAS+ mm, slices rising along row × column direction.
    shape: columns, rows, slices. padding_value: HU of padding in the volume, None where it has none.
    record: how the pixels came about, as `upsample` tells it, nothing of a patient; the series says it, and it is
    written to ctsr.json. It is read once the slabs are through, so it may be filled meanwhile.
    random_uids: new UIDs and the present as ContentDate at every call.
    The record gains output_pixels_sha256 (of the slices' digests) and output_size_bytes (of the images).

    The folder appears when all is written and read back; until then its pixels lie in a temporary one beside it.
    Raises what `check_series` does, GeometryError for an affine that is no such grid, ValueError for wrong slabs.
    """
    check_series(folder, overwrite=overwrite, like=like)
    grid = _TO_LPS @ affine
    directions = grid[:3, :3] / np.linalg.norm(grid[:3, :3], axis=0)
    off = np.abs(directions.T @ directions - np.eye(3)).max()
    if off > _DIRECTION or np.linalg.det(directions) < 0:
        raise GeometryError("its axes are not orthogonal, or its slices run against row × column")
    with atomic_folder(folder, overwrite=overwrite, is_ours=_is_ours) as temporary:
        digests = _spool(temporary, slabs, shape, folder)
        named = "\n".join((like.study_uid, like.series_uid, like.patient_id)).encode()
        source = hashlib.sha256(b"".join([named, *digests])).digest()
        with quiet():
            now = datetime.datetime.now() if random_uids else None
            made, warnings = headers(
                like, grid, shape, record, padding_value=padding_value, seed=source, now=now
            )
        whole = hashlib.sha256(json.dumps(record["request"], sort_keys=True).encode())
        for header, digest in zip(made, digests, strict=True):
            whole.update(header + digest)
        seed = secrets.token_bytes(32) if random_uids else whole.digest()
        size = 0
        for k, header in enumerate(made):
            for placeholder, part in ((ANY_SERIES, "series"), (ANY_IMAGE, f"image {k}")):
                header = header.replace(placeholder.encode(), uid(seed, part).encode())
            size += _finish(temporary, k, header, folder)
        with quiet():
            _verify(temporary, grid, digests, folder)
        sha256 = hashlib.sha256(b"".join(digests)).hexdigest()
        complete = {**record, "output_pixels_sha256": sha256, "output_size_bytes": size}
        write_record(os.path.join(temporary, RECORD), complete, overwrite=False)
        os.chmod(os.path.join(temporary, RECORD), 0o600)
    return warnings


def check_like(volume: Volume, stack: Stack) -> Volume:
    """The volume, a view, with its axes as the series has them: column, row, slice along the normal.

    For an image file that borrows a patient: GeometryError where its axes are not those of the series, or its
    pixels are of another size, or it lies outside the box that the series fills.
    """
    import nibabel

    axes: Any = nibabel.orientations
    first = stack.slices[0]
    frame = np.stack([first.row, first.column, first.normal])  # LPS, rows: the axes asked for
    lps = _TO_LPS @ volume.affine
    orientation = axes.io_orientation(np.block([[frame @ lps[:3, :3], np.zeros((3, 1))], [0, 0, 0, 1]]))
    data = axes.apply_orientation(volume.data, orientation)
    undo = axes.inv_ornt_aff(orientation, volume.shape)
    lps = lps @ undo
    spacing, hint = np.linalg.norm(lps[:3, :3], axis=0), "--like another series"
    closest = np.diag(frame @ lps[:3, :3] / spacing).min()
    if closest < np.cos(np.radians(0.1)):
        degrees = np.degrees(np.arccos(closest.clip(0, 1)))
        raise GeometryError(f"its axes are turned by {degrees:.3g}° against the series'", hint=hint)
    wanted = np.array(first.pixel_spacing)[::-1]
    if (np.abs(spacing[:2] / wanted - 1) > _SPACING).any():
        sizes = " against ".join(f"{a:.6g} × {b:.6g}" for a, b in (spacing[:2], wanted))
        raise GeometryError(f"its pixels are not of the series' size: {sizes} mm", hint=hint)
    ours = corners(lps, data.shape) @ frame.T
    rows, columns = first.shape
    far = first.row * (columns - 1) * wanted[0] + first.column * (rows - 1) * wanted[1]
    theirs = np.array([p for s in stack.slices for p in (s.position, s.position + far)]) @ frame.T
    apart = np.maximum(ours.min(0) - theirs.max(0), theirs.min(0) - ours.max(0)).max()
    if apart > 0:
        raise GeometryError(f"it lies {apart:.4g} mm outside the box of the series", hint=hint)
    return replace(volume, data=data, affine=volume.affine @ undo, slice_axis=2)


def _spool(
    temporary: str, slabs: Iterable[tuple[int, np.ndarray]], shape: tuple[int, int, int], folder: PathLike
) -> list[bytes]:
    """Store the pixels of each slice beside where it will be; returns their digests. ValueError on wrong slabs."""
    columns, rows, n = shape
    digests: list[bytes] = [b""] * n
    for start, slab in slabs:
        if slab.ndim != 3 or slab.shape[1:] != (rows, columns) or not 0 <= start <= n - len(slab):
            raise ValueError(f"a slab of {slab.shape} from {start} in a volume of {(n, rows, columns)}")
        if slab.dtype.kind == "f" and not np.isfinite(slab).all():
            raise ValueError("voxels that are not finite are not written")
        for k, plane in enumerate(slab, start):
            if digests[k]:
                raise ValueError(f"slice {k} comes twice")
            stored = np.rint(plane).clip(-(1 << 15), (1 << 15) - 1).astype("<i2")
            file = _store(os.path.join(temporary, f"{k}.pixels"), [np.ascontiguousarray(stored).data], folder)
            digests[k] = bytes.fromhex(file.sha256)
        del slab, plane  # before the next is computed
    if missing := digests.count(b""):
        raise ValueError(f"{missing} of {n} slices did not come")
    return digests


def _finish(temporary: str, k: int, header: bytes, folder: PathLike) -> int:
    """Header and pixels of slice k under its name, on the disk; its size, bytes."""
    spooled = Path(temporary, f"{k}.pixels")
    path = os.path.join(temporary, f"IM{k + 1:06d}.dcm")
    file = _store(path, [header, spooled.read_bytes()], folder, sync=True)
    spooled.unlink()  # now, so that the disk never holds a volume twice
    return file.size


def _store(path: str, parts: Iterable[Any], folder: PathLike, *, sync: bool = False) -> OutputFile:
    """Write a new file of its owner alone; sync: until it is on the disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        file = OutputFile(os.open(path, flags, 0o600), folder)
        try:
            for part in parts:
                file.write(part)
            if sync:
                os.fsync(file.fileno())
        finally:
            file.close()
    except OSError as exc:
        raise output_error(exc, folder) from exc
    return file


def _verify(temporary: str, grid: np.ndarray, digests: list[bytes], folder: PathLike) -> None:
    """Read every file back: its pixels, its position on the grid, its own UID. ResourceError where one is not so."""
    import pydicom

    uids: set[str] = set()
    for k, digest in enumerate(digests):
        name = f"IM{k + 1:06d}.dcm"
        found = pydicom.dcmread(io.BytesIO(Path(temporary, name).read_bytes()))
        position = np.array(found.ImagePositionPatient, float)
        directions = np.array(found.ImageOrientationPatient, float).reshape(2, 3).T
        off = directions * np.array(found.PixelSpacing, float)[::-1] - grid[:3, :2]
        too_long = any(len(str(p)) > 16 for p in found.ImagePositionPatient)
        faults = {
            "pixels": hashlib.sha256(found.PixelData).digest() != digest,
            "position": too_long or np.abs(position - grid[:3, 3] - k * grid[:3, 2]).max() > _ON_GRID,
            "orientation": np.abs(off).max() * max(found.Rows, found.Columns) > _ON_GRID,
            "UID": found.SOPInstanceUID in uids,
        }
        uids.add(found.SOPInstanceUID)
        if wrong := [what for what, is_wrong in faults.items() if is_wrong]:
            reason = f"{name} does not read back as it was written: {', '.join(wrong)}"
            raise ResourceError(reason, path=folder)


def _is_ours(folder: str) -> bool:
    """Whether a folder holds a series that ctsr wrote and nothing else."""
    names = os.listdir(folder)

    def is_ours(name: str) -> bool:
        with open(os.path.join(folder, name), "rb") as file:
            return IMPLEMENTATION.encode() in file.read(512)

    return RECORD in names and all(
        name == RECORD or (_OURS.fullmatch(name) and is_ours(name)) for name in names
    )
