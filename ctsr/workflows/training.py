"""What trainings have in common before their first step: the folder, the scans, how long, and what the card says."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ctsr import __version__
from ctsr.data.pairs import PairRecipe, TrainVolume
from ctsr.data.volumes import load_volumes, refuse_leaks
from ctsr.errors import WeightsError
from ctsr.models.vae import CtVae
from ctsr.models.zoo import ModelFile
from ctsr.train.checkpoint import locked
from ctsr.train.loop import LoopConfig, Report
from ctsr.weights.registry import load_model, locate

__all__ = [
    "ScanReport", "ScanTraining", "Stopping", "card", "is_first", "load_scans", "load_vae", "never", "planned",
    "refuse_taken",
]  # fmt: skip

SAMPLES_A_SCAN = 256  # what one epoch takes from each

Stopping = Callable[[], AbstractContextManager[Callable[[], int | None]]]
"""Entered for the training itself; what it yields names the signal that asks for an orderly end."""


class ScanReport(Report, Protocol):
    """What a training on scans tells: the loop's steps and validations, and first what it will train on."""

    def start(self, train: list[TrainVolume], val: list[TrainVolume], *, max_steps: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanTraining:
    """What the command line of a training on scans says; the defaults are its defaults."""

    data_dir: Path = Path("data")
    train_split: Path = Path("data/train_files.txt")
    val_split: Path = Path("data/val_files.txt")
    output_dir: Path
    epochs: int | None = None
    z_truth_max: float = 1.5  # mm
    init: str | None = None
    resume: bool = True
    gradient_checkpointing: bool = False
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(max_steps=20_000))
    recipe: PairRecipe = field(default_factory=PairRecipe)


def never() -> AbstractContextManager[Callable[[], int | None]]:
    """A `Stopping` that no signal reaches."""
    return nullcontext(lambda: None)


def is_first() -> bool:
    """Whether this process speaks for all; under torchrun the others only take their share of the steps."""
    return os.environ.get("RANK", "0") == "0"


def refuse_taken(folder: Path) -> None:
    """UsageError or ResourceError, before anything is read, where the run's folder is in use or can't be written."""
    if is_first():
        with locked(folder):
            pass


def load_scans(request: ScanTraining, report: Report) -> tuple[list[TrainVolume], list[TrainVolume]]:
    """The scans to train on and to validate on. Raises InputError where one is broken, or in both lists."""
    notes: list[str] = []
    train_set, val_set = (
        load_volumes(split, request.data_dir, z_truth_max=request.z_truth_max, notes=notes)
        for split in (request.train_split, request.val_split)
    )
    refuse_leaks(train_set, val_set)
    for note in notes:
        report.note(note)
    return train_set, val_set


def load_vae(name: str) -> tuple[CtVae, ModelFile]:
    """The autoencoder of a file. WeightsError, with the command that makes one, where there is none."""
    if not locate(name).exists():
        raise WeightsError("no autoencoder here", path=name, hint="ctsr finetune-vae trains one")
    vae, file = load_model(name, kind="vae")
    assert isinstance(vae, CtVae)
    return vae, file


def planned(loop: LoopConfig, epochs: int | None, *, n_scans: int) -> LoopConfig:
    """The loop with as many steps as `epochs` are, where they are asked for; whoever makes them."""
    if epochs is None:
        return loop
    samples_a_step = loop.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    return replace(loop, max_steps=max(1, math.ceil(epochs * SAMPLES_A_SCAN * n_scans / samples_a_step)))


def card(names: Sequence[str], *, seed: int, init: str | None, init_sha256: str | None) -> dict[str, Any]:
    """What weights were made from. No folder names: they may name a patient."""
    return {
        "version": __version__,
        "command": " ".join(["ctsr", *(Path(a).name if "/" in a else a for a in sys.argv[1:])]),
        "seed": seed,
        "trained_on": sorted(Path(name).name for name in names),
        "init": None if init is None else {"name": Path(init).name, "sha256": init_sha256},
    }
