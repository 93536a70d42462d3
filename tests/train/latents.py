"""A project of three small scans with an untrained autoencoder, and its latents: a second to make and to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ctsr.models import zoo
from ctsr.models.vae import CtVae, VaeConfig
from ctsr.workflows.encode_latents import encode_latents
from ctsr.workflows.folder import Report
from ctsr.workflows.requests import EncodeLatents
from tests.io.make import affine_of, nifti, put
from tests.train import tiny

SHAPE = (24, 32, 32)


def make_project(folder: Path) -> Path:
    """Scans 1 and 2 to train on, 3 to validate on, and a tiny autoencoder, which is a block transform."""
    data = folder / "data"
    data.mkdir(parents=True)
    for seed in (1, 2, 3):
        hu = np.ascontiguousarray(tiny.body(seed, SHAPE).transpose(2, 1, 0))
        put(data, nifti(hu, affine_of((0.8, 0.8, 1.0))), f"scan{seed}.nii.gz")
    (data / "train_files.txt").write_text("scan1.nii.gz\nscan2.nii.gz\n")
    (data / "val_files.txt").write_text("scan3.nii.gz\n")
    vae_file(folder)
    return folder


def vae_file(folder: Path, *, seed: int = 0) -> Path:
    """An untrained autoencoder where a training would leave it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = CtVae(VaeConfig.preset("tiny"))
    path = folder / "checkpoints/vae/best.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    card = {"seed": seed, "latents": {"scans": 2}}
    path.write_bytes(zoo.pack("vae", vae.config.to_dict(), vae.state_dict(), card=card))
    return path


def encode(project: Path, report: Report | None = None, **changes: object) -> list[dict[str, object]]:
    """`encode-latents` in the project: one pair for each of two factors, unless told otherwise."""
    asked = {"factors": "2,3", "variants": 1, "device": "cpu", "dtype": "fp32"} | changes
    return encode_latents(EncodeLatents(project=project, **asked), report=report or Report())  # type: ignore[arg-type]
