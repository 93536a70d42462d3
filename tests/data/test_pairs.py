"""A pair is a function of (seed, index), and what a scanner would have stored."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ctsr.data.pairs import Pair, PairRecipe, PairSource, TrainVolume
from ctsr.physics.projection import projection_matrix
from tests.train import tiny

RECIPE = PairRecipe(patch=(12, 16, 16))
SCANS_ALONE = {"uniform_share": 0.0, "spheres_share": 0.0}


def source(*volumes: TrainVolume, seed: int = 0, **recipe: object) -> PairSource:
    scans = volumes or (tiny.volume(1), tiny.volume(2, spacing=3.0))
    return PairSource(scans, replace(RECIPE, **recipe), seed=seed)  # type: ignore[arg-type]


def same(a: Pair, b: Pair) -> bool:
    arrays = ("truth", "thick", "inverse", "null")
    return (a.rho, a.input_spacing) == (b.rho, b.input_spacing) and all(
        np.array_equal(getattr(a, n), getattr(b, n)) for n in arrays
    )


def test_a_pair_depends_on_seed_and_index_alone():
    pairs = source()
    first = [pairs.pair(i) for i in range(12)]
    again = source()
    for i in reversed(range(12)):
        assert same(first[i], again.pair(i))
    np.random.seed(1)  # noqa: NPY002  the global generator has no say
    with ThreadPool(3) as pool:
        assert all(same(a, b) for a, b in zip(first, pool.map(source().pair, range(12)), strict=True))
    assert not any(same(a, source(seed=1).pair(i)) for i, a in enumerate(first))
    assert not same(first[0], first[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_processes_make_the_same_pairs(workers):
    task = tiny.task()
    loader = DataLoader(task.dataset, batch_sampler=[[0, 3], [5, 1]], num_workers=workers)
    for batch, indices in zip(loader, ([0, 3], [5, 1]), strict=True):
        for k, i in enumerate(indices):
            pair = task.source.pair(i)
            np.testing.assert_array_equal(batch["truth"][k, 0], pair.truth)
            np.testing.assert_array_equal(batch["thick"][k, 0], pair.thick)
            np.testing.assert_array_equal(batch["inverse"][k, 0], pair.inverse)


def test_the_spacing_told_in_advance_is_that_of_the_pair():
    pairs = source()
    for i in range(20):
        assert pairs.input_spacing(i) == pairs.pair(i).input_spacing


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(2, 20), st.integers(10, 30), st.integers(10, 30)),
    spacing=st.floats(0.4, 6),
    pixel=st.floats(0.4, 1.2),
    depth=st.sampled_from([12, 40]),
    index=st.integers(0, 10_000),
    along_z=st.booleans(),
)
def test_every_scan_gives_whole_patches(shape, spacing, pixel, depth, index, along_z):
    """Ten slices, a plane smaller than the patch, any spacing (12 · 0.7 / 0.7 is not 12)."""
    hu = np.random.default_rng(index).integers(-1024, 3072, shape).astype(np.int16)
    scan = TrainVolume("x", hu, (spacing, pixel, pixel), spacing, along_z)
    pair = source(scan, patch=(depth, 16, 16), **SCANS_ALONE).pair(index)
    assert pair.truth.shape == pair.inverse.shape == (depth, 16, 16)
    assert pair.thick.shape == (depth // 2, 16, 16)
    assert pair.null.shape == (depth, depth)
    for array in (pair.truth, pair.thick, pair.inverse, pair.null):
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
    assert 0.75 <= pair.rho <= 2.1
    assert pair.input_spacing >= 2 * min(spacing, pixel)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_axis_can_play_z(axis):
    """The ramp along that axis is what comes out along the first."""
    hu = np.moveaxis(np.broadcast_to(np.arange(24.0)[:, None, None], (24, 24, 24)), 0, axis).astype(
        np.float32
    )
    scan = TrainVolume("x", np.ascontiguousarray(hu), (1.0, 0.8, 0.7), 1.0, True)
    pairs = source(scan, native_share=1.0)
    truth, spacing = pairs._cut(np.random.default_rng(0), scan, axis)
    assert spacing == (1.0, 0.8, 0.7)[axis]
    np.testing.assert_array_equal(np.diff(truth, axis=0), 1)
    assert np.ptp(truth, axis=(1, 2)).max() == 0


def test_the_thick_patch_is_the_truth_through_the_operator():
    """Where λ = 0, null = I − P A is a projector, and truth and `inverse` thicken to the same."""
    for i in range(20):
        pair = source().pair(i)
        if pair.rho > 1.4:  # λ > 0: P A is no projection there
            continue
        null = pair.null.astype(np.float64)
        np.testing.assert_allclose(null @ null, null, atol=1e-5)
        left = np.tensordot(null, pair.truth - pair.inverse, 1)
        # so their difference lies in the null space of A, and null leaves it as it is
        np.testing.assert_allclose(left, pair.truth - pair.inverse, atol=0.02)  # HU


def test_a_gaussian_pair_has_the_second_moment_of_its_width():
    pair = source(**SCANS_ALONE, other_profile_share=0.0, noise_share=0.0).pair(4)
    n = len(pair.thick)
    # A, fitted from many columns: thick = A truth
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(2 * n, 400)).reshape(2 * n, 20, 20).astype(np.float32)
    made = source(other_profile_share=0.0)._degrade(np.random.default_rng(7), columns, 1.0)
    A = np.linalg.lstsq(columns.reshape(2 * n, -1).T, made.thick.reshape(n, -1).T, rcond=None)[0].T
    np.testing.assert_allclose(A.sum(axis=1), 1, atol=1e-4)
    centres = np.arange(2 * n) + 0.5
    row = A[n // 2]
    variance = row @ (centres - row @ centres) ** 2  # thin spacings²
    t = 2 * made.rho
    assert variance == pytest.approx((t**2 - made.rho**2) / (8 * np.log(2)), rel=0.02)
    P = projection_matrix(A)
    np.testing.assert_allclose(made.null, np.eye(2 * n) - P @ A, atol=1e-3)


def test_inputs_from_one_to_six_and_a_half_mm_are_trained_for():
    thin = TrainVolume("a", np.zeros((160, 160, 160), np.int16), (0.6, 0.5, 0.5), 0.6, True)
    spacings = np.array([source(thin).input_spacing(i) for i in range(400)])
    assert spacings.min() >= 1.0
    assert spacings.max() <= 6.5
    shares = np.histogram(spacings, bins=[1, 2, 3, 4, 5, 6.5])[0] / len(spacings)
    assert shares.min() > 0.05, shares


def test_what_is_nowhere_is_not_invented():
    pairs = source(uniform_share=1.0)
    pair = pairs.pair(0)
    assert np.ptp(pair.truth) == 0
    np.testing.assert_allclose(pair.inverse, pair.truth, rtol=1e-5)


def test_spheres_lie_in_what_is_one_value_elsewhere():
    """Without noise most voxels are the background, and some are not; none is below what a scan can hold."""
    pairs = source(
        spheres_share=1.0, uniform_share=0.0, noise_share=0.0, scale=0.0, offset=0.0, patch=(40, 96, 96)
    )
    for i in range(12):
        truth = pairs.pair(i).truth
        values, counts = np.unique(truth, return_counts=True)
        assert counts.max() > 0.1 * truth.size
        assert len(values) > 20
        assert -1024 <= values.min() < values.max() <= 1400


def test_noise_is_in_the_measurement_too():
    """It is added before A: the thick patch is the thickened noisy truth."""
    flat = TrainVolume("x", np.full((24, 24, 24), 40, np.int16), (1.0, 0.8, 0.8), 1.0, True)
    pair = source(flat, noise_share=1.0, **SCANS_ALONE).pair(0)
    assert pair.truth.std() > 1
    left = np.tensordot(pair.null.astype(np.float64), pair.truth - pair.inverse, 1)
    if pair.rho <= 1.4:
        np.testing.assert_allclose(left, pair.truth - pair.inverse, atol=0.02)


def test_an_odd_patch_is_refused():
    with pytest.raises(ValueError, match="even number"):
        source(patch=(13, 16, 16))


@pytest.mark.ci
def test_another_process_makes_the_same_pair():
    code = (
        "import hashlib\nfrom tests.data.test_pairs import source\n"
        "print(hashlib.sha256(source().pair(5).inverse.tobytes()).hexdigest())"
    )
    here = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    import hashlib

    assert here.stdout.strip() == hashlib.sha256(source().pair(5).inverse.tobytes()).hexdigest()
