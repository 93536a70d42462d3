"""`ctsr simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctsr.cli import options as o
from ctsr.errors import UsageError

__all__ = ["register"]

PHANTOMS = (
    "Make N synthetic thin scans instead, in OUT/data, with the lists that training reads. The one argument is then "
    "OUT, a project folder; default: the current one."
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("simulate", epilog="Research use only; not a medical device.")(simulate)


def simulate(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="[SRC]", help="Thin CT: a NIfTI file, a DICOM series, or a folder of either."),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="Where the thick CT goes: .nii.gz, .nii, or a folder."),
    ] = None,
    thickness: Annotated[
        float | None,
        o.length(
            "--thickness",
            help="Slice thickness of the result; default: its spacing. Alone, it is the spacing too.",
        ),
    ] = None,
    spacing: Annotated[
        float | None,
        o.length(
            "--spacing",
            help="Slice spacing of the result: below the thickness slices overlap, above it there are gaps.",
        ),
    ] = None,
    factor: Annotated[
        float | None,
        o.number("--factor", help="Instead of --spacing: how many times the input's (default 2)."),
    ] = None,
    profile: Annotated[
        str, o.option("--profile", help=o.PROFILE + " The file's is from thin to thick.")
    ] = "gaussian",
    noise: Annotated[
        float, o.number("--noise", metavar="HU", help="Standard deviation added to the thick slices.")
    ] = 0.0,
    phantoms: Annotated[int | None, o.option("--phantoms", metavar="N", help=PHANTOMS)] = None,
    overwrite: o.Overwrite = False,
    axis: o.Axis = None,
    form: o.Form = None,
    hu_offset: o.HuOffset = 0.0,
    project: o.Project = None,
    seed: o.Seed = 0,
    config: o.Config = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
    as_json: o.Json = False,
) -> None:
    """Make the thick-slice CT that a scanner would have stored of a thin one, to try and to measure with.

    Upsampled by the same factor, the result has the input's own slices again: compare the two.

    A folder gives the same tree and pairs.csv. Scans to try a training on: ctsr simulate --phantoms 8 PROJECT
    """
    console = o.console_of(quiet, verbose, as_json)
    from ctsr.workflows.folder import Report, raise_for_failures
    from ctsr.workflows.profiles import read_profile
    from ctsr.workflows.simulate import Simulation
    from ctsr.workflows.simulate import phantoms as make_phantoms
    from ctsr.workflows.simulate import simulate as run

    if phantoms is not None:
        if target is not None or (thickness, spacing, factor) != (None, None, None) or noise:
            raise UsageError("--phantoms takes the project folder and --seed, no scan and no slices")
        folder = source or project or Path()
        with console.progress("phantoms") as ticker:
            rows = make_phantoms(
                phantoms,
                folder,
                seed=seed,
                overwrite=overwrite,
                report=Report(console.note, console.warn, progress=ticker),
            )
        console.document({"scans": rows})
        console.table(
            [{k: row[k] for k in ("file", "set", "slices", "spacing_mm", "pixel_mm")} for row in rows]
        )
        return
    if source is None or target is None:
        raise UsageError("SRC and OUT are needed", hint="or --phantoms N OUT")
    if "-" in (str(source), str(target)):
        raise UsageError(
            "reading from standard input or writing to standard output is not supported",
            path="-",
            hint="give a file",
        )
    if factor is not None and spacing is not None:
        raise UsageError("--factor and --spacing exclude each other")
    simulation = Simulation(
        factor=factor, spacing=spacing, thickness=thickness, profile=read_profile(profile), noise=noise,
        seed=seed, axis=axis,
    )  # fmt: skip
    with console.progress(str(source)) as ticker:
        rows = run(
            source,
            target,
            simulation,
            overwrite=overwrite,
            form=form,
            hu_offset=hu_offset,
            report=Report(console.note, console.warn, progress=ticker),
        )
    if "case" in rows[0]:  # a folder
        shown = ("case", "status", "reason", "slices_in", "slices_out", "spacing_mm", "thickness_mm")
        console.table([{k: row.get(k, "") for k in shown} for row in rows])
        raise_for_failures(rows, path=source)
        console.document({"cases": rows})
        return
    row = rows[0]
    console.document(row)
    console.result(
        f"{target}: {row['slices_out']} slices of {row['thickness_mm']:g} mm, {row['spacing_mm']:g} mm apart,"
        f" from {row['slices_in']}"
    )
