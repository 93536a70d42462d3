"""Tiles and windows: what is read of a volume or an image at once, and which part of it is kept.

A tile that reads as far beyond what it keeps as its network reaches is exact; with less overlap tiles are blended
with Gaussian weights. Borders lie on multiples of the network's stride, so two tilings agree. Only the box around the
patient is cut into windows: in the air beyond it there is nothing to sharpen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

__all__ = ["Box", "Tiling", "bell", "occupied_box", "tiles", "within"]

TISSUE = -500.0  # HU
OCCUPIED = 0.002  # a row with this share of tissue is part of the patient; less is noise in the air
MARGIN = 16  # pixels of air around the patient that still belong to the box
Box = tuple[slice, ...]


def tiles(size: Sequence[int], tile: Sequence[int], reach: Sequence[int]) -> Iterator[tuple[Box, Box]]:
    """(read, keep): the keeps cover `size` once, in tiles of at most `tile`, about equal; read is `reach` larger."""
    sides = []
    for n, most, halo in zip(size, tile, reach, strict=True):
        parts = 1 if halo >= n else -(-n // most)  # with such a halo every tile would read all
        cuts = pairwise(n * i // parts for i in range(parts + 1))
        sides.append([(slice(max(0, a - halo), min(n, b + halo)), slice(a, b)) for a, b in cuts])
    return _crossed(sides)


def within(keep: Box, read: Box) -> Box:
    """`keep`, counted from the corner of `read`."""
    return tuple(slice(k.start - r.start, k.stop - r.start) for k, r in zip(keep, read, strict=True))


def bell(size: Sequence[int]) -> np.ndarray:
    """float32 weights of a tile, never zero: Gaussian, σ a quarter of it."""
    sides = [np.exp(-8 * ((np.arange(n) - (n - 1) / 2) / n) ** 2) + 1e-3 for n in size]
    return functools.reduce(np.multiply.outer, sides).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How an image of (height, width) is cut. patch: pixels of a window without its overlap, None for the whole box."""

    height: int
    width: int
    patch: tuple[int, int] | None
    overlap: int  # pixels that a window reads beyond what it keeps
    reach: int  # pixels that the network's result depends on
    stride: int
    box: tuple[slice, slice] | None = None  # rows and columns that windows cover; None: all

    @property
    def sides(self) -> tuple[slice, slice]:
        """The rows and columns that windows cover."""
        return self.box or (slice(0, self.height), slice(0, self.width))

    @property
    def is_exact(self) -> bool:
        """Whether a window's kept part equals the whole box's."""
        return self.patch is None or self.overlap >= self.reach

    @property
    def largest(self) -> tuple[int, int]:
        """Pixels of the largest window that is read."""
        rows, columns = zip(*(read for read, _ in self), strict=True)
        return max(s.stop - s.start for s in rows), max(s.stop - s.start for s in columns)

    @property
    def pixels(self) -> int:
        """Pixels that are read in all, the overlaps as often as they are."""
        return sum((a.stop - a.start) * (b.stop - b.start) for (a, b), _ in self)

    def __iter__(self) -> Iterator[tuple[Box, Box]]:
        """(read, keep) of each window."""
        return _crossed([list(self._cuts(side, axis)) for axis, side in enumerate(self.sides)])

    def _cuts(self, side: slice, axis: int) -> Iterator[tuple[slice, slice]]:
        patch = self.patch[axis] if self.patch else side.stop - side.start
        patch = max(self.stride, -(-patch // self.stride) * self.stride)
        overlap = -(-self.overlap // self.stride) * self.stride
        for start in range(side.start, side.stop, patch):
            stop = min(side.stop, start + patch)
            if side.stop - stop < patch // 2:  # no sliver at the end
                stop = side.stop
            yield slice(max(side.start, start - overlap), min(side.stop, stop + overlap)), slice(start, stop)
            if stop == side.stop:
                return


def _crossed(sides: Sequence[Sequence[tuple[slice, slice]]]) -> Iterator[tuple[Box, Box]]:
    """Every combination of one (read, keep) of each side."""
    for cuts in product(*sides):
        yield tuple(read for read, _ in cuts), tuple(keep for _, keep in cuts)


def occupied_box(y: np.ndarray, stride: int) -> tuple[slice, slice]:
    """Rows and columns of (n, H, W) HU between which the patient lies, in multiples of `stride`.

    All of them where there is nothing but air.
    """
    tissue = np.zeros(y.shape[1:])
    for image in y:  # slice by slice: a mask of the whole would take a quarter of its memory
        tissue += image > TISSUE
    sides = []
    for axis, size in ((1, y.shape[1]), (0, y.shape[2])):
        share = tissue.mean(axis=axis) / len(y)
        found = np.flatnonzero(share > OCCUPIED)
        first, last = (found[0], found[-1]) if found.size else (0, size - 1)
        start = max(0, int(first) - MARGIN) // stride * stride
        sides.append(slice(start, min(size, -(-(int(last) + 1 + MARGIN) // stride) * stride)))
    return sides[0], sides[1]
