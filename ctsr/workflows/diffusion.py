"""The three networks of a diffusion: its own file, and the VAE and stage one that this names by sha256."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from ctsr.errors import WeightsError
from ctsr.infer.diffusion import Diffuser, schedule_of
from ctsr.infer.sampling import Sampling
from ctsr.models.simple_unet3d import SimpleUNet3D
from ctsr.weights.registry import SHIPPED, load_model, locate

if TYPE_CHECKING:
    from torch import nn

    from ctsr.models.zoo import ModelFile

__all__ = ["Networks", "load_diffusion"]

ADDS_NOTHING = 0.1  # a fitted detail gain below this

Networks = tuple[Diffuser, SimpleUNet3D, "ModelFile", dict[str, Any]]


def load_diffusion(
    checkpoint: str | None,
    sampling: Sampling,
    *,
    vae: str | None,
    stage_one: str | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Networks:
    """The diffuser, its stage one, the diffusion's file, and what a record and the notes say of them.

    vae, stage_one: where they are; None: beside the checkpoint as a project has them, or shipped.
    Raises WeightsError where a file is none of these, or another than the one that the diffusion was trained for.
    """
    if checkpoint is None:
        raise WeightsError(
            "no weights of a diffusion are shipped",
            hint="--checkpoint FILE or --project DIR; ctsr train-diffusion makes them",
        )
    network, file = load_model(checkpoint, kind="diffusion")
    hashes = {name: file.card[name] for name in ("vae_sha256", "stage_one_sha256")}
    coder = _match(vae, "vae", hashes["vae_sha256"], checkpoint, "--vae-checkpoint")
    first = _match(stage_one, "baseline", hashes["stage_one_sha256"], checkpoint, "--stage-one")
    try:
        path = schedule_of(file.card, network.config.kappa)  # type: ignore[union-attr,arg-type]
        fitted = sampling.calibration(file.card)
        gain, factor = fitted or (1.0, 1.0)
        diffuser = Diffuser(network, coder, path, sampling, device, dtype, gain, factor)  # type: ignore[arg-type]
    except (WeightsError, TypeError, ValueError) as exc:
        raise WeightsError(str(exc), path=checkpoint) from exc
    notes = []
    if fitted is None:
        notes.append("these settings were not validated: detail gain 1, and the samples' spread as it is")
    elif gain < ADDS_NOTHING:
        notes.append(f"the diffusion adds nothing: its detail gain is {gain:.2f}")
    used = asdict(sampling) | hashes | {"detail_gain": gain, "spread_factor": factor}
    return diffuser, first, file, {"diffusion": used, "notes": notes}  # type: ignore[return-value]


def _match(given: str | None, kind: str, wanted: str, checkpoint: str, option: str) -> nn.Module:
    """The network whose file's sha256 is `wanted`: what is given, else of the checkpoint's project, else shipped."""
    of_project = locate(checkpoint).resolve().parents[1] / kind / "best.safetensors"
    found = []
    for name in (
        [given] if given else [os.fspath(of_project)] * of_project.is_file() + [kind] * (kind in SHIPPED)
    ):
        network, file = load_model(name, kind=kind)
        if file.sha256 == wanted:
            return network
        found.append(f"{name} is {file.sha256[:12]}…")
    raise WeightsError(
        f"was trained with the {kind} {wanted[:12]}…, {', '.join(found) or 'none is beside it'} (sha256)",
        path=checkpoint,
        hint=f"{option} FILE",
    )
