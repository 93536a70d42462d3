"""A derived series: accepted by archives, right in place and HU, the same whenever it is made, whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
import time
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset

from ctsr.core.volume import Volume
from ctsr.errors import GeometryError, ResourceError, UsageError
from ctsr.io.dicom import write
from ctsr.io.dicom.elements import text
from ctsr.io.dicom.frames import frames_of, slices_of
from ctsr.io.dicom.read import read_stack
from ctsr.io.dicom.records import DicomFile, Slice, Stack
from ctsr.io.dicom.scan import scan
from ctsr.io.dicom.source import find
from ctsr.io.dicom.write import check_like, check_series, write_series

TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
EXPLICIT = "1.2.840.10008.1.2.1"

RECORD = {
    "ctsr_version": "0.1.0",
    "model": "baseline",
    "weights_sha256": hashlib.sha256(b"weights").hexdigest(),
    "factor": 2.0,
    "SliceThickness": 1.25,
    "input_slice_thickness_mm": 2.5,
    "input_spacing_mm": 2.5,
    "consistency_residual_mean_hu": 0.09,
    "consistency_residual_max_hu": 0.5,
    "request": {"profile": "gaussian"},
}


def slice_of(header: Dataset, name: str, frame: int | None = None, path: Path = Path("absent")) -> Slice:
    """A record as the reader makes it, from a header of the simple kind that the tests use."""
    meta = getattr(header, "file_meta", None)
    if frame is not None:
        header = frames_of(header)[frame]
    value = header.get
    orientation = np.array(value("ImageOrientationPatient"), float)
    return Slice(
        file=DicomFile(name, path),
        header=header,
        frame=frame,
        position=np.array(value("ImagePositionPatient"), float),
        row=orientation[:3],
        column=orientation[3:],
        pixel_spacing=tuple(map(float, value("PixelSpacing"))),
        shape=(header.Rows, header.Columns),
        slope=1.0,
        intercept=-1024.0,
        rescale_type="",
        thickness=value("SliceThickness"),
        kernel="",
        image_type=(),
        transfer_syntax=str(meta.TransferSyntaxUID) if meta and "TransferSyntaxUID" in meta else EXPLICIT,
        pixel_offset=0,
    )


def stack_of(slices: list[Slice]) -> Stack:
    series, study = (text(slices[0].header, tag) for tag in (0x0020000E, 0x0020000D))
    return Stack(tuple(sorted(slices, key=lambda s: s.at)), series, study, "patient")


def header_at(k: int, **changes) -> Dataset:
    """The k-th slice of a plain scanner series: 12 × 10 pixels of 0.75 × 0.5 mm, 2.5 mm apart."""
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = EXPLICIT
    values = {
        "SpecificCharacterSet": "ISO_IR 192",
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
        "SOPInstanceUID": f"1.2.3.{k + 1}",
        "SeriesInstanceUID": "1.2.3",
        "StudyInstanceUID": "1.2",
        "FrameOfReferenceUID": "1.2.9",
        "PatientName": "Ångström^Åsa",
        "PatientID": "4711",
        "StudyDate": "20200102",
        "ContentDate": "20200102",
        "ContentTime": f"1200{k:02d}",
        "Manufacturer": "SCANNERS",
        "ManufacturerModelName": "One",
        "SeriesNumber": 4,
        "SeriesDescription": "Thorax 2.5 " + "x" * 50,
        "BodyPartExamined": "CHEST",
        "PatientPosition": "HFS",
        "ConvolutionKernel": "B30f",
        "KVP": 120,
        "XRayTubeCurrent": 100 + k,
        "TableHeight": 150 + k,
        "CTDIvol": 5.0,
        "InstanceNumber": k + 1,
        "ImagePositionPatient": [-10.0, -20.0, 30.0 + 2.5 * k],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [0.75, 0.5],
        "SliceThickness": 2.5,
        "Rows": 12,
        "Columns": 10,
        "WindowCenter": 40,
        "WindowWidth": 400,
    } | changes
    for keyword, value in values.items():
        if value is not None:
            setattr(header, keyword, value)
    return header


def series(n: int = 4, **changes) -> Stack:
    return stack_of([slice_of(header_at(k, **changes), f"{k}.dcm") for k in range(n)])


def thin_grid(stack: Stack, factor: int = 2) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Affine (RAS) and shape of `factor` slices for each of the stack's, edges kept."""
    first, n = stack.slices[0], len(stack.slices)
    spacing = (stack.slices[-1].at - first.at) / (n - 1)
    lps = np.eye(4)
    lps[:3, 0] = first.row * first.pixel_spacing[1]
    lps[:3, 1] = first.column * first.pixel_spacing[0]
    lps[:3, 2] = first.normal * spacing / factor
    lps[:3, 3] = first.position - first.normal * (spacing / 2 - spacing / factor / 2)
    return TO_LPS @ lps, (first.shape[1], first.shape[0], factor * n)


def hu_of(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """(slices, rows, columns) HU over the whole range of CT."""
    rng = np.random.default_rng(seed)
    return rng.integers(-1024, 3072, size=shape[::-1]).astype(np.int16)


def made(folder: Path, like: Stack, *, hu: np.ndarray | None = None, cut: int = 3, **options) -> np.ndarray:
    """Write a derived series in slabs of `cut` slices, or of the `slabs` given; returns its HU."""
    affine, shape = thin_grid(like)
    hu = hu_of(shape) if hu is None else hu
    slabs = options.pop("slabs", ((k, hu[k : k + cut]) for k in range(0, shape[2], cut)))
    given = {"affine": affine, "padding_value": None, "overwrite": False, "record": RECORD}
    write_series(folder, slabs, like, shape=shape, **(given | options))
    return hu


def read_back(folder: Path) -> list[Dataset]:
    return [pydicom.dcmread(p) for p in sorted(folder.glob("*.dcm"))]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# What is in the slices


def test_hu_come_back_as_they_were_given(tmp_path):
    hu = made(tmp_path / "out", series())
    for plane, found in zip(hu, read_back(tmp_path / "out"), strict=True):
        np.testing.assert_array_equal(found.pixel_array, plane)
        assert (found.RescaleSlope, found.RescaleIntercept, found.RescaleType) == (1, 0, "HU")


def test_hu_are_rounded_half_to_even_and_limited_to_the_type_alone(tmp_path):
    like = series(2)
    _, shape = thin_grid(like)
    hu = np.zeros(shape[::-1])
    hu[0, 0, :6] = [0.5, 1.5, -0.5, 40000, -40000, 30710]
    made(tmp_path / "out", like, hu=hu)
    found = read_back(tmp_path / "out")[0].pixel_array[0, :6]
    assert found.tolist() == [0, 2, 0, 32767, -32768, 30710]


@pytest.mark.parametrize(
    "orientation", [[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1], [0.8, 0.6, 0, -0.6, 0.8, 0]]
)
def test_positions_lie_on_the_grid_and_rise_along_the_normal(tmp_path, orientation):
    r, c = np.array(orientation[:3]), np.array(orientation[3:])
    slices = []
    for k in range(4):
        place = [float(x) for x in np.array([1 / 3, -123.4567891, 99.9]) + np.cross(r, c) * k * 10 / 3]
        header = header_at(k, ImageOrientationPatient=orientation)
        header.ImagePositionPatient = [pydicom.valuerep.DS(x, auto_format=True) for x in place]
        slices.append(slice_of(header, f"{k}"))
    like = stack_of(slices)
    made(tmp_path / "out", like)
    affine, shape = thin_grid(like)
    for k, found in enumerate(read_back(tmp_path / "out")):
        expected = TO_LPS @ affine @ [0, 0, k, 1]
        np.testing.assert_allclose(found.ImagePositionPatient, expected[:3], atol=1e-3)  # mm
        np.testing.assert_allclose(found.ImageOrientationPatient, orientation, atol=1e-6)
        assert all(len(str(x)) <= 16 for x in found.ImagePositionPatient)
        assert found.InstanceNumber == k + 1
    assert k + 1 == shape[2]


def test_another_reader_finds_the_same_grid(tmp_path):
    like = series()
    hu = made(tmp_path / "out", like)
    affine, shape = thin_grid(like)
    image = sitk.ReadImage(sorted(map(str, (tmp_path / "out").glob("*.dcm"))))
    lps = TO_LPS @ affine
    np.testing.assert_allclose(image.GetSpacing(), np.linalg.norm(lps[:3, :3], axis=0), atol=1e-6)
    np.testing.assert_allclose(image.GetOrigin(), lps[:3, 3], atol=1e-3)
    np.testing.assert_allclose(np.array(image.GetDirection()).reshape(3, 3), np.eye(3), atol=1e-6)
    assert image.GetPixelID() == sitk.sitkInt16  # exact HU: no rescale made it wider
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), hu)
    assert image.GetSize() == shape


def test_patient_study_and_frame_are_the_sources(tmp_path):
    made(tmp_path / "out", series())
    for found in read_back(tmp_path / "out"):
        assert str(found.PatientName) == "Ångström^Åsa"
        assert (found.PatientID, found.StudyInstanceUID, found.FrameOfReferenceUID) == (
            "4711",
            "1.2",
            "1.2.9",
        )
        assert found.PatientBirthDate == ""  # type 2
        assert found.SeriesInstanceUID.startswith("2.25.")
        assert found.SeriesNumber == 1004
        assert found.SeriesDescription == f"{'Thorax 2.5 ' + 'x' * 37} SR 1.25mm"


def test_the_series_says_what_it_is_and_who_made_it(tmp_path):
    made(tmp_path / "out", series())
    found = read_back(tmp_path / "out")[0]
    assert list(found.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
    assert (found.Manufacturer, found.ContentQualification) == ("ctsr", "RESEARCH")
    assert RECORD["weights_sha256"] in found.DerivationDescription
    assert "0.09 HU" in found.DerivationDescription
    assert "not for primary diagnosis" in found.DerivationDescription
    scanner, ours = found.ContributingEquipmentSequence
    assert (scanner.Manufacturer, scanner.ManufacturerModelName) == ("SCANNERS", "One")
    assert ours.PurposeOfReferenceCodeSequence[0].CodeValue == "109102"
    assert "CTDIvol" not in found  # a dose counter would add it twice


def test_a_description_is_never_too_long_nor_out_of_the_character_set(tmp_path):
    made(tmp_path / "out", series(), record=RECORD | {"model": "é\\" * 1000})
    text = read_back(tmp_path / "out")[0].DerivationDescription
    assert len(text) == 1024
    assert text.isascii()
    assert "\\" not in text
    unmeasured = dict.fromkeys(("consistency_residual_mean_hu", "consistency_residual_max_hu"))
    made(tmp_path / "unmeasured", series(), record=RECORD | unmeasured)
    assert "Thickened again" not in read_back(tmp_path / "unmeasured")[0].DerivationDescription


def test_what_differs_between_source_slices_comes_from_the_nearest_or_not_at_all(tmp_path):
    made(tmp_path / "out", series())
    found = read_back(tmp_path / "out")
    assert [int(f.XRayTubeCurrent) for f in found] == [100, 100, 101, 101, 102, 102, 103, 103]
    assert [f.ContentTime for f in found] == [f"1200{k // 2:02d}" for k in range(8)]
    assert not any("TableHeight" in f for f in found)
    assert all(f.ConvolutionKernel == "B30f" for f in found)


def test_each_slice_names_the_source_slices_around_it(tmp_path):
    made(tmp_path / "out", series(6))
    found = read_back(tmp_path / "out")
    named = [[s.ReferencedSOPInstanceUID for s in f.SourceImageSequence] for f in found]
    assert named[0] == [f"1.2.3.{k}" for k in (1, 2, 3, 4)]
    assert named[5] == [f"1.2.3.{k}" for k in (2, 3, 4, 5)]  # a quarter above the third
    assert named[-1] == [f"1.2.3.{k}" for k in (3, 4, 5, 6)]
    series_named = found[5].ReferencedSeriesSequence[0]
    assert series_named.SeriesInstanceUID == "1.2.3"
    assert [r.ReferencedSOPInstanceUID for r in series_named.ReferencedInstanceSequence] == named[5]


def test_padding_is_named_as_a_signed_value(tmp_path):
    like = series()
    _, shape = thin_grid(like)
    hu = hu_of(shape)
    hu[:, 0, 0] = -3024
    made(tmp_path / "out", like, hu=hu, padding_value=-3024)
    for found in read_back(tmp_path / "out"):
        assert found["PixelPaddingValue"].VR == "SS"
        assert found.PixelPaddingValue == -3024 == found.pixel_array[0, 0]
    made(tmp_path / "none", like)
    assert not any("PixelPaddingValue" in f for f in read_back(tmp_path / "none"))


@pytest.mark.parametrize(
    ("tags", "syntax", "expected"),
    [
        (["00", "00"], EXPLICIT, "00"),
        (["00", None], EXPLICIT, None),  # one does not say it: nobody knows
        (["00", "01"], EXPLICIT, "01"),
        ([None, None], "1.2.840.10008.1.2.4.51", "01"),
        ([None, None], "1.2.840.10008.1.2.4.91", "01"),
        (["00", "00"], "1.2.840.10008.1.2.4.91", "00"),
    ],
)
def test_what_was_once_compressed_with_loss_stays_so(tmp_path, tags, syntax, expected):
    headers = [header_at(k, LossyImageCompression=tag) for k, tag in enumerate(tags)]
    like = stack_of([replace(slice_of(h, "x"), transfer_syntax=syntax) for h in headers])
    made(tmp_path / "out", like)
    assert {f.get("LossyImageCompression") for f in read_back(tmp_path / "out")} == {expected}


def test_burned_in_names_are_never_denied(tmp_path):
    headers = [header_at(k, BurnedInAnnotation=word) for k, word in enumerate(["NO", "YES", "NO"])]
    made(tmp_path / "out", stack_of([slice_of(h, "x") for h in headers]))
    assert {f.BurnedInAnnotation for f in read_back(tmp_path / "out")} == {"YES"}
    made(tmp_path / "absent", series())
    assert not any("BurnedInAnnotation" in f for f in read_back(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("part", "side", "expected"),
    [
        ("CHEST", None, "absent"),
        ("CHEST", "L", "absent"),
        ("LUNG", None, ""),
        ("LUNG", "R", "R"),
        (None, None, ""),
    ],
)
def test_a_side_is_named_where_the_body_part_has_two(tmp_path, part, side, expected):
    made(tmp_path / "out", series(BodyPartExamined=part, Laterality=side))
    assert read_back(tmp_path / "out")[0].get("Laterality", "absent") == expected


def test_a_trial_keeps_all_that_it_must_say(tmp_path):
    made(tmp_path / "out", series(ClinicalTrialSponsorName="S", ClinicalTrialProtocolID="P"))
    found = read_back(tmp_path / "out")[0]
    assert (found.ClinicalTrialSponsorName, found.ClinicalTrialProtocolID) == ("S", "P")
    assert (found.ClinicalTrialProtocolName, found.ClinicalTrialSiteID, found.ClinicalTrialSiteName) == (
        "",
    ) * 3


def test_a_removed_tilt_is_no_tilt_any_more(tmp_path):
    like = series(GantryDetectorTilt=14)
    made(tmp_path / "kept", like)
    made(tmp_path / "out", like, record=RECORD | {"tilt_removed_deg": 14.0})
    kept, found = (read_back(tmp_path / name)[0] for name in ("kept", "out"))
    assert (kept.GantryDetectorTilt, found.GantryDetectorTilt) == (14, 0)
    assert [c.CodeValue for c in kept.DerivationCodeSequence] == ["113085"]
    assert [c.CodeValue for c in found.DerivationCodeSequence] == ["113085", "113072"]
    assert like.slices[0].header.GantryDetectorTilt == 14  # the source's record is not written to


def test_what_is_not_known_to_be_harmless_does_not_pass(tmp_path):
    headers = []
    for k in range(3):
        header = header_at(k, ImageComments="a note", PatientIdentityRemoved="YES", WindowWidth=0)
        header.add_new(0x00091001, "LO", "private")
        header.add_new(0x60003000, "OW", b"\0\0")
        item = Dataset()
        item.PatientID, item.TypeOfPatientID = "other", "TEXT"
        item.add_new(0x00091001, "LO", "private")
        header.OtherPatientIDsSequence = [item]
        headers.append(header)
    made(tmp_path / "out", stack_of([slice_of(h, "x") for h in headers]))
    found = read_back(tmp_path / "out")[0]
    assert not any(
        e.tag.is_private or e.tag.group >= 0x6000 for e in found.iterall() if e.tag.group != 0x7FE0
    )
    assert found.OtherPatientIDsSequence[0].PatientID == "other"
    for absent in ("ImageComments", "PatientIdentityRemoved", "WindowWidth", "WindowCenter"):
        assert absent not in found  # the last three: half a statement is an error of its own


def test_an_attribute_that_cannot_be_read_is_left_out(tmp_path):
    broken = {
        "KVP": ("DS", b"120 kV"),
        "PatientAge": ("AS", b"0Y"),
        "SpiralPitchFactor": ("FD", b"123"),
        "SeriesNumber": ("UI", b"1.2"),
        "GeneratorPower": ("IS", b"1\\2 "),
        "TableSpeed": ("FD", b"\0\0\0\0\0\0\xf8\x7f"),  # not a number
    }
    headers = [header_at(k) for k in range(3)]
    for header in headers:
        for keyword, (kind, value) in broken.items():
            tag = pydicom.tag.Tag(keyword)
            header[tag] = pydicom.dataelem.RawDataElement(tag, kind, len(value), value, 0, False, True)
    made(tmp_path / "out", stack_of([slice_of(h, "x") for h in headers]))
    found = read_back(tmp_path / "out")[0]
    assert (found.KVP, found.SeriesNumber) == (None, 1000)
    assert not any(k in found for k in ("PatientAge", "SpiralPitchFactor", "TableSpeed", "GeneratorPower"))


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_names_that_no_character_set_explains_keep_their_bytes_and_get_one(tmp_path, encoding):
    raw = "Ångström^Åsa".encode(encoding)
    headers = [header_at(k, SpecificCharacterSet=None) for k in range(3)]
    for header in headers:
        tag = pydicom.tag.Tag("PatientName")
        header[tag] = pydicom.dataelem.RawDataElement(tag, "PN", len(raw), raw, 0, False, True)
    made(tmp_path / "out", stack_of([slice_of(h, "x") for h in headers]))
    assert {str(found.PatientName) for found in read_back(tmp_path / "out")} == {"Ångström^Åsa"}
    assert all(raw in path.read_bytes() for path in (tmp_path / "out").glob("*.dcm"))


def test_a_source_without_uids_gets_a_study_and_a_frame_of_its_own(tmp_path):
    absent = dict.fromkeys(["StudyInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID"])
    like = series(3, **absent)
    affine, shape = thin_grid(like)
    hu = hu_of(shape)
    warnings = write_series(
        tmp_path / "out", [(0, hu)], like, affine, shape,
        padding_value=None, overwrite=False, record=RECORD,
    )  # fmt: skip
    assert len(warnings) == 2
    found = read_back(tmp_path / "out")
    assert len({(f.StudyInstanceUID, f.FrameOfReferenceUID) for f in found}) == 1
    assert found[0].StudyInstanceUID != found[0].FrameOfReferenceUID
    assert "SourceImageSequence" not in found[0]
    assert "ReferencedSeriesSequence" not in found[0]


def enhanced(n: int = 4) -> Stack:
    """The plain series as one multi-frame object, frames in falling order."""
    header = header_at(0, SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1", KVP=None, XRayTubeCurrent=None)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ConvolutionKernel"):
        del header[keyword]
    header.WindowWidth = 1  # of the top level: not what the frames say

    def group(**sequences):
        out = Dataset()
        for keyword, values in sequences.items():
            item = Dataset()
            for name, value in values.items():
                setattr(item, name, value)
            setattr(out, keyword, [item])
        return out

    header.SharedFunctionalGroupsSequence = [
        group(
            PixelMeasuresSequence={"PixelSpacing": [0.75, 0.5], "SliceThickness": 2.5},
            PlaneOrientationSequence={"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
            CTReconstructionSequence={"ConvolutionKernel": "FC08"},
            FrameVOILUTSequence={"WindowCenter": 50, "WindowWidth": 350},
        )
    ]
    header.PerFrameFunctionalGroupsSequence = [
        group(
            PlanePositionSequence={"ImagePositionPatient": [-10.0, -20.0, 30.0 + 2.5 * k]},
            CTExposureSequence={"XRayTubeCurrentInmA": 200.4 + k, "ExposureTimeInms": 500.0},
            CTXRayDetailsSequence={"KVP": 135.0},
            FrameContentSequence={"FrameAcquisitionNumber": 7},
        )
        for k in reversed(range(n))
    ]
    return stack_of([slice_of(header, "mf.dcm", frame) for frame in range(n)])


def test_a_multi_frame_source_gives_its_frames_values(tmp_path):
    like = enhanced(6)
    made(tmp_path / "out", like)
    found = read_back(tmp_path / "out")
    assert {f.SOPClassUID for f in found} == {"1.2.840.10008.5.1.4.1.1.2"}
    assert [int(f.XRayTubeCurrent) for f in found] == [200 + k // 2 for k in range(12)]
    assert {(int(f.ExposureTime), int(f.KVP), int(f.AcquisitionNumber)) for f in found} == {(500, 135, 7)}
    assert {(f.ConvolutionKernel, int(f.WindowWidth)) for f in found} == {("FC08", 350)}
    assert not any("SharedFunctionalGroupsSequence" in f for f in found)
    (source,) = found[0].SourceImageSequence  # one object, four of its frames, counted from 1
    assert list(source.ReferencedFrameNumber) == [3, 4, 5, 6]


# UIDs


def test_the_same_input_gives_the_same_bytes_whatever_slabs_it_comes_in(tmp_path):
    hu = made(tmp_path / "a", series(), cut=8)
    made(tmp_path / "b", series(), slabs=[(k, hu[k : k + 1]) for k in reversed(range(8))])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) == 9


def uids(folder: Path) -> set[str]:
    found = read_back(folder)
    assert all(f.SOPInstanceUID == f.file_meta.MediaStorageSOPInstanceUID for f in found)
    return {f.SOPInstanceUID for f in found} | {f.SeriesInstanceUID for f in found}


@pytest.mark.parametrize(
    "change",
    [
        "one pixel",
        {"record": RECORD | {"request": {"profile": "box"}}},
        {"record": RECORD | {"weights_sha256": None}},
        {"record": RECORD | {"ctsr_version": "0.1.1"}},
        {"padding_value": -3024},
        {"random_uids": True},
        {"like": series(SOPInstanceUID="1.2.4")},
    ],
    ids=str,
)
def test_whatever_differs_no_uid_is_used_twice(tmp_path, change):
    hu = made(tmp_path / "a", series())
    if change == "one pixel":
        hu, change = hu.copy(), {}
        hu[2, 3, 4] += 1
    made(tmp_path / "b", change.pop("like", series()), hu=hu, **change)
    a, b = uids(tmp_path / "a"), uids(tmp_path / "b")
    assert len(a) == len(b) == 9  # eight slices and their series
    assert not a & b  # nor of slices whose pixels are equal: an image belongs to one series


def test_uids_are_uuids_of_44_characters(tmp_path):
    made(tmp_path / "a", series())
    for uid in uids(tmp_path / "a"):
        assert len(uid) == 44
        assert uuid.UUID(int=int(uid.removeprefix("2.25."))).version == 8


# The folder


def test_files_are_numbered_private_and_beside_a_record(tmp_path):
    made(tmp_path / "out", series())
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [f"IM{k:06d}.dcm" for k in range(1, 9)] + ["ctsr.json"]
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()} == {0o600}
    text = (tmp_path / "out" / "ctsr.json").read_text()
    assert json.loads(text)["model"] == "baseline"
    for identity in ("4711", "ngstr", "1.2.3", "2.25.", "20200102"):
        assert identity not in text


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, ValueError])
def test_nothing_is_left_after_a_failure_in_the_middle(tmp_path, failure):
    def slabs():
        yield 0, hu_of((10, 12, 3))
        raise failure

    with pytest.raises(failure):
        made(tmp_path / "out", series(), slabs=slabs())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename"])
def test_nothing_is_left_when_the_disk_fails(tmp_path, monkeypatch, call):
    real, calls = getattr(os, call), []

    def failing(*args, **kwargs):
        calls.append(args)
        if call == "rename" or len(calls) == 9:  # in the middle, or at the end
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(ResourceError, match="no space left"):
        made(tmp_path / "out", series(40))
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_leaves_the_old_series(tmp_path, monkeypatch):
    made(tmp_path / "out", series())
    before = contents(tmp_path / "out")
    real, calls = os.rename, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:  # the old folder is out of the way, the new one not in place yet
            raise OSError(5, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(ResourceError):
        made(tmp_path / "out", series(6), overwrite=True)
    monkeypatch.undo()
    assert contents(tmp_path / "out") == before
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_run_left_is_swept(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    old, fresh = (tmp_path / f".ctsr-{dead.pid}-{n:06x}.part" for n in (1, 2))
    for folder in (old, fresh):
        folder.mkdir()
        (folder / "0.pixels").write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    made(tmp_path / "out", series())
    assert not old.exists()
    assert fresh.exists()  # another host's, perhaps


def test_an_own_series_is_replaced_only_when_asked(tmp_path):
    made(tmp_path / "out", series())
    with pytest.raises(UsageError, match="exists already"):
        made(tmp_path / "out", series())
    made(tmp_path / "out", series(6), overwrite=True)
    assert len(list((tmp_path / "out").iterdir())) == 13


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    made(tmp_path / "out", series())
    assert len(list((tmp_path / "out").iterdir())) == 9


@pytest.mark.parametrize("foreign", ["notes.txt", "IM000099.dcm", "no record"])
def test_what_others_wrote_is_never_replaced(tmp_path, foreign):
    made(tmp_path / "out", series())
    if foreign == "no record":
        (tmp_path / "out" / "ctsr.json").unlink()
    else:
        (tmp_path / "out" / foreign).write_bytes(b"\0" * 128 + b"DICM of a scanner")
    before = contents(tmp_path / "out")
    with pytest.raises(UsageError, match="not only what ctsr wrote"):
        made(tmp_path / "out", series(), overwrite=True)
    assert contents(tmp_path / "out") == before


def test_the_source_is_never_written_to(tmp_path):
    made(tmp_path / "source", series())
    path = tmp_path / "source" / "IM000001.dcm"
    like = stack_of([slice_of(header_at(k), "x", path=path) for k in range(3)])
    with pytest.raises(UsageError, match="the input itself"):
        check_series(tmp_path / "source", overwrite=True, like=like)
    with pytest.raises(UsageError, match="the input itself"):
        check_series(tmp_path, overwrite=True, like=like)
    check_series(tmp_path / "other", overwrite=False, like=like)


@pytest.mark.parametrize(
    ("slabs", "reason"),
    [
        ([(0, np.zeros((7, 12, 10)))], "1 of 8 slices did not come"),
        ([(0, np.zeros((8, 12, 10))), (7, np.zeros((1, 12, 10)))], "slice 7 comes twice"),
        ([(1, np.zeros((8, 12, 10)))], "a slab of"),
        ([(0, np.zeros((8, 10, 12)))], "a slab of"),
        ([(0, np.full((8, 12, 10), np.nan))], "not finite"),
    ],
)
def test_slabs_that_are_not_the_volume_are_a_broken_contract(tmp_path, slabs, reason):
    with pytest.raises(ValueError, match=reason):
        made(tmp_path / "out", series(), slabs=slabs)
    assert list(tmp_path.iterdir()) == []


def test_a_grid_that_no_series_can_hold_is_refused(tmp_path):
    affine, _ = thin_grid(series())
    sheared, left_handed = affine.copy(), affine.copy()
    sheared[1, 2] += 0.1
    left_handed[:3, 2] *= -1
    for bad in (sheared, left_handed):
        with pytest.raises(GeometryError, match="not orthogonal, or its slices run against row × column"):
            made(tmp_path / "out", series(), affine=bad)


def test_a_file_that_does_not_read_back_is_not_put_in_place(tmp_path, monkeypatch):
    real = write._finish

    def spoiling(temporary, k, header, folder):
        size = real(temporary, k, header, folder)
        if k == 3:
            path = Path(temporary, "IM000004.dcm")
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        return size

    monkeypatch.setattr(write, "_finish", spoiling)
    with pytest.raises(ResourceError, match=r"IM000004\.dcm does not read back as it was written: pixels"):
        made(tmp_path / "out", series())
    assert list(tmp_path.iterdir()) == []


# An image file that borrows a series


def thick_grid(stack: Stack) -> tuple[np.ndarray, tuple[int, int, int]]:
    return thin_grid(stack, 1)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("flips", [(), (1,), (0, 2)])
def test_an_image_in_any_storage_order_is_turned_as_the_series_is(order, flips):
    stack = series()
    affine, shape = thick_grid(stack)
    data = hu_of(shape).T
    stored, turned = data.transpose(order), affine[:, [*order, 3]].copy()
    for axis in flips:
        stored = np.flip(stored, axis)
        turned[:, 3] += turned[:, axis] * (stored.shape[axis] - 1)
        turned[:, axis] *= -1
    found = check_like(Volume(stored, turned, slice_thickness=2.5), stack)
    np.testing.assert_allclose(found.affine, affine, atol=1e-9)
    np.testing.assert_array_equal(found.data, data)
    assert (found.slice_axis, found.slice_thickness) == (2, 2.5)


def test_an_image_that_is_not_of_the_series_is_refused():
    stack = series()
    affine, shape = thick_grid(stack)
    data = np.zeros(shape, np.int16)
    moved, turned, larger = affine.copy(), affine.copy(), affine.copy()
    moved[2, 3] += 50  # mm: the series ends 7.5 mm above its first slice
    a = np.radians(5)
    turned[:3, :3] = [[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]] @ affine[:3, :3]
    larger[:3, :2] *= 1.01
    for bad, reason in (
        (moved, "42.5 mm outside"),
        (turned, "turned by 5°"),
        (larger, "0.505 × 0.7575 against 0.5 × 0.75"),
    ):
        with pytest.raises(GeometryError, match=reason):
            check_like(Volume(data, bad), stack)
    cropped = affine.copy()
    cropped[:3, 3] += affine[:3, 0] * 3
    check_like(Volume(data[3:], cropped), stack)


# Through our own reader


def again(tmp_path: Path, stack: Stack) -> None:
    """Write what the reader makes of a stack as a series, and read that: the same volume."""
    before = read_stack(stack, pad_hu=None)
    volume = before.volume
    write_series(
        tmp_path / "out", [(0, volume.data.transpose(2, 1, 0))], stack, volume.affine, volume.shape,
        padding_value=before.padding_value, overwrite=False, record=RECORD,
    )  # fmt: skip
    (derived,) = scan(tmp_path / "out").stacks
    after = read_stack(derived, pad_hu=None)
    np.testing.assert_array_equal(after.volume.data, volume.data)
    np.testing.assert_allclose(after.volume.affine, volume.affine, atol=1e-6)  # mm
    assert after.padding_value == before.padding_value
    assert (derived.study_uid, derived.patient_id) == (stack.study_uid, stack.patient_id)


def test_the_reader_finds_in_a_series_what_was_written(tmp_path):
    made(tmp_path / "first", series(Rows=20, Columns=18, PatientName="A^B"))
    (stack,) = scan(tmp_path / "first").stacks
    again(tmp_path, stack)


@pytest.mark.ci
@pytest.mark.parametrize(
    "name",
    [
        "philips-study",
        "ge-pad-minus2000",
        "legacy-enhanced-ct/multiframe",
        "siemens-tilt",
        "dicomdir/98892001/CT5N",
    ],
)
def test_a_real_series_goes_through_reader_and_writer_unchanged(tmp_path, reference_data, name):
    (stack,) = scan(reference_data.parent / "dicom" / name).stacks
    again(tmp_path, stack)


# Real series, and DICOM's own judge


def real_stack(folder: Path) -> Stack:
    return stack_of([s for header in find(folder) for s in slices_of(header)])


REAL = [
    "philips-study/S2010",
    "ge-pad-minus2000",
    "legacy-enhanced-ct/classic",
    "legacy-enhanced-ct/multiframe",
    "siemens-tilt",
    "ge-missing-slice",
    "dicomdir/98892001/CT5N",
]


@pytest.mark.ci
@pytest.mark.parametrize("name", REAL)
def test_a_series_derived_from_a_real_one_passes_dciodvfy(tmp_path, reference_data, name):
    source = reference_data.parent / "dicom" / name
    made(tmp_path / "out", real_stack(source), padding_value=-3024)
    files = sorted((tmp_path / "out").glob("*.dcm"))
    for file in (files[0], files[-1]):
        told = subprocess.run(["dciodvfy", file], capture_output=True, text=True, check=False)
        assert "CTImage" in told.stderr + told.stdout
        assert [line for line in (told.stderr + told.stdout).splitlines() if line.startswith("Error")] == []
    given = [p for p in source.iterdir() if p.is_file()]
    told = subprocess.run(["dcentvfy", *files, *given], capture_output=True, text=True, check=False)
    header = pydicom.dcmread(given[0], stop_before_pixels=True)
    differing = set(re.findall(r"Element=<(\w+)>", told.stderr + told.stdout))
    if (
        header.get("PatientAge") == "0Y"
    ):  # no age: it would be an error in the new series as it is in the source
        differing -= {"PatientAge"}
    assert [d for d in differing if header.get(d)] == []  # type 2 that the source lacks is there, empty
