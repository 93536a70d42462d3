"""`ctsr simulate`."""

from __future__ import annotations

from pathlib import Path

import typer

from ctsr.cli.console import Console
from ctsr.errors import UsageError
from ctsr.workflows import options as o
from ctsr.workflows.requests import Simulation

SRC = "Thin CT: a NIfTI file, a DICOM series, or a folder of either."
OUT = "Where the thick CT goes: .nii.gz, .nii, or a folder."
PHANTOMS = (
    "Make N synthetic thin scans instead, in OUT/data, with the lists that training reads. The one argument is then "
    "OUT, a project folder; default: the current one."
)


def simulate(
    console: Console,
    asked: Simulation,
    source: Path | None = typer.Argument(None, metavar="[SRC]", help=SRC),
    target: Path | None = typer.Argument(None, metavar="[OUT]", help=OUT),
    phantoms: int | None = o.option(PHANTOMS, metavar="N"),
    project: Path | None = o.project(),
) -> None:
    """Make the thick-slice CT that a scanner would have stored of a thin one, to try and to measure with.

    Upsampled by the same factor, the result has the input's own slices again: compare the two.

    A folder gives the same tree and pairs.csv. Scans to try a training on: ctsr simulate --phantoms 8 PROJECT
    """
    if project is not None and source is not None:
        raise UsageError("--project stands instead of OUT, with --phantoms alone")
    from ctsr.workflows.folder import Report, raise_for_failures
    from ctsr.workflows.simulate import phantoms as make_phantoms
    from ctsr.workflows.simulate import simulate as run

    with console.progress("phantoms" if phantoms is not None else str(source)) as ticker:
        told = Report(console.note, console.warn, console.detail, ticker)
        if phantoms is not None:
            plain = Simulation(seed=asked.seed, overwrite=asked.overwrite)
            if target is not None or asked != plain:
                raise UsageError("--phantoms takes the project folder and --seed, no scan and no slices")
            folder = source or project or Path()
            rows = make_phantoms(phantoms, folder, seed=asked.seed, overwrite=asked.overwrite, report=told)
        elif source is None or target is None:
            raise UsageError("SRC and OUT are needed", hint="or --phantoms N OUT")
        else:
            rows = run(source, target, asked, told)
    row = rows[0]
    if phantoms is not None:
        console.document({"scans": rows})
        console.table(rows, "file", "set", "slices", "spacing_mm", "pixel_mm")
    elif "case" in row:  # a folder
        shown = ("case", "status", "reason", "slices_in", "slices_out", "spacing_mm", "thickness_mm")
        console.table(rows, *shown)
        raise_for_failures(rows, path=source)
        console.document({"cases": rows})
    else:
        console.document(row)
        grid = f"{row['slices_out']} slices of {row['thickness_mm']:g} mm, {row['spacing_mm']:g} mm apart"
        console.result(f"{target}: {grid}, from {row['slices_in']}")
