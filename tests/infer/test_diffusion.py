"""Tiles, slabs, batches and seeds: a sample is one of the whole volume, however it passes through memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ctsr.core.zgrid import ZGrid
from ctsr.diffusion.schedule import Schedule
from ctsr.errors import ResourceError, UsageError, WeightsError
from ctsr.infer.diffusion import Cut, Diffuser, schedule_of
from ctsr.infer.plan import make_plan
from ctsr.infer.sampling import SAMPLERS, Sampling
from ctsr.infer.vae_tiles import tile_within
from ctsr.physics.operator import apply_along_z
from tests.infer.tiny import diffuser, pipeline, thick

SIZE = (30, 72, 60)  # of which the latents are 15 × 18 × 15, more than the networks reach
GRID = ZGrid(12, 2.5)  # thick slices that do not lie on latent voxels
SAME = 0.05  # HU, before rounding


def image(size=SIZE):
    rng = np.random.default_rng(0)
    return rng.normal(0, 200, size).astype(np.float32)


def drawn(d: Diffuser, slabs=((0, 30),), **told):
    hu = image()
    return d.draw(lambda a, b: hu[a:b], slabs, SIZE, **({"grid": GRID, "rho": 1.0} | told))


def changes(d: Diffuser, **told) -> np.ndarray:
    return np.stack(list(drawn(d, **told)(0, SIZE[0])))


def test_an_untrained_network_changes_nothing():
    assert not changes(diffuser(is_trained=False)).any()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_gives_the_same_samples_and_another_others(sampler):
    one = changes(diffuser(sampler=sampler))
    np.testing.assert_array_equal(changes(diffuser(sampler=sampler)), one)
    assert np.abs(one[0] - one[1]).max() > 1
    assert np.abs(changes(diffuser(sampler=sampler, seed=1)) - one).max() > 1


def test_noise_has_the_size_that_the_network_knows_channel_by_channel():
    d, seen = diffuser(num_steps=1, samples=1), []
    d.network.base.config = replace(d.network.config, residual_std=(1e-9,) + (0.3,) * 7)

    def spied(x_t, y0, *args, **told):
        seen.append(x_t - y0)
        return torch.zeros_like(y0)

    d.network.forward = spied
    drawn(d)
    spread = seen[0].std(dim=(0, 2, 3, 4))
    assert spread[0] < 1e-6
    np.testing.assert_allclose(spread[1:], 0.3 * 0.99 * d.network.config.kappa, rtol=0.1)


def test_more_samples_leave_the_first_ones_as_they_were():
    np.testing.assert_array_equal(changes(diffuser(samples=3))[:2], changes(diffuser(samples=2)))


@pytest.mark.parametrize("name", ["encode", "denoise", "decode"])
@pytest.mark.parametrize("tile", [(4, 18, 15), (15, 4, 6), (7, 10, 4)])
def test_tiles_equal_the_whole(name, tile):
    whole, cut = diffuser(), diffuser()
    cut.cuts[name] = Cut(tile)
    np.testing.assert_allclose(changes(cut), changes(whole), atol=SAME)


def test_a_halo_below_the_reach_is_near_the_whole_and_leaves_no_hole():
    whole, cut, least = changes(diffuser()), diffuser(), diffuser()
    cut.cuts["denoise"], least.cuts["denoise"] = Cut((7, 8, 8), 4), Cut((7, 8, 8), 0)
    far = [np.abs(changes(d) - whole).mean() for d in (cut, least)]
    assert 0 < far[0] < far[1] < whole.std()


def test_slabs_equal_the_whole():
    d = diffuser()
    whole, parts = drawn(d), drawn(d, slabs=((0, 7), (7, 19), (19, 30)))
    np.testing.assert_allclose(list(parts(0, 30)), list(whole(0, 30)), atol=SAME)
    in_slabs = [np.stack(list(whole(a, b))) for a, b in ((0, 5), (5, 6), (6, 21), (21, 30))]
    np.testing.assert_allclose(np.concatenate(in_slabs, axis=1), changes(d), atol=SAME)


def test_guidance_moves_the_samples():
    assert np.abs(changes(diffuser(guidance_scale=2.0)) - changes(diffuser())).max() > 1


def test_progress_rises_to_one_over_steps_and_tiles():
    d, told = diffuser(samples=2), []
    d.cuts["denoise"] = Cut((8, 18, 15))
    drawn(d, progress=told.append)
    assert len(told) == 2 * d.sampling.num_steps * 2
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)


def spoil(d: Diffuser, calls: int, *, with_error: bool = False) -> None:
    """The first so many calls of the U-Net give a NaN, or need more memory than there is."""
    forward, count = d.network.forward, iter(range(1000))

    def spoiled(*args, **told):
        made = forward(*args, **told)
        if next(count) >= calls:
            return made
        if with_error:
            raise torch.OutOfMemoryError("full")
        made[..., -1] = torch.nan
        return made

    d.network.forward = spoiled


def test_what_is_not_finite_is_repeated_in_fp32_once_and_said():
    d = diffuser(dtype=torch.bfloat16)
    expected = changes(d)
    assert not d.remarks
    spoil(d, 1)
    repeated = changes(d)
    assert d.remarks == ["denoise: not finite in bfloat16"]
    assert np.abs(repeated - expected).mean() < 0.2 * expected.std()


@pytest.mark.parametrize(("dtype", "calls"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_what_stays_not_finite_is_refused(dtype, calls):
    d = diffuser(dtype=dtype)
    spoil(d, calls)
    with pytest.raises(WeightsError, match=r"not finite \(denoise\)"):
        changes(d)


def test_where_the_gpu_is_full_smaller_tiles_give_the_same_and_are_said():
    d = diffuser()
    spoil(d, 1, with_error=True)
    np.testing.assert_allclose(changes(d), changes(diffuser()), atol=SAME)
    assert len(d.remarks) == 1
    assert "tiles of 7 × 9 × 7" in d.remarks[0]


def test_where_smaller_tiles_do_not_help_it_is_refused():
    d = diffuser()
    spoil(d, 2, with_error=True)
    with pytest.raises(ResourceError, match="GPU's memory is full"):
        changes(d)


@pytest.mark.parametrize("reach", [(6, 8, 8), (0, 0, 0), (6, 1 << 20, 1 << 20)])
def test_a_tile_reads_no_more_than_it_may_or_is_the_smallest(reach):
    size = (64, 128, 128)
    least = None
    for voxels in (1e9, 4e5, 1e5, 1e4, 1):
        _, read, seen = tile_within(size, reach, voxels)
        assert seen >= 1
        assert read <= voxels or read == tile_within(size, reach, 0)[1]
        assert least is None or read <= least
        least = read


@pytest.mark.parametrize("method", ["mean", "sample"])
@pytest.mark.parametrize("factor", [2.0, 3.0, 2.5])
def test_the_measured_slices_are_reproduced_and_slabs_equal_the_whole(method, factor):
    y = thick(10, (24, 20)).clip(-1024, 1000)
    results = []
    for slabs in ([(0, 30)], [(0, 11), (11, 30)]):
        p = pipeline("diffusion", (24, 20), n=10, factor=factor, diffuser=diffuser(estimate=method))
        parts = [(a, min(b, p.m)) for a, b in slabs]
        p.draw(y, parts)
        made = [p.sampled(y, a, b) for a, b in parts]
        results.append([np.concatenate(part) for part in zip(*made, strict=True)])
    (image, spread), (image_in_slabs, spread_in_slabs) = results
    np.testing.assert_allclose(apply_along_z(p.A, image), y, atol=0.25)
    np.testing.assert_allclose(image_in_slabs, image, atol=SAME)
    np.testing.assert_allclose(spread_in_slabs, spread, atol=SAME)
    assert spread.mean() > 1
    assert np.abs(image - p.rows(y, 0, p.m)).mean() > 1


def test_mean_gain_and_spread_are_those_of_the_samples():
    y = thick(10, (24, 20)).clip(-1024, 1000)
    d = diffuser(samples=4)
    d.detail_gain, d.spread_factor = 0.5, 1.5
    p = pipeline("diffusion", (24, 20), n=10, diffuser=d, is_consistent=False)
    p.draw(y, [(0, p.m)])
    image, spread = p.sampled(y, 0, p.m)
    one_by_one = np.stack(list(p._drawn(0, p.m)))
    np.testing.assert_allclose(image - p.rows(y, 0, p.m), 0.5 * one_by_one.mean(axis=0), atol=1e-2)
    np.testing.assert_allclose(spread, 1.5 * one_by_one.std(axis=0, ddof=1), rtol=1e-3, atol=1e-3)


def test_a_single_sample_has_no_spread():
    y = thick(6, (8, 8))
    p = pipeline("diffusion", (8, 8), n=6, diffuser=diffuser(samples=1))
    p.draw(y, [(0, p.m)])
    assert p.sampled(y, 0, p.m)[1] is None


def plan(limit, **told):
    p = pipeline("diffusion", (256, 256), n=100, diffuser=diffuser(**told))
    asked = {
        "input_bytes": 1000,
        "is_padded": False,
        "itemsize": 2,
        "is_streamed": True,
        "keeps_added": False,
    }
    return p, make_plan(p, limit=limit, **asked)


def test_the_plan_holds_its_limit_with_slabs_and_tiles():
    p, whole = plan(1e12)
    assert len(whole.slabs) == 1
    assert all(cut.tile[0] >= 100 and cut.halo is None for cut in whole.cuts.values())
    base = 430e6 + p.matrix_bytes
    for share in (0.8, 0.4, 0.2):
        limit = base + share * (whole.peak_bytes - base)
        _, less = plan(limit)
        assert less.peak_bytes <= limit
        assert len(less.slabs) > 1 or less.cuts != whole.cuts
    with pytest.raises(ResourceError, match=r"needs 0\.\d+ GB at least"):
        plan(base)


def test_every_sample_is_planned():
    p, few = plan(1e12, samples=2)
    _, many = plan(1e12, samples=52)
    latent = p.diffuser.latent_bytes((200, 256, 256))
    assert many.peak_bytes - few.peak_bytes == pytest.approx(50 * latent)
    assert many.work > few.work


def test_settings_that_mean_nothing_are_refused():
    for told in (
        {"sampler": "euler"}, {"estimate": "median"}, {"num_steps": 0}, {"samples": 0},
        {"guidance_scale": float("nan")}, {"guidance_scale": -1.0},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            Sampling(**told)


def test_gain_and_spread_belong_to_the_settings_that_were_validated():
    card = {
        "sampling": {"sampler": "multistep", "num_steps": 15, "samples": 4},
        "metrics": {"detail_gain_1": 0.4, "detail_gain_4": 0.7, "spread_factor_4": 1.2},
    }
    asked = Sampling(samples=4)
    assert asked.calibration(card) == (0.7, 1.2)
    assert replace(asked, samples=1).calibration(card) == (0.4, 1.0)
    for other in ({"samples": 3}, {"num_steps": 4}, {"sampler": "ddim"}, {"guidance_scale": 2.0}):
        assert replace(asked, **other).calibration(card) is None
    assert asked.calibration({}) is None


def test_a_card_without_its_schedule_is_refused():
    told = {"sqrt_eta_1": 0.02, "sqrt_eta_T": 0.99, "power": 0.5, "kappa": 2.0}
    assert schedule_of({"schedule": told}, 2.0) == Schedule(**told)
    for card in ({}, {"schedule": told | {"power": -1}}, {"schedule": {"kappa": 2.0}}, {"schedule": [1]}):
        with pytest.raises(WeightsError):
            schedule_of(card, 2.0)
    with pytest.raises(WeightsError, match="κ"):
        schedule_of({"schedule": told}, 1.0)
