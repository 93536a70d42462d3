"""`ctsr train-baseline`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctsr.cli import options as o
from ctsr.cli.console import Console, Ticker
from ctsr.errors import UsageError

if TYPE_CHECKING:
    from ctsr.data.pairs import TrainVolume

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train-baseline")(train_baseline)


def train_baseline(
    data_dir: Annotated[Path | None, typer.Option(help="Thin scans; default: data/ of the project.")] = None,
    train_split: Annotated[
        Path | None, typer.Option(help="List of scans to train on; default: train_files.txt there.")
    ] = None,
    val_split: Annotated[
        Path | None, typer.Option(help="List of scans that choose the best; default: val_files.txt there.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Default: checkpoints/baseline/ of the project.")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps in all; 20000 where neither this nor --epochs is given.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Instead of --max-steps: 256 pairs from each scan are one.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs a step (a process).")] = 4,
    patch_size: Annotated[
        tuple[int, int, int], typer.Option(metavar="D H W", help="Thin voxels of a pair.")
    ] = (40, 96, 96),
    init: Annotated[
        str | None, typer.Option(help="Start from these weights: baseline (shipped) or a .safetensors file.")
    ] = None,
    resume: Annotated[
        str, typer.Option(help="auto: go on where the folder's last run stopped; no: start afresh.")
    ] = "auto",
    lr: Annotated[
        float, typer.Option(min=1e-8, max=1.0, callback=o.finite, help="Peak learning rate.")
    ] = 8e-4,
    warmup_steps: Annotated[
        int, typer.Option(min=0, help="Steps to the peak rate.", rich_help_panel=o.ADVANCED)
    ] = 300,
    validate_every: Annotated[
        int, typer.Option(min=1, help="Steps between validations.", rich_help_panel=o.ADVANCED)
    ] = 500,
    z_truth_max: Annotated[
        float,
        typer.Option(
            min=0.05,
            callback=o.finite,
            help="Scans up to this slice spacing (mm) train along z.",
            rich_help_panel=o.ADVANCED,
        ),
    ] = 1.5,
    use_amp: Annotated[
        bool, typer.Option("--use-amp", help="Mixed precision (bfloat16).", rich_help_panel=o.ADVANCED)
    ] = False,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=o.ADVANCED),
    ] = False,
    log: Annotated[str, typer.Option(help="tensorboard or none.", rich_help_panel=o.ADVANCED)] = "none",
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
    if max_steps is not None and epochs is not None:
        raise UsageError("--max-steps and --epochs exclude each other")
    if resume not in ("auto", "no") or log not in ("tensorboard", "none"):
        raise UsageError("--resume is auto or no, --log is tensorboard or none")
    if min(patch_size) < 16 or patch_size[0] % 2:
        raise UsageError(
            f"--patch-size: {patch_size} needs an even number of slices, and 16 voxels a side at least"
        )
    if workers > 4 * o.n_cpus():
        raise UsageError(
            f"--workers: {workers} is not in 0…{4 * o.n_cpus()}, four for each of {o.n_cpus()} CPUs"
        )
    is_first = os.environ.get("RANK", "0") == "0"  # under torchrun one process speaks for all
    console = o.console_of(quiet or not is_first, verbose, as_json)
    from ctsr.cli.signals import Interrupted, orderly
    from ctsr.data.pairs import PairRecipe
    from ctsr.infer.device import choose_device
    from ctsr.train.loop import LoopConfig
    from ctsr.workflows.train_baseline import TrainBaseline
    from ctsr.workflows.train_baseline import train_baseline as run

    o.use_threads(threads)
    root = project or Path()
    data = data_dir or root / "data"
    request = TrainBaseline(
        data_dir=data,
        train_split=train_split or data / "train_files.txt",
        val_split=val_split or data / "val_files.txt",
        output_dir=output_dir or root / "checkpoints" / "baseline",
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
    outcome = result.outcome
    if outcome.stopped_by is not None:
        console.note(f"saved at step {outcome.step}; the same command goes on from there")
        raise Interrupted(outcome.stopped_by)
    if not is_first:
        return
    console.document(
        {"step": outcome.step, "best_psnr_4095_db": outcome.best_db, "comparison": result.comparison}
    )
    console.table(
        [{"weights": name} | row for name, row in result.comparison.items()], title="on the validation set"
    )
    if outcome.was_finished:
        console.note(f"this run is finished: {outcome.step} steps are done (--max-steps for more)")
    best = (
        "–"
        if outcome.best_db is None
        else f"{outcome.best_db:.2f} dB (peak 4095) at step {outcome.best_step}"
    )
    console.result(f"{request.output_dir}: {outcome.step} steps, best {best}")


class _Told:
    """The training's reports, on a console."""

    def __init__(self, console: Console, ticker: Ticker) -> None:
        self._console, self._ticker, self._max = console, ticker, 1
        self._start: tuple[int, float] | None = None
        self._gain = ""

    def start(
        self,
        train: list[TrainVolume],
        val: list[TrainVolume],
        *,
        max_steps: int,
        spacing_shares: dict[int, float],
    ) -> None:
        self._max = max_steps
        for name, volumes in (("train", train), ("val", val)):
            for v in volumes:
                use = "along z and in plane" if v.trains_along_z else "in plane"
                use = use if name == "train" else "validates"
                size = f"{len(v.hu)} slices of {v.spacing[0]:.3g} mm"
                self._console.note(f"{name} {Path(v.name).name}: {size}, {use}")
        shares = ", ".join(f"{mm}–{mm + 1} mm {share:.0%}" for mm, share in spacing_shares.items())
        self._console.note(f"input spacing of the pairs: {shares}")

    def step(self, step: int, loss: float, rate: float) -> None:
        now = time.monotonic()
        self._start = self._start or (step, now)
        pace = (step - self._start[0]) / max(now - self._start[1], 1e-9)
        left = f", {(self._max - step) / pace / 60:.0f} min left" if pace > 0 else ""
        self._ticker(step / self._max, f"step {step}, {pace:.2f} steps/s, loss {loss:.4f}{self._gain}{left}")

    def validation(self, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        self._gain = f", {metrics['gain_db']:+.2f} dB over cubic"
        star = " (best)" if is_best else ""
        self._console.note(
            f"step {step}: {metrics['psnr_4095_db']:.2f} dB, {metrics['gain_db']:+.2f} dB over cubic{star}"
        )

    def note(self, text: str) -> None:
        self._console.note(text)
