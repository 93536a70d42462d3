"""`evaluate` on files: which belong together, a loop over them, and what is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ctsr.core.volume import Volume
from ctsr.errors import CtsrError, InputError, UsageError
from ctsr.io.atomic import write_bytes
from ctsr.io.lists import VOLUME_SUFFIXES, read_table, stem, volumes_in
from ctsr.io.nifti import read_volume
from ctsr.io.scans import is_folder_of_scans, read_scan
from ctsr.workflows.evaluate import NAMED_MASKS, EvaluateOptions, compare, refuse_other_grid
from ctsr.workflows.evaluate_thin import ThinOptions, load, score_thin
from ctsr.workflows.evaluation import Evaluation, checked
from ctsr.workflows.figures import Picture
from ctsr.workflows.folder import Case, Report, about, run_cases
from ctsr.workflows.requests import Wanted

__all__ = ["evaluate_files", "evaluate_thin_files"]

C = TypeVar("C", bound=Case)
Scored = tuple[list[dict[str, Any]], list[str]]  # rows and notes


@dataclass(frozen=True, slots=True)
class _Files(Case):
    """The files of one case; the result (`source`) may be missing, which is that case's failure."""

    ref: Path | None = None
    thick: Path | None = None
    is_pair: bool = False  # from a pairs file: the truth may have slices that no thick one was made of


def evaluate_files(
    pred: Path,
    ref: Path | None,
    thick: Path | None,
    options: EvaluateOptions,
    wanted: Wanted = Wanted(),
    report: Report = Report(),
) -> Evaluation:
    """Measure a file, or the files of a folder, and write the report and the figure that are asked for.

    A folder is paired with folders by relative name. `ref` may be the pairs.csv that `simulate` writes: it
    names the truth and the thick file of each case, and `pred` is then the folder with the results.
    """
    if ref is None and thick is None:
        raise UsageError("neither REF nor --thick: nothing to compare with", hint="ctsr evaluate --help")
    is_pairs = ref is not None and ref.suffix.lower() == ".csv"
    is_one = not (is_pairs or is_folder_of_scans(pred))
    given, has_thick = [p for p in (pred, ref, thick) if p is not None], is_pairs or thick is not None
    known = checked(wanted, given, is_one=is_one, has_ref=ref is not None, has_thick=has_thick)
    _refuse_missing(given)
    cases, notes = _cases(pred, ref, thick, is_pairs=is_pairs)

    def work(case: _Files, picture: Picture | None) -> Scored:
        if case.ref is not None and _is_same_file(case.source, case.ref):
            raise InputError("is the reference itself", path=case.source)
        found: list[str] = []
        made, truth, measured = (
            None if path is None else read_scan(path, notes=found)
            for path in (case.source, case.ref, case.thick)
        )
        assert made is not None
        if truth is not None and case.is_pair:
            truth = _covered(truth, made)
        rows, more = compare(made, truth, measured, options, mask=_mask(options.mask, made), picture=picture)
        return rows, [*found, *more]

    return _evaluated(
        cases, work, wanted, report, options.mask, Evaluation(requirements=known, notes=notes), is_one
    )


def evaluate_thin_files(
    source: Path, options: ThinOptions, wanted: Wanted = Wanted(), report: Report = Report()
) -> Evaluation:
    """Simulate from a file or all files of a folder, thin, and score; conditions are about the first method."""
    is_one = not is_folder_of_scans(source)
    known = checked(wanted, [source], is_one=is_one and len(options.factors) == 1)
    _refuse_missing([source])
    thinners = load(options)
    cases = [Case(source.name, source, source)]
    if not is_one:
        cases = [Case(str(path.relative_to(source)), path, path) for path in volumes_in(source)]

    def work(case: Case, picture: Picture | None) -> Scored:
        found: list[str] = []
        truth = read_scan(case.source, notes=found)
        rows, more = score_thin(
            truth, options, thinners, mask=_mask(options.mask, truth), picture=picture,
            **({"progress": report.progress} if is_one else {}),  # of a folder, cases are counted
        )  # fmt: skip
        return rows, [*found, *more]

    evaluation = Evaluation(judged=options.methods[0], requirements=known)
    return _evaluated(cases, work, wanted, report, options.mask, evaluation, is_one)


def _refuse_missing(paths: Sequence[Path]) -> None:
    for path in paths:
        if not path.exists():
            raise InputError("does not exist", path=path)


def _evaluated(
    cases: Sequence[C],
    work: Callable[[C, Picture | None], Scored],
    wanted: Wanted,
    report: Report,
    mask: str,
    evaluation: Evaluation,
    is_one: bool,
) -> Evaluation:
    """`evaluation` with the rows of all cases, one row for each that failed, and all written that is wanted."""

    def one(case: C) -> Mapping[str, Any]:
        picture = None if wanted.figure is None else Picture()
        with about(case.source):
            rows, notes = work(case, picture)
        if wanted.figure is not None and picture is not None:
            write_bytes(wanted.figure, picture.png(case.name), overwrite=wanted.overwrite)
        named = {"case": case.name, "status": "ok"}
        evaluation.rows.extend(named | row | {"mask": Path(mask).name} for row in rows)
        evaluation.notes.extend(f"{case.source}: {note}" for note in notes)
        return {}

    def failed(case: C, error: CtsrError) -> None:
        row = {"case": case.name, "method": "", "status": "failed", "reason": error.reason}
        evaluation.rows.append(row)
        report.warn(f"failed: {error}")

    if is_one:
        one(cases[0])
    else:
        run_cases(cases, one, report, failed=failed)
    if wanted.out is not None:
        evaluation.write(wanted.out, overwrite=wanted.overwrite)
    return evaluation


def _mask(mask: str, like: Volume) -> str | np.ndarray:
    """The name of a mask, or a mask file as bool on the grid of `like`: where it is above 0."""
    if mask in NAMED_MASKS:
        return mask
    volume = read_volume(mask, allow_labels=True, allow_not_hu=True)
    with about(Path(mask)):
        refuse_other_grid(volume, like.affine, like.shape, "the volume")
    return volume.data > 0


def _cases(
    pred: Path, ref: Path | None, thick: Path | None, *, is_pairs: bool
) -> tuple[list[_Files], list[str]]:
    """What is to be measured, and notes on what takes no part."""
    if is_pairs:
        assert ref is not None
        if thick is not None:
            raise UsageError("--thick: the thick files are named by the pairs file", path=ref)
        if not pred.is_dir():
            raise UsageError("with a pairs file, the folder of the results is expected", path=pred)
        return _pairs(pred, ref), []
    others = [p for p in (ref, thick) if p is not None]
    if not is_folder_of_scans(pred):
        if folder := next((p for p in others if is_folder_of_scans(p)), None):
            raise UsageError(f"is a folder, {pred} is not", path=folder)
        return [_Files(pred.name, pred, pred, ref=ref, thick=thick)], []
    if file := next((p for p in others if not is_folder_of_scans(p)), None):
        raise UsageError(f"is not a folder, {pred} is one", path=file)
    names = [path.relative_to(pred) for path in volumes_in(pred)]
    lonely = {p: [f for f in volumes_in(p) if not _found(pred / f.relative_to(p)).is_file()] for p in others}
    cases = []
    for name in names:
        truth, measured = (None if folder is None else _found(folder / name) for folder in (ref, thick))
        cases.append(_Files(str(name), pred / name, pred / name, ref=truth, thick=measured))
    return cases, [
        f"{folder}: {len(files)} files have no result in {pred}, the first is {files[0].relative_to(folder)}"
        for folder, files in lonely.items()
        if files
    ]


def _pairs(results: Path, table: Path) -> list[_Files]:
    """Cases of a pairs file: columns `thin` and `thick`, relative to its folder or absolute."""
    rows = read_table(table, columns=("thin", "thick"))
    if not rows or not all(row["thin"] and row["thick"] for row in rows):
        raise InputError("names no pairs, or not both files of one", path=table)
    files = []
    for row in rows:
        result = _result_of(row["thick"], results)
        thin, thick = (table.parent / row[column] for column in ("thin", "thick"))
        files.append(_Files(row["thick"], result, result, ref=thin, thick=thick, is_pair=True))
    return files


def _result_of(thick: str, results: Path) -> Path:
    """The result for a thick file: by its name, with as many of its folders as the results have."""
    parts = [part for part in Path(thick).parts if part not in ("..", os.sep)]
    places = [_found(results.joinpath(*parts[i:])) for i in range(len(parts))]
    return next((place for place in places if place.is_file()), places[-1])


def _found(path: Path) -> Path:
    """The image of this name: a.nii and a.nii.gz are one case."""
    named = (path.with_name(stem(path) + suffix) for suffix in VOLUME_SUFFIXES)
    return path if path.is_file() else next((p for p in named if p.is_file()), path)


def _covered(ref: Volume, pred: Volume) -> Volume:
    """The part of `ref` that `pred` has as many voxels as, from the voxel on where `pred` begins."""
    start = np.rint(np.linalg.solve(ref.affine, pred.affine[:, 3])[:3]).astype(int)
    if (start < 0).any() or (start + pred.shape > ref.shape).any():
        return ref  # refused where the grids are compared
    affine = ref.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ start
    box = tuple(slice(a, a + n) for a, n in zip(start, pred.shape, strict=True))
    return replace(ref, data=ref.data[box], affine=affine)


def _is_same_file(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:  # refused where it is read
        return False
