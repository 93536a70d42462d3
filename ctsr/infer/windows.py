"""Windows in plane: where one network pass over whole slices would need too much memory, or a patch size is asked for.

A window that overlaps its neighbours by the network's reach is cropped and exact; with less overlap the windows are
blended with Gaussian weights. Borders lie on multiples of the network's stride, so two tilings agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

__all__ = ["Tiling", "Window"]


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
    """How an image of (height, width) is cut. patch: pixels of a window without its overlap, None for whole slices."""

    height: int
    width: int
    patch: tuple[int, int] | None
    overlap: int  # pixels that a window reads beyond what it keeps
    reach: int  # pixels that the network's result depends on
    stride: int

    @property
    def is_exact(self) -> bool:
        """Whether a window's kept part equals the whole image's."""
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
        patch = self.patch or (self.height, self.width)
        for rows_read, rows in self._cuts(self.height, patch[0]):
            for columns_read, columns in self._cuts(self.width, patch[1]):
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

    def _cuts(self, size: int, patch: int) -> Iterator[tuple[slice, slice]]:
        patch = max(self.stride, patch // self.stride * self.stride)
        overlap = -(-self.overlap // self.stride) * self.stride
        for start in range(0, size, patch):
            stop = min(size, start + patch)
            if size - stop < patch // 2:  # no sliver at the end
                stop = size
            yield slice(max(0, start - overlap), min(size, stop + overlap)), slice(start, stop)
            if stop == size:
                return
