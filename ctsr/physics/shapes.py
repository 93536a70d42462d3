"""Ellipsoids and tubes in millimetres, painted one over the other on the planes of a volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Ellipsoid", "Point", "Shape", "Tube", "paint"]

PLANES = 4  # a slab is the mean of: it shows its mean, and not what lies at its centre
CHUNK = 12  # slabs painted at a time: so many planes are held

Point = np.ndarray  # (3,) mm: z, y, x


@dataclass(frozen=True, slots=True, eq=False)
class Ellipsoid:
    """centre (3,), radii (3,): mm, infinite along z for a cylinder; opacity: share that it covers what lies below."""

    centre: Point
    radii: np.ndarray
    hu: float
    opacity: float = 1.0

    @property
    def box(self) -> tuple[Point, Point]:
        """Its corners, mm."""
        return self.centre - self.radii, self.centre + self.radii

    def distance(self, *axes: np.ndarray) -> np.ndarray:
        """mm from the surface at (z, y, x), negative inside; first order."""
        a, b, c = ((axis - o) / r for axis, o, r in zip(axes, self.centre, self.radii, strict=True))
        q = np.sqrt(a**2 + b**2 + c**2)
        slope2 = sum((part / r) ** 2 for part, r in zip((a, b, c), self.radii, strict=True))
        return np.asarray((q - 1) * q / np.sqrt(slope2 + 1e-12))


@dataclass(frozen=True, slots=True, eq=False)
class Tube:
    """A segment with round ends; radius in mm."""

    start: Point
    end: Point
    radius: float
    hu: float
    opacity: float = 1.0

    @property
    def box(self) -> tuple[Point, Point]:
        """Its corners, mm."""
        return np.minimum(self.start, self.end) - self.radius, np.maximum(self.start, self.end) + self.radius

    def distance(self, *axes: np.ndarray) -> np.ndarray:
        """mm from the surface at (z, y, x), negative inside."""
        u, v, w = self.end - self.start
        a, b, c = (axis - o for axis, o in zip(axes, self.start, strict=True))
        t = np.clip((a * u + b * v + c * w) / max(float(u * u + v * v + w * w), 1e-9), 0.0, 1.0)
        return np.asarray(np.sqrt((a - t * u) ** 2 + (b - t * v) ** 2 + (c - t * w) ** 2) - self.radius)


Shape = Ellipsoid | Tube


def paint(
    shapes: Sequence[Shape], axes: Sequence[np.ndarray], *, slab: float, edge: float, background: float
) -> np.ndarray:
    """(D, H, W) float32, HU: shapes one over the other, each slab the mean of several planes.

    axes: z, y, x of the voxels' centres, mm; slab: height of a voxel, mm; edge: width of an edge in plane, mm.
    """
    fine = ((np.arange(PLANES) + 0.5) / PLANES - 0.5) * slab
    boxes = np.array([shape.box for shape in shapes]).reshape(-1, 2, 3) + np.array([[-edge], [edge]])
    hu = np.empty([len(axis) for axis in axes], np.float32)
    for start in range(0, len(hu), CHUNK):
        planes = (axes[0][start : start + CHUNK, None] + fine).ravel()
        painted = _painted(shapes, boxes, (planes, *axes[1:]), edge, background)
        hu[start : start + CHUNK] = painted.reshape(-1, PLANES, *hu.shape[1:]).mean(axis=1)
    return hu


def _painted(
    shapes: Sequence[Shape], boxes: np.ndarray, axes: Sequence[np.ndarray], edge: float, background: float
) -> np.ndarray:
    """The planes themselves. boxes: (shapes, low or high, 3), mm."""
    axes = [a.astype(np.float32) for a in axes]
    first = np.stack([np.searchsorted(a, boxes[:, 0, i]) for i, a in enumerate(axes)], axis=1)
    last = np.stack([np.searchsorted(a, boxes[:, 1, i], side="right") for i, a in enumerate(axes)], axis=1)
    canvas = np.full([len(a) for a in axes], background, np.float32)
    for i in np.flatnonzero((first < last).all(axis=1)).tolist():
        box = tuple(map(slice, first[i], last[i]))
        there = np.ix_(*(a[s] for a, s in zip(axes, box, strict=True)))
        cover = np.clip(0.5 - shapes[i].distance(*there) / edge, 0.0, 1.0) * shapes[i].opacity
        area = canvas[box]
        area += cover * (shapes[i].hu - area)
    return canvas
