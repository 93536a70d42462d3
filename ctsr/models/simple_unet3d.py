"""SimpleUNet3D: the network that doubles the number of slices.

A residual over the `inverse` z-matrix, so that an untrained network is already that method. It works on a 2×2
in-plane unshuffle, has strides in plane only and no norms: HU must not depend on what else lies in the tile.

Along z it is nothing but 3-tap convolutions, so it can be run slice by slice as a stream (`stream`): each
convolution keeps the last two slices it saw. That is exact, repeats no work at chunk borders, and needs the
memory of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctsr.models.blocks import convolve

__all__ = ["SimpleUNet3D", "SimpleUNet3DConfig"]

SLOPE = 0.1  # leaky ReLU: a plain one before a zero-initialised head died for good


@dataclass(frozen=True, slots=True)
class SimpleUNet3DConfig:
    """Everything that decides the shape of the network and the scale of what it sees."""

    channels: tuple[int, ...] = (32, 48, 48)  # a level each, in-plane stride 2 between levels
    unshuffle: int = 2  # in-plane pixels folded into channels at the stem
    hu_scale: float = 1000.0  # y enters as HU/1000
    detail_scale: float = 100.0  # `inverse` − y enters, and the residual leaves, in units of 100 HU

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


class SimpleUNet3D(nn.Module):
    """(B, 1, D, H, W) thick → (B, 1, 2D, H, W) residual over `inverse`, HU. Any D ≥ 1, H, W ≥ 1."""

    def __init__(self, config: SimpleUNet3DConfig | None = None) -> None:
        super().__init__()
        self.gradient_checkpointing = False  # a second forward of each block saves the memory of its inside
        self.config = config or SimpleUNet3DConfig()
        widths = self.config.channels
        folded = self.config.unshuffle**2
        pairs = list(pairwise(widths))
        self.stem = _conv(3 * folded + 1, widths[0])  # y, two differences, ρ
        self.encode = nn.ModuleList(_conv(c, c) for c in widths)
        self.down = nn.ModuleList(_conv(a, b, stride=(1, 2, 2)) for a, b in pairs)
        self.up = nn.ModuleList(nn.Conv3d(b, a, 1) for a, b in pairs)
        self.skip = nn.ModuleList(nn.Conv3d(a, a, 1) for a in widths[:-1])
        self.decode = nn.ModuleList(_conv(c, c) for c in widths[:-1])
        self.head = _conv(widths[0], 2 * folded)
        if not self.stem.weight.is_meta:  # a random start on `meta` costs 1 s of imports, for nothing
            self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, a=SLOPE, nonlinearity="leaky_relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.head.weight, std=1e-5)  # 1e-3 made residuals of 150 HU in air

    @property
    def stride(self) -> int:
        """In-plane sizes are padded to a multiple of this many pixels."""
        return self.config.unshuffle << (len(self.config.channels) - 1)

    @property
    def z_reach(self) -> int:
        """Thick slices on either side that a result depends on."""
        return 3 * len(self.config.channels)  # one a convolution

    @property
    def plane_reach(self) -> int:
        """In-plane pixels on either side that a result depends on."""
        pixels = [self.config.unshuffle << level for level in range(len(self.config.channels))]
        # stem, encode, decode, head; below: encode, decode, the bilinear step
        at_level = [4] + [3] * (len(pixels) - 1)
        at_level[-1] = 2  # encode, the bilinear step
        down = sum(pixels[:-1])
        return sum((n * p for n, p in zip(at_level, pixels, strict=True)), down + self.stride)

    def forward(self, y: Tensor, inverse: Tensor, rho: Tensor) -> Tensor:
        """Residual for a whole volume. y: (B, 1, D, H, W); inverse: (B, 1, 2D, H, W), HU; rho: (B,)."""
        return self._run(y, inverse, rho, lambda conv, x: conv(x), lambda key, x: lambda n: x)

    def stream(self, y: np.ndarray, inverse: np.ndarray, rho: float, *, chunk: int) -> Iterator[np.ndarray]:
        """The same residual of a stack (D, H, W) and its `inverse` (2D, H, W), in consecutive pieces of (2D, H, W), HU.

        chunk: thick slices that go in at once; a piece lags `z_reach` slices behind. y, inverse: of any type, on the
        CPU. Equal to `forward` on the whole up to rounding.
        """
        state, told = _ZState(len(y)), self.stem.weight.new_full((1,), rho)
        chunk, after = min(chunk, len(y)), np.zeros((2 * self.z_reach, *y.shape[1:]), np.float32)
        # behind the stack nothing comes any more: what is held back moves up
        for thick, thin in ((y, inverse), (after[::2], after)):
            for start in range(0, len(thick), chunk):
                stop = start + chunk
                parts = thick[start:stop], thin[2 * start : 2 * stop]
                a, b = (torch.from_numpy(np.ascontiguousarray(p, np.float32))[None, None] for p in parts)
                with suppress(_NotYet):
                    piece = self._run(a.to(told.device), b.to(told.device), told, state.convolve, state.hold)
                    yield piece[0, 0].float().cpu().numpy()

    def _run(
        self,
        y: Tensor,
        inverse: Tensor,
        rho: Tensor,
        conv: Callable[[Any, Tensor], Tensor],
        hold: Callable[[nn.Module, Tensor], Callable[[int], Tensor]],
    ) -> Tensor:
        """The network once. `conv` applies a 3-tap convolution, `hold` keeps a skip for later."""
        batch, one, depth, height, width = y.shape
        if one != 1 or inverse.shape != (batch, 1, 2 * depth, height, width) or rho.shape != (batch,):
            raise ValueError(f"shapes do not fit: y {y.shape}, inverse {inverse.shape}, rho {rho.shape}")

        def residual(block: nn.Module, x: Tensor) -> Tensor:
            kept = hold(block, x)
            change = F.leaky_relu_(conv(block, x), SLOPE)
            return change + kept(change.shape[2])

        if self.gradient_checkpointing and torch.is_grad_enabled():
            residual = partial(checkpoint, residual, use_reentrant=False)
        x = self._fold(y, inverse, rho)
        x = F.leaky_relu_(conv(self.stem, x), SLOPE)
        skips = []
        for level, encode in enumerate(self.encode):
            x = residual(encode, x)
            if level < len(self.down):
                skips.append(hold(self.skip[level], x))
                x = F.leaky_relu_(conv(self.down[level], x), SLOPE)
        for level in reversed(range(len(self.down))):
            x = _double_in_plane(convolve(self.up[level], x, (0, 0, 0)))
            x = x + convolve(self.skip[level], skips.pop()(x.shape[2]), (0, 0, 0))
            x = residual(self.decode[level], x)
        return self._unfold(conv(self.head, x), height, width)

    def _fold(self, y: Tensor, inverse: Tensor, rho: Tensor) -> Tensor:
        """(B, 3·u² + 1, D, H/u, W/u): y, `inverse` − y for both thin slices of each thick one, and ρ."""
        batch, _, depth, height, width = y.shape
        u = self.config.unshuffle
        detail = (
            inverse.view(batch, depth, 2, height, width) - y.view(batch, depth, 1, height, width)
        ).transpose(1, 2)
        x = torch.cat([y / self.config.hu_scale, detail / self.config.detail_scale], dim=1)
        pad = (0, -width % self.stride, 0, -height % self.stride)
        if any(pad):
            x = F.pad(x, (*pad, 0, 0), mode="replicate")
        x = x.view(batch, 3, depth, x.shape[3] // u, u, x.shape[4] // u, u).permute(0, 1, 4, 6, 2, 3, 5)
        x = x.reshape(batch, 3 * u * u, depth, x.shape[5], x.shape[6])
        told = (rho - 1.25).view(batch, 1, 1, 1, 1).expand(batch, 1, *x.shape[2:])
        return torch.cat([x, told], dim=1).contiguous(memory_format=torch.channels_last_3d)

    def _unfold(self, x: Tensor, height: int, width: int) -> Tensor:
        """Head channels → (B, 1, 2D, H, W), HU."""
        batch, _, depth, rows, columns = x.shape
        u = self.config.unshuffle
        x = x.view(batch, 2, u, u, depth, rows, columns).permute(0, 4, 1, 5, 2, 6, 3)
        x = x.reshape(batch, 1, 2 * depth, rows * u, columns * u)
        return x[..., :height, :width] * self.config.detail_scale


class _NotYet(Exception):
    """A convolution has not seen enough slices to give one."""


class _ZState:
    """What a stream along z remembers: two slices a convolution, and the skips that wait for a partner."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.seen: dict[nn.Module, int] = {}
        self.tails: dict[nn.Module, Tensor] = {}
        self.waiting: dict[nn.Module, list[Tensor]] = {}

    def convolve(self, conv: nn.Conv3d, x: Tensor) -> Tensor:
        """The slices of `conv` that are ready once `x` has come: zeros stand beyond both ends.

        What comes behind the last slice of the stack is no slice: it counts as zeros, and gives zeros.
        """
        seen, n = self.seen.get(conv, 0), x.shape[2]
        self.seen[conv] = seen + n
        real = min(n, max(0, self.depth - seen))
        before = self.tails.get(conv)
        parts = [torch.zeros_like(x[:, :, :1]) if before is None else before, x[:, :, :real]]
        x = _stacked([*parts, torch.zeros_like(x[:, :, real:])])
        self.tails[conv] = x[:, :, -2:].clone()
        ready = x.shape[2] - 2
        if ready < 1:
            raise _NotYet
        inside = min(ready, max(0, self.depth - max(seen - 1, 0)))
        if inside == ready:
            return convolve(conv, x, (0, *conv.padding[1:]))
        made = convolve(conv, x[:, :, : max(inside, 1) + 2], (0, *conv.padding[1:]))
        shape = (*made.shape[:2], ready, *made.shape[3:])
        result = made.new_zeros(shape)  # in its type: of an input in fp32 that is bf16 under autocast
        result[:, :, :inside] = made[:, :, :inside]
        return result.contiguous(memory_format=torch.channels_last_3d)

    def hold(self, key: nn.Module, x: Tensor) -> Callable[[int], Tensor]:
        """Put `x` behind what waits under `key`; the function returned takes the next n slices out."""
        waiting = self.waiting.setdefault(key, [])
        waiting.append(x)

        def take(n: int) -> Tensor:
            taken = []
            while n:
                first = waiting.pop(0)
                taken.append(first[:, :, :n])
                if first.shape[2] > n:
                    waiting.insert(0, first[:, :, n:])
                n -= taken[-1].shape[2]
            return taken[0] if len(taken) == 1 else _stacked(taken)

        return take


def _stacked(parts: list[Tensor]) -> Tensor:
    """Joined along z as memory holds them, a slice behind the other: `cat` of channels-last tensors is 10 × as slow."""
    return torch.cat([part.permute(0, 2, 3, 4, 1) for part in parts], dim=1).permute(0, 4, 1, 2, 3)


def _conv(inputs: int, outputs: int, stride: tuple[int, int, int] = (1, 1, 1)) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1)


def _double_in_plane(x: Tensor) -> Tensor:
    """Bilinear by two in plane, slice by slice: the 2D kernel is the vectorised one for channels-last."""
    batch, channels, depth, height, width = x.shape
    flat = x.permute(0, 2, 1, 3, 4).reshape(batch * depth, channels, height, width)
    flat = F.interpolate(flat, scale_factor=2, mode="bilinear", align_corners=False)
    return flat.view(batch, depth, channels, 2 * height, 2 * width).permute(0, 2, 1, 3, 4)
