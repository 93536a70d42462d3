"""How a volume passes through memory, decided before the first allocation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ctsr.errors import ResourceError
from ctsr.infer.pipeline import Pipeline

__all__ = ["Plan", "make_plan"]

BASE_BYTES = 330e6  # measured: resident after importing torch, nibabel and SciPy
NETWORK_BYTES = 235  # a pixel and slice of the stream's first chunk, measured at 512 × 512
SMALLEST_SLAB = 4  # thin slices
SECONDS_PER_VOXEL = 9e-7  # a thick voxel through the network on one thread of an AVX2 server CPU


@dataclass(frozen=True, slots=True)
class Plan:
    """slabs: (start, stop) of thin slices, together all of them. peak_bytes: what the process will hold at most."""

    slabs: tuple[tuple[int, int], ...]
    peak_bytes: float
    work: float  # voxels that pass the network, or a hundredth of those that pass a matrix

    def seconds(self, threads: int) -> float:
        """About how long the computation takes on that many CPU threads."""
        return self.work * SECONDS_PER_VOXEL / threads

    def describe(self) -> str:
        """For `--dry-run` and `--verbose`."""
        n = len(self.slabs)
        return f"{n} slab{'s' if n > 1 else ''} along z, {self.peak_bytes / 1e9:.2f} GB at most"


def make_plan(
    pipeline: Pipeline, *, input_bytes: int, itemsize: int, is_streamed: bool, limit: float, keeps_added: bool
) -> Plan:
    """The fewest slabs that hold `limit` bytes.

    input_bytes: of the thick array in memory. itemsize: bytes a voxel of the result. is_streamed: whether finished slabs
    leave memory. keeps_added: whether the added detail is written too.
    Raises ResourceError where not even the smallest slab fits; it says what would.
    """
    m = pipeline.m
    plane = pipeline.tiling.height * pipeline.tiling.width
    fixed = BASE_BYTES + input_bytes
    for n_slabs in range(1, math.ceil(m / SMALLEST_SLAB) + 1):
        size = math.ceil(m / n_slabs)
        slabs = tuple((a, min(m, a + size)) for a in range(0, m, size))
        work = max(
            _work_bytes(pipeline, a, b, plane, itemsize, keeps_added)
            for a, b in (slabs[len(slabs) // 2], slabs[0])
        )
        kept = 0 if is_streamed else m * plane * itemsize
        peak = fixed + kept + work
        if peak <= limit:
            return Plan(slabs, peak, sum(_work(pipeline, a, b) for a, b in slabs) * plane)
    raise ResourceError(
        f"needs {peak / 1e9:.2f} GB, {limit / 1e9:.2f} GB may be used",
        hint="--max-memory gives more, --patch-size a smaller window",
    )


def _work(pipeline: Pipeline, start: int, stop: int) -> float:
    """Thick slices that pass the network for a slab; a matrix costs a hundredth of that a thin slice."""
    first, last = pipeline.source_range(start, stop)
    return (last - first) * (2**pipeline.recipe.n_doublings - 1) + (stop - start) / 100


def _work_bytes(
    pipeline: Pipeline, start: int, stop: int, plane: int, itemsize: int, keeps_added: bool
) -> float:
    """What the computation of one slab holds beside input and finished output."""
    thin = stop - start
    rounded = thin * plane * (itemsize + (8 if keeps_added else 0))
    first, last = pipeline.source_range(start, stop)
    thick, doublings = last - first, pipeline.recipe.n_doublings
    if pipeline.engine is None or doublings == 0:
        return thin * plane * 4 + rounded
    fine = thick * 2**doublings
    before = thick * 2 ** (doublings - 1) if doublings > 1 else 0
    rows, columns = pipeline.tiling.largest
    network = NETWORK_BYTES * pipeline.engine.first_chunk * rows * columns
    doubling = (before + 2 * fine) * plane * 4 + network
    finish = (fine + (thin if fine != thin else 0)) * plane * 4 + rounded
    return max(doubling, finish)
