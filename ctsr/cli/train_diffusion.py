"""`ctsr train-diffusion`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from ctsr.cli import options as o
from ctsr.cli import training as t
from ctsr.errors import UsageError

__all__ = ["register"]

LEAST_GAIN = 0.1  # of the detail: below it the diffusion adds nothing


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train-diffusion")(train_diffusion)


def train_diffusion(
    latent_dir: Annotated[
        Path | None, o.option("--latent-dir", help="From encode-latents; default: latents/ of the project.")
    ] = None,
    train_split: t.TrainSplit = None,
    val_split: t.ValSplit = None,
    output_dir: Annotated[Path | None, t.output_dir("diffusion")] = None,
    vae_checkpoint: t.VaeCheckpoint = None,
    preset: Annotated[str, o.option("--preset", help="tiny, compact or full.")] = "compact",
    max_steps: t.MaxSteps = None,
    epochs: t.Epochs = None,
    batch_size: t.BatchSize = 6,
    patch_size: Annotated[
        tuple[int, int, int], o.option("--patch-size", metavar="D H W", help="Latent voxels of a sample.")
    ] = (8, 24, 24),
    resume: t.Resume = "auto",
    lr: t.LearningRate = 2e-4,
    num_steps: Annotated[
        int, o.option("--num-steps", min=1, max=1000, help="Diffusion steps of a validation.")
    ] = 15,
    samples: Annotated[
        int, o.option("--samples", min=1, max=64, help="Samples whose mean a validation scores.")
    ] = 4,
    sampler: Annotated[str, o.option("--sampler", help="multistep, ddim or ancestral.")] = "multistep",
    schedule: Annotated[
        str,
        o.option("--schedule", advanced=True, help="ctsr, or published: ResShift's constants, κ = 2."),
    ] = "ctsr",
    kappa: Annotated[
        float | None,
        o.number("--kappa", advanced=True, min=0.01, max=100, help="Noise, in residuals; default: measured."),
    ] = None,
    model_channels: Annotated[
        int | None,
        o.option("--model-channels", advanced=True, min=4, max=512, help="Instead of the preset's."),
    ] = None,
    guidance_dropout: Annotated[
        float,
        o.number("--guidance-dropout", advanced=True, min=0, max=0.9, help="Share without stage one."),
    ] = 0.1,
    warmup_steps: t.WarmupSteps = 500,
    validate_every: t.ValidateEvery = 2000,
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
    """Train the diffusion that refines stage one, on the latents that encode-latents made.

    Stop it with Ctrl-C and run the same command again to go on. Several GPUs: `torchrun -m ctsr …`.
    """
    t.check(max_steps=max_steps, epochs=epochs, resume=resume, log=log, workers=workers)
    if preset not in ("tiny", "compact", "full") or schedule not in ("ctsr", "published"):
        raise UsageError("--preset is tiny, compact or full, --schedule is ctsr or published")
    if kappa is not None and schedule == "published":
        raise UsageError("--kappa and --schedule published exclude each other")
    if min(patch_size) < 1:
        raise UsageError(f"--patch-size: {patch_size} has a side below 1")
    o.use_threads(threads)
    console = o.console_of(quiet or not t.is_first(), verbose, as_json)
    from ctsr.cli.signals import orderly
    from ctsr.infer.device import choose_device
    from ctsr.infer.sampling import Sampling
    from ctsr.train.loop import LoopConfig
    from ctsr.workflows.train_diffusion import TrainDiffusion
    from ctsr.workflows.train_diffusion import train_diffusion as run

    places = t.places(
        "diffusion", project=project, data_dir=None, train_split=train_split, val_split=val_split,
        output_dir=output_dir,
    )  # fmt: skip
    root = project or Path()
    request = TrainDiffusion(
        latent_dir=latent_dir or root / "latents",
        train_split=places["train_split"],
        val_split=places["val_split"],
        output_dir=places["output_dir"],
        vae_checkpoint=t.vae_of(root, vae_checkpoint),
        preset=preset,
        model_channels=model_channels,
        schedule=schedule,
        kappa=kappa,
        sampling=Sampling(sampler=sampler, num_steps=num_steps, samples=samples),
        guidance_dropout=guidance_dropout,
        patch=patch_size,
        epochs=epochs,
        resume=resume == "auto",
        gradient_checkpointing=gradient_checkpointing,
        loop=LoopConfig(
            max_steps=max_steps or 20_000, batch_size=batch_size, learning_rate=lr, warmup_steps=warmup_steps,
            seed=seed, validate_every=validate_every, use_amp=use_amp, workers=workers,
            device=str(choose_device(device)), log=log,
        ),
    )  # fmt: skip
    with console.progress("training") as ticker:
        result = run(request, report=_Told(console, ticker), stopping=orderly)
    if t.is_first() and result.outcome.stopped_by is None:
        console.document({"step": result.outcome.step} | result.metrics)
        methods = {"cubic": "cubic_", "stage one": "stage_one_", "diffusion": "", "one sample": "sample_"}
        rows = [
            {"method": name, "PSNR, dB": result.metrics[f"{key}psnr_4095_db"]}
            for name, key in methods.items()
        ]
        console.table(rows, title="on the validation set")
    t.finish(console, result.outcome, request.output_dir)


class _Told(t.Told):
    def validation(self, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        super().validation(step, metrics, is_best)
        words = f"{metrics['added_db']:+.2f} dB over stage one, detail gain {metrics['detail_gain']:.2f}"
        words += " (adds nothing)" if metrics["detail_gain"] < LEAST_GAIN else ""
        self.note(f"{words}; denoising error {metrics['denoising_error']:.2f} of predicting nothing")
