"""The README's picture: thick input, cubic, ctsr and the truth, coronal, in a lung and a soft-tissue window.

    python tests/benchmarks/pictures.py [--checkpoint FILE]

From LIDC-IDRI-0001 (CC BY 3.0), which no training has seen: its 2.5 mm slices are the truth, slices of
5 mm are simulated.
"""

from __future__ import annotations

import argparse

import numpy as np
from machine import ROOT, reference_data
from matplotlib.figure import Figure

import ctsr
from ctsr.core.geometry import canonical_turn, slice_axis
from ctsr.workflows.figures import WINDOWS, panel, png


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint")
    asked = parser.parse_args()
    truth = ctsr.read(reference_data() / "test" / "LIDC-IDRI-0001_2.5mm.nii.gz")
    thick, _ = ctsr.simulate(truth, factor=2)
    shown = {
        "input, 5 mm": thick,
        "cubic B-spline, 2.5 mm": ctsr.upsample(thick, model="cubic"),
        "ctsr baseline, 2.5 mm": ctsr.upsample(thick, checkpoint=asked.checkpoint),
        "truth, 2.5 mm": truth,
    }
    figure = Figure(figsize=(12.5, 5.4), dpi=110, layout="constrained")
    axes = figure.subplots(len(WINDOWS), len(shown), squeeze=False)
    for column, (title, volume) in enumerate(shown.items()):
        plane, extent = coronal(volume)
        for row, (window, limits) in enumerate(WINDOWS.items()):
            panel(axes[row][column], plane, extent, limits, f"{title} ({window})")
    (ROOT / "docs" / "examples" / "before-after.png").write_bytes(png(figure))


def coronal(volume: ctsr.Volume) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """The left half of a coronal plane behind the heart, (z, x), and its extent in mm."""
    axis, _ = slice_axis(volume)
    turned = canonical_turn(volume.affine, axis).apply(volume.data)
    dz, dx = volume.spacing[axis], volume.spacing[0]
    height, width = turned.shape[1:]
    plane = turned[:, int(0.42 * height), int(0.04 * width) : int(0.52 * width)]
    return plane, (0.0, plane.shape[1] * dx, 0.0, plane.shape[0] * dz)


if __name__ == "__main__":
    main()
