"""The type a result is stored in, and the one place where HU are rounded and limited."""

from __future__ import annotations

import numpy as np

__all__ = ["rounded", "storage_type"]


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
    whole: np.ndarray = np.clip(np.rint(hu), info.min, info.max).astype(dtype)
    return whole
