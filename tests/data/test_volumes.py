"""What a training reads is whole, listed, and in one set only."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from ctsr.data.volumes import load_volumes, refuse_leaks
from ctsr.errors import InputError
from tests.io.make import affine_of, ct, nifti, put


def listed(folder: Path, *names: str, name: str = "list.txt") -> Path:
    (folder / name).write_text("\n".join(names) + "\n")
    return folder / name


def load(folder: Path, *names: str, notes: list[str] | None = None, z_truth_max: float = 1.5):
    return load_volumes(listed(folder, *names), folder, z_truth_max=z_truth_max, notes=notes)


def test_a_scan_is_turned_to_the_computing_order(tmp_path):
    data = ct((9, 8, 7))
    put(tmp_path, nifti(data, affine_of((0.7, 0.8, 2.5))), "a.nii.gz")
    (scan,) = load(tmp_path, "a.nii.gz")
    assert scan.hu.shape == (7, 8, 9)
    assert scan.hu.dtype == np.int16
    assert scan.hu.flags.c_contiguous
    np.testing.assert_allclose(scan.spacing, (2.5, 0.8, 0.7))
    assert scan.slice_thickness == pytest.approx(2.5)
    assert not scan.trains_along_z
    assert load(tmp_path, "a.nii.gz", z_truth_max=2.5)[0].trains_along_z
    # stored the other way round along every axis: the same scan
    affine = affine_of((0.7, 0.8, 2.5))
    flipped = affine @ np.diag([-1, -1, -1, 1])
    flipped[:3, 3] = affine[:3, :3] @ [8, 7, 6] + affine[:3, 3]
    put(tmp_path, nifti(data[::-1, ::-1, ::-1].copy(), flipped), "b.nii")
    (again,) = load(tmp_path, "b.nii")
    np.testing.assert_array_equal(again.hu, scan.hu)
    assert again.content == scan.content


@pytest.mark.parametrize(
    ("dtype", "kept"), [(np.int16, np.int16), (np.int32, np.float32), (np.float32, np.float32)]
)
def test_hu_are_kept_in_any_type_and_padding_becomes_air(tmp_path, dtype, kept):
    data = ct().astype(dtype)
    data[0, 0] = -2000
    put(tmp_path, nifti(data), "a.nii")
    (scan,) = load(tmp_path, "a.nii")
    assert scan.hu.dtype == kept
    assert scan.hu.min() == -1024
    expected = np.where(data == -2000, -1024, data)
    np.testing.assert_array_equal(np.sort(scan.hu.ravel()), np.sort(expected.ravel()))


def test_an_unsigned_scan_without_air_is_taken(tmp_path):
    bone = np.random.default_rng(0).normal(300, 80, (9, 8, 7)).clip(30).astype(np.uint16)
    put(tmp_path, nifti(bone), "a.nii")
    notes: list[str] = []
    (scan,) = load(tmp_path, "a.nii", notes=notes)
    assert scan.hu.dtype == np.float32
    assert any(note.startswith(f"{tmp_path / 'a.nii'}: no air") for note in notes)


@pytest.mark.parametrize(
    ("names", "code", "words"),
    [
        ([], 2, "names no files"),
        (["# all", "", "  "], 2, "names no files"),
        (["gone.nii.gz"], 3, "list.txt:1: gone.nii.gz does not exist"),
        (["a.nii", "cut.nii.gz"], 3, "cut.nii.gz: truncated"),
        (["../a.nii"], 3, "outside the data folder"),
        (["slice.nii"], 3, "slice.nii: has 1 slice, at least 2 are needed"),
        (["label.nii"], 3, "label.nii: .*not HU"),
    ],
    ids=str,
)
def test_a_list_that_cannot_be_trained_on_names_what_is_wrong(tmp_path, names, code, words):
    put(tmp_path, nifti(), "a.nii")
    whole = put(tmp_path, nifti(), "cut.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    put(tmp_path, nifti(ct((9, 8, 1))), "slice.nii")
    put(tmp_path, nifti(np.repeat(np.arange(4, dtype=np.uint8), 126).reshape(9, 8, 7)), "label.nii")
    with pytest.raises(Exception, match=words) as told:
        load(tmp_path, *names)
    assert told.value.exit_code == code


def test_a_list_that_is_missing_is_usage(tmp_path):
    with pytest.raises(Exception, match="does not exist") as told:
        load_volumes(tmp_path / "none.txt", tmp_path, z_truth_max=1.5)
    assert told.value.exit_code == 2


def test_a_list_may_come_from_windows_and_name_a_file_twice(tmp_path):
    put(tmp_path, nifti(), "a.nii")
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.nii\r\n# b.nii\r\n\r\n./a.nii\r\n")
    notes: list[str] = []
    assert len(load_volumes(tmp_path / "list.txt", tmp_path, z_truth_max=1.5, notes=notes)) == 1
    assert any("stands in the list twice" in note for note in notes)


def test_what_is_read_stays_whatever_becomes_of_the_file(tmp_path):
    path = put(tmp_path, nifti(), "a.nii")
    (scan,) = load(tmp_path, "a.nii")
    before = scan.hu.copy()
    with path.open("r+b") as file:
        file.truncate(400)
    path.unlink()
    np.testing.assert_array_equal(scan.hu, before)


def _same_file(a: Path) -> str:
    return a.name


def _hard_link(a: Path) -> str:
    os.link(a, a.parent / "b.nii")
    return "b.nii"


def _copy(a: Path) -> str:
    shutil.copy(a, a.parent / "b.nii")
    return "b.nii"


def _compressed(a: Path) -> str:
    put(a.parent, a.read_bytes(), "b.nii.gz")
    return "b.nii.gz"


def _as_float(a: Path) -> str:
    put(a.parent, nifti(ct().astype(np.float32)), "b.nii")
    return "b.nii"


@pytest.mark.parametrize("twin", [_same_file, _hard_link, _copy, _compressed, _as_float])
def test_a_scan_in_both_sets_is_refused_by_its_voxels(tmp_path, twin):
    name = twin(put(tmp_path, nifti(ct(seed=0)), "a.nii"))
    put(tmp_path, nifti(ct(seed=1)), "other.nii")
    train, val = load(tmp_path, "other.nii", "a.nii"), load(tmp_path, name)
    with pytest.raises(InputError) as told:
        refuse_leaks(train, val)
    assert told.value.exit_code == 3
    assert str(told.value).startswith(f"{tmp_path / name}: holds the same voxels as {tmp_path / 'a.nii'}")
    refuse_leaks(train[:1], val)
