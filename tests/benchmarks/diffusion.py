"""Time, memory and agreement of `ctsr upsample --model diffusion`, whole commands on a CPU.

    python tests/benchmarks/diffusion.py [--write]

Needs nothing but ctsr: what a network costs and whether tiles agree depends on its size, not on its training. Networks
whose output counts are random ones, loud enough that a mistake shows. With --write the section `diffusion` of
docs/benchmarks.md is replaced.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from machine import ROOT, markdown, options, peak, provenance, section
from speed import command, thick_input

from ctsr.core.volume import Volume
from ctsr.core.zgrid import ZGrid
from ctsr.diffusion.schedule import Schedule
from ctsr.io.nifti import write_volume
from ctsr.models.control import ControlledUNet, slice_maps
from ctsr.models.latent_unet import PRESETS
from ctsr.models.vae import CtVae, VaeConfig
from ctsr.models.zoo import pack
from ctsr.weights.registry import locate

SHAPE = (64, 256, 256)  # thick slices, rows, columns
LIMIT = 240.0  # s
GPU_MEMORY = 11.0  # GB


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--step", help="a preset: only one training step of it, as JSON")
    asked = parser.parse_args()
    if asked.step:
        print(json.dumps(step(asked.step)))
        return
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        tables = [
            markdown(times(at)),
            markdown(agreement(at)),
            markdown(memory(at), ["`full`, memory", "limit", "planned GB", "peak GB"]),
        ]
    text = "\n\n".join([provenance("python tests/benchmarks/diffusion.py --write"), *tables])
    print(text)
    if asked.write:
        section(ROOT / "docs" / "benchmarks.md", "diffusion", text)


def project(folder: Path, preset: str, *, loudness: float = 0.0) -> list[str]:
    """The options for networks of `preset` with random weights; loudness 0: as they are before training."""
    torch.manual_seed(1)
    networks = {"vae": CtVae(VaeConfig.preset(preset)), "diffusion": ControlledUNet(PRESETS[preset])}
    card = {"stage_one_sha256": hashlib.sha256(locate("baseline").read_bytes()).hexdigest()}
    for kind, network in networks.items():
        for p in network.parameters():
            p.data += torch.randn_like(p) * (loudness / p[0].numel() ** 0.5)
        if kind == "diffusion":
            card["schedule"] = asdict(Schedule.ctsr(network.config.kappa))
        path = folder / preset / "checkpoints" / kind / "best.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data := pack(kind, network.config.to_dict(), network.state_dict(), card=card))
        card["vae_sha256"] = hashlib.sha256(data).hexdigest()
    return ["--model", "diffusion", "--checkpoint", str(path)]


def times(folder: Path) -> list[dict]:
    """`compact` at the size that the figure names: one sample, and as many as the default."""
    source = folder / "thick.nii"
    small = thick_input(folder / "large.nii", SHAPE[0])[:256, :256]
    write_volume(Volume(np.asfortranarray(small), np.diag([-0.7, -0.7, 2.5, 1]), slice_thickness=2.5), source)
    options = project(folder, "compact", loudness=0.1)
    rows = []
    for samples, limit in ((1, LIMIT), (4, None)):
        told = [*options, "--samples", str(samples), "--overwrite"]
        seconds, most = command("upsample", str(source), str(folder / "thin.nii"), *told)
        rows.append(
            {
                "`compact`, 256 × 256 × 64 → 128, 15 steps": f"`--samples {samples}`",
                "s": seconds,
                "figure": limit,
                "met": limit and ("yes" if seconds <= limit else "**missed**"),
                "peak GB": most / 1e9,
            }
        )
    return rows


def agreement(folder: Path) -> list[dict]:
    """What must not change the result, of networks that change tens of HU."""
    source = folder / "noise.nii"
    hu = np.random.default_rng(0).normal(0, 200, (256, 256, 64)).astype(np.float32)
    write_volume(Volume(np.asfortranarray(hu), np.diag([-0.7, -0.7, 2.5, 1])), source)
    loud = [*project(folder, "tiny", loudness=0.3), "--num-steps", "4", "--samples", "1"]

    def thin(*options: str) -> np.ndarray:
        command("upsample", str(source), str(folder / "thin.nii"), "--overwrite", *options)
        return np.asarray(nib.load(folder / "thin.nii").dataobj, np.float64)

    whole, stage_one = thin(*loud), thin()
    limit = f"{int(planned(source, *loud) * 0.6e9)}"
    compared = {
        "an untrained diffusion − `baseline`": (
            thin(*project(folder / "new", "tiny")),
            stage_one,
            (1e-3, 1e-3),
        ),
        "the same seed twice": (thin(*loud), whole, (0.0, 0.0)),
        "tiles and slabs − whole": (thin(*loud, "--max-memory", limit), whole, (0.5, 5.0)),
        "for scale: this diffusion − `baseline`": (whole, stage_one, None),
    }
    rows = []
    for name, (one, other, limits) in compared.items():
        apart = np.abs(one - other)
        found = float(apart.mean()), float(np.quantile(apart, 0.999))
        rows.append(
            {
                "the results apart, HU": name,
                "mean": f"{found[0]:.2g}",
                "99.9 %": f"{found[1]:.2g}",
                "figure": limits and f"{limits[0]:g}, {limits[1]:g}",
                "met": limits
                and ("yes" if found[0] <= limits[0] and found[1] <= limits[1] else "**missed**"),
            }
        )
    return rows


def planned(source: Path, *options: str) -> float:
    """GB that the command says it needs."""
    ctsr = str(Path(sys.executable).with_name("ctsr"))
    told = [ctsr, "upsample", str(source), str(source.with_name("no.nii")), "--dry-run", *options]
    done = subprocess.run(told, check=True, capture_output=True, text=True)
    return float(done.stdout.split(" GB at most")[0].split()[-1])


def memory(folder: Path) -> list[dict]:
    """`full` at the size that the figure names, as planned, and plan beside peak at a size that a CPU can do."""
    thick_input(folder / "large.nii", 128)
    small = np.asfortranarray(thick_input(folder / "small.nii", 8)[:96, :96])
    write_volume(Volume(small, np.diag([-0.7, -0.7, 2.5, 1])), folder / "small.nii", overwrite=True)
    full = [*project(folder, "full"), "--samples", "1", "--num-steps", "2", "--overwrite"]
    rows = []
    for size, limit in (("512 × 512 × 128 → 256", f"{GPU_MEMORY:g}G"), ("96 × 96 × 8 → 16", "8G")):
        source = folder / ("large.nii" if "512" in size else "small.nii")
        plan = planned(source, *full, "--max-memory", limit)
        held = None
        if source.name == "small.nii":
            held = (
                command("upsample", str(source), str(folder / "thin.nii"), *full, "--max-memory", limit)[1]
                / 1e9
            )
        rows.append({"`full`, memory": size, "limit": limit, "planned GB": plan, "peak GB": held})
    command_line = [sys.executable, __file__, "--step", "full"]
    done = subprocess.run(command_line, check=True, capture_output=True, text=True)
    return [*rows, json.loads(done.stdout)]


def step(preset: str) -> dict:
    """A step of AdamW with batch 1 and gradient checkpointing, on a latent of 8 × 24 × 24."""
    network = ControlledUNet(PRESETS[preset])
    network.base.gradient_checkpointing = True
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4)
    y0 = torch.randn(1, network.config.latent_channels, 8, 24, 24)
    one, maps = torch.ones(1), slice_maps(ZGrid(8, 2.0), 2)[None]
    made = network(y0 + 0.1, y0, 0.5 * one, factor=2 * one, rho=one, maps=maps)
    (made - 0.1).square().mean().backward()
    optimiser.step()
    return {
        "`full`, memory": "a training step, batch 1, 8 × 24 × 24 latent",
        "limit": "11G",
        "peak GB": peak() / 1e9,
    }


if __name__ == "__main__":
    main()
