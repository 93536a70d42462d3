"""`evaluate --thin`: make thick slices from a thin volume, thin them again, score against what was there. No files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ctsr.core.geometry import canonical_turn, slice_axis
from ctsr.core.volume import Volume
from ctsr.core.zgrid import ZGrid
from ctsr.errors import UsageError
from ctsr.infer.pipeline import CLASSICAL
from ctsr.physics.profile import SliceProfile
from ctsr.physics.simulation import simulate_volume
from ctsr.workflows.evaluate import Judge, with_gain
from ctsr.workflows.evaluation import RESULT
from ctsr.workflows.figures import Picture
from ctsr.workflows.thinner import Thinner

__all__ = ["ThinOptions", "Thinners", "evaluate_thin", "load", "score_thin"]

Thinners = Mapping[float, Mapping[str, Thinner]]  # by factor and method


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinOptions:
    """What to simulate and what to run on it.

    ratio: slice thickness / spacing of the simulated slices; told_ratio: what the methods are told, None for
    the true one. profile, told_profile: likewise. methods: cubic is added, where gains are counted from.
    """

    factors: Sequence[float] = (2.0,)
    methods: Sequence[str] = ("baseline",)
    checkpoint: str | None = None
    ratio: float = 1.0
    told_ratio: float | None = None
    profile: SliceProfile = field(default_factory=SliceProfile)
    told_profile: SliceProfile | None = None
    mask: str = "body"
    axis: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.factors or not self.methods:
            raise UsageError("--factor and --model name one or more, separated by commas")
        for name, value in (("ratio", self.ratio), ("told-ratio", self.told_ratio)):
            if value is not None and not 0.2 <= value <= 4:
                raise UsageError(f"--{name}: {value:g} is not in 0.2…4")
        if self.checkpoint is not None and all(method in CLASSICAL for method in self.methods):
            raise UsageError("--checkpoint has no meaning without --model baseline or diffusion")


def load(o: ThinOptions) -> Thinners:
    """The methods, for any number of volumes."""
    return {
        factor: {
            method: Thinner(
                factor=factor, model=method, checkpoint=None if method in CLASSICAL else o.checkpoint,
                profile=o.told_profile or o.profile, axis=o.axis, device=o.device,
            )
            for method in dict.fromkeys((*o.methods, "cubic"))
        }
        for factor in o.factors
    }  # fmt: skip


def evaluate_thin(truth: Volume, **options: Any) -> list[dict[str, Any]]:
    """A row for each factor and method: simulate, thin, score. options: the fields of `ThinOptions`."""
    chosen = ThinOptions(**options)
    return score_thin(truth, chosen, load(chosen), mask=chosen.mask)[0]


def score_thin(
    truth: Volume,
    options: ThinOptions,
    thinners: Thinners,
    *,
    mask: str | np.ndarray,
    picture: Picture | None = None,
    progress: Callable[[float, str], None] = lambda share, words: None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each factor and method, and notes. mask: a name, or bool on the truth's grid."""
    o = options
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    axis, _ = slice_axis(truth, axis=o.axis)
    turn, spacing = canonical_turn(truth.affine, axis), float(truth.spacing[axis])
    for done, (factor, methods) in enumerate(thinners.items()):
        thickness = o.ratio * factor * spacing
        thick, found = simulate_volume(
            truth, factor=factor, thickness=thickness, profile=o.profile, axis=o.axis
        )
        notes += found
        told_ratio = o.ratio if o.told_ratio is None else o.told_ratio
        told = replace(thick, slice_thickness=told_ratio * factor * spacing)
        m = ZGrid(thick.shape[axis], factor).m  # the slab that truth and results share
        area = mask if isinstance(mask, str) else turn.apply(mask)[:m]
        judge = Judge(turn.apply(truth.data)[:m], spacing=spacing, mask=area)
        if picture is not None:
            picture.pixel_mm = float(truth.spacing[turn.order[2]])
            picture.add("truth", judge.truth, spacing)
            picture.add("thick", turn.apply(thick.data), float(thick.spacing[axis]))
        group = []
        for number, (method, thinner) in enumerate(methods.items()):
            progress((done + number / len(methods)) / len(thinners), f"{factor:g} ×, {method}")
            made = thinner(told)
            stack, record = turn.apply(made.volume.data), made.record
            if picture is not None and method in ("cubic", o.methods[0]):
                name = "cubic" if method == "cubic" else RESULT
                picture.add(name, stack, spacing, judge.spectrum(stack))
            outside = "; ".join(record["outside_trained_range"])
            if outside:
                notes.append(f"outside what {method} was trained for: {outside}")
            row = {
                "factor": factor,
                "method": method,
                "true_ratio": o.ratio,
                "told_ratio": record["input_slice_thickness_mm"] / record["input_spacing_mm"],
                "true_profile": str(o.profile.kind),
                "told_profile": record["profile"],
                **judge.score(stack),
                "residual_mean_hu": record["consistency_residual_mean_hu"],
                "residual_max_hu": record["consistency_residual_max_hu"],
                "residual_counted_percent": 100 * (1 - record["consistency_left_out_share"]),
                "seconds": record["seconds_compute"],
                "outside_trained_range": outside,
            }
            group.append(row | {k: record[k] for k in ("weights", "weights_sha256") if k in record})
        rows += with_gain(group)
    return rows, list(dict.fromkeys(notes))
