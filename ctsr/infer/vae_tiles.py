"""The autoencoder tile by tile: a tile reads what its network can see, so the parts kept make up the whole exactly.

Tiles begin on whole latent voxels, nothing is filled up but at the true borders of the volume, and nothing is blended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ctsr.infer.windows import Box, tiles, within
from ctsr.models.vae import CtVae, Triple

__all__ = ["SMALLEST", "bytes_a_voxel", "decode_tiled", "encode_tiled", "latent_size", "tile_within"]

TILE: Triple = (32, 64, 64)  # latent voxels; `compact` then needs 1.3 GB and does 1.9 × the work of the whole
TILE_BYTES = 4e9  # where a larger network would hold more, its tiles are smaller: `full` would take 14 GB
SMALLEST = 4  # latent voxels of a tile's side
# Tensors of a network's first level that are alive at once, of 4 bytes a value: measured of `compact` in fp32 on a CPU
# encode 4.0 to 5.9, decode 4.9 to 8.6, the more the smaller the tile; bf16 takes half.
ALIVE = {"encode": 6.0, "decode": 8.5}
Progress = Callable[[float], None]


def latent_size(vae: CtVae, size: Sequence[int]) -> Triple:
    """(d, h, w) of the latent of a volume (D, H, W)."""
    d, h, w = (-(-n // s) for n, s in zip(size, vae.strides, strict=True))
    return d, h, w


def bytes_a_voxel(vae: CtVae, name: str) -> float:
    """What `encode` or `decode` holds for each latent voxel that it reads."""
    c = vae.config
    return 4 * math.prod(c.strides) * (2 + ALIVE[name] * c.channels[0] / c.unshuffle**2)


@torch.inference_mode()
def encode_tiled(
    vae: CtVae,
    hu: np.ndarray,
    *,
    tile: Triple | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress = lambda share: None,
) -> Tensor:
    """(D, H, W) HU of any type → posterior means, standardised, (C, d, h, w) float32 where the model is.

    tile: latent voxels a tile keeps at most; None: as `TILE_BYTES` has it. dtype: of the network's inside. progress is
    told each tile's share.
    """
    size, device = latent_size(vae, hu.shape), vae.latent_mean.device
    z = torch.empty((vae.latent_channels, *size), device=device)
    for read, keep in _tiles(vae, "encode", size, tile):
        part = np.ascontiguousarray(hu[_image_box(vae, read, hu.shape)], np.float32)
        x = torch.from_numpy(part)[None, None].to(device) / vae.config.hu_scale
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            mean, _ = vae.encode(x)
        made = vae.standardise(mean)[0][:, *within(keep, read)]
        z[:, *keep] = made
        progress(made[0].numel() / math.prod(size))
    return z


@torch.inference_mode()
def decode_tiled(
    vae: CtVae,
    z: Tensor,
    size: Triple,
    *,
    tile: Triple | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress = lambda share: None,
) -> np.ndarray:
    """Standardised (C, d, h, w) → (D, H, W) float32, HU."""
    if tuple(z.shape[1:]) != (expected := latent_size(vae, size)):
        raise ValueError(f"a volume of {size} has a latent of {expected}, not {tuple(z.shape[1:])}")
    device, hu = vae.latent_mean.device, np.empty(size, np.float32)
    for read, keep in _tiles(vae, "decode", expected, tile):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            x = vae.decode(vae.unstandardise(z[:, *read][None].to(device)))
        where = _image_box(vae, keep, size)
        part = x[0, 0][within(where, _image_box(vae, read, size))]
        hu[where] = (part * vae.config.hu_scale).cpu().numpy()
        progress(part.numel() / hu.size)
    return hu


def _tiles(vae: CtVae, name: str, size: Triple, tile: Triple | None) -> Iterator[tuple[Box, Box]]:
    """(read, keep) of each tile of a latent; tile None: as `TILE_BYTES` has it."""
    reach = vae.encoder.reach if name == "encode" else vae.decoder.reach
    usual = TILE_BYTES / bytes_a_voxel(vae, name)
    return tiles(size, tile or tile_within(size, reach, usual, TILE)[0], reach)


def _image_box(vae: CtVae, box: Box, size: Sequence[int]) -> Box:
    """The image voxels of latent voxels, in a volume of that size."""
    return tuple(
        slice(b.start * s, min(b.stop * s, n)) for b, s, n in zip(box, vae.strides, size, strict=True)
    )


def tile_within(
    size: Triple, reach: Triple, voxels: float, most: Triple | None = None
) -> tuple[Triple, int, float]:
    """The tile of a latent of `size`, halved side by side, that reads at most so many voxels; or the smallest.

    most: where the halving begins; all of it.

    Then the voxels that it reads, and how often a voxel is read.
    """

    def read(tile: Sequence[int]) -> int:
        return math.prod(
            n if h >= n else min(n, t + 2 * h) for n, t, h in zip(size, tile, reach, strict=True)
        )

    tile = [min(pair) for pair in zip(size, most or size, strict=True)]
    while read(tile) > voxels:
        halved = [
            [max(SMALLEST, -(-t // 2)) if axis == i else t for i, t in enumerate(tile)] for axis in range(3)
        ]
        best = min(halved, key=read)
        if read(best) >= read(tile):
            break
        tile = best
    n_tiles = math.prod(1 if h >= n else -(-n // t) for n, t, h in zip(size, tile, reach, strict=True))
    return (tile[0], tile[1], tile[2]), read(tile), n_tiles * read(tile) / math.prod(size)
