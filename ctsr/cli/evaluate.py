"""`ctsr evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctsr.cli import options as o
from ctsr.errors import UsageError

__all__ = ["register"]

PANEL = "With --thin"
REF = (
    "Its truth on the same grid: a file, a folder with the same names, or the pairs.csv of ctsr simulate (it names the "
    "truth and the thick file of each case; PRED is then the folder of results, found by the thick file's name)."
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate", epilog="Research use only; not a medical device.")(evaluate)


def evaluate(
    pred: Annotated[
        Path | None,
        typer.Argument(metavar="PRED", help="Thin CT to judge: a NIfTI file, a DICOM series, or a folder."),
    ] = None,
    ref: Annotated[Path | None, typer.Argument(metavar="REF", help=REF)] = None,
    thick: Annotated[
        Path | None,
        o.option(
            "--thick", help="What PRED was made from, a file or folder: gives |A x − y|, no truth needed."
        ),
    ] = None,
    against: Annotated[
        str | None,
        o.option("--against", help="Methods shown on the same voxels (default nearest,linear,cubic)."),
    ] = None,
    mask: Annotated[
        str, o.option("--mask", help="Where to measure: body, lung, none (all voxels), or a mask file.")
    ] = "body",
    out: Annotated[
        Path | None, o.option("--out", metavar="FILE", help="Everything, as .csv or .json.")
    ] = None,
    figure: Annotated[
        Path | None,
        o.option("--figure", metavar="PNG", help="Picture of truth, thick, cubic, result, error."),
    ] = None,
    require: Annotated[
        list[str] | None,
        o.option("--require", metavar="COND", help='Such as "psnr>=35", repeatable; exit 9 if not met.'),
    ] = None,
    thickness: Annotated[
        float | None,
        o.length("--thickness", help="Slice thickness of THICK; default: its sidecar's, else the spacing."),
    ] = None,
    profile: Annotated[str, o.option("--profile", help=o.PROFILE)] = "gaussian",
    thin: Annotated[
        Path | None,
        o.option(
            "--thin",
            metavar="SRC",
            panel=PANEL,
            help="Instead of PRED: thin CT, a file or folder, to make thick, thin again and score.",
        ),
    ] = None,
    factor: Annotated[
        str | None, o.option("--factor", panel=PANEL, help="Such as 2,3,4 (default 2).")
    ] = None,
    model: Annotated[
        str | None,
        o.option(
            "--model",
            panel=PANEL,
            help="Such as baseline,inverse (default baseline). cubic is always added; --require is about the first.",
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        o.option(
            "--checkpoint", metavar="FILE", panel=PANEL, help="Your own weights; default: the shipped ones."
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        o.number(
            "--ratio",
            metavar="T/S",
            panel=PANEL,
            help="Slice thickness / spacing of the simulated slices (default 1).",
        ),
    ] = None,
    told_ratio: Annotated[
        float | None,
        o.number(
            "--told-ratio",
            metavar="T/S",
            panel=PANEL,
            help="The ratio that the methods are told; default: the true one.",
        ),
    ] = None,
    told_profile: Annotated[
        str | None,
        o.option(
            "--told-profile", panel=PANEL, help="The profile that they are told; default: the true one."
        ),
    ] = None,
    overwrite: o.Overwrite = False,
    device: o.Device = "auto",
    axis: o.Axis = None,
    threads: o.Threads = None,
    config: o.Config = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
    as_json: o.Json = False,
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
    console = o.console_of(quiet, verbose, as_json)
    o.use_threads(threads)
    from ctsr.cli.memory import keep_freed_memory
    from ctsr.workflows.evaluate import AGAINST, EvaluateOptions
    from ctsr.workflows.evaluate_files import evaluate_files, evaluate_thin_files
    from ctsr.workflows.evaluate_thin import ThinOptions
    from ctsr.workflows.evaluation import Wanted
    from ctsr.workflows.folder import Report
    from ctsr.workflows.profiles import read_profile

    keep_freed_memory()
    notes: list[str] = []
    shape = read_profile(profile, notes=notes)
    with console.progress(str(source)) as ticker:
        wanted = Wanted(
            requirements=require or [], out=out, figure=figure, overwrite=overwrite,
            report=Report(warn=console.warn, progress=ticker),
        )  # fmt: skip
        if thin is not None:
            what = ThinOptions(
                factors=[_number(part) for part in _parts(factor or "2")],
                methods=_parts(model or "baseline"), checkpoint=checkpoint,
                ratio=1.0 if ratio is None else ratio, told_ratio=told_ratio, profile=shape,
                mask=mask, axis=axis, device=device,
                told_profile=None if told_profile is None else read_profile(told_profile, notes=notes),
            )  # fmt: skip
            evaluation = evaluate_thin_files(thin, what, wanted)
        else:
            how = EvaluateOptions(
                mask=mask, against=AGAINST if against is None else _parts(against), thickness=thickness,
                profile=shape, axis=axis,
            )  # fmt: skip
            evaluation = evaluate_files(source, ref, thick, how, wanted)
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
