"""Windows in plane: where one network pass over whole slices would need too much memory, or a patch size is asked for.

A window that overlaps its neighbours by the network's reach is cropped and exact; with less overlap the windows are
blended with Gaussian weights. Borders lie on multiples of the network's stride, so two tilings agree.

Only the box around the patient is cut into windows: in the air beyond it there is nothing to sharpen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

__all__ = ["Tiling", "Window", "occupied_box"]

TISSUE = -500.0  # HU
OCCUPIED = 0.002  # a row with this share of tissue is part of the patient; less is noise in the air
MARGIN = 16  # pixels of air around the patient that still belong to the box


@dataclass(frozen=True, slots=True)
class Window:
    """read: what the network sees; keep: the part of the image this window answers for (crop mode)."""

    read: tuple[slice, slice]
    keep: tuple[slice, slice]

    @property
    def keep_in_read(self) -> tuple[slice, slice]:
        """`keep`, counted from the corner of `read`."""
        (a, b), (c, d) = self.read, self.keep
        return slice(c.start - a.start, c.stop - a.start), slice(d.start - b.start, d.stop - b.start)


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
        windows = list(self)
        return (
            max(w.read[0].stop - w.read[0].start for w in windows),
            max(w.read[1].stop - w.read[1].start for w in windows),
        )

    @property
    def pixels(self) -> int:
        """Pixels that are read in all, the overlaps as often as they are."""
        return sum((a.stop - a.start) * (b.stop - b.start) for a, b in (w.read for w in self))

    def __iter__(self) -> Iterator[Window]:
        for rows_read, rows in self._cuts(self.sides[0], 0):
            for columns_read, columns in self._cuts(self.sides[1], 1):
                yield Window((rows_read, columns_read), (rows, columns))

    def weights(self, window: Window) -> np.ndarray:
        """(h, w) float32 of a window's read part: Gaussian with σ a quarter of the window, never zero."""
        sides = []
        for part in window.read:
            n = part.stop - part.start
            at = (np.arange(n) - (n - 1) / 2) / (n / 4)
            sides.append(np.exp(-0.5 * at**2) + 1e-3)
        weights: np.ndarray = np.outer(*sides).astype(np.float32)
        return weights

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
