"""`train-diffusion`: pairs of latents in, a folder of checkpoints out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctsr.data.latents import LatentPair, check_stamps
from ctsr.data.volumes import refuse_leaks
from ctsr.diffusion.schedule import Schedule, kappa_for
from ctsr.errors import UsageError, WeightsError
from ctsr.infer.diffusion import Diffuser, schedule_of
from ctsr.infer.sampling import Sampling
from ctsr.io.lists import read_file_list
from ctsr.models.control import ControlledUNet
from ctsr.models.latent_unet import LatentUNetConfig
from ctsr.models.vae import CtVae
from ctsr.train import checkpoint
from ctsr.train.diffusion import DiffusionTask, Regression, residual_rms
from ctsr.train.loop import processes, train
from ctsr.weights.registry import load_model
from ctsr.workflows import training as t
from ctsr.workflows.requests import TrainDiffusion

__all__ = ["train_diffusion"]

WARM_UP, WARM_UP_SHARE = 500, 20  # steps at most, and what part of all steps, that V is measured with
LEAKY = 0.05  # difference of the residuals' size, train against val, from which on it is said
STEP = 0.1  # of a latent's standard deviation, that gains are measured with
MAKE_LATENTS = "ctsr encode-latents makes them"


def train_diffusion(request: TrainDiffusion, *, report: t.Report, stopping: t.Stopping) -> t.Result:
    """Train U-Net and control branch; before, where κ is neither given nor known, a regression that it follows from.

    Raises UsageError, InputError, WeightsError, ResourceError before any step, TrainingDiverged during one.
    """
    folder, resume = request.folder, request.resume == "auto"
    train_set, val_set = (_pairs(request, split, report) for split in request.splits)
    refuse_leaks(train_set, val_set)
    name = request.vae(request.vae_checkpoint)
    vae, vae_file = t.load_vae(name)
    _check(train_set + val_set, (vae.latent_channels, *vae.strides), vae_file.sha256, name)
    t.prepare(request)
    scans = sorted({p.name for p in train_set})
    loop = t.planned(request, n_scans=len(scans))
    sigma, of_val = residual_rms(train_set), residual_rms(val_set)
    gains = _gains(vae.to(loop.device), val_set[0])
    hu, hu_of_val = (math.sqrt(np.square(rms * gains).sum()) for rms in (sigma, of_val))
    is_out_of_fold = all(p.record.stamp.is_out_of_fold for p in train_set + val_set)
    fold = "out of fold" if is_out_of_fold else "trained on some of these scans"
    report.note(f"stage one {fold}; its latents lack {hu:.1f} HU, {hu_of_val:.1f} HU on the validation set")
    if abs(hu_of_val / hu - 1) > LEAKY:
        report.note("they differ by more than 5 %: scans of another kind, or a stage one that knows some")

    def task(path: Schedule, sampling: Sampling) -> DiffusionTask:
        def change(x: np.ndarray, network: ControlledUNet, **how: Any) -> np.ndarray:
            diffuser = Diffuser(network, vae, path, sampling, torch.device(loop.device), torch.float32)
            size = (x.shape[0], x.shape[1], x.shape[2])
            changes = diffuser.draw(lambda a, b: x[a:b], [(0, len(x))], size, **how)
            return np.stack(list(changes(0, len(x))))

        # whose noise is that of latents, not of residuals; asked for, or of the run that goes on
        is_published = path in (Schedule.published(15), Schedule.published(4))
        model = _model(request, vae.latent_channels, path.kappa, [1.0] if is_published else sigma.tolist())
        told = {name: getattr(sampling, name) for name in ("sampler", "num_steps", "samples")}
        made_of = t.card(scans, seed=loop.seed) | {
            "vae_sha256": vae_file.sha256,
            "stage_one_sha256": val_set[0].record.stamp.stage_one_sha256,
            "stage_one_out_of_fold": is_out_of_fold,
            "residual_rms": {"train": sigma.tolist(), "val": of_val.tolist()},
            "schedule": asdict(path),
            "sampling": told,
            "ranges": _ranges(train_set),
        }
        return DiffusionTask(
            model, train_set, val_set, path=path, sampling=told, change=change, patch=request.patch_size,
            weights=(gains / hu) ** 2 * len(gains),
            dropout=request.guidance_dropout, seed=loop.seed, card=made_of,
        )  # fmt: skip

    with stopping() as stop, processes(loop):
        path = _known_schedule(request)
        if path is None:
            steps = min(WARM_UP, max(1, loop.max_steps // WARM_UP_SHARE))
            warm_up = replace(
                loop, max_steps=steps, validate_every=steps, warmup_steps=steps // 5, log="none"
            )
            report.begin(steps)
            regression = task(Regression(0.5, 0.99, 1.0, 1.0), Sampling(num_steps=1, samples=1))
            where = folder / "regression"
            outcome = train(regression, warm_up, where, report=report, resume=resume, stop=stop)
            if outcome.stopped_by is not None:
                return t.Result(outcome)
            losses = checkpoint.read(where).card["training"]["losses"]
            variance = min(1.0, float(np.mean(losses[len(losses) // 2 :])))
            path = Schedule.ctsr(kappa_for(1.0, variance), variance)
            report.note(f"κ = {path.kappa:.3g}: after {steps} steps of regression V = {variance:.3g} σ_r²")
        report.begin(loop.max_steps)
        outcome = train(task(path, request.sampling), loop, folder, report=report, resume=resume, stop=stop)
    if outcome.stopped_by is not None or not t.is_first():
        return t.Result(outcome)
    return t.Result(outcome, load_model(folder / "best.safetensors", kind="diffusion")[1].card["metrics"])


def _pairs(request: TrainDiffusion, split: Path, report: t.Report) -> list[LatentPair]:
    """The pairs of the scans in a list, the names of which are those of folders of latents."""
    folder = request.latents
    if not folder.is_dir():
        raise UsageError("no latents here", path=folder, hint=MAKE_LATENTS)
    names = [p.relative_to(folder).as_posix() for p in read_file_list(split, folder, must_exist=False)]
    found = {name: LatentPair.find(folder, name) for name in names}
    if without := [name for name in names if not found[name]]:
        finding = (
            f"{len(without)} of {len(names)} scans in {split} have no latents, the first is {without[0]}"
        )
        if len(without) == len(names):
            raise UsageError(finding, path=folder, hint=MAKE_LATENTS)
        report.note(finding)
    return [pair for pairs in found.values() for pair in pairs]


def _check(pairs: Sequence[LatentPair], plan: tuple[int, ...], sha256: str, vae: str) -> None:
    """WeightsError where latents are not of this autoencoder, or of several stage ones."""
    check_stamps((p.path, p.record.stamp) for p in pairs)
    if (theirs := pairs[0].record.stamp.vae_sha256) != sha256:
        raise WeightsError(
            f"latents of the VAE {theirs[:12]}…, {vae} is {sha256[:12]}…",
            path=pairs[0].path,
            hint="--vae-checkpoint, or encode them again",
        )
    for p in pairs:
        if (found := (p.shape[0], *p.record.strides)) != plan:
            raise WeightsError(f"latents of {found} channels and strides, the VAE has {plan}", path=p.path)


def _model(request: TrainDiffusion, channels: int, kappa: float, sigma: Sequence[float]) -> ControlledUNet:
    changes: dict[str, Any] = {"latent_channels": channels, "kappa": kappa, "residual_std": tuple(sigma)}
    if request.model_channels is not None:
        changes["model_channels"] = request.model_channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        model = ControlledUNet(LatentUNetConfig.preset(request.preset, **changes))
    model.base.gradient_checkpointing = request.gradient_checkpointing
    return model


@torch.inference_mode()
def _gains(vae: CtVae, pair: LatentPair) -> np.ndarray:
    """(C,) HU, rms, that the decoder makes of noise of standard deviation 1 in each channel, to first order."""
    size = [min(n, 16) for n in pair.shape[1:]]
    z = pair.read([(n - m) // 2 for n, m in zip(pair.shape[1:], size, strict=True)], size)[0]
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(size, np.float32))
    moved = z + STEP * torch.eye(len(z))[:, :, None, None, None] * noise
    before, after = (vae.decode(vae.unstandardise(t.to(vae.latent_mean))) for t in (z[None], moved))
    rms = (after - before).square().mean(dim=(1, 2, 3, 4)).sqrt() * vae.config.hu_scale / STEP
    gains: np.ndarray = rms.double().cpu().numpy()
    return gains


def _known_schedule(request: TrainDiffusion) -> Schedule | None:
    """The schedule where it needs no measuring: as asked for, or as the run that goes on has it."""
    if request.schedule == "published":
        return Schedule.published(request.sampling.num_steps)
    if request.kappa is not None:
        return Schedule.ctsr(request.kappa)
    if request.resume == "no" or not (request.folder / "last.safetensors").exists():
        return None
    file = checkpoint.read(request.folder, request.kind)
    return schedule_of(file.card, file.config.get("kappa", 0.0))


def _ranges(pairs: Sequence[LatentPair]) -> dict[str, list[float]]:
    """What the weights are for: see `ctsr.metrics.domain`."""
    of = {
        "factor": [float(p.record.factor) for p in pairs],
        "input_spacing_mm": [p.record.factor * p.record.spacing for p in pairs],
        "relative_width": [p.record.rho for p in pairs],
        "in_plane_spacing_mm": [p.record.pixel for p in pairs],
    }
    return {name: [min(values), max(values)] for name, values in of.items()}
