"""`ctsr finetune-vae`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ctsr.cli import options as o
from ctsr.cli import training as t
from ctsr.errors import UsageError

__all__ = ["register"]

INIT = (
    "Weights to start from: none, mri-autoencoder (ctsr download-weights), or a .safetensors file of this command or "
    "of a 2D autoencoder in the layout of diffusers, whose plan it takes."
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("finetune-vae", short_help="Train the autoencoder that diffusion works in.")(finetune_vae)


def finetune_vae(
    data_dir: t.DataDir = None,
    train_split: t.TrainSplit = None,
    val_split: t.ValSplit = None,
    output_dir: Annotated[Path | None, t.output_dir("vae")] = None,
    init: Annotated[str, o.option("--init", help=INIT)] = "none",
    preset: Annotated[
        str | None,
        o.option("--preset", help="tiny, compact, full or mri; default: compact, or what --init has."),
    ] = None,
    max_steps: t.MaxSteps = None,
    epochs: t.Epochs = None,
    batch_size: t.BatchSize = 2,
    patch_size: Annotated[
        tuple[int, int, int], o.option("--patch-size", metavar="D H W", help="Voxels of a sample.")
    ] = (32, 64, 64),
    resume: t.Resume = "auto",
    lr: t.LearningRate = 2e-4,
    kl_weight: Annotated[
        float | None,
        o.number(
            "--kl-weight",
            min=0.0,
            max=1.0,
            help="Of the mean KL beside a mean error in 1000 HU; default: 1e-6 × latent channels / voxels of a block.",
        ),
    ] = None,
    warmup_steps: t.WarmupSteps = 300,
    validate_every: t.ValidateEvery = 2000,
    z_truth_max: t.ZTruthMax = 1.5,
    use_amp: t.UseAmp = False,
    gradient_checkpointing: t.GradientCheckpointing = False,
    log: t.Log = "none",
    project: o.Project = None,
    device: o.Device = "auto",
    seed: o.Seed = 0,
    workers: o.Workers = 0,
    threads: o.Threads = None,
    config: o.Config = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
    as_json: o.Json = False,
) -> None:
    """This leaves the default model as it is: `ctsr train-baseline --init baseline` fine-tunes that one.

    Here the autoencoder is trained that the diffusion works in, on your own thin scans.
    Stop it with Ctrl-C and run the same command again to go on. Several GPUs: `torchrun -m ctsr …`.
    """
    t.check(max_steps=max_steps, epochs=epochs, resume=resume, log=log, workers=workers)
    if min(patch_size) < 16:
        raise UsageError(f"--patch-size: {patch_size} needs 16 voxels a side at least")
    start = None if init == "none" else init
    if start is not None and preset is not None:
        raise UsageError("--preset and --init exclude each other: the weights bring their plan")
    o.use_threads(threads)
    console = o.console_of(quiet or not t.is_first(), verbose, as_json)
    from ctsr.cli.signals import orderly
    from ctsr.data.pairs import PairRecipe
    from ctsr.infer.device import choose_device
    from ctsr.train.loop import LoopConfig
    from ctsr.workflows.finetune_vae import FinetuneVae
    from ctsr.workflows.finetune_vae import finetune_vae as run

    places = t.places(
        "vae", project=project, data_dir=data_dir, train_split=train_split, val_split=val_split,
        output_dir=output_dir,
    )  # fmt: skip
    request = FinetuneVae(
        **places,
        epochs=epochs,
        z_truth_max=z_truth_max,
        init=start,
        preset=preset,
        kl_weight=kl_weight,
        resume=resume == "auto",
        gradient_checkpointing=gradient_checkpointing,
        loop=LoopConfig(
            max_steps=max_steps or 20_000, batch_size=batch_size, learning_rate=lr, warmup_steps=warmup_steps,
            seed=seed, validate_every=validate_every, use_amp=use_amp, workers=workers,
            device=str(choose_device(device)), log=log,
        ),
        recipe=replace(PairRecipe(), patch=patch_size),
    )  # fmt: skip
    with console.progress("training") as ticker:
        result = run(request, report=_Told(console, ticker), stopping=orderly)
    if t.is_first() and result.outcome.stopped_by is None:
        facts = {"step": result.outcome.step, "best_psnr_4095_db": result.outcome.best_db}
        console.document(facts | {"best": result.metrics})
        regions = [name.removesuffix("_mae_hu") for name in result.metrics if name.endswith("_mae_hu")]
        console.table(
            [{"": r} | {k: result.metrics[f"{r}_{k}"] for k in ("mae_hu", "bias_hu")} for r in regions],
            title="round trip of the validation set",
        )
    t.finish(console, result.outcome, request.output_dir)


class _Told(t.Told):
    yardstick = "the linear transform of its size"
