"""The autoencoder tile by tile: a tile reads what its network can see, so the parts kept make up the whole exactly.

Tiles begin on whole latent voxels, nothing is filled up but at the true borders of the volume, and nothing is blended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ctsr.infer.windows import Box, tiles, within
from ctsr.models.vae import CtVae, Triple

__all__ = ["decode_tiled", "encode_tiled", "latent_size"]

TILE: Triple = (32, 64, 64)  # latent voxels; `compact` then needs 1.3 GB and does 1.9 × the work of the whole
Progress = Callable[[float], None]


def latent_size(vae: CtVae, size: Sequence[int]) -> Triple:
    """(d, h, w) of the latent of a volume (D, H, W)."""
    d, h, w = (-(-n // s) for n, s in zip(size, vae.strides, strict=True))
    return d, h, w


@torch.inference_mode()
def encode_tiled(
    vae: CtVae,
    hu: np.ndarray,
    *,
    tile: Triple = TILE,
    dtype: torch.dtype = torch.float32,
    progress: Progress = lambda share: None,
) -> Tensor:
    """(D, H, W) HU of any type → posterior means, standardised, (C, d, h, w) float32 where the model is.

    tile: latent voxels a tile keeps at most. dtype: of the network's inside. progress is told each tile's share.
    """
    size, device = latent_size(vae, hu.shape), vae.latent_mean.device
    z = torch.empty((vae.latent_channels, *size), device=device)
    for read, keep in tiles(size, tile, vae.encoder.reach):
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
    tile: Triple = TILE,
    dtype: torch.dtype = torch.float32,
    progress: Progress = lambda share: None,
) -> np.ndarray:
    """Standardised (C, d, h, w) → (D, H, W) float32, HU."""
    if tuple(z.shape[1:]) != (expected := latent_size(vae, size)):
        raise ValueError(f"a volume of {size} has a latent of {expected}, not {tuple(z.shape[1:])}")
    device, hu = vae.latent_mean.device, np.empty(size, np.float32)
    for read, keep in tiles(expected, tile, vae.decoder.reach):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            x = vae.decode(vae.unstandardise(z[:, *read][None].to(device)))
        where = _image_box(vae, keep, size)
        part = x[0, 0][within(where, _image_box(vae, read, size))]
        hu[where] = (part * vae.config.hu_scale).cpu().numpy()
        progress(part.numel() / hu.size)
    return hu


def _image_box(vae: CtVae, box: Box, size: Sequence[int]) -> Box:
    """The image voxels of latent voxels, in a volume of that size."""
    return tuple(
        slice(b.start * s, min(b.stop * s, n)) for b, s, n in zip(box, vae.strides, size, strict=True)
    )
