"""`ctsr upsample`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ctsr.cli import options as o
from ctsr.errors import UsageError
from ctsr.infer.sampling import SAMPLERS, Sampling

__all__ = ["register"]

_SAMPLING = Sampling()
DIFFUSION = "With --model diffusion"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("upsample", epilog="Research use only; not a medical device.")(upsample)


def upsample(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="Thick CT: a NIfTI file, a DICOM series, or a folder of either."),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="Where the thin CT goes: .nii.gz, .nii, or a folder (DICOM of a series)."
        ),
    ],
    factor: Annotated[
        float | None,
        o.number("--factor", help="How many times as many slices, above 1 to 20 (default 2)."),
    ] = None,
    spacing: Annotated[
        float | None, o.length("--spacing", help="Instead of --factor: slice spacing of the result.")
    ] = None,
    model: Annotated[
        str, o.option("--model", help="baseline, diffusion, inverse, cubic, linear or nearest.")
    ] = "baseline",
    thickness: Annotated[
        float | None,
        o.length(
            "--thickness", help="Slice thickness of the input; default: its sidecar's, else the spacing."
        ),
    ] = None,
    preview: Annotated[
        Path | None, o.option("--preview", metavar="PNG", help="Picture of before and after.")
    ] = None,
    save_added: Annotated[
        Path | None,
        o.option(
            "--save-added",
            metavar="FILE",
            help="What the network added that the measurement does not determine, HU.",
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        o.option("--checkpoint", metavar="FILE", help="Your own weights; default: the shipped ones."),
    ] = None,
    project: Annotated[
        Path | None, o.option("--project", help="Take the weights trained in this project folder.")
    ] = None,
    vae_checkpoint: Annotated[
        str | None,
        o.option(
            "--vae-checkpoint", panel=DIFFUSION, metavar="FILE", help="Its VAE, where not in its project."
        ),
    ] = None,
    stage_one: Annotated[
        str | None,
        o.option(
            "--stage-one", panel=DIFFUSION, metavar="FILE", help="Its stage one, where not in its project."
        ),
    ] = None,
    num_steps: Annotated[
        int, o.option("--num-steps", panel=DIFFUSION, help="Calls of the network for a sample.")
    ] = _SAMPLING.num_steps,
    sampler: Annotated[
        str, o.option("--sampler", panel=DIFFUSION, help=", ".join(SAMPLERS[:-1]) + f" or {SAMPLERS[-1]}.")
    ] = _SAMPLING.sampler,
    guidance_scale: Annotated[
        float,
        o.number("--guidance-scale", panel=DIFFUSION, help="1: none. Any other takes twice as long."),
    ] = _SAMPLING.guidance_scale,
    samples: Annotated[
        int, o.option("--samples", panel=DIFFUSION, help="How many are drawn; the time is in proportion.")
    ] = _SAMPLING.samples,
    estimate: Annotated[
        str,
        o.option("--estimate", panel=DIFFUSION, help="What is written: mean of the samples, or one sample."),
    ] = _SAMPLING.estimate,
    save_uncertainty: Annotated[
        Path | None,
        o.option("--save-uncertainty", panel=DIFFUSION, metavar="FILE", help="Spread of the samples, HU."),
    ] = None,
    overwrite: o.Overwrite = False,
    skip_existing: o.SkipExisting = False,
    dry_run: o.DryRun = False,
    max_memory: Annotated[
        str | None, o.option("--max-memory", metavar="SIZE", help="Bytes to stay below, such as 2G.")
    ] = None,
    device: o.Device = "auto",
    out_thickness: Annotated[
        float | None,
        o.length(
            "--out-thickness",
            advanced=True,
            help="Slice thickness of the result; default: thickness / factor.",
        ),
    ] = None,
    profile: Annotated[str, o.option("--profile", advanced=True, help=o.PROFILE)] = "gaussian",
    consistency: Annotated[str, o.option("--consistency", advanced=True, help="hard or off.")] = "hard",
    strict: Annotated[
        bool,
        o.option("--strict", advanced=True, help="Refuse inputs outside what the weights were trained for."),
    ] = False,
    axis: o.Axis = None,
    form: o.Form = None,
    hu_offset: o.HuOffset = 0.0,
    patch_size: Annotated[
        tuple[int, int, int] | None,
        o.option(
            "--patch-size",
            advanced=True,
            metavar="D H W",
            help="Thick slices at once, and pixels of a window.",
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        o.option(
            "--overlap", advanced=True, min=0, help="Pixels that windows share; default: enough to be exact."
        ),
    ] = None,
    dtype: Annotated[str, o.option("--dtype", advanced=True, help="auto, fp32, bf16 or fp16.")] = "auto",
    like: Annotated[
        Path | None,
        o.option(
            "--like",
            advanced=True,
            metavar="SERIES",
            help="DICOM out for an image file: the series that lends patient, study and frame.",
        ),
    ] = None,
    random_uids: Annotated[
        bool, o.option("--random-uids", advanced=True, help="DICOM out: new UIDs at every run.")
    ] = False,
    shard: o.Shard = None,
    threads: o.Threads = None,
    seed: o.Seed = 0,
    config: o.Config = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
    as_json: o.Json = False,
) -> None:
    """Turn a thick-slice CT into a thin-slice one: HU kept, every slice in place, measured slices reproduced."""
    if "-" in (str(source), str(target)):
        raise UsageError(
            "reading from standard input or writing to standard output is not supported",
            path="-",
            hint="give a file",
        )
    if consistency not in ("hard", "off"):
        raise UsageError(f"--consistency: {consistency} is not hard or off")
    if project is not None and checkpoint is not None:
        raise UsageError("--project and --checkpoint exclude each other")
    sampling = Sampling(
        num_steps=num_steps, sampler=sampler, guidance_scale=guidance_scale,
        samples=samples, estimate=estimate, seed=seed,
    )  # fmt: skip
    if model != "diffusion" and sampling != replace(_SAMPLING, seed=seed):
        raise UsageError(
            f"--num-steps, --sampler, --guidance-scale, --samples and --estimate: not with --model {model}"
        )
    limit = _bytes(max_memory)
    n_threads = o.use_threads(threads)
    console = o.console_of(quiet, verbose, as_json)
    from ctsr.cli.memory import keep_freed_memory
    from ctsr.workflows.folder import Report, raise_for_failures
    from ctsr.workflows.profiles import read_profile
    from ctsr.workflows.thinner import Thinner
    from ctsr.workflows.upsample import FileOptions, upsample_files

    keep_freed_memory()
    notes: list[str] = []
    thinner = Thinner(
        factor=factor, spacing=spacing, model=model, thickness=thickness, out_thickness=out_thickness, axis=axis,
        checkpoint=str(project / "checkpoints" / model / "best.safetensors") if project else checkpoint,
        vae_checkpoint=vae_checkpoint, stage_one=stage_one, sampling=sampling,
        profile=read_profile(profile, notes=notes), is_consistent=consistency == "hard", patch=patch_size,
        overlap=overlap, max_memory=limit, device=device, dtype=dtype, is_strict=strict,
    )  # fmt: skip
    files = FileOptions(
        like=like, random_uids=random_uids, overwrite=overwrite, skip_existing=skip_existing, is_dry_run=dry_run,
        preview=preview, save_added=save_added, save_uncertainty=save_uncertainty, form=form, hu_offset=hu_offset,
        seed=seed, threads=n_threads,
    )  # fmt: skip
    for note in notes:
        console.note(note)
    with console.progress(str(source)) as ticker:
        told = Report(console.note, console.warn, console.detail, ticker)
        rows = upsample_files(source, target, thinner, files, told, shard=shard)
    if "case" in rows[0]:  # a folder
        shown = ("case", "status", "reason", "slices_in", "slices_out", "seconds")
        console.table([{name: row.get(name, "") for name in shown} for row in rows])
        raise_for_failures(rows, path=source)
        console.document({"cases": rows})
        return
    row = rows[0]
    console.document(row)
    if row["status"] == "skipped":
        console.result(f"{target}: is there and agrees, skipped")
    else:
        console.result(f"{target}: {_summary(row, n_threads)}")


def _summary(row: dict[str, Any], threads: int) -> str:
    grid = (
        f"{row['slices_out']} slices of {row['output_spacing_mm']:g} mm "
        f"from {row['slices_in']} of {row['input_spacing_mm']:g} mm"
    )
    if row["status"] == "planned":
        return (
            f"would hold {grid}; {row['peak_gb']} GB at most, {row['slabs']} slab(s) along z, "
            f"{row['windows']} window(s) in plane, {threads} thread(s), about {row['estimate_seconds']:.0f} s"
        )
    mean, largest = row["residual_mean_hu"], row["residual_max_hu"]
    return (
        f"{grid}; measured slices reproduced to {mean:.2f} HU (mean), {largest:.2f} HU (max); "
        f"{row['seconds']:.1f} s"
    )


def _bytes(text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UsageError(f"--max-memory: {text} is not a size such as 2G")
    return float(match[1]) * _UNITS[match[2].upper()]
