"""SimpleUNet3D is `inverse` before it has learnt anything, and the same whole, in chunks or thrifty."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctsr.models.simple_unet3d import SimpleUNet3D, SimpleUNet3DConfig

SMALL = SimpleUNet3DConfig(channels=(8, 8))
AGREES = 0.05  # HU, of residuals of some hundred


def network(config: SimpleUNet3DConfig = SMALL, *, gain: float = 30_000.0) -> SimpleUNet3D:
    """One whose residuals are some hundred HU, as after a training; an untrained one's are tiny."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SimpleUNet3D(config)
    with torch.no_grad():
        model.head.weight.mul_(gain)
    return model.eval()


def inputs(depth: int, height: int = 12, width: int = 8, batch: int = 1):
    generator = torch.Generator().manual_seed(depth)
    y = torch.randn(batch, 1, depth, height, width, generator=generator) * 300
    inverse = y.repeat_interleave(2, dim=2) + 50 * torch.randn(
        batch, 1, 2 * depth, height, width, generator=generator
    )
    return y, inverse, torch.linspace(0.8, 1.6, batch)


def test_the_default_network_has_382_thousand_parameters():
    model = SimpleUNet3D()
    assert sum(p.numel() for p in model.parameters()) == 371_416
    assert (model.stride, model.z_reach) == (8, 9)


@torch.inference_mode()
def test_an_untrained_network_is_inverse():
    y, inverse, rho = inputs(3, 32, 32)
    y -= 500  # lung and air, where what enters is largest
    residual = network(SimpleUNet3DConfig(), gain=1.0)(y, inverse - 500, rho)
    assert residual.abs().max() < 5  # HU
    assert residual.std() < 1


def streamed(model: SimpleUNet3D, y: torch.Tensor, inverse: torch.Tensor, chunk: int) -> torch.Tensor:
    pieces = list(model.stream(y[0, 0].numpy(), inverse[0, 0].numpy(), 0.8, chunk=chunk))
    return torch.from_numpy(np.concatenate(pieces))[None, None]


@settings(max_examples=12)
@given(depth=st.integers(1, 30), chunk=st.integers(1, 40))
@torch.inference_mode()
def test_a_stream_in_chunks_of_any_size_is_the_whole(depth, chunk):
    model = network()
    assert model.z_reach == 6
    y, inverse, rho = inputs(depth)
    whole = model(y, inverse, rho)
    assert whole.abs().max() > 100
    torch.testing.assert_close(streamed(model, y, inverse, chunk), whole, atol=AGREES, rtol=0)


@torch.inference_mode()
def test_the_default_network_streams_like_the_whole():
    model = network(SimpleUNet3DConfig(), gain=1_000.0)
    y, inverse, rho = inputs(30, 32, 20)
    whole = model(y, inverse, rho)
    assert whole.abs().max() > 100
    torch.testing.assert_close(streamed(model, y, inverse, 13), whole, atol=AGREES, rtol=0)


@pytest.mark.parametrize("config", [SMALL, SimpleUNet3DConfig()], ids=["small", "default"])
@torch.inference_mode()
def test_nothing_beyond_the_reach_changes_a_result_and_something_at_it_does(config):
    model = network(config)
    reach = model.z_reach
    y, inverse, rho = inputs(2 * reach + 3, 16, 16)
    before = model(y, inverse, rho)
    other_y, other_inverse = y.clone(), inverse.clone()
    other_y[:, :, 0] += 1000
    other_inverse[:, :, :2] -= 1000
    change = (model(other_y, other_inverse, rho) - before).abs().amax(dim=(0, 1, 3, 4))
    assert change[2 * (reach + 1) :].max() == 0
    assert change[2 * reach] > 0


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 7), (12, 5), (16, 16), (17, 31)])
@torch.inference_mode()
def test_any_size_in_plane_works(height, width):
    model = network(SimpleUNet3DConfig(), gain=1_000.0)
    y, inverse, rho = inputs(2, height, width)
    assert model(y, inverse, rho).shape == (1, 1, 4, height, width)
    assert torch.isfinite(model(y, inverse, rho)).all()


@torch.inference_mode()
def test_padding_to_the_stride_repeats_the_edge():
    model = network()
    y, inverse, rho = inputs(3, 6, 7)
    wide = [torch.nn.functional.pad(t, (0, 1, 0, 2, 0, 0), mode="replicate") for t in (y, inverse)]
    torch.testing.assert_close(model(y, inverse, rho), model(*wide, rho)[..., :6, :7], atol=AGREES, rtol=0)


@torch.inference_mode()
def test_each_case_of_a_batch_is_its_own():
    model = network()
    y, inverse, rho = inputs(4, batch=2)
    both = model(y, inverse, rho)
    for i in range(2):
        alone = model(y[i : i + 1], inverse[i : i + 1], rho[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone, atol=AGREES, rtol=0)
    assert not torch.allclose(both, model(y, inverse, rho.flip(0)), atol=AGREES)  # it hears ρ


def test_gradient_checkpointing_changes_neither_loss_nor_gradients():
    found = []
    for is_thrifty in (False, True):
        model = network().train()
        model.gradient_checkpointing = is_thrifty
        loss = model(*inputs(4, batch=2)).square().mean()
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters()]))
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a, b)
        assert a.abs().max() > 0


@pytest.mark.parametrize(
    ("y", "inverse", "rho"),
    [
        ((1, 2, 3, 4, 4), (1, 1, 6, 4, 4), (1,)),
        ((1, 1, 3, 4, 4), (1, 1, 5, 4, 4), (1,)),
        ((1, 1, 3, 4, 4), (1, 1, 6, 4, 5), (1,)),
        ((1, 1, 3, 4, 4), (1, 1, 6, 4, 4), (2,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(y, inverse, rho):
    with pytest.raises(ValueError, match="shapes do not fit"):
        network()(torch.zeros(y), torch.zeros(inverse), torch.ones(rho))
