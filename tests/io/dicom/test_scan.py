"""Which images make a volume: every file is in a stack, skipped or refused, and the reason is the true one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import RLELossless

from ctsr.io.dicom.records import Scan
from ctsr.io.dicom.scan import scan
from tests.io.dicom.make import Block, Edit, block, only, planes, put, series, without

SMALL = {"shape": (16, 20)}
STACK = planes(6, **SMALL)
CORONAL = {"row": (1, 0, 0), "column": (0, 0, -1), **SMALL}


def scanned(folder: Path, *blocks: Block, **options: bool) -> Scan:
    """What the blocks give; every file has exactly one outcome."""
    series(folder, *blocks)
    return whole(folder, scan(folder, **options))


def whole(folder: Path, found: Scan) -> Scan:
    n_files = sum(path.is_file() for path in folder.rglob("*"))
    in_stacks = [{s.file.name for s in stack.slices} for stack in found.stacks]
    skipped = [s.name for s in found.skipped if " frame " not in s.name]
    n_refused = sum(r.n_files for r in found.refused)
    assert len(set().union(*in_stacks)) + len(skipped) + n_refused == n_files
    assert not set().union(*in_stacks) & set(skipped)
    return found


def sizes(found: Scan) -> dict[str, int]:
    return {stack.label: len(stack.slices) for stack in found.stacks}


def warnings(found: Scan) -> set[str]:
    return {warning for stack in found.stacks for warning in stack.warnings}


# what is no slice


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (put(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localizer"),
        (put(ImageType=["ORIGINAL", "PRIMARY", "AXIAL", "TOPOGRAM"]), "localizer"),
        (put(ImageType=["DERIVED", "SECONDARY", "PROJECTION IMAGE"]), "a projection, not slices"),
        (put(ImageType=["DERIVED", "SECONDARY", "AXIAL", "X", "MINIP"]), "a projection, not slices"),
        (put(ImageType=["DERIVED", "PRIMARY", "AXIAL", "MAT_REMOVED"]), "not HU (MAT_REMOVED)"),
        (put(SamplesPerPixel=3, PhotometricInterpretation="RGB"), "not a grey CT image (RGB, 16 bit)"),
        (put(BitsAllocated=32), "not a grey CT image (MONOCHROME2, 32 bit)"),
        (put(PhotometricInterpretation="<b>Doe^Jane"), "not a grey CT image (unknown colours, 16 bit)"),
        (without("ImagePositionPatient"), "no ImagePositionPatient"),
        (put(PixelSpacing=None), "no PixelSpacing"),
        (without("PixelData"), "no PixelData"),
        (without("Rows"), "no Rows"),
        (put(PixelSpacing=["0", "0.7"]), "PixelSpacing is 0 × 0.7 mm"),
        (put(Rows=15), "an image of 20 × 15 pixels"),
        (put(SOPClassUID="1.2.3.4"), "unknown SOP class"),
        (put(SOPClassUID="1.2.840.10008.5.1.4.1.1.4"), "MR Image"),
    ],
)
def test_what_is_no_slice_is_skipped_with_its_reason(tmp_path: Path, edit: Edit, reason: str) -> None:
    found = scanned(tmp_path, block(planes(7, **SMALL), only(6, edit)))
    assert sizes(found) == {"": 6}
    assert [(s.name, s.reason) for s in found.skipped] == [("006.dcm", reason)]


def test_spectral_images_in_hu_are_kept(tmp_path: Path) -> None:
    edit = put(ImageType=["DERIVED", "PRIMARY", "AXIAL", "VMI"])
    assert sizes(scanned(tmp_path, block(STACK, edit))) == {"": 6}


@pytest.mark.parametrize("value", ["1_0", "nan", "1,5", "-1e9"])
def test_a_position_that_is_no_plain_number_is_none(tmp_path: Path, value: str) -> None:
    series(tmp_path, block(STACK))
    path = tmp_path / "005.dcm"
    tag = b"\x20\x00\x32\x00DS"
    raw = path.read_bytes()
    at = raw.index(tag) + 8
    path.write_bytes(
        raw[:at] + value.encode().ljust(raw[at:].index(b"\\")) + raw[at + raw[at:].index(b"\\") :]
    )
    found = whole(tmp_path, scan(tmp_path))
    assert [s.reason for s in found.skipped] == ["no ImagePositionPatient"]


def test_originals_only_leaves_derived_images_out(tmp_path: Path) -> None:
    reformatted = block(STACK, put(ImageType=["DERIVED", "SECONDARY", "MPR"]), series="22")
    derived = block(STACK, put(ImageType=["DERIVED", "SECONDARY", "AXIAL"]), series="333")
    both = scanned(tmp_path, block(STACK), reformatted, derived)
    assert [len(stack.slices) for stack in both.stacks] == [6, 6, 6]
    assert warnings(both) == {"derived images (MPR)", "derived images"}
    found = whole(tmp_path, scan(tmp_path, originals_only=True))
    assert sizes(found) == {"": 6}
    assert {s.reason for s in found.skipped} == {"a derived image (--originals-only)"}


# what belongs together


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (put(ConvolutionKernel=["Br40d", "3"]), "(kernel STANDARD, Br40d\\3)"),
        (put(KVP="80.0"), "(kV 120, 80)"),
        (put(PixelSpacing=["0.9", "0.7502"]), "(pixel spacing 0.9 × 0.75, 0.9 × 0.7502)"),
        (put(ReconstructionDiameter="300"), "(field of view not given, 300)"),
        (
            put(ImageOrientationPatient=["1", "0.0002", "0", "-0.0002", "1", "0"]),
            "(they differ in orientation)",
        ),
        (put(FrameOfReferenceUID="1.2.3"), "(they differ in frame of reference)"),
        (put(ImageType=["DERIVED", "SECONDARY", "AXIAL"]), "(they differ in image type)"),
    ],
)
def test_images_that_differ_in_a_trait_are_two_stacks(tmp_path: Path, change: Edit, told: str) -> None:
    found = scanned(tmp_path, block(STACK), block(planes(7, 1.25, **SMALL), change))
    assert sizes(found) == {"a": 6, "b": 7}
    assert f"series holds 2 stacks {told}" in warnings(found)


@pytest.mark.parametrize(
    "change",
    [
        put(PixelSpacing=["0.90001", "0.75"]),
        put(ImageOrientationPatient=["1", "0.00002", "0", "0", "1", "0"]),
        put(AcquisitionNumber=lambda k: k),
        put(ImageType=["ORIGINAL", "PRIMARY", "AXIAL", "ADD"]),
        put(KVP="120.0"),
        put(SliceThickness="3"),
        put(Manufacturer="B"),
    ],
)
def test_images_that_differ_in_nothing_that_counts_are_one_stack(tmp_path: Path, change: Edit) -> None:
    found = scanned(tmp_path, block(STACK[:3]), block(STACK[3:], change))
    assert sizes(found) == {"": 6}


def test_a_kernel_that_is_free_text_does_not_reach_messages_whole(tmp_path: Path) -> None:
    edit = put(ConvolutionKernel="<Doe^Jane>[/b]" * 9)
    found = scanned(tmp_path, block(STACK), block(planes(7, 1.25, **SMALL), edit))
    (warning,) = warnings(found)
    assert not set("<>^[]") & set(warning)
    assert len(warning) < 90


def test_one_image_with_another_trait_is_skipped_and_says_which(tmp_path: Path) -> None:
    found = scanned(tmp_path, block(STACK), block(STACK[:2], put(ConvolutionKernel="BONE")))
    assert sizes(found) == {"": 6}
    assert {s.reason for s in found.skipped} == {"2 images with another kernel"}


def test_a_few_images_across_the_others_are_localizers_whatever_they_say(tmp_path: Path) -> None:
    found = scanned(tmp_path, block(STACK), block(planes(4, **CORONAL)))
    assert sizes(found) == {"": 6}
    assert {s.reason for s in found.skipped} == {"localizer"}


def test_half_a_series_across_the_other_half_is_a_stack(tmp_path: Path) -> None:
    assert sizes(scanned(tmp_path, block(STACK), block(planes(6, **CORONAL)))) == {"a": 6, "b": 6}


def test_series_without_a_uid_are_told_apart_by_folder(tmp_path: Path) -> None:
    series(tmp_path / "x", block(STACK, without("SeriesInstanceUID")))
    series(tmp_path / "y", block(planes(4, **SMALL), without("SeriesInstanceUID"), series="333"))
    found = whole(tmp_path, scan(tmp_path))
    assert [len(stack.slices) for stack in found.stacks] == [6, 4]
    assert {stack.series_uid for stack in found.stacks} == {""}
    assert warnings(found) == {"no SeriesInstanceUID"}


def test_slices_rise_along_their_normal_whatever_the_names_are(tmp_path: Path) -> None:
    for k, downward in enumerate((False, True)):
        found = scanned(
            tmp_path / str(k), block(planes(6, row=(-1, 0, 0) if downward else (1, 0, 0), **SMALL)[::-1])
        )
        (stack,) = found.stacks
        assert (np.diff([s.at for s in stack.slices]) > 0).all()
        assert stack.slices[0].file.name == "005.dcm"


# the same image, or the same place, twice


def test_a_copy_is_skipped_and_names_its_original(tmp_path: Path) -> None:
    series(tmp_path, block(STACK))
    (tmp_path / "z").mkdir()
    shutil.copy(tmp_path / "003.dcm", tmp_path / "z" / "copy.dcm")
    found = whole(tmp_path, scan(tmp_path))
    assert sizes(found) == {"": 6}
    assert [(s.name, s.reason) for s in found.skipped] == [("z/copy.dcm", "duplicate of 003.dcm")]


def test_a_whole_series_twice_is_one_volume(tmp_path: Path) -> None:
    for k, storage in enumerate(({"frames": True}, {"syntax": RLELossless}, {})):
        folder = tmp_path / str(k)
        series(folder / "a", block(STACK, **storage))
        shutil.copytree(folder / "a", folder / "b")
        found = whole(folder, scan(folder))
        assert sizes(found) == {"": 6}
        assert len(found.skipped) == len(list((folder / "b").iterdir()))


def test_one_identifier_on_two_images_is_refused_even_where_their_pixels_are_equal(tmp_path: Path) -> None:
    same = put(SOPInstanceUID="1.2.3", PixelData=bytes(640))
    found = scanned(tmp_path, block(STACK, same))
    assert [(r.n_files, r.reason) for r in found.refused] == [
        (6, "two different images share SOPInstanceUID: 000.dcm and 001.dcm")
    ]


def test_equal_bytes_of_another_scale_are_two_images(tmp_path: Path) -> None:
    other = block(STACK[2:3], put(RescaleIntercept="-1000"), intercept=-1024.0)
    assert [r.reason for r in scanned(tmp_path, block(STACK), other).refused] == [
        "1 of 6 positions hold more than one image"
    ]


@pytest.mark.parametrize(
    "name", ["AcquisitionNumber", "TemporalPositionIdentifier", "TriggerTime", "ContentTime", "SeriesTime"]
)
def test_phases_are_split_by_what_tells_them_apart(tmp_path: Path, name: str) -> None:
    phases = [block(planes(6, offset=50 * k, **SMALL), put(**{name: str(100 + k)})) for k in range(3)]
    found = scanned(tmp_path, *phases)
    assert sizes(found) == {"a": 6, "b": 6, "c": 6}
    assert warnings(found) == {f"3 phases in one series, split by {name}"}
    for stack in found.stacks:
        assert len({s.header[name].value for s in stack.slices}) == 1


def test_phases_that_agree_in_one_image_are_still_two_whole_volumes(tmp_path: Path) -> None:
    first, second = STACK, planes(6, offset=50, **SMALL)
    second[2] = STACK[2]
    found = scanned(tmp_path, block(first, put(AcquisitionNumber=1)), block(second, put(AcquisitionNumber=2)))
    assert sizes(found) == {"a": 6, "b": 6}


@pytest.mark.parametrize("name", ["AcquisitionNumber", "TemporalPositionIdentifier", "ContentTime"])
def test_phases_that_lie_between_each_other_are_one_volume_and_told(tmp_path: Path, name: str) -> None:
    alternating = block(STACK, put(**{name: lambda k: str(101500 + k % 2)}))
    told = f"slices of 2 phases lie between each other (by {name}): read as one volume"
    found = scanned(tmp_path, alternating)
    assert sizes(found) == {"": 6}
    assert warnings(found) == {told}


def test_phases_of_which_one_has_a_hole_are_refused(tmp_path: Path) -> None:
    second = planes(6, offset=50, **SMALL)
    del second[2]
    found = scanned(tmp_path, block(STACK, put(AcquisitionNumber=1)), block(second, put(AcquisitionNumber=2)))
    assert [r.reason for r in found.refused] == ["5 of 6 positions hold more than one image"]


# what can't be read rightly


def cut_short(folder: Path) -> None:
    path = folder / "003.dcm"
    path.write_bytes(path.read_bytes()[:-400])


@pytest.mark.parametrize(
    ("edit", "spoil", "reason"),
    [
        (put(), cut_short, "pixel data of 003.dcm is cut short (240 of 640 bytes)"),
        (put(NumberOfFrames=2), None, "000.dcm holds 2 frames and is a classic CT image, which has 1"),
        (put(Rows=60000, Columns=60000), None, "000.dcm holds 6.7 GiB of pixels, at most 2 are read"),
        (put(RescaleSlope="0"), None, "000.dcm: RescaleSlope is 0"),
        (put(HighBit=3), None, "000.dcm: BitsStored 16 and HighBit 3 do not fit together"),
    ],
)
def test_what_can_not_be_read_rightly_refuses_its_series_alone(
    tmp_path: Path, edit: Edit, spoil: Callable[[Path], None] | None, reason: str
) -> None:
    series(tmp_path, block(STACK, edit))
    if spoil:
        spoil(tmp_path)
    series(tmp_path / "other", block(STACK, series="333"))
    found = whole(tmp_path, scan(tmp_path))
    assert sizes(found) == {"": 6}
    assert found.refused[0].reason.startswith(reason)
    assert found.refused[0].n_files == 6


def test_pixel_data_longer_than_the_image_are_a_warning(tmp_path: Path) -> None:
    for k, (more, told) in enumerate([(2, {"pixel data are longer than the image"}), (0, set())]):
        found = scanned(
            tmp_path / str(k),
            block(STACK, lambda d, _, n=more: setattr(d, "PixelData", d.PixelData + bytes(n))),
        )
        assert warnings(found) == told


def test_pixels_lie_where_the_slice_says(tmp_path: Path) -> None:
    for k, frames in enumerate((False, True)):
        (stack,) = scanned(tmp_path / str(k), block(STACK, frames=frames)).stacks
        for s in stack.slices:
            data = dcmread(s.file.path)
            expected = (
                data.PixelData if s.frame is None else data.PixelData[640 * s.frame : 640 * (s.frame + 1)]
            )
            assert s.file.path.read_bytes()[s.pixel_offset + 640 * (s.frame or 0) :][:640] == expected


# multi-frame


@pytest.mark.parametrize("is_undefined", [False, True])
def test_functional_groups_of_any_length_are_read(tmp_path: Path, is_undefined: bool) -> None:
    def undefined(data, _):
        for tag in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
            data[tag].is_undefined_length = is_undefined
            for item in data[tag].value:
                item.is_undefined_length_sequence_item = is_undefined

    stack = planes(300, 1.0, **SMALL)  # 200 kB of header
    found = scanned(tmp_path, block(stack, undefined, frames=True, shared=()))
    assert sizes(found) == {"": 300}
    assert found.stacks[0].slices[7].kernel == "STANDARD"
    assert found.stacks[0].slices[7].thickness == 2.5


def test_a_frame_that_lacks_its_position_leaves_no_hole(tmp_path: Path) -> None:
    def spoil(data, _):
        del data.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence

    found = scanned(tmp_path, block(STACK, spoil, frames=True))
    assert [(r.n_files, r.reason) for r in found.refused] == [(1, "no ImagePositionPatient")]


def test_a_file_whose_frames_part_is_counted_once(tmp_path: Path) -> None:
    def gap(k: int) -> tuple[float, float, float]:
        return 0, 9.0 * (k == 2), 9.0 * (k == 2)

    stacks = [*planes(4, jump=gap, **SMALL), *planes(4, jump=gap, **CORONAL)]
    found = scanned(tmp_path, block(stacks, frames=True, shared=()))
    assert [r.n_files for r in found.refused] == [1, 0]


# the real sets

REAL = {  # folder: slices of each stack, files skipped, reasons of refusal
    "codec-sign": ([], 0, ["1 slice", "1 slice", "two different images share SOPInstanceUID"]),
    "cs-ct-transfer-syntaxes": ([], 0, ["two different images share SOPInstanceUID"]),
    "dicomdir": ([5], 29, ["slices missing between z=-99.48 and z=103.02"]),
    "enhanced-ct-perfusion-map": ([], 1, []),
    "ge-missing-slice": ([], 0, ["1 slice missing between z=28.11 and z=38.11"]),
    "ge-pad-63536": ([], 0, ["1 slice"]),
    "ge-pad-minus2000": ([3], 0, []),
    "ge-tilt-variable-spacing": ([], 0, ["slice spacing changes from 4.00 to 7.00 mm at index 14"]),
    "incomplete": ([], 4, []),
    "legacy-enhanced-ct": ([3, 3], 0, []),
    "modality-lut": ([], 1, []),
    "no-preamble": ([], 5, ["two different images share SOPInstanceUID"]),
    "not-ct": ([], 10, []),
    "philips-study": ([28], 4, []),
    "siemens-perfusion-one-position": ([], 0, ["1 of 1 positions hold more than one image"]),
    "siemens-tilt": ([4], 0, []),
}


@pytest.fixture
def real(reference_data: Path) -> Path:
    return reference_data.parent / "dicom"


@pytest.mark.ci
@pytest.mark.parametrize("name", REAL)
def test_a_real_set_is_sorted_as_its_index_says(real: Path, name: str) -> None:
    found = whole(real / name, scan(real / name))
    stacks, n_skipped, refused = REAL[name]
    assert [len(stack.slices) for stack in found.stacks] == stacks
    assert len(found.skipped) == n_skipped
    assert len(found.refused) == len(refused)
    assert all(
        r.reason.startswith(words) or words in r.reason
        for r, words in zip(found.refused, refused, strict=True)
    )


@pytest.mark.ci
def test_every_real_file_that_is_no_ct_says_what_it_is(real: Path) -> None:
    found = {s.name: s.reason for name in ("not-ct", "philips-study") for s in scan(real / name).skipped}
    assert found == {
        "MR_small.dcm": "MR Image",
        "SC_rgb_small_odd.dcm": "Secondary Capture Image",
        "image_dfl.dcm": "Secondary Capture Image",
        "liver_1frame.dcm": "Segmentation",
        "notes.txt": "not DICOM",
        "reportsi.dcm": "Basic Text SR",
        "rtdose.dcm": "RT Dose",
        "rtplan.dcm": "RT Plan",
        "rtstruct.dcm": "RT Structure Set",
        "test-SR.dcm": "Comprehensive SR",
        "DICOMDIR": "DICOMDIR",
        "S1000/I10": "localizer",
        "S4010/I10": "Secondary Capture Image",
        "S4010/I50": "Secondary Capture Image",
    }


@pytest.mark.ci
def test_each_real_file_without_preamble_is_one_slice(real: Path, tmp_path: Path) -> None:
    names = [f"ct_small_{form}" for form in ("body_evrbe", "body_evrle", "body_ivrle", "meta_no_preamble")]
    for name in ("CT_small.dcm", *names):
        found = scan(real / "no-preamble" / name)
        assert [r.reason for r in found.refused] == ["1 slice; at least 3 are needed to check the spacing"]


@pytest.mark.ci
def test_split_makes_two_stacks_of_a_real_head(real: Path) -> None:
    found = scan(real / "ge-tilt-variable-spacing", split=True)
    assert sizes(found) == {"a": 14, "b": 14}


@pytest.mark.ci
def test_one_scan_of_all_real_sets_gives_the_volumes_of_each(real: Path) -> None:
    found = whole(real, scan(real))
    assert sorted(len(stack.slices) for stack in found.stacks) == [3, 3, 3, 4, 5, 28]
