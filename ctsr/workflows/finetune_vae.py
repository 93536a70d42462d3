"""`finetune-vae`: lists of scans in; out a folder of checkpoints that know how their latents are spread."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ctsr.data.pairs import PairRecipe
from ctsr.errors import UsageError
from ctsr.infer.vae_tiles import decode_tiled, encode_tiled
from ctsr.io.atomic import write_bytes
from ctsr.models import zoo
from ctsr.models.kl_layout import load_kl
from ctsr.models.vae import CtVae, VaeConfig
from ctsr.train.checkpoint import locked
from ctsr.train.loop import Heed, Stopped, heeding, train
from ctsr.train.vae import VaeLoss, VaeTask, usual_kl_weight
from ctsr.weights.registry import read_weights
from ctsr.workflows import training as t
from ctsr.workflows.requests import FinetuneVae

__all__ = ["finetune_vae"]

SMALLEST_STD = 1e-6  # of a channel that says nothing


def finetune_vae(request: FinetuneVae, *, report: t.Report, stopping: t.Stopping) -> t.Result:
    """Train the autoencoder; then measure the latents of all that it was trained on, and keep that in its files.

    Raises UsageError, InputError, WeightsError, ResourceError before any step, TrainingDiverged during one.
    """
    model, made_from = _starting_model(request, report)
    recipe = replace(PairRecipe(), patch=request.patch_size)
    if any(n % s for n, s in zip(recipe.patch, model.strides, strict=True)):
        raise UsageError(f"--patch-size: {recipe.patch} is no multiple of {model.strides}")
    t.prepare(request)
    train_set, val_set = t.load_scans(request, report)
    loop = t.planned(request, n_scans=len(train_set))
    model.gradient_checkpointing = request.gradient_checkpointing
    kl = usual_kl_weight(model) if request.kl_weight is None else request.kl_weight
    task = VaeTask(
        model, train_set, val_set, recipe=recipe, seed=loop.seed, loss=VaeLoss(kl=kl), round_trip=_round_trip,
        card=t.card([v.name for v in train_set], seed=loop.seed, init=made_from),
    )  # fmt: skip
    report.begin(loop.max_steps)
    with stopping() as stop:
        resume = request.resume == "auto"
        outcome = train(task, loop, request.folder, report=report, resume=resume, stop=stop)
        if not t.is_first() or outcome.stopped_by is not None:
            return t.Result(outcome)
        try:
            _keep_latent_scale(request, [v.hu for v in train_set], loop.device, report, heeding(stop))
        except Stopped as exc:
            return t.Result(replace(outcome, stopped_by=exc.signum))
    best = request.folder / "best.safetensors"  # none where a run was cut short before a validation
    return t.Result(outcome, t.load_vae(str(best))[1].card["metrics"] if best.exists() else {})


def _starting_model(request: FinetuneVae, report: t.Report) -> tuple[CtVae, tuple[str, str] | None]:
    """The network before the first step, and the file it came from with its sha256."""
    name = request.init
    if name in (None, "none"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            return CtVae(VaeConfig.preset(request.preset or "compact")), None
    data = read_weights(name)
    metadata = zoo.read_header(data, name).get("__metadata__")
    if isinstance(metadata, dict) and "ctsr.format" in metadata:
        model, file = t.load_vae(name)
        model.latent_mean.zero_()  # measured anew when this training is done
        model.latent_std.fill_(1)
        return model, (name, file.sha256)
    start = load_kl(data, name)
    report.note(f"{name}: {start.describe()}")
    return start.model, (name, hashlib.sha256(data).hexdigest())


def _round_trip(model: CtVae, hu: np.ndarray, heed: Heed) -> np.ndarray:
    return decode_tiled(model, encode_tiled(model, hu, progress=heed), hu.shape, progress=heed)


def _keep_latent_scale(
    request: FinetuneVae, scans: Sequence[np.ndarray], device: str, report: t.Report, heed: Heed
) -> None:
    """Measure the latents of `scans` and write mean and deviation into `best` and `last`, once a run."""
    with locked(request.folder):
        for path in (request.folder / "best.safetensors", request.folder / "last.safetensors"):
            if not path.exists():
                continue
            file = zoo.unpack(path.read_bytes(), str(path))
            if "latents" in file.card:
                continue
            report.note(f"{path.name}: measuring the latents of {len(scans)} scans")
            scale = _latent_scale(t.load_vae(str(path))[0].to(device), scans, heed)
            data = zoo.pack(
                file.kind, file.config, file.tensors | scale, card=file.card | {"latents": {"scans": len(scans)}},
                training=file.training | {f"raw/{name}": x.clone() for name, x in scale.items()},
            )  # fmt: skip
            write_bytes(path, data, overwrite=True)


def _latent_scale(model: CtVae, scans: Sequence[np.ndarray], heed: Heed) -> dict[str, Tensor]:
    """Mean and standard deviation of each latent channel over all voxels of all scans; sums in float64."""
    model.latent_mean.zero_()
    model.latent_std.fill_(1)
    n, total, squares = 0, torch.zeros(()), torch.zeros(())
    for hu in scans:
        z = encode_tiled(model, hu, progress=heed).cpu().flatten(1)
        n += z.shape[1]
        total = total + z.sum(dim=1, dtype=torch.float64)
        squares = squares + torch.stack([c.double().square().sum() for c in z])  # a channel at a time: memory
    mean = total / n
    std = (squares / n - mean**2).clamp(min=SMALLEST_STD**2).sqrt()
    return {"latent_mean": mean.float(), "latent_std": std.float()}
