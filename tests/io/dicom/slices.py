"""Slices for tests of what comes after the scan: made from arrays, without a file's header around them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from ctsr.io.dicom.records import DicomFile, Slice, Stack

X, Y, Z = np.eye(3)


def a_slice(position: Sequence[float] | np.ndarray, **other: object) -> Slice:
    """An axial slice at `position`; `other` fields replace the usual ones, and `tags` are put into the header."""
    header = Dataset()
    usual = {"BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1}
    for name, value in {**usual, **other.pop("tags", {})}.items():  # type: ignore[dict-item]
        setattr(header, name, value)
    fields: dict[str, object] = {
        "file": DicomFile("001.dcm", Path("001.dcm")),
        "header": header,
        "frame": None,
        "position": np.asarray(position, dtype=float),
        "row": X,
        "column": Y,
        "pixel_spacing": (0.75, 0.75),
        "shape": (48, 64),
        "slope": 1.0,
        "intercept": 0.0,
        "rescale_type": "HU",
        "thickness": None,
        "kernel": "B30f",
        "image_type": ("ORIGINAL", "PRIMARY", "AXIAL"),
        "transfer_syntax": "1.2.840.10008.1.2.1",
        "pixel_offset": 0,
    }
    return Slice(**{**fields, **other})  # type: ignore[arg-type]


def written(folder: Path, stored: np.ndarray, **other: object) -> Slice:
    """The slice at z = 0 whose file holds `stored`, (rows, columns) of 16 bit, and nothing else."""
    path = folder / "001.dcm"
    path.write_bytes(stored.tobytes())
    return a_slice([0, 0, 0], file=DicomFile(path.name, path), shape=stored.shape, **other)


def a_stack(
    folder: Path, stored: np.ndarray, *, step: Sequence[float] = (0, 0, 2.5), **other: object
) -> Stack:
    """Slices of `stored`, (K, rows, columns), each in a file of its own, `step` mm from one to the next."""
    slices = []
    for k, pixels in enumerate(stored):
        path = folder / f"{k:03d}.dcm"
        path.write_bytes(pixels.tobytes())
        of_slice = {name: value[k] if isinstance(value, list) else value for name, value in other.items()}
        slices.append(
            a_slice(
                k * np.asarray(step, dtype=float),
                file=DicomFile(path.name, path),
                shape=pixels.shape,
                **of_slice,
            )
        )
    return Stack(tuple(slices), "", "", "")
