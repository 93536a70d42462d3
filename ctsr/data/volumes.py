"""The volumes of a training: read from lists, turned to the computing order, checked for leaks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ctsr.core.geometry import canonical_turn, slice_axis
from ctsr.core.volume import PADDING_LIMIT
from ctsr.data.pairs import TrainVolume
from ctsr.errors import InputError
from ctsr.io.lists import read_file_list
from ctsr.io.scans import read_scan

__all__ = ["content_hash", "fingerprint", "load_volume", "load_volumes", "refuse_leaks"]

PADDED_AS = -1024  # HU: what scanner padding becomes, as `convert` writes it


def load_volumes(
    listed: Path, data_dir: Path, *, z_truth_max: float, notes: list[str] | None = None
) -> list[TrainVolume]:
    """Every volume of a list, in memory, as int16 where that holds it, else float32.

    They are read whole and checked here, once: a file that changes later is not seen.
    z_truth_max: slice spacing up to which a volume trains along z, mm; every volume trains in plane.
    """
    notes = [] if notes is None else notes
    files = read_file_list(listed, data_dir, notes=notes)
    return [load_volume(path, z_truth_max=z_truth_max, notes=notes) for path in files]


def load_volume(path: Path, *, z_truth_max: float, notes: list[str]) -> TrainVolume:
    """One of them."""
    found: list[str] = []
    volume = read_scan(path, notes=found)
    axis, note = slice_axis(volume)
    notes += [f"{path}: {text}" for text in (*found, note) if text]
    turn = canonical_turn(volume.affine, axis)
    dtype = np.int16 if np.can_cast(volume.data.dtype, np.int16) else np.float32
    hu: np.ndarray = np.array(turn.apply(volume.data), dtype, order="C")  # a copy in the order it is cut in
    if len(hu) < 2:
        raise InputError("has 1 slice, at least 2 are needed to train along z", path=path)
    hu[hu <= PADDING_LIMIT] = PADDED_AS
    spacing = volume.spacing[list(turn.order)]
    thickness = volume.slice_thickness or float(spacing[0])
    along_z = float(spacing[0]) <= z_truth_max
    d, h, w = map(float, spacing)
    return TrainVolume(str(path), hu, (d, h, w), thickness, along_z, content_hash(hu))


def content_hash(hu: np.ndarray) -> str:
    """sha256 of the voxels as float32: a copy under another name or in another type is the same scan."""
    digest = hashlib.sha256()
    for piece in hu:
        digest.update(np.ascontiguousarray(piece, np.float32).data)
    return digest.hexdigest()


def fingerprint(volumes: Sequence[TrainVolume]) -> str:
    """What a run must find again when it goes on: the scans, their order, and how each is used."""
    facts = [(v.content, v.spacing, v.slice_thickness, v.trains_along_z) for v in volumes]
    return f"{len(volumes)} scans {hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"


class Named(Protocol):
    """A scan, or what was made of it. content: sha256 of the scan's voxels."""

    @property
    def name(self) -> str: ...
    @property
    def content(self) -> str: ...


def refuse_leaks(train: Sequence[Named], val: Sequence[Named]) -> None:
    """Raise InputError if a scan stands in both sets, under one name or two."""
    seen = {v.content: v.name for v in train}
    for volume in val:
        if (twin := seen.get(volume.content)) is not None:
            raise InputError(
                f"holds the same voxels as {twin}: a validation on training data means nothing",
                path=volume.name,
                hint="take one of them out of its list",
            )
