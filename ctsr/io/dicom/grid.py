"""Whether slices form one regular grid, and where that grid lies: from positions and directions alone.

Nominal tags (SliceThickness, SpacingBetweenSlices, SliceLocation, GantryDetectorTilt, InstanceNumber) are stale,
signed by the vendor's taste or absent on real data, so none of them decides anything here. Positions are LPS, mm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ctsr.errors import GeometryError
from ctsr.io.dicom.records import Slice

__all__ = ["SAME_POSITION", "Grid", "change_of_spacing", "fit_grid"]

CORNER_LIMIT = 0.05  # mm; of 1,018 LIDC scans 1,014 deviate by ≤ 0.0001 mm, the other four by ≥ 0.5 mm
ROUNDED_LIMIT = 0.1  # mm; the corner limit where an archive has rounded the positions
ROUNDED_STEP = 0.1  # mm; what such archives round to
SAME_POSITION = 0.01  # mm
SPACING_RANGE = (0.1, 20.0)  # mm
SHEAR_LIMIT = 1e-3  # of row · column and of the directions' lengths; below it they are made orthonormal
TILT_LIMIT_DEG = 45.0
MIN_SLICES = 3


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """A regular stack: voxel (i, j) of slice k lies at origin + i·Δc·row + j·Δr·column + k·spacing·(normal + drift).

    origin: (3,). row, column, normal: (3,), orthonormal and right-handed. pixel_spacing: between rows (Δr), between
        columns (Δc). spacing: of slices along the normal. drift: (3,) in-plane movement per mm along the normal,
        zero without gantry tilt. shape: columns, rows, slices. warnings: what a user should know.
    """

    origin: np.ndarray
    row: np.ndarray
    column: np.ndarray
    normal: np.ndarray
    pixel_spacing: tuple[float, float]
    spacing: float
    drift: np.ndarray
    shape: tuple[int, int, int]
    warnings: tuple[str, ...]

    @property
    def tilt_deg(self) -> float:
        """Angle between the normal and the line through the slices' centres, without a sign."""
        return math.degrees(math.atan(float(np.linalg.norm(self.drift))))

    @property
    def shifts(self) -> np.ndarray:
        """(K, 2) columns and rows by which each slice lies off an upright stack on slice 0."""
        per_slice = self.spacing * np.array([self.drift @ self.row, self.drift @ self.column])
        shifts: np.ndarray = np.arange(self.shape[2])[:, None] * (per_slice / self.pixel_spacing[::-1])
        return shifts

    @property
    def upright(self) -> tuple[np.ndarray, tuple[int, int, int]]:
        """First column and row of the upright frame that holds every shifted slice, and its (I, J, K)."""
        low, high = np.floor(self.shifts.min(axis=0) + 1e-6), np.ceil(self.shifts.max(axis=0) - 1e-6)
        i, j = (high - low).astype(int).tolist()
        return low, (self.shape[0] + i, self.shape[1] + j, self.shape[2])

    def affine(self, *, keep_tilt: bool = False) -> np.ndarray:
        """(4, 4) voxel (i, j, k) → RAS+ mm: of the upright frame, or, with `keep_tilt`, sheared and of the slices."""
        between_rows, between_columns = self.pixel_spacing
        along = self.normal + self.drift if keep_tilt else self.normal
        lps = np.eye(4)
        lps[:3, :3] = np.c_[self.row * between_columns, self.column * between_rows, along * self.spacing]
        lps[:3, 3] = self.origin + (0 if keep_tilt else lps[:3, :2] @ self.upright[0])
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def fit_grid(slices: Sequence[Slice]) -> Grid:
    """The grid on which `slices`, in rising order along their normal, lie.

    Raises GeometryError where they form none: fewer than 3, an image twice at one position, directions that are not
    orthonormal, uneven spacing, an in-plane jump, a tilt above 45°, a corner off the grid.
    """
    n = len(slices)
    if n < MIN_SLICES:
        reason = f"{n} slice{'s' * (n != 1)}; at least {MIN_SLICES} are needed to check the spacing"
        raise GeometryError(reason)
    row, column, normal = _directions(slices)
    positions = np.array([s.position for s in slices], dtype=np.float64)
    along = positions @ normal
    repeats = np.abs(np.diff(along)) < SAME_POSITION
    if repeats.any():
        n_positions = 1 + int((~repeats).sum())
        several = int((repeats & ~np.r_[False, repeats[:-1]]).sum())  # runs of equal positions
        reason = f"{several} of {n_positions} position{'s' * (n_positions != 1)} hold{'s' * (several == 1)}"
        raise GeometryError(f"{reason} more than one image")

    rounding = _rounding(positions, normal)
    start, spacing = _regular(along, rounding)
    if spacing is None:
        raise GeometryError(_irregular(slices, positions, normal, rounding > 0))
    low, high = SPACING_RANGE
    if not low <= spacing <= high:
        raise GeometryError(f"slice spacing is {spacing:.3g} mm, outside {low:g} to {high:g} mm")
    index, limit, warnings = np.arange(n), CORNER_LIMIT, []
    if float(np.abs(along - start - spacing * index).max()) > 1e-3 and rounding:
        limit = ROUNDED_LIMIT
        warnings.append(f"positions rounded to {ROUNDED_STEP:g} mm")

    in_plane = positions - along[:, None] * normal
    step = (index - index.mean()) @ in_plane / ((index - index.mean()) ** 2).sum()  # least squares, (3,)
    # apart: a tilt must not drag noise of the other way along
    parts = [(step @ d) * d for d in (row, column)]
    step = sum((p for p in parts if float(np.linalg.norm(p)) * (n - 1) > limit), np.zeros(3))
    first = (in_plane - index[:, None] * step).mean(axis=0)
    off = np.linalg.norm(in_plane - first - index[:, None] * step, axis=1)
    if off.max() > limit:
        steps = np.diff(in_plane, axis=0)
        jumps = np.linalg.norm(steps - np.median(steps, axis=0), axis=1)
        k = int(jumps.argmax())
        raise GeometryError(f"in-plane position jumps by {jumps[k]:.2f} mm at index {k + 1}")

    if (sideways := abs(row @ step) * (n - 1)) > limit:
        warnings.append(f"slices drift sideways, by {sideways:.2f} mm over the stack")
    thickness = slices[0].thickness
    if thickness and spacing > 1.01 * thickness:
        warnings.append(f"slices of {thickness:g} mm every {spacing:.4g} mm leave gaps")
    between_rows, between_columns = np.mean([s.pixel_spacing for s in slices], axis=0).tolist()
    grid = Grid(
        origin=first + start * normal,
        row=row,
        column=column,
        normal=normal,
        pixel_spacing=(between_rows, between_columns),
        spacing=spacing,
        drift=step / spacing,
        shape=(slices[0].shape[1], slices[0].shape[0], n),
        warnings=tuple(warnings),
    )
    if grid.tilt_deg > TILT_LIMIT_DEG:
        raise GeometryError(f"the stack is tilted by {grid.tilt_deg:.1f}°, more than {TILT_LIMIT_DEG:g}°")
    _check_corners(grid, slices, limit)
    return grid


def change_of_spacing(slices: Sequence[Slice]) -> int | None:
    """Index at which a second regular stack of another spacing begins; None where there are not two such stacks."""
    _, _, normal = _directions(slices)
    along = np.array([s.position for s in slices]) @ normal
    gaps = np.diff(along)
    differs = np.flatnonzero(np.abs(gaps - gaps[:1]) > CORNER_LIMIT).tolist()
    for begin in (n for k in differs[:1] for n in (k + 1, k)):  # the slice at the change fits both
        if not MIN_SLICES <= begin <= len(slices) - MIN_SLICES or _regular(along[begin:], 0.0)[1] is None:
            continue
        try:
            first, second = fit_grid(slices[:begin]), fit_grid(slices[begin:])
        except GeometryError:
            continue
        if abs(first.spacing - second.spacing) > CORNER_LIMIT:
            return begin
    return None


def _directions(slices: Sequence[Slice]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean row, column and normal, (3,) each, made orthonormal; the corner check judges what that moved."""
    row = np.mean([s.row for s in slices], axis=0)
    column = np.mean([s.column for s in slices], axis=0)
    worst = max(abs(np.linalg.norm(row) - 1), abs(np.linalg.norm(column) - 1), abs(row @ column))
    if not worst <= SHEAR_LIMIT:
        off = f"off by {worst:.2g}, limit {SHEAR_LIMIT:g}"
        raise GeometryError(f"row and column directions are not orthonormal: {off}")
    row = row / np.linalg.norm(row)
    column = column - (column @ row) * row
    column = column / np.linalg.norm(column)
    return row, column, np.cross(row, column)


def _rounding(positions: np.ndarray, normal: np.ndarray) -> float:
    """How far rounding may have moved a slice along the normal, mm: 0 where positions are not rounded to 0.1 mm."""
    moves = np.ptp(positions, axis=0) > 1e-6
    steps = positions[:, moves] / ROUNDED_STEP
    if not np.allclose(steps, np.round(steps), rtol=0, atol=1e-3):  # float32 coordinates carry 1e-4 of a step
        return 0.0
    return float(np.abs(normal[moves]).sum()) * ROUNDED_STEP / 2


def _regular(along: np.ndarray, rounding: float) -> tuple[float, float | None]:
    """Position of slice 0 and spacing, mm, of the line through `along`; None where no line is near enough.

    Least squares for exact positions. Rounded ones (0.6, 0.7, 0.6 for 0.625) are accepted where one true grid
    rounds to all of them, which the line of least greatest deviation decides.
    """
    index = np.arange(len(along))
    spacing, start = np.polyfit(index, along, 1)
    if np.abs(along - start - spacing * index).max() <= CORNER_LIMIT:
        return float(start), float(spacing)
    if not rounding:
        return 0.0, None

    def width(s: float) -> float:
        return float(np.ptp(along - s * index))  # convex in s: a ternary search finds its least

    low, high = spacing - ROUNDED_STEP, spacing + ROUNDED_STEP
    while high - low > 1e-9:
        third = (high - low) / 3
        if width(low + third) < width(high - third):
            high -= third
        else:
            low += third
    spacing = (low + high) / 2
    if width(spacing) / 2 > rounding + 1e-4:
        return 0.0, None
    rest = along - spacing * index
    return float(rest.max() + rest.min()) / 2, float(spacing)


def _irregular(slices: Sequence[Slice], positions: np.ndarray, normal: np.ndarray, is_rounded: bool) -> str:
    """What is wrong with slices that are not evenly spaced."""
    begin = change_of_spacing(slices)
    if begin is not None:
        first, second = (fit_grid(part).spacing for part in (slices[:begin], slices[begin:]))
        change = f"slice spacing changes from {first:.2f} to {second:.2f} mm at index {begin}"
        return f"{change}; ctsr convert --split writes both parts"
    gaps = np.diff(positions @ normal)
    step = float(np.median(gaps))
    multiples = np.round(gaps / step)
    tolerance = ROUNDED_LIMIT if is_rounded else CORNER_LIMIT
    if not (np.abs(gaps - multiples * step) <= tolerance).all() or not (multiples >= 1).all():
        return f"uneven slice spacing ({gaps.min():.2f} to {gaps.max():.2f} mm)"
    axis = int(np.abs(normal).argmax())
    holes, name, n_missing = np.flatnonzero(multiples >= 2), "xyz"[axis], int((multiples - 1).sum())
    k = int(holes[0])
    where = " and ".join(f"{name}={position[axis]:.2f}" for position in positions[k : k + 2])
    gap = f"in {len(holes)} gaps of a step of {step:.4g} mm, the first " if len(holes) > 1 else ""
    return f"{n_missing} slice{'s' * (n_missing != 1)} missing {gap}between {where} (index {k + 1})"


def _check_corners(grid: Grid, slices: Sequence[Slice], limit: float) -> None:
    """Refuse a slice that has a corner, by its own directions and spacing, more than `limit` off the grid."""
    right, down = (grid.shape[0] - 1), (grid.shape[1] - 1)
    at = np.array([[0, 0], [right, 0], [0, down], [right, down]])  # (4, 2) columns, rows
    sides = np.stack([grid.row * grid.pixel_spacing[1], grid.column * grid.pixel_spacing[0]])
    for k, s in enumerate(slices):
        expected = grid.origin + k * grid.spacing * (grid.normal + grid.drift) + at @ sides
        found = s.position + at @ np.stack([s.row * s.pixel_spacing[1], s.column * s.pixel_spacing[0]])
        off = float(np.linalg.norm(found - expected, axis=1).max())
        if not off <= limit:
            raise GeometryError(f"a corner of {s.file.name} is {off:.2f} mm off the grid, limit {limit:g} mm")
