"""What is known of a DICOM CT before its pixels are read: slices, and the stacks that they form."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["DicomFile", "Refused", "Scan", "Skipped", "Slice", "Stack"]


@dataclass(frozen=True, slots=True)
class DicomFile:
    """One DICOM object: a file of a folder, or a member of a zip archive.

    name: as it is shown, relative to what was asked for, `/` between folders.
    path: the file, or the archive. member: its index in the archive; None for a plain file.
    """

    name: str
    path: Path
    member: int | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that is no slice of a volume, and why. series_uid: "" where it has none; it stays out of messages."""

    name: str
    reason: str
    series_uid: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """One image plane: a classic CT file, or one frame of a multi-frame object.

    header: the attributes without pixel data, a frame's as if it had a file of its own; holds what identifies the
        patient, so it is never printed.
    frame: index of the frame in its file, from 0; None for a classic file.
    position: (3,) centre of the first voxel, LPS mm. row, column: (3,) directions in which the column index and
        the row index grow. pixel_spacing: distance between rows, between columns, mm. shape: rows, columns.
    slope, intercept: stored value → HU; None where the object does not say. rescale_type: "" where absent.
    thickness: nominal SliceThickness, mm; None where absent. kernel: ConvolutionKernel, joined by a backslash.
    image_type: up to four values. pixel_offset: where in `read_bytes(file)` its pixels start, or, compressed, those
        of all frames. traits: name → value; the slices of one stack agree in all of them. notes: warnings for it.
    """

    file: DicomFile
    header: Dataset
    frame: int | None
    position: np.ndarray
    row: np.ndarray
    column: np.ndarray
    pixel_spacing: tuple[float, float]
    shape: tuple[int, int]
    slope: float | None
    intercept: float | None
    rescale_type: str
    thickness: float | None
    kernel: str
    image_type: tuple[str, ...]
    transfer_syntax: str
    pixel_offset: int
    traits: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def normal(self) -> np.ndarray:
        """(3,) row × column."""
        return np.cross(self.row, self.column)

    @property
    def at(self) -> float:
        """Position along the normal, mm."""
        return float(self.position @ self.normal)


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The slices of one volume, in rising order along the normal, at least one.

    series_uid, study_uid, patient_id: as in the files; "" where absent. They stay out of every message.
    label: "" for the only stack of its series, else "a", "b", ….
    warnings: what a user should know (two stacks in a series, derived images, …).
    """

    slices: tuple[Slice, ...]
    series_uid: str
    study_uid: str
    patient_id: str
    label: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How messages name it: the folder or archive of its first file, the count, no identity."""
        first = self.slices[0].file.name
        return f"{first} and {self.n_files - 1} more" if self.n_files > 1 else first

    @property
    def n_files(self) -> int:
        """Files that the slices are in: fewer than slices where one holds many."""
        return len({s.file for s in self.slices})


@dataclass(frozen=True, slots=True)
class Refused:
    """A series, or a part of one, that forms no volume. name: its first file. n_files: files that it holds."""

    name: str
    n_files: int
    reason: str
    hint: str = ""
    series_uid: str = ""


@dataclass(frozen=True, slots=True)
class Scan:
    """All that a folder, an archive or a file holds: every file is in exactly one of the three."""

    stacks: tuple[Stack, ...]
    skipped: tuple[Skipped, ...]
    refused: tuple[Refused, ...]
