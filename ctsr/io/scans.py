"""A scan that a user names: a NIfTI file, or the CT series of a DICOM folder, archive or file."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from ctsr.core.volume import Volume
from ctsr.errors import GeometryError, InputError, UsageError
from ctsr.io.dicom.records import Scan, Stack
from ctsr.io.lists import VOLUME_SUFFIXES, volumes_in
from ctsr.io.nifti import read_volume

__all__ = ["find_series", "is_dicom", "is_folder_of_scans", "only_series", "read_scan"]


def is_dicom(path: Path) -> bool:
    """Whether `path` is looked through for DICOM: a folder without NIfTI files, a .zip, a file that begins as one."""
    if path.is_dir():
        return not volumes_in(path)
    if path.name.lower().endswith(VOLUME_SUFFIXES) or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            begin = file.read(132)
    except OSError:
        return False  # the reader of image files says why
    return begin[128:] == b"DICM" or path.suffix.lower() == ".zip"


def is_folder_of_scans(path: Path) -> bool:
    """Whether `path` is a folder with NIfTI files: a batch."""
    return path.is_dir() and not is_dicom(path)


def find_series(path: Path) -> Scan:
    """The series of a DICOM folder, archive or file; InputError where it holds no CT, UsageError where nothing."""
    from ctsr.io.dicom.scan import scan

    found = scan(path)
    if found == Scan((), (), ()):
        raise UsageError("holds no files", path=path)
    if not found.stacks and not found.refused:
        reasons = Counter(skipped.reason for skipped in found.skipped).most_common(3)
        told = ", ".join(f"{n} × {reason}" for reason, n in reasons)
        raise InputError(f"holds neither NIfTI nor a CT series{f': {told}' if told else ''}", path=path)
    return found


def only_series(path: Path) -> Stack:
    """The one series that a DICOM folder holds. UsageError where there are several, GeometryError for a refused one."""
    found = find_series(path)
    if len(found.stacks) + len(found.refused) > 1:
        raise UsageError(
            f"holds {len(found.stacks) + len(found.refused)} CT series, one is asked for",
            path=path,
            hint="name the folder of one series, or convert them all with ctsr convert",
        )
    if found.refused:
        raise GeometryError(found.refused[0].reason, path=path, hint=found.refused[0].hint)
    return found.stacks[0]


def read_scan(
    path: os.PathLike[str],
    *,
    form: str | None = None,
    hu_offset: float = 0.0,
    allow_labels: bool = False,
    notes: list[str] | None = None,
) -> Volume:
    """The volume of a NIfTI file or of a DICOM folder with one series, padding kept as padding."""
    if not is_dicom(Path(path)):
        return read_volume(path, form=form, hu_offset=hu_offset, allow_labels=allow_labels, notes=notes)
    if form is not None or hu_offset:
        raise UsageError("--form and --hu-offset are for NIfTI files", path=path)
    from ctsr.io.dicom.read import read_stack

    made = read_stack(only_series(Path(path)), pad_hu=None)
    if notes is not None:
        notes += made.warnings
    return made.volume
