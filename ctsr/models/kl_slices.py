"""The 2D autoencoder of published weights, run slice by slice, with a way for slices to hear of each other.

Modules carry the names of the diffusers layout (AutoencoderKL), so that its files load as they are. Group norms and
the attention see one whole slice and no other: tiles are cut along z only. Slices hear of each other once a level, by a
3-tap convolution along z that is added to its input. It is zero before training, so that at the start a volume gives
exactly what its slices give. (Kernels of 3 × 3 × 3 with the 2D weights in their centre would do that too, with 2.7 × as
many parameters and a halo of 17 and 23 slices for 4.)
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctsr.models.blocks import run_blocks, zeroed

if TYPE_CHECKING:
    from ctsr.models.vae import VaeConfig

__all__ = ["WHOLE_SLICE", "SliceDecoder", "SliceEncoder"]

WHOLE_SLICE = 1 << 20  # a reach that no image exceeds
EPSILON = 1e-6


class SliceEncoder(nn.Module):
    """(B, 1, D, H, W), sizes multiples of the stride → (B, 2C, D, h, w) float32: means, then log-variances."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        groups, widths, moments = config.slice_groups, config.channels, 2 * config.latent_channels
        self.reach = (len(widths) + 1, WHOLE_SLICE, WHOLE_SLICE)
        self.conv_in = _conv(1, widths[0])
        self.down_blocks = nn.ModuleList(
            _Level(a, b, config.blocks, groups, down=level < len(widths) - 1)
            for level, (a, b) in enumerate(pairwise((widths[0], *widths)))
        )
        self.mid_block = _Level(widths[-1], widths[-1], 2, groups, attends=True)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPSILON)
        self.conv_out = _conv(widths[-1], moments)
        self.quant_conv = _identity(nn.Conv2d(moments, moments, 1))

    def forward(self, x: Tensor, *, is_thrifty: bool) -> Tensor:
        depth = x.shape[2]
        h = self.conv_in(_slices(x))
        for level in (*self.down_blocks, self.mid_block):
            h = level(h, depth, is_thrifty)
        h = F.silu(self.conv_norm_out(h))
        with torch.autocast(h.device.type, enabled=False):
            return _volume(self.quant_conv(self.conv_out(h.to(self.conv_out.weight.dtype))), depth)


class SliceDecoder(nn.Module):
    """(B, C, D, h, w) → (B, 1, D, H, W) float32."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        groups, widths, latents = config.slice_groups, config.channels[::-1], config.latent_channels
        self.reach = (len(widths) + 1, WHOLE_SLICE, WHOLE_SLICE)
        self.post_quant_conv = _identity(nn.Conv2d(latents, latents, 1))
        self.conv_in = _conv(latents, widths[0])
        self.mid_block = _Level(widths[0], widths[0], 2, groups, attends=True)
        self.up_blocks = nn.ModuleList(
            _Level(a, b, config.blocks + 1, groups, up=level < len(widths) - 1)
            for level, (a, b) in enumerate(pairwise((widths[0], *widths)))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPSILON)
        self.conv_out = _conv(widths[-1], 1)

    def forward(self, z: Tensor, *, is_thrifty: bool) -> Tensor:
        depth = z.shape[2]
        h = self.conv_in(self.post_quant_conv(_slices(z)))
        for level in (self.mid_block, *self.up_blocks):
            h = level(h, depth, is_thrifty)
        h = F.silu(self.conv_norm_out(h))
        with torch.autocast(h.device.type, enabled=False):  # bfloat16 would round HU to steps of 4 to 8
            return _volume(self.conv_out(h.to(self.conv_out.weight.dtype)), depth)


class _Level(nn.Module):
    """Residual blocks, attention behind the first where asked for, neighbours along z, a change of the slice's size.

    What a level does not have is an empty list, which has no name in a file.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: int,
        groups: int,
        *,
        attends: bool = False,
        down: bool = False,
        up: bool = False,
    ) -> None:
        super().__init__()
        widths = pairwise((inputs, *[outputs] * blocks))
        self.resnets = nn.ModuleList(_ResidualBlock(a, b, groups) for a, b in widths)
        self.attentions = nn.ModuleList(_Attention(outputs, groups) for _ in range(attends))
        self.along_z = _AlongZ(outputs)
        self.downsamplers = nn.ModuleList(_Halve(outputs) for _ in range(down))
        self.upsamplers = nn.ModuleList(_Double(outputs) for _ in range(up))

    def forward(self, x: Tensor, depth: int, is_thrifty: bool) -> Tensor:
        first, *rest = self.resnets
        x = self.along_z(run_blocks((first, *self.attentions, *rest), x, is_thrifty=is_thrifty), depth)
        for resize in (*self.downsamplers, *self.upsamplers):
            x = resize(x)
        return x


class _ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), x through a 1 × 1 convolution where channels change."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inputs, EPSILON), _conv(inputs, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outputs, EPSILON), _conv(outputs, outputs)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        change = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        made: Tensor = self.conv_shortcut(x) + change
        return made


class _AlongZ(nn.Module):
    """(B·D, C, H, W) → the same, plus a convolution over each column of D, zero at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = zeroed(nn.Conv2d(channels, channels, (3, 1), padding=(1, 0)))

    def forward(self, x: Tensor, depth: int) -> Tensor:
        columns = _volume(x, depth).flatten(3)
        return x + _slices(self.conv(columns)).view(x.shape)


class _Attention(nn.Module):
    """One head over all pixels of a slice (Vaswani 2017). Its end is zero before weights come: then it adds nothing."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPSILON)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([zeroed(nn.Linear(channels, channels))])

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (to(pixels)[:, None] for to in (self.to_q, self.to_k, self.to_v))
        seen = F.scaled_dot_product_attention(q, k, v)[:, 0]
        made: Tensor = x + self.to_out[0](seen).transpose(1, 2).reshape(x.shape)
        return made


class _Halve(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 1, 0, 1))  # right and bottom only: half a pixel off, as it was trained
        return self.conv(padded)  # type: ignore[no-any-return]


class _Double(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]


def _slices(x: Tensor) -> Tensor:
    """(B, C, D, H, W) → (B·D, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


def _volume(x: Tensor, depth: int) -> Tensor:
    """(B·D, C, H, W) → (B, C, D, H, W)."""
    return x.reshape(-1, depth, *x.shape[1:]).transpose(1, 2)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _identity(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.dirac_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv
