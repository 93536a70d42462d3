"""Which axis is sliced, and the one view that every computation uses."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctsr.core.geometry import Turn, canonical_turn, corners, slice_axis
from ctsr.core.volume import Volume
from ctsr.errors import UsageError
from tests.strategies import rotation, volumes

AXIS_TURNS = [Turn(o, f) for o in permutations(range(3)) for f in product((False, True), repeat=3)]


def stored_otherwise(volume: Volume, turn: Turn) -> Volume:
    """The same patient, its voxels stored in another order: axes permuted, then flipped."""
    index = np.zeros((4, 4))  # new index → old index
    for new, old in enumerate(turn.order):
        index[old, new] = -1.0 if turn.flips[new] else 1.0
        index[old, 3] = volume.shape[old] - 1 if turn.flips[new] else 0.0
    index[3, 3] = 1.0
    axis = None if volume.slice_axis is None else turn.order.index(volume.slice_axis)
    return replace(volume, data=turn.apply(volume.data), affine=volume.affine @ index, slice_axis=axis)


def computed_on(volume: Volume) -> np.ndarray:
    """The view (D, H, W) of a volume."""
    return canonical_turn(volume.affine, slice_axis(volume)[0]).apply(volume.data)


def test_there_are_48_ways_to_store_a_volume():
    assert len(AXIS_TURNS) == 48


@given(volumes(), st.sampled_from(AXIS_TURNS))
def test_the_storage_order_does_not_change_what_is_computed_on(volume, turn):
    np.testing.assert_array_equal(computed_on(stored_otherwise(volume, turn)), computed_on(volume))


@pytest.mark.parametrize("turn", AXIS_TURNS)
@pytest.mark.parametrize("degrees", [0, 30, 45, 90, 135])
def test_nor_does_it_where_two_axes_are_as_near_to_one_direction(turn, degrees):
    half = np.radians(degrees) / 2
    affine = np.eye(4)
    affine[:3, :3] = rotation(np.array([np.cos(half), 0, 0, np.sin(half)])) @ np.diag([0.7, 0.7, 5])
    if degrees == 45:  # an exact tie, which the rounded cosine would miss
        affine[:2, :2] = 0.5 * np.array([[1.0, -1.0], [1.0, 1.0]])
    volume = Volume(np.arange(24, dtype=np.int16).reshape(2, 3, 4), affine)
    np.testing.assert_array_equal(computed_on(stored_otherwise(volume, turn)), computed_on(volume))


@given(volumes())
def test_the_view_runs_from_foot_to_head_back_to_front_right_to_left_along_its_axes(volume):
    axis, _ = slice_axis(volume)
    turn = canonical_turn(volume.affine, axis)
    assert turn.order[0] == axis
    directions = (volume.affine[:3, :3] / volume.spacing)[:, turn.order] * np.where(turn.flips, -1, 1)
    along = int(np.argmax(np.abs(directions[:, 0])))
    rest = [w for w in (2, 1, 0) if w != along]
    assert directions[along, 0] > 0
    assert directions[rest[0], 1] > 0
    assert directions[rest[1], 2] > 0
    assert abs(directions[rest[0], 1]) + abs(directions[rest[1], 2]) >= abs(directions[rest[0], 2]) + abs(
        directions[rest[1], 1]
    )


def test_an_axial_scan_is_seen_as_slice_front_back_left_right():
    data = np.zeros((6, 5, 4), np.int16)
    data[1, 2, 3] = 1
    turn = canonical_turn(np.diag([-0.7, -0.7, 5, 1.0]), 2)  # stored as DICOM does: to the left, to the back
    assert np.argwhere(turn.apply(data)).tolist() == [[3, 2, 4]]


@given(volumes(), st.sampled_from(AXIS_TURNS))
def test_a_turn_is_undone(volume, turn):
    np.testing.assert_array_equal(turn.undo(turn.apply(volume.data)), volume.data)


@given(volumes(), st.sampled_from(AXIS_TURNS))
def test_a_turn_costs_no_copy(volume, turn):
    assert np.shares_memory(turn.apply(volume.data), volume.data)
    assert np.shares_memory(turn.undo(turn.apply(volume.data)), volume.data)


@given(volumes())
def test_the_coarsest_axis_is_the_slice_axis(volume):
    axis, note = slice_axis(volume)
    assert axis == int(np.argmax(volume.spacing))
    assert note == ""


def square(spacing: tuple[float, float, float], **fields: int) -> Volume:
    return Volume(np.zeros((4, 4, 4), np.int16), np.diag([*spacing, 1.0]), **fields)


def test_what_the_user_says_wins():
    assert slice_axis(square((0.7, 0.7, 5)), axis=0) == (0, "")


def test_then_what_the_file_says_where_spacing_does_not_tell():
    assert slice_axis(square((1, 1, 1), slice_axis=1)) == (1, "")
    assert slice_axis(square((0.7, 0.7, 5), slice_axis=1)) == (2, "")


def test_then_the_axis_nearest_head_foot_with_a_note():
    axis, note = slice_axis(square((0.98, 0.98, 0.625)))
    assert axis == 2
    assert "0.98 × 0.98 × 0.625 mm" in note
    assert "--axis" in note


@pytest.mark.parametrize("axis", [-1, 3])
def test_an_axis_that_is_none_is_refused(axis):
    with pytest.raises(UsageError, match="not 0, 1 or 2"):
        slice_axis(square((1, 1, 1)), axis=axis)


@given(volumes(), st.sampled_from(AXIS_TURNS))
def test_corners_are_the_same_set_in_every_storage_order(volume, turn):
    other = stored_otherwise(volume, turn)
    here, there = corners(volume.affine, volume.shape), corners(other.affine, other.shape)
    apart = np.linalg.norm(here[:, None] - there[None], axis=2)
    assert apart.min(axis=1).max() < 1e-9  # mm
    assert apart.min(axis=0).max() < 1e-9
