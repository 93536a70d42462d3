"""`ctsr train-baseline`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ctsr.cli import options as o
from ctsr.cli import training as t
from ctsr.errors import UsageError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train-baseline")(train_baseline)


def train_baseline(
    data_dir: t.DataDir = None,
    train_split: t.TrainSplit = None,
    val_split: t.ValSplit = None,
    output_dir: Annotated[Path | None, t.output_dir("baseline")] = None,
    max_steps: t.MaxSteps = None,
    epochs: t.Epochs = None,
    batch_size: t.BatchSize = 4,
    patch_size: Annotated[
        tuple[int, int, int], o.option("--patch-size", metavar="D H W", help="Thin voxels of a pair.")
    ] = (40, 96, 96),
    init: Annotated[
        str | None,
        o.option("--init", help="Start from these weights: baseline (shipped) or a .safetensors file."),
    ] = None,
    resume: t.Resume = "auto",
    lr: t.LearningRate = 8e-4,
    warmup_steps: t.WarmupSteps = 300,
    validate_every: t.ValidateEvery = 500,
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
    """Train the network that doubles slices on your own thin scans.

    Stop it with Ctrl-C and run the same command again to go on. Several GPUs: `torchrun -m ctsr …`.
    With --init baseline it fine-tunes the shipped weights.
    """
    t.check(max_steps=max_steps, epochs=epochs, resume=resume, log=log, workers=workers)
    if min(patch_size) < 16 or patch_size[0] % 2:
        raise UsageError(
            f"--patch-size: {patch_size} needs an even number of slices, and 16 voxels a side at least"
        )
    o.use_threads(threads)
    console = o.console_of(quiet or not t.is_first(), verbose, as_json)
    from ctsr.cli.signals import orderly
    from ctsr.data.pairs import PairRecipe
    from ctsr.infer.device import choose_device
    from ctsr.train.loop import LoopConfig
    from ctsr.workflows.train_baseline import TrainBaseline
    from ctsr.workflows.train_baseline import train_baseline as run

    places = t.places(
        "baseline", project=project, data_dir=data_dir, train_split=train_split, val_split=val_split,
        output_dir=output_dir,
    )  # fmt: skip
    request = TrainBaseline(
        **places,
        epochs=epochs,
        z_truth_max=z_truth_max,
        init=init,
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
        console.document(
            {
                "step": result.outcome.step,
                "best_psnr_4095_db": result.outcome.best_db,
                "comparison": result.comparison,
            }
        )
        console.table(
            [{"weights": name} | row for name, row in result.comparison.items()],
            title="on the validation set",
        )
    t.finish(console, result.outcome, request.output_dir)


class _Told(t.Told):
    def shares(self, spacing_shares: dict[int, float]) -> None:
        shares = ", ".join(f"{mm}–{mm + 1} mm {share:.0%}" for mm, share in spacing_shares.items())
        self.note(f"input spacing of the pairs: {shares}")
