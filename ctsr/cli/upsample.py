"""`ctsr upsample`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import typer

from ctsr.cli.console import Console
from ctsr.cli.machine import keep_freed_memory
from ctsr.errors import UsageError
from ctsr.infer.sampling import SAMPLERS, Sampling
from ctsr.workflows import options as o
from ctsr.workflows.requests import FileOptions

_SAMPLING = Sampling()
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _diffusion(help: str, default: Any = None, **how: Any) -> Any:
    return o.option(help, default, panel="With --model diffusion", **how)


def upsample(
    console: Console,
    source: Path = typer.Argument(
        ..., metavar="SRC", help="Thick CT: a NIfTI file, a DICOM series, or a folder of either."
    ),
    target: Path = typer.Argument(
        ..., metavar="OUT", help="Where the thin CT goes: .nii.gz, .nii, or a folder (DICOM of a series)."
    ),
    factor: float | None = o.option("How many times as many slices, above 1 to 20 (default 2)."),
    spacing: float | None = o.length("Instead of --factor: slice spacing of the result."),
    model: str = o.option("baseline, diffusion, inverse, cubic, linear or nearest.", "baseline"),
    thickness: float | None = o.length(
        "Slice thickness of the input; default: its sidecar's, else the spacing."
    ),
    checkpoint: str | None = o.option(
        "Your own weights, or published ones: hf://org/repo@revision/file.safetensors; default: the shipped ones.",
        metavar="FILE",
    ),
    project: Path | None = o.option("Take the weights trained in this project folder."),
    vae_checkpoint: str | None = _diffusion("Its VAE, where not in its project.", metavar="FILE"),
    stage_one: str | None = _diffusion("Its stage one, where not in its project.", metavar="FILE"),
    num_steps: int = _diffusion("Calls of the network for a sample.", _SAMPLING.num_steps),
    sampler: str = _diffusion(", ".join(SAMPLERS[:-1]) + f" or {SAMPLERS[-1]}.", _SAMPLING.sampler),
    guidance_scale: float = _diffusion("1: none. Any other takes twice as long.", _SAMPLING.guidance_scale),
    samples: int = _diffusion("How many are drawn; the time is in proportion.", _SAMPLING.samples),
    estimate: str = _diffusion("What is written: mean of the samples, or one sample.", _SAMPLING.estimate),
    max_memory: str | None = o.option("Bytes to stay below, such as 2G.", metavar="SIZE"),
    device: str = o.device(),
    out_thickness: float | None = o.length(
        "Slice thickness of the result; default: thickness / factor.", advanced=True
    ),
    profile: str = o.option(o.PROFILE, "gaussian", advanced=True),
    consistency: Literal["hard", "off"] = o.option(
        "Whether the measured slices are reproduced.", "hard", advanced=True
    ),
    strict: bool = o.option("Refuse inputs outside what the weights were trained for.", False, advanced=True),
    axis: int | None = o.axis(),
    patch_size: tuple[int, int, int] | None = o.option(
        "Thick slices at once, and pixels of a window.", metavar="D H W", advanced=True
    ),
    overlap: int | None = o.option(
        "Pixels that windows share; default: enough to be exact.", advanced=True, min=0
    ),
    dtype: str = o.option("auto, fp32, bf16 or fp16.", "auto", advanced=True),
    shard: str | None = o.shard(),
    *,
    files: FileOptions,
) -> None:
    """Turn a thick-slice CT into a thin-slice one: HU kept, every slice in place, measured slices reproduced."""
    if project is not None and checkpoint is not None:
        raise UsageError("--project and --checkpoint exclude each other")
    sampling = Sampling(
        num_steps=num_steps, sampler=sampler, guidance_scale=guidance_scale,
        samples=samples, estimate=estimate, seed=files.seed,
    )  # fmt: skip
    if model != "diffusion" and sampling != replace(_SAMPLING, seed=files.seed):
        raise UsageError(
            f"--num-steps, --sampler, --guidance-scale, --samples and --estimate: not with --model {model}"
        )
    limit = _bytes(max_memory)
    from ctsr.workflows.folder import Report, raise_for_failures
    from ctsr.workflows.profiles import read_profile
    from ctsr.workflows.thinner import Thinner
    from ctsr.workflows.upsample import upsample_files

    keep_freed_memory()
    notes: list[str] = []
    thinner = Thinner(
        factor=factor, spacing=spacing, model=model, thickness=thickness, out_thickness=out_thickness, axis=axis,
        checkpoint=str(project / "checkpoints" / model / "best.safetensors") if project else checkpoint,
        vae_checkpoint=vae_checkpoint, stage_one=stage_one, sampling=sampling,
        profile=read_profile(profile, notes=notes), is_consistent=consistency == "hard", patch=patch_size,
        overlap=overlap, max_memory=limit, device=device, dtype=dtype, is_strict=strict,
    )  # fmt: skip
    for note in notes:
        console.note(note)
    with console.progress(str(source)) as ticker:
        told = Report(console.note, console.warn, console.detail, ticker)
        rows = upsample_files(source, target, thinner, files, told, shard=shard)
    if not rows or "case" in rows[0]:  # a folder
        plan = ("peak_gb", "slabs", "windows", "threads", "estimate_seconds")
        more = plan if files.is_dry_run else ("seconds",)
        console.table(rows, "case", "status", "reason", "slices_in", "slices_out", *more)
        raise_for_failures(rows, path=source)
        console.document({"cases": rows})
        return
    row = rows[0]
    console.document(row)
    if row["status"] == "skipped":
        console.result(f"{target}: is there and agrees, skipped")
    else:
        console.result(f"{target}: {_summary(row)}")


def _summary(row: dict[str, Any]) -> str:
    grid = (
        f"{row['slices_out']} slices of {row['output_spacing_mm']:g} mm "
        f"from {row['slices_in']} of {row['input_spacing_mm']:g} mm"
    )
    if row["status"] == "planned":
        return (
            f"would hold {grid}; {row['peak_gb']} GB at most, {row['slabs']} slab(s) along z, "
            f"{row['windows']} window(s) in plane, {row['threads']} thread(s), about {row['estimate_seconds']:.0f} s"
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
