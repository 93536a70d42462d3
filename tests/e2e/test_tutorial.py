"""The tutorial's commands, as they stand on its page, in an empty folder, by the installed command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from ctsr.infer.vae_tiles import decode_tiled, encode_tiled
from ctsr.io.scans import read_scan
from ctsr.metrics.fidelity import PEAK, psnr
from ctsr.metrics.masks import body_mask
from ctsr.models.vae import CtVae, VaeConfig

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untrained_round_trip(data: Path) -> float:
    """PSNR of the first validation scan through an autoencoder as it starts."""
    scan = read_scan(data / (data / "val_files.txt").read_text().split()[0])
    hu = np.ascontiguousarray(scan.data.transpose(2, 1, 0), np.float32)
    model, whole = CtVae(VaeConfig.preset("tiny")).eval(), hu.shape
    with torch.inference_mode():
        latent = encode_tiled(model, hu, tile=whole, dtype=torch.float32)
        back = decode_tiled(model, latent, whole, tile=whole, dtype=torch.float32)
    return psnr(np.asarray(back), hu, body_mask(hu), peak=PEAK)


@pytest.mark.ci
def test_the_tutorial_runs_and_gives_what_it_says(tmp_path):
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    script = "set -e\n" + "".join(blocks)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("OMP_NUM_THREADS", None)
    ran = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    vae, diffusion = (
        lines(tmp_path / "checkpoints" / kind / "metrics.jsonl") for kind in ("vae", "diffusion")
    )
    assert max(row["psnr_4095_db"] for row in vae) > untrained_round_trip(tmp_path / "data")
    assert diffusion[-1]["denoising_error"] < 1  # what predicting no residual has
    assert abs(diffusion[-1]["mean_psnr_4095_db"] - diffusion[-1]["stage_one_psnr_4095_db"]) < 1
    thin, spread = (
        np.asarray(nib.load(tmp_path / name).dataobj) for name in ("thin.nii.gz", "spread.nii.gz")
    )
    assert np.isfinite(thin).all()
    assert np.isfinite(spread).all()
    assert spread.min() >= 0
    assert "again.nii.gz" in os.listdir(tmp_path)
    truth = (tmp_path / "data" / "test_files.txt").read_text().split()[0]
    assert thin.shape == nib.load(tmp_path / "data" / truth).shape
