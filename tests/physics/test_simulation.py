"""Thickening a volume: the mirror of upsampling."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ctsr.core.geometry import canonical_turn, slice_axis
from ctsr.core.volume import Volume
from ctsr.core.zgrid import ZGrid, shifted_affine
from ctsr.errors import GeometryError, UsageError
from ctsr.physics.operator import grid_operator
from ctsr.physics.profile import SliceProfile
from ctsr.physics.simulation import simulate_volume, thicken
from tests.core.test_geometry import AXIS_TURNS, stored_otherwise
from tests.physics.stacks import FACTORS, KINDS, RATIOS, columns
from tests.strategies import volumes

SEEDS = st.integers(0, 2**31)


def stack(n: int, seed: int) -> np.ndarray:
    return columns(n, seed, 6).reshape(n, 2, 3).astype(np.float32)


def axial(data: np.ndarray, spacing: float = 1.0) -> Volume:
    """(D, H, W) in a file whose slices run along k, from foot to head."""
    return Volume(data.transpose(2, 1, 0), np.diag([0.7, 0.7, spacing, 1.0]), slice_axis=2)


@given(st.integers(6, 40), FACTORS, KINDS, RATIOS, SEEDS)
def test_a_thick_stack_is_a_times_the_thin_slices_it_covers(m, factor, kind, ratio, seed):
    hu = stack(m, seed)
    thick, used = thicken(
        hu, factor=factor, spacing=3.0, thickness=3 * ratio, profile=SliceProfile(kind), seed=seed
    )
    grid = ZGrid(len(thick), factor)
    assert used == grid.m <= m
    A = grid_operator(grid, SliceProfile(kind), spacing=3.0, thickness=3 * ratio)
    expected = np.tensordot(A, hu[:used].astype(float), 1)
    np.testing.assert_allclose(thick, expected, atol=1e-2)  # HU; float32
    assert thick.dtype == np.float32


def test_the_last_thin_slices_take_no_part():
    hu = np.zeros((7, 1, 1), np.float32)
    hu[6] = 3000
    thick, used = thicken(hu, factor=3.0, spacing=3.0, thickness=6.0, profile=SliceProfile())
    assert (len(thick), used) == (2, 6)
    assert not thick.any()


def test_a_gap_leaves_out_what_lies_between_the_slices():
    hu = np.zeros((20, 1, 1), np.float32)
    hu[::10] = 1000  # at the edges of slabs of ten
    hu[9::10] = 1000
    gap, _ = thicken(hu, factor=10.0, spacing=10.0, thickness=4.0, profile=SliceProfile("box"))
    touching, _ = thicken(hu, factor=10.0, spacing=10.0, thickness=10.0, profile=SliceProfile("box"))
    assert not gap.any()
    np.testing.assert_allclose(touching, 200, atol=1e-3)


def test_an_overlap_sees_the_neighbours():
    hu = np.zeros((6, 1, 1), np.float32)
    hu[0:2] = 1000
    overlapping, _ = thicken(hu, factor=2.0, spacing=2.0, thickness=4.0, profile=SliceProfile("box"))
    np.testing.assert_allclose(overlapping.ravel(), [2000 / 3, 250, 0], atol=1e-3)


@pytest.mark.parametrize("sd", [5.0, 40.0])
def test_noise_has_the_deviation_asked_for_and_is_added_to_the_thick_slices(sd):
    hu = np.full((8, 100, 100), 50, np.float32)
    how = {"factor": 2.0, "spacing": 2.0, "thickness": 2.0, "profile": SliceProfile()}
    noise = thicken(hu, **how, noise_sd=sd, seed=3)[0] - thicken(hu, **how)[0]
    assert abs(noise.std() / sd - 1) < 0.03
    assert abs(noise.mean()) < sd / 50
    neighbours = np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]
    assert abs(neighbours) < 0.03  # no A has run over it
    np.testing.assert_array_equal(thicken(hu, **how, noise_sd=sd, seed=3)[0], noise + thicken(hu, **how)[0])
    assert (thicken(hu, **how, noise_sd=sd, seed=4)[0] != thicken(hu, **how, noise_sd=sd, seed=3)[0]).any()


@given(volumes(min_slices=6), FACTORS)
def test_the_thin_grid_of_the_result_is_the_truths_own(volume, factor):
    assume(volume.shape[slice_axis(volume)[0]] >= factor)
    thick, _ = simulate_volume(volume, factor=factor)
    axis, _ = slice_axis(volume)
    grid = ZGrid(thick.shape[axis], factor)
    flipped = canonical_turn(volume.affine, axis).flips[0]
    dropped = volume.shape[axis] - grid.m
    truth = shifted_affine(volume.affine, axis, first=dropped if flipped else 0, step=1.0)
    np.testing.assert_allclose(grid.affine(thick.affine, axis), truth, atol=1e-6)  # mm
    assert np.isclose(thick.spacing[axis], factor * volume.spacing[axis])


@given(volumes(min_slices=4), st.sampled_from(AXIS_TURNS), SEEDS)
def test_the_storage_order_does_not_change_the_result(volume, turn, seed):
    how = {"factor": 2.0, "noise_sd": 20.0, "seed": seed}
    here = stored_otherwise(simulate_volume(volume, **how)[0], turn)
    there = simulate_volume(stored_otherwise(volume, turn), **how)[0]
    np.testing.assert_array_equal(there.data, here.data)
    np.testing.assert_allclose(there.affine, here.affine, atol=1e-6)  # mm
    assert there.slice_axis == here.slice_axis


@given(st.integers(2, 30), FACTORS, KINDS, RATIOS, st.integers(-1499, 32767))
def test_a_uniform_volume_keeps_its_hu(m, factor, kind, ratio, value):
    assume(m >= factor)
    volume = axial(np.full((m, 2, 3), value, np.int16))
    thick, _ = simulate_volume(
        volume, factor=factor, thickness=factor * ratio, profile=SliceProfile(kind), noise_sd=0
    )
    assert (thick.data == value).all()
    assert thick.data.dtype == np.int16


def test_five_millimetres_of_one_millimetre():
    thick, notes = simulate_volume(axial(np.zeros((57, 2, 3), np.int16)), spacing=5.0, thickness=6.0)
    assert thick.shape == (3, 2, 11)
    assert thick.affine[2, 3] == pytest.approx(2.0)  # centred on the third thin slice
    assert thick.spacing[2] == pytest.approx(5.0)
    assert thick.slice_thickness == 6.0
    assert thick.slice_axis == 2
    assert notes == ["2 of 57 thin slices dropped: they fill no whole thick slice"]


def test_the_thickness_is_the_spacing_where_nothing_else_is_said():
    assert simulate_volume(axial(np.zeros((6, 2, 3), np.int16)), factor=3.0)[
        0
    ].slice_thickness == pytest.approx(3)


def test_padding_does_not_bleed_and_is_padding_again():
    rng = np.random.default_rng(0)
    hu = rng.integers(-100, 100, (12, 4, 5)).astype(np.int16)
    padded = hu.copy()
    padded[:, 0] = -2000  # in every slice, as a round field of view has it
    padded[:4, 1] = -3024
    air = np.where(padded <= -1500, -1000, padded)
    found = simulate_volume(axial(padded), factor=3.0)[0].data.transpose(2, 1, 0)
    plain = simulate_volume(axial(air), factor=3.0)[0].data.transpose(2, 1, 0)
    assert (found[:, 0] == -2000).all()
    np.testing.assert_array_equal(found[:, 1, 0], [-3024, *plain[1:, 1, 0]])
    np.testing.assert_array_equal(found[:, 2:], plain[:, 2:])


def test_the_type_of_the_result_is_the_inputs_where_it_holds_the_hu():
    hu = np.zeros((4, 2, 3), np.int16)
    stored = replace(axial(hu), stored_dtype=np.dtype(np.uint8))
    assert simulate_volume(stored, factor=2.0)[0].data.dtype == np.uint8
    hu[:] = -1000
    assert simulate_volume(stored, factor=2.0)[0].data.dtype == np.int16


def test_the_slice_axis_is_guessed_with_a_note_and_can_be_said():
    volume = Volume(np.zeros((4, 6, 8), np.int16), np.eye(4))
    thick, notes = simulate_volume(volume, factor=2.0)
    assert thick.shape == (4, 6, 4)
    assert "--axis" in notes[0]
    assert simulate_volume(volume, factor=2.0, axis=0)[0].shape == (2, 6, 8)


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({}, UsageError, "one of them"),
        ({"factor": 2.0, "spacing": 2.0}, UsageError, "exclude each other"),
        ({"factor": 1.0}, UsageError, "a factor of 1"),
        ({"factor": float("nan")}, UsageError, "a factor of nan"),
        ({"factor": 21.0}, UsageError, "up to 20"),
        ({"spacing": 0.5}, UsageError, "0.5 mm are a factor of 0.5"),
        ({"factor": 2.0, "thickness": 20.0}, GeometryError, "ratio 10"),
        ({"factor": 2.0, "thickness": 0.0}, GeometryError, "ratio 0"),
        ({"factor": 2.0, "noise_sd": -1.0}, UsageError, "--noise"),
        ({"factor": 9.0}, GeometryError, "8 thin slices are too few"),
    ],
)
def test_what_no_scanner_does_is_refused(asked, error, words):
    with pytest.raises(error, match=words):
        simulate_volume(axial(np.zeros((8, 2, 3), np.int16)), **asked)
