"""`evaluate`: how near a thin volume is to its truth, and whether it agrees with what it was made from. No files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ctsr.core.geometry import canonical_turn, corners, slice_axis
from ctsr.core.volume import AIR, PADDING_LIMIT, Volume
from ctsr.core.zgrid import ZGrid
from ctsr.errors import InputError, UsageError
from ctsr.infer.pipeline import CLASSICAL
from ctsr.metrics.masks import Regions
from ctsr.metrics.report import residual_summary, score
from ctsr.metrics.spectrum import power_ratio
from ctsr.physics.operator import apply_along_z
from ctsr.physics.profile import SliceProfile
from ctsr.workflows.evaluation import GAIN, RESULT
from ctsr.workflows.figures import Picture, Spectrum
from ctsr.workflows.job import Job
from ctsr.workflows.thinner import Thinner

__all__ = [
    "AGAINST", "NAMED_MASKS", "EvaluateOptions", "Judge", "compare", "evaluate_volumes", "refuse_other_grid",
    "with_gain",
]  # fmt: skip

AGAINST = ("nearest", "linear", "cubic")
NAMED_MASKS = ("body", "lung", "none")
SAME_PLACE_MM = 1e-3  # a corner further away than this is another grid
_NUDGES = (0.0, 3e-7, -3e-7)  # spacings are float32 in a file: 22 × 2.4999999 must be 55 slices
_MEETS = 1e-4  # a weight of A below this carries nothing from a padded voxel


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """How to measure. thickness: of the thick slices, mm; None: the sidecar's, else the spacing.

    mask: body, lung, none, or the path of a mask on the result's grid.
    """

    mask: str = "body"
    against: Sequence[str] = AGAINST
    thickness: float | None = None
    profile: SliceProfile = field(default_factory=SliceProfile)
    axis: int | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.against if name not in CLASSICAL]:
            raise UsageError(f"--against: {unknown[0]} is none of {', '.join(CLASSICAL)}")
        if self.thickness is not None and not 0 < self.thickness < 1e3:
            raise UsageError(f"--thickness: {self.thickness:g} mm is not a length")


class Judge:
    """Scores any number of results against one truth, all on the same voxels. Padding counts as air."""

    def __init__(self, truth: np.ndarray, *, spacing: float, mask: str | np.ndarray = "body") -> None:
        """truth: (D, H, W) HU; spacing: of its slices, mm; mask: body, lung, none, or (D, H, W) bool."""
        self.truth, self._spacing = _without_padding(truth), spacing
        self._regions = Regions.of(self.truth, mask)

    def score(self, result: np.ndarray) -> dict[str, float | bool | None]:
        """The row of metrics of one result, (D, H, W) HU."""
        return score(_without_padding(result), self.truth, self._regions, spacing_z_mm=self._spacing)

    def spectrum(self, result: np.ndarray) -> Spectrum | None:
        """Frequencies, and the power of the result over the truth's; None where there is too little."""
        return power_ratio(_without_padding(result), self.truth, self._regions.body)


def evaluate_volumes(
    pred: Volume,
    ref: Volume | None = None,
    *,
    thick: Volume | None = None,
    mask: str | np.ndarray = "body",
    against: Sequence[str] = AGAINST,
    thickness: float | None = None,
    profile: SliceProfile | None = None,
    axis: int | None = None,
) -> dict[str, Any]:
    """Every metric of a thin volume: `ctsr.evaluate(pred, ref, thick=thick)["psnr_4095_db"]`.

    ref: the truth, on the same grid: fidelity. thick: what `pred` was made from: the residual |A x − y|.
    mask: body, lung, none, or a bool array on pred's grid.
    Beside the metrics: `against`, the same rows for other methods made from `thick`, and `notes`.
    Raises InputError where the grids do not belong together.
    """
    options = EvaluateOptions(
        against=against, thickness=thickness, profile=profile or SliceProfile(), axis=axis
    )
    rows, notes = compare(pred, ref, thick, options, mask=mask)
    result, *others = ({k: v for k, v in row.items() if k != "method"} for row in rows)
    names = [row["method"] for row in rows[1:]]
    return result | {"against": dict(zip(names, others, strict=True)), "notes": notes}


def compare(
    pred: Volume,
    ref: Volume | None,
    thick: Volume | None,
    options: EvaluateOptions,
    *,
    mask: str | np.ndarray = "body",
    picture: Picture | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for the result and, with a thick volume, one for each of `options.against`; and notes.

    picture: gets what a figure shows.
    """
    if ref is None and thick is None:
        raise UsageError("neither REF nor --thick: nothing to compare with")
    if isinstance(mask, str) and mask not in NAMED_MASKS:
        raise UsageError(f"mask: {mask} is not body, lung or none")
    if ref is not None:
        refuse_other_grid(pred, ref.affine, ref.shape, "the reference")
    job = None if thick is None else _job(pred, thick, options)
    if job is None:
        axis, note = slice_axis(pred, axis=options.axis)
        notes = [note] if note else []
    else:
        axis, notes = job.axis, list(job.notes)
    turn = canonical_turn(pred.affine, axis)
    spacing = float(pred.spacing[axis])
    area = mask if isinstance(mask, str) else turn.apply(mask)
    judge = None if ref is None else Judge(turn.apply(ref.data), spacing=spacing, mask=area)
    bands: Mapping[str, np.ndarray] = {}
    if job is not None:
        bands = Regions.of(job.y, "none" if isinstance(mask, str) and mask == "none" else "body").bands
    if picture is not None:
        picture.pixel_mm = float(pred.spacing[turn.order[2]])
        if judge is not None:
            picture.add("truth", judge.truth, spacing)
        if job is not None:
            picture.add("thick", job.y, job.recipe.spacing)
    rows = []
    for name in (RESULT, *(options.against if job else ())):
        volume = pred
        if name != RESULT and job is not None:
            volume = _thinner(name, job.recipe.factor, options)(job.source).volume
        stack = turn.apply(volume.data)
        row: dict[str, Any] = {"method": name}
        if judge is not None:
            row |= judge.score(stack)
        if job is not None:
            row |= _certificate(job, stack, bands)
        rows.append(row)
        if picture is not None and name in (RESULT, "cubic"):
            spectrum = None if judge is None else judge.spectrum(stack)
            picture.add(name, _without_padding(stack), spacing, spectrum)
    return with_gain(rows), notes


def with_gain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one truth, each with its gain over the row of cubic, where there is one."""
    cubic = next((row.get("psnr_4095_db") for row in rows if row["method"] == "cubic"), None)
    for row in rows:
        if cubic is not None and row.get("psnr_4095_db") is not None:
            row[GAIN] = row["psnr_4095_db"] - cubic
    return rows


def refuse_other_grid(volume: Volume, affine: np.ndarray, shape: tuple[int, int, int], whose: str) -> None:
    """InputError where the volume's grid is not the one with this affine and shape."""
    if volume.shape != shape:
        found, expected = (" × ".join(map(str, each)) for each in (volume.shape, shape))
        raise InputError(f"has {found} voxels, {whose} has {expected}")
    distance = np.linalg.norm(corners(volume.affine, shape) - corners(affine, shape), axis=1).max()
    if distance > SAME_PLACE_MM:
        raise InputError(f"a corner lies {distance:.4g} mm from where {whose} has it")


def _job(pred: Volume, thick: Volume, options: EvaluateOptions) -> Job:
    """The thick volume prepared for `pred`'s grid: A, y and what counts; InputError where they differ."""
    axis, _ = slice_axis(thick, axis=options.axis)
    s, t = float(thick.spacing[axis]), float(pred.spacing[axis])
    if s / t <= 1 + 1e-4:
        raise InputError(f"its slices are {t:.4g} mm apart, the thick file's {s:.4g} mm: not a thinner stack")
    n, m = thick.shape[axis], pred.shape[axis]
    factors = [s / t * (1 + nudge) for nudge in _NUDGES]
    factor = next((f for f in factors if ZGrid(n, f).m == m), factors[0])
    job = _thinner("cubic", factor, options).job(thick)
    refuse_other_grid(pred, job.affine, job.shape, f"the grid in the slab of {n} thick slices of {s:.4g} mm")
    return job


def _thinner(model: str, factor: float, options: EvaluateOptions) -> Thinner:
    return Thinner(
        model=model, factor=factor, thickness=options.thickness, profile=options.profile, axis=options.axis
    )


def _certificate(job: Job, x: np.ndarray, bands: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """|A x − y| of a thin stack, over thick voxels that neither padding nor a type's limit reached."""
    spoilt = x <= PADDING_LIMIT
    if x.dtype.kind in "iu":
        limits = np.iinfo(x.dtype)
        spoilt |= (x == limits.max) | ((x == limits.min) & (limits.min < 0))
    A = job.pipeline.A
    valid = None if job.padding is None else ~job.padding
    if spoilt.any():
        met = apply_along_z((A > _MEETS).astype(np.float64), spoilt) > 0.5
        valid = ~met if valid is None else valid & ~met
    return residual_summary(apply_along_z(A, _without_padding(x)) - job.y, bands, valid)


def _without_padding(data: np.ndarray) -> np.ndarray:
    padding = data <= PADDING_LIMIT
    return np.where(padding, data.dtype.type(AIR), data) if padding.any() else data
