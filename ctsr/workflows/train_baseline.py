"""`train-baseline`: lists of scans in, a folder of checkpoints out."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ctsr import __version__
from ctsr.data.pairs import PairRecipe, TrainVolume
from ctsr.data.volumes import load_volumes, refuse_leaks
from ctsr.errors import UsageError
from ctsr.models.simple_unet3d import SimpleUNet3D
from ctsr.train.baseline import BaselineTask
from ctsr.train.loop import LoopConfig, Outcome, Report, train
from ctsr.weights.registry import SHIPPED, load_model, locate

__all__ = ["Result", "TrainBaseline", "TrainingReport", "train_baseline"]

PAIRS_A_VOLUME = 256  # what one epoch takes from each volume


class TrainingReport(Report, Protocol):
    """What a training tells: the loop's steps and validations, and first what it will train on."""

    def volumes(self, train: list[TrainVolume], val: list[TrainVolume]) -> None: ...


@dataclass(frozen=True, slots=True)
class TrainBaseline:
    """What the command line says; the defaults are its defaults."""

    data_dir: Path = Path("data")
    train_split: Path = Path("data/train_files.txt")
    val_split: Path = Path("data/val_files.txt")
    output_dir: Path = Path("checkpoints/baseline")
    epochs: int | None = None
    z_truth_max: float = 1.5  # mm
    init: str | None = None
    resume: bool = True
    gradient_checkpointing: bool = False
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(max_steps=20_000))
    recipe: PairRecipe = field(default_factory=PairRecipe)


@dataclass(frozen=True, slots=True)
class Result:
    """How the training ended, and (from `init`) the validation rows before and after."""

    outcome: Outcome
    comparison: dict[str, dict[str, float]] = field(default_factory=dict)


def train_baseline(
    request: TrainBaseline, *, report: TrainingReport, stop: Callable[[], int | None] = lambda: None
) -> Result:
    """Train SimpleUNet3D. Raises UsageError, InputError, WeightsError before any step, TrainingDiverged during one."""
    notes: list[str] = []
    train_set, val_set = (
        load_volumes(split, request.data_dir, z_truth_max=request.z_truth_max, notes=notes)
        for split in (request.train_split, request.val_split)
    )
    refuse_leaks(train_set, val_set)
    for note in notes:
        report.note(note)
    report.volumes(train_set, val_set)

    loop = request.loop
    if request.epochs is not None:
        steps = request.epochs * PAIRS_A_VOLUME * len(train_set) / loop.batch_size
        loop = replace(loop, max_steps=max(1, math.ceil(steps)))
    model = _starting_model(request, loop.seed)
    if request.recipe.patch[1] % model.stride or request.recipe.patch[2] % model.stride:
        raise UsageError(f"--patch-size: {request.recipe.patch} is not a multiple of {model.stride} in plane")
    model.gradient_checkpointing = request.gradient_checkpointing
    task = BaselineTask(
        model, train_set, val_set, recipe=request.recipe, seed=loop.seed, card=_card(request, train_set, loop)
    )
    before: dict[str, float] = {}
    if request.init is not None:
        before = _validated(task, model)
    outcome = train(task, loop, request.output_dir, report=report, resume=request.resume, stop=stop)
    if request.init is None or outcome.stopped_by is not None:
        return Result(outcome)
    return Result(outcome, _comparison(task, request, before))


def _starting_model(request: TrainBaseline, seed: int) -> SimpleUNet3D:
    if request.init is not None:
        model, _ = load_model(request.init, kind="baseline")
        assert isinstance(model, SimpleUNet3D)
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SimpleUNet3D()


def _validated(task: BaselineTask, model: torch.nn.Module) -> dict[str, float]:
    with torch.inference_mode():
        return task.validate(model)


def _comparison(
    task: BaselineTask, request: TrainBaseline, before: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Validation rows: cubic, the shipped weights, the start and the best of this run."""
    best, _ = load_model(request.output_dir / "best.safetensors", kind="baseline")
    rows = {"before": dict(before), "after": _validated(task, best)}
    if request.init not in SHIPPED and locate("baseline").is_file():
        rows["shipped"] = _validated(task, load_model("baseline", kind="baseline")[0])
    cubic = before["cubic_psnr_4095_db"]
    return {"cubic": {"psnr_4095_db": cubic, "gain_db": 0.0}} | rows


def _card(request: TrainBaseline, volumes: list[TrainVolume], loop: LoopConfig) -> dict[str, Any]:
    """What the weights were made from, and the inputs they were made for. No folder names: they may name a patient."""
    recipe = request.recipe
    return {
        "version": __version__,
        "command": " ".join(["ctsr", *(Path(a).name if "/" in a else a for a in sys.argv[1:])]),
        "seed": loop.seed,
        "trained_on": sorted(Path(v.name).name for v in volumes),
        "init": None if request.init is None else Path(request.init).name,
        "ranges": {
            "input_spacing_mm": [1.0, 2 * recipe.truth_spacing_max],
            "relative_width": list(recipe.widths),
        },
    }
