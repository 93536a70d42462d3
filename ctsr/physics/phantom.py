"""A synthetic thorax whose parts are known: for trials and tests where no scan may be used.

Everything is drawn in millimetres as ellipsoids and tubes, painted one over the other on several planes a
slab and averaged, so that a slab shows its mean and not what lies at its centre. Anatomy is scaled to the
field of view; nodules keep their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import ndimage

__all__ = ["Nodule", "Phantom", "phantom", "thorax"]

SHAPE = (96, 192, 240)  # (D, H, W)
SPACING = (1.0, 1.5, 1.5)  # mm
_FIELD = (270.0, 370.0)  # mm, (H, W) that a scale of 1 needs
_PLANES = 4  # a slab
_CHUNK = 12  # slabs painted at a time

_AIR, _FAT, _MUSCLE, _CORTEX, _MARROW, _DISC = -1000.0, -100.0, 55.0, 650.0, 230.0, 80.0
_EMPHYSEMA = -965.0
_SMALLEST_VESSEL = 0.6  # mm, radius, of a patient of scale 1
_SHOWS = 0.2  # pixels: a vessel of a smaller radius is hardly seen and costs as much as any

Point = np.ndarray  # (3,) mm: up, forward, to the patient's right, from the middle of the chest


@dataclass(frozen=True, slots=True)
class Nodule:
    """A sphere in a lung. centre_mm: (z, y, x) from the centre of voxel (0, 0, 0)."""

    centre_mm: tuple[float, float, float]
    diameter_mm: float
    hu: float


@dataclass(frozen=True, slots=True, eq=False)
class Phantom:
    """hu: (D, H, W) float32, slices from foot to head, rows from back to front, columns from left to right.

    spacing: mm, of the same axes. noise_sd: HU.
    """

    hu: np.ndarray
    spacing: tuple[float, float, float]
    nodules: tuple[Nodule, ...]
    noise_sd: float


def thorax(
    seed: int, *, shape: tuple[int, int, int] = SHAPE, spacing: tuple[float, float, float] = SPACING
) -> np.ndarray:
    """The HU of a synthetic thorax, (D, H, W) float32; shape and spacing (mm) have the slice axis first."""
    return phantom(seed, shape=shape, spacing=spacing).hu


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
    nodules = list(_nodules(rng, chest, bounds))
    picture = _Picture([*chest.shapes(rng, *bounds[0]), *nodules], y, x)
    fine = (np.arange(_PLANES) + 0.5) / _PLANES - 0.5
    hu = np.empty(shape, np.float32)
    for start in range(0, shape[0], _CHUNK):
        here = z[start : start + _CHUNK]
        planes = (here[:, None] + fine * spacing[0]).ravel()
        painted = picture.planes(planes)
        hu[start : start + _CHUNK] = painted.reshape(len(here), _PLANES, *painted.shape[1:]).mean(axis=1)
    noise_sd = float(rng.uniform(8, 20)) if noise_sd is None else noise_sd
    hu += _noise(rng, shape, noise_sd)
    at_zero = np.array([z[0], y[0], x[0]])
    known = tuple(
        Nodule(tuple(map(float, n.centre - at_zero)), float(2 * n.radii[0]), n.hu)  # type: ignore[arg-type]
        for n in nodules
    )
    return Phantom(hu, spacing, known, noise_sd)


# ---- shapes


@dataclass(frozen=True, slots=True, eq=False)
class _Ellipsoid:
    centre: Point
    radii: np.ndarray  # (3,) mm; infinite along z: a cylinder
    hu: float
    opacity: float = 1.0

    @property
    def box(self) -> tuple[Point, Point]:
        return self.centre - self.radii, self.centre + self.radii

    def inside(self, p: Point) -> float:
        """0 at the centre, 1 at the surface."""
        return float(np.linalg.norm((p - self.centre) / self.radii))

    def distance(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """mm from the surface, negative inside; first order."""
        parts = [(c - o) / r for c, o, r in zip((z, y, x), self.centre, self.radii, strict=True)]
        q2 = parts[0] ** 2 + parts[1] ** 2 + parts[2] ** 2
        slope2 = sum((p / r) ** 2 for p, r in zip(parts, self.radii, strict=True))
        q = np.sqrt(q2)
        far: np.ndarray = (q - 1) * q / np.sqrt(slope2 + 1e-12)
        return far


@dataclass(frozen=True, slots=True, eq=False)
class _Tube:
    """A segment with round ends; radius in mm."""

    start: Point
    end: Point
    radius: float
    hu: float
    opacity: float = 1.0

    @property
    def box(self) -> tuple[Point, Point]:
        return np.minimum(self.start, self.end) - self.radius, np.maximum(self.start, self.end) + self.radius

    def distance(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        along = self.end - self.start
        rel = [c - o for c, o in zip((z, y, x), self.start, strict=True)]
        t = (rel[0] * along[0] + rel[1] * along[1] + rel[2] * along[2]) / max(float(along @ along), 1e-9)
        t = np.clip(t, 0.0, 1.0)
        gaps = [r - t * a for r, a in zip(rel, along, strict=True)]
        far: np.ndarray = np.sqrt(gaps[0] ** 2 + gaps[1] ** 2 + gaps[2] ** 2) - self.radius
        return far


_Shape = _Ellipsoid | _Tube


class _Picture:
    """Shapes painted one over the other on planes of one field of view; edges are one pixel wide in plane."""

    def __init__(self, shapes: Sequence[_Shape], y: np.ndarray, x: np.ndarray) -> None:
        self._shapes, self._y, self._x = shapes, y.astype(np.float32), x.astype(np.float32)
        self._pixel = float(y[1] - y[0] + x[1] - x[0]) / 2 if min(len(y), len(x)) > 1 else 1.0
        boxes = np.array([shape.box for shape in shapes])  # (shapes, low or high, 3)
        self._low, self._high = boxes[:, 0] - self._pixel, boxes[:, 1] + self._pixel

    def planes(self, z: np.ndarray) -> np.ndarray:
        """(planes, H, W) float32 at the heights z, mm."""
        axes = (z.astype(np.float32), self._y, self._x)
        first = [np.searchsorted(a, self._low[:, i]) for i, a in enumerate(axes)]
        last = [np.searchsorted(a, self._high[:, i], side="right") for i, a in enumerate(axes)]
        is_seen = np.all([f < t for f, t in zip(first, last, strict=True)], axis=0)
        canvas = np.full([len(a) for a in axes], _AIR, np.float32)
        for i in np.flatnonzero(is_seen):
            shape = self._shapes[int(i)]
            box = tuple(slice(int(f[i]), int(t[i])) for f, t in zip(first, last, strict=True))
            there = np.ix_(*(a[s] for a, s in zip(axes, box, strict=True)))
            cover = np.clip(0.5 - shape.distance(*there) / self._pixel, 0.0, 1.0) * shape.opacity
            area = canvas[box]
            area += cover * (shape.hu - area)
        return canvas


def _noise(rng: np.random.Generator, shape: tuple[int, int, int], sd: float) -> np.ndarray:
    """(D, H, W) float32: neighbours in a slice are alike, slices are not, as a scanner's filter makes it."""
    noise = np.empty(shape, np.float32)
    for each in noise:
        white = rng.standard_normal(shape[1:], dtype=np.float32)
        ndimage.gaussian_filter(white, 0.7, output=each)
        each -= ndimage.gaussian_filter(white, 2.5)  # a ramp filter leaves little at low frequencies
    noise *= np.float32(sd / max(float(noise.std()), 1e-6))
    return noise


# ---- anatomy


class _Chest:
    """The large parts of one patient, drawn once; `shapes` lists everything in the order of painting."""

    def __init__(self, rng: np.random.Generator, scale: float, *, smallest: float) -> None:
        self.scale, self.smallest = scale, smallest
        grow = rng.uniform(0.93, 1.03, 3)

        def ellipsoid(centre: Sequence[float], radii: Sequence[float], hu: float) -> _Ellipsoid:
            wobble = rng.uniform(0.96, 1.04, 3)
            return _Ellipsoid(scale * np.array(centre), scale * np.array(radii) * grow * wobble, hu)

        self.blood = float(rng.choice([45.0, 45.0, 190.0]))  # a third with contrast medium
        lung = float(rng.uniform(-880, -840))
        self.lungs = (
            ellipsoid((-30, -4, -71), (150, 79, 61), lung),  # left
            ellipsoid((-30, -4, 73), (150, 80, 64), lung),
        )
        self.heart = ellipsoid((-52, 25, -27), (55, 46, 56), self.blood)
        self.domes = (
            ellipsoid((-150, 0, 70), (85, 78, 72), 60.0),  # liver
            ellipsoid((-158, -5, -72), (80, 72, 64), 48.0),  # spleen and stomach
        )
        solid = [*self.lungs, self.heart, *self.domes, _Ellipsoid(*self._middle(), 0.0)]
        self._centres = np.array([e.centre for e in solid])
        self._radii = np.array([e.radii for e in solid])
        wide = float(grow[2])
        self.body = [
            _Ellipsoid(np.zeros(3), np.array([1e6, 122 * scale, 172 * scale * wide]), -20.0),  # skin
            _Ellipsoid(np.zeros(3), np.array([1e6, 120 * scale, 170 * scale * wide]), _FAT),
            _Ellipsoid(
                np.array([0, -3 * scale, 0]), np.array([1e6, 104 * scale, 152 * scale * wide]), _MUSCLE
            ),
        ]
        self.emphysema = int(rng.integers(0, 60))

    def is_lung(self, p: Point) -> bool:
        """Whether a point lies in a lung and in nothing that is painted over it."""
        q2 = (((p - self._centres) / self._radii) ** 2).sum(axis=1)
        return bool(q2[:2].min() < 0.96**2 and q2[2:].min() > 1.05**2)

    def _middle(self) -> tuple[Point, np.ndarray]:
        """Centre and radii of the mediastinum."""
        return self.scale * np.array([20.0, 0, 0]), self.scale * np.array([1e6, 76.0, 27.0])

    def shapes(self, rng: np.random.Generator, bottom: float, top: float) -> Iterator[_Shape]:
        """From the skin inwards; bottom, top: mm, what the volume shows."""
        s = self.scale
        yield from self.body
        yield from self.lungs
        yield from self._texture(rng, bottom, top)
        yield _Ellipsoid(*self._middle(), -60.0)  # the mediastinum is fat around what follows
        yield from self._vessels(rng)
        yield from self.domes
        yield self.heart
        yield from self._great_vessels()
        yield from self._airways(rng)
        yield from _spine(s, bottom, top)
        yield from _ribs(s, bottom, top)

    def _texture(self, rng: np.random.Generator, bottom: float, top: float) -> Iterator[_Shape]:
        """Soft patches a little denser or lighter than the rest, denser at the back; then emphysema."""
        for lung in self.lungs:
            for _ in range(160):
                at = lung.centre + lung.radii * rng.uniform(-1, 1, 3)
                if lung.inside(at) > 0.9:
                    continue
                back = (lung.centre[1] - at[1]) / lung.radii[1]
                value = lung.hu + 35 * float(back) + float(rng.normal(0, 40))
                yield _Ellipsoid(at, self.scale * rng.uniform(5, 22, 3), value, 0.45)
        for _ in range(self.emphysema):
            lung = self.lungs[int(rng.integers(2))]
            at = lung.centre + lung.radii * rng.uniform(-0.8, 0.8, 3)
            at[0] = rng.uniform(bottom, top)
            if self.is_lung(at):
                size = self.scale * float(rng.uniform(2, 9))
                yield _Ellipsoid(at, size * rng.uniform(0.7, 1.3, 3), _EMPHYSEMA, 0.9)

    def _vessels(self, rng: np.random.Generator) -> Iterator[_Tube]:
        """Arteries and veins that branch from the hila into the lungs."""
        for side in (-1.0, 1.0):
            for _ in range(2):  # arteries, veins
                for up in (75.0, 20.0, -30.0, -90.0):
                    hilum = self.scale * np.array([rng.uniform(0, 22), rng.uniform(-14, 8), side * 30])
                    aim = np.array([up, rng.uniform(-55, 55), side * 70.0])
                    radius = self.scale * float(rng.uniform(3.2, 4.6))
                    yield from _tree(
                        rng, hilum, _unit(aim), radius, self.is_lung, self.blood, smallest=self.smallest
                    )

    def _great_vessels(self) -> Iterator[_Tube]:
        s, blood = self.scale, self.blood
        angles = np.linspace(0, np.pi, 9)
        arch = [np.array([58 + 24 * np.sin(a), -8 + 34 * np.cos(a), -4 - 16 * np.sin(a / 2)]) for a in angles]
        yield from _chain(
            [np.array([-30.0, 24, 4]), np.array([58.0, 26, -4])], 15, blood, s
        )  # ascending aorta
        yield from _chain(arch, 13, blood, s)
        yield from _chain(
            [arch[-1], np.array([20.0, -50, -24]), np.array([-400.0, -46, -16])], 11.5, blood, s
        )
        yield from _chain([np.array([-20.0, 16, 26]), np.array([130.0, 12, 24])], 9, blood, s)  # vena cava
        yield from _chain([np.array([-20.0, 32, -16]), np.array([22.0, 2, -18])], 14, blood, s)  # pulmonary
        for side in (-1.0, 1.0):
            yield from _chain([np.array([20.0, 0, -8]), np.array([12.0, -6, side * 34])], 10, blood, s)

    def _airways(self, rng: np.random.Generator) -> Iterator[_Tube]:
        """Trachea, main bronchi and their branches: a wall, and air in it."""
        s = self.scale
        carina = np.array([38.0, -16, 2])
        trunk = [(np.array([300.0, -16, 2]), carina, 9.0)]
        for side in (-1.0, 1.0):
            trunk.append((carina, np.array([10.0, -14, side * 30]), 6.5))
        pieces = [_Tube(s * a, s * b, s * r, 0.0) for a, b, r in trunk]
        for side in (-1.0, 1.0):
            for up in (60.0, 5.0, -70.0):
                aim = _unit(np.array([up, rng.uniform(-25, 25), side * 60.0]))
                hilum = s * np.array([10.0, -14, side * 30])
                pieces += _tree(
                    rng, hilum, aim, s * 3.6, self.is_lung, 0.0, smallest=max(s * 1.3, self.smallest)
                )
        for p in pieces:
            yield _Tube(p.start, p.end, p.radius * 1.2 + 0.5 * s, 20.0)
        for p in pieces:
            yield _Tube(p.start, p.end, p.radius, -990.0)


def _nodules(
    rng: np.random.Generator, chest: _Chest, bounds: Sequence[tuple[float, float]]
) -> Iterator[_Ellipsoid]:
    """Two to seven spheres that lie wholly in the lungs and in the volume, apart from each other."""
    wanted = int(rng.integers(2, 8))
    found: list[_Ellipsoid] = []
    for _ in range(400):
        if len(found) == wanted:
            return
        diameter = float(rng.choice([4.0, 5, 6, 8, 10, 12]))
        hu = float(rng.choice([40.0, 40.0, -450.0, 300.0]))  # solid, ground glass, calcified
        reach = diameter / 2 + 3
        at = np.array([rng.uniform(low, high) for low, high in bounds])
        rim = [at + reach * np.array(d) for d in np.vstack([np.eye(3), -np.eye(3)])]
        is_in = all(low + reach < c < high - reach for (low, high), c in zip(bounds, at, strict=True))
        if is_in and all(map(chest.is_lung, rim)) and all(np.linalg.norm(at - f.centre) > 25 for f in found):
            found.append(_Ellipsoid(at, np.full(3, diameter / 2), hu))
            yield found[-1]


def _tree(
    rng: np.random.Generator,
    start: Point,
    direction: np.ndarray,
    radius: float,
    is_allowed: Callable[[Point], bool],
    hu: float,
    *,
    smallest: float,
) -> list[_Tube]:
    """Tubes that fork into two (r₀³ = 2 r₁³, Murray 1926) until they would leave the lung or are too thin."""
    tubes: list[_Tube] = []
    growing = [(start, direction, radius)]
    while growing:
        at, heading, r = growing.pop()
        if r < smallest:
            continue
        length = r * rng.uniform(3.5, 6.0) + 5.0
        for _ in range(4):
            end = at + length * _unit(heading + rng.normal(0, 0.25, 3))
            if is_allowed(end) or (not tubes and r == radius):
                break
        else:
            continue
        tubes.append(_Tube(at, end, r, hu))
        aside = _unit(np.cross(heading, rng.normal(size=3)))
        for sign in (-1.0, 1.0):
            growing.append((end, _unit(heading + sign * rng.uniform(0.3, 0.8) * aside), r * 0.794))
    return tubes


def _spine(s: float, bottom: float, top: float) -> Iterator[_Shape]:
    """Vertebrae of 22 mm with discs of 5 mm between them, the canal, and the processes."""
    behind = -66.0
    yield from _chain([np.array([-400.0, behind, 0]), np.array([400.0, behind, 0])], 16, _DISC, s)
    for z in np.arange(-405.0, 405.0, 27.0):
        if not bottom - 40 * s < z * s < top + 40 * s:
            continue
        for hu, wall in ((_CORTEX, 0.0), (_MARROW, 1.8)):
            radii = np.array([12.5 - wall, 15.5 - wall, 19 - wall])
            yield _Ellipsoid(s * np.array([z, behind, 0]), s * radii, hu)
            yield from _chain([np.array([z - 3, -88, 0]), np.array([z - 14, -101, 0])], 4 - wall, hu, s)
            for side in (-1.0, 1.0):
                ends = [np.array([z + 3, -82, side * 12]), np.array([z + 5, -88, side * 32])]
                yield from _chain(ends, 5 - wall, hu, s)
    yield from _chain([np.array([-400.0, -86, 0]), np.array([400.0, -86, 0])], 8, 25.0, s)


def _ribs(s: float, bottom: float, top: float) -> Iterator[_Shape]:
    """Pairs of ribs that fall from the spine to the front, and the breastbone."""
    angles = np.linspace(-1.36, 1.15, 13)
    for z in np.arange(-405.0, 470.0, 27.0):
        fall = 62 * (np.sin(angles) - np.sin(angles[0])) / 2
        for side in (-1.0, 1.0):
            path = [
                np.array([z - f, 93 * np.sin(a) - 3, side * 141 * np.cos(a)])
                for a, f in zip(angles, fall, strict=True)
            ]
            heights = [s * p[0] for p in path]
            if max(heights) < bottom - 10 * s or min(heights) > top + 10 * s:
                continue
            yield from _chain(path, 5.5, _CORTEX, s)
            yield from _chain(path, 3.6, _MARROW, s)
    for hu, wall in ((_CORTEX, 0.0), (_MARROW, 1.6)):
        radii = np.array([95 - wall, 6.5 - wall, 19 - wall])
        yield _Ellipsoid(s * np.array([10.0, 92, 0]), s * radii, hu)


def _chain(points: Sequence[Point], radius: float, hu: float, scale: float) -> Iterator[_Tube]:
    for a, b in pairwise(points):
        yield _Tube(scale * a, scale * b, scale * radius, hu)


def _unit(v: np.ndarray) -> np.ndarray:
    unit: np.ndarray = v / max(float(np.linalg.norm(v)), 1e-9)
    return unit
