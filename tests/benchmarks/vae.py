"""The round trip of the autoencoder beside the best linear one of its size, and what its presets cost.

    python tests/benchmarks/vae.py [--vae FILE ...] [--device cuda] [--write]

Needs the reference volumes. PSNR at peak 4095 HU over the body mask, on scans that nothing was learnt from. The
yardstick is the Karhunen–Loève transform of blocks, learnt on `train`; untrained models stand beside it, and the given
files. With --write the section `vae` of docs/benchmarks.md is replaced.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import ROOT, markdown, options, peak, provenance, reference_data, section

from ctsr.data.volumes import load_volume
from ctsr.infer.vae_tiles import decode_tiled, encode_tiled
from ctsr.metrics.fidelity import PEAK, difference
from ctsr.metrics.masks import body_mask
from ctsr.models.vae import PRESETS, CtVae, VaeConfig, kl
from ctsr.train.vae import BlockTransform
from ctsr.weights.registry import load_model

MEASURED = ("val/RICORD-000082_1.25mm", "test/LIDC-IDRI-0001_2.5mm")
PLANS = (((2, 4, 4), 8, (41.6, 41.2)), ((1, 4, 4), 4, (40.4, 41.7)))  # strides, channels, dB published
PATCH = (32, 64, 64)  # voxels of a training step
RoundTrip = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--vae", action="append", default=[], metavar="FILE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--step", help="a preset: only one training step of it, as JSON")
    asked = parser.parse_args()
    if asked.step:
        print(json.dumps(step(asked.step, asked.device)))
        return
    tables = [
        markdown(round_trips(asked.vae, asked.device)),
        markdown([cost(p, asked.device) for p in PRESETS]),
    ]
    text = "\n\n".join([provenance("python tests/benchmarks/vae.py --write"), *tables])
    print(text)
    if asked.write:
        section(ROOT / "docs" / "benchmarks.md", "vae", text)


def scan(path: Path) -> np.ndarray:
    """(D, H, W) HU."""
    return load_volume(path, z_truth_max=math.inf, notes=[]).hu


def round_trips(files: list[str], device: str) -> list[dict]:
    """A row a model, a column a scan."""
    train = [scan(path) for path in sorted((reference_data() / "train").glob("*.nii.gz"))]
    models: list[tuple[str, tuple[int, ...], RoundTrip]] = []
    published = {}
    for strides, channels, expected in PLANS:
        models.append(
            (
                name := f"Karhunen–Loève, {channels} kept",
                strides,
                BlockTransform(train, strides, channels).round_trip,
            )
        )
        published[name] = expected
        config = VaeConfig.preset("compact", z_strides=strides[:1], latent_channels=channels)
        models.append(("`compact`, untrained", strides, through(CtVae(config), device)))
    for path in files:
        network, _ = load_model(path, kind="vae")
        assert isinstance(network, CtVae)
        models.append((f"`{Path(path).name}`", network.strides, through(network, device)))
    rows = [{"model": name, "strides": " ".join(map(str, strides))} for name, strides, _ in models]
    for case, which in enumerate(MEASURED):
        hu = scan(reference_data() / f"{which}.nii.gz")
        body = body_mask(hu)
        for row, (name, _, round_trip) in zip(rows, models, strict=True):
            found = difference(round_trip(hu), hu, body)
            row[f"{which}: dB"] = f"{found.psnr(PEAK):.2f}"
            row[f"bias HU, {case + 1}"] = f"{found.mean:+.2f}"
            if name in published:
                row[f"known, {case + 1}"] = f"{published[name][case]:.1f}"
    return rows


def through(model: CtVae, device: str) -> RoundTrip:
    model = model.to(device).eval()
    return lambda hu: decode_tiled(model, encode_tiled(model, hu), hu.shape)


def cost(preset: str, device: str) -> dict:
    """Parameters, reach, and one training step in a process of its own."""
    with torch.device("meta"):
        model = CtVae(VaeConfig.preset(preset))
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder)]
    command = [sys.executable, __file__, "--step", preset, "--device", device]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {
        "preset": f"`{preset}`",
        "strides": " ".join(map(str, model.strides)),
        "channels": model.latent_channels,
        "parameters: encoder, decoder": " + ".join(f"{n / 1e6:.2f} M" for n in sizes),
        "reach along z, latent voxels": f"{model.encoder.reach[0]}, {model.decoder.reach[0]}",
        **json.loads(done.stdout),
    }


def step(preset: str, device: str) -> dict[str, str]:
    """One step of AdamW with gradient checkpointing; memory beyond what PyTorch itself takes."""
    before = held(device)
    model = CtVae(VaeConfig.preset(preset)).to(device)
    model.gradient_checkpointing = True
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    patch = PATCH if preset != "mri" else (4, *PATCH[1:])
    for size in ((2, 16, 16), patch):  # the first loads what PyTorch loads late
        x = torch.rand(1, 1, *size, device=device) - 0.5
        start = time.perf_counter()
        latent = [-(-n // s) for n, s in zip(size, model.strides, strict=True)]
        back, mean, logvar = model(x, torch.randn(1, model.latent_channels, *latent, device=device))
        loss = (back - x).abs().mean() + 1e-7 * kl(mean, logvar).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found = float(next(model.parameters()).detach().abs().sum() + loss.detach())  # waits for the device
        seconds = time.perf_counter() - start
        assert math.isfinite(found), preset
    used = (held(device) - before) / 1e9
    return {
        f"a step, checkpointed ({device})": f"{' × '.join(map(str, patch))}: {seconds:.1f} s, {used:.2f} GB"
    }


def held(device: str) -> float:
    """Bytes at most so far: of the device, or of the process."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else peak()


if __name__ == "__main__":
    main()
