"""Samples of what diffusion changes in a stage one: encode, sample, decode what changed. Arrays and tensors only.

A sample is `stage one + [D(ẑ) − D(E(stage one))]`: only what the diffusion changed is decoded and added, so that what
the autoencoder loses of stage one is not lost, and a network that changes nothing returns stage one exactly.

The state of the sampler is one latent of the whole volume, its noise drawn from a counter: no cut has a part in it.
At each step the network sees it tile by tile, with a halo of its reach that is thrown away, so that tiles equal the
whole; where memory is too short for that, smaller halos overlap and their predictions are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ctsr.core.zgrid import ZGrid
from ctsr.diffusion.sampler import guided, noise_source, sample
from ctsr.diffusion.schedule import Path, Schedule
from ctsr.errors import ResourceError, WeightsError
from ctsr.infer.sampling import Sampling
from ctsr.infer.vae_tiles import (
    SMALLEST,
    bytes_a_voxel,
    decode_tiled,
    encode_tiled,
    latent_size,
    tile_within,
)
from ctsr.infer.windows import Box, bell, tiles, within
from ctsr.models.control import ControlledUNet, slice_maps
from ctsr.models.vae import CtVae, Triple

__all__ = ["Changes", "Cut", "Diffuser", "Fit", "schedule_of"]

T = TypeVar("T", Tensor, np.ndarray)
Report = Callable[[float], None]
Rows = Callable[[int, int], np.ndarray]
Changes = Callable[[int, int], Iterator[np.ndarray]]
BLENDED = 6  # of a halo, where memory does not allow an exact one
MOST_SEEN = 8.0  # times that a voxel is read, with halos that are exact
GPU_SHARE = 0.9  # of its free memory
ALIVE_DENOISING = 15.0  # as `ALIVE` of the autoencoder: measured 12 to 14.6
FLOP_A_PARAMETER = {"encode": 0.06, "denoise": 0.33, "decode": 0.1}  # and voxel: image, latent, image


class Cut(NamedTuple):
    """Latent voxels that a tile keeps at most, and those that it reads beyond: as many as the reach, or `halo`."""

    tile: Triple
    halo: int | None = None


class Fit(NamedTuple):
    """Tiles, what the network holds for one, and about how many operations all of them take."""

    cut: Cut
    bytes: float
    flop: float


WHOLE = Cut((1 << 30,) * 3)


def schedule_of(card: Mapping[str, Any], kappa: float) -> Schedule:
    """The noise schedule that a diffusion's card holds. kappa: its network's. WeightsError where it is none."""
    try:
        schedule = Schedule(**card["schedule"])
    except (KeyError, TypeError, ValueError) as exc:
        raise WeightsError(f"its card holds no noise schedule: {exc}") from exc
    if not math.isclose(schedule.kappa, kappa, rel_tol=1e-6):
        raise WeightsError(f"κ is {schedule.kappa:g} in its schedule, {kappa:g} in its network")
    return schedule


@dataclass(slots=True)
class Diffuser:
    """The networks of a diffusion where they run, and how samples are drawn: what `Engine` is to stage one.

    cuts: of `encode`, `denoise`, `decode`; a network that is not named sees the whole at once.
    remarks: what happened that the user should know.
    """

    network: ControlledUNet
    vae: CtVae
    path: Path
    sampling: Sampling
    device: torch.device
    dtype: torch.dtype
    detail_gain: float = 1.0
    spread_factor: float = 1.0
    cuts: dict[str, Cut] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if (n := self.network.config.latent_channels) != self.vae.latent_channels:
            raise WeightsError(f"the diffusion has {n} latent channels, its VAE {self.vae.latent_channels}")
        for network in (self.network, self.vae):
            for module in network.to(self.device).eval().modules():
                if isinstance(module, torch.nn.Conv3d):  # a buffer of four axes would refuse
                    module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    @torch.inference_mode()
    def draw(
        self,
        rows: Rows,
        slabs: Sequence[tuple[int, int]],
        size: Triple,
        *,
        grid: ZGrid,
        rho: float,
        progress: Report = lambda share: None,
    ) -> Changes:
        """K samples of a volume (m, H, W), of whose stage one rows(start, stop) gives any slices, in HU.

        Returns a function of (start, stop), which gives what each sample changes in these image slices, before any
        projection: (stop − start, H, W), HU. Until then latents wait on the CPU.
        slabs: (start, stop) of slices that are encoded at once; the latents between them are read on either side.
        grid: which thick slices the m thin ones belong to; rho: their relative width. progress: is told the share done.
        """
        s = self.sampling
        y0 = self._encoded(rows, slabs, size)[None]
        maps = slice_maps(grid, self.vae.strides[0]).to(self.device)[None]
        told = {"factor": y0.new_full((1,), grid.factor), "rho": y0.new_full((1,), rho)}
        done = 0.0

        def passed(share: float) -> None:
            nonlocal done
            done += share / s.calls
            progress(min(1.0, done))

        def denoise(is_null: bool, u: Tensor, tau: float, level: float) -> Tensor:
            """r̂ for the state u (1, C, d, h, w) of the whole volume. is_null: without the condition."""

            def of_tile(read: Box) -> Tensor:
                y = y0[:, :, *read]
                x_t, level = y + u[:, :, *read], y.new_full((1,), tau)
                if is_null:
                    null = torch.ones(1, dtype=torch.bool, device=y.device)
                    made = self.network.base(x_t, y, level, **told, null=null)
                else:
                    made = self.network(x_t, y, level, **told, maps=maps[:, :, read[0]])
                return made  # type: ignore[no-any-return]

            return self._safe("denoise", u.shape[2:], partial(self._tiled, of_tile, passed, u))

        guide = guided(partial(denoise, True), partial(denoise, False), s.guidance_scale)
        latents = [y0[0].cpu()]
        for k in range(s.samples):
            noise = self.network.noise(noise_source(y0.shape[1:], seed=s.seed, samples=[k]))
            made = sample(guide, y0, self.path, n_steps=s.num_steps, kind=s.sampler, noise=noise)
            latents.append(made[0].cpu())

        def changes(start: int, stop: int) -> Iterator[np.ndarray]:
            before = self._decoded(latents[0], start, stop, size)
            for z in latents[1:]:
                change = self._decoded(z, start, stop, size)
                change -= before
                yield change

        return changes

    def _decoded(self, z: Tensor, start: int, stop: int, size: Triple) -> np.ndarray:
        """Image slices start…stop − 1 of a latent (C, d, h, w) of a volume (m, H, W), float32, HU."""
        stride, reach = self.vae.strides[0], self.vae.decoder.reach[0]
        first, last = max(0, start // stride - reach), min(z.shape[1], -(-stop // stride) + reach)
        part, slices = z[:, first:last], min(size[0], last * stride) - first * stride

        def run(cut: Cut, dtype: torch.dtype) -> np.ndarray:
            return decode_tiled(self.vae, part, (slices, *size[1:]), tile=cut.tile, dtype=dtype)

        hu = self._safe("decode", part.shape[1:], run)
        return hu[start - first * stride : stop - first * stride]

    def fit(self, name: str, slices: int, size: Triple, limit: float) -> Fit:
        """The largest tiles of `encode`, `denoise` or `decode` that stay below `limit` bytes.

        size: (m, H, W), of which `slices` pass at once. Tiles are exact where that is possible and not too costly.
        Where nothing fits, the smallest ones.
        """
        depth, h, w = latent_size(self.vae, (slices, *size[1:]))
        a_voxel = self._bytes_a_voxel(name)
        if name != "denoise":
            reach = self.vae.encoder.reach if name == "encode" else self.vae.decoder.reach
            tile, read, seen = tile_within((depth, h, w), reach, limit / a_voxel)
            return Fit(Cut(tile), read * a_voxel, seen * self._flop(name, size) * slices / size[0])
        unit = self.network.base.stride
        shape, a_cell = (depth, -(-h // unit), -(-w // unit)), a_voxel * unit**2
        for halo in (None, BLENDED):
            (z, y, x), read, seen = tile_within(shape, self._reach(halo), limit / a_cell)
            if read * a_cell <= limit and seen <= MOST_SEEN:
                break
        return Fit(Cut((z, y * unit, x * unit), halo), read * a_cell, seen * self._flop(name, size))

    def _bytes_a_voxel(self, name: str) -> float:
        """What a network holds for each latent voxel that it reads."""
        if name == "denoise":
            return 4 * (ALIVE_DENOISING * self.network.config.channels[0] + 8 * self.vae.latent_channels)
        return bytes_a_voxel(self.vae, name)

    def latent_bytes(self, size: Triple) -> float:
        """Of one latent of a volume (m, H, W)."""
        return 4.0 * self.vae.latent_channels * math.prod(latent_size(self.vae, size))

    def gpu_bytes(self, limit: float) -> float:
        """What may be used of the GPU's memory; infinity where there is none of its own."""
        if self.device.type != "cuda":
            return math.inf
        return float(min(limit, GPU_SHARE * torch.cuda.mem_get_info(self.device)[0]))

    @property
    def parameter_bytes(self) -> float:
        """Of both networks."""
        return 4.0 * sum(p.numel() for n in (self.network, self.vae) for p in n.parameters())

    def _flop(self, name: str, size: Triple) -> float:
        """About how many floating point operations a volume (m, H, W) takes in one piece."""
        of = {"encode": self.vae.encoder, "decode": self.vae.decoder, "denoise": self.network}
        times = {"encode": 1.0, "decode": self.sampling.samples + 1.0}
        times["denoise"] = self.sampling.calls / math.prod(self.vae.strides)
        parameters = sum(p.numel() for p in of[name].parameters())
        return FLOP_A_PARAMETER[name] * parameters * times[name] * math.prod(size)

    def _encoded(self, rows: Rows, slabs: Sequence[tuple[int, int]], size: Triple) -> Tensor:
        """(C, d, h, w) on the device."""
        shape = latent_size(self.vae, size)
        stride, reach = self.vae.strides[0], self.vae.encoder.reach[0]
        y0 = torch.empty((self.vae.latent_channels, *shape), device=self.device)
        for a, b in slabs:
            start, stop = -(-a // stride), -(-b // stride)
            first, last = max(0, start - reach), min(shape[0], stop + reach)
            hu = rows(first * stride, min(size[0], last * stride))

            def run(cut: Cut, dtype: torch.dtype, hu: np.ndarray = hu) -> Tensor:
                return encode_tiled(self.vae, hu, tile=cut.tile, dtype=dtype)

            part = self._safe("encode", (last - first, *shape[1:]), run)
            y0[:, start:stop] = part[:, start - first : stop - first]
        return y0

    def _tiled(
        self, of_tile: Callable[[Box], Tensor], passed: Report, u: Tensor, cut: Cut, dtype: torch.dtype
    ) -> Tensor:
        """What of_tile(read) gives, put together to the whole of u (1, C, d, h, w); blended where the halo is short."""
        shape = u.shape[2:]
        r = torch.zeros_like(u)
        total = None if cut.halo is None else torch.zeros(shape, device=u.device)
        unit = (1, self.network.base.stride, self.network.base.stride)  # tiles begin on its multiples
        cells, tile = (
            [-(-min(n, m) // s) for n, m, s in zip(shape, most, unit, strict=True)]
            for most in (shape, cut.tile)
        )

        def voxels(box: Box) -> Box:
            return tuple(
                slice(b.start * s, min(b.stop * s, n)) for b, s, n in zip(box, unit, shape, strict=True)
            )

        for read, keep in tiles(cells, tile, self._reach(cut.halo)):
            read, keep = voxels(read), voxels(keep)
            with torch.autocast(u.device.type, dtype, enabled=dtype != torch.float32):
                made = of_tile(read)
            if total is None:
                r[:, :, *keep] = made[:, :, *within(keep, read)]
            else:
                weights = torch.from_numpy(bell(made.shape[2:])).to(u.device)
                r[:, :, *read] += made * weights
                total[read] += weights
            passed(math.prod(k.stop - k.start for k in keep) / math.prod(shape))
        return r if total is None else r / total

    def _reach(self, halo: int | None) -> Triple:
        """What a tile of the U-Net reads beyond what it keeps, in plane in units of its stride."""
        n = self.network.base
        z, plane = (n.z_reach, n.plane_reach) if halo is None else (halo, halo)
        return z, -(-plane // n.stride), -(-plane // n.stride)

    def _safe(self, name: str, shape: Sequence[int], run: Callable[[Cut, torch.dtype], T]) -> T:
        """What a network gives for a latent of `shape`.

        In smaller tiles where a GPU is full; once more in fp32 where it isn't finite.
        """
        for dtype in dict.fromkeys((self.dtype, torch.float32)):
            try:
                made = run(self.cuts.get(name, WHOLE), dtype)
            except torch.OutOfMemoryError:
                made = None  # and only now, without what the traceback holds, once more
            if made is None:
                made = self._smaller(name, shape, run, dtype)
            if torch.isfinite(torch.as_tensor(made)).all():
                return made
            self._remark(f"{name}: not finite in {str(dtype).removeprefix('torch.')}")
        raise WeightsError(f"a network of the diffusion gives values that are not finite ({name})")

    def _smaller(
        self, name: str, shape: Sequence[int], run: Callable[[Cut, torch.dtype], T], dtype: torch.dtype
    ) -> T:
        tile, halo = self.cuts.get(name, WHOLE)
        z, y, x = (max(SMALLEST, min(t, n) // 2) for t, n in zip(tile, shape, strict=True))
        self.cuts[name] = Cut((z, y, x), halo)
        self._remark(
            f"{name}: the GPU's memory was full, tiles of {z} × {y} × {x} latent voxels from then on"
        )
        try:
            return run(self.cuts[name], dtype)
        except torch.OutOfMemoryError:
            d, h, w = (n * stride for n, stride in zip(shape, self.vae.strides, strict=True))
            least = self.fit(name, d, (d, h, w), 0).bytes
            raise ResourceError(
                f"the GPU's memory is full: {name} needs about {least / 1e9:.2f} GB in its smallest tiles",
                hint="--max-memory of that and more, below what is free there; --device cpu",
            ) from None

    def _remark(self, text: str) -> None:
        if text not in self.remarks:
            self.remarks.append(text)
