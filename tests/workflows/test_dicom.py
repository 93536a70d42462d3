"""DICOM in and out of the commands that compute: a series is a scan wherever an image file is one."""

from __future__ import annotations

import json
import zipfile

import nibabel as nib
import numpy as np
import pytest
from pydicom import dcmread

from ctsr.data.volumes import load_volumes
from ctsr.errors import GeometryError, InputError, SomeCasesFailed, UsageError
from ctsr.io.dicom.read import read_stack
from ctsr.io.lists import write_file_list
from ctsr.io.scans import is_dicom, only_series, read_scan
from ctsr.workflows.convert import convert
from ctsr.workflows.evaluate import EvaluateOptions
from ctsr.workflows.evaluate_files import evaluate_files
from ctsr.workflows.folder import raise_for_failures
from ctsr.workflows.requests import Conversion, FileOptions, Simulation
from ctsr.workflows.simulate import simulate
from ctsr.workflows.thinner import Thinner
from ctsr.workflows.upsample import upsample_files
from tests.io.dicom.make import block, judge, planes, put, series

THICK = planes(
    n=10, step=3.0, row=(0, 1, 0), column=(0, 0, -1)
)  # sagittal: no axis of the file is one of the patient
THIN = planes(n=20, step=1.5, row=(0, 1, 0), column=(0, 0, -1))


def thin(source, target, *, model="inverse", thinner=None, **files):
    return upsample_files(source, target, thinner or Thinner(model=model), FileOptions(**files))


@pytest.fixture
def thick(tmp_path):
    series(tmp_path / "thick", block(THICK))
    return tmp_path / "thick"


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.dcm"))}


def voxels(folder):
    read = read_stack(only_series(folder), pad_hu=None).volume
    return read.data, read.affine


def test_a_derived_series_lies_where_its_source_does_and_gives_it_back(tmp_path, thick):
    (row,) = thin(thick, tmp_path / "out")
    assert (row["slices_in"], row["slices_out"]) == (10, 20)
    assert row["residual_max_hu"] <= 0.75
    data, affine = voxels(tmp_path / "out")
    inner = slice(4, -4)  # at the ends a straight line in HU is no volume that these slices are the mean of
    middle = affine.copy()
    middle[:3, 3] += 4 * affine[:3, 2]
    assert not judge([(data[:, :, inner], middle)], [THIN[4:-4]], tolerance=2.0)
    first = dcmread(tmp_path / "out" / "IM000001.dcm")
    source = dcmread(next(thick.glob("*.dcm")))
    assert first.StudyInstanceUID == source.StudyInstanceUID
    assert first.SeriesInstanceUID != source.SeriesInstanceUID


def test_an_image_file_and_a_series_hold_the_same(tmp_path, thick):
    thin(thick, tmp_path / "out")
    thin(thick, tmp_path / "out.nii.gz")
    data, affine = voxels(tmp_path / "out")
    image = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), data)
    np.testing.assert_allclose(image.affine, affine, atol=1e-3)


def test_the_same_input_gives_the_same_bytes_and_other_options_other_uids(tmp_path, thick):
    for name in ("a", "b"):
        thin(thick, tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    thin(thick, tmp_path / "c", model="cubic")
    thin(thick, tmp_path / "d", random_uids=True)
    uids = {dcmread(tmp_path / name / "IM000001.dcm").SOPInstanceUID for name in "acd"}
    assert len(uids) == 3


def test_what_is_there_and_agrees_is_skipped(tmp_path, thick):
    thin(thick, tmp_path / "out")
    before = files(tmp_path / "out")
    (row,) = thin(thick, tmp_path / "out", skip_existing=True)
    assert row["status"] == "skipped"
    with pytest.raises(UsageError, match="was made with model"):
        thin(thick, tmp_path / "out", model="cubic", skip_existing=True)
    with pytest.raises(UsageError, match="exists"):
        thin(thick, tmp_path / "out")
    thin(thick, tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("edit", [put(PatientName="Corrected^Name"), lambda data, k: flip(data)])
def test_a_source_that_was_edited_under_its_old_uids_is_another_source(tmp_path, thick, edit):
    thin(thick, tmp_path / "out")
    series(thick, block(THICK, lambda data, k: edit(data, k) if k == 4 else None))
    with pytest.raises(UsageError, match="input_sha256"):
        thin(thick, tmp_path / "out", skip_existing=True)


@pytest.mark.parametrize("name", ["thin", "thin.nii.gz", "../thick/thin"])
def test_a_series_is_not_thinned_into_its_own_folder(thick, name):
    with pytest.raises(UsageError, match="lies inside the input folder"):
        thin(thick, thick / name)
    assert not (thick / "thin").exists()


def test_a_series_that_is_not_there_is_told_before_the_output_is_looked_at(tmp_path):
    for work in (thin, lambda source, target: simulate(source, target, Simulation())):
        with pytest.raises(InputError, match="thikc: does not exist"):
            work(tmp_path / "thikc", tmp_path / "out")


@pytest.mark.parametrize("name", ["thin.nrrd", "thin.dcm", "thin.nii.zip"])
def test_no_folder_is_made_of_a_name_that_asks_for_another_file(tmp_path, thick, name):
    target = tmp_path / name
    for work in (
        lambda: thin(thick, target),
        lambda: simulate(thick, target, Simulation()),
        lambda: convert(thick, target, Conversion()),
    ):
        with pytest.raises(UsageError, match=r"ends in neither \.nii nor \.nii\.gz"):
            work()
    assert list(tmp_path.iterdir()) == [thick]


def flip(data) -> None:
    """One bit of one pixel, as when a face is blacked out in place."""
    data.PixelData = data.PixelData[:1000] + bytes([data.PixelData[1000] ^ 1]) + data.PixelData[1001:]


def test_an_image_file_borrows_a_patient(tmp_path, thick):
    thin(thick, tmp_path / "out")
    data, affine = voxels(thick)
    elsewhere = affine.copy()
    elsewhere[:3, 3] += 500
    nib.save(nib.Nifti1Image(data, elsewhere), tmp_path / "elsewhere.nii")
    flipped = affine @ np.diag([-1, 1, 1, 1.0])
    flipped[:3, 3] = affine[:3, 3] + affine[:3, 0] * (data.shape[0] - 1)
    nib.save(nib.Nifti1Image(data[::-1], flipped), tmp_path / "thick.nii")
    options = Thinner(model="inverse", thickness=float(read_scan(thick, notes=[]).slice_thickness))
    thin(tmp_path / "thick.nii", tmp_path / "lent", like=thick, thinner=options)
    np.testing.assert_array_equal(voxels(tmp_path / "lent")[0], voxels(tmp_path / "out")[0])
    with pytest.raises(UsageError, match="--like SERIES"):
        thin(tmp_path / "thick.nii", tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="--like is for"):
        thin(thick, tmp_path / "elsewhere", like=thick)
    with pytest.raises(GeometryError, match="outside the box"):
        thin(tmp_path / "elsewhere.nii", tmp_path / "elsewhere", like=thick)
    assert not (tmp_path / "elsewhere").exists()


def test_every_series_of_a_folder_is_a_case_and_a_refused_one_stops_none(tmp_path):
    source = tmp_path / "export"
    series(source / "one", block(THICK))
    series(source / "two", block(THICK, series="2"), block(planes(n=5), series="3"))
    series(source / "gap", block(planes(at=[0, 3, 6, 12, 15]), series="4"))
    rows = thin(source, tmp_path / "out", model="cubic")
    told = {row["case"]: row["status"] for row in rows}
    assert told == {"one": "ok", "two-1": "ok", "two-2": "ok", "gap": "failed"}
    assert (tmp_path / "out" / "two-2" / "IM000001.dcm").exists()
    assert "missing" in next(row["reason"] for row in rows if row["case"] == "gap")
    with pytest.raises(SomeCasesFailed):
        raise_for_failures(rows, path=source)
    with pytest.raises(UsageError, match="4 CT series"):
        thin(source, tmp_path / "one.nii.gz")
    with pytest.raises(GeometryError, match="missing"):
        thin(source / "gap", tmp_path / "x.nii.gz")


def test_padding_comes_back_as_the_series_had_it(tmp_path):
    series(tmp_path / "padded", block(planes(n=8, step=3.0), padding=-2000))
    thin(tmp_path / "padded", tmp_path / "out", model="cubic")
    given, result = voxels(tmp_path / "padded")[0], voxels(tmp_path / "out")[0]
    assert given.min() <= -1500
    np.testing.assert_array_equal(result[:, :, 0::2] <= -1500, given <= -1500)
    assert result.min() == given.min()
    first = dcmread(tmp_path / "out" / "IM000001.dcm")
    assert first.PixelPaddingValue == given.min()


def test_the_other_commands_read_a_series_too(tmp_path, thick):
    series(tmp_path / "thin", block(THIN))
    (row,) = simulate(tmp_path / "thin", tmp_path / "made.nii.gz", Simulation())
    assert (row["slices_in"], row["slices_out"]) == (20, 10)
    with zipfile.ZipFile(tmp_path / "thin.zip", "w") as archive:
        for path in (tmp_path / "thin").iterdir():
            archive.write(path, path.name)
    done = evaluate_files(tmp_path / "thin.zip", tmp_path / "thin", None, EvaluateOptions(mask="none"))
    assert done.rows[0]["identical"]
    write_file_list(tmp_path / "train.txt", [tmp_path / "thin"], overwrite=False)
    (loaded,) = load_volumes(tmp_path / "train.txt", tmp_path, z_truth_max=1.6)
    assert loaded.hu.shape[0] == 20
    assert loaded.trains_along_z


def test_what_holds_no_scan_says_what_it_holds(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    with pytest.raises(InputError, match="1 × not DICOM"):
        read_scan(tmp_path / "notes", notes=[])
    (tmp_path / "x.bin").write_bytes(bytes(200))
    assert not is_dicom(tmp_path / "x.bin")
    series(tmp_path / "s", block(planes(n=4)))
    with pytest.raises(UsageError, match="NIfTI"):
        read_scan(tmp_path / "s", hu_offset=5.0, notes=[])


def test_the_record_of_a_derived_series_names_no_patient(tmp_path, thick):
    thin(thick, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "ctsr.json").read_text())
    first = dcmread(next(thick.glob("*.dcm")))
    text = json.dumps(record)
    for secret in (first.PatientID, str(first.PatientName), first.StudyInstanceUID, first.SeriesInstanceUID):
        assert secret
        assert secret not in text
