"""The one path from a thick array to a thin one: stage one, cascade, z-matrix, projection. Arrays only.

Computes any range of thin slices from the thick slices that it depends on, so that a volume can pass in slabs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ctsr.core.zgrid import ZGrid
from ctsr.infer.windows import Tiling
from ctsr.physics.operator import apply_along_z, grid_operator, thickening_matrix
from ctsr.physics.profile import ProfileKind, SliceProfile
from ctsr.physics.projection import doubling, projection_matrix, projector
from ctsr.physics.zmatrix import cubic_matrix, interpolation_matrix, inverse_matrix

if TYPE_CHECKING:  # torch: a matrix alone does without
    from ctsr.infer.diffusion import Changes, Diffuser
    from ctsr.infer.stage_one import Engine

__all__ = ["CLASSICAL", "Pipeline", "Recipe"]

CLASSICAL = ("nearest", "linear", "cubic", "inverse")
NEGLIGIBLE = 1e-6  # a z-matrix's weight below this moves no result by a hundredth of a HU
HALO_WEIGHT = 1e-4  # smaller weights lie beyond a slab's halo: 0.002 HU of difference, for noise over all HU


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is to be computed. Lengths in mm.

    method: `nearest`, `linear`, `cubic`, `inverse`, `baseline` with an engine, `diffusion` with a diffuser too.
    thin_thickness: FWHM of the result's slice profile, None for thickness / factor.
    is_consistent: whether a network's result ends in the projection onto the measured slices; each doubling has
        its own all the same, it was trained with it.
    """

    n: int
    factor: float
    spacing: float
    thickness: float
    profile: SliceProfile
    thin_thickness: float | None = None
    method: str = "baseline"
    is_consistent: bool = True

    @property
    def grid(self) -> ZGrid:
        return ZGrid(self.n, self.factor)

    @property
    def n_doublings(self) -> int:
        """⌈log₂F − 0.01⌉: 5.0002 → 2.5 mm is one."""
        return max(0, math.ceil(math.log2(self.factor) - 0.01)) if self.method not in CLASSICAL else 0

    @property
    def result_thickness(self) -> float:
        return self.thickness / self.factor if self.thin_thickness is None else self.thin_thickness

    @property
    def rho(self) -> float:
        """Relative width of the slice profile, as the network is told it: the same in every doubling."""
        if self.profile.kind is ProfileKind.FILE:
            return self.profile.kernel_fwhm(0, 0) / (self.spacing * math.sqrt(1 - self.factor**-2))
        return self.thickness / self.spacing

    @property
    def stage_profile(self) -> SliceProfile:
        """Within the cascade a measured kernel is stood for by the Gaussian of its width."""
        return SliceProfile() if self.profile.kind is ProfileKind.FILE else self.profile

    @property
    def stage_thickness(self) -> float:
        return self.rho * self.spacing

    @property
    def is_one_doubling(self) -> bool:
        """Whether the result of a doubling is the result."""
        is_measured = self.profile.kind is ProfileKind.FILE
        return self.factor == 2 and self.n_doublings == 1 and self.thin_thickness is None and not is_measured


class Pipeline:
    """A recipe's matrices, and the computation of any range of its thin slices."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        tiling: Tiling,
        engine: Engine | None = None,
        diffuser: Diffuser | None = None,
    ) -> None:
        needed = recipe.method not in CLASSICAL, recipe.method == "diffusion"
        if needed != (engine is not None, diffuser is not None):
            raise ValueError(f"these are not the networks of the method {recipe.method}")
        self.recipe, self.engine, self.diffuser, self.tiling = recipe, engine, diffuser, tiling
        grid = recipe.grid
        self.A = grid_operator(
            grid,
            recipe.profile,
            spacing=recipe.spacing,
            thickness=recipe.thickness,
            thin_thickness=recipe.thin_thickness,
        )
        self._P = projection_matrix(self.A)
        self.inverse = inverse_matrix(interpolation_matrix("cubic", grid), self.A, self._P)
        # (m, n · 2^doublings), what follows the last doubling; None where that is the result already
        self._last: np.ndarray | None = None
        if recipe.method == "inverse" or (engine is not None and recipe.n_doublings == 0):
            self._last = self.inverse
        elif engine is None:
            self._last = interpolation_matrix(recipe.method, grid)
        elif not recipe.is_one_doubling:
            resample = self._resample()
            self._last = projector(self.A, self._P) @ resample if recipe.is_consistent else resample
        self._hidden = None if diffuser is None or not recipe.is_consistent else projector(self.A, self._P)
        self._drawn: Changes | None = None
        self._whole: np.ndarray | None = None  # stage one between two passes, where one slab is all

    @property
    def m(self) -> int:
        """Thin slices in all."""
        return self.recipe.grid.m

    @property
    def plane(self) -> int:
        """Pixels of a slice."""
        return self.tiling.height * self.tiling.width

    @property
    def matrix_bytes(self) -> int:
        """Of the matrices that are kept: 50 MB for 1000 slices doubled."""
        kept = {id(a): a.nbytes for a in vars(self).values() if isinstance(a, np.ndarray) and a.ndim == 2}
        return sum(kept.values())

    @property
    def resamples(self) -> bool:
        """Whether a matrix stands between the last doubling and the result."""
        return self._last is not None and self.recipe.n_doublings > 0

    @cached_property
    def halo(self) -> int:
        """Thick slices on either side that the doublings of a slab depend on."""
        if self.engine is None or not self.recipe.n_doublings:
            return 0
        r = self.recipe
        _, inverse, null = doubling(64, r.stage_profile, spacing=r.spacing, thickness=r.stage_thickness)
        decay = max(_reach(inverse, 0.5), (_reach(null, 1.0) + 1) // 2)
        reach = self.engine.network.z_reach + decay
        slices: int = math.ceil(sum(reach / 2**k for k in range(self.recipe.n_doublings))) + 1
        return slices

    def source_range(self, start: int, stop: int) -> tuple[int, int]:
        """The thick slices that thin slices start…stop − 1 are computed from."""
        scale = 2**self.recipe.n_doublings
        first, last = (start, stop) if self._last is None else _support(self._last[start:stop])
        return max(0, first // scale - self.halo), min(self.recipe.n, -(-last // scale) + self.halo)

    def draw(
        self,
        y: np.ndarray,
        slabs: Sequence[tuple[int, int]],
        *,
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        """Draw the samples of a diffusion, which `sampled` needs. slabs: of stage one that are encoded at once."""
        assert self.diffuser is not None

        def rows(start: int, stop: int) -> np.ndarray:
            made = self.rows(y, start, stop)
            if len(slabs) == 1:
                self._whole = made
            return made

        r, size = self.recipe, (self.m, y.shape[1], y.shape[2])
        self._drawn = self.diffuser.draw(rows, slabs, size, grid=r.grid, rho=r.rho, progress=progress)

    def changed(self, start: int, stop: int) -> tuple[int, int]:
        """The thin slices whose change by a diffusion thin slices start…stop − 1 depend on."""
        return (start, stop) if self._hidden is None else _support(self._hidden[start:stop])

    def sampled(self, y: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Thin slices start…stop − 1 as `rows`, and their uncertainty in HU; the latter None of a single sample.

        stage one + gain · (mean of the samples' changes), or + the first sample's change; changes enter through
        I − P A, so that no sample moves a measured slice. Uncertainty: the samples' standard deviation, calibrated.
        """
        assert self.diffuser is not None
        assert self._drawn is not None
        d, (a, b) = self.diffuser, self.changed(start, stop)
        hidden = None if self._hidden is None else self._hidden[start:stop, a:b]
        mean, square = np.zeros((2, stop - start, *y.shape[1:]), np.float32)
        first = None
        for k, change in enumerate(self._drawn(a, b)):
            c = change if hidden is None else apply_along_z(hidden, change)
            del change
            if first is None and d.sampling.estimate == "sample":
                first = c.copy()
            c -= mean  # Welford 1962: a running mean, and the sum of squares about it
            mean += c / (k + 1)
            c *= c
            square += np.multiply(c, k / (k + 1), out=c)
        rows, self._whole = self.rows(y, start, stop) if self._whole is None else self._whole, None
        rows += np.multiply(mean, d.detail_gain, out=mean) if first is None else first
        if d.sampling.samples == 1:
            return rows, None
        square *= d.spread_factor**2 / (d.sampling.samples - 1)
        return rows, np.sqrt(square, out=square)

    def rows(
        self, y: np.ndarray, start: int, stop: int, *, progress: Callable[[float], None] = lambda s: None
    ) -> np.ndarray:
        """Thin slices start…stop − 1, (stop − start, H, W) float32, HU; y: all thick slices (n, H, W), no padding.

        Of a diffusion its stage one.
        """
        r, scale = self.recipe, 1
        first, last = self.source_range(start, stop)
        x: np.ndarray = y[first:last]
        for _ in range(r.n_doublings):
            assert self.engine is not None
            x = self.engine.double(
                x,
                r.stage_profile,
                spacing=r.spacing / scale,
                thickness=r.stage_thickness / scale,
                rho=r.rho,
                stack=r.n * scale,
                tiling=self.tiling,
                progress=progress,
            )
            scale *= 2
        at = first * scale
        if self._last is None:
            return x[start - at : stop - at]
        fine, fine_end = _support(self._last[start:stop])
        result = apply_along_z(self._last[start:stop, fine:fine_end], x[fine - at : fine_end - at])
        if scale > 1 and r.is_consistent:
            a, b = _support(self._P[start:stop])
            apply_along_z(self._P[start:stop, a:b], y[a:b], add_to=result)
        return result

    def added(self, y: np.ndarray, rows: np.ndarray, start: int) -> np.ndarray:
        """What `rows` (from thin slice `start` on) hold that the measurement does not determine: rows − `inverse`."""
        part = self.inverse[start : start + len(rows)]
        a, b = _support(part)
        added: np.ndarray = rows - apply_along_z(part[:, a:b], y[a:b])
        return added

    def thick_in(self, start: int, stop: int) -> tuple[int, int]:
        """The thick slices whose centres lie in thin slices start…stop − 1, as a range."""
        grid = self.recipe.grid
        lies_in = np.floor((grid.thick_centres - grid.edges[0]) * grid.factor).clip(0, grid.m - 1)
        first, last = np.searchsorted(lies_in, [start, stop])
        return int(first), int(last)

    def widened(self, start: int, stop: int) -> tuple[int, int]:
        """Thin slices start…stop − 1 and all others that the thick slices in them are a mean of."""
        first, last = self.thick_in(start, stop)
        if first == last:
            return start, stop
        a, b = _support(self.A[first:last])
        return min(start, a), max(stop, b)

    def _resample(self) -> np.ndarray:
        """(m, n·2^k): from the grid of the last doubling to the asked one; kernel widths subtract."""
        r, scale = self.recipe, 2**self.recipe.n_doublings
        fine = ZGrid(r.n, float(scale))
        spacing, thickness = r.spacing / scale, r.stage_thickness / scale
        wanted = max(r.result_thickness, thickness)
        is_same = r.grid.m == fine.m and abs(r.factor - scale) < 1e-9
        if is_same and wanted == thickness:
            return np.eye(fine.m)
        if r.spacing / r.factor > spacing * (1 + 1e-9) or wanted > thickness:
            edges, centres = fine.edges * r.spacing, r.grid.centres * r.spacing
            return thickening_matrix(
                edges, centres, SliceProfile(), thickness=wanted, thin_thickness=thickness
            )
        return cubic_matrix((r.grid.centres - fine.centres[0]) * scale, fine.m)


def _support(rows: np.ndarray, least: float = NEGLIGIBLE) -> tuple[int, int]:
    """First and one past the last column that any of these rows gives at least `least` to; never empty."""
    largest = np.abs(rows).max(axis=0)
    used = np.flatnonzero(largest >= min(least, largest.max()))
    return int(used[0]), int(used[-1]) + 1


def _reach(matrix: np.ndarray, step: float) -> int:
    """Columns on either side that the middle row of a z-matrix gives weight to; row j lies at column j·step."""
    middle = len(matrix) // 2
    first, last = _support(matrix[middle : middle + 1], HALO_WEIGHT)
    at = int(middle * step)
    return max(at - first, last - at)
