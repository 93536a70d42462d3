"""CtVae: a CT volume as a latent a quarter of its size, and back.

The posterior of a KL autoencoder (Kingma 2014) is made of two parts: a linear block transform, and a convolutional
network that corrects it with what lies around the block:

    mean = T · block(x) + network(x),    x̂ = unblock(T⁺ · z) + network(z)

T starts as the cosines of lowest frequency in a block (2 × 4 × 4 voxels, 8 of 32 kept) and the networks at zero, so
that an untrained model is already a block transform: 41.4 dB on a chest CT where the best linear one, learnt from data,
has 41.6 (peak 4095 HU, body mask). The linear part stays in float32: bfloat16 rounds HU to steps of 4 to 8.

All convolutions are 3 × 3 × 3 and no norm sees more than one voxel, so tiles with a halo of `encoder.reach` and
`decoder.reach` equal the whole. Preset `mri` is another network, a 2D one run slice by slice: `ctsr.models.kl_slices`.

    preset     parameters   kFLOP an image voxel: encode, decode   strides
    tiny           0.14 M           7, 13                          2 4 4     for tests
    compact         1.8 M          65, 122                         2 4 4     two CPU cores
    full             52 M        2098, 3118                        2 4 4
    mri              59 M                                          1 4 4     from 2D starting weights
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctsr.models.blocks import ChannelNorm, Conv, ResidualBlock, run_blocks, zeroed
from ctsr.models.kl_slices import SliceDecoder, SliceEncoder

__all__ = ["PRESETS", "CtVae", "VaeConfig", "kl"]

LOGVAR_RANGE = (-30.0, 20.0)
LOGVAR_START = -12.0  # a standard deviation of 0.0025, 1 HU in the image: samples begin as good as means
# Spread of an orthonormal cosine coefficient of frequency f (cycles a voxel) in CT, in units of 1000 HU: measured 0.42
# to 0.08 between f = 0.125 and 0.28, and 0.5 √n at f = 0. T is divided by it: latents begin near unit variance.
AC_SPREAD, DC_SPREAD = 0.006, 0.5
BLOCK_LIMIT = 1024  # voxels: the square of it is what their cosines take
Triple = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """Everything that decides the shape of the network and the scale of what it sees."""

    channels: tuple[int, ...] = (32, 96)  # a level each; in-plane stride 2 between levels
    z_strides: tuple[int, ...] = (2,)  # and along z, between levels
    blocks: int = 1  # residual blocks a level in the encoder, one more in the decoder
    latent_channels: int = 8
    unshuffle: int = 2  # in-plane pixels folded into channels before the first level
    slice_groups: int = 1  # above 1: the slice-wise network, with group norms of so many groups
    hu_scale: float = 1000.0  # x is HU / hu_scale

    def __post_init__(self) -> None:
        if len(self.z_strides) != len(self.channels) - 1 or not set(self.z_strides) <= {1, 2}:
            raise ValueError(f"{len(self.channels)} levels, strides along z between them {self.z_strides}")
        if not 1 <= self.blocks <= 8 or self.unshuffle not in (1, 2, 4):
            raise ValueError(f"{self.blocks} blocks a level, {self.unshuffle} pixels folded")
        if not 1 <= self.latent_channels <= math.prod(self.strides):
            raise ValueError(f"{self.latent_channels} latent channels for a block of {self.strides} voxels")
        if self.slice_groups == 1 and math.prod(self.strides) > BLOCK_LIMIT:
            raise ValueError(f"a block of {self.strides} voxels, {BLOCK_LIMIT} are possible")
        if self.slice_groups > 1 and (self.unshuffle > 1 or set(self.z_strides) != {1}):
            raise ValueError("the slice-wise network has no stride along z and folds no pixels")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> VaeConfig:
        """`tiny`, `compact`, `full` or `mri`, with some values replaced."""
        return replace(PRESETS[name], **changes)

    @property
    def strides(self) -> Triple:
        """Image voxels a latent voxel covers, (z, y, x)."""
        in_plane = self.unshuffle << len(self.z_strides)
        return math.prod(self.z_strides), in_plane, in_plane

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


PRESETS = {
    "tiny": VaeConfig(channels=(12, 24)),
    "compact": VaeConfig(),
    "full": VaeConfig(channels=(128, 416), blocks=2),
    "mri": VaeConfig((128, 256, 512), (1, 1), blocks=2, latent_channels=4, unshuffle=1, slice_groups=32),
}


class CtVae(nn.Module):
    """x: (B, 1, D, H, W) HU / hu_scale ↔ z: (B, C, d, h, w), d = ⌈D / stride⌉ and so on. Any D, H, W ≥ 1.

    latent_mean, latent_std: (C,) over the training set, part of the file; 0 and 1 before they are measured.
    encoder.reach: latent voxels (z, y, x) beside a latent voxel whose image voxels it depends on; decoder.reach: latent
    voxels beside its own that an image voxel depends on.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VaeConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VaeConfig()
        self.strides, self.latent_channels = config.strides, config.latent_channels
        self.gradient_checkpointing = False  # a second forward of each block saves the memory of its inside
        by_slice = config.slice_groups > 1
        self.encoder = SliceEncoder(config) if by_slice else Encoder(config)
        self.decoder = SliceDecoder(config) if by_slice else Decoder(config)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, each (B, C, d, h, w) float32, before standardisation.

        A size that is no multiple of the stride is filled up with its edge.
        """
        if x.ndim != 5 or x.shape[1] != 1:
            raise ValueError(f"expected (B, 1, D, H, W), got {tuple(x.shape)}")
        pad = [-n % s for n, s in zip(x.shape[2:], self.strides, strict=True)]
        if any(pad):
            x = F.pad(x, (0, pad[2], 0, pad[1], 0, pad[0]), mode="replicate")
        mean, logvar = self.encoder(x, is_thrifty=self.gradient_checkpointing).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, d, h, w), not standardised → (B, 1, d·stride, …) float32: the caller cuts off what was filled up."""
        if z.ndim != 5 or z.shape[1] != self.latent_channels:
            raise ValueError(f"expected (B, {self.latent_channels}, d, h, w), got {tuple(z.shape)}")
        x: Tensor = self.decoder(z, is_thrifty=self.gradient_checkpointing)
        return x

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x̂ from mean + noise · standard deviation (None: from the mean), mean, log-variance: what a training needs."""
        mean, logvar = self.encode(x)
        z = mean if noise is None else mean + noise * torch.exp(logvar / 2)
        _, _, depth, height, width = x.shape
        return self.decode(z)[:, :, :depth, :height, :width], mean, logvar

    def standardise(self, z: Tensor) -> Tensor:
        """Latents of mean 0 and variance 1 over the training set, channel by channel."""
        return (z - self.latent_mean.view(-1, 1, 1, 1)) / self.latent_std.view(-1, 1, 1, 1)

    def unstandardise(self, z: Tensor) -> Tensor:
        """What `decode` takes, from standardised latents."""
        return z * self.latent_std.view(-1, 1, 1, 1) + self.latent_mean.view(-1, 1, 1, 1)


class Encoder(nn.Module):
    """(B, 1, D, H, W), sizes multiples of the strides → (B, 2C, d, h, w) float32: means, then log-variances."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        widths, latents = config.channels, config.latent_channels
        self.linear = PerVoxel(math.prod(config.strides), latents, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(_cosines(config)[0])
        self.stem = Conv(config.unshuffle**2, widths[0])
        self.levels = nn.ModuleList(_blocks(c, config.blocks) for c in widths)
        self.down = nn.ModuleList(
            PerVoxel(4 * s * a, b) for s, a, b in zip(config.z_strides, widths, widths[1:], strict=False)
        )
        self.norm = ChannelNorm(widths[-1])
        self.head = zeroed(Conv(widths[-1], 2 * latents))
        with torch.no_grad():
            self.head.bias[latents:] = LOGVAR_START  # type: ignore[index]

    @property
    def reach(self) -> Triple:
        """See `CtVae`: voxels that the convolutions add from level to level, counted in finest ones."""
        sides = []
        for strides in (self.config.z_strides, (2,) * len(self.down)):
            n = 1 + 2 * self.config.blocks
            for stride in reversed(strides):
                n = n * stride + 2 * self.config.blocks
            sides.append(-(-(n + 1) // math.prod(strides)))
        return sides[0], sides[1], sides[1]

    def forward(self, x: Tensor, *, is_thrifty: bool) -> Tensor:
        u = self.config.unshuffle
        h = run_blocks(self.levels[0], self.stem(folded(x, (1, u, u))), is_thrifty=is_thrifty)
        for stride, down, blocks in zip(self.config.z_strides, self.down, self.levels[1:], strict=True):
            h = run_blocks(blocks, down(folded(h, (stride, 2, 2))), is_thrifty=is_thrifty)
        made: Tensor = self.head(F.silu(self.norm(h)))
        with torch.autocast(x.device.type, enabled=False):
            means = self.linear(folded(x.to(self.linear.weight.dtype), self.config.strides))
            return torch.cat([means, torch.zeros_like(means)], dim=1) + made.to(means.dtype)


class Decoder(nn.Module):
    """(B, C, d, h, w) → (B, 1, D, H, W) float32."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.channels
        self.linear = PerVoxel(config.latent_channels, math.prod(config.strides), bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(_cosines(config)[1])
        self.stem = Conv(config.latent_channels, widths[-1])
        self.levels = nn.ModuleList(_blocks(c, config.blocks + 1) for c in widths)
        self.up = nn.ModuleList(
            PerVoxel(b, 4 * s * a) for s, a, b in zip(config.z_strides, widths, widths[1:], strict=False)
        )
        self.norm = ChannelNorm(widths[0])
        self.head = zeroed(Conv(widths[0], config.unshuffle**2))

    @property
    def reach(self) -> Triple:
        """See `CtVae`."""
        sides = []
        for strides in (self.config.z_strides, (2,) * len(self.up)):
            n = 1 + 2 * (self.config.blocks + 1)
            for stride in strides:
                n = -(-n // stride) + 2 * (self.config.blocks + 1)
            sides.append(n + 1)
        return sides[0], sides[1], sides[1]

    def forward(self, z: Tensor, *, is_thrifty: bool) -> Tensor:
        u = self.config.unshuffle
        h = run_blocks(self.levels[-1], self.stem(z), is_thrifty=is_thrifty)
        for level in reversed(range(len(self.up))):
            h = unfolded(self.up[level](h), (self.config.z_strides[level], 2, 2))
            h = run_blocks(self.levels[level], h, is_thrifty=is_thrifty)
        made: Tensor = self.head(F.silu(self.norm(h)))
        with torch.autocast(z.device.type, enabled=False):
            x = unfolded(self.linear(z.to(self.linear.weight.dtype)), self.config.strides)
            return x + unfolded(made.to(x.dtype), (1, u, u))


class PerVoxel(nn.Linear):
    """(B, C, D, H, W) → (B, outputs, D, H, W): each voxel's channels through one matrix."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


def folded(x: Tensor, block: Triple) -> Tensor:
    """(B, C, D, H, W) → (B, kz·ky·kx·C, D/kz, H/ky, W/kx): a block's voxels become channels, x the fastest."""
    batch, channels, *size = x.shape
    (d, kz), (h, ky), (w, kx) = ((n // k, k) for n, k in zip(size, block, strict=True))
    x = x.permute(0, 2, 3, 4, 1).reshape(batch, d, kz, h, ky, w, kx, channels)
    x = x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, d, h, w, kz * ky * kx * channels)
    return x.permute(0, 4, 1, 2, 3)


def unfolded(x: Tensor, block: Triple) -> Tensor:
    """The inverse of `folded`."""
    batch, channels, d, h, w = x.shape
    kz, ky, kx = block
    channels //= kz * ky * kx
    x = x.permute(0, 2, 3, 4, 1).reshape(batch, d, h, w, kz, ky, kx, channels)
    x = x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, d * kz, h * ky, w * kx, channels)
    return x.permute(0, 4, 1, 2, 3)


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL of N(mean, exp(logvar)) from N(0, 1), element by element (Kingma 2014, appendix B).

    The customary weight 1e-6 belongs to a sum over latents beside a sum over image voxels: with means of both, the same
    weight is 1e-6 · C / (product of the strides).
    """
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar)


def _blocks(channels: int, n: int) -> nn.ModuleList:
    return nn.ModuleList(ResidualBlock(channels) for _ in range(n))


def _cosines(config: VaeConfig) -> tuple[Tensor, Tensor]:
    """(C, n) scaled cosines of lowest frequency in a block of n voxels, and (n, C), what turns them back."""
    sides = []
    for n in config.strides:
        k = np.arange(n)[:, None]
        cosines = np.cos(np.pi * k * (np.arange(n) + 0.5) / n) * math.sqrt(2 / n)
        sides.append(np.where(k == 0, math.sqrt(1 / n), cosines))
    block = np.einsum("ai,bj,ck->abcijk", *sides).reshape(math.prod(config.strides), -1)
    orders = product(*(range(n) for n in config.strides))
    f = np.array([math.hypot(*(k / 2 / n for k, n in zip(at, config.strides, strict=True))) for at in orders])
    kept = np.argsort(f, kind="stable")[: config.latent_channels]
    spread = np.where(f > 0, AC_SPREAD / np.maximum(f, 1e-9) ** 2, DC_SPREAD * math.sqrt(len(f)))[kept]
    there, back = block[kept] / spread[:, None], (block[kept] * spread[:, None]).T
    return torch.as_tensor(there, dtype=torch.float32), torch.as_tensor(back, dtype=torch.float32)
