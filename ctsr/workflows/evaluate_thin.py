"""`evaluate --thin`: make thick slices from a thin volume, thin them again, score against what was there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ctsr.core.geometry import canonical_turn, slice_axis
from ctsr.core.volume import Volume
from ctsr.core.zgrid import ZGrid
from ctsr.errors import InputError, UsageError
from ctsr.io.lists import volumes_in
from ctsr.io.scans import is_folder_of_scans, read_scan
from ctsr.physics.profile import SliceProfile
from ctsr.physics.simulation import simulate_volume
from ctsr.workflows.evaluate import NAMED_MASKS, Judge, Picture, read_mask, with_gain
from ctsr.workflows.evaluate_files import run_all
from ctsr.workflows.evaluation import Evaluation, Wanted, about
from ctsr.workflows.folder import Case
from ctsr.workflows.thinner import Thinner

__all__ = ["Thin", "ThinOptions", "evaluate_thin", "evaluate_thin_files"]

_NOTHING_MORE = Wanted()


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
        if self.checkpoint is not None and "baseline" not in self.methods:
            raise UsageError("--checkpoint has no meaning without --model baseline")


@dataclass(slots=True)
class Thin:
    """The methods of `ThinOptions`, loaded once, for any number of volumes."""

    options: ThinOptions
    _thinners: dict[tuple[float, str], Thinner] = field(default_factory=dict)

    def __post_init__(self) -> None:
        o = self.options
        for factor in dict.fromkeys(o.factors):
            for method in dict.fromkeys((*o.methods, "cubic")):
                checkpoint = o.checkpoint if method == "baseline" else None
                self._thinners[factor, method] = Thinner(
                    factor=factor, model=method, checkpoint=checkpoint, profile=o.told_profile or o.profile,
                    axis=o.axis, device=o.device,
                )  # fmt: skip

    def __call__(
        self,
        truth: Volume,
        *,
        mask: str | np.ndarray = "body",
        picture: Picture | None = None,
        progress: Callable[[float, str], None] = lambda share, words: None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """A row for each factor and method, and notes. mask: a name, or bool on the truth's grid."""
        rows: list[dict[str, Any]] = []
        notes: list[str] = []
        axis, _ = slice_axis(truth, axis=self.options.axis)
        turn = canonical_turn(truth.affine, axis)
        for done, factor in enumerate(factors := list(dict.fromkeys(self.options.factors))):
            thick, told = self._simulated(truth, axis, factor, notes)
            m = ZGrid(thick.shape[axis], factor).m
            judge = Judge(
                turn.apply(truth.data)[:m],
                spacing=float(truth.spacing[axis]),
                mask=mask if isinstance(mask, str) else turn.apply(mask)[:m],
            )
            if picture is not None:
                picture.add("truth", judge.truth, float(truth.spacing[axis]))
                picture.add("thick", turn.apply(thick.data), float(thick.spacing[axis]))
            group = []
            methods = [method for f, method in self._thinners if f == factor]
            for number, method in enumerate(methods):
                progress((done + number / len(methods)) / len(factors), f"{factor:g} ×, {method}")
                row = self._row(judge, told, factor, method, turn.apply, picture)
                if row["outside_trained_range"]:
                    notes.append(f"outside what {method} was trained for: {row['outside_trained_range']}")
                group.append(row)
            rows += with_gain(group)
        return rows, list(dict.fromkeys(notes))

    def _simulated(self, truth: Volume, axis: int, factor: float, notes: list[str]) -> tuple[Volume, Volume]:
        """The thick volume, and the same with the thickness that the methods are told."""
        o = self.options
        spacing = factor * float(truth.spacing[axis])
        thick, found = simulate_volume(
            truth, factor=factor, thickness=o.ratio * spacing, profile=o.profile, axis=o.axis
        )
        notes += found
        told = o.ratio if o.told_ratio is None else o.told_ratio
        return thick, replace(thick, slice_thickness=told * spacing)

    def _row(
        self,
        judge: Judge,
        thick: Volume,
        factor: float,
        method: str,
        turned: Callable[[np.ndarray], np.ndarray],
        picture: Picture | None,
    ) -> dict[str, Any]:
        made = self._thinners[factor, method](thick)
        stack, record = turned(made.volume.data), made.record
        if picture is not None and method in ("cubic", self.options.methods[0]):
            name = "cubic" if method == "cubic" else "result"
            picture.add(name, stack, float(made.volume.spacing[made.volume.slice_axis or 0]))
            if spectrum := judge.spectrum(stack):
                picture.spectra[name] = spectrum
        return {
            "factor": factor,
            "method": method,
            "true_ratio": self.options.ratio,
            "told_ratio": record["input_slice_thickness_mm"] / record["input_spacing_mm"],
            "true_profile": str(self.options.profile.kind),
            "told_profile": record["profile"],
            **judge.score(stack),
            "residual_mean_hu": record["consistency_residual_mean_hu"],
            "residual_max_hu": record["consistency_residual_max_hu"],
            "residual_counted_percent": 100 * (1 - record["consistency_left_out_share"]),
            "seconds": record["seconds_compute"],
            "outside_trained_range": "; ".join(record["outside_trained_range"]),
        } | {name: record[name] for name in ("weights", "weights_sha256") if name in record}


def evaluate_thin(truth: Volume, **options: Any) -> list[dict[str, Any]]:
    """A row for each factor and method: simulate, thin, score. options: the fields of `ThinOptions`."""
    chosen = ThinOptions(**options)
    return Thin(chosen)(truth, mask=chosen.mask)[0]


def evaluate_thin_files(
    source: Path,
    options: ThinOptions,
    wanted: Wanted = _NOTHING_MORE,
) -> Evaluation:
    """The same for a file or all files of a folder, with the report and the figure that are asked for.

    Requirements are about the first of `options.methods`.
    """
    is_one = not is_folder_of_scans(source)
    one_picture = is_one and len(options.factors) == 1
    known = wanted.checked([source], is_one=one_picture, has_ref=True, has_thick=True)
    if is_one and not source.exists():
        raise InputError("does not exist", path=source)
    thin = Thin(options)
    notes: list[str] = []

    def work(case: Case) -> list[dict[str, Any]]:
        found: list[str] = []
        truth = read_scan(case.source, notes=found)
        is_named = options.mask in NAMED_MASKS
        mask = options.mask if is_named else read_mask(Path(options.mask), truth)
        axis, _ = slice_axis(truth, axis=options.axis)
        pixel = float(truth.spacing[canonical_turn(truth.affine, axis).order[2]])
        picture = Picture(pixel) if wanted.figure is not None else None
        with about(case.source):
            rows, said = thin(
                truth, mask=mask, picture=picture, progress=wanted.progress if is_one else _silent
            )
        if wanted.figure is not None and picture is not None:
            picture.write(wanted.figure, title=case.name, overwrite=wanted.overwrite)
        notes.extend(f"{case.source}: {note}" for note in [*found, *said])
        return [row | {"mask": Path(options.mask).name} for row in rows]

    if is_one:
        case = Case(source.name, source, source)
        rows: list[dict[str, Any]] = [{"case": case.name, "status": "ok"} | row for row in work(case)]
    else:
        cases = [Case(str(path.relative_to(source)), path, path) for path in volumes_in(source)]
        rows = run_all(cases, work, wanted)
    evaluation = Evaluation(rows, judged=options.methods[0], requirements=known, notes=notes)
    if wanted.out is not None:
        evaluation.write(wanted.out, overwrite=wanted.overwrite)
    return evaluation


def _silent(share: float, words: str) -> None:
    """Within a folder the cases are counted, not the methods."""
