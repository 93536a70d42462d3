"""`ctsr convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctsr.cli import options as o
from ctsr.errors import UsageError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("convert", epilog="Research use only; not a medical device.")(convert)


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="DICOM: a folder with folders in it, a zip, or a file.")
    ],
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="[OUT]",
            help="A folder for all series, or a .nii.gz or .nii for exactly one; default: data/ of the project.",
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            metavar="CONDITION",
            help="Only series with, say, SliceThickness<=1.5 or ConvolutionKernel~B30f|STANDARD or slices>=50;"
            " may be repeated, all must hold. Quote it: the shell reads < and |.",
        ),
    ] = None,
    one_per_study: Annotated[
        str | None,
        typer.Option(
            "--one-per-study", metavar="WHICH", help="thinnest or thickest: one series of each study."
        ),
    ] = None,
    min_slices: Annotated[
        int,
        typer.Option("--min-slices", metavar="N", min=0, help="Only series with at least so many slices."),
    ] = 0,
    series: Annotated[
        list[str] | None,
        typer.Option(
            "--series",
            metavar="UID",
            help="Only this SeriesInstanceUID; may be repeated.",
            rich_help_panel=o.ADVANCED,
        ),
    ] = None,
    originals_only: Annotated[
        bool, typer.Option("--originals-only", help="Leave out images that were computed from other images.")
    ] = False,
    split: Annotated[
        bool, typer.Option("--split", help="A stack whose spacing changes once becomes two volumes.")
    ] = False,
    keep_tilt: Annotated[
        bool,
        typer.Option(
            "--keep-tilt",
            help="Keep a gantry tilt as a sheared affine, nothing resampled. Training and upsample don't take it.",
            rich_help_panel=o.ADVANCED,
        ),
    ] = False,
    pad_hu: Annotated[
        float,
        typer.Option(
            "--pad-hu",
            callback=o.finite,
            metavar="HU",
            help="What scanner padding becomes.",
            rich_help_panel=o.ADVANCED,
        ),
    ] = -1024.0,
    names: Annotated[
        str,
        typer.Option(
            "--names", help="hash, or patient: file names with the patient ID, for public collections only."
        ),
    ] = "hash",
    link: Annotated[
        Path | None,
        typer.Option(
            "--link",
            metavar="FILE",
            help="Write a table from names to patient, study and series, for its owner alone, outside OUT.",
            rich_help_panel=o.ADVANCED,
        ),
    ] = None,
    splits: Annotated[
        str,
        typer.Option(
            "--splits", metavar="TRAIN,VAL,TEST", help="Shares of the patients in the lists, in percent."
        ),
    ] = "80,10,10",
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            metavar="N",
            help="Series converted at once; default: as many as CPUs and memory allow.",
            rich_help_panel=o.ADVANCED,
        ),
    ] = None,
    overwrite: o.Overwrite = False,
    skip_existing: o.SkipExisting = False,
    shard: o.Shard = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would happen, write nothing; no pixel is decoded.")
    ] = False,
    project: o.Project = None,
    seed: o.Seed = 0,
    config: o.Config = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
    as_json: o.Json = False,
) -> None:
    """Turn DICOM into NIfTI that is right, or say why not: every file is converted, skipped or refused with its reason.

    Each series becomes a .nii.gz with a technical .json beside it; nothing of the patient is in either.
    A folder also gets manifest.csv and the lists of files that training reads, split by patient.

    A whole download into a project: ctsr convert DOWNLOAD --where "SliceThickness<=1.5" --project PROJECT
    """
    if "-" in (str(source), str(target)):
        raise UsageError(
            "reading from standard input or writing to standard output is not supported",
            path="-",
            hint="give a file",
        )
    console = o.console_of(quiet, verbose, as_json)
    from ctsr.workflows.convert import Conversion, parse_splits
    from ctsr.workflows.convert import convert as run
    from ctsr.workflows.convert_select import Selection, parse_condition
    from ctsr.workflows.folder import Report

    conversion = Conversion(
        selection=Selection(
            series=tuple(series or ()), where=tuple(map(parse_condition, where or ())), min_slices=min_slices,
            one_per_study=one_per_study,
        ),
        originals_only=originals_only, split=split, keep_tilt=keep_tilt, pad_hu=pad_hu, names=names, link=link,
        shares=parse_splits(splits), seed=seed, workers=workers, cpus=o.n_cpus(), shard=shard, overwrite=overwrite,
        skip_existing=skip_existing, is_dry_run=dry_run,
    )  # fmt: skip
    with console.progress(str(source)) as ticker:
        told = Report(console.note, console.warn, console.detail, ticker)
        outcome = run(source, target, conversion, project=project, report=told)
    if verbose or dry_run:
        shown = ("file", "name", "slices", "spacing_mm", "thickness_mm", "pixel_mm")
        console.table([{name: row.get(name) for name in shown} for row in outcome.series])
    console.table(outcome.table())
    outcome.raise_for_refusals(source)
    console.document(outcome.document())
