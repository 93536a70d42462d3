"""`ctsr convert`."""

from __future__ import annotations

from pathlib import Path

import typer

from ctsr.cli.console import Console
from ctsr.cli.machine import n_cpus
from ctsr.workflows import options as o


def convert(
    console: Console,
    source: Path = typer.Argument(
        ..., metavar="SRC", help="DICOM: a folder with folders in it, a zip, or a file."
    ),
    target: Path | None = typer.Argument(
        None,
        metavar="[OUT]",
        help="A folder for all series, or a .nii.gz or .nii for exactly one; default: data/ of the project.",
    ),
    where: list[str] | None = o.option(
        "Only series with, say, SliceThickness<=1.5 or ConvolutionKernel~B30f|STANDARD or slices>=50;"
        " may be repeated, all must hold. Quote it: the shell reads < and |.",
        metavar="CONDITION",
    ),
    one_per_study: str | None = o.option("thinnest or thickest: one series of each study.", metavar="WHICH"),
    min_slices: int = o.option("Only series with at least so many slices.", 0, metavar="N", min=0),
    series: list[str] | None = o.option(
        "Only this SeriesInstanceUID; may be repeated.", metavar="UID", advanced=True
    ),
    originals_only: bool = o.option("Leave out images that were computed from other images.", False),
    split: bool = o.option("A stack whose spacing changes once becomes two volumes.", False),
    keep_tilt: bool = o.option(
        "Keep a gantry tilt as a sheared affine, nothing resampled. Training and upsample don't take it.",
        False,
        advanced=True,
    ),
    pad_hu: float = o.option("What scanner padding becomes.", -1024.0, metavar="HU", advanced=True),
    names: str = o.option(
        "hash, or patient: file names with the patient ID, for public collections only.", "hash"
    ),
    link: Path | None = o.option(
        "Write a table from names to patient, study and series, for its owner alone, outside OUT.",
        metavar="FILE",
        advanced=True,
    ),
    splits: str = o.option(
        "Shares of the patients in the lists, in percent.", "80,10,10", metavar="TRAIN,VAL,TEST"
    ),
    workers: int | None = o.option(
        "Series converted at once; default: as many as CPUs and memory allow.",
        min=1,
        metavar="N",
        advanced=True,
    ),
    overwrite: bool = o.overwrite(),
    skip_existing: bool = o.skip_existing(),
    shard: str | None = o.shard(),
    dry_run: bool = o.option("Show what would happen, write nothing; no pixel is decoded.", False),
    project: Path | None = o.project(),
    seed: int = o.seed(),
) -> None:
    """Turn DICOM into NIfTI that is right, or say why not: every file is converted, skipped or refused with its reason.

    Each series becomes a .nii.gz with a technical .json beside it; nothing of the patient is in either.
    A folder also gets manifest.csv and the lists of files that training reads, split by patient.

    A whole download into a project: ctsr convert DOWNLOAD --where "SliceThickness<=1.5" --project PROJECT
    """
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
        shares=parse_splits(splits), seed=seed, workers=workers, cpus=n_cpus(), shard=shard, overwrite=overwrite,
        skip_existing=skip_existing, is_dry_run=dry_run,
    )  # fmt: skip
    with console.progress(str(source)) as ticker:
        told = Report(console.note, console.warn, console.detail, ticker)
        outcome = run(source, target, conversion, project=project, report=told)
    if console.verbose or dry_run:
        console.table(outcome.series, "file", "name", "slices", "spacing_mm", "thickness_mm", "pixel_mm")
    console.table(outcome.table())
    outcome.raise_for_refusals(source)
    console.document(outcome.document())
