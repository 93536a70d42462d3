"""What a scanner would have stored of a thin volume: thick slices that overlap, touch or leave gaps.

The mirror of upsampling: the thick stack starts at the first thin slab's edge, and the thin grid that belongs
to it is the one it was made from. The kernel is the one that upsampling assumes, whatever the thickness of
the thin slices really was.
"""

from __future__ import annotations

import math

import numpy as np

from ctsr.core.geometry import canonical_turn, slice_axis
from ctsr.core.volume import AIR, PADDING_LIMIT, Volume, rounded, storage_type
from ctsr.core.zgrid import ZGrid, shifted_affine, thick_count
from ctsr.errors import GeometryError, InputError, UsageError
from ctsr.physics.operator import apply_along_z, grid_operator
from ctsr.physics.profile import SliceProfile
from ctsr.physics.zmatrix import nearest_matrix

__all__ = ["simulate_volume", "thicken"]

_LARGEST_FACTOR = 20.0
_RATIOS = (0.2, 4.0)  # slice thickness / spacing; nothing outside is scanned


def thicken(
    hu: np.ndarray,
    *,
    factor: float,
    spacing: float,
    thickness: float,
    profile: SliceProfile,
    thin_thickness: float | None = None,
    noise_sd: float = 0.0,
    seed: int = 0,
) -> tuple[np.ndarray, int]:
    """The thick stack (n, H, W) float32 of hu (D, H, W), and how many thin slices it covers.

    factor: thick spacing / thin spacing, any real number > 1. spacing, thickness: of the thick slices, mm.
    thin_thickness: of the thin ones, None for thickness / factor. noise_sd: HU, of the thick slices only.
    The thin slices beyond those counted, at the far end, take no part: they fill no whole thick slice.
    Raises GeometryError where there are too few slices for a thick one.
    """
    n = thick_count(len(hu), factor)
    if n == 0:
        raise GeometryError(f"{len(hu)} thin slices are too few for a thick one of {factor:.4g}")
    grid = ZGrid(n, factor)
    A = grid_operator(grid, profile, spacing=spacing, thickness=thickness, thin_thickness=thin_thickness)
    thick = apply_along_z(A, hu[: grid.m])
    if noise_sd > 0:
        rng = np.random.default_rng(seed)
        for each in thick:
            each += noise_sd * rng.standard_normal(each.shape, dtype=np.float32)
    return thick, grid.m


def simulate_volume(
    volume: Volume,
    *,
    factor: float | None = None,
    spacing: float | None = None,
    thickness: float | None = None,
    profile: SliceProfile | None = None,
    axis: int | None = None,
    noise_sd: float = 0.0,
    seed: int = 0,
) -> tuple[Volume, list[str]]:
    """The volume with thick slices, and notes on what was dropped or guessed.

    factor or spacing (mm) of the thick slices, one of them. thickness: FWHM, mm; None for the spacing.
    Scanner padding counts as air and is padding again where the nearest thin slice has it. Memory: the thick
    stack as float32 and as stored; where there is padding, a float32 copy of the input too.
    Raises UsageError for what can't be asked, GeometryError where the volume does not allow it.
    """
    axis, note = slice_axis(volume, axis=axis)
    notes = [note] if note else []
    if not (math.isfinite(noise_sd) and noise_sd >= 0):
        raise UsageError(f"--noise: {noise_sd} is no standard deviation in HU")
    factor, spacing, thickness = _asked(float(volume.spacing[axis]), factor, spacing, thickness)
    turn = canonical_turn(volume.affine, axis)
    thin = turn.apply(volume.data)
    padding = thin <= PADDING_LIMIT
    is_padded = bool(padding.any())
    thick, used = thicken(
        np.where(padding, np.float32(AIR), thin) if is_padded else thin,
        factor=factor,
        spacing=spacing,
        thickness=thickness,
        profile=profile or SliceProfile(),
        noise_sd=noise_sd,
        seed=seed,
    )
    grid = ZGrid(len(thick), factor)
    if is_padded:  # a thick voxel is padding where the thin slice nearest to its centre is
        positions = (np.arange(grid.n) - grid.first) * factor
        for k, j in enumerate(nearest_matrix(positions, grid.m).argmax(axis=1)):
            thick[k][padding[j]] = thin[j][padding[j]]
    if dropped := len(thin) - used:
        notes.append(f"{dropped} of {len(thin)} thin slices dropped: they fill no whole thick slice")
    start = dropped if turn.flips[0] else 0  # in the file's order
    cropped = shifted_affine(volume.affine, axis, first=start, step=1.0)
    low, high = float(thick.min()), float(thick.max())
    if not math.isfinite(low + high):
        raise InputError("holds voxels that are not finite")
    made = Volume(
        rounded(turn.undo(thick), storage_type(volume.result_dtype, low, high)),
        shifted_affine(cropped, axis, first=-grid.first * factor, step=factor),
        slice_thickness=thickness,
        slice_axis=axis,
        form_code=volume.form_code,
    )
    return made, notes


def _asked(
    thin_spacing: float, factor: float | None, spacing: float | None, thickness: float | None
) -> tuple[float, float, float]:
    """Factor, spacing and thickness of the thick slices, checked."""
    if factor is not None and spacing is None:
        spacing = factor * thin_spacing
    elif spacing is not None and factor is None:
        factor = spacing / thin_spacing
    else:
        raise UsageError("--factor and --spacing exclude each other, one of them is needed")
    if not 1 < factor <= _LARGEST_FACTOR:
        asked = f"slices from {thin_spacing:.4g} to {spacing:.4g} mm are a factor of {factor:.4g}"
        raise UsageError(f"{asked}, expected more than 1 and up to {_LARGEST_FACTOR:g}")
    thickness = spacing if thickness is None else thickness
    if not _RATIOS[0] <= (ratio := thickness / spacing) <= _RATIOS[1]:
        asked = f"slices {thickness:.4g} mm thick and {spacing:.4g} mm apart"
        raise GeometryError(f"{asked}: the ratio {ratio:.3g} is not in {_RATIOS[0]:g}…{_RATIOS[1]:g}")
    return factor, spacing, thickness
