"""`train-baseline`: lists of scans in, a folder of checkpoints out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from ctsr.data.pairs import PairSource
from ctsr.errors import UsageError
from ctsr.models.simple_unet3d import SimpleUNet3D
from ctsr.train.baseline import BaselineTask
from ctsr.train.loop import Outcome, train
from ctsr.weights.registry import SHIPPED, load_model, locate
from ctsr.workflows.training import (
    ScanReport,
    ScanTraining,
    Stopping,
    card,
    is_first,
    load_scans,
    never,
    planned,
    refuse_taken,
)

__all__ = ["Result", "TrainBaseline", "TrainingReport", "train_baseline"]

PAIRS_LOOKED_AT = 128  # for the shares of input spacings; a share is then known to 4 %


class TrainingReport(ScanReport, Protocol):
    """What the training of a baseline tells."""

    def shares(self, spacing_shares: dict[int, float]) -> None:
        """Of the pairs, by input spacing in whole mm (1: from 1 to below 2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBaseline(ScanTraining):
    """What the command line says."""

    output_dir: Path = Path("checkpoints/baseline")


@dataclass(frozen=True, slots=True)
class Result:
    """How the training ended, and (from `init`) the validation rows before and after."""

    outcome: Outcome
    comparison: dict[str, dict[str, float]] = field(default_factory=dict)


def train_baseline(request: TrainBaseline, *, report: TrainingReport, stopping: Stopping = never) -> Result:
    """Train SimpleUNet3D.

    Raises UsageError, InputError, WeightsError, ResourceError before any step, TrainingDiverged during one.
    """
    model, init_sha256 = _starting_model(request)
    if request.recipe.patch[1] % model.stride or request.recipe.patch[2] % model.stride:
        raise UsageError(f"--patch-size: {request.recipe.patch} is not a multiple of {model.stride} in plane")
    refuse_taken(request.output_dir)
    train_set, val_set = load_scans(request, report)
    loop = planned(request.loop, request.epochs, n_scans=len(train_set))
    model.gradient_checkpointing = request.gradient_checkpointing
    names = [v.name for v in train_set]
    ranges = {
        "input_spacing_mm": [1.0, 2 * request.recipe.truth_spacing_max],
        "relative_width": list(request.recipe.widths),
    }
    made_of = card(names, seed=loop.seed, init=request.init, init_sha256=init_sha256) | {"ranges": ranges}
    task = BaselineTask(model, train_set, val_set, recipe=request.recipe, seed=loop.seed, card=made_of)
    before: dict[str, float] = {}
    if is_first():
        report.start(train_set, val_set, max_steps=loop.max_steps)
        report.shares(_spacing_shares(task.source))
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
