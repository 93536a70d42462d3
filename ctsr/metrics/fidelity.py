"""How far a volume is from its reference: PSNR, MAE, bias, RMSE, SSIM.

Arrays are (D, H, W) in HU, the slice axis first; any real dtype, computed in float64 (a difference of two
int16 arrays wraps). Metrics over a mask are those of the masked voxels. NaN is refused, not skipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from ctsr.errors import InputError

__all__ = ["PEAK", "PEAK_PUBLISHED", "PLANE_AXIS", "Difference", "Plane", "difference", "psnr", "ssim"]

PEAK = 4095.0  # HU, −1024…3071: the range of 12 bit CT
PEAK_PUBLISHED = 2000.0  # HU; many published tables use it, 6.22 dB lower on the same result

Plane = Literal["axial", "coronal", "sagittal"]
# the axis that a plane's slices are stacked on
PLANE_AXIS: dict[Plane, int] = {"axial": 0, "coronal": 1, "sagittal": 2}

_SIGMA, _TRUNCATE = 1.5, 3.5  # pixels, σ: 11 taps (Wang et al. 2004)
_RADIUS = 5  # pixels at each border that a window of 11 does not fit around
_K1, _K2 = 0.01, 0.03
_SLICES = 4  # worked on at a time; more leave the cache


@dataclass(frozen=True, slots=True)
class Difference:
    """Moments of pred − ref over `n` voxels, HU."""

    n: int
    mean: float
    mean_abs: float
    mean_square: float

    @property
    def rmse(self) -> float:
        """Root of the mean square, HU."""
        return math.sqrt(self.mean_square)

    def psnr(self, peak: float) -> float:
        """20·log₁₀(peak / RMSE), dB; infinite where nothing differs."""
        return 20 * math.log10(peak / self.rmse) if self.mean_square > 0 else math.inf


def difference(pred: np.ndarray, ref: np.ndarray, mask: np.ndarray | None = None) -> Difference:
    """The moments that PSNR, MAE, bias and RMSE come from, in one pass, a slice at a time."""
    _check(pred, ref, mask)
    n, total, total_abs, total_square = 0, 0.0, 0.0, 0.0
    for k in range(len(ref)):
        inside = ... if mask is None else mask[k]
        d = pred[k][inside].astype(np.float64) - ref[k][inside]
        n += d.size
        total += float(d.sum())
        total_abs += float(np.abs(d).sum())
        total_square += float(np.square(d).sum())
    return Difference(n, total / n, total_abs / n, total_square / n)


def psnr(pred: np.ndarray, ref: np.ndarray, mask: np.ndarray | None = None, *, peak: float) -> float:
    """Peak signal-to-noise ratio, dB; infinite for identity. `peak`: PEAK or PEAK_PUBLISHED."""
    return difference(pred, ref, mask).psnr(peak)


def ssim(pred: np.ndarray, ref: np.ndarray, *, plane: Plane, mask: np.ndarray | None = None) -> float | None:
    """Mean structural similarity of the slices of one plane (Wang et al. 2004), 1 for identity.

    Gaussian window, population covariance; pixels whose window leaves the slice are not counted; the mask
    selects from the map after filtering. Equal to scikit-image on float64. SSIM changes with an offset: both
    in HU. None where the plane has no pixel to count: its slices are smaller than 11 × 11 (a stack of 5
    slices has axial SSIM only), or the mask lies in the border.
    """
    _check(pred, ref, mask)
    x, y = (np.moveaxis(a, PLANE_AXIS[plane], 0) for a in (pred, ref))
    inner = (slice(_RADIUS, -_RADIUS),) * 2
    if min(x.shape[1:]) <= 2 * _RADIUS:
        return None
    chosen = None if mask is None else np.moveaxis(mask, PLANE_AXIS[plane], 0)[:, *inner]
    if chosen is not None:  # nothing beyond the windows around the mask's box is needed
        if not chosen.any():
            return None
        rows, columns = (np.flatnonzero(chosen.any(axis=(0, other))) for other in (2, 1))
        chosen = chosen[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        box = tuple(slice(each[0], each[-1] + 1 + 2 * _RADIUS) for each in (rows, columns))
        x, y = x[:, *box], y[:, *box]
    n, total = 0, 0.0
    for start in range(0, len(x), _SLICES):
        part = slice(start, start + _SLICES)
        similarity = _similarity(x[part], y[part])[:, *inner]
        counted = similarity if chosen is None else similarity[chosen[part]]
        n += counted.size
        total += float(counted.sum())
    return total / n


def _similarity(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """SSIM at each pixel of a stack of slices, (n, A, B) float64."""
    x, y = np.ascontiguousarray(x, np.float64), np.ascontiguousarray(y, np.float64)

    def mean(a: np.ndarray) -> np.ndarray:
        return np.asarray(ndimage.gaussian_filter(a, (0, _SIGMA, _SIGMA), truncate=_TRUNCATE))

    mean_x, mean_y = mean(x), mean(y)
    luminance, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    variances = mean(x * x + y * y) - squares  # only their sum is asked for: one filter less
    covariance = mean(x * y) - luminance
    c1, c2 = (_K1 * PEAK) ** 2, (_K2 * PEAK) ** 2
    return np.asarray((2 * luminance + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2)))


def _check(pred: np.ndarray, ref: np.ndarray, mask: np.ndarray | None) -> None:
    """Refuse what no metric can be computed on."""
    if pred.shape != ref.shape or pred.ndim != 3 or 0 in ref.shape:
        raise InputError(f"shapes differ or are no volume: {pred.shape}, reference {ref.shape}")
    for name, volume in (("result", pred), ("reference", ref)):
        if volume.dtype.kind == "f" and (bad := sum(int((~np.isfinite(each)).sum()) for each in volume)):
            raise InputError(f"{bad} voxels of the {name} are not finite")
    if mask is None:
        return
    if mask.shape != ref.shape or mask.dtype != bool:
        raise ValueError(f"a mask is bool {ref.shape}, this one {mask.dtype} {mask.shape}")
    if not mask.any():
        raise InputError("mask is empty")
