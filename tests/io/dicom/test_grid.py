"""Laws of the grid: a regular stack is found wherever it lies, and nothing else passes for one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from ctsr.errors import GeometryError
from ctsr.io.dicom.grid import change_of_spacing, fit_grid
from ctsr.io.dicom.records import Slice
from tests.io.dicom.slices import X, Y, Z, a_slice

RAS = np.array([-1, -1, 1])


def at(*z: float) -> list[Slice]:
    return [a_slice([10, -20, value]) for value in z]


def every(step: float, n: int, *, start: float = 0) -> list[float]:
    return [start + k * step for k in range(n)]


angles = st.floats(-180, 180)


@given(
    turns=st.tuples(angles, angles, angles),
    step=st.floats(0.2, 15),
    n=st.integers(3, 40),
    drift=st.floats(-0.5, 0.5),
    pixel_spacing=st.tuples(st.floats(0.2, 2), st.floats(0.2, 2)),
)
def test_every_voxel_stays_where_its_slice_had_it(turns, step, n, drift, pixel_spacing) -> None:
    turn = Rotation.from_euler("xyz", turns, degrees=True).as_matrix()
    row, column, normal = turn.T
    start = np.array([31.5, -7.25, 112.0])
    slices = [
        a_slice(
            start + k * step * (normal + drift * column),
            row=row,
            column=column,
            pixel_spacing=pixel_spacing,
        )
        for k in range(n)
    ]
    grid = fit_grid(slices)
    kept, upright = grid.affine(keep_tilt=True), grid.affine()
    low, shape = grid.upright
    assert np.linalg.det(upright[:3, :3] * RAS[:, None]) > 0  # right-handed in LPS: n = row × column
    directions = upright[:3, :3] / np.linalg.norm(upright[:3, :3], axis=0)
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-9)
    for k, s in enumerate(slices):
        for i, j in ((0, 0), (63, 0), (0, 47), (63, 47)):
            true = s.position + i * pixel_spacing[1] * row + j * pixel_spacing[0] * column
            np.testing.assert_allclose(
                RAS * (kept @ (i, j, k, 1))[:3], true, atol=0.051
            )  # mm; the tilt's limit
            moved = np.array([i, j]) + grid.shifts[k] - low
            np.testing.assert_allclose(RAS * (upright @ (*moved, k, 1))[:3], true, atol=0.051)
            assert (moved > -1e-5).all()
            assert (moved < np.array(shape[:2]) - 1 + 1e-5).all()


def test_tilt_is_the_angle_and_spacing_the_distance_along_the_normal() -> None:
    step = 5 * np.array([0, math.sin(math.radians(14)), math.cos(math.radians(14))])
    grid = fit_grid([a_slice(k * step) for k in range(4)])
    assert grid.tilt_deg == pytest.approx(14)
    assert grid.spacing == pytest.approx(5 * math.cos(math.radians(14)))
    assert grid.upright[1] == (64, 48 + math.ceil(15 * math.sin(math.radians(14)) / 0.75), 4)


def test_an_upright_stack_has_no_tilt_and_keeps_its_frame() -> None:
    grid = fit_grid(at(*every(2.5, 12)))
    assert grid.tilt_deg == 0
    assert grid.upright[1] == (64, 48, 12)
    np.testing.assert_array_equal(grid.affine(), grid.affine(keep_tilt=True))


def test_positions_rounded_to_a_tenth_give_back_the_true_spacing() -> None:
    grid = fit_grid(at(*np.round(every(0.625, 200, start=0.03), 1)))
    assert grid.spacing == pytest.approx(0.625, abs=1e-3)
    assert any("rounded to 0.1 mm" in w for w in grid.warnings)


def test_exact_positions_on_tenths_are_not_called_rounded() -> None:
    assert fit_grid(at(*every(2.5, 12))).warnings == ()


def test_a_slice_off_by_more_than_rounding_is_refused_though_all_are_multiples_of_a_tenth() -> None:
    z = np.round(every(0.625, 200), 1)
    z[100] += 0.2
    with pytest.raises(GeometryError, match="uneven slice spacing"):
        fit_grid(at(*z))


@pytest.mark.parametrize("digits", [2, 3])
def test_positions_rounded_finer_need_no_exception(digits: int) -> None:
    assert fit_grid(at(*np.round(every(0.625, 200), digits))).warnings == ()


@pytest.mark.parametrize(
    ("slices", "text"),
    [
        (at(0, 2.5), "2 slices; at least 3"),
        (at(0), "1 slice; at least 3"),
        (at(0, 2.5, 5, 10, 12.5, 15), "1 slice missing between z=5.00 and z=10.00 \\(index 3\\)"),
        (
            at(0, 2.5, 7.5, 10, 12.5, 20, 22.5),
            "3 slices missing in 2 gaps .* z=2.50 and z=7.50 \\(index 2\\)",
        ),
        (
            at(*every(4, 14), *every(7, 14, start=53.1)),
            "changes from 4.00 to 7.00 mm at index 14; ctsr convert --split",
        ),
        (at(0, 1, 2.7, 3.1, 5), "uneven slice spacing \\(0.40 to 1.90 mm\\)"),
        (at(0, 2.5, 2.5, 5, 7.5, 7.5, 7.5), "2 of 4 positions hold more than one image"),
        (at(5, 5, 5, 5), "1 of 1 position holds more than one image"),
        (at(*every(0.05, 5)), "slice spacing is 0.05 mm"),
        (at(*every(25, 5)), "slice spacing is 25 mm"),
        (
            [a_slice([6 * (k >= 6), 0, 2.5 * k]) for k in range(12)],
            "in-plane position jumps by 6.00 mm at index 6",
        ),
        ([a_slice([0, 3 * k, 2.5 * k]) for k in range(5)], "tilted by 50.2°"),
        ([a_slice([0, 0, k], column=Y + 0.01 * X) for k in range(5)], "not orthonormal: off by 0.01"),
        ([a_slice([0, 0, k], column=1.01 * Y) for k in range(5)], "not orthonormal: off by 0.01"),
    ],
)
def test_what_is_no_regular_stack_is_refused_with_its_numbers(slices: list[Slice], text: str) -> None:
    with pytest.raises(GeometryError, match=text):
        fit_grid(slices)


def test_one_slice_turned_a_little_is_found_by_its_corner() -> None:
    slices = at(*every(2.5, 12))
    turned = Rotation.from_euler("z", 0.3, degrees=True).as_matrix()
    slices[7] = replace(slices[7], row=turned @ X, column=turned @ Y)
    with pytest.raises(GeometryError, match=r"corner of 001.dcm is 0\.\d\d mm off the grid"):
        fit_grid(slices)


def test_slices_thinner_than_their_spacing_are_told() -> None:
    slices = [replace(s, thickness=2.0) for s in at(*every(2.5, 12))]
    assert fit_grid(slices).warnings == ("slices of 2 mm every 2.5 mm leave gaps",)


def test_tilt_does_not_take_a_sideways_wobble_for_a_shear() -> None:
    grid = fit_grid([a_slice([0.001 * k, 0.8 * k, 2.5 * k]) for k in range(12)])
    assert grid.drift @ X == 0
    assert grid.upright[1][0] == 64


class TestChangeOfSpacing:
    def test_is_where_the_second_stack_begins(self) -> None:
        assert change_of_spacing(at(*every(4, 14), *every(7, 14, start=53.1))) == 14

    def test_gives_the_slice_at_the_border_to_the_part_that_needs_it(self) -> None:
        begin = change_of_spacing(at(0, 2.5, 5, 7.5, 12.5, 17.5))
        assert begin == 3
        assert fit_grid(at(7.5, 12.5, 17.5)).spacing == pytest.approx(5)

    @pytest.mark.parametrize(
        "z",
        [
            every(2.5, 12),
            [*every(2.5, 6), *every(2.5, 6, start=20)],  # missing slices: a hole is no change of spacing
            [*every(2.5, 6), *every(5, 2, start=18.5)],  # too short a part
            [*every(2, 5), *every(3, 5, start=11), *every(4, 5, start=27)],  # two changes
        ],
    )
    def test_is_none_where_there_are_not_two_regular_stacks(self, z: list[float]) -> None:
        assert change_of_spacing(at(*z)) is None

    def test_ends_soon_on_many_changes(self) -> None:
        z = np.cumsum(np.tile(np.repeat([1.0, 2.0], 4), 100))
        assert change_of_spacing(at(*z)) is None
        with pytest.raises(GeometryError):
            fit_grid(at(*z))


def test_coronal_stacks_are_told_along_y() -> None:
    slices = [a_slice([0, y, 0], row=X, column=-Z) for y in (0, 1, 2, 4, 5)]
    with pytest.raises(GeometryError, match=r"between y=2\.00 and y=4\.00"):
        fit_grid(slices)
