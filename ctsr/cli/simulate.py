"""`ctsr simulate`."""

from __future__ import annotations

from pathlib import Path

import typer

from ctsr.cli.console import Console
from ctsr.errors import UsageError
from ctsr.workflows import options as o

PHANTOMS = (
    "Make N synthetic thin scans instead, in OUT/data, with the lists that training reads. The one argument is then "
    "OUT, a project folder; default: the current one."
)


def simulate(
    console: Console,
    source: Path | None = typer.Argument(
        None, metavar="[SRC]", help="Thin CT: a NIfTI file, a DICOM series, or a folder of either."
    ),
    target: Path | None = typer.Argument(
        None, metavar="[OUT]", help="Where the thick CT goes: .nii.gz, .nii, or a folder."
    ),
    thickness: float | None = o.length(
        "Slice thickness of the result; default: its spacing. Alone, it is the spacing too."
    ),
    spacing: float | None = o.length(
        "Slice spacing of the result: below the thickness slices overlap, above it there are gaps."
    ),
    factor: float | None = o.option("Instead of --spacing: how many times the input's (default 2)."),
    profile: str = o.option(o.PROFILE + " The file's is from thin to thick.", "gaussian"),
    noise: float = o.option("Standard deviation added to the thick slices.", 0.0, metavar="HU"),
    phantoms: int | None = o.option(PHANTOMS, metavar="N"),
    overwrite: bool = o.overwrite(),
    axis: int | None = o.axis(),
    form: str | None = o.form(),
    hu_offset: float = o.hu_offset(),
    project: Path | None = o.project(),
    seed: int = o.seed(),
) -> None:
    """Make the thick-slice CT that a scanner would have stored of a thin one, to try and to measure with.

    Upsampled by the same factor, the result has the input's own slices again: compare the two.

    A folder gives the same tree and pairs.csv. Scans to try a training on: ctsr simulate --phantoms 8 PROJECT
    """
    from ctsr.workflows.folder import Report, raise_for_failures
    from ctsr.workflows.profiles import read_profile
    from ctsr.workflows.simulate import Simulation
    from ctsr.workflows.simulate import phantoms as make_phantoms
    from ctsr.workflows.simulate import simulate as run

    if phantoms is not None:
        if target is not None or (thickness, spacing, factor) != (None, None, None) or noise:
            raise UsageError("--phantoms takes the project folder and --seed, no scan and no slices")
        with console.progress("phantoms") as ticker:
            told = Report(console.note, console.warn, progress=ticker)
            rows = make_phantoms(
                phantoms, source or project or Path(), seed=seed, overwrite=overwrite, report=told
            )
        console.document({"scans": rows})
        console.table(rows, "file", "set", "slices", "spacing_mm", "pixel_mm")
        return
    if source is None or target is None:
        raise UsageError("SRC and OUT are needed", hint="or --phantoms N OUT")
    if factor is not None and spacing is not None:
        raise UsageError("--factor and --spacing exclude each other")
    simulation = Simulation(
        factor=factor, spacing=spacing, thickness=thickness, profile=read_profile(profile), noise=noise,
        seed=seed, axis=axis,
    )  # fmt: skip
    with console.progress(str(source)) as ticker:
        told = Report(console.note, console.warn, progress=ticker)
        rows = run(
            source, target, simulation, overwrite=overwrite, form=form, hu_offset=hu_offset, report=told
        )
    if "case" in rows[0]:  # a folder
        shown = ("case", "status", "reason", "slices_in", "slices_out", "spacing_mm", "thickness_mm")
        console.table(rows, *shown)
        raise_for_failures(rows, path=source)
        console.document({"cases": rows})
        return
    row = rows[0]
    console.document(row)
    console.result(
        f"{target}: {row['slices_out']} slices of {row['thickness_mm']:g} mm, {row['spacing_mm']:g} mm apart,"
        f" from {row['slices_in']}"
    )
