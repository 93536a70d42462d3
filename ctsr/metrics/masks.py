"""Where to measure: the body, the lungs, and bands of tissue.

Every mask comes from the *smoothed* reference. A band cut from noisy values selects its own noise: a voxel
that noise lifted over the border is counted, one that it pushed below is not, and even a perfect estimator
then shows a bias. Arrays are (D, H, W) in HU, the slice axis first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ctsr.core.volume import AIR, PADDING_LIMIT
from ctsr.errors import InputError, UsageError

__all__ = ["BANDS", "Regions", "body_mask", "smoothed"]

BANDS: Mapping[str, tuple[float, float]] = {  # HU of the smoothed reference
    "lung": (-1000.0, -400.0),
    "fat": (-200.0, -10.0),
    "soft": (-10.0, 150.0),
    "bone": (200.0, np.inf),
}
_BODY_LIMIT = -500.0  # HU, half-way from air to water
_LUNG_LIMIT = -600.0  # HU
_SIGMA_IN_PLANE = 2.0  # voxels; with the one along z this takes white noise to 7.5 % of its SD
_SIGMA_ALONG_Z = 1.0  # voxels
_TRUNCATE = 3.0  # σ
_SLAB = 16  # slices worked on at a time


@dataclass(frozen=True, slots=True, eq=False)
class Regions:
    """The masks of one reference, made once so that every method is scored on the same voxels.

    All are (D, H, W) bool. body: the patient, or the area that replaces it. bands: by the names of BANDS, may be
    empty masks, as `lung` may be. scored: the voxels of PSNR, SSIM, MAE, bias and RMSE; None for all of them.
    """

    body: np.ndarray
    bands: Mapping[str, np.ndarray]
    lung: np.ndarray
    scored: np.ndarray | None

    @classmethod
    def of(cls, reference: np.ndarray, mask: str | np.ndarray = "body") -> Regions:
        """Masks from the reference, (D, H, W) HU, smoothed; bands and lung are eroded by one voxel.

        mask: what is scored: "body", "lung", "none" for every voxel, or an area of the caller's own. The last two
        replace the body, and so limit the bands and the lung (smoothed < −600 HU).
        Memory: one float32 volume while it runs, six bool volumes in the result.
        """
        smooth = smoothed(reference)
        if not isinstance(mask, str):
            body = mask
        elif mask in ("body", "lung", "none"):
            body = np.ones(smooth.shape, bool) if mask == "none" else _body(smooth)
        else:
            raise UsageError(f"mask: {mask!r} is not body, lung or none")
        bands = {
            name: _eroded((smooth > low) & (smooth <= high) & body) for name, (low, high) in BANDS.items()
        }
        # The body's holes are filled, so air inside it is enclosed by it: no piece reaches the outer air.
        lung = _eroded((smooth < _LUNG_LIMIT) & body)
        name = mask if isinstance(mask, str) else ""
        if name == "lung" and not lung.any():
            raise InputError("lung mask is empty")
        return cls(body, bands, lung, {"none": None, "lung": lung}.get(name, body))


def body_mask(hu: np.ndarray) -> np.ndarray:
    """The patient with the lungs, without the table: smoothed > −500 HU, largest piece, holes filled.

    Holes are filled slice by slice; air that reaches the image's border is outside, so a lung that the field
    of view cuts open is no part of the body in those slices.
    Raises InputError where nothing is above −500 HU.
    """
    return _body(smoothed(hu))


def smoothed(hu: np.ndarray) -> np.ndarray:
    """(D, H, W) float32, Gaussian σ = 2 voxels in plane and 1 along z; scanner padding counts as air.

    Works slab by slab: beside the result it holds 16 slices. Raises InputError where values are not finite.
    """
    if hu.ndim != 3 or 0 in hu.shape:
        raise InputError(f"a volume has 3 axes and voxels, this one is {hu.shape}")
    # Along z as a banded matrix product: SciPy's filter strides through memory there, six times as slow.
    along_z = ndimage.gaussian_filter1d(np.eye(len(hu)), _SIGMA_ALONG_Z, axis=0, truncate=_TRUNCATE)
    along_z = along_z.astype(np.float32)
    reach = int(_TRUNCATE * _SIGMA_ALONG_Z + 0.5)
    out = np.empty(hu.shape, np.float32)
    for start in range(0, len(hu), _SLAB):
        here, near = slice(start, start + _SLAB), slice(max(start - reach, 0), start + _SLAB + reach)
        slab = hu[near].astype(np.float32)
        finite = np.isfinite(slab).all(axis=(1, 2))
        if not finite.all():
            raise InputError(f"slice {near.start + int(np.argmin(finite))} has values that are not finite")
        slab[slab <= PADDING_LIMIT] = AIR
        slab = np.tensordot(along_z[here, near], slab, axes=1)
        in_plane = (0, _SIGMA_IN_PLANE, _SIGMA_IN_PLANE)
        ndimage.gaussian_filter(slab, in_plane, truncate=_TRUNCATE, output=out[here])
    return out


def _body(smooth: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(smooth > _BODY_LIMIT)
    if count == 0:
        hint = f"nothing above {_BODY_LIMIT:g} HU: are these CT numbers?"
        raise InputError("body mask is empty", hint=hint)
    sizes = np.zeros(count + 1, np.int64)
    for each in labels:  # by slice: bincount works on an int64 copy
        sizes += np.bincount(each.ravel(), minlength=count + 1)
    largest = 1 + int(np.argmax(sizes[1:]))
    return np.stack([ndimage.binary_fill_holes(each == largest) for each in labels])


def _eroded(mask: np.ndarray) -> np.ndarray:
    """Without the voxels that have a face neighbour outside the mask; a stack of two slices keeps both."""
    return np.asarray(ndimage.binary_erosion(mask, border_value=1))
