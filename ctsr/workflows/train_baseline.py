"""`train-baseline`: lists of scans in, a folder of checkpoints out."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ctsr import __version__
from ctsr.data.pairs import PairRecipe, PairSource, TrainVolume
from ctsr.data.volumes import load_volumes, refuse_leaks
from ctsr.errors import UsageError
from ctsr.models.simple_unet3d import SimpleUNet3D
from ctsr.train.baseline import BaselineTask
from ctsr.train.checkpoint import locked
from ctsr.train.loop import LoopConfig, Outcome, Report, train
from ctsr.weights.registry import SHIPPED, load_model, locate

__all__ = ["Result", "TrainBaseline", "TrainingReport", "train_baseline"]

PAIRS_A_VOLUME = 256  # what one epoch takes from each volume
PAIRS_LOOKED_AT = 128  # for the shares of input spacings; a share is then known to 4 %


class TrainingReport(Report, Protocol):
    """What a training tells: the loop's steps and validations, and first what it will train on."""

    def start(
        self,
        train: list[TrainVolume],
        val: list[TrainVolume],
        *,
        max_steps: int,
        spacing_shares: dict[int, float],
    ) -> None:
        """spacing_shares: of the pairs, by input spacing in whole mm (1: from 1 to below 2)."""


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
    request: TrainBaseline,
    *,
    report: TrainingReport,
    stopping: Callable[[], AbstractContextManager[Callable[[], int | None]]] = lambda: nullcontext(
        lambda: None
    ),
) -> Result:
    """Train SimpleUNet3D.

    stopping: entered for the training itself; what it yields names the signal that asks for an orderly end.
    Raises UsageError, InputError, WeightsError, ResourceError before any step, TrainingDiverged during one.
    """
    is_first = os.environ.get("RANK", "0") == "0"  # torchrun's; the others only take their share of the steps
    model, init_sha256 = _starting_model(request)
    if request.recipe.patch[1] % model.stride or request.recipe.patch[2] % model.stride:
        raise UsageError(f"--patch-size: {request.recipe.patch} is not a multiple of {model.stride} in plane")
    if is_first:
        with locked(request.output_dir):  # what could not be written to is refused now, not when all is read
            pass
    notes: list[str] = []
    train_set, val_set = (
        load_volumes(split, request.data_dir, z_truth_max=request.z_truth_max, notes=notes)
        for split in (request.train_split, request.val_split)
    )
    refuse_leaks(train_set, val_set)
    for note in notes:
        report.note(note)

    loop = request.loop
    if request.epochs is not None:
        pairs_a_step = loop.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
        steps = math.ceil(request.epochs * PAIRS_A_VOLUME * len(train_set) / pairs_a_step)
        loop = replace(loop, max_steps=max(1, steps))
    model.gradient_checkpointing = request.gradient_checkpointing
    card = _card(request, train_set, loop, init_sha256)
    task = BaselineTask(model, train_set, val_set, recipe=request.recipe, seed=loop.seed, card=card)
    before: dict[str, float] = {}
    if is_first:
        shares = _spacing_shares(task.source)
        report.start(train_set, val_set, max_steps=loop.max_steps, spacing_shares=shares)
        if request.init is not None:
            before = _validated(task, model, loop.device)
    with stopping() as stop:
        outcome = train(task, loop, request.output_dir, report=report, resume=request.resume, stop=stop)
    if not before or outcome.stopped_by is not None:
        return Result(outcome)
    return Result(outcome, _comparison(task, request, before))


def _starting_model(request: TrainBaseline) -> tuple[SimpleUNet3D, str | None]:
    """The network before the first step, and the sha256 of the file it came from."""
    if request.init is not None:
        model, file = load_model(request.init, kind="baseline")
        assert isinstance(model, SimpleUNet3D)
        return model, file.sha256
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.loop.seed)
        return SimpleUNet3D(), None


def _spacing_shares(source: PairSource) -> dict[int, float]:
    counts = Counter(int(source.input_spacing(i)) for i in range(PAIRS_LOOKED_AT))
    return {mm: counts[mm] / PAIRS_LOOKED_AT for mm in sorted(counts)}


def _validated(task: BaselineTask, model: torch.nn.Module, device: str) -> dict[str, float]:
    with torch.inference_mode():
        return task.validate(model.to(device), lambda: None) or {}


def _comparison(
    task: BaselineTask, request: TrainBaseline, before: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Validation rows: cubic, the start and the best of this run, the shipped weights."""
    best, _ = load_model(request.output_dir / "best.safetensors", kind="baseline")
    rows = {"before": dict(before), "after": _validated(task, best, request.loop.device)}
    if request.init not in SHIPPED and locate("baseline").is_file():
        shipped, _ = load_model("baseline", kind="baseline")
        rows["shipped"] = _validated(task, shipped, request.loop.device)
    return {"cubic": {"psnr_4095_db": before["cubic_psnr_4095_db"], "gain_db": 0.0}} | rows


def _card(
    request: TrainBaseline, volumes: list[TrainVolume], loop: LoopConfig, init_sha256: str | None
) -> dict[str, Any]:
    """What the weights were made from and for. No folder names: they may name a patient."""
    recipe = request.recipe
    return {
        "version": __version__,
        "command": " ".join(["ctsr", *(Path(a).name if "/" in a else a for a in sys.argv[1:])]),
        "seed": loop.seed,
        "trained_on": sorted(Path(v.name).name for v in volumes),
        "init": None if request.init is None else {"name": Path(request.init).name, "sha256": init_sha256},
        "ranges": {
            "input_spacing_mm": [1.0, 2 * recipe.truth_spacing_max],
            "relative_width": list(recipe.widths),
        },
    }
