"""How far a thickened result lies from the measured slices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ctsr.errors import InputError

__all__ = ["residual_summary"]


def residual_summary(
    residual: np.ndarray,
    bands: Mapping[str, np.ndarray] | None = None,
    valid: np.ndarray | None = None,
) -> dict[str, float | None]:
    """Mean and greatest |A x − y| in HU, the mean in each band, and the share of thick voxels that counted.

    residual: (n, H, W) A x − y on the thick grid, of either sign.
    bands: masks (n, H, W) on the thick grid.
    valid: (n, H, W) bool, the thick voxels that count: those that padding or a dtype's limit reached do not.
    None where no voxel counts.
    """
    if not np.isfinite(residual).all():
        raise InputError("the residual is not finite")
    size = np.abs(residual, dtype=np.float64)
    counts = np.ones(size.shape, bool) if valid is None else valid
    inside = {"": counts} | {f"_{name}": band & counts for name, band in (bands or {}).items()}
    means = {
        f"residual_mean_hu{name}": float(size[m].mean()) if m.any() else None for name, m in inside.items()
    }
    return {
        "residual_mean_hu": means.pop("residual_mean_hu"),
        "residual_max_hu": float(size[counts].max()) if counts.any() else None,
        "residual_counted_percent": 100 * float(counts.mean()),
        **means,
    }
