"""The networks of `upsample`: one, or the three of a diffusion, of which its file names two by sha256."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctsr.errors import WeightsError
from ctsr.infer.device import choose_device, choose_dtype
from ctsr.infer.diffusion import Diffuser, schedule_of
from ctsr.infer.stage_one import Engine
from ctsr.weights.registry import SHIPPED, load_model, locate
from ctsr.workflows.job import Options

if TYPE_CHECKING:
    from torch import nn

__all__ = ["load"]

ADDS_NOTHING = 0.1  # a fitted detail gain below this


def load(o: Options) -> tuple[Engine, Diffuser | None, dict[str, Any]]:
    """Stage one, the diffuser where that is the model, and what a record and the notes say of them.

    Raises WeightsError where a file is none of these, or another than the one that the diffusion was trained for.
    """
    device = choose_device(o.device)
    dtype, reason = choose_dtype(o.dtype, device)
    name, told, diffuser = o.checkpoint or o.model, dict[str, Any](), None
    if o.model == "diffusion" and o.checkpoint is None:
        hint = "--checkpoint FILE or --project DIR; ctsr train-diffusion makes them"
        raise WeightsError("no weights of a diffusion are shipped", hint=hint)
    network: Any
    network, file = load_model(name, kind=o.model)
    if o.model == "diffusion":
        hashes = {key: file.card[key] for key in ("vae_sha256", "stage_one_sha256")}
        coder: Any = _match(o.vae_checkpoint, "vae", hashes["vae_sha256"], name, "--vae-checkpoint")
        first = _match(o.stage_one, "baseline", hashes["stage_one_sha256"], name, "--stage-one")
        try:
            path = schedule_of(file.card, network.config.kappa)
            fitted = o.sampling.calibration(file.card)
            gain, factor = fitted or (1.0, 1.0)
            diffuser = Diffuser(network, coder, path, o.sampling, device, dtype, gain, factor)
        except (WeightsError, AttributeError, TypeError, ValueError) as exc:
            raise WeightsError(str(exc), path=name) from exc
        network = first
        told["diffusion"] = asdict(o.sampling) | hashes | {"detail_gain": gain, "spread_factor": factor}
        if fitted is None:
            words = "these settings were not validated: detail gain 1, and the samples' spread as it is"
            told["notes"] = [words]
        elif gain < ADDS_NOTHING:
            told["notes"] = [f"the diffusion adds nothing: its detail gain is {gain:.2f}"]
    given = name if name.startswith("hf://") else Path(name).name  # no folder: it may name a patient
    engine = Engine(network, device, dtype, None if o.patch is None else o.patch[0])
    return (
        engine,
        diffuser,
        told
        | {
            "weights": given if o.checkpoint else f"{name} (shipped)",
            "weights_sha256": file.sha256,
            "device": str(device),
            "dtype": reason.split(":")[0].split(" ")[0],
            "dtype_reason": reason,
            "ranges": file.card.get("ranges", {}),
        },
    )


def _match(given: str | None, kind: str, wanted: str, checkpoint: str, option: str) -> nn.Module:
    """The network whose file's sha256 is `wanted`: what is given, else of the checkpoint's project, else shipped."""
    names = [given] if given else []
    if not given:
        of_project = locate(checkpoint).resolve().parent.parent / kind / "best.safetensors"
        names = [os.fspath(of_project)] * of_project.is_file() + [kind] * (kind in SHIPPED)
    found = []
    for name in names:
        network, file = load_model(name, kind=kind)
        if file.sha256 == wanted:
            return network
        found.append(f"{name} is {file.sha256[:12]}…")
    there = ", ".join(found) or "none is beside it"
    reason = f"was trained with the {kind} {wanted[:12]}…, {there} (sha256)"
    raise WeightsError(reason, path=checkpoint, hint=f"{option} FILE")
