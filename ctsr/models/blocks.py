"""What the networks are made of: every result depends on a bounded neighbourhood of voxels alone.

No norm, no pooling and no attention here looks at a whole tile, so a tile with a halo of the network's reach
equals the same part of the whole volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["ChannelNorm", "Conv", "ResidualBlock", "convolve", "double_in_plane", "run_blocks", "zeroed"]

EPSILON = 1e-6
M = TypeVar("M", bound=nn.Module)


class ChannelNorm(nn.Module):
    """(B, C, D, H, W) → the same: each voxel's channels to mean 0, variance 1 (Ba 2016), then scale and shift.

    A root-mean-square norm would do as well, but PyTorch's takes 5 × as long on a CPU.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        last = F.layer_norm(x.permute(0, 2, 3, 4, 1), self.weight.shape, self.weight, self.bias, EPSILON)
        return last.permute(0, 4, 1, 2, 3)  # contiguous where x was in channels-last


def convolve(conv: Any, x: Tensor, padding: Sequence[int]) -> Tensor:
    """`conv` (an nn.Conv3d) with this padding, by oneDNN on a CPU.

    On one thread PyTorch leaves oneDNN for images below about 300 × 300, for a path that is three times as slow and
    unfolds the image 27-fold in memory.
    """
    x = x.contiguous(memory_format=torch.channels_last_3d)
    if (
        x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    ):
        made: Tensor = torch.ops.aten.mkldnn_convolution(
            x, conv.weight, conv.bias, padding, conv.stride, conv.dilation, conv.groups
        )
        return made
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, tuple(padding))


class Conv(nn.Conv3d):
    """3 × 3 × 3 convolution that keeps the size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self, x, (1, 1, 1))


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), channels kept; it starts as the identity.

    embedding: width of a vector e, (B, embedding), whose linear map scales and shifts the second norm
    (Perez 2018); 0: there is none.
    """

    def __init__(self, channels: int, embedding: int = 0) -> None:
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(channels), Conv(channels, channels)
        self.norm2, self.conv2 = ChannelNorm(channels), zeroed(Conv(channels, channels))
        self.film = zeroed(nn.Linear(embedding, 2 * channels)) if embedding else None

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        change = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.film is not None:
            scale, shift = self.film(e).view(len(x), 2, -1, 1, 1, 1).unbind(1)
            change = change * (1 + scale) + shift
        made: Tensor = x + self.conv2(F.silu(change))
        return made


def run_blocks(blocks: Any, x: Tensor, *told: Tensor, is_thrifty: bool) -> Tensor:
    """One block after the other; thrifty: what is inside a block isn't kept for the gradient but made again."""
    for block in blocks:
        if is_thrifty and torch.is_grad_enabled():
            x = checkpoint(block, x, *told, use_reentrant=False)
        else:
            x = block(x, *told)
    return x


def zeroed(module: M) -> M:
    """The module with parameters of zero: what it feeds starts as if it weren't there."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def double_in_plane(x: Tensor) -> Tensor:
    """(B, C, D, H, W) → (B, C, D, 2H, 2W) by repetition; 7 × as fast as `interpolate` on channels-last."""
    batch, channels, depth, height, width = x.shape
    last = x.permute(0, 2, 3, 4, 1)[:, :, :, None, :, None]
    last = last.expand(batch, depth, height, 2, width, 2, channels)
    return last.reshape(batch, depth, 2 * height, 2 * width, channels).permute(0, 4, 1, 2, 3)
