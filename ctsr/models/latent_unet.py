"""LatentUNet: what is missing between the latent of stage one and that of the truth, at any noise level.

The state x_t = y₀ + u holds the residual r = x₀ − y₀ under noise: u = a·r + s·σ_r·ε with a = 1 − η, s = κ√η (ResShift,
Yue 2023), and σ_r of each channel: residuals of CT latents are a hundred times as large in one channel as in another,
and noise that fits the one would drown the other. The network predicts r from u, y₀ and the noise level. It sees u by
itself, at unit variance: of x_t in bfloat16 the residual, a tenth of y₀, would be lost to rounding. The result is

    r̂ = g(τ)·u + c·F,   c = s·σ_r / √(a² + s²)

with F the U-Net and g a gain per channel, both zero before training: an untrained network returns y₀ exactly. Karras
2022 (table 1) has the same form with a fixed g; here g is learnt, for the sake of that start, and may differ from
channel to channel. Without it a network whose norms forget sizes can't copy u where there is hardly any noise: after
350 steps on made-up residuals of variance 0.09 its mean squared error at √η = 0.03 was 0.057, with it 0.0004, as with
a fixed g.

All convolutions are 3 × 3 × 3, all strides in plane: a latent voxel is 2.0 × 2.8 × 2.8 mm, and z is what is to be
resolved. There is no attention: over a tile it would make the result depend on the cut, and in windows fixed to the
volume every tile would need a further window of the coarsest level as its halo.

Sizes, the branch of `ctsr.models.control` included; FLOPs (2 × multiply-adds) are those of one pass:

    preset     parameters   MFLOP a latent voxel    reach z, in plane
    tiny            0.19 M         0.14                  10, 15         for tests
    compact          7.1 M          2.3                  14, 33         two CPU cores: 1.8 s a step, 20 000 in ten hours
    full             124 M           39                  26, 61

A step of training takes three times that, four with gradient checkpointing. For the gradient `compact` keeps 8.7 KiB a
latent voxel in float32 (2.7 with checkpointing), `full` 46 (11), beside 2.5 GB for weights, moments and an average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctsr.models.blocks import ChannelNorm, Conv, ResidualBlock, double_in_plane, run_blocks, zeroed

__all__ = ["PRESETS", "Encoder", "LatentUNet", "LatentUNetConfig"]

LOWEST = 0.003  # √η at τ = 0; τ = ln(√η / LOWEST) / ln(1 / LOWEST)
FREQUENCIES = 32  # of the noise level's embedding
Control = Callable[[Tensor, Tensor], Sequence[Tensor]]
CONDITIONS = 3  # ln factor, ln ρ, whether y₀ is withheld


@dataclass(frozen=True, slots=True)
class LatentUNetConfig:
    """Everything that decides the shape of the network and the scale of what it sees."""

    latent_channels: int = 8
    model_channels: int = 48  # of the first level
    multipliers: tuple[int, ...] = (
        1,
        2,
        3,
    )  # of its channels, a level each; in-plane stride 2 between levels
    blocks: int = 1  # residual blocks a level, in the encoder, the middle and the decoder
    kappa: float = 3.0  # noise: its standard deviation at η = 1 is κ σ_r
    residual_std: tuple[float, ...] = (0.3,)  # σ_r of each channel, or one of all: rms of r in training

    def __post_init__(self) -> None:
        if not 1 <= self.blocks <= 8:
            raise ValueError(f"{self.blocks} blocks a level, 1 to 8 are possible")
        if len(self.residual_std) not in (1, self.latent_channels):
            raise ValueError(f"{len(self.residual_std)} residual_std for {self.latent_channels} channels")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LatentUNetConfig:
        """`tiny`, `compact` or `full`, with some values replaced."""
        return replace(PRESETS[name], **changes)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(m * self.model_channels for m in self.multipliers)

    @property
    def embedding(self) -> int:
        """Width of the vector that tells every block noise level, factor and ρ."""
        return 4 * self.model_channels

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


PRESETS = {
    "tiny": LatentUNetConfig(model_channels=12, multipliers=(1, 2)),
    "compact": LatentUNetConfig(),
    "full": LatentUNetConfig(model_channels=144, blocks=2),
}


class LatentUNet(nn.Module):
    """x_t, y₀: (B, C, D, H, W) standardised latents → r̂, the same shape. Any D, H, W ≥ 1."""

    def __init__(self, config: LatentUNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LatentUNetConfig()
        widths, e = config.channels, config.embedding
        self.gradient_checkpointing = False  # a second forward of each block saves the memory of its inside
        self.embed_level = _two_layers(2 * FREQUENCIES, e)
        self.embed_conditions = _two_layers(CONDITIONS, e)
        self.encoder = Encoder(config, 2 * config.latent_channels)
        self.up = nn.ModuleList(nn.Conv3d(b, a, 1) for a, b in pairwise(widths))
        self.skip = nn.ModuleList(nn.Conv3d(a, a, 1) for a in widths[:-1])
        self.decode = nn.ModuleList(_blocks(config, c) for c in widths[:-1])
        self.norm = ChannelNorm(widths[0])
        self.head = zeroed(Conv(widths[0], config.latent_channels))
        self.gain = zeroed(nn.Linear(e, config.latent_channels))

    @property
    def sigma(self) -> Tensor:
        """σ_r, (1, C or 1, 1, 1, 1), where the network is."""
        return self.head.weight.new_tensor(self.config.residual_std).view(1, -1, 1, 1, 1)

    @property
    def stride(self) -> int:
        """In-plane tiles start on multiples of this many latent voxels; along z anywhere."""
        return 1 << (len(self.config.multipliers) - 1)

    @property
    def z_reach(self) -> int:
        """Latent voxels on either side, along z, that a result depends on: one a convolution."""
        return 2 + 4 * self.config.blocks * len(self.config.multipliers)

    @property
    def plane_reach(self) -> int:
        """Latent voxels on either side, in plane, that a result depends on."""
        levels = sum(1 << level for level in range(len(self.config.multipliers)))
        return 2 + 4 * self.config.blocks * levels + self.stride - 1

    def forward(
        self,
        x_t: Tensor,
        y0: Tensor,
        tau: Tensor,
        *,
        factor: Tensor,
        rho: Tensor,
        null: Tensor | None = None,
        control: Control | None = None,
    ) -> Tensor:
        """r̂ in the units of the latents, float32: x̂₀ = y₀ + r̂.

        tau: (B,) noise level in [0, 1]; factor: (B,) thick over thin spacing; rho: (B,) relative width of the profile.
        null: (B,) bool, the cases that are guidance's null: y₀ defines their process but isn't shown.
        control: gives, from what the encoder sees and from the embedding, what is added to its features.
        """
        batch, channels, *size = x_t.shape
        fits = y0.shape == x_t.shape and channels == self.config.latent_channels and len(size) == 3
        if not fits or any(t.shape != (batch,) for t in (tau, factor, rho)):
            shapes = ", ".join(str(tuple(t.shape)) for t in (x_t, y0, tau))
            raise ValueError(f"shapes do not fit: x_t, y0, tau {shapes}")
        with torch.autocast(x_t.device.type, enabled=False):
            told = x_t.new_ones(batch) if null is None else 1 - null.to(x_t.dtype)
            e = self._embedding(tau, factor, rho, told)
            eta = LOWEST ** (2 - 2 * tau)
            a, s = 1 - eta, self.config.kappa * eta.sqrt()
            spread = torch.sqrt(a**2 + s**2)  # of u / σ_r
            u = x_t - y0
            sigma = self.sigma
            seen = torch.cat([u / (sigma * _wide(spread)), y0 * _wide(told)], dim=1)
        made = self._network(self._padded(seen), e, control)[..., : size[1], : size[2]]
        with torch.autocast(x_t.device.type, enabled=False):
            return _wide(self.gain(e)) * u + sigma * _wide(s / spread) * made.float()

    def _embedding(self, tau: Tensor, factor: Tensor, rho: Tensor, told: Tensor) -> Tensor:
        """(B, embedding)."""
        k = torch.arange(FREQUENCIES, device=tau.device, dtype=torch.float32)
        phase = 1000 * tau[:, None] * torch.exp(-math.log(10_000) / FREQUENCIES * k)
        level: Tensor = self.embed_level(torch.cat([phase.cos(), phase.sin()], dim=1))
        conditions = torch.stack([factor.log(), rho.log(), 1 - told], dim=1)
        return F.silu(level + self.embed_conditions(conditions))

    def _padded(self, x: Tensor) -> Tensor:
        """To a multiple of the stride in plane, the edge repeated: beyond it there is tissue, not zeros."""
        pad = (0, -x.shape[-1] % self.stride, 0, -x.shape[-2] % self.stride, 0, 0)
        return F.pad(x, pad, mode="replicate") if any(pad) else x

    def _network(self, seen: Tensor, e: Tensor, control: Control | None) -> Tensor:
        features = self.encoder(seen, e, is_thrifty=self.gradient_checkpointing)
        if control is not None:
            features = [f + c for f, c in zip(features, control(seen, e), strict=True)]
        x = features.pop()
        for up, skip, blocks in reversed(list(zip(self.up, self.skip, self.decode, strict=True))):
            x = double_in_plane(up(x)) + skip(features.pop())
            x = run_blocks(blocks, x, e, is_thrifty=self.gradient_checkpointing)
        made: Tensor = self.head(F.silu(self.norm(x)))
        return made


class Encoder(nn.Module):
    """(B, inputs, D, H, W) → the features of every level but the last, then those of the middle."""

    def __init__(self, config: LatentUNetConfig, inputs: int) -> None:
        super().__init__()
        widths = config.channels
        self.stem = Conv(inputs, widths[0])
        self.encode = nn.ModuleList(_blocks(config, c) for c in widths)
        self.down = nn.ModuleList(nn.Conv3d(a, b, (1, 2, 2), stride=(1, 2, 2)) for a, b in pairwise(widths))
        self.middle = _blocks(config, widths[-1])

    def forward(self, x: Tensor, e: Tensor, *, is_thrifty: bool) -> list[Tensor]:
        x = run_blocks(self.encode[0], self.stem(x), e, is_thrifty=is_thrifty)
        features = []
        for down, blocks in zip(self.down, self.encode[1:], strict=True):
            features.append(x)
            x = run_blocks(blocks, down(x), e, is_thrifty=is_thrifty)
        return [*features, run_blocks(self.middle, x, e, is_thrifty=is_thrifty)]


def _blocks(config: LatentUNetConfig, channels: int) -> nn.ModuleList:
    return nn.ModuleList(ResidualBlock(channels, config.embedding) for _ in range(config.blocks))


def _two_layers(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.SiLU(), nn.Linear(outputs, outputs))


def _wide(x: Tensor) -> Tensor:
    """(B,) or (B, C) → what multiplies (B, C, D, H, W)."""
    return x.view(len(x), -1, 1, 1, 1)
