"""What trainings have in common before their first step: the folder, the scans, how long, and what the card says."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ctsr import __version__
from ctsr.data.pairs import TrainVolume
from ctsr.data.volumes import load_volumes, refuse_leaks
from ctsr.errors import WeightsError
from ctsr.infer.device import choose_device
from ctsr.models.vae import CtVae
from ctsr.models.zoo import ModelFile
from ctsr.train import loop
from ctsr.train.checkpoint import locked
from ctsr.train.loop import LoopConfig, Outcome
from ctsr.weights.registry import load_model, locate
from ctsr.workflows.requests import ScanTraining, Training

__all__ = ["Report", "Result", "Stopping", "card", "is_first", "load_scans", "load_vae", "planned", "prepare"]

STEPS = 20_000
SAMPLES_A_SCAN = 256  # what one epoch takes from each

Stopping = Callable[[], AbstractContextManager[Callable[[], int | None]]]
"""Entered for the training itself; what it yields names the signal that asks for an orderly end."""


class Report(loop.Report, Protocol):
    """What a training tells: the loop's steps and validations, and before them how many steps come."""

    def begin(self, max_steps: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Result:
    """How the training ended, and what the validation found of the best weights."""

    outcome: Outcome
    metrics: dict[str, Any] = field(default_factory=dict)


def is_first() -> bool:
    """Whether this process speaks for all; under torchrun the others only take their share of the steps."""
    return os.environ.get("RANK", "0") == "0"


def prepare(request: Training) -> None:
    """UsageError or ResourceError where the device is absent, or the run's folder in use or not to be written to."""
    choose_device(request.device)
    if is_first():
        with locked(request.folder):
            pass


def load_scans(request: ScanTraining, report: Report) -> tuple[list[TrainVolume], list[TrainVolume]]:
    """The scans to train on and to validate on. Raises InputError where one is broken, or in both lists."""
    notes: list[str] = []
    train_set, val_set = (
        load_volumes(split, request.data, z_truth_max=request.z_truth_max, notes=notes)
        for split in request.splits
    )
    refuse_leaks(train_set, val_set)
    for volumes, name in ((train_set, "train"), (val_set, "val")):
        for v in volumes:
            use = "along z and in plane" if v.trains_along_z else "in plane"
            use = use if name == "train" else "validates"
            notes.append(f"{name} {Path(v.name).name}: {len(v.hu)} slices of {v.spacing[0]:.3g} mm, {use}")
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


def planned(request: Training, *, n_scans: int) -> LoopConfig:
    """How long and how fast: as many steps as `epochs` are, where they are asked for, whoever makes them."""
    steps = request.max_steps or STEPS
    if request.epochs is not None:
        samples_a_step = request.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
        steps = max(1, math.ceil(request.epochs * SAMPLES_A_SCAN * n_scans / samples_a_step))
    return LoopConfig(
        max_steps=steps, batch_size=request.batch_size, learning_rate=request.lr, warmup_steps=request.warmup_steps,
        seed=request.seed, validate_every=request.validate_every, save_every=request.save_every,
        use_amp=request.use_amp, workers=request.workers, device=str(choose_device(request.device)), log=request.log,
    )  # fmt: skip


def card(names: Sequence[str], *, seed: int, init: tuple[str, str] | None = None) -> dict[str, Any]:
    """What weights were made from; init: name and sha256. No folder names: they may name a patient."""
    return {
        "version": __version__,
        "command": " ".join(["ctsr", *(Path(a).name if "/" in a else a for a in sys.argv[1:])]),
        "seed": seed,
        "trained_on": sorted(Path(name).name for name in names),
        "init": init and {"name": Path(init[0]).name, "sha256": init[1]},
    }
