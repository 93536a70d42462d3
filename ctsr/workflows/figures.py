"""Pictures: before and after of one run, and a result beside its truth."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["WINDOWS", "Picture", "Spectrum", "panel", "png", "preview"]

WINDOWS = {"lung": (-600.0, 1500.0), "soft tissue": (40.0, 400.0)}  # level, width, HU

ERROR_HU = 150.0  # at either end of an error map

Spectrum = tuple[np.ndarray, np.ndarray]  # cycles per slice, power over the truth's


@dataclass(slots=True)
class Picture:
    """A result beside its truth.

    planes: (slices, W) HU and slice spacing, mm, of truth, thick, cubic, result, or some of them.
    pixel_mm: width of a voxel.
    """

    pixel_mm: float = 1.0
    planes: dict[str, tuple[np.ndarray, float]] = field(default_factory=dict)
    spectra: dict[str, Spectrum] = field(default_factory=dict)

    def add(self, name: str, stack: np.ndarray, spacing: float, spectrum: Spectrum | None = None) -> None:
        """Keep the middle coronal plane of a (D, H, W) stack."""
        self.planes[name] = stack[:, stack.shape[1] // 2].astype(np.float32), spacing
        if spectrum is not None:
            self.spectra[name] = spectrum

    def png(self, title: str) -> bytes:
        """Coronal planes in both windows, error maps, and the power left at each frequency."""
        shown = [name for name in ("truth", "thick", "cubic", "result") if name in self.planes]
        base = "truth" if "truth" in self.planes else "cubic" if "cubic" in self.planes else None
        figure, axes = _grid(3, len(shown))
        figure.suptitle(title.replace("$", r"\$"), fontsize=10)
        for column, name in enumerate(shown):
            plane, spacing = self.planes[name]
            extent = (0.0, plane.shape[1] * self.pixel_mm, 0.0, len(plane) * spacing)
            for row, (window, limits) in enumerate(WINDOWS.items()):
                panel(axes[row][column], plane, extent, limits, f"{name}, {window}")
            axes[2][column].set_axis_off()
            if base and name != base and name in ("cubic", "result"):
                error, limits = plane - self.planes[base][0], (0.0, 2 * ERROR_HU)
                words = f"{name} − {base}, ±{ERROR_HU:g} HU"
                panel(axes[2][column], error, extent, limits, words, colours="RdBu_r")
        if self.spectra:
            axis = axes[2][0]
            axis.set_axis_on()
            for label, (frequency, ratio) in self.spectra.items():
                axis.plot(frequency, ratio, label=label)
            axis.set(xlabel="cycles per slice", ylabel="power / truth's", xlim=(0, 0.5), ylim=(0, 1.5))
            axis.legend(fontsize=7)
        return png(figure)


def preview(
    before: np.ndarray, after: Mapping[str, np.ndarray], *, spacing: tuple[float, float, float], title: str
) -> bytes:
    """PNG bytes. before: thick (D, H, W), spacing in mm; after: middle `coronal` and `sagittal` planes."""
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
    axis: Any,
    plane: np.ndarray,
    extent: Sequence[float],
    window: tuple[float, float],
    title: str,
    colours: str = "gray",
) -> None:
    """One image (z upwards, voxels as they are) in a window of (level, width) HU; extent: mm."""
    level, width = window
    limits = {"vmin": level - width / 2, "vmax": level + width / 2}
    axis.imshow(plane, cmap=colours, extent=extent, origin="lower", interpolation="nearest", **limits)
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
