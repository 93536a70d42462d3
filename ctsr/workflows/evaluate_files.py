"""`evaluate` on files: which belong together, a loop over them, and what is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ctsr.core.volume import Volume
from ctsr.errors import CtsrError, InputError, UsageError
from ctsr.io.lists import VOLUME_SUFFIXES, read_table, stem, volumes_in
from ctsr.io.scans import is_folder_of_scans, read_scan
from ctsr.workflows.evaluate import NAMED_MASKS, EvaluateOptions, Picture, compare, read_mask
from ctsr.workflows.evaluation import Evaluation, Wanted, about
from ctsr.workflows.folder import Case, run_cases

__all__ = ["evaluate_files", "run_all"]

_NOTHING_MORE = Wanted()


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of one case; pred may be missing, which is that case's failure."""

    name: str
    pred: Path
    ref: Path | None
    thick: Path | None
    is_pair: bool = False  # from a pairs file: the truth may have slices that no thick one was made of


def evaluate_files(
    pred: Path,
    ref: Path | None,
    thick: Path | None,
    options: EvaluateOptions,
    wanted: Wanted = _NOTHING_MORE,
) -> Evaluation:
    """Measure a file, or the files of a folder, and write the report and the figure that are asked for.

    A folder is paired with folders by relative name. `ref` may be the pairs.csv that `simulate` writes: it
    names the truth and the thick file of each case, and `pred` is then the folder with the results.
    """
    if ref is None and thick is None:
        raise UsageError("neither REF nor --thick: nothing to compare with", hint="ctsr evaluate --help")
    is_pairs = ref is not None and ref.suffix.lower() == ".csv"
    inputs = [p for p in (pred, ref, thick) if p is not None]
    is_one = not (is_pairs or is_folder_of_scans(pred))
    known = wanted.checked(
        inputs, is_one=is_one, has_ref=ref is not None, has_thick=is_pairs or thick is not None
    )
    cases, notes = _cases(pred, ref, thick, is_pairs=is_pairs)

    def work(case: _Files) -> list[dict[str, Any]]:
        rows, found = _evaluate_case(case, options, wanted)
        notes.extend(f"{case.pred}: {note}" for note in found)
        return [row | {"mask": Path(options.mask).name} for row in rows]

    if is_one:
        rows: list[dict[str, Any]] = [{"case": cases[0].name, "status": "ok"} | r for r in work(cases[0])]
    else:
        by_name = {case.name: case for case in cases}
        given = [Case(case.name, case.pred, case.pred) for case in cases]
        rows = run_all(given, lambda case: work(by_name[case.name]), wanted)
    evaluation = Evaluation(rows, requirements=known, notes=notes)
    if wanted.out is not None:
        evaluation.write(wanted.out, overwrite=wanted.overwrite)
    return evaluation


def run_all(
    cases: Sequence[Case],
    work: Callable[[Case], list[dict[str, Any]]],
    wanted: Wanted,
) -> list[dict[str, Any]]:
    """The rows of all cases, and one row for each that failed."""
    rows: list[dict[str, Any]] = []

    def one(case: Case) -> Mapping[str, Any]:
        rows.extend({"case": case.name, "status": "ok"} | row for row in work(case))
        return {}

    def failed(case: Case, error: CtsrError) -> None:
        rows.append({"case": case.name, "method": "", "status": "failed", "reason": error.reason})
        wanted.warn(f"failed: {error}")

    run_cases(
        cases,
        one,
        failed=failed,
        done=lambda n: wanted.progress(n / len(cases), f"{n} of {len(cases)} cases"),
    )
    return rows


def _evaluate_case(
    case: _Files, options: EvaluateOptions, wanted: Wanted
) -> tuple[list[dict[str, Any]], list[str]]:
    if case.ref is not None and _is_same_file(case.pred, case.ref):
        raise InputError("is the reference itself", path=case.pred)
    notes: list[str] = []
    pred = read_scan(case.pred, notes=notes)
    ref = None if case.ref is None else read_scan(case.ref, notes=notes)
    thick = None if case.thick is None else read_scan(case.thick, notes=notes)
    mask = options.mask if options.mask in NAMED_MASKS else read_mask(Path(options.mask), pred)
    if ref is not None and case.is_pair:
        ref = _covered(ref, pred)
    pictures: list[Picture] = []

    def picture(pixel: float) -> Picture:
        pictures.append(Picture(pixel))
        return pictures[0]

    with about(case.pred):
        rows, found = compare(
            pred, ref, thick, options, mask=mask, picture=picture if wanted.figure is not None else None
        )
    if wanted.figure is not None:
        pictures[0].write(wanted.figure, title=case.name, overwrite=wanted.overwrite)
    return rows, notes + found


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
        return [_Files(pred.name, pred, ref, thick)], []
    if file := next((p for p in others if not is_folder_of_scans(p)), None):
        raise UsageError(f"is not a folder, {pred} is one", path=file)
    found = {_key(p, pred): p for p in volumes_in(pred)}
    refs, thicks = (None if p is None else {_key(f, p): f for f in volumes_in(p)} for p in (ref, thick))
    notes = []
    for folder, there in ((ref, refs), (thick, thicks)):
        if lonely := sorted(set(there or ()) - set(found)):
            notes.append(f"{folder}: {len(lonely)} files have no result in {pred}, the first is {lonely[0]}")
    return [
        _Files(
            str(path.relative_to(pred)),
            path,
            None if refs is None or ref is None else refs.get(key, ref / path.relative_to(pred)),
            None if thicks is None or thick is None else thicks.get(key, thick / path.relative_to(pred)),
        )
        for key, path in found.items()
    ], notes


def _key(path: Path, folder: Path) -> str:
    """A file's relative name without its suffix: a.nii.gz and a.nii are one case."""
    return (path.relative_to(folder).parent / stem(path)).as_posix()


def _pairs(results: Path, table: Path) -> list[_Files]:
    """Cases of a pairs file: columns `thin` and `thick`, relative to its folder or absolute."""
    rows = read_table(table, columns=("thin", "thick"))
    if not rows:
        raise InputError("names no pairs", path=table)
    files = []
    for row in rows:
        thin, thick = (table.parent / row[column] for column in ("thin", "thick"))
        files.append(_Files(row["thick"], _result_of(row["thick"], results), thin, thick, is_pair=True))
    return files


def _result_of(thick: str, results: Path) -> Path:
    """The result for a thick file: by its name, with as many of its folders as the results have."""
    parts = Path(thick).parts
    names = [Path(*parts[i:]) for i in range(len(parts)) if not Path(*parts[i:]).is_absolute()]
    for name in names:
        for suffix in VOLUME_SUFFIXES:
            path = results / name.parent / (stem(name) + suffix)
            if path.is_file():
                return path
    return results / names[-1]


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
