"""Every DICOM file ends converted, left out, skipped or refused; nothing of a patient gets out of it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import SecondaryCaptureImageStorage, generate_uid

from ctsr.data.splits import SETS, list_path
from ctsr.errors import GeometryError, InputError, ResourceError, SomeCasesFailed, UsageError
from ctsr.io.dicom import read
from ctsr.io.dicom.scan import scan
from ctsr.io.dicom.sidecar import KEYWORDS, attributes
from ctsr.io.lists import read_table
from ctsr.io.nifti import read_volume
from ctsr.io.provenance import sha256_of
from ctsr.workflows import convert_series
from ctsr.workflows.convert import Outcome, convert, parse_splits
from ctsr.workflows.convert_names import KEY
from ctsr.workflows.convert_select import parse_condition, select
from ctsr.workflows.folder import Case, Report
from ctsr.workflows.requests import Conversion
from ctsr.workflows.simulate import phantoms
from tests.io.dicom.make import Block, block, judge, planes, put, series, without

SECRETS = ("Doe", "SECRET", "1.2.826.77", "Institute^Of", "20200102", "101500")


def a_series(
    patient: str = "SECRET1", name: str = "thin", *edits, n: int = 4, step: float = 1.0, **storage
) -> Block:
    """A small series of a patient, full of what must not get out."""
    secret = put(
        PatientID=patient,
        PatientName=f"Doe^{patient}",
        InstitutionName="Institute^Of",
        StudyInstanceUID=f"1.2.826.77.{sum(patient.encode())}",
        SeriesInstanceUID=uid(patient, name),
        SliceThickness=str(step),
        StudyDescription=f"Doe {patient}",
    )
    return block(
        planes(n, step, offset=offset_of(patient)), secret, *edits, series=f"{patient}-{name}", **storage
    )


def offset_of(patient: str) -> float:
    """HU by which a patient differs from the others."""
    return float(sum(patient.encode()) % 50)


def uid(patient: str, name: str = "thin") -> str:
    return "1.2.826.77.9." + generate_uid(entropy_srcs=[patient, name]).split(".")[-1][:20]


@pytest.fixture
def export(tmp_path) -> Path:
    """What an export holds: series of three patients, one with a gap, a localizer, a dose sheet, a text file."""
    folder = tmp_path / "export"
    for patient in ("SECRET1", "SECRET2", "SECRET3"):
        series(folder / patient / "thin", a_series(patient))
    series(folder / "SECRET1" / "thick", a_series("SECRET1", "thick", step=5.0))
    gap = a_series("SECRET2", "gap", n=6)
    series(
        folder / "SECRET2" / "gap", Block(gap.stack[:2] + gap.stack[3:], *[getattr(gap, f) for f in FIELDS])
    )
    localizer = a_series("SECRET1", "scout", put(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), n=1)
    sheet = a_series("SECRET1", "dose", put(SOPClassUID=SecondaryCaptureImageStorage), n=1)
    series(folder / "SECRET1" / "other", localizer, sheet)
    (folder / "notes.txt").write_text("Doe was here")
    return folder


FIELDS = ("edits", "counts", "series", "syntax", "frames", "storage")


def files_of(folder: Path) -> dict[str, tuple[str, int]]:
    """Relative name → (sha256, mtime in ns)."""
    return {
        p.relative_to(folder).as_posix(): (sha256_of(p), p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def run(source: Path, target: Path | None = None, **options) -> tuple[Outcome, list[str]]:
    said: list[str] = []
    report = Report(said.append, said.append, said.append)
    return convert(source, target, Conversion(**options), report=report), said


def test_every_file_is_in_exactly_one_row(export, tmp_path):
    outcome, said = run(export, project=tmp_path)
    assert sum(row["files"] for row in outcome.table()) == sum(p.is_file() for p in export.rglob("*"))
    told = {(row["outcome"], row["series"], row["files"]) for row in outcome.table()}
    assert ("converted", 4, 16) in told
    assert ("refused", 1, 5) in told
    assert sum(row["files"] for row in outcome.table() if row["outcome"] == "skipped") == 3
    refusals = [line for line in said if "refused: " in line]
    assert len(refusals) == 1
    assert "1 slice missing" in refusals[0]
    with pytest.raises(SomeCasesFailed, match="1 of 5 series refused, the first is SECRET2/gap/"):
        outcome.raise_for_refusals(export)
    json.dumps(outcome.document(), allow_nan=False)


def test_what_is_written_is_right_and_complete(export, tmp_path):
    run(export, project=tmp_path, link=tmp_path / "link.csv")
    data = tmp_path / "data"
    rows = read_table(data / "manifest.csv")
    assert len(rows) == 4
    assert {p.name for p in data.glob("*.nii.gz")} == {row["file"] for row in rows}
    thin = next(row for row in rows if row["spacing_mm"] == "1.0")
    patient = {row["file"]: row["patient_id"] for row in read_table(tmp_path / "link.csv")}[thin["file"]]
    volume = read_volume(data / thin["file"])
    assert (
        judge([(np.asarray(volume.data), volume.affine)], [planes(4, 1.0, offset=offset_of(patient))]) == ""
    )
    assert volume.slice_thickness == 1.0
    assert volume.data.dtype == np.int16
    record = json.loads((data / thin["file"]).with_name(thin["file"].replace(".nii.gz", ".json")).read_text())
    assert record["SpacingBetweenSlices"] == record["SliceThickness"] == 1.0
    assert record["output_sha256"] == thin["sha256"] == sha256_of(data / thin["file"])


def test_nothing_of_the_patient_is_written_or_said(export, tmp_path):
    outcome, said = run(export, project=tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_relative_to(export):
            continue
        text = path.name + (path.read_bytes().decode("latin-1") if path.is_file() else "")
        assert not [s for s in SECRETS if s in text], path
    names = re.compile(r"SECRET\d/\S+")  # folders are the user's own words
    for line in [*said, json.dumps(outcome.document()).replace("\\u", "")]:
        assert not [s for s in SECRETS if s in names.sub("", line)], line


def test_a_header_in_an_exception_goes_no_further(export, tmp_path, monkeypatch):
    def leak(*args, **kwargs):
        raise ValueError("bad value in (0010,0010) 'Doe^SECRET1'")

    monkeypatch.setattr(read, "read_stack", leak)
    outcome, said = run(export / "SECRET1" / "thin", project=tmp_path, workers=1)
    assert [row["reason"] for row in outcome.refused] == ["can't be read: ValueError"]
    assert "Doe" not in "".join(said)
    assert not list((tmp_path / "data").glob("*"))


def test_patients_keep_name_and_set_when_more_is_converted(export, tmp_path):
    run(export / "SECRET1" / "thin", project=tmp_path)
    (before,) = read_table(tmp_path / "data" / "manifest.csv")
    run(export, project=tmp_path, skip_existing=True)
    rows = read_table(tmp_path / "data" / "manifest.csv")
    assert before["set"] == "train"
    same = [row for row in rows if row["patient"] == before["patient"]]
    assert {row["set"] for row in same} == {"train"}
    assert {row["file"].split("_")[0] for row in same} == {before["patient"]}
    assert len(same) == 2
    assert {row["set"] for row in rows} == set(SETS)  # three patients: no set is empty


def test_another_project_has_another_key_and_other_names(export, tmp_path):
    source = export / "SECRET1" / "thin"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run(source, project=tmp_path / name)
        assert (tmp_path / name / KEY).stat().st_mode & 0o777 == 0o600
    a, b = ({p.name for p in (tmp_path / name / "data").glob("*.nii.gz")} for name in "ab")
    assert not a & b
    run(source, tmp_path / "a" / "data", overwrite=True)  # the folder that OUT is in is the project
    assert {p.name for p in (tmp_path / "a" / "data").glob("*.nii.gz")} == a


def test_a_lost_key_is_not_replaced_by_another(export, tmp_path):
    run(export / "SECRET1" / "thin", project=tmp_path)
    (tmp_path / KEY).unlink()
    with pytest.raises(UsageError, match="named with it"):
        run(export, project=tmp_path)
    (tmp_path / KEY).write_text("no key")
    with pytest.raises(InputError, match="64 hexadecimal digits"):
        run(export, project=tmp_path)


def test_a_second_run_that_skips_writes_no_scan(export, tmp_path):
    run(export, project=tmp_path)
    before = files_of(tmp_path / "data")
    outcome, _ = run(export, project=tmp_path, skip_existing=True)
    after = files_of(tmp_path / "data")
    assert {k: v[0] for k, v in after.items()} == {k: v[0] for k, v in before.items()}
    assert {k: v for k, v in after.items() if "_" in k and k.endswith((".gz", ".json"))} == {
        k: v for k, v in before.items() if "_" in k and k.endswith((".gz", ".json"))
    }
    assert [row["status"] for row in outcome.series] == ["there"] * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exists already"),
        ({"skip_existing": True, "pad_hu": -1000}, r"was made with pad_hu -1024\.0, asked for is -1000"),
        ({"skip_existing": True, "keep_tilt": True}, "keep_tilt False"),
    ],
)
def test_what_is_there_is_never_replaced_unasked(export, tmp_path, options, words):
    run(export, project=tmp_path)
    before = files_of(tmp_path / "data")
    with pytest.raises(UsageError, match=words):
        run(export, project=tmp_path, **options)
    assert files_of(tmp_path / "data") == before


def test_changed_images_are_not_taken_for_the_old_ones(export, tmp_path):
    source = export / "SECRET1" / "thin"
    run(source, project=tmp_path)
    moved = dcmread(source / "000.dcm")
    moved.RescaleIntercept = "-1000"
    moved.save_as(source / "000.dcm")
    with pytest.raises(UsageError, match="input_sha256"):
        run(source, project=tmp_path, skip_existing=True)


def test_shares_and_processes_make_what_one_run_makes(export, tmp_path):
    whole, shares = tmp_path / "whole", tmp_path / "shares"
    for folder in (whole, shares):
        folder.mkdir()
        (folder / KEY).write_text("ab" * 32)
    run(export, project=whole, workers=1)
    for share in ("1/2", "2/2"):
        _, said = run(export, project=shares, shard=share, workers=2)
        assert "without --shard" in said[-1]
    assert not (shares / "data" / "manifest.csv").exists()
    run(export, project=shares, skip_existing=True)
    assert {k: v[0] for k, v in files_of(whole / "data").items()} == {
        k: v[0] for k, v in files_of(shares / "data").items()
    }


def test_a_share_without_a_series_ends_in_peace(export, tmp_path):
    outcome, _ = run(export / "SECRET1" / "thin", project=tmp_path, shard="2/2")
    outcome.raise_for_refusals(export)
    assert outcome.table() == []


def test_an_error_in_a_process_is_as_one_in_this(export, tmp_path):
    (stack,) = scan(export / "SECRET1" / "thin").stacks
    case = Case("thin", export, tmp_path / "no" / "folder.nii", stack)
    found = convert_series._in_worker(case, {"keep_tilt": False, "pad_hu": -1024}, False)
    assert isinstance(found[0], UsageError)
    with pytest.raises(ResourceError) as caught:
        convert_series._unpacked((ResourceError("cannot be written"), 28))
    assert caught.value.__cause__.errno == 28  # a full disk stops a run


def test_a_dry_run_tells_the_same_and_writes_nothing(export, tmp_path):
    planned, _ = run(export, project=tmp_path, is_dry_run=True, link=tmp_path / "link.csv")
    assert {p.name for p in tmp_path.iterdir()} == {"export"}
    done, _ = run(export, project=tmp_path)
    again, _ = run(export, project=tmp_path, is_dry_run=True, overwrite=True)
    assert [{**row, "outcome": "converted"} for row in planned.table()[:1]] == done.table()[:1]
    assert planned.table()[1:] == done.table()[1:]
    keys = ("slices", "spacing_mm", "thickness_mm", "pixel_mm", "file")
    assert [[row[k] for k in keys] for row in again.series] == [[row[k] for k in keys] for row in done.series]


def test_a_file_as_output_takes_exactly_one_series(export, tmp_path):
    target = tmp_path / "out.nii"
    with pytest.raises(UsageError, match=r"5 series found, 1 of them refused; out\.nii asks for exactly one"):
        run(export, target)
    with pytest.raises(InputError, match="refused: 1 slice missing") as caught:
        run(export / "SECRET2" / "gap", target)
    assert caught.value.exit_code == 3
    with pytest.raises(UsageError, match="--shard"):
        run(export, target, shard="1/2")
    assert {p.name for p in tmp_path.iterdir()} == {"export"}
    run(export, target, series=[uid("SECRET1", "thick")])
    assert {p.name for p in tmp_path.iterdir()} == {"export", "out.nii", "out.json"}
    assert (
        judge(
            [(np.asarray(v.data), v.affine) for v in [read_volume(target)]],
            [planes(4, 5.0, offset=offset_of("SECRET1"))],
        )
        == ""
    )


def test_without_ct_there_is_exit_3_with_what_was_found(export, tmp_path):
    outcome, _ = run(export / "SECRET1" / "other", project=tmp_path)
    with pytest.raises(InputError, match="no CT volume in it: 1 × localizer, 1 × Secondary Capture"):
        outcome.raise_for_refusals(export)
    assert {p.name for p in tmp_path.iterdir()} == {"export"}
    with pytest.raises(InputError, match="does not exist"):
        run(tmp_path / "nowhere", project=tmp_path)


@pytest.mark.parametrize(
    ("conditions", "kept"),
    [
        (["SliceThickness<=1.5"], 3),
        (["SliceThickness>=5"], 1),
        (["spacing>1.0"], 1),
        (["spacing = 5"], 1),
        (["slices!=4"], 0),
        (["ConvolutionKernel~bone|standard"], 4),
        (["ConvolutionKernel~B30f"], 0),
        (["kvp=120", "slicethickness<5.0"], 3),
        (["PixelSpacing<0.9"], 0),  # 0.9 × 0.75: both must
        (["PixelSpacing<=0.9"], 4),
        (["GantryDetectorTilt=0"], 4),
        (["Manufacturer=ge"], 4),
        (["ImageType~AXIAL"], 4),
        (["CTDIvol!=3"], 0),  # absent
    ],
)
def test_a_condition_keeps_the_series_that_meet_it(export, conditions, kept):
    stacks, left_out = select(scan(export).stacks, Conversion(where=conditions))
    assert (len(stacks), len(left_out)) == (kept, 4 - kept)
    assert {rule for _, rule in left_out} <= {f"--where {c}" for c in conditions}


def test_values_that_vary_must_all_meet_a_condition(tmp_path):
    currents = put(XRayTubeCurrent=lambda k: str(100 + 10 * k))
    few, many = a_series("P", "few", currents), a_series("P", "many", currents, n=12)
    series(tmp_path / "x", few, many)
    stacks = scan(tmp_path).stacks
    for words, kept in (("XRayTubeCurrent<=130", 1), ("XRayTubeCurrent>=100", 2), ("XRayTubeCurrent>100", 0)):
        assert len(select(stacks, Conversion(where=[words]))[0]) == kept, words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("SliceThicknes<=1.5", r"no technical keyword \(did you mean SliceThickness\?\)"),
        ("PatientName~Doe", "PatientName is no technical keyword"),
        ("PatientID=1", "no technical keyword"),
        ("SliceThickness<=thin", "thin in SliceThickness<=thin is not a number"),
        ("SliceThickness<=nan", "not a number"),
        ("ConvolutionKernel~(", "no regular expression"),
        ("SliceThickness", "not KEYWORD OP VALUE"),
        ("SliceThickness<=", "not KEYWORD OP VALUE"),
    ],
)
def test_a_wrong_condition_is_a_usage_error(words, said):
    with pytest.raises(UsageError) as caught:
        parse_condition(words)
    assert re.search(said, str(caught.value))


def test_conditions_know_all_that_a_sidecar_tells(export):
    for stack in scan(export).stacks:
        assert attributes(stack.slices).keys() <= set(KEYWORDS)


def test_one_series_of_each_study(export, tmp_path):
    thin, _ = run(export, project=tmp_path, is_dry_run=True, one_per_study="thinnest")
    thick, _ = run(export, project=tmp_path, is_dry_run=True, one_per_study="thickest")
    assert sorted(row["thickness_mm"] for row in thin.series) == [1, 1, 1]
    assert sorted(row["thickness_mm"] for row in thick.series) == [1, 1, 5]
    assert thin.left_out[0]["reason"] == "--one-per-study thinnest"


def test_a_selection_of_nothing_is_a_usage_error(export, tmp_path):
    with pytest.raises(UsageError, match="all 1 series are left out, the first by --min-slices 5"):
        run(export / "SECRET1" / "thin", project=tmp_path, min_slices=5)
    with pytest.raises(UsageError, match="--series: 1 of 2 are not in it"):
        run(export, project=tmp_path, series=[uid("SECRET1"), "1.2.3"])


def test_an_incomplete_download_is_refused(export, tmp_path):
    header = "Series UID,Subject ID,Modality,Number of Images\n"
    rows = [(uid("SECRET1"), "CT", 4), (uid("SECRET2"), "CT", 7), ("1.2.3", "CT", 9), ("1.2.4", "DX", 2)]
    text = header + "".join(f"{u},SECRET9,{modality},{n}\n" for u, modality, n in rows)
    (export / "metadata.csv").write_text(text)
    listed = "\n".join(["manifestVersion=3.0", "ListOfSeriesToDownload=", *(u for u, *_ in rows), "1.2.5"])
    (export / "lidc.tcia").write_text(listed)
    shutil.copytree(export / "SECRET2", export / "again")  # the same part, fetched twice
    outcome, said = run(export, project=tmp_path)
    reasons = {
        row["name"].split("/")[0]: row["reason"] for row in outcome.refused if "images" in row["reason"]
    }
    assert reasons == {"SECRET2": "4 of 7 images present"}
    assert len(outcome.series) == 3
    assert "metadata.csv: 1 of 3 CT series have no image here" in said
    assert f"{export / 'lidc.tcia'}: 1 of 5 series were not downloaded" in said
    (export / "metadata.csv").write_text("no,such\n1\n")
    outcome, said = run(export, project=tmp_path, is_dry_run=True, overwrite=True)
    assert len(outcome.series) == 4
    assert "incomplete downloads are not noticed" in said[0]


def test_a_name_in_the_pixels_is_refused(tmp_path):
    series(tmp_path / "x", a_series("P", "thin", put(BurnedInAnnotation="YES")))
    outcome, _ = run(tmp_path / "x", project=tmp_path)
    assert [row["reason"] for row in outcome.refused] == ["names may be burned into the pixels"]
    assert not (tmp_path / "data").exists()


def test_a_kept_tilt_is_no_training_scan(tmp_path):
    tilted = block(planes(6, 2.5, tilt=15.0), put(PatientID="P"))
    series(tmp_path / "x", tilted, a_series("Q"), a_series("R"))
    _, said = run(tmp_path / "x", project=tmp_path, keep_tilt=True)
    data = tmp_path / "data"
    rows = read_table(data / "manifest.csv")
    (sheared,) = [row for row in rows if row["unlisted"]]
    assert sheared["set"] == ""
    assert sheared["file"] not in list_path(data, "all").read_text()
    assert len(list_path(data, "all").read_text().split()) == 2
    assert f"{sheared['file']}: sheared: not put into the lists for training" in said
    with pytest.raises(GeometryError, match="sheared by 15"):
        read_volume(data / sheared["file"])


def test_patients_with_one_scan_in_common_share_a_set(tmp_path):
    for patient in ("AD", "BC", "CB", "DA"):  # all made alike: one scan under four names
        series(tmp_path / "x" / patient, a_series(patient))
    _, said = run(tmp_path / "x", project=tmp_path)
    assert sum("holds the same scan as" in line for line in said) == 3
    rows = read_table(tmp_path / "data" / "manifest.csv")
    assert len({row["patient"] for row in rows}) == 4
    assert len({row["set"] for row in rows}) == 1


def test_without_a_patient_id_the_study_stands_for_the_patient(tmp_path):
    nobody = without("PatientID")
    for name in ("one", "two"):
        series(tmp_path / "x" / name, a_series("A", name, nobody))
    series(tmp_path / "x" / "three", a_series("B", "three", nobody))
    run(tmp_path / "x", project=tmp_path)
    assert len({row["patient"] for row in read_table(tmp_path / "data" / "manifest.csv")}) == 2


def test_the_manifest_keeps_what_others_wrote(export, tmp_path):
    phantoms(3, tmp_path, shape=(6, 32, 40), spacing=(5.0, 9.0, 9.0))
    before = read_table(tmp_path / "data" / "manifest.csv")
    run(export / "SECRET1", project=tmp_path)
    after = read_table(tmp_path / "data" / "manifest.csv")
    assert [{k: row[k] for k in before[0]} for row in after[:3]] == before
    assert [row["source"] for row in after[3:]] == ["ctsr convert"] * 2
    phantoms(3, tmp_path, shape=(6, 32, 40), spacing=(5.0, 9.0, 9.0), overwrite=True)
    assert len(read_table(tmp_path / "data" / "manifest.csv")) == 5


def test_the_link_table_is_for_its_owner_and_outside_the_data(export, tmp_path):
    with pytest.raises(UsageError, match="lies inside"):
        run(export, project=tmp_path, link=tmp_path / "data" / "sub" / ".." / "link.csv")
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "data", tmp_path / "way-round")
    with pytest.raises(UsageError, match="lies inside"):
        run(export, project=tmp_path, link=tmp_path / "way-round" / "link.csv")
    link = tmp_path / "link.csv"
    run(export, project=tmp_path, link=link)
    assert link.stat().st_mode & 0o777 == 0o600
    rows = read_table(link)
    assert {(row["patient_id"], row["series_uid"]) for row in rows} >= {("SECRET1", uid("SECRET1", "thick"))}
    assert {row["file"] for row in rows} == {p.name for p in (tmp_path / "data").glob("*.nii.gz")}


def test_the_link_table_grows_with_the_project_and_replaces_nothing_else(export, tmp_path):
    series(tmp_path / "more", a_series("SECRET7"))
    link = tmp_path / "link.csv"
    run(export, project=tmp_path, link=link)
    before = read_table(link)
    run(tmp_path / "more", project=tmp_path, link=link)
    run(tmp_path / "more", project=tmp_path, link=link, skip_existing=True)
    after = read_table(link)
    assert after[: len(before)] == before
    assert [row["patient_id"] for row in after[len(before) :]] == ["SECRET7"]
    link.write_text("dear diary\n")
    with pytest.raises(UsageError, match="no such table"):
        run(export, project=tmp_path, link=link, overwrite=True)
    assert link.read_text() == "dear diary\n"


def test_a_project_folder_is_made_and_shares_leave_the_link_table_to_the_last_run(export, tmp_path):
    project, link = tmp_path / "new" / "project", tmp_path / "link.csv"
    for share in ("1/2", "2/2"):
        run(export, project=project, link=link, shard=share)
    assert not link.exists()
    run(export, project=project, link=link, skip_existing=True)
    assert len(read_table(link)) == len(list((project / "data").glob("*.nii.gz")))


def test_a_file_of_many_frames_counts_as_one(tmp_path):
    series(tmp_path / "x", block(frames=True))
    outcome, _ = run(tmp_path / "x", project=tmp_path)
    assert [(row["name"], row["files"], row["slices"]) for row in outcome.series] == [("000.dcm", 1, 12)]
    assert [row["files"] for row in outcome.table()] == [1]


def test_names_with_patients_are_safe_and_noted(tmp_path):
    for i, patient in enumerate(("LIDC-IDRI-0001", "../../etc/pass wd", "..", "ÄÖ")):
        series(tmp_path / "x" / str(i), a_series(patient))
    _, said = run(tmp_path / "x", project=tmp_path, names="patient")
    names = {p.name for p in (tmp_path / "data").glob("*.nii.gz")}
    assert len(names) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*_[0-9a-f]{8}\.nii\.gz", name) for name in names)
    assert any(name.startswith("LIDC-IDRI-0001_") for name in names)
    assert any("public collections only" in line for line in said)


@pytest.mark.parametrize("words", ["80,10", "80,10,10,0", "a,b,c", "80,10,20", "110,-10,0", "nan,1,1", ""])
def test_wrong_splits_are_a_usage_error(words):
    with pytest.raises(UsageError, match="--splits"):
        parse_splits(words)


def test_splits_are_shares_of_the_patients(export, tmp_path):
    assert parse_splits("70,20,10") == {"val": 0.2, "test": 0.1}
    run(export, project=tmp_path, splits="100,0,0")
    assert {row["set"] for row in read_table(tmp_path / "data" / "manifest.csv")} == {"train"}


def test_to_replace_and_to_skip_exclude_each_other():
    with pytest.raises(UsageError, match="exclude each other"):
        Conversion(overwrite=True, skip_existing=True)
