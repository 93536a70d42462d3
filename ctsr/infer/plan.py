"""How a volume passes through memory, decided before the first allocation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from ctsr.errors import ResourceError
from ctsr.infer.pipeline import Pipeline
from ctsr.infer.windows import Tiling

if TYPE_CHECKING:
    from ctsr.infer.diffusion import Cut, Diffuser, Fit

__all__ = ["Plan", "make_plan"]

PYTHON_BYTES = 100e6  # measured: resident before the first volume is read, with NumPy and SciPy
TORCH_BYTES = 330e6  # measured: and what PyTorch adds, its kernels in use
DIFFUSION_BYTES = 20e6  # measured: and the code of a diffusion
BLOCK_ROWS = 48  # image rows of a slab that a product along z, and the residual, hold as float32 on their way
SMALLEST_SLAB = 4  # thin slices
PATCHES = (None, 512, 256, 128)  # whole slices first; pixels of a window where memory is short
SECONDS_PER_VOXEL = 1e-6  # a thick voxel through the network on one thread of an AVX2 server CPU
FLOP_PER_VOXEL = 5e4  # of a diffusion's networks, that take such a thread as long
STATES = 7  # latents that a sampler holds beside y₀: u, r̂, r̂ before, their mean, noise, and what a step makes of them


@dataclass(frozen=True, slots=True)
class Plan:
    """slabs: (start, stop) of thin slices, together all of them. peak_bytes: what the process will hold at most."""

    slabs: tuple[tuple[int, int], ...]
    tiling: Tiling
    peak_bytes: float
    work: float  # voxels that pass the network, or a hundredth of those that pass a matrix
    cuts: Mapping[str, Cut] = field(default_factory=dict)  # of a diffusion's networks

    def seconds(self, threads: int) -> float:
        """About how long the computation takes on that many CPU threads."""
        return self.work * SECONDS_PER_VOXEL / threads

    def describe(self) -> str:
        """For `--dry-run` and `--verbose`."""
        n = len(self.slabs)
        return f"{n} slab{'s' if n > 1 else ''} along z, {self.peak_bytes / 1e9:.2f} GB at most"


def make_plan(
    pipeline: Pipeline,
    *,
    input_bytes: int,
    is_padded: bool,
    itemsize: int,
    is_streamed: bool,
    keeps_added: bool,
    keeps_spread: bool = False,
    limit: float,
) -> Plan:
    """The least work that holds `limit` bytes: the fewest slabs along z, and windows in plane where they save work.

    input_bytes: of the thick array in memory. is_padded: whether a copy of it without padding is needed. itemsize:
    bytes a voxel of the result. is_streamed: whether finished slabs leave memory. keeps_added, keeps_spread: whether
    added detail and uncertainty are kept to the end.
    Raises ResourceError where not even the smallest slab fits; it says what would.
    """
    plans, least = [], math.inf
    voxels, kept_a_voxel = pipeline.recipe.n * pipeline.plane, 4 * (keeps_added + keeps_spread)
    fixed = PYTHON_BYTES + pipeline.matrix_bytes + input_bytes + is_padded * (input_bytes + voxels)
    fixed += pipeline.m * pipeline.plane * (kept_a_voxel + (0 if is_streamed else itemsize))
    fixed += 0 if pipeline.engine is None else TORCH_BYTES
    loaded, diffuser = 0.0, pipeline.diffuser
    if diffuser is not None:
        fixed += DIFFUSION_BYTES + diffuser.parameter_bytes
        loaded = PYTHON_BYTES + TORCH_BYTES + DIFFUSION_BYTES + 2 * diffuser.parameter_bytes  # file, tensors
    for tiling in _tilings(pipeline):
        for slabs in _cuts(pipeline.m):
            several = (slabs[0], slabs[len(slabs) // 2])
            of_slab = partial(_slab_bytes, pipeline, tiling, itemsize, is_padded, keeps_added)
            peak = fixed + max(of_slab(*s) for s in several)
            fits: dict[str, Fit] = {}
            if diffuser is not None:
                more, fits = _diffusion(pipeline, diffuser, several, of_slab, limit - fixed)
                peak = max(peak, fixed + more, loaded)
            least = min(least, peak)
            if peak <= limit:
                work = sum(_work(pipeline, *s, tiling) for s in slabs)
                if diffuser is not None:  # stage one is made to be encoded, and again
                    flop = fits["denoise"].flop + len(slabs) * (fits["encode"].flop + fits["decode"].flop)
                    work = (1 if len(slabs) == 1 else 2) * work + flop / FLOP_PER_VOXEL
                plans.append(Plan(slabs, tiling, peak, work, {name: fit.cut for name, fit in fits.items()}))
                break
    if not plans:
        raise ResourceError(
            f"needs {least / 1e9:.2f} GB at least, {limit / 1e9:.2f} GB may be used",
            hint="--max-memory allows more, --patch-size a smaller window",
        )
    return min(plans, key=lambda plan: plan.work)


def _tilings(pipeline: Pipeline) -> Iterator[Tiling]:
    """As asked for; else whole slices, and windows that are smaller than those."""
    asked = pipeline.tiling
    if asked.patch is not None or pipeline.engine is None or not pipeline.recipe.n_doublings:
        yield asked
        return
    for patch in PATCHES:
        if patch is None or patch < max(side.stop - side.start for side in asked.sides):
            yield replace(asked, patch=None if patch is None else (patch, patch))


def _cuts(m: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """All thin slices in one slab, two, three …, each cut once."""
    before = 0
    for n_slabs in range(1, math.ceil(m / SMALLEST_SLAB) + 1):
        size = math.ceil(m / n_slabs)
        if size != before:
            yield tuple((a, min(m, a + size)) for a in range(0, m, size))
        before = size


def _work(pipeline: Pipeline, start: int, stop: int, tiling: Tiling) -> float:
    """Voxels that pass the network for a slab; a matrix costs a hundredth of that a thin voxel."""
    start, stop = pipeline.widened(start, stop)
    first, last = pipeline.source_range(start, stop)
    thick = (last - first) * (2**pipeline.recipe.n_doublings - 1)
    return float(thick * tiling.pixels + (stop - start) / 100 * pipeline.plane)


def _slab_bytes(
    pipeline: Pipeline,
    tiling: Tiling,
    itemsize: int,
    is_padded: bool,
    keeps_added: bool,
    start: int,
    stop: int,
) -> float:
    """What the computation of one slab holds beside input and finished output."""
    plane, doublings = pipeline.plane, pipeline.recipe.n_doublings
    start, stop = pipeline.widened(start, stop)
    thin = stop - start
    rounded = thin * plane * (itemsize + is_padded + 4 * keeps_added)
    rounded += 4 * thin * BLOCK_ROWS * pipeline.tiling.width
    if pipeline.engine is None or doublings == 0:
        return thin * plane * 4 + rounded
    first, last = pipeline.source_range(start, stop)
    fine = (last - first) * 2**doublings
    before = fine // 2 if doublings > 1 else 0
    doubling = (before + 2 * fine) * plane * 4 + pipeline.engine.working_bytes(*tiling.largest)
    finish = (fine + (thin if pipeline.resamples else 0)) * plane * 4 + rounded
    return float(max(doubling, finish))


def _diffusion(
    pipeline: Pipeline,
    diffuser: Diffuser,
    slabs: tuple[tuple[int, int], ...],
    of_slab: Callable[[int, int], float],
    limit: float,
) -> tuple[float, dict[str, Fit]]:
    """What encoding, sampling and decoding hold at most beside input and finished output; and their tiles.

    slabs: the largest. of_slab: bytes of a range of stage one. limit: what the tiles are chosen to stay below.
    """
    size = (pipeline.m, pipeline.tiling.height, pipeline.tiling.width)
    image, latent, has_own = 4.0 * pipeline.plane, diffuser.latent_bytes(size), diffuser.device.type == "cuda"
    stride, reach = diffuser.vae.strides[0], diffuser.vae.encoder.reach[0]
    drawn, state = (1 + diffuser.sampling.samples) * latent, (1 + STATES) * latent
    kept = pipeline.m * image if len(set(slabs)) == 1 else 0.0  # stage one, made once
    slices = {"encode": 0, "decode": 0, "denoise": pipeline.m}
    beside = {"encode": 0.0, "decode": 0.0, "denoise": kept + drawn + (0 if has_own else state)}
    peak = 0.0
    for start, stop in slabs:
        a, b = max(0, start - reach * stride), min(pipeline.m, stop + (reach + 1) * stride)
        peak = max(
            peak, latent + of_slab(a, b), drawn + kept + of_slab(start, stop) + 3 * (stop - start) * image
        )
        first, last = pipeline.source_range(a, b)
        rows = b - a if pipeline.resamples else (last - first) * 2**pipeline.recipe.n_doublings
        start, stop = pipeline.widened(start, stop)
        c, d = pipeline.changed(start, stop)
        wide = min(pipeline.m, d - c + (2 * diffuser.vae.decoder.reach[0] + 1) * stride)
        slices["encode"], slices["decode"] = max(slices["encode"], b - a), max(slices["decode"], wide)
        beside["encode"] = max(beside["encode"], 2 * latent + rows * image)
        beside["decode"] = max(beside["decode"], drawn + kept + (3 * wide + 5 * (stop - start)) * image)
    fits = {}
    for name, held in beside.items():
        room = diffuser.gpu_bytes(limit) - state if has_own else limit - held
        fits[name] = diffuser.fit(name, slices[name], size, room)
        used = fits[name].bytes
        if has_own and used > room:
            raise ResourceError(
                f"needs {(used + state) / 1e9:.2f} GB of the GPU's memory for this volume, "
                f"{(room + state) / 1e9:.2f} GB may be used",
                hint="--device cpu",
            )
        peak = max(peak, held + (0 if has_own else used))
    return peak, fits
