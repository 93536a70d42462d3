"""What the trainings share on the command line: their options, and how they tell of themselves."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ctsr.cli import options as o
from ctsr.cli.console import Console, Ticker
from ctsr.errors import UsageError

if TYPE_CHECKING:
    from ctsr.data.pairs import TrainVolume
    from ctsr.train.loop import Outcome

__all__ = [
    "BatchSize", "DataDir", "Epochs", "GradientCheckpointing", "LearningRate", "Log", "MaxSteps", "Resume", "Told",
    "TrainSplit", "UseAmp", "VaeCheckpoint", "ValSplit", "ValidateEvery", "WarmupSteps", "ZTruthMax", "check", "finish",
    "is_first", "output_dir", "places", "vae_of",
]  # fmt: skip

DataDir = Annotated[Path | None, o.option("--data-dir", help="Thin scans; default: data/ of the project.")]
TrainSplit = Annotated[
    Path | None,
    o.option("--train-split", help="List of scans to train on; default: train_files.txt of the data."),
]
ValSplit = Annotated[
    Path | None,
    o.option("--val-split", help="List of scans that choose the best; default: val_files.txt of the data."),
]
MaxSteps = Annotated[
    int | None,
    o.option("--max-steps", min=1, help="Steps in all; 20000 where neither this nor --epochs is given."),
]
Epochs = Annotated[
    int | None,
    o.option("--epochs", min=1, help="Instead of --max-steps: 256 samples from each scan are one."),
]
BatchSize = Annotated[int, o.option("--batch-size", min=1, help="Samples a step (a process).")]
Resume = Annotated[
    str, o.option("--resume", help="auto: go on where the folder's last run stopped; no: start afresh.")
]
LearningRate = Annotated[float, o.number("--lr", min=1e-8, max=1.0, help="Peak learning rate.")]
WarmupSteps = Annotated[int, o.option("--warmup-steps", advanced=True, min=0, help="Steps to the peak rate.")]
ValidateEvery = Annotated[
    int, o.option("--validate-every", advanced=True, min=1, help="Steps between validations.")
]
ZTruthMax = Annotated[
    float,
    o.number(
        "--z-truth-max", advanced=True, min=0.05, help="Scans up to this slice spacing (mm) train along z."
    ),
]
UseAmp = Annotated[bool, o.option("--use-amp", advanced=True, help="Mixed precision (bfloat16).")]
GradientCheckpointing = Annotated[
    bool, o.option("--gradient-checkpointing", advanced=True, help="Less memory, more time.")
]
VaeCheckpoint = Annotated[
    str | None,
    o.option(
        "--vae-checkpoint",
        metavar="PATH",
        help="From finetune-vae; default: checkpoints/vae/best.safetensors of the project.",
    ),
]
Log = Annotated[str, o.option("--log", advanced=True, help="tensorboard or none.")]


def output_dir(kind: str) -> Any:
    """--output-dir of the training of this kind."""
    return o.option("--output-dir", help=f"Default: checkpoints/{kind}/ of the project.")


def places(
    kind: str,
    *,
    project: Path | None,
    data_dir: Path | None,
    train_split: Path | None,
    val_split: Path | None,
    output_dir: Path | None,
) -> dict[str, Path]:
    """Where a training of this kind finds its scans and leaves its files; what isn't given lies in the project."""
    root = project or Path()
    data = data_dir or root / "data"
    return {
        "data_dir": data,
        "train_split": train_split or data / "train_files.txt",
        "val_split": val_split or data / "val_files.txt",
        "output_dir": output_dir or root / "checkpoints" / kind,
    }


def vae_of(project: Path, given: str | None) -> str:
    """The autoencoder to work with."""
    return given or str(project / "checkpoints" / "vae" / "best.safetensors")


def is_first() -> bool:
    """Whether this process speaks for all; under torchrun one does."""
    return os.environ.get("RANK", "0") == "0"


def check(*, max_steps: int | None, epochs: int | None, resume: str, log: str, workers: int) -> None:
    """UsageError where options of a training exclude each other or have no such value."""
    if max_steps is not None and epochs is not None:
        raise UsageError("--max-steps and --epochs exclude each other")
    if resume not in ("auto", "no") or log not in ("tensorboard", "none"):
        raise UsageError("--resume is auto or no, --log is tensorboard or none")
    if workers > 4 * o.n_cpus():
        raise UsageError(
            f"--workers: {workers} is not in 0…{4 * o.n_cpus()}, four for each of {o.n_cpus()} CPUs"
        )


def finish(console: Console, outcome: Outcome, output_dir: Path) -> None:
    """Say how a training ended. Raises Interrupted where a signal asked for it."""
    from ctsr.cli.signals import Interrupted

    if outcome.stopped_by is not None:
        console.note(f"saved at step {outcome.step}; the same command goes on from there")
        raise Interrupted(outcome.stopped_by)
    if not is_first():
        return
    if outcome.was_finished:
        console.note(f"this run is finished: {outcome.step} steps are done (--max-steps for more)")
    best = (
        "–"
        if outcome.best_db is None
        else f"{outcome.best_db:.2f} dB (peak 4095) at step {outcome.best_step}"
    )
    console.result(f"{output_dir}: {outcome.step} steps, best {best}")


class Told:
    """A training's reports, on a console."""

    yardstick = "cubic"  # what `gain_db` is measured against

    def __init__(self, console: Console, ticker: Ticker, *, max_steps: int = 1) -> None:
        self._console, self._ticker, self._max = console, ticker, max_steps
        self._start: tuple[int, float] | None = None
        self._gain = ""

    def begin(self, max_steps: int) -> None:
        """How many steps there will be."""
        self._max = max_steps

    def start(self, train: list[TrainVolume], val: list[TrainVolume], *, max_steps: int) -> None:
        """Which scan does what, and how many steps there will be."""
        self.begin(max_steps)
        for name, volumes in (("train", train), ("val", val)):
            for v in volumes:
                use = "along z and in plane" if v.trains_along_z else "in plane"
                use = use if name == "train" else "validates"
                self.note(f"{name} {Path(v.name).name}: {len(v.hu)} slices of {v.spacing[0]:.3g} mm, {use}")

    def step(self, step: int, loss: float, rate: float) -> None:
        """A step is done."""
        now = time.monotonic()
        self._start = self._start or (step, now)
        pace = (step - self._start[0]) / max(now - self._start[1], 1e-9)
        left = f", {(self._max - step) / pace / 60:.0f} min left" if pace > 0 else ""
        self._ticker(step / self._max, f"step {step}, {pace:.2f} steps/s, loss {loss:.4f}{self._gain}{left}")

    def validation(self, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        """A validation is done."""
        gain = f", {metrics['gain_db']:+.2f} dB over {self.yardstick}" if "gain_db" in metrics else ""
        self._gain = gain
        star = " (best)" if is_best else ""
        self._console.note(f"step {step}: {metrics['psnr_4095_db']:.2f} dB{gain}{star}")

    def note(self, text: str) -> None:
        """A note."""
        self._console.note(text)
