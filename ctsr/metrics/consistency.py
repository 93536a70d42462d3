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

    def mean(mask: np.ndarray | None) -> float | None:
        chosen = residual if mask is None else residual[mask]
        return float(np.abs(chosen).mean(dtype=np.float64)) if chosen.size else None

    counted = residual if valid is None else residual[valid]
    summary = {
        "residual_mean_hu": mean(valid),
        "residual_max_hu": float(np.abs(counted).max()) if counted.size else None,
        "residual_counted_percent": 100 * counted.size / residual.size,
    }
    for name, band in (bands or {}).items():
        summary[f"residual_mean_hu_{name}"] = mean(band if valid is None else band & valid)
    return summary
