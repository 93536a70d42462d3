"""CtVae begins as a block transform, sees no farther than it claims, and keeps HU."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from ctsr.errors import WeightsError
from ctsr.models import zoo
from ctsr.models.vae import LOGVAR_RANGE, CtVae, VaeConfig, folded, kl, unfolded

SMALL = VaeConfig(channels=(3, 4))
FLAT = VaeConfig(channels=(3, 4), z_strides=(1,), latent_channels=4)
DEEP = VaeConfig(channels=(2, 3, 3), z_strides=(1, 2), unshuffle=1, latent_channels=8)
TWICE = VaeConfig(channels=(2, 3), blocks=2)
BY_SLICE = VaeConfig((4, 4, 8), (1, 1), latent_channels=4, unshuffle=1, slice_groups=2)
CONFIGS = [SMALL, FLAT, DEEP, TWICE, BY_SLICE]
OF_VOXELS = [SMALL, FLAT, DEEP, TWICE]


def untrained(config: VaeConfig = SMALL) -> CtVae:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CtVae(config).eval()


def trained(config: VaeConfig = SMALL) -> CtVae:
    """One in which every parameter counts; its latents have another scale in each channel."""
    model = untrained(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "linear" not in name:
                p.add_(torch.randn(p.shape, generator=generator) * (0.5 / math.sqrt(p[0].numel())))
        model.latent_mean.normal_(generator=generator)
        model.latent_std.uniform_(0.5, 2, generator=generator)
    return model


def chest(size: tuple[int, int, int], batch: int = 1) -> torch.Tensor:
    """Something smooth with noise, HU/1000."""
    generator = torch.Generator().manual_seed(sum(size))
    grid = torch.meshgrid(*(torch.linspace(0, 3, n) for n in size), indexing="ij")
    smooth = torch.sin(grid[0] + 2 * grid[1]) * torch.cos(grid[2])
    return smooth + 0.03 * torch.randn(batch, 1, *size, generator=generator)


@settings(max_examples=20)
@given(hu=st.floats(-1024, 3071), size=st.tuples(*[st.integers(1, 9)] * 3), config=st.sampled_from(OF_VOXELS))
@torch.inference_mode()
def test_an_untrained_model_keeps_a_uniform_volume_of_any_size(hu, size, config):
    x = torch.full((1, 1, *size), hu / 1000)
    back, mean, _ = untrained(config)(x)
    assert back.shape == x.shape
    assert mean.shape == (
        1,
        config.latent_channels,
        *(-(-n // s) for n, s in zip(size, config.strides, strict=True)),
    )
    torch.testing.assert_close(back * 1000, x * 1000, atol=2e-3, rtol=0)  # HU


@pytest.mark.parametrize("config", OF_VOXELS, ids=str)
@torch.inference_mode()
def test_an_untrained_model_keeps_the_lowest_frequencies_of_a_block_and_no_others(config):
    """What scipy's DCT leaves when all but the lowest frequencies are dropped."""
    from scipy.fft import dctn, idctn

    x = chest((8, 16, 16))
    back = untrained(config)(x)[0]
    kz, ky, kx = config.strides
    blocks = x.numpy().reshape(8 // kz, kz, 16 // ky, ky, 16 // kx, kx)
    found = dctn(blocks, axes=(1, 3, 5), norm="ortho")
    orders = np.stack(np.meshgrid(*(np.arange(k) / k for k in (kz, ky, kx)), indexing="ij"))
    f = np.linalg.norm(orders, axis=0)
    kept = np.zeros(f.size, bool)
    kept[np.argsort(f, axis=None, kind="stable")[: config.latent_channels]] = True
    found *= kept.reshape(1, kz, 1, ky, 1, kx)
    expected = idctn(found, axes=(1, 3, 5), norm="ortho").reshape(x.shape)
    np.testing.assert_allclose(back, expected, atol=1e-5)  # units of 1000 HU


@torch.inference_mode()
def test_an_untrained_model_finds_the_latent_it_decoded():
    z = torch.randn(1, 8, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    model = untrained()
    torch.testing.assert_close(model.encode(model.decode(z))[0], z, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_sample_of_an_untrained_model_is_within_2_hu_of_the_mean():
    x = chest((8, 16, 16))
    model = untrained()
    mean, logvar = model.encode(x)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    difference = model(x, noise)[0] - model(x)[0]
    assert 0.1 < 1000 * difference.square().mean().sqrt() < 2
    expected = model.decode(mean + noise * torch.exp(logvar / 2))
    torch.testing.assert_close(model(x, noise)[0], expected)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("axis", [0, 2], ids=["z", "x"])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_gradient_reaches_as_far_as_is_claimed_and_no_farther(config, axis, part):
    """By float64, where a gradient of zero is one: the farthest latent voxel that touches, or is touched."""
    model = trained(config).double()
    reach, stride = getattr(model, part).reach[axis], config.strides[axis]
    if config is BY_SLICE and axis > 0:
        assert reach > 10_000  # the whole slice, by its norms
        return
    size = [1, 1, 1]
    size[axis] = 2 * reach + 3
    if part == "encoder":
        given_ = chest(tuple(n * s for n, s in zip(size, config.strides, strict=True))).double()
        voxels = [reach + 1]
    else:
        given_ = torch.randn(1, config.latent_channels, *size, dtype=torch.float64)
        voxels = list(range((reach + 1) * stride, (reach + 2) * stride))
    given_.requires_grad_()
    made = model.encode(given_)[0] if part == "encoder" else model.decode(given_)
    farthest = 0
    for at in voxels:
        (grad,) = torch.autograd.grad(made.select(axis + 2, at).sum(), given_, retain_graph=True)
        touched = grad.abs().amax(dim=[d for d in range(5) if d != axis + 2]).nonzero()
        latent = touched // stride if part == "encoder" else touched
        farthest = max(farthest, int((latent - (reach + 1)).abs().max()))
    assert farthest == reach


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(config):
    found = []
    x = chest((4, 8, 8), batch=2)
    for is_thrifty in (False, True):
        model = trained(config).train()
        model.gradient_checkpointing = is_thrifty
        noise = torch.ones_like(model.encode(x)[0])
        back, mean, logvar = model(x, noise)
        loss = (back - x).abs().mean() + kl(mean, logvar).mean()
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters()]))
    (plain, plain_grads), (thrifty, thrifty_grads) = found
    assert torch.equal(plain, thrifty)
    for a, b in zip(plain_grads, thrifty_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_every_parameter_learns_within_two_steps():
    """The heads start at zero, so that what feeds them has a gradient only from the second step on."""
    model = untrained().train()
    x = chest((4, 8, 8))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        back, mean, logvar = model(x, torch.ones(1, 8, 2, 2, 2))
        ((back - x).square().mean() + 1e-3 * kl(mean, logvar).mean()).backward()
        optimiser.step()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@torch.inference_mode()
def test_bfloat16_inside_does_not_round_hu(config):
    """HU in bfloat16 go in steps of 4 to 8: the way of the HU is float32, only corrections may be rounded."""
    model, x = untrained(config), chest((4, 8, 8))
    plain = model(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded, mean, logvar = model(x)
    assert {t.dtype for t in (rounded, mean, logvar)} == {torch.float32}
    assert not torch.equal(rounded, rounded.bfloat16().float())
    if config is not BY_SLICE:  # it has no way for the HU but its convolutions
        torch.testing.assert_close(rounded, plain, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_standardised_latents_come_back_and_have_the_scale_that_the_buffers_say():
    model = trained()
    z = model.latent_mean.view(-1, 1, 1, 1) + model.latent_std.view(-1, 1, 1, 1) * torch.randn(2, 8, 9, 9, 9)
    standard = model.standardise(z)
    torch.testing.assert_close(model.unstandardise(standard), z, atol=1e-6, rtol=1e-6)
    assert standard.mean(dim=(0, 2, 3, 4)).abs().max() < 0.15  # 1458 values: a standard error of 0.026
    assert (standard.std(dim=(0, 2, 3, 4)) - 1).abs().max() < 0.1


def test_kl_of_worked_examples():
    made = kl(torch.tensor([0.5, -1.0]), torch.tensor([0.2, -0.5]))
    torch.testing.assert_close(made, torch.tensor([0.13570138, 0.55326533]))
    assert float(made.mean()) == pytest.approx(0.34448335, abs=1e-7)


@given(st.floats(-30, 30), st.floats(*LOGVAR_RANGE))
def test_kl_is_never_negative_and_zero_for_the_prior_alone(mean, logvar):
    made = float(kl(torch.tensor(mean, dtype=torch.float64), torch.tensor(logvar, dtype=torch.float64)))
    assert made >= -1e-12
    if abs(mean) > 1e-4 or abs(logvar) > 1e-4:
        assert made > 0
    assert float(kl(torch.zeros(()), torch.zeros(()))) == 0


@torch.inference_mode()
def test_a_log_variance_stays_within_its_range():
    model = untrained()
    model.encoder.head.bias[8:12] = 1e3
    model.encoder.head.bias[12:] = -1e3
    _, logvar = model.encode(chest((2, 4, 4)))
    assert (float(logvar.min()), float(logvar.max())) == LOGVAR_RANGE


@given(
    size=st.tuples(*[st.integers(1, 3)] * 3),
    block=st.tuples(*[st.integers(1, 4)] * 3),
    channels=st.integers(1, 3),
)
def test_folding_is_undone_by_unfolding(size, block, channels):
    x = torch.randn(2, channels, *(n * k for n, k in zip(size, block, strict=True)))
    small = folded(x, block)
    assert small.shape == (2, channels * math.prod(block), *size)
    assert torch.equal(unfolded(small, block), x)
    first = x[:, 0, : block[0], : block[1], : block[2]]  # a block's voxels, x the fastest
    assert torch.equal(small[:, ::channels, 0, 0, 0], first.flatten(1))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_file_gives_the_model_back_with_the_scale_of_its_latents(config):
    model = trained(config)
    data = zoo.pack("vae", config.to_dict(), model.state_dict(), card={"seed": 0})
    back = zoo.build(zoo.unpack(data, "vae"), "vae")
    assert isinstance(back, CtVae)
    assert back.config == config
    assert torch.equal(back.latent_std, model.latent_std)
    x = chest((2, 8, 8))
    assert torch.equal(back(x)[0], model(x)[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"z_strides": (1, 2)},
        {"z_strides": (3,)},
        {"blocks": 9},
        {"unshuffle": 3},
        {"slice_groups": 32},
        {"latent_channels": 33},
        {"channels": (4,)},
        {
            "channels": (4,) * 4,
            "z_strides": (2,) * 3,
            "unshuffle": 4,
        },  # blocks of 8192 voxels, cosines of 512 MB
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_network_is_refused(changes):
    data = zoo.pack("vae", SMALL.to_dict() | changes, untrained().state_dict(), card={})
    with pytest.raises(WeightsError):
        zoo.build(zoo.unpack(data, "vae"), "vae")
    with pytest.raises(ValueError, match=r"\d|slice-wise"):
        dataclasses.replace(SMALL, **changes)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected"):
        untrained().encode(torch.zeros(1, 2, 4, 4, 4))
    with pytest.raises(ValueError, match="expected"):
        untrained().decode(torch.zeros(1, 4, 2, 2, 2))


@pytest.mark.parametrize(
    ("preset", "parameters", "kflop", "strides", "reach"),
    [
        ("tiny", 140_800, (7.29, 12.8), (2, 4, 4), (5, 8)),
        ("compact", 1_780_724, (64.6, 122), (2, 4, 4), (5, 8)),
        ("full", 52_317_908, (2098, 3118), (2, 4, 4), (8, 11)),
        ("mri", 58_961_381, None, (1, 4, 4), (4, 4)),
    ],
)
def test_the_presets_have_these_sizes(preset, parameters, kflop, strides, reach):
    config = VaeConfig.preset(preset)
    with torch.device("meta"):
        model = CtVae(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.strides == strides
    assert (model.encoder.reach[0], model.decoder.reach[0]) == reach
    if preset in ("full", "mri"):  # a fifth of a gigabyte to make
        return
    count = partial(_flops_of_onednn)
    count._get_raw = True  # type: ignore[attr-defined]
    model, x = CtVae(config), torch.zeros(1, 1, 8, 16, 16)
    for made, expected in zip(
        (lambda: model.encode(x), lambda: model.decode(model.encode(x)[0])), kflop, strict=True
    ):
        with (
            torch.no_grad(),
            FlopCounterMode(
                display=False, custom_mapping={torch.ops.aten.mkldnn_convolution: count}
            ) as counter,
        ):
            made()
        found = counter.get_total_flops() / x.numel() / 1e3
        assert found - (kflop[0] if expected == kflop[1] else 0) == pytest.approx(expected, rel=5e-3)


def _flops_of_onednn(x, weight, *args, out_val=None, **kwargs):
    return conv_flop_count(list(x.shape), list(weight.shape), list(out_val.shape))
