"""CT numbers on a regular grid, where that grid lies in the patient, and the one place where HU are rounded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctsr.errors import GeometryError

__all__ = ["AIR", "PADDING_LIMIT", "Volume", "rounded", "storage_type"]

AIR = -1000.0  # HU
PADDING_LIMIT = -1500.0  # HU; nothing in a patient is this low: at or below it a voxel is scanner padding


@dataclass(frozen=True, slots=True, eq=False)  # eq: `==` on arrays has no single answer
class Volume:
    """CT numbers on a regular grid, and where that grid lies in the patient.

    data: (I, J, K) HU, axes in the order of the file; an integer type holds HU as they are (slope 1,
        intercept 0), every other volume is float32.
    affine: (4, 4) float64, voxel index → RAS+ position of the voxel's centre, mm.
    slice_thickness: FWHM of the slice profile, mm; None where nothing tells it.
    slice_axis: the array axis along which the slices are stacked, where the file says so (NIfTI's dim_info).
    stored_dtype: the type the file stored; decides the type of a result. None: that of `data`.
    form_code: NIfTI's sform code (1 scanner, 2 aligned …), kept on writing.
    """

    data: np.ndarray
    affine: np.ndarray
    slice_thickness: float | None = None
    slice_axis: int | None = None
    stored_dtype: np.dtype | None = None
    form_code: int = 1

    def __post_init__(self) -> None:
        if self.data.ndim != 3:
            raise GeometryError(f"a volume has 3 axes, this one has {self.data.ndim}: {self.data.shape}")
        if 0 in self.data.shape:
            raise GeometryError(f"a volume has voxels, this one has none: {self.data.shape}")
        if self.data.dtype.kind not in "iuf":
            raise GeometryError(f"CT numbers are integers or floats, not {self.data.dtype}")
        affine = np.array(self.affine, dtype=np.float64)  # a copy: the caller's array may change
        is_affine = affine.shape == (4, 4) and np.array_equal(affine[3], [0, 0, 0, 1])
        if not (is_affine and np.isfinite(affine).all()):
            found = affine.tolist()
            raise GeometryError(
                f"an affine is a finite 4 × 4 matrix that ends in 0 0 0 1, this one is {found}"
            )
        if abs(np.linalg.det(affine[:3, :3])) < 1e-12:
            raise GeometryError("the affine is singular: two axes of the volume run the same way")
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along each axis of the array."""
        i, j, k = self.data.shape
        return i, j, k

    @property
    def spacing(self) -> np.ndarray:
        """Distance between neighbouring voxel centres along each axis, mm, (3,)."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def result_dtype(self) -> np.dtype:
        """The type that a result made from this volume is stored in, before its range is known."""
        return np.dtype(self.stored_dtype if self.stored_dtype is not None else self.data.dtype)


def storage_type(wanted: np.dtype, low: float, high: float) -> np.dtype:
    """The type that holds HU from `low` to `high` with slope 1 and intercept 0.

    `wanted` (that of the input) where it is an integer type and holds them, else int16 where that does, else
    float32; a float type stays float32.
    """
    for dtype in (np.dtype(wanted), np.dtype(np.int16)):
        if wanted.kind in "iu" and np.iinfo(dtype).min <= round(low) and round(high) <= np.iinfo(dtype).max:
            return dtype
    return np.dtype(np.float32)


def rounded(hu: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """HU in `dtype`: whole numbers, limited to what the type holds; float types are only cast."""
    if dtype.kind not in "iu":
        return hu.astype(dtype, copy=False)
    info = np.iinfo(dtype)  # clipped before the cast, which would wrap
    return np.asarray(np.clip(np.rint(hu), info.min, info.max).astype(dtype))
