"""Shapes of the network beside each other: what they gain on the validation scan, and what they cost.

    python tests/benchmarks/variants.py "NAME=FILE" ... [--write]

A FILE is trained weights or `baseline`. The gain is over cubic at 2×. The time is that of the doubling of 512 × 512 ×
133 slices of a synthetic thorax, with the matrices along z and the projection, the faster of 2 runs in turn. With
--write the section `variants` of docs/weights.md and docs/variants.png are replaced.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from machine import ROOT, markdown, options, provenance, reference_data, section
from matplotlib.figure import Figure
from speed import thick_input
from torch.utils.flop_counter import FlopCounterMode

from ctsr.data.pairs import PairRecipe
from ctsr.data.volumes import load_volume
from ctsr.infer.stage_one import Engine
from ctsr.infer.windows import Tiling, occupied_box
from ctsr.models.simple_unet3d import SimpleUNet3D
from ctsr.physics.profile import SliceProfile
from ctsr.train.baseline import BaselineTask
from ctsr.weights.registry import load_model

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
REPEATS = 2


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("variants", nargs="+", metavar="NAME=FILE")
    asked = parser.parse_args()
    networks: dict[str, SimpleUNet3D] = {}
    for text in asked.variants:
        name, file = text.rsplit("=", 1)
        networks[name] = load_model(file, kind="baseline")[0]  # type: ignore[assignment]
    val = [load_volume(reference_data() / "val" / "RICORD-000082_1.25mm.nii.gz", z_truth_max=1.5, notes=[])]
    with tempfile.TemporaryDirectory() as folder:
        y = np.ascontiguousarray(thick_input(Path(folder) / "thick.nii").transpose(2, 1, 0))
    taken: dict[tuple[str, str], list[float]] = {(n, f): [] for n in networks for f in FORMATS}
    for _ in range(REPEATS):
        for name, number in taken:
            taken[name, number].append(seconds(networks[name], FORMATS[number], y))
    rows = []
    for name, network in networks.items():
        task = BaselineTask(network, val, val, recipe=PairRecipe(), seed=0, card={})
        with torch.inference_mode():
            found = task.validate(network, lambda *done: None)
        assert found is not None
        rows.append(
            {
                "network": name,
                "channels": " ".join(map(str, network.config.channels)),
                "unshuffle": network.config.unshuffle,
                "parameters": f"{sum(p.numel() for p in network.parameters()):,}",
                "kFLOP a thick voxel": round(flop(network) / 1e3),
                "gain dB": found["gain_db"],
                **{f"{f}, s": min(taken[name, f]) for f in FORMATS},
            }
        )
    text = f"{provenance('python tests/benchmarks/variants.py … --write')}\n\n{markdown(rows)}"
    print(text)
    if asked.write:
        section(ROOT / "docs" / "weights.md", "variants", text)
        picture(rows).savefig(ROOT / "docs" / "variants.png", dpi=110)


def seconds(network: SimpleUNet3D, dtype: torch.dtype, y: np.ndarray) -> float:
    """Of one doubling."""
    engine = Engine(network.to(memory_format=torch.channels_last_3d), torch.device("cpu"), dtype, None)  # type: ignore[call-overload]
    reach, stride = network.plane_reach, network.stride
    tiling = Tiling(*y.shape[1:], None, reach, reach, stride, box=occupied_box(y, stride))
    start = time.perf_counter()
    engine.double(y, SliceProfile(), spacing=2.5, thickness=2.5, rho=1.0, stack=len(y), tiling=tiling)
    return time.perf_counter() - start


def flop(network: SimpleUNet3D) -> float:
    """Floating point operations of the convolutions a thick voxel, a multiply-add being two."""
    y = torch.zeros(1, 1, 12, 64, 64)
    with FlopCounterMode(display=False) as counter:
        network(y, y.repeat_interleave(2, dim=2), torch.ones(1))
    return counter.get_total_flops() / y.numel()


def picture(rows: list[dict]) -> Figure:
    """Gain against seconds."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, marker in zip(FORMATS, "os", strict=True):
        axes.plot([r[f"{number}, s"] for r in rows], [r["gain dB"] for r in rows], marker, label=number)
    for row in rows:
        axes.annotate(
            row["network"],
            (row["bf16, s"], row["gain dB"]),
            xytext=(6, -12),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set(
        xlabel="seconds for 512 × 512 × 133 → 266, two cores", ylabel="gain over cubic on validation, dB"
    )
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
