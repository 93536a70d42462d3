"""`finetune-vae`: lists of scans in; out a folder of checkpoints that know how their latents are spread."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ctsr.errors import UsageError
from ctsr.infer.vae_tiles import decode_tiled, encode_tiled
from ctsr.io.atomic import write_bytes
from ctsr.models import zoo
from ctsr.models.kl_layout import load_kl
from ctsr.models.vae import PRESETS, CtVae, VaeConfig
from ctsr.train.checkpoint import locked
from ctsr.train.loop import Outcome, Report, train
from ctsr.train.vae import VaeLoss, VaeTask, usual_kl_weight
from ctsr.weights.registry import read_weights
from ctsr.workflows.training import (
    ScanReport,
    ScanTraining,
    Stopping,
    card,
    is_first,
    load_scans,
    load_vae,
    never,
    planned,
    refuse_taken,
)

__all__ = ["FinetuneVae", "Result", "finetune_vae"]

TILE = (32, 64, 64)  # latent voxels; of `compact` the largest activation is then 0.2 GiB
SMALLEST_STD = 1e-6  # of a channel that says nothing

Stop = Callable[[], int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneVae(ScanTraining):
    """What the command line says. preset: None is compact, or what `init` has. kl_weight: None is the usual one."""

    output_dir: Path = Path("checkpoints/vae")
    preset: str | None = None
    kl_weight: float | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """How the training ended, and what the validation found of the best weights."""

    outcome: Outcome
    metrics: dict[str, float] = field(default_factory=dict)


def finetune_vae(request: FinetuneVae, *, report: ScanReport, stopping: Stopping = never) -> Result:
    """Train the autoencoder; then measure the latents of all that it was trained on, and keep that in its files.

    Raises UsageError, InputError, WeightsError, ResourceError before any step, TrainingDiverged during one.
    """
    model, init_sha256 = _starting_model(request, report)
    if any(n % s for n, s in zip(request.recipe.patch, model.strides, strict=True)):
        raise UsageError(f"--patch-size: {request.recipe.patch} is no multiple of {model.strides}")
    refuse_taken(request.output_dir)
    train_set, val_set = load_scans(request, report)
    loop = planned(request.loop, request.epochs, n_scans=len(train_set))
    model.gradient_checkpointing = request.gradient_checkpointing
    names = [v.name for v in train_set]
    kl = usual_kl_weight(model) if request.kl_weight is None else request.kl_weight
    task = VaeTask(
        model, train_set, val_set, recipe=request.recipe, seed=loop.seed, loss=VaeLoss(kl=kl), round_trip=_round_trip,
        card=card(names, seed=loop.seed, init=request.init, init_sha256=init_sha256),
    )  # fmt: skip
    if is_first():
        report.start(train_set, val_set, max_steps=loop.max_steps)
    with stopping() as stop:
        outcome = train(task, loop, request.output_dir, report=report, resume=request.resume, stop=stop)
        if not is_first() or outcome.stopped_by is not None:
            return Result(outcome)
        scans = [v.hu for v in train_set]
        try:
            _keep_latent_scale(request.output_dir, scans, device=loop.device, report=report, stop=stop)
        except _Stopped as exc:
            return Result(replace(outcome, stopped_by=exc.signum))
    best = request.output_dir / "best.safetensors"  # none where a run was cut short before a validation
    return Result(outcome, load_vae(str(best))[1].card["metrics"] if best.exists() else {})


def _starting_model(request: FinetuneVae, report: Report) -> tuple[CtVae, str | None]:
    """The network before the first step, and the sha256 of the file it came from."""
    if request.init is None:
        preset = request.preset or "compact"
        if preset not in PRESETS:
            raise UsageError(f"--preset: {preset} is none of {', '.join(PRESETS)}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.loop.seed)
            return CtVae(VaeConfig.preset(preset)), None
    data = read_weights(request.init)
    metadata = zoo.read_header(data, request.init).get("__metadata__")
    if isinstance(metadata, dict) and "ctsr.format" in metadata:
        model, file = load_vae(request.init)
        model.latent_mean.zero_()  # measured anew when this training is done
        model.latent_std.fill_(1)
        return model, file.sha256
    start = load_kl(data, request.init)
    report.note(f"{request.init}: {start.describe()}")
    return start.model, hashlib.sha256(data).hexdigest()


def _round_trip(model: CtVae, hu: np.ndarray, stop: Stop) -> np.ndarray | None:
    check = _raising(stop)
    try:
        z = encode_tiled(model, hu, tile=TILE, progress=check)
        return decode_tiled(model, z, hu.shape, tile=TILE, progress=check)
    except _Stopped:
        return None


def _keep_latent_scale(
    folder: Path, scans: Sequence[np.ndarray], *, device: str, report: Report, stop: Stop
) -> None:
    """Measure the latents of `scans` and write mean and deviation into `best` and `last`, once a run."""
    with locked(folder):
        for path in (folder / "best.safetensors", folder / "last.safetensors"):
            if not path.exists():
                continue
            file = zoo.unpack(path.read_bytes(), str(path))
            if "latents" in file.card:
                continue
            report.note(f"{path.name}: measuring the latents of {len(scans)} scans")
            model, _ = load_vae(str(path))
            scale = _latent_scale(model.to(device), scans, stop)
            data = zoo.pack(
                file.kind, file.config, file.tensors | scale, card=file.card | {"latents": {"scans": len(scans)}},
                training=file.training | {f"raw/{name}": t.clone() for name, t in scale.items()},
            )  # fmt: skip
            write_bytes(path, data, overwrite=True)


def _latent_scale(model: CtVae, scans: Sequence[np.ndarray], stop: Stop) -> dict[str, Tensor]:
    """Mean and standard deviation of each latent channel over all voxels of all scans; sums in float64."""
    model.latent_mean.zero_()
    model.latent_std.fill_(1)
    n, total, squares = 0, torch.zeros(()), torch.zeros(())
    for hu in scans:
        z = encode_tiled(model, hu, tile=TILE, progress=_raising(stop)).cpu().flatten(1)
        n += z.shape[1]
        total = total + z.sum(dim=1, dtype=torch.float64)
        squares = squares + torch.stack([c.double().square().sum() for c in z])  # a channel at a time: memory
    mean = total / n
    std = (squares / n - mean**2).clamp(min=SMALLEST_STD**2).sqrt()
    return {"latent_mean": mean.float(), "latent_std": std.float()}


class _Stopped(Exception):
    def __init__(self, signum: int) -> None:
        self.signum = signum


def _raising(stop: Stop) -> Callable[[float], None]:
    """A report of progress that ends the work when a signal has come."""

    def check(share: float) -> None:
        if (signum := stop()) is not None:
            raise _Stopped(signum)

    return check
