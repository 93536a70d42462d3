"""LatentUNet says nothing before it has learnt, sees no farther than it claims, and hears what it is told."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from ctsr.models.control import ControlledUNet
from ctsr.models.latent_unet import PRESETS, LatentUNet, LatentUNetConfig

SMALL = LatentUNetConfig(latent_channels=2, model_channels=4, multipliers=(1, 2))
SHAPES = [
    SMALL,
    LatentUNetConfig(latent_channels=1, model_channels=3, multipliers=(1, 1, 1)),
    LatentUNetConfig(latent_channels=1, model_channels=3, multipliers=(1,), blocks=2),
]


def untrained(config: LatentUNetConfig = SMALL, make: type = LatentUNet):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(config).eval()


def trained(config: LatentUNetConfig = SMALL, make: type = LatentUNet):
    """One in which no parameter is zero any more."""
    network = untrained(config, make)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.5 / math.sqrt(p[0].numel())))
    return network


def inputs(size: tuple[int, int, int], batch: int = 1, channels: int = 2, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(sum(size))
    draw = partial(torch.randn, generator=generator, dtype=dtype)
    y0 = draw(batch, channels, *size)
    x_t = y0 + 0.5 * draw(batch, channels, *size)
    tau = torch.linspace(0.3, 0.9, batch, dtype=dtype)
    told = {
        "factor": torch.full((batch,), 3.0, dtype=dtype),
        "rho": torch.linspace(0.8, 1.6, batch, dtype=dtype),
    }
    return (x_t, y0, tau), told


@settings(max_examples=20)
@given(tau=st.floats(0, 1), factor=st.floats(1.1, 20), rho=st.floats(0.5, 3))
@torch.inference_mode()
def test_an_untrained_network_predicts_no_residual(tau, factor, rho):
    args, _ = inputs((3, 6, 5))
    made = untrained()(*args[:2], torch.tensor([tau]), factor=torch.tensor([factor]), rho=torch.tensor([rho]))
    assert not made.any()
    assert made.dtype == torch.float32


@pytest.mark.parametrize("config", SHAPES, ids=str)
@pytest.mark.parametrize("axis", [2, 4], ids=["z", "plane"])
def test_the_gradient_reaches_as_far_as_is_claimed_and_no_farther(config, axis):
    network = trained(config).double()
    reach = network.z_reach if axis == 2 else network.plane_reach
    size = [1, 1, 1]
    size[axis - 2] = 2 * reach + 2 * network.stride
    args, told = inputs(tuple(size), channels=config.latent_channels, dtype=torch.float64)
    farthest = 0
    for at in range(reach, reach + network.stride):
        seen = [t.clone().requires_grad_() for t in args[:2]]
        network(*seen, args[2], **told).select(axis, at).sum().backward()
        for t in seen:
            touched = t.grad.abs().amax(dim=[d for d in range(5) if d != axis]).nonzero()
            farthest = max(farthest, int((touched - at).abs().max()))
    assert farthest == reach


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 3, 7), (5, 2, 1), (2, 8, 8), (3, 9, 5)])
@torch.inference_mode()
def test_any_size_works(size):
    args, told = inputs(size)
    made = trained()(*args, **told)
    assert made.shape == args[0].shape
    assert torch.isfinite(made).all()


@torch.inference_mode()
def test_padding_to_the_stride_repeats_the_edge():
    args, told = inputs((2, 7, 5))
    network = trained()
    wide = [torch.nn.functional.pad(t, (0, 1, 0, 1, 0, 0), mode="replicate") for t in args[:2]]
    torch.testing.assert_close(network(*args, **told), network(*wide, args[2], **told)[..., :7, :5])


@torch.inference_mode()
def test_each_case_of_a_batch_is_its_own():
    args, told = inputs((3, 4, 6), batch=3)
    network = trained()
    null = torch.tensor([False, True, False])
    both = network(*args, **told, null=null)
    for i in range(3):
        one = slice(i, i + 1)
        alone = network(*(a[one] for a in args), **{k: v[one] for k, v in told.items()}, null=null[one])
        torch.testing.assert_close(both[one], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["tau", "factor", "rho"])
@torch.inference_mode()
def test_it_hears_what_it_is_told(name):
    args, told = inputs((2, 4, 4))
    network = trained()
    before = network(*args, **told)
    named = dict(zip(["x_t", "y0", "tau"], args, strict=True)) | told
    assert (network(**(named | {name: named[name] * 1.1})) - before).abs().max() > 1e-3


@torch.inference_mode()
def test_null_does_not_see_y0_and_else_it_does():
    """Moving y₀ and x_t together leaves u = x_t − y₀, all that null may see, as it was."""
    (x_t, y0, tau), told = inputs((2, 4, 4))
    network = trained()
    moved = torch.randn(y0.shape, generator=torch.Generator().manual_seed(5))
    for null in (True, False):
        told["null"] = torch.tensor([null])
        change = network(x_t + moved, y0 + moved, tau, **told) - network(x_t, y0, tau, **told)
        assert (change.abs().max() < 1e-4) == null


@pytest.mark.parametrize(
    ("sqrt_eta", "c_out", "c_in"),  # Karras 2022, table 1, for κ = 2, σ_r = 0.3: computed apart, in float64
    [
        (0.02, 0.03966470, 3.30539206),
        (0.2915741278, 0.27143258, 1.55153559),
        (0.6099099334, 0.29648449, 0.81018653),
        (0.99, 0.29999864, 0.50504821),
    ],
)
@torch.inference_mode()
def test_u_enters_with_unit_variance_and_leaves_by_what_is_left(sqrt_eta, c_out, c_in):
    network = untrained(
        LatentUNetConfig(latent_channels=2, model_channels=4, kappa=2 / 0.3, residual_std=(0.3,))
    )
    network.head.bias.fill_(1.0)
    seen = []
    network.encoder.stem.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    y0, u = torch.zeros(1, 2, 1, 4, 4), torch.ones(1, 2, 1, 4, 4)
    tau = torch.tensor([math.log(sqrt_eta / 0.003) / math.log(1 / 0.003)])
    made = network(y0 + u, y0, tau, factor=torch.ones(1), rho=torch.ones(1))
    torch.testing.assert_close(made, torch.full_like(made, c_out), atol=0, rtol=2e-6)
    torch.testing.assert_close(seen[0][:, :2], torch.full_like(u, c_in), atol=0, rtol=2e-6)
    assert not seen[0][:, 2:].any()


def test_noise_levels_are_those_of_the_schedule():
    schedule = pytest.importorskip("ctsr.diffusion.schedule")
    from ctsr.models.latent_unet import LOWEST

    for sqrt_eta in (0.003, 0.02, 0.5, 1.0):
        assert LOWEST ** (1 - float(schedule.noise_level(sqrt_eta))) == pytest.approx(sqrt_eta, rel=1e-12)


def test_gradient_checkpointing_changes_neither_loss_nor_gradients():
    found = []
    for is_thrifty in (False, True):
        network = trained().train()
        network.gradient_checkpointing = is_thrifty
        args, told = inputs((3, 6, 5), batch=2)
        loss = network(*args, **told).square().mean()
        loss.backward()
        found.append((loss.detach(), [p.grad for p in network.parameters()]))
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a, b)
        assert a.abs().max() > 0


@torch.inference_mode()
def test_bfloat16_inside_gives_nearly_the_same_float32():
    args, told = inputs((3, 6, 8))
    network = trained()
    exact = network(*args, **told)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = network(*args, **told)
    assert made.dtype == torch.float32
    assert 0 < (made - exact).abs().max() < 0.05 * exact.abs().max()  # 8 bits over 12 convolutions


def test_it_learns_a_residual_and_to_copy_where_there_is_hardly_any_noise():
    """r = 0.3·(y₀ two voxels away): from noise it is seen by y₀ alone, at a low level u shows it."""
    torch.manual_seed(0)
    network = LatentUNet(LatentUNetConfig(latent_channels=2, model_channels=8, multipliers=(1, 2)))
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
    told = {"factor": torch.full((6,), 2.0), "rho": torch.ones(6)}
    tau = torch.tensor([0.3, 1.0]).repeat(3)
    eta = (0.003 ** (2 - 2 * tau)).view(-1, 1, 1, 1, 1)
    for step in range(80):
        y0 = torch.randn(6, 2, 4, 4, 4)
        r = 0.3 * y0.roll(2, dims=2)
        u = (1 - eta) * r + eta.sqrt() * torch.randn_like(r)
        loss = (network(y0 + u, y0, tau, **told) - r).square().mean(dim=(1, 2, 3, 4))
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
        if step == 0:
            assert loss.mean().item() == pytest.approx(0.09, rel=0.1)
    assert loss[tau == 0.3].mean() < 0.002
    assert loss[tau == 1.0].mean() < 0.06


@pytest.mark.parametrize(
    ("preset", "parameters", "mflop", "reach"),
    [
        ("tiny", 187_432, 0.1415, (10, 15)),
        ("compact", 7_095_904, 2.281, (14, 33)),
        ("full", 123_996_544, None, (26, 61)),
    ],
)
def test_the_presets_have_these_sizes(preset, parameters, mflop, reach):
    config = LatentUNetConfig.preset(preset)
    with torch.device("meta"):
        whole = ControlledUNet(config)
    base = whole.base
    assert sum(p.numel() for p in whole.parameters()) == parameters
    assert (base.z_reach, base.plane_reach) == reach
    if mflop is None:  # half a gigabyte to make
        return
    count = partial(_flops_of_onednn)
    count._get_raw = True  # type: ignore[attr-defined]
    y0, one = torch.zeros(1, 8, 1, 4, 4), torch.ones(1)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_convolution: count}) as counter:
        ControlledUNet(config)(y0, y0, one, factor=one, rho=one, maps=torch.zeros(1, 2, 1))
    assert counter.get_total_flops() / y0[0, 0].numel() / 1e6 == pytest.approx(mflop, rel=1e-3)


def _flops_of_onednn(x, weight, *_args, out_val, **_kwargs):
    return conv_flop_count(list(x.shape), list(weight.shape), list(out_val.shape), transposed=False)


def test_other_channels_make_another_network_of_the_same_plan():
    config = LatentUNetConfig.preset("compact", model_channels=32, kappa=0.5)
    assert config.channels == (32, 64, 96)
    assert config.blocks == PRESETS["compact"].blocks
    with pytest.raises(ValueError, match="9 blocks a level, 1 to 8"):
        LatentUNetConfig.preset("compact", blocks=9)


@pytest.mark.parametrize(
    ("x_t", "y0", "tau"),
    [
        ((1, 2, 3, 4, 4), (1, 2, 3, 4, 5), (1,)),
        ((1, 3, 3, 4, 4), (1, 3, 3, 4, 4), (1,)),
        ((1, 2, 4, 4), (1, 2, 4, 4), (1,)),
        ((1, 2, 3, 4, 4), (1, 2, 3, 4, 4), (2,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x_t, y0, tau):
    with pytest.raises(ValueError, match="shapes do not fit"):
        untrained()(
            torch.zeros(x_t), torch.zeros(y0), torch.ones(tau), factor=torch.ones(1), rho=torch.ones(1)
        )
