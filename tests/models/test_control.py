"""The branch starts as if it weren't there, learns with the base, and stays out of guidance's null."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctsr.core.zgrid import ZGrid
from ctsr.errors import WeightsError
from ctsr.models import zoo
from ctsr.models.control import ControlledUNet, slice_maps
from ctsr.models.latent_unet import LatentUNetConfig
from tests.models.test_latent_unet import SMALL, inputs, trained, untrained

CARD = {"vae_sha256": "a" * 64, "stage_one_sha256": "b" * 64}


def maps(depth: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 2, depth, generator=torch.Generator().manual_seed(depth))


def with_silent_branch() -> ControlledUNet:
    """A trained base and branch, with zero convolutions that are still zero."""
    network = trained(make=ControlledUNet)
    with torch.no_grad():
        for p in network.branch.zero.parameters():
            p.zero_()
    return network


@settings(max_examples=10)
@given(size=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)), batch=st.integers(1, 2))
@torch.inference_mode()
def test_behind_zero_convolutions_the_branch_changes_no_bit(size, batch):
    network = with_silent_branch()
    args, told = inputs(size, batch=batch)
    alone = network.base(*args, **told)
    assert torch.equal(network(*args, **told, maps=maps(size[0], batch)), alone)
    assert alone.abs().max() > 1e-3


@torch.inference_mode()
def test_the_branch_starts_as_a_copy_that_does_not_see_the_condition():
    network = untrained(make=ControlledUNet)
    ours, theirs = network.branch.encoder.state_dict(), network.base.encoder.state_dict()
    assert ours.keys() == theirs.keys()
    stem = ours["stem.weight"]
    assert not stem[:, 4:].any()  # two maps and ρ
    for name in theirs:
        assert torch.equal(stem[:, :4] if name == "stem.weight" else ours[name], theirs[name])
        assert ours[name].data_ptr() != theirs[name].data_ptr()
    assert not any(p.any() for p in network.branch.zero.parameters())


def test_gradients_reach_the_zero_convolutions_first_and_the_copy_next():
    network = with_silent_branch()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    args, told = inputs((2, 4, 4))
    for step in range(2):
        optimiser.zero_grad()
        network(*args, **told, maps=maps(2)).square().mean().backward()
        assert all(p.grad.any() for p in network.branch.zero.parameters())
        assert all(p.grad.any() == (step == 1) for p in network.branch.encoder.parameters())
        optimiser.step()


def test_base_and_branch_train_together_from_their_start():
    network = untrained(make=ControlledUNet)
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    args, told = inputs((2, 4, 4), batch=2)
    for _ in range(8):  # behind the head, a block, its embedding: each wakes the next
        optimiser.zero_grad()
        (network(*args, **told, maps=maps(2, 2)) - 0.1 * args[1]).square().mean().backward()
        optimiser.step()
    assert [n for n, p in network.named_parameters() if torch.equal(p, before[n])] == []


@torch.inference_mode()
def test_null_is_the_base_alone_whatever_the_branch_would_say():
    network = trained(make=ControlledUNet)
    args, told = inputs((2, 4, 6), batch=3)
    null = torch.tensor([True, False, True])
    made = network(*args, **told, maps=maps(2, 3), null=null)
    alone = network.base(*args, **told, null=torch.ones(3, dtype=torch.bool))
    assert torch.equal(made[null], alone[null])
    assert torch.equal(made[1], network(*args, **told, maps=maps(2, 3))[1])
    assert not torch.allclose(made[1], alone[1], atol=1e-3)


@torch.inference_mode()
def test_the_branch_hears_maps_and_rho():
    network = trained(make=ControlledUNet)
    network.base.embed_conditions[0].weight[:, 1] = (
        0  # the base is deaf to ρ; what is left is the branch's map
    )
    args, told = inputs((3, 4, 4))
    told["maps"] = maps(3)
    before = network(*args, **told)
    for name, other in (("maps", -told["maps"]), ("rho", 2 * told["rho"])):
        assert (network(*args, **(told | {name: other})) - before).abs().max() > 1e-4


@settings(max_examples=15)
@given(data=st.data(), depth=st.integers(1, 30), height=st.integers(1, 40), width=st.integers(1, 40))
@torch.inference_mode()
def test_a_tile_with_a_halo_equals_the_whole(data, depth, height, width):
    network = trained(make=ControlledUNet)
    args, told = inputs((depth, height, width))
    told["maps"] = maps(depth)
    whole = network(*args, **told)
    read, keep = [], []
    for size, step, reach in zip(
        (depth, height, width),
        (1, network.base.stride, network.base.stride),
        (network.base.z_reach,) + 2 * (network.base.plane_reach,),
        strict=True,
    ):
        start = data.draw(st.integers(0, (size - 1) // step)) * step
        stop = min(size, start + data.draw(st.integers(1, 5)) * step)
        first, last = max(0, (start - reach) // step * step), min(size, -(-(stop + reach) // step) * step)
        read.append(slice(first, last))
        keep.append((slice(start, stop), slice(start - first, stop - first)))
    x_t, y0 = (t[:, :, read[0], read[1], read[2]] for t in args[:2])
    tile = network(x_t, y0, args[2], **(told | {"maps": told["maps"][:, :, read[0]]}))
    (z, inner_z), (y, inner_y), (x, inner_x) = keep
    torch.testing.assert_close(
        tile[:, :, inner_z, inner_y, inner_x], whole[:, :, z, y, x], atol=2e-5, rtol=2e-5
    )


def test_gradient_checkpointing_changes_neither_loss_nor_gradients():
    found = []
    for is_thrifty in (False, True):
        network = trained(make=ControlledUNet).train()
        network.base.gradient_checkpointing = is_thrifty
        args, told = inputs((3, 6, 5), batch=2)
        loss = network(*args, **told, maps=maps(3, 2), null=torch.tensor([False, True])).square().mean()
        loss.backward()
        found.append((loss.detach(), [p.grad for p in network.parameters()]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_maps_of_another_depth_are_refused():
    args, told = inputs((3, 4, 4))
    with pytest.raises(ValueError, match=r"maps \(1, 2, 4\), expected \(1, 2, 3\)"):
        untrained(make=ControlledUNet)(*args, **told, maps=maps(4))


def test_maps_show_where_slices_were_measured():
    cosine, sine = slice_maps(ZGrid(3, 5.0), 1).numpy()
    assert cosine.shape == (15,)
    np.testing.assert_allclose(cosine[[2, 7, 12]], 1, atol=1e-6)  # the middle one of each five
    np.testing.assert_allclose(sine[[2, 7, 12]], 0, atol=1e-6)
    assert cosine[2:5].argmin() == 2
    assert sine[3] > 0 > sine[1]
    cosine, sine = slice_maps(ZGrid(4, 2.0), 2).numpy()  # a latent voxel for each measured slice
    np.testing.assert_allclose([cosine, sine], [[1] * 4, [0] * 4], atol=1e-6)


@given(n=st.integers(1, 20), factor=st.floats(1.1, 20), z_stride=st.sampled_from([1, 2]))
def test_maps_turn_with_the_patient(n, factor, z_stride):
    grid = ZGrid(n, factor)
    cosine, sine = slice_maps(grid, z_stride).numpy()
    assert len(cosine) == -(-grid.m // z_stride)
    np.testing.assert_allclose(cosine**2 + sine**2, 1, atol=1e-6)
    if grid.m % z_stride == 0:  # else the last latent voxel reaches beyond the volume
        np.testing.assert_allclose(cosine[::-1], cosine, atol=1e-5)
        np.testing.assert_allclose(sine[::-1], -sine, atol=1e-5)


def packed(card: dict = CARD, config: dict | None = None, make: type = ControlledUNet) -> bytes:
    tensors = untrained(make=make).state_dict()
    data = zoo.pack("diffusion", SMALL.to_dict() | (config or {}), tensors, card=CARD)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["card"] = json.dumps(card)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def test_a_diffusion_file_comes_back_as_it_was():
    network = trained(make=ControlledUNet)
    data = zoo.pack("diffusion", network.config.to_dict(), network.state_dict(), card=CARD)
    found = zoo.build(zoo.unpack(data, "x"), "x")
    assert found.config == network.config
    args, told = inputs((2, 4, 4))
    with torch.inference_mode():
        assert torch.equal(found(*args, **told, maps=maps(2)), network(*args, **told, maps=maps(2)))


@pytest.mark.parametrize(
    ("card", "config", "words"),
    [
        ({}, {}, "its card names no vae_sha256"),
        ({"vae_sha256": "a" * 64}, {}, "its card names no stage_one_sha256"),
        (CARD | {"vae_sha256": "best.safetensors"}, {}, "its card names no vae_sha256"),
        (CARD, {"model_channels": 8}, r"\d+ tensors do not fit"),
        (CARD, {"blocks": 2}, r"\d+ tensors do not fit"),
        (CARD, {"blocks": 4000}, "4000 blocks a level"),
        (CARD, {"model_channels": 4000, "multipliers": [4000] * 8}, "tensors do not fit|no network"),
        (CARD, {"multipliers": [1.5, 2]}, "no network"),
        (CARD, {"kappa": -1.0}, "outside 0"),
        (CARD, {"attention": 1}, "makes no network.*attention"),
    ],
)
def test_a_diffusion_file_that_does_not_fit_is_refused(card, config, words):
    with pytest.raises(WeightsError, match=words):
        zoo.build(zoo.unpack(packed(card, config), "x"), "x")


def test_a_diffusion_is_not_packed_without_the_files_it_needs():
    with pytest.raises(ValueError, match="names no stage_one_sha256"):
        zoo.pack("diffusion", {}, {}, card={"vae_sha256": "a" * 64})


def test_the_config_survives_json():
    config = LatentUNetConfig.preset("full")
    values = json.loads(json.dumps(config.to_dict()))
    assert (
        LatentUNetConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}) == config
    )
