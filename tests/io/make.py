"""Small NIfTI files made by nibabel, and ways to spoil them, by nibabel's tables and not by ours."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (9, 8, 7)
SPACING = (0.7, 0.8, 2.5)
FIELDS = nib.nifti1.header_dtype


def ct(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    """A round of tissue in air with noise, int16 HU."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    body = np.linalg.norm(grid[:2], axis=0) < 0.9
    return np.rint(np.where(body, 40, -1000) + rng.normal(0, 20, shape)).clip(-1024, 3071).astype(np.int16)


def affine_of(spacing: tuple[float, ...] = SPACING) -> np.ndarray:
    """The usual CT order: left to right and front to back are stored backwards."""
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = 100, 120, -300
    return affine


def nifti(
    data: np.ndarray | None = None,
    affine: np.ndarray | None = None,
    *,
    slope: float = 1,
    inter: float = 0,
    **fields: object,
) -> bytes:
    """The bytes of a .nii file of stored numbers `data`, with header fields changed as named."""
    data = ct() if data is None else data
    affine = affine_of() if affine is None else affine
    image = nib.Nifti1Image(data, affine, dtype=data.dtype)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm")
    return change(image.to_bytes(), scl_slope=slope, scl_inter=inter, **fields)


def change(raw: bytes, **fields: object) -> bytes:
    """`raw` with header fields set; `name_2=x` sets element 2 of a field."""
    header = np.frombuffer(bytearray(raw[:348]), FIELDS).copy()
    for name, value in fields.items():
        base, _, index = name.rpartition("_")
        if name in FIELDS.names:
            header[name] = value
        else:
            header[base][0][int(index)] = value
    return header.tobytes() + raw[348:]


def form(affine: np.ndarray) -> dict[str, object]:
    """Fields that put `affine` into the sform."""
    return {f"srow_{axis}": affine[i] for i, axis in enumerate("xyz")}


def qform(affine: np.ndarray) -> dict[str, object]:
    """Fields that put `affine` into the qform, by nibabel."""
    header = nib.Nifti1Header()
    header.set_qform(affine, 1)
    names = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "pixdim")
    return {name: header[name] for name in names}


def put(folder: Path, raw: bytes, name: str = "x.nii") -> Path:
    """Write `raw` under `name`, compressed where the name says so."""
    path = folder / name
    path.write_bytes(gzip.compress(raw, 1, mtime=0) if name.endswith(".gz") else raw)
    return path
