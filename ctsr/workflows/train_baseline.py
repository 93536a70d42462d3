"""`train-baseline`: lists of scans in, a folder of checkpoints out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from ctsr.data.pairs import PairRecipe, PairSource
from ctsr.errors import UsageError
from ctsr.models.simple_unet3d import SimpleUNet3D
from ctsr.train.baseline import BaselineTask
from ctsr.train.loop import train
from ctsr.weights.registry import SHIPPED, load_model, locate
from ctsr.workflows import training as t
from ctsr.workflows.requests import TrainBaseline

__all__ = ["train_baseline"]

PAIRS_LOOKED_AT = 128  # for the shares of input spacings; a share is then known to 4 %


def train_baseline(request: TrainBaseline, *, report: t.Report, stopping: t.Stopping) -> t.Result:
    """Train SimpleUNet3D; from other weights (`init`), validation rows of cubic, before, after and shipped.

    Raises UsageError, InputError, WeightsError, ResourceError before any step, TrainingDiverged during one.
    """
    model, made_from = _starting_model(request)
    recipe = replace(PairRecipe(), patch=request.patch_size)
    if recipe.patch[0] % 2:
        raise UsageError(f"--patch-size: {recipe.patch} needs an even number of slices")
    if recipe.patch[1] % model.stride or recipe.patch[2] % model.stride:
        raise UsageError(f"--patch-size: {recipe.patch} is not a multiple of {model.stride} in plane")
    t.prepare(request)
    train_set, val_set = t.load_scans(request, report)
    loop = t.planned(request, n_scans=len(train_set))
    model.gradient_checkpointing = request.gradient_checkpointing
    card = t.card([v.name for v in train_set], seed=loop.seed, init=made_from)
    card["ranges"] = {
        "input_spacing_mm": [1.0, 2 * recipe.truth_spacing_max],
        "relative_width": list(recipe.widths),
    }
    task = BaselineTask(model, train_set, val_set, recipe=recipe, seed=loop.seed, card=card)
    report.note(f"input spacing of the pairs: {_spacing_shares(task.source)}")
    report.begin(loop.max_steps)

    def validated(network: torch.nn.Module) -> dict[str, float]:
        with torch.inference_mode():
            return task.validate(network.to(loop.device), lambda: None) or {}

    before = validated(model) if made_from and t.is_first() else {}
    with stopping() as stop:
        outcome = train(task, loop, request.folder, report=report, resume=request.resume == "auto", stop=stop)
    rows: dict[str, Any] = {}
    if before and outcome.stopped_by is None:
        best, _ = load_model(request.folder / "best.safetensors", kind="baseline")
        rows["cubic"] = {"psnr_4095_db": before["cubic_psnr_4095_db"], "gain_db": 0.0}
        rows |= {"before": before, "after": validated(best)}
        if request.init not in SHIPPED and locate("baseline").is_file():
            rows["shipped"] = validated(load_model("baseline", kind="baseline")[0])
    return t.Result(outcome, rows)


def _starting_model(request: TrainBaseline) -> tuple[SimpleUNet3D, tuple[str, str] | None]:
    """The network before the first step, and the file it came from with its sha256."""
    if request.init is not None:
        model, file = load_model(request.init, kind="baseline")
        assert isinstance(model, SimpleUNet3D)
        return model, (request.init, file.sha256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        return SimpleUNet3D(), None


def _spacing_shares(source: PairSource) -> str:
    counts = Counter(int(source.input_spacing(i)) for i in range(PAIRS_LOOKED_AT))
    return ", ".join(f"{mm}–{mm + 1} mm {counts[mm] / PAIRS_LOOKED_AT:.0%}" for mm in sorted(counts))
