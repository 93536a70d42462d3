"""The blocks are what their formulas say, start as nothing, and look at no more than they may."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ctsr.models.blocks import ChannelNorm, Conv, ResidualBlock, double_in_plane, run_blocks

SIZES = st.tuples(st.integers(1, 3), st.integers(2, 6), *[st.integers(1, 5)] * 3)


@given(size=SIZES)
def test_the_norm_is_over_the_channels_of_a_voxel(size):
    x = 100 + 30 * torch.randn(size, generator=torch.Generator().manual_seed(0))
    norm = ChannelNorm(size[1])
    with torch.no_grad():
        norm.weight.copy_(torch.arange(size[1]) + 1.0)
        norm.bias.fill_(0.5)
    centred = x - x.mean(1, keepdim=True)
    slow = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    wanted = slow * (torch.arange(size[1]) + 1.0).view(1, -1, 1, 1, 1) + 0.5
    torch.testing.assert_close(norm(x), wanted, atol=1e-3, rtol=1e-3)  # float32 of values of 100


@given(size=SIZES)
def test_a_convolution_by_onednn_is_the_convolution(size):
    conv = Conv(size[1], 3)
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(conv(x), F.conv3d(x, conv.weight, conv.bias, padding=1), atol=1e-5, rtol=1e-5)


@given(size=SIZES)
def test_doubling_repeats_in_plane(size):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(double_in_plane(x), F.interpolate(x, scale_factor=(1, 2, 2)))


@given(size=SIZES, is_thrifty=st.booleans())
def test_blocks_start_as_the_identity(size, is_thrifty):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    plain = torch.nn.ModuleList(ResidualBlock(size[1]) for _ in range(2))
    assert torch.equal(run_blocks(plain, x, is_thrifty=is_thrifty), x)
    told = torch.nn.ModuleList([ResidualBlock(size[1], embedding=4)])
    assert torch.equal(run_blocks(told, x, torch.ones(size[0], 4), is_thrifty=is_thrifty), x)


def test_an_embedding_scales_and_shifts():
    """Scale −1 leaves of a block's inside its shift alone: conv2(silu(shift)), whatever x is."""
    block = ResidualBlock(2, embedding=1)
    with torch.no_grad():
        block.film.bias.copy_(torch.tensor([-1.0, -1.0, 0.3, 2.0]))
        torch.nn.init.normal_(block.conv2.weight)
    x = torch.randn(2, 2, 3, 4, 5)
    shift = torch.tensor([0.3, 2.0]).view(1, 2, 1, 1, 1).expand_as(x)
    torch.testing.assert_close(
        block(x, torch.zeros(2, 1)) - x, block.conv2(F.silu(shift)), atol=1e-5, rtol=1e-5
    )
