"""Which axis the slices lie along, and the one view that every computation uses.

A volume is computed on as (D, H, W): the slice axis first, then the axis nearest anterior–posterior, then the
one nearest left–right (of what the slice axis leaves), each running towards a fixed end of the patient. So
two files that hold the same patient in another storage order give the same result, voxel for voxel.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from ctsr.core.volume import Volume
from ctsr.errors import UsageError

__all__ = ["Turn", "canonical_turn", "corners", "slice_axis"]

_THICK_RATIO = 1.25  # an axis this much coarser than both others is the slice axis without asking


def slice_axis(volume: Volume, *, axis: int | None = None) -> tuple[int, str]:
    """The array axis along which slices are stacked, and a note where it had to be guessed.

    axis: the user's choice (0, 1 or 2), which wins; else the axis whose spacing is ≥ 1.25 × both others, else
    what the file says, else the axis nearest head–foot.
    """
    if axis is not None:
        if axis not in (0, 1, 2):
            raise UsageError(f"--axis: {axis} is not 0, 1 or 2")
        return axis, ""
    spacing = volume.spacing
    coarsest = int(np.argmax(spacing))
    if spacing[coarsest] >= _THICK_RATIO * np.delete(spacing, coarsest).max():
        return coarsest, ""
    if volume.slice_axis is not None:
        return volume.slice_axis, ""
    nearest = int(np.argmax(np.abs(volume.affine[2, :3] / spacing)))
    found = f"voxels of {' × '.join(f'{s:.3g}' for s in spacing)} mm do not show the slice axis"
    return nearest, f"{found}: taking axis {nearest}, nearest head–foot (--axis)"


@dataclass(frozen=True, slots=True)
class Turn:
    """A permutation of array axes followed by flips; costs no copy."""

    order: tuple[int, int, int]
    flips: tuple[bool, bool, bool]  # of the turned axes

    def apply(self, data: np.ndarray) -> np.ndarray:
        """File order (I, J, K) → computing order (D, H, W), a view."""
        return self._flipped(data.transpose(self.order))

    def undo(self, data: np.ndarray) -> np.ndarray:
        """Computing order (D, H, W) → file order (I, J, K), a view."""
        return self._flipped(data).transpose(np.argsort(self.order))

    def _flipped(self, data: np.ndarray) -> np.ndarray:
        return data[tuple(slice(None, None, -1 if f else None) for f in self.flips)]


def canonical_turn(affine: np.ndarray, axis: int) -> Turn:
    """The turn that brings slice axis `axis` first and orders the rest by the patient.

    affine: (4, 4), index → RAS+ mm. Depends on where the axes point, never on the order they are stored in.
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    ends = np.abs(directions)
    along = int(np.argmax(ends[:, axis]))  # 0 left–right, 1 posterior–anterior, 2 foot–head
    first, second = (w for w in (2, 1, 0) if w != along)
    a, b = (i for i in range(3) if i != axis)
    straight, crossed = ends[first, a] + ends[second, b], ends[first, b] + ends[second, a]
    is_tie = straight == crossed  # turned by 45° in plane: then the directions decide, not the storage order
    if straight < crossed or (is_tie and _line(directions[:, a]) < _line(directions[:, b])):
        a, b = b, a
    worlds = ((axis, along), (a, first), (b, second))
    return Turn(order=(axis, a, b), flips=tuple(bool(directions[w, i] < 0) for i, w in worlds))  # type: ignore[arg-type]


def _line(direction: np.ndarray) -> tuple[float, ...]:
    """A direction without its sign: the same for an axis and for its flip."""
    return tuple(direction * np.sign(direction[np.flatnonzero(direction)[0]]))


def corners(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Positions of the eight corner voxels' centres, mm, (8, 3)."""
    index = np.array([[*at, 1] for at in product(*((0, n - 1) for n in shape))])
    return np.asarray((affine @ index.T).T[:, :3])
