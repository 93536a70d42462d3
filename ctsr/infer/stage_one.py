"""One doubling by the network: `inverse`, the residual through the projection, added up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ctsr.infer.windows import Tiling, bell, within
from ctsr.models.simple_unet3d import SimpleUNet3D
from ctsr.physics.operator import apply_along_z
from ctsr.physics.profile import SliceProfile
from ctsr.physics.projection import doubling

__all__ = ["Engine"]

CHUNK_VOXELS = 1 << 19  # thick voxels a step of the stream: 2 slices of 512 × 512; more is no faster on a CPU
GPU_CHUNK_VOXELS = 1 << 22
LONGEST_CHUNK = 16  # slices
# Slices of the first level's tensors that are alive at the peak: so many a slice of a chunk, and so many for each
# slice of reach, which wait for a partner. A test holds the peak of the command, in bf16 where the CPU multiplies it,
# between 0.8 of the plan and the plan.
ALIVE_A_SLICE, ALIVE_A_REACH = 20, 4.5


@dataclass(slots=True)
class Engine:
    """The network where it runs. chunk: thick slices that pass at once, None for what suits the window."""

    network: SimpleUNet3D
    device: torch.device
    dtype: torch.dtype
    chunk: int | None = None

    def __post_init__(self) -> None:
        self.network = self.network.to(self.device).to(memory_format=torch.channels_last_3d).eval()  # type: ignore[call-overload]

    def slices_at_once(self, rows: int, columns: int) -> int:
        """Thick slices of a window that pass in one step."""
        if self.chunk is not None:
            return self.chunk
        voxels = CHUNK_VOXELS if self.device.type == "cpu" else GPU_CHUNK_VOXELS
        return min(LONGEST_CHUNK, max(1, voxels // (rows * columns)))

    def working_bytes(self, rows: int, columns: int) -> float:
        """What the network holds beside its input and output while a window passes, bytes."""
        config = self.network.config
        alive = ALIVE_A_SLICE * self.slices_at_once(rows, columns) + ALIVE_A_REACH * self.network.z_reach
        return self.dtype.itemsize * alive * config.channels[0] / config.unshuffle**2 * rows * columns

    def double(
        self,
        y: np.ndarray,
        profile: SliceProfile,
        *,
        spacing: float,
        thickness: float,
        rho: float,
        stack: int,
        tiling: Tiling,
        progress: Callable[[float], None] = lambda slices: None,
    ) -> np.ndarray:
        """(n, H, W) of any type → (2n, H, W) float32, HU. Needs twice the result, and the stream's chunk.

        stack: slices of the whole that y is a part of.
        progress: is told the thick slices × share of the image that have passed since it was last called.
        """
        _, inverse, null = doubling(len(y), profile, spacing=spacing, thickness=thickness, stack=stack)
        result = apply_along_z(inverse, y)
        residual = self._residual(y, result, rho, tiling, progress)
        return apply_along_z(null, residual, add_to=result)

    @torch.inference_mode()
    def _residual(
        self,
        y: np.ndarray,
        inverse: np.ndarray,
        rho: float,
        tiling: Tiling,
        progress: Callable[[float], None],
    ) -> np.ndarray:
        residual = np.zeros_like(inverse)  # and zero it stays beyond the box of the windows
        total = np.zeros(inverse.shape[1:], np.float32)
        for read, keep in tiling:
            done = 0
            thick, thin = y[:, *read], inverse[:, *read]
            share = inverse[0][keep].size / inverse[0][tiling.sides].size
            weights = None if tiling.is_exact else bell(thin.shape[1:])
            pieces = self.network.stream(thick, thin, rho, chunk=self.slices_at_once(*thick.shape[1:]))
            for piece in self._autocast(pieces):
                at = slice(done, done + len(piece))
                done += len(piece)
                if weights is None:
                    residual[at, *keep] = piece[:, *within(keep, read)]
                else:
                    residual[at, *read] += piece * weights
                progress(len(piece) / 2 * share)
            if weights is not None:
                total[read] += weights
        return residual if tiling.is_exact else np.divide(residual, total, out=residual, where=total > 0)

    def _autocast(self, pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            yield from pieces
