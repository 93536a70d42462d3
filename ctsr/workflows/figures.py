"""Pictures: before and after, coronal and sagittal, in a lung and a soft-tissue window."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["WINDOWS", "panel", "png", "preview"]

WINDOWS = {"lung": (-600.0, 1500.0), "soft tissue": (40.0, 400.0)}  # level, width, HU


def preview(
    before: np.ndarray, after: Mapping[str, np.ndarray], *, spacing: tuple[float, float, float], title: str
) -> bytes:
    """PNG bytes. before: thick (D, H, W); after: middle `coronal` (m, W) and `sagittal` (m, H) planes; spacing: thick, mm."""
    depth, height, width = before.shape
    pairs = {
        "coronal": (before[:, height // 2], after["coronal"], spacing[2]),
        "sagittal": (before[:, :, width // 2], after["sagittal"], spacing[1]),
    }
    figure, axes = _grid(4, 2)
    for column, (plane, (thick, thin, pixel)) in enumerate(pairs.items()):
        for row, (window, limits) in enumerate(WINDOWS.items()):
            extent = (0.0, thick.shape[1] * pixel, 0.0, depth * spacing[0])
            panel(axes[2 * row][column], thick, extent, limits, f"{plane}, {window}: input")
            panel(axes[2 * row + 1][column], thin, extent, limits, f"{plane}, {window}: {title}")
    return png(figure)


def panel(
    axis: Any, plane: np.ndarray, extent: Sequence[float], window: tuple[float, float], title: str
) -> None:
    """One image (z upwards, voxels as they are) in a window of (level, width) HU; extent: mm."""
    level, width = window
    axis.imshow(
        plane,
        cmap="gray",
        vmin=level - width / 2,
        vmax=level + width / 2,
        extent=extent,
        origin="lower",
        interpolation="nearest",
    )
    axis.set_title(title, fontsize=8)
    axis.set_axis_off()


def png(figure: Any) -> bytes:
    """The figure's bytes, the same for the same content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _grid(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(5 * columns, 2.6 * rows), dpi=130, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
