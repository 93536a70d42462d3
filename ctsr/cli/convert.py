"""`ctsr convert`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import typer

from ctsr.cli.console import Console
from ctsr.cli.machine import n_cpus
from ctsr.workflows.requests import Conversion


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
    *,
    request: Conversion,
) -> None:
    """Turn DICOM into NIfTI that is right, or say why not: every file is converted, skipped or refused with its reason.

    Each series becomes a .nii.gz with a technical .json beside it; nothing of the patient is in either.
    A folder also gets manifest.csv and the lists of files that training reads, split by patient.

    A whole download into a project: ctsr convert DOWNLOAD --where "SliceThickness<=1.5" --project PROJECT
    """
    from ctsr.workflows.convert import convert as run
    from ctsr.workflows.folder import Report

    with console.progress(str(source)) as ticker:
        told = Report(console.note, console.warn, console.detail, ticker)
        outcome = run(source, target, replace(request, cpus=n_cpus()), report=told)
    if console.verbose or request.is_dry_run:
        console.table(outcome.series, "file", "name", "slices", "spacing_mm", "thickness_mm", "pixel_mm")
    console.table(outcome.table())
    outcome.raise_for_refusals(source)
    console.document(outcome.document())
