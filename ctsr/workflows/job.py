"""One volume on its way to a thin one: what is asked, geometry, padding, plan, rounding, residual, record. No files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ctsr.core.geometry import canonical_turn, slice_axis
from ctsr.core.volume import AIR, PADDING_LIMIT, Volume, rounded, storage_type
from ctsr.errors import GeometryError, InputError, UsageError
from ctsr.infer.device import check_names
from ctsr.infer.pipeline import CLASSICAL, Pipeline, Recipe
from ctsr.infer.plan import make_plan
from ctsr.infer.sampling import Sampling
from ctsr.infer.windows import Tiling, occupied_box
from ctsr.io.memory import available_bytes
from ctsr.metrics.domain import measured, outside_domain
from ctsr.physics.operator import apply_along_z
from ctsr.physics.profile import ProfileKind, SliceProfile
from ctsr.workflows.folder import origin

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
            raise UsageError(f"--checkpoint and --project have no meaning with --model {self.model}")
        for name in ("vae_checkpoint", "stage_one"):
            if self.model != "diffusion" and getattr(self, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} has no meaning with --model {self.model}")
        if self.patch is not None and min(self.patch) < 1:
            raise UsageError(f"--patch-size: {self.patch} has a side below 1")
        if self.overlap is not None and self.patch is None:
            raise UsageError("--overlap has no meaning without --patch-size")
        if self.overlap is not None and self.patch and not 0 <= self.overlap < min(self.patch[1:]):
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
        self.affine = self.recipe.grid.affine(volume.affine, self.axis)
        i, j, k = (self.recipe.grid.m if a == self.axis else n for a, n in enumerate(volume.shape))
        self.shape = (i, j, k)
        self.given = self.y = y
        self.padding: np.ndarray | None = None
        low, high = float(volume.data.min()), float(volume.data.max())
        if not math.isfinite(low + high):  # possible in a caller's array, never in a file's
            raise InputError("holds voxels that are not finite")
        if low <= PADDING_LIMIT:
            self.padding = y <= PADDING_LIMIT
            self.y = np.where(self.padding, y.dtype.type(AIR), y)
        self.dtype = storage_type(volume.result_dtype, low, high)
        tiling = _tiling(options, engine, self.y)
        self.pipeline = Pipeline(self.recipe, tiling=tiling, engine=engine, diffuser=diffuser)
        self.can_stream = is_streamed and self.axis == 2
        self.plan = make_plan(
            self.pipeline,
            input_bytes=volume.data.nbytes,
            is_padded=self.padding is not None,
            itemsize=self.dtype.itemsize,
            is_streamed=self.can_stream,
            keeps_added=keeps_added,
            keeps_spread=keeps_spread,
            limit=options.max_memory or AVAILABLE_SHARE * (available_bytes() or 8e9),
        )
        self.pipeline.tiling = self.plan.tiling
        thin = (self.pipeline.m, *y.shape[1:])
        self.added = np.empty(thin, np.float32) if keeps_added else None
        self.spread = np.empty(thin, np.float32) if keeps_spread else None
        outside = self._outside(volume, weights.get("ranges"))
        r = self.recipe
        self.record: dict[str, Any] = origin("upsample") | {
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
            "outside_trained_range": outside,
        }
        told = ("weights", "weights_sha256", "device", "dtype", "diffusion")
        self.record |= {name: weights[name] for name in told if name in weights}

    def run(self, progress: Callable[[float], None] = lambda share: None) -> Iterator[tuple[int, np.ndarray]]:
        """(start, part (k, H, W) in the result's type) slab by slab.

        In the order of the file where z is its slowest axis. The record is complete when the last slab is taken.
        """
        started, residual = time.monotonic(), _Residual()
        slabs = self.plan.slabs[::-1] if self.turn.flips[0] else self.plan.slabs
        drawn = reached = 0.0
        if (diffuser := self.pipeline.diffuser) is not None:
            drawn = SAMPLING_SHARE
            diffuser.cuts, diffuser.remarks = dict(self.plan.cuts), self.remarks
            self.pipeline.draw(self.y, slabs, progress=lambda share: progress(drawn * share))
        total = sum(self._thick_passes(*slab) for slab in slabs)

        def passed(thick: float) -> None:
            nonlocal reached
            reached += thick
            progress(drawn + (1 - drawn) * min(1.0, reached / total))

        for start, stop in slabs:
            end = reached + self._thick_passes(start, stop)
            yield start, self._slab(start, stop, residual, passed)
            passed(end - reached)
        if self.remarks:
            self.record["remarks"] = self.remarks
        self.record |= residual.summary() | {"seconds_compute": round(time.monotonic() - started, 3)}

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

    def _slab(
        self, start: int, stop: int, residual: _Residual, progress: Callable[[float], None]
    ) -> np.ndarray:
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
        a, b = self.pipeline.thick_in(start, stop)
        residual.add(self.pipeline.A[a:b, wide_start:wide_stop], self.y[a:b], stored, spoilt)
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
        o, spacing = self.options, float(volume.spacing[self.axis])
        in_plane = float(np.delete(volume.spacing, self.axis).max())
        if o.factor is None and o.spacing is None and spacing <= NEARLY_ISOTROPIC * in_plane:
            sizes = " × ".join(f"{s:.2f}" for s in volume.spacing)
            hint = "give --factor or --spacing to go on"
            raise GeometryError(f"already near-isotropic ({sizes} mm)", hint=hint)
        least = spacing / FACTOR_LIMIT
        if o.spacing is not None and not least <= o.spacing < spacing * (1 - 1e-6):
            raise UsageError(f"--spacing: {o.spacing:g} mm is not within {least:.4g}…{spacing:.4g} mm")
        thickness = o.thickness or volume.slice_thickness
        if thickness is None:
            thickness, taken = spacing, f"slice thickness taken to be the spacing, {spacing:.4g} mm"
            self.notes.append(f"{taken} (--thickness gives the true one)")
        if not 0.2 <= thickness / spacing <= 4:
            found = f"slice thickness {thickness:g} mm at a spacing of {spacing:g} mm"
            raise InputError(f"{found}: a ratio outside 0.2…4", hint="--thickness")
        if (thin := o.out_thickness) is not None and thin >= thickness:
            raise UsageError(f"--out-thickness: {thin:g} mm is not below the slices' {thickness:g} mm")
        if n == 1 and o.model != "nearest":
            raise GeometryError("1 slice: it has no neighbour along z", hint="--model nearest repeats it")
        recipe = Recipe(
            n=n,
            factor=o.factor or 2.0 if o.spacing is None else spacing / o.spacing,
            spacing=spacing,
            thickness=thickness,
            profile=o.profile,
            thin_thickness=thin,
            method=o.model,
            is_consistent=o.is_consistent,
        )
        if recipe.grid.m > NIFTI_LIMIT:
            raise UsageError(f"{recipe.grid.m:,} slices would come out, NIfTI holds {NIFTI_LIMIT:,}")
        return recipe

    def _outside(self, volume: Volume, ranges: Mapping[str, Any] | None) -> list[str]:
        """Where the input lies outside what the weights were trained for: warned of, or under `strict` refused."""
        if not ranges:
            return []
        plane = float(np.delete(volume.spacing, self.axis).max())
        r = self.recipe
        found = measured(self.y, factor=r.factor, spacing=r.spacing, in_plane=plane, rho=r.rho)
        outside, words = outside_domain(found, ranges), "outside what the weights were trained for"
        if outside and self.options.is_strict:
            raise InputError(f"{words}: {'; '.join(outside)}", hint="without --strict: a warning")
        self.warnings += [f"{words}: {finding}" for finding in outside]
        return outside

    def _thick_passes(self, start: int, stop: int) -> float:
        """Thick slices that pass the network for a slab, all doublings counted."""
        first, last = self.pipeline.source_range(start, stop)
        return (last - first) * (2**self.recipe.n_doublings - 1) or 1.0


class _Residual:
    """|A x − y| over thick voxels, gathered slab by slab."""

    def __init__(self) -> None:
        self.total, self.count, self.largest, self.left_out = 0.0, 0, 0.0, 0

    def add(self, A: np.ndarray, y: np.ndarray, x: np.ndarray, spoilt: np.ndarray | None) -> None:
        """y: thick slices, (k, H, W); x: thin ones, (j, H, W), that cover their support; A: (k, j)."""
        for rows in range(0, y.shape[1] if len(y) else 0, ROWS):
            cut = slice(rows, rows + ROWS)
            difference = np.abs(apply_along_z(A, x[:, cut]) - y[:, cut])
            if spoilt is not None:
                difference = difference[apply_along_z(A > SEEN, spoilt[:, cut]) < 0.5]
            self.left_out += y[:, cut].size - difference.size
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
