"""Training pairs made on the fly: a thin truth, what a scanner would have stored of it, and their matrices.

A pair's truth is itself thickened from the source scan to a random spacing, so that inputs of 1–6.5 mm are
really trained for; then it is thickened by two with exactly the kernel that inference will use. Every volume
also trains in plane: an in-plane axis plays z, because its resolution is real. Nothing is ever interpolated.

The sample of index i is a function of (seed, i) alone: a resumed run sees what the unbroken one would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ctsr.physics.operator import apply_along_z, thickening_matrix
from ctsr.physics.profile import ProfileKind, SliceProfile
from ctsr.physics.projection import doubling
from ctsr.physics.shapes import Ellipsoid, paint

__all__ = ["Pair", "PairRecipe", "PairSource", "TrainVolume"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class TrainVolume:
    """A scan to cut pairs from.

    hu: (D, H, W) int16 or float32, slice axis first. spacing, thickness: mm along each axis; thickness is the
    resolution (FWHM), in plane taken to be one pixel. content: sha256 of the voxels.
    """

    name: str
    hu: np.ndarray
    spacing: tuple[float, float, float]
    slice_thickness: float
    trains_along_z: bool
    content: str = ""


@dataclass(frozen=True, slots=True)
class PairRecipe:
    """How pairs are drawn. The defaults are the recipe of the shipped weights."""

    patch: tuple[int, int, int] = (40, 96, 96)  # thin voxels (D, H, W)
    widths: tuple[float, float] = (0.75, 2.1)  # ρ = t/s
    usual_widths: tuple[float, float] = (0.75, 1.25)  # half of all pairs: most scans are reconstructed so
    truth_widths: tuple[float, float] = (0.75, 1.5)  # t'/s' of a truth that is made from a thinner scan
    truth_spacing_max: float = 3.25  # mm
    native_share: float = 0.35  # truths taken as they are
    along_z_share: float = 0.6  # of the pairs from volumes that train along z
    thick_share: float = 0.2  # pairs from volumes that train in plane only
    other_profile_share: float = 0.2  # box or triangle
    noise_share: float = 0.15
    noise_max: float = 80.0  # HU, standard deviation, added to the truth before A
    uniform_share: float = 0.02  # patches of one HU: where nothing is, nothing may be invented
    spheres_share: float = 0.06  # ellipsoids in one HU: what is round and a slice high, scans show too rarely
    scale: float = 0.02  # HU × (1 ± 2 %)
    offset: float = 10.0  # HU


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """truth (2n, H, W), thick (n, H, W), inverse (2n, H, W) in HU; null (2n, 2n) = I − P A. All float32."""

    truth: np.ndarray
    thick: np.ndarray
    inverse: np.ndarray
    null: np.ndarray
    rho: float  # ρ = t/s
    input_spacing: float  # mm


class PairSource:
    """Pairs from a set of volumes; `pair(i)` depends on (seed, i) alone."""

    def __init__(self, volumes: Sequence[TrainVolume], recipe: PairRecipe, *, seed: int) -> None:
        if recipe.patch[0] % 2:
            raise ValueError(f"a patch has an even number of thin slices, not {recipe.patch[0]}")
        self.recipe, self.seed = recipe, seed
        self.along_z = [v for v in volumes if v.trains_along_z]
        self.in_plane = [v for v in volumes if not v.trains_along_z]

    def pair(self, index: int) -> Pair:
        """The pair of this index."""
        rng = np.random.default_rng([self.seed, index])
        truth, spacing = self._truth(rng)
        return self._degrade(rng, truth, spacing)

    def patch(self, index: int, *, restored_share: float) -> np.ndarray:
        """The truth of a pair alone, (D, H, W) in HU; or, for a share of the indices, what `inverse` makes of its thick
        slices: an autoencoder must hold both kinds of volume."""
        rng = np.random.default_rng([self.seed, index])
        truth, spacing = self._truth(rng)
        return self._degrade(rng, truth, spacing).inverse if rng.random() < restored_share else truth

    def input_spacing(self, index: int) -> float:
        """The spacing of the pair's thick slices, mm, without making the rest of it."""
        return 2 * self._truth(np.random.default_rng([self.seed, index]))[1]

    def _truth(self, rng: np.random.Generator) -> tuple[np.ndarray, float]:
        """A patch (D, H, W) float32 in HU with its spacing along D, mm."""
        r = self.recipe
        kind = rng.random()
        if kind < r.uniform_share:
            hu = np.full(r.patch, rng.uniform(-1024, 3071), np.float32)
            return hu, rng.uniform(0.6, r.truth_spacing_max)
        if kind < r.uniform_share + r.spheres_share:
            truth, spacing = self._spheres(rng)
        else:
            truth, spacing = self._scanned(rng)
        truth = truth * (1 + rng.uniform(-r.scale, r.scale)) + rng.uniform(-r.offset, r.offset)
        if rng.random() < r.noise_share:
            truth = truth + rng.normal(0, rng.uniform(0, r.noise_max), truth.shape)
        for flipped in range(3):
            if rng.random() < 0.5:
                truth = np.flip(truth, flipped)
        if truth.shape[1] == truth.shape[2] and rng.random() < 0.5:
            truth = truth.swapaxes(1, 2)
        return np.ascontiguousarray(truth, np.float32), spacing

    def _spheres(self, rng: np.random.Generator) -> tuple[np.ndarray, float]:
        """Ellipsoids of 1–15 mm in a patch of one HU, as `_truth` gives it."""
        spacing, pixel = rng.uniform(0.6, self.recipe.truth_spacing_max), 0.7
        axes = [np.arange(n) * s for n, s in zip(self.recipe.patch, (spacing, pixel, pixel), strict=True)]
        background = rng.uniform(-1024, 200)
        shapes = [
            Ellipsoid(
                np.array([rng.uniform(0, axis[-1]) for axis in axes]),
                float(np.exp(rng.uniform(0, np.log(15)))) * rng.uniform(0.7, 1.4, 3),
                max(
                    -1024.0, background + rng.choice([-1, 1]) * np.exp(rng.uniform(np.log(20), np.log(1200)))
                ),
            )
            for _ in range(rng.integers(1, 60))
        ]
        edge = pixel * rng.uniform(1, 2.5)
        return paint(shapes, axes, slab=spacing, edge=edge, background=background), spacing

    def _scanned(self, rng: np.random.Generator) -> tuple[np.ndarray, float]:
        """A patch of a scan, as `_truth` gives it."""
        r = self.recipe
        is_thick = not self.along_z or (bool(self.in_plane) and rng.random() < r.thick_share)
        volume = _choose(rng, self.in_plane if is_thick else self.along_z)
        axis = 0 if not is_thick and rng.random() < r.along_z_share else int(rng.integers(1, 3))
        for _ in range(4):  # a patch that is mostly outside the body teaches little
            truth, spacing = self._cut(rng, volume, axis)
            if (truth > -950).mean() > 0.5:
                break
        return truth, spacing

    def _cut(self, rng: np.random.Generator, volume: TrainVolume, axis: int) -> tuple[np.ndarray, float]:
        """One patch of `volume` in which `axis` plays z, and its spacing along that axis."""
        r = self.recipe
        depth, height, width = r.patch
        hu = np.moveaxis(volume.hu, axis, 0)
        spacing = volume.spacing[axis]
        resolution = volume.slice_thickness if axis == 0 else spacing
        coarsest = min(r.truth_spacing_max, spacing * hu.shape[0] / depth)
        is_native = coarsest <= spacing or rng.random() < r.native_share
        target = spacing if is_native else float(np.exp(rng.uniform(np.log(spacing), np.log(coarsest))))
        # 40 · 0.8 / 0.8 may be more than 40 in floating point
        taken = min(hu.shape[0], depth if is_native else int(np.ceil(depth * target / spacing)))
        z = int(rng.integers(0, hu.shape[0] - taken + 1))
        block = _plane_crop(rng, hu[z : z + taken], height, width)
        if is_native:
            missing = max(0, depth - len(block))  # mirrored, where the scan has fewer slices
            return np.pad(block, ((0, missing), (0, 0), (0, 0)), mode="symmetric"), spacing
        slack = taken * spacing - depth * target
        centres = rng.uniform(0, max(slack, 0)) + (np.arange(depth) + 0.5) * target
        to_truth = thickening_matrix(
            np.arange(taken + 1) * spacing,
            centres,
            SliceProfile(),
            thickness=target * rng.uniform(*r.truth_widths),
            thin_thickness=resolution,
        )
        return apply_along_z(to_truth, block), target

    def _degrade(self, rng: np.random.Generator, truth: np.ndarray, spacing: float) -> Pair:
        """The pair that belongs to a truth."""
        r = self.recipe
        kind = ProfileKind.GAUSSIAN
        if rng.random() < r.other_profile_share:
            kind = _choose(rng, [ProfileKind.BOX, ProfileKind.TRIANGLE])
        rho = float(rng.uniform(*(r.usual_widths if rng.random() < 0.5 else r.widths)))
        thick_spacing = 2 * spacing
        A, inverse, null = doubling(
            len(truth) // 2, SliceProfile(kind), spacing=thick_spacing, thickness=rho * thick_spacing
        )
        thick = apply_along_z(A, truth)
        return Pair(truth, thick, apply_along_z(inverse, thick), null.astype(np.float32), rho, thick_spacing)


def _choose(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _plane_crop(rng: np.random.Generator, hu: np.ndarray, height: int, width: int) -> np.ndarray:
    """(n, height, width) from (n, H, W); where the plane is too small, several crops side by side.

    A thick scan's plane may be only ten pixels high when an in-plane axis plays z. Each column is still a
    true one: the operator runs along the first axis alone.
    """
    strips: list[np.ndarray] = []
    rows = min(height, hu.shape[1])
    columns = min(width, hu.shape[2])
    while sum(s.shape[1] for s in strips) < height:
        y, x = int(rng.integers(0, hu.shape[1] - rows + 1)), int(rng.integers(0, hu.shape[2] - columns + 1))
        strips.append(hu[:, y : y + rows, x : x + columns].astype(np.float32))
    block = np.concatenate(strips, axis=1)[:, :height] if len(strips) > 1 else strips[0]
    return np.pad(block, ((0, 0), (0, 0), (0, width - columns)), mode="edge") if columns < width else block
