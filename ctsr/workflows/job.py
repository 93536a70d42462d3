"""One volume on its way to a thin one: what is asked, geometry, padding, plan, rounding, residual, record. No files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ctsr import __version__
from ctsr.core.geometry import canonical_turn, slice_axis
from ctsr.core.storage import rounded, storage_type
from ctsr.core.volume import AIR, PADDING_LIMIT, Volume
from ctsr.errors import GeometryError, InputError, UsageError
from ctsr.infer.device import check_names
from ctsr.infer.pipeline import CLASSICAL, Pipeline, Recipe
from ctsr.infer.plan import Plan, make_plan
from ctsr.infer.sampling import Sampling
from ctsr.infer.windows import Tiling, occupied_box
from ctsr.io.memory import available_bytes
from ctsr.metrics.domain import measured, outside_domain
from ctsr.physics.operator import apply_along_z
from ctsr.physics.profile import ProfileKind, SliceProfile

if TYPE_CHECKING:
    from ctsr.infer.diffusion import Diffuser
    from ctsr.infer.stage_one import Engine

__all__ = ["Job", "Options"]

FACTOR_LIMIT = 20.0
NEARLY_ISOTROPIC = 1.25  # slices closer than this many in-plane pixels need no thinning unless asked for
NIFTI_LIMIT = 32_767  # slices
ROWS = 16  # image rows that the residual is measured on at a time
SEEN = 1e-4  # a thick voxel counts as seeing a thin one from this weight on
AVAILABLE_SHARE = 0.6  # of the free memory that is taken without being asked for a limit
SAMPLING_SHARE = 0.8  # of the progress bar that encoding and sampling of a diffusion take


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `upsample` can be told. Lengths in mm; None: from the file, or the default that the field names."""

    factor: float | None = None  # 2
    spacing: float | None = None
    model: str = "baseline"
    checkpoint: str | None = None  # the shipped weights
    vae_checkpoint: str | None = None  # of a diffusion; by the sha256 that it names
    stage_one: str | None = None  # likewise
    sampling: Sampling = field(default_factory=Sampling)  # of a diffusion
    thickness: float | None = None
    out_thickness: float | None = None
    profile: SliceProfile = field(default_factory=SliceProfile)
    axis: int | None = None
    is_consistent: bool = True
    patch: tuple[int, int, int] | None = None  # thick slices a step of the stream, pixels of a window
    overlap: int | None = None  # pixels; the network's reach
    max_memory: float | None = None  # bytes
    device: str = "auto"
    dtype: str = "auto"
    is_strict: bool = False

    def __post_init__(self) -> None:
        if self.factor is not None and self.spacing is not None:
            raise UsageError("--factor and --spacing exclude each other")
        if self.factor is not None and not 1 < self.factor <= FACTOR_LIMIT:
            raise UsageError(f"--factor: {self.factor:g} is not above 1 and at most {FACTOR_LIMIT:g}")
        for name in ("spacing", "thickness", "out_thickness"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e3:
                raise UsageError(f"--{name.replace('_', '-')}: {value:g} mm is not a length")
        if self.out_thickness is not None and self.profile.kind in (ProfileKind.BOX, ProfileKind.FILE):
            raise UsageError(f"--out-thickness has no meaning with --profile {self.profile.kind}")
        if self.model not in (*CLASSICAL, "baseline", "diffusion"):
            raise UsageError(f"--model: {self.model} is not baseline, diffusion, {', '.join(CLASSICAL)}")
        if self.model in CLASSICAL and self.checkpoint is not None:
            raise UsageError(f"--checkpoint has no meaning with --model {self.model}")
        for name in ("vae_checkpoint", "stage_one"):
            if self.model != "diffusion" and getattr(self, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} has no meaning with --model {self.model}")
        if self.patch is not None and min(self.patch) < 1:
            raise UsageError(f"--patch-size: {self.patch} has a side below 1")
        if self.overlap is not None and (self.patch is None or not 0 <= self.overlap < min(self.patch[1:])):
            raise UsageError(f"--overlap: {self.overlap} is not below --patch-size")
        check_names(self.device, self.dtype)


class Job:
    """One volume on its way: geometry, padding, plan, and the loop over slabs."""

    def __init__(
        self,
        volume: Volume,
        options: Options,
        engine: Engine | None,
        diffuser: Diffuser | None,
        weights: Mapping[str, Any],
        *,
        is_streamed: bool,
        keeps_added: bool,
        keeps_spread: bool,
    ) -> None:
        if keeps_spread and (diffuser is None or options.sampling.samples < 2):
            raise UsageError("--save-uncertainty needs --model diffusion and 2 --samples at least")
        self.source, self.options = volume, options
        self.notes: list[str] = list(weights.get("notes", ()))
        self.warnings: list[str] = []
        self.remarks: list[str] = []  # what turned out on the way
        self.axis, note = slice_axis(volume, axis=options.axis)
        if note:
            self.notes.append(note)
        self.turn = canonical_turn(volume.affine, self.axis)
        y = self.turn.apply(volume.data)
        self.recipe = self._recipe(volume, len(y))
        grid = self.recipe.grid
        self.affine = grid.affine(volume.affine, self.axis)
        shape = list(volume.shape)
        shape[self.axis] = grid.m
        self.shape = (shape[0], shape[1], shape[2])
        self.given = self.y = y
        self.padding: np.ndarray | None = None
        if volume.data.min() <= PADDING_LIMIT:
            self.padding = y <= PADDING_LIMIT
            self.y = np.where(self.padding, y.dtype.type(AIR), y)
        self.dtype = storage_type(volume.result_dtype, volume.data.min(), volume.data.max())
        tiling = _tiling(options, engine, self.y)
        self.pipeline = Pipeline(self.recipe, tiling=tiling, engine=engine, diffuser=diffuser)
        self.can_stream = is_streamed and self.axis == 2
        self.plan: Plan = make_plan(
            self.pipeline,
            input_bytes=volume.data.nbytes,
            is_padded=self.padding is not None,
            itemsize=self.dtype.itemsize,
            is_streamed=self.can_stream,
            keeps_added=keeps_added,
            keeps_spread=keeps_spread,
            limit=options.max_memory or _free() * AVAILABLE_SHARE,
        )
        self.pipeline.tiling = self.plan.tiling
        self.added = np.empty((self.pipeline.m, *y.shape[1:]), np.float32) if keeps_added else None
        self.spread = np.empty((self.pipeline.m, *y.shape[1:]), np.float32) if keeps_spread else None
        self.residual = _Residual()
        self._check_domain(volume, weights)
        self.record = self._record(weights)

    def run(self, progress: Callable[[float], None] = lambda share: None) -> Iterator[tuple[int, np.ndarray]]:
        """(start, part (k, H, W) in the result's type) slab by slab.

        In the order of the file where z is its slowest axis. The record is complete when the last slab is taken.
        """
        started = time.monotonic()
        slabs = self.plan.slabs[::-1] if self.turn.flips[0] else self.plan.slabs
        if (diffuser := self.pipeline.diffuser) is not None:
            diffuser.cuts, diffuser.remarks = dict(self.plan.cuts), self.remarks
            self.pipeline.draw(self.y, slabs, progress=_part(progress, 0, SAMPLING_SHARE))
            progress = _part(progress, SAMPLING_SHARE, 1)
        total = sum((b - a) for a, b in slabs)
        done = 0
        for start, stop in slabs:
            base, share = done / total, (stop - start) / total / self._thick_passes(start, stop)
            yield start, self._slab(start, stop, _Counter(base, share, progress))
            done += stop - start
            progress(done / total)
        if self.remarks:
            self.record["remarks"] = self.remarks
        self.record |= self.residual.summary()
        self.record["seconds_compute"] = round(time.monotonic() - started, 3)

    def volume(self, data: np.ndarray) -> Volume:
        """The result around its voxels, in the file's order."""
        return Volume(
            data,
            self.affine,
            slice_thickness=self.recipe.result_thickness,
            slice_axis=self.axis,
            stored_dtype=data.dtype,
            form_code=self.source.form_code,
        )

    def _slab(self, start: int, stop: int, progress: Callable[[float], None]) -> np.ndarray:
        """Rounded thin slices; measures the residual of the thick slices whose centres lie in the slab."""
        wide_start, wide_stop = self.pipeline.widened(start, stop)
        inside = slice(start - wide_start, stop - wide_start)
        if self.pipeline.diffuser is None:
            exact = self.pipeline.rows(self.y, wide_start, wide_stop, progress=progress)
        else:
            exact, spread = self.pipeline.sampled(self.y, wide_start, wide_stop)
            if self.spread is not None and spread is not None:
                self.spread[start:stop] = spread[inside]
        if self.added is not None:
            self.added[start:stop] = self.pipeline.added(self.y, exact[inside], start)
        stored, spoilt = self._stored(exact, wide_start)
        self.residual.add(
            self.pipeline.A,
            self.y,
            stored,
            spoilt,
            thick=self.pipeline.thick_in(start, stop),
            start=wide_start,
        )
        return stored[inside]

    def _stored(self, exact: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray | None]:
        """In the result's type, padding back in place; and which voxels are therefore not what was computed."""
        stored = np.empty(exact.shape, self.dtype)
        spoilt: np.ndarray | None = None
        nearest = np.floor(self.recipe.grid.centres).clip(0, self.recipe.n - 1).astype(int)
        for k, computed in enumerate(exact):
            stored[k] = rounded(computed, self.dtype)
            bad = np.abs(stored[k] - computed) > 1  # limited to the type, not rounded
            if self.padding is not None:
                pad = self.padding[nearest[start + k]]
                stored[k][pad] = self.given[nearest[start + k]][pad]
                bad |= pad
            if bad.any():
                spoilt = np.zeros(exact.shape, bool) if spoilt is None else spoilt
                spoilt[k] = bad
        return stored, spoilt

    def _recipe(self, volume: Volume, n: int) -> Recipe:
        o = self.options
        spacing = float(volume.spacing[self.axis])
        in_plane = float(np.delete(volume.spacing, self.axis).max())
        if o.factor is None and o.spacing is None and spacing <= NEARLY_ISOTROPIC * in_plane:
            sizes = " × ".join(f"{s:.2f}" for s in volume.spacing)
            raise GeometryError(
                f"already near-isotropic ({sizes} mm)", hint="give --factor or --spacing to go on"
            )
        if o.spacing is not None and not spacing / FACTOR_LIMIT <= o.spacing < spacing * (1 - 1e-6):
            raise UsageError(
                f"--spacing: {o.spacing:g} mm is not within {spacing / FACTOR_LIMIT:.4g}…{spacing:.4g} mm"
            )
        factor = spacing / o.spacing if o.spacing is not None else o.factor or 2.0
        thickness = o.thickness or volume.slice_thickness
        if thickness is None:
            thickness = spacing
            self.notes.append(
                f"slice thickness taken to be the spacing, {spacing:.4g} mm (--thickness gives the true one)"
            )
        if not 0.2 <= thickness / spacing <= 4:
            raise InputError(
                f"slice thickness {thickness:g} mm at a spacing of {spacing:g} mm: a ratio outside 0.2…4",
                hint="--thickness",
            )
        if o.out_thickness is not None and o.out_thickness >= thickness:
            raise UsageError(
                f"--out-thickness: {o.out_thickness:g} mm is not below the slices' {thickness:g} mm"
            )
        if n == 1 and o.model != "nearest":
            raise GeometryError("1 slice: it has no neighbour along z", hint="--model nearest repeats it")
        recipe = Recipe(
            n=n,
            factor=factor,
            spacing=spacing,
            thickness=thickness,
            profile=o.profile,
            thin_thickness=o.out_thickness,
            method=o.model,
            is_consistent=o.is_consistent,
        )
        if recipe.grid.m > NIFTI_LIMIT:
            raise UsageError(f"{recipe.grid.m:,} slices would come out, NIfTI holds {NIFTI_LIMIT:,}")
        return recipe

    def _check_domain(self, volume: Volume, weights: Mapping[str, Any]) -> None:
        """Warn (or under `strict` refuse) where the input lies outside what the weights were trained for."""
        self.outside: list[str] = []
        if not weights.get("ranges"):
            return
        plane = float(np.delete(volume.spacing, self.axis).max())
        found = measured(self.y, spacing=self.recipe.spacing, in_plane=plane, rho=self.recipe.rho)
        self.outside = outside_domain(found, weights["ranges"])
        if self.outside and self.options.is_strict:
            raise InputError(
                f"outside what the weights were trained for: {'; '.join(self.outside)}",
                hint="without --strict: a warning",
            )
        self.warnings += [f"outside what the weights were trained for: {finding}" for finding in self.outside]

    def _record(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        r = self.recipe
        return {
            "command": "upsample",
            "ctsr_version": __version__,
            "model": r.method,
            "factor": r.factor,
            "SliceThickness": round(r.result_thickness, 6),
            "SpacingBetweenSlices": round(r.spacing / r.factor, 6),
            "input_slice_thickness_mm": round(r.thickness, 6),
            "input_spacing_mm": round(r.spacing, 6),
            "profile": str(r.profile.kind),
            "consistency": "hard" if r.is_consistent and r.method not in CLASSICAL[:3] else "off",
            "slices_in": r.n,
            "slices_out": self.pipeline.m,
            "outside_trained_range": self.outside,
            "notice": "research use only; not a medical device",
        } | {
            k: v
            for k, v in weights.items()
            if k in ("weights", "weights_sha256", "device", "dtype", "diffusion")
        }

    def _thick_passes(self, start: int, stop: int) -> float:
        """Thick slices that pass the network for a slab, all doublings counted."""
        first, last = self.pipeline.source_range(start, stop)
        return (last - first) * (2**self.recipe.n_doublings - 1) or 1.0


class _Counter:
    """Turns thick slices that passed into a share of the whole."""

    def __init__(self, base: float, share: float, progress: Callable[[float], None]) -> None:
        self._at, self._share, self._progress = base, share, progress

    def __call__(self, thick: float) -> None:
        self._at += thick * self._share
        self._progress(min(1.0, self._at))


def _part(progress: Callable[[float], None], first: float, last: float) -> Callable[[float], None]:
    """A progress of its own, that fills first…last of the whole."""
    return lambda share: progress(first + (last - first) * share)


class _Residual:
    """|A x − y| over thick voxels, gathered slab by slab."""

    def __init__(self) -> None:
        self.total, self.count, self.largest, self.left_out = 0.0, 0, 0.0, 0

    def add(
        self,
        A: np.ndarray,
        y: np.ndarray,
        x: np.ndarray,
        spoilt: np.ndarray | None,
        *,
        thick: tuple[int, int],
        start: int,
    ) -> None:
        """x: thin slices from `start` on, which cover the support of the thick slices of the range `thick`."""
        a, b = thick
        part = A[a:b, start : start + len(x)]
        if a == b:
            return
        for rows in range(0, y.shape[1], ROWS):
            cut = slice(rows, rows + ROWS)
            difference = np.abs(apply_along_z(part, x[:, cut]) - y[a:b, cut])
            if spoilt is not None:
                difference = difference[apply_along_z(part > SEEN, spoilt[:, cut]) < 0.5]
            self.left_out += (b - a) * y[0, cut].size - difference.size
            self.count += difference.size
            self.total += float(difference.sum(dtype=np.float64))
            self.largest = max(self.largest, float(difference.max(initial=0)))

    def summary(self) -> dict[str, Any]:
        return {
            "consistency_residual_mean_hu": round(self.total / max(self.count, 1), 5),
            "consistency_residual_max_hu": round(self.largest, 5),
            "consistency_left_out_share": round(self.left_out / max(self.count + self.left_out, 1), 6),
        }


def _tiling(options: Options, engine: Engine | None, y: np.ndarray) -> Tiling:
    height, width = y.shape[1:]
    if engine is None:
        return Tiling(height, width, None, 0, 0, 1)
    reach, stride = engine.network.plane_reach, engine.network.stride
    patch = None if options.patch is None else options.patch[1:]
    if patch is not None and any(side % stride for side in patch):
        raise UsageError(f"--patch-size: {patch[0]} × {patch[1]} pixels are no multiples of {stride}")
    if patch is not None and patch[0] >= height and patch[1] >= width:
        patch = None
    overlap = reach if options.overlap is None else options.overlap
    return Tiling(height, width, patch, overlap, reach, stride, box=occupied_box(y, stride))


def _free() -> float:
    return float(available_bytes() or 8e9)
