"""A synthetic thorax whose parts are known: for trials and tests where no scan may be used.

Everything is drawn in millimetres as ellipsoids and tubes: up, forward, to the patient's right, from the middle of the
chest. Anatomy is scaled to the field of view; nodules keep their size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from scipy import ndimage

from ctsr.physics.shapes import Ellipsoid, Point, Shape, Tube, paint

__all__ = ["SHAPE", "SPACING", "Nodule", "Phantom", "phantom"]

SHAPE = (96, 192, 240)  # (D, H, W)
SPACING = (1.0, 1.5, 1.5)  # mm
_FIELD = (270.0, 370.0)  # mm, (H, W) that a scale of 1 needs

_AIR, _FAT, _MUSCLE, _CORTEX, _MARROW, _DISC = -1000.0, -100.0, 55.0, 650.0, 230.0, 80.0
_EMPHYSEMA = -965.0
_SMALLEST_VESSEL = 0.6  # mm, radius, of a patient of scale 1
_SHOWS = 0.2  # pixels: a vessel of a smaller radius is hardly seen and costs as much as any


@dataclass(frozen=True, slots=True)
class Nodule:
    """A sphere in a lung. centre_mm: (z, y, x) from the centre of voxel (0, 0, 0)."""

    centre_mm: tuple[float, float, float]
    diameter_mm: float
    hu: float


@dataclass(frozen=True, slots=True, eq=False)
class Phantom:
    """hu: (D, H, W) float32, slices from foot to head, rows from back to front, columns from left to right.

    noise_sd: HU.
    """

    hu: np.ndarray
    nodules: tuple[Nodule, ...]
    noise_sd: float


def phantom(
    seed: int,
    *,
    shape: tuple[int, int, int] = SHAPE,
    spacing: tuple[float, float, float] = SPACING,
    noise_sd: float | None = None,
) -> Phantom:
    """A synthetic thorax and the record of what is in it; the same seed gives the same one.

    noise_sd: HU; None: what the seed draws. The same length in other slabs is the same patient.
    """
    rng = np.random.default_rng(seed)
    z, y, x = ((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True))
    scale = min(shape[1] * spacing[1] / _FIELD[0], shape[2] * spacing[2] / _FIELD[1])
    z = z + scale * rng.uniform(-25, 25)  # patients are not all cut at the same height
    chest = _Chest(rng, scale, smallest=max(_SMALLEST_VESSEL * scale, _SHOWS * max(spacing[1:])))
    bounds = [(float(a[0] - s / 2), float(a[-1] + s / 2)) for a, s in zip((z, y, x), spacing, strict=True)]
    nodules = list(chest.nodules(bounds))
    shapes = [*chest.shapes(*bounds[0]), *nodules]
    edge = (spacing[1] + spacing[2]) / 2
    hu = paint(shapes, (z, y, x), slab=spacing[0], edge=edge, background=_AIR)
    noise_sd = float(rng.uniform(8, 20)) if noise_sd is None else noise_sd
    hu += _noise(rng, shape, noise_sd)
    places = [(n.centre - np.array([z[0], y[0], x[0]])).tolist() for n in nodules]
    known = (Nodule(tuple(at), float(2 * n.radii[0]), n.hu) for at, n in zip(places, nodules, strict=True))
    return Phantom(hu, tuple(known), noise_sd)


def _noise(rng: np.random.Generator, shape: tuple[int, int, int], sd: float) -> np.ndarray:
    """(D, H, W) float32: neighbours in a slice are alike, slices are not, as a scanner's filter makes it."""
    noise = np.empty(shape, np.float32)
    for each in noise:
        white = rng.standard_normal(shape[1:], dtype=np.float32)
        ndimage.gaussian_filter(white, 0.7, output=each)
        each -= ndimage.gaussian_filter(white, 2.5)  # a ramp filter leaves little at low frequencies
    return noise * np.float32(sd / max(float(noise.std()), 1e-6))


# ---- anatomy


class _Chest:
    """The large parts of one patient, drawn once; `shapes` lists everything in the order of painting."""

    def __init__(self, rng: np.random.Generator, scale: float, *, smallest: float) -> None:
        self.rng, self.scale, self.smallest = rng, scale, smallest
        grow = rng.uniform(0.93, 1.03, 3)

        def ellipsoid(centre: Sequence[float], radii: Sequence[float], hu: float) -> Ellipsoid:
            wobble = rng.uniform(0.96, 1.04, 3)
            return Ellipsoid(scale * np.array(centre), scale * np.array(radii) * grow * wobble, hu)

        def trunk(forward: float, deep: float, wide: float, hu: float) -> Ellipsoid:
            radii = np.array([1e6, deep * scale, wide * scale * float(grow[2])])
            return Ellipsoid(np.array([0, forward * scale, 0]), radii, hu)

        self.blood = float(rng.choice([45.0, 45.0, 190.0]))  # a third with contrast medium
        lung = float(rng.uniform(-880, -840))
        self.lungs = (
            ellipsoid((-30, -4, -71), (150, 79, 61), lung),
            ellipsoid((-30, -4, 73), (150, 80, 64), lung),
        )
        self.heart = ellipsoid((-52, 25, -27), (55, 46, 56), self.blood)
        self.domes = (
            ellipsoid((-150, 0, 70), (85, 78, 72), 60.0),  # liver
            ellipsoid((-158, -5, -72), (80, 72, 64), 48.0),  # spleen and stomach
        )
        # the mediastinum is fat around what is painted over it
        self.middle = Ellipsoid(scale * np.array([20.0, 0, 0]), scale * np.array([1e6, 76.0, 27.0]), -60.0)
        self.body = trunk(0, 122, 172, -20.0), trunk(0, 120, 170, _FAT), trunk(-3, 104, 152, _MUSCLE)
        solid = [*self.lungs, self.heart, *self.domes, self.middle]
        self._centres = np.array([e.centre for e in solid])
        self._radii = np.array([e.radii for e in solid])
        self.emphysema = int(rng.integers(0, 60))

    def is_lung(self, p: Point) -> bool:
        """Whether a point lies in a lung and in nothing that is painted over it."""
        q2 = (((p - self._centres) / self._radii) ** 2).sum(axis=1)
        return bool(q2[:2].min() < 0.96**2 and q2[2:].min() > 1.05**2)

    def shapes(self, bottom: float, top: float) -> Iterator[Shape]:
        """From the skin inwards; bottom, top: mm, what the volume shows."""
        yield from (*self.body, *self.lungs)
        yield from self._texture(bottom, top)
        yield self.middle
        yield from self._vessels()
        yield from (*self.domes, self.heart)
        yield from self._great_vessels()
        yield from self._airways()
        yield from _spine(self.scale, bottom, top)
        yield from _ribs(self.scale, bottom, top)

    def _texture(self, bottom: float, top: float) -> Iterator[Shape]:
        """Soft patches a little denser or lighter than the rest, denser at the back; then emphysema."""
        rng = self.rng
        for lung in self.lungs:
            for _ in range(160):
                at = lung.centre + lung.radii * rng.uniform(-1, 1, 3)
                aside = (at - lung.centre) / lung.radii
                if np.linalg.norm(aside) <= 0.9:
                    value = lung.hu - 35 * float(aside[1]) + float(rng.normal(0, 40))
                    yield Ellipsoid(at, self.scale * rng.uniform(5, 22, 3), value, 0.45)
        for _ in range(self.emphysema):
            lung = self.lungs[int(rng.integers(2))]
            at = lung.centre + lung.radii * rng.uniform(-0.8, 0.8, 3)
            at[0] = rng.uniform(bottom, top)
            if self.is_lung(at):
                size = self.scale * float(rng.uniform(2, 9))
                yield Ellipsoid(at, size * rng.uniform(0.7, 1.3, 3), _EMPHYSEMA, 0.9)

    def _vessels(self) -> Iterator[Tube]:
        """Arteries and veins that branch from the hila into the lungs."""
        rng = self.rng
        for side, _, up in product((-30.0, 30.0), ("artery", "vein"), (75.0, 20.0, -30.0, -90.0)):
            hilum = self.scale * np.array([rng.uniform(0, 22), rng.uniform(-14, 8), side])
            aim = np.array([up, rng.uniform(-55, 55), side / 30 * 70])
            radius = self.scale * float(rng.uniform(3.2, 4.6))
            yield from self._tree(hilum, aim, radius, self.blood, smallest=self.smallest)

    def _great_vessels(self) -> Iterator[Tube]:
        s, blood = self.scale, self.blood
        angles = np.linspace(0, np.pi, 9)
        arch = [(58 + 24 * np.sin(a), -8 + 34 * np.cos(a), -4 - 16 * np.sin(a / 2)) for a in angles]
        yield from _chain([(-30, 24, 4), (58, 26, -4)], 15, blood, s)  # ascending aorta
        yield from _chain(arch, 13, blood, s)
        yield from _chain([arch[-1], (20, -50, -24), (-400, -46, -16)], 11.5, blood, s)
        yield from _chain([(-20, 16, 26), (130, 12, 24)], 9, blood, s)  # vena cava
        yield from _chain([(-20, 32, -16), (22, 2, -18)], 14, blood, s)  # pulmonary
        for side in (-34, 34):
            yield from _chain([(20, 0, -8), (12, -6, side)], 10, blood, s)

    def _airways(self) -> Iterator[Tube]:
        """Trachea, main bronchi and their branches: a wall, and air in it."""
        s, carina, hila = self.scale, (38, -16, 2), ((10, -14, -30), (10, -14, 30))
        pieces = [*_chain([(300, -16, 2), carina], 9, 0.0, s)]
        for hilum in hila:
            pieces += _chain([carina, hilum], 6.5, 0.0, s)
        for hilum, up in product(hila, (60.0, 5.0, -70.0)):
            aim = np.array([up, self.rng.uniform(-25, 25), 2.0 * hilum[2]])
            smallest = max(s * 1.3, self.smallest)
            pieces += self._tree(s * np.array(hilum), aim, s * 3.6, 0.0, smallest=smallest)
        yield from (Tube(p.start, p.end, p.radius * 1.2 + 0.5 * s, 20.0) for p in pieces)
        yield from (Tube(p.start, p.end, p.radius, -990.0) for p in pieces)

    def _tree(self, start: Point, aim: Point, radius: float, hu: float, *, smallest: float) -> list[Tube]:
        """Tubes that fork into two (r₀³ = 2 r₁³, Murray 1926) until they would leave the lung or are too thin."""
        tubes: list[Tube] = []
        growing = [(start, _unit(aim), radius)]
        while growing:
            at, heading, r = growing.pop()
            if r < smallest:
                continue
            length = r * self.rng.uniform(3.5, 6.0) + 5.0
            for _ in range(4):
                end = at + length * _unit(heading + self.rng.normal(0, 0.25, 3))
                if self.is_lung(end) or (not tubes and r == radius):
                    break
            else:
                continue
            tubes.append(Tube(at, end, r, hu))
            aside = _unit(np.cross(heading, self.rng.normal(size=3)))
            for sign in (-1.0, 1.0):
                growing.append((end, _unit(heading + sign * self.rng.uniform(0.3, 0.8) * aside), r * 0.794))
        return tubes

    def nodules(self, bounds: Sequence[tuple[float, float]]) -> Iterator[Ellipsoid]:
        """Two to seven spheres that lie wholly in the lungs and in the volume, apart from each other."""
        rng = self.rng
        wanted = int(rng.integers(2, 8))
        found: list[Ellipsoid] = []
        for _ in range(400):
            if len(found) == wanted:
                return
            diameter = float(rng.choice([4.0, 5, 6, 8, 10, 12]))
            hu = float(rng.choice([40.0, 40.0, -450.0, 300.0]))  # solid, ground glass, calcified
            reach = diameter / 2 + 3
            at = np.array([rng.uniform(low, high) for low, high in bounds])
            rim = at + reach * np.vstack([np.eye(3), -np.eye(3)])
            is_in = all(low + reach < c < high - reach for (low, high), c in zip(bounds, at, strict=True))
            is_apart = all(np.linalg.norm(at - f.centre) > 25 for f in found)
            if is_in and is_apart and all(map(self.is_lung, rim)):
                found.append(Ellipsoid(at, np.full(3, diameter / 2), hu))
                yield found[-1]


def _spine(s: float, bottom: float, top: float) -> Iterator[Shape]:
    """Vertebrae of 22 mm with discs of 5 mm between them, the canal, and the processes."""
    behind = -66
    yield from _chain([(-400, behind, 0), (400, behind, 0)], 16, _DISC, s)
    for z in np.arange(-405.0, 405.0, 27.0):
        if not bottom - 40 * s < z * s < top + 40 * s:
            continue
        for hu, wall in ((_CORTEX, 0.0), (_MARROW, 1.8)):
            yield Ellipsoid(s * np.array([z, behind, 0]), s * (np.array([12.5, 15.5, 19]) - wall), hu)
            yield from _chain([(z - 3, -88, 0), (z - 14, -101, 0)], 4 - wall, hu, s)
            for side in (-1, 1):
                yield from _chain([(z + 3, -82, side * 12), (z + 5, -88, side * 32)], 5 - wall, hu, s)
    yield from _chain([(-400, -86, 0), (400, -86, 0)], 8, 25.0, s)


def _ribs(s: float, bottom: float, top: float) -> Iterator[Shape]:
    """Pairs of ribs that fall from the spine to the front, and the breastbone."""
    angles = np.linspace(-1.36, 1.15, 13)
    fall = 62 * (np.sin(angles) - np.sin(angles[0])) / 2
    for z in np.arange(-405.0, 470.0, 27.0):
        if s * z < bottom - 10 * s or s * (z - fall.max()) > top + 10 * s:
            continue
        for side in (-1.0, 1.0):
            path = np.column_stack([z - fall, 93 * np.sin(angles) - 3, side * 141 * np.cos(angles)])
            yield from _chain(path, 5.5, _CORTEX, s)
            yield from _chain(path, 3.6, _MARROW, s)
    for hu, wall in ((_CORTEX, 0.0), (_MARROW, 1.6)):
        yield Ellipsoid(s * np.array([10.0, 92, 0]), s * (np.array([95, 6.5, 19]) - wall), hu)


def _chain(points: Iterable[Sequence[float]], radius: float, hu: float, scale: float) -> Iterator[Tube]:
    for a, b in pairwise(points):
        yield Tube(scale * np.array(a), scale * np.array(b), scale * radius, hu)


def _unit(v: np.ndarray) -> np.ndarray:
    return np.asarray(v / max(float(np.linalg.norm(v)), 1e-9))
