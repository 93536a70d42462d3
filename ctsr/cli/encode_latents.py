"""`ctsr encode-latents`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctsr.cli import options as o
from ctsr.cli import training as t
from ctsr.errors import UsageError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("encode-latents")(encode_latents)


def encode_latents(
    data_dir: t.DataDir = None,
    file_list: Annotated[
        Path | None,
        o.option("--file-list", help="Default: train_files.txt and val_files.txt of the data."),
    ] = None,
    output_dir: Annotated[
        Path | None, o.option("--output-dir", help="Default: latents/ of the project.")
    ] = None,
    vae_checkpoint: t.VaeCheckpoint = None,
    stage_one: Annotated[
        str,
        o.option(
            "--stage-one",
            metavar="NAME|PATH",
            help="The network whose results the diffusion will refine; best one that never saw these scans.",
        ),
    ] = "baseline",
    factors: Annotated[
        str, o.option("--factors", metavar="F,F…", help="How much thicker the simulated slices are, 2 to 8.")
    ] = "2,3,4,5",
    variants: Annotated[
        int,
        o.option("--variants", min=1, max=64, help="Of each scan and factor: other thicknesses and flips."),
    ] = 2,
    skip_existing: o.SkipExisting = False,
    overwrite: o.Overwrite = False,
    shard: o.Shard = None,
    dtype: Annotated[
        str, o.option("--dtype", advanced=True, help="Of the stored latents: fp16, bf16 or fp32.")
    ] = "fp16",
    z_truth_max: t.ZTruthMax = 1.5,
    project: o.Project = None,
    device: o.Device = "auto",
    seed: o.Seed = 0,
    threads: o.Threads = None,
    config: o.Config = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
    as_json: o.Json = False,
) -> None:
    """Encode thin scans, and what stage one restores from their simulated thick slices, for train-diffusion.

    Stop it when you like: the same command with --skip-existing goes on. A folder holds latents of one autoencoder and
    one stage one; of several stage ones only where none has seen the scans that it restored.
    """
    try:
        numbers = tuple(int(word) for word in factors.split(","))
    except ValueError:
        raise UsageError(f"--factors: {factors} are no whole numbers with commas between") from None
    o.use_threads(threads)
    console = o.console_of(quiet, verbose, as_json)
    from ctsr.workflows.encode_latents import EncodeLatents
    from ctsr.workflows.encode_latents import encode_latents as run
    from ctsr.workflows.folder import Report, raise_for_failures

    root = project or Path()
    target = output_dir or root / "latents"
    request = EncodeLatents(
        data_dir=data_dir or root / "data", output_dir=target, vae_checkpoint=t.vae_of(root, vae_checkpoint),
        stage_one=stage_one, factors=numbers, variants=variants, file_list=file_list, z_truth_max=z_truth_max,
        dtype=dtype, device=device, seed=seed, skip_existing=skip_existing, overwrite=overwrite,
    )  # fmt: skip
    with console.progress("encoding") as ticker:
        rows = run(request, shard=shard, report=Report(console.note, console.warn, progress=ticker))
    shown = ("case", "status", "reason", "pairs", "skipped")
    console.table([{name: row.get(name, "") for name in shown} for row in rows])
    raise_for_failures(rows, path=target)
    console.document({"cases": rows})
    console.result(f"{target}: {sum(row['pairs'] for row in rows)} pairs of {len(rows)} scans encoded")
