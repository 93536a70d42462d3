"""IRControlNet in 3D: a second encoder beside the U-Net's, which also sees where slices were measured.

After DiffBIR (Lin 2024, §3.2): the branch is a copy of encoder and middle; its input is the U-Net's and the condition;
zero convolutions add its features to the U-Net's skips and middle. There the U-Net is frozen. Here both are new and
train together, and the branch carries what belongs to the measurement: guidance can leave it out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ctsr.core.zgrid import ZGrid
from ctsr.models.blocks import zeroed
from ctsr.models.latent_unet import Encoder, LatentUNet, LatentUNetConfig

__all__ = ["ControlBranch", "ControlledUNet", "slice_maps"]

MAPS = 2  # cosine and sine of the position between measured slices
RHO_MIDDLE = 1.25  # ρ enters as its distance from this, the middle of what is trained


class ControlledUNet(nn.Module):
    """`LatentUNet` (`base`) with the branch; equal to the base alone, bit for bit, before it is trained."""

    def __init__(self, config: LatentUNetConfig | None = None) -> None:
        super().__init__()
        self.base = LatentUNet(config)
        self.branch = ControlBranch(self.base)
        self.config = self.base.config

    def noise(self, source: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
        """Noise of variance 1, by step, as this network's process has it: σ_r ε."""
        sigma = self.base.sigma
        return lambda step: sigma * source(step).to(sigma)

    def forward(
        self,
        x_t: Tensor,
        y0: Tensor,
        tau: Tensor,
        *,
        factor: Tensor,
        rho: Tensor,
        maps: Tensor,
        null: Tensor | None = None,
    ) -> Tensor:
        """r̂ as `LatentUNet.forward` gives it. maps: (B, 2, D) from `slice_maps`.

        The cases of `null` see neither y₀ nor the branch: for them it equals `base(…, null=null)`, which is cheaper
        where the whole batch is null, as in a step of guided sampling.
        """
        if maps.shape != (expected := (len(x_t), MAPS, x_t.shape[2])):
            raise ValueError(f"maps {tuple(maps.shape)}, expected {expected}")
        control = partial(self._control, rho=rho, maps=maps, null=null)
        made: Tensor = self.base(x_t, y0, tau, factor=factor, rho=rho, null=null, control=control)
        return made

    def _control(
        self, seen: Tensor, e: Tensor, *, rho: Tensor, maps: Tensor, null: Tensor | None
    ) -> list[Tensor]:
        added: list[Tensor] = self.branch(
            seen, e, rho=rho, maps=maps, is_thrifty=self.base.gradient_checkpointing
        )
        if null is None:
            return added
        kept = (~null).view(-1, 1, 1, 1, 1)
        return [a * kept for a in added]


class ControlBranch(nn.Module):
    """Encoder and middle of `base`, copied, with two maps and ρ as further inputs, behind zero convolutions."""

    def __init__(self, base: LatentUNet) -> None:
        super().__init__()
        config = base.config
        inputs = 2 * config.latent_channels
        self.encoder = Encoder(config, inputs + MAPS + 1)
        widths = config.channels
        self.zero = nn.ModuleList(zeroed(nn.Conv3d(c, c, 1)) for c in widths)
        if base.head.weight.is_meta:  # shapes alone
            return
        copied = base.encoder.state_dict()
        with torch.no_grad():
            wide = torch.zeros_like(self.encoder.stem.weight)
            wide[:, :inputs] = copied["stem.weight"]
            self.encoder.load_state_dict({**copied, "stem.weight": wide})

    def forward(
        self, seen: Tensor, e: Tensor, *, rho: Tensor, maps: Tensor, is_thrifty: bool
    ) -> list[Tensor]:
        """What is added to the base's features. seen: (B, 2C, D, H, W); maps: (B, 2, D)."""
        width = (rho - RHO_MIDDLE).view(-1, 1, 1).expand(-1, 1, maps.shape[2])
        condition = torch.cat([maps, width], dim=1)[..., None, None].expand(-1, -1, -1, *seen.shape[3:])
        features = self.encoder(torch.cat([seen, condition.to(seen.dtype)], dim=1), e, is_thrifty=is_thrifty)
        return [zero(f) for zero, f in zip(self.zero, features, strict=True)]


def slice_maps(grid: ZGrid, z_stride: int) -> Tensor:
    """(2, D) float32, D = ⌈m / z_stride⌉: cosine and sine of a latent voxel's place between measured slices.

    1 and 0 at the centre of a measured slice, −1 and 0 half way to the next. z_stride: thin slices a latent voxel.
    """
    starts = np.arange(0, grid.m, z_stride)
    at = (
        grid.first + (starts + (z_stride - 1) / 2) / grid.factor
    )  # in thick slices, 0: the centre of the first
    return torch.from_numpy(np.stack([np.cos(2 * np.pi * at), np.sin(2 * np.pi * at)]).astype(np.float32))
