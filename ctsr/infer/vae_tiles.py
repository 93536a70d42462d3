"""The autoencoder tile by tile: a tile reads what its network can see, so the parts kept make up the whole exactly.

Tiles begin on whole latent voxels, nothing is filled up but at the true borders of the volume, and nothing is blended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor

from ctsr.models.kl_slices import WHOLE_SLICE
from ctsr.models.vae import CtVae

__all__ = ["Box", "Triple", "decode_tiled", "decode_tiles", "encode_tiled", "latent_size", "tiles"]

Triple = tuple[int, int, int]
Box = tuple[slice, slice, slice]
TILE: Triple = (32, 64, 64)  # latent voxels; `compact` then needs 1.3 GB and does 1.9 × the work of the whole
SLICES: Triple = (4, WHOLE_SLICE, WHOLE_SLICE)  # for a network that sees whole slices
Progress = Callable[[float], None]


def latent_size(vae: CtVae, size: Triple) -> Triple:
    """(d, h, w) of the latent of a volume (D, H, W)."""
    d, h, w = (-(-n // s) for n, s in zip(size, vae.strides, strict=True))
    return d, h, w


def tiles(size: Triple, tile: Triple, reach: Triple) -> Iterator[tuple[Box, Box]]:
    """(read, keep): the keeps cover `size` once, in tiles of at most `tile`, about equal; read is `reach` larger."""
    sides = []
    for n, most, halo in zip(size, tile, reach, strict=True):
        parts = 1 if halo >= n else -(-n // most)  # with such a halo every tile would read all
        cuts = pairwise(n * i // parts for i in range(parts + 1))
        sides.append([(slice(max(0, a - halo), min(n, b + halo)), slice(a, b)) for a, b in cuts])
    for z, y, x in product(*sides):
        yield (z[0], y[0], x[0]), (z[1], y[1], x[1])


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

    tile: latent voxels a tile keeps at most; None: what suits the network. dtype: of the network's inside.
    progress is told each tile's share.
    """
    size = latent_size(vae, hu.shape)
    device = vae.latent_mean.device
    z = torch.empty((vae.latent_channels, *size), device=device)
    for read, keep in tiles(size, tile or _default(vae), vae.encoder_reach):
        part = np.ascontiguousarray(hu[_image_box(vae, read, hu.shape)], np.float32)
        x = torch.from_numpy(part)[None, None].to(device) / vae.config.hu_scale
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            mean, _ = vae.encode(x)
        z[(slice(None), *keep)] = vae.standardise(mean)[(0, slice(None), *_within(keep, read))]
        progress(_voxels(keep) / math.prod(size))
    return z


@torch.inference_mode()
def decode_tiles(
    vae: CtVae, z: Tensor, size: Triple, *, tile: Triple | None = None, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Box, np.ndarray]]:
    """Standardised (C, d, h, w) → consecutive (where in the volume (D, H, W), its HU, float32), which cover it once."""
    if tuple(z.shape[1:]) != (expected := latent_size(vae, size)):
        raise ValueError(f"a volume of {size} has a latent of {expected}, not {tuple(z.shape[1:])}")
    device = vae.latent_mean.device
    for read, keep in tiles(expected, tile or _default(vae), vae.decoder_reach):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            x = vae.decode(vae.unstandardise(z[(slice(None), *read)][None].to(device)))
        where = _image_box(vae, keep, size)
        inside = _within(where, _image_box(vae, read, size))
        yield where, (x[(0, 0, *inside)] * vae.config.hu_scale).cpu().numpy()


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
    hu = np.empty(size, np.float32)
    for where, part in decode_tiles(vae, z, size, tile=tile, dtype=dtype):
        hu[where] = part
        progress(part.size / hu.size)
    return hu


def _default(vae: CtVae) -> Triple:
    return SLICES if vae.config.slice_groups > 1 else TILE


def _image_box(vae: CtVae, box: Box, size: Sequence[int]) -> Box:
    """The image voxels of latent voxels, in a volume of that size."""
    z, y, x = (slice(b.start * s, min(b.stop * s, n)) for b, s, n in zip(box, vae.strides, size, strict=True))
    return z, y, x


def _within(keep: Box, read: Box) -> Box:
    """`keep`, counted from the corner of `read`."""
    z, y, x = (slice(k.start - r.start, k.stop - r.start) for k, r in zip(keep, read, strict=True))
    return z, y, x


def _voxels(box: Box) -> int:
    return math.prod(b.stop - b.start for b in box)
