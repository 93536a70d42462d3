"""Every series with a known answer is read right, or refused with its reason; none is read wrongly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ctsr.errors import InputError
from ctsr.io.dicom.read import read_stack
from ctsr.io.dicom.records import Scan
from ctsr.io.dicom.scan import scan
from tests.io.dicom.cases import CASES
from tests.io.dicom.make import RESAMPLED, Case, Plane, hu_at, judge, planes, write_case

AIR = -1024.0  # HU that stands where the scanner saw nothing
FLIPPED = np.array(
    [[-1, 0, 0, 63], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
)  # the first of 64 columns is the last


@pytest.fixture(scope="module", params=CASES)
def read(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path, Scan]:
    """A case, its folder, and what the folder holds."""
    case = CASES[request.param]
    folder = write_case(case, tmp_path_factory.mktemp("series"))
    return case, folder, scan(folder)


def test_a_series_is_read_right_or_refused_with_its_reason(read: tuple[Case, Path, Scan]) -> None:
    case, _, found = read
    reasons = [r.reason for r in found.refused] + [s.reason for s in found.skipped]
    volumes = []
    for stack in found.stacks:
        try:
            volumes.append(read_stack(stack, pad_hu=AIR).volume)
        except InputError as error:
            reasons.append(error.reason)
    wrong = judge([(v.data, v.affine) for v in volumes], case.parts, case.tolerance, nothing=AIR)
    if case.expect == "right":
        assert not wrong, (wrong, reasons)
        assert sorted(v.shape[2] for v in volumes) == sorted(map(len, case.parts))
        if case.tolerance < RESAMPLED:
            assert {v.shape[:2] for v in volumes} == {part[0].shape[::-1] for part in case.parts}
        return
    assert not volumes, wrong or "read right, where a refusal was asked for"
    assert any(case.words in reason for reason in reasons), reasons
    if case.expect == "skipped":
        assert not found.refused


def test_every_file_is_in_a_stack_or_has_a_reason(read: tuple[Case, Path, Scan]) -> None:
    case, folder, found = read
    used = {s.file.name for stack in found.stacks for s in stack.slices}
    skipped = {s.name for s in found.skipped}
    assert not used & skipped
    n_refused = sum(r.n_files for r in found.refused)
    if any(block.frames for block in case.blocks):
        n_refused = min(n_refused, 1)  # images are counted, and one file holds them all
    assert len(used) + len(skipped) + n_refused == sum(path.is_file() for path in folder.rglob("*"))


def volume_of(part: list[Plane]) -> tuple[np.ndarray, np.ndarray]:
    """What a perfect reader makes of an untilted part."""
    first, second = part[:2]
    lps = np.eye(4)
    lps[:3] = np.c_[
        first.row * first.spacing[1],
        first.column * first.spacing[0],
        second.position - first.position,
        first.position,
    ]
    data = np.stack([np.rint(hu_at(plane.positions()) + plane.offset).T for plane in part], axis=2)
    return data, np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def test_the_judge_passes_the_answer_and_sees_every_small_fault() -> None:
    part = planes()
    data, affine = volume_of(part)
    assert judge([(data, affine)], [part]) == ""
    assert judge([(data[::-1], affine @ FLIPPED)], [part]) == ""  # another order of the voxels is no fault
    moved = affine + np.diag([0, 0, 0.1 / 11, 0.0])  # 0.1 mm at the far end
    swapped = data[:, :, [0, 2, 1, *range(3, 12)]]
    for volumes in (
        [(data[::-1], affine)],
        [(data, moved)],
        [(swapped, affine)],
        [(data[:, :, 1:], affine)],
        [(data[:, :, :-1], affine)],
        [(data + (np.arange(12) == 5) * 1.0, affine)],
        [(data, affine)] * 2,
        [],
    ):
        assert judge(volumes, [part])
    assert judge([(data, affine)], [part, planes(offset=5)]) == "1 of 2 volumes are absent"


def test_a_tilt_that_is_kept_lies_under_a_sheared_affine(tmp_path: Path) -> None:
    case = CASES["gantry tilt -22.5"]
    (stack,) = scan(write_case(case, tmp_path)).stacks
    volume = read_stack(stack, keep_tilt=True).volume
    assert volume.shape == (64, 48, 12)
    assert judge([(volume.data, volume.affine)], case.parts) == ""


def test_split_makes_two_right_volumes_where_the_spacing_changes_once(tmp_path: Path) -> None:
    case = CASES["spacing 2.5 mm, then 5 mm"]
    found = scan(write_case(case, tmp_path), split=True)
    volumes = [read_stack(stack).volume for stack in found.stacks]
    (whole,) = case.parts
    n = min(volumes, key=lambda v: v.affine[2, 3]).shape[2]
    assert judge([(v.data, v.affine) for v in volumes], [whole[:n], whole[n:]]) == ""
    assert n in (6, 7)  # the slice at the change belongs to either


def test_only_a_stack_that_leans_sideways_is_said_to(tmp_path: Path) -> None:
    for name, is_sideways in (("gantry tilt, oblique", False), ("gantry tilt sideways", True)):
        (stack,) = scan(write_case(CASES[name], tmp_path / name)).stacks
        assert any("sideways" in warning for warning in read_stack(stack).warnings) == is_sideways
