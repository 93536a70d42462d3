"""`ctsr evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ctsr.cli.console import Console
from ctsr.cli.machine import keep_freed_memory
from ctsr.errors import UsageError
from ctsr.workflows import options as o
from ctsr.workflows.requests import Wanted

REF = (
    "Its truth on the same grid: a file, a folder with the same names, or the pairs.csv of ctsr simulate (it names the "
    "truth and the thick file of each case; PRED is then the folder of results, found by the thick file's name)."
)


def _thin(help: str, **how: Any) -> Any:
    return o.option(help, panel="With --thin", **how)


def evaluate(
    console: Console,
    pred: Path | None = typer.Argument(
        None, metavar="PRED", help="Thin CT to judge: a NIfTI file, a DICOM series, or a folder."
    ),
    ref: Path | None = typer.Argument(None, metavar="REF", help=REF),
    *,
    thick: Path | None = o.option(
        "What PRED was made from, a file or folder: gives |A x − y|, no truth needed."
    ),
    against: str | None = o.option("Methods shown on the same voxels (default nearest,linear,cubic)."),
    mask: str = o.option("Where to measure: body, lung, none (all voxels), or a mask file.", "body"),
    wanted: Wanted,
    thickness: float | None = o.length("Slice thickness of THICK; default: its sidecar's, else the spacing."),
    profile: str = o.option(o.PROFILE, "gaussian"),
    thin: Path | None = _thin(
        "Instead of PRED: thin CT, a file or folder, to make thick, thin again and score.", metavar="SRC"
    ),
    factor: str | None = _thin("Such as 2,3,4 (default 2)."),
    model: str | None = _thin(
        "Such as baseline,inverse (default baseline). cubic is always added; --require is about the first."
    ),
    checkpoint: str | None = _thin("Your own weights; default: the shipped ones.", metavar="FILE"),
    ratio: float | None = _thin(
        "Slice thickness / spacing of the simulated slices (default 1).", metavar="T/S"
    ),
    told_ratio: float | None = _thin(
        "The ratio that the methods are told; default: the true one.", metavar="T/S"
    ),
    told_profile: str | None = _thin("The profile that they are told; default: the true one."),
    device: str = o.device(),
    axis: int | None = o.axis(),
    threads: int | None = o.threads(),
) -> None:
    """Measure a thin CT against its truth, against the thick CT it was made from, or both."""
    only_thin = {
        "--factor": factor, "--model": model, "--checkpoint": checkpoint, "--ratio": ratio,
        "--told-ratio": told_ratio, "--told-profile": told_profile,
    }  # fmt: skip
    if thin is None and (given := [name for name, value in only_thin.items() if value is not None]):
        raise UsageError(f"{given[0]} needs --thin")
    if thin is not None and (pred is not None or thick is not None or against or thickness is not None):
        raise UsageError("--thin stands instead of PRED, REF, --thick, --against and --thickness")
    if (source := thin or pred) is None:
        raise UsageError("neither PRED nor --thin is given", hint="ctsr evaluate --help")
    is_pairs = ref is not None and ref.suffix.lower() == ".csv"
    if against is not None and thick is None and not is_pairs:
        raise UsageError("--against needs --thick: the methods start from the thick file")
    from ctsr.workflows.evaluate import AGAINST, EvaluateOptions
    from ctsr.workflows.evaluate_files import evaluate_files, evaluate_thin_files
    from ctsr.workflows.evaluate_thin import ThinOptions
    from ctsr.workflows.folder import Report
    from ctsr.workflows.profiles import read_profile

    keep_freed_memory()
    notes: list[str] = []
    shape = read_profile(profile, notes=notes)
    with console.progress(str(source)) as ticker:
        told = Report(warn=console.warn, progress=ticker)
        if thin is not None:
            what = ThinOptions(
                factors=[_number(part) for part in _parts(factor or "2")],
                methods=_parts(model or "baseline"), checkpoint=checkpoint,
                ratio=1.0 if ratio is None else ratio, told_ratio=told_ratio, profile=shape,
                mask=mask, axis=axis, device=device,
                told_profile=None if told_profile is None else read_profile(told_profile, notes=notes),
            )  # fmt: skip
            evaluation = evaluate_thin_files(thin, what, wanted, told)
        else:
            how = EvaluateOptions(
                mask=mask, against=AGAINST if against is None else _parts(against), thickness=thickness,
                profile=shape, axis=axis,
            )  # fmt: skip
            evaluation = evaluate_files(source, ref, thick, how, wanted, told)
    for note in [*notes, *evaluation.notes]:
        console.note(note)
    for title, rows in evaluation.tables():
        console.table(rows, title=title)
    evaluation.raise_for_outcome(source)
    console.document(evaluation.document())


def _parts(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as exc:
        raise UsageError(f"--factor: {text} is not a number") from exc
