"""The autoencoder in tiles gives what it gives in one piece."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctsr.infer.vae_tiles import decode_tiled, encode_tiled, latent_size
from ctsr.infer.windows import tiles
from ctsr.models.vae import CtVae, VaeConfig
from tests.models.test_vae import BY_SLICE, FLAT, SMALL, trained

LATENT_TOLERANCE = 1e-5  # standardised; float32 sums in another order
HU_TOLERANCE = 0.01  # HU; the same
MODELS = {"strides 2 4 4": SMALL, "strides 1 4 4": FLAT, "by slice": BY_SLICE}
SIZES = st.tuples(st.integers(1, 30), st.integers(1, 60), st.integers(1, 60))
TILES = st.tuples(*[st.integers(1, 20)] * 3)


@pytest.fixture(scope="module", params=MODELS)
def vae(request) -> CtVae:
    return trained(MODELS[request.param])


def scan(size: tuple[int, int, int]) -> np.ndarray:
    """(D, H, W) int16, HU: halves of air and tissue, noise."""
    rng = np.random.default_rng(sum(size))
    hu = rng.normal(0, 50, size)
    hu[:, : size[1] // 2] -= 1000
    return hu.astype(np.int16)


def whole(vae: CtVae, hu: np.ndarray) -> torch.Tensor:
    """The network's own answer for all of the volume."""
    x = torch.from_numpy(hu.astype(np.float32))[None, None] / vae.config.hu_scale
    return vae.standardise(vae.encode(x)[0])[0]


def in_one_piece(vae: CtVae, z: torch.Tensor, size: tuple[int, int, int]) -> np.ndarray:
    x = vae.decode(vae.unstandardise(z[None]))[0, 0] * vae.config.hu_scale
    return x[: size[0], : size[1], : size[2]].numpy()


@settings(max_examples=15, deadline=None)
@given(size=SIZES, tile=TILES)
@torch.inference_mode()
def test_tiles_make_up_the_whole(vae, size, tile):
    hu = scan(size)
    z = encode_tiled(vae, hu, tile=tile)
    assert z.shape == (vae.latent_channels, *latent_size(vae, size))
    torch.testing.assert_close(z, whole(vae, hu), atol=LATENT_TOLERANCE, rtol=0)
    found = decode_tiled(vae, z, size, tile=tile)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, in_one_piece(vae, z, size), atol=HU_TOLERANCE)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@torch.inference_mode()
def test_with_less_than_the_reach_they_would_not(monkeypatch, part):
    """So that the test above sees the halo: one latent voxel less along one axis, and a difference appears."""
    model = trained(SMALL)
    hu = scan((40, 24, 24))
    z = whole(model, hu)
    side = getattr(model, part)
    monkeypatch.setattr(type(side), "reach", (side.reach[0] - 1, *side.reach[1:]))
    if part == "encoder":
        error = (encode_tiled(model, hu, tile=(4, 6, 6)) - z).abs().max() / LATENT_TOLERANCE
    else:
        found = decode_tiled(model, z, hu.shape, tile=(4, 6, 6))
        error = np.abs(found - in_one_piece(model, z, hu.shape)).max() / HU_TOLERANCE
    assert error > 1


@given(size=SIZES, tile=TILES, reach=st.tuples(*[st.integers(0, 9)] * 3))
def test_every_voxel_is_kept_once_and_read_with_all_that_it_depends_on(size, tile, reach):
    kept = np.zeros(size, int)
    for read, keep in tiles(size, tile, reach):
        kept[keep] += 1
        for r, k, n, most, halo in zip(read, keep, size, tile, reach, strict=True):
            assert r.start == max(0, k.start - halo)
            assert r.stop == min(n, k.stop + halo)
            assert 0 < k.stop - k.start <= (most if halo < n else n)
    assert (kept == 1).all()


def test_a_network_that_sees_whole_slices_is_cut_along_z_alone():
    found = list(tiles((40, 90, 90), (3, 10, 10), trained(BY_SLICE).encoder.reach))
    assert len(found) == math.ceil(40 / 3)
    assert all(read[1:] == (slice(0, 90), slice(0, 90)) for read, _ in found)


@torch.inference_mode()
def test_progress_adds_up(vae):
    size = (9, 30, 41)
    hu = scan(size)
    shares: list[float] = []
    z = encode_tiled(vae, hu, tile=(2, 4, 5), progress=shares.append)
    assert sum(shares) == pytest.approx(1)
    shares.clear()
    decode_tiled(vae, z, size, tile=(2, 4, 5), progress=shares.append)
    assert sum(shares) == pytest.approx(1)


@torch.inference_mode()
def test_bfloat16_inside_stays_near(vae):
    hu = scan((8, 24, 24))
    z = encode_tiled(vae, hu)
    near = encode_tiled(vae, hu, dtype=torch.bfloat16)
    assert near.dtype == torch.float32
    assert 0 < (near - z).abs().max() < 0.1 * z.abs().max()


def test_a_large_network_is_cut_into_smaller_tiles(monkeypatch):
    """As trainings and encode-latents, that plan no memory, run it: `full` would hold 14 GB, a small GPU has 11."""
    vae = CtVae(VaeConfig(channels=(128, 1), blocks=2))
    seen: list[int] = []

    def encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(x.numel())
        z = torch.zeros((1, 8, *latent_size(vae, x.shape[2:])))
        return z, z

    def decode(z: torch.Tensor) -> torch.Tensor:
        seen.append(z[0, 0].numel() * math.prod(vae.strides))
        return torch.zeros((1, 1, *(n * s for n, s in zip(z.shape[2:], vae.strides, strict=True))))

    monkeypatch.setattr(vae, "encode", encode)
    monkeypatch.setattr(vae, "decode", decode)
    hu = np.zeros((64, 512, 512), np.int16)
    decode_tiled(vae, encode_tiled(vae, hu), hu.shape)
    held = 4 * 128 / vae.config.unshuffle**2 * 8.5  # bytes a voxel
    assert max(seen) * held < 4e9


def test_a_latent_of_another_volume_is_refused():
    model = trained(SMALL)
    with pytest.raises(ValueError, match=r"\(2, 3, 3\)"):
        decode_tiled(model, torch.zeros(8, 2, 3, 4), (4, 12, 12))
