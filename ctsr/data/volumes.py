"""The volumes of a training: read from lists, turned to the computing order, checked for leaks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ctsr.core.geometry import canonical_turn, slice_axis
from ctsr.core.volume import PADDING_LIMIT
from ctsr.data.pairs import TrainVolume
from ctsr.errors import InputError
from ctsr.io.lists import read_file_list
from ctsr.io.nifti import read_volume

__all__ = ["content_hash", "load_volumes", "refuse_leaks"]

PADDED_AS = -1024  # HU: what scanner padding becomes, as `convert` writes it


def load_volumes(
    listed: Path, data_dir: Path, *, z_truth_max: float, notes: list[str] | None = None
) -> list[TrainVolume]:
    """Every volume of a list, in memory, as they are stored (int16: 2 bytes a voxel).

    z_truth_max: slice spacing up to which a volume trains along z, mm; every volume trains in plane.
    """
    notes = [] if notes is None else notes
    return [_load(path, z_truth_max, notes) for path in read_file_list(listed, data_dir, notes=notes)]


def _load(path: Path, z_truth_max: float, notes: list[str]) -> TrainVolume:
    volume = read_volume(path, notes=notes)
    axis, note = slice_axis(volume)
    if note:
        notes.append(f"{path}: {note}")
    turn = canonical_turn(volume.affine, axis)
    hu = np.array(turn.apply(volume.data), order="C")  # a copy of its own, in the order it is cut in
    hu[hu <= PADDING_LIMIT] = PADDED_AS
    spacing = volume.spacing[list(turn.order)]
    thickness = volume.slice_thickness or float(spacing[0])
    along_z = float(spacing[0]) <= z_truth_max
    return TrainVolume(str(path), hu, tuple(map(float, spacing)), thickness, along_z)  # type: ignore[arg-type]


def content_hash(volume: TrainVolume) -> str:
    """sha256 of the voxels: a renamed copy of a file is the same scan."""
    return hashlib.sha256(np.ascontiguousarray(volume.hu)).hexdigest()


def refuse_leaks(train: Sequence[TrainVolume], val: Sequence[TrainVolume]) -> None:
    """Raise InputError if a scan stands in both sets, under one name or two."""
    seen = {content_hash(v): v.name for v in train}
    for volume in val:
        if (twin := seen.get(content_hash(volume))) is not None:
            raise InputError(
                f"holds the same voxels as {twin}: a validation on training data means nothing",
                path=volume.name,
                hint="take one of them out of its list",
            )
