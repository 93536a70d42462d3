"""`ctsr convert` as a shell sees it: tables, lines, codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydicom.uid import SecondaryCaptureImageStorage

from tests.io.dicom.make import block, planes, put, series


@pytest.fixture
def export(tmp_path) -> Path:
    """Two series, one with a slice missing, and a dose sheet."""
    folder = tmp_path / "export"
    series(folder / "a", block(planes(5), series="a"))
    series(folder / "b", block(planes(6)[:2] + planes(6)[3:], series="b"))
    series(folder / "c", block(planes(1), put(SOPClassUID=SecondaryCaptureImageStorage), series="c"))
    return folder


def test_a_folder_is_told_as_a_table_and_refusals_as_lines(ctsr, export, tmp_path):
    ran = ctsr("convert", export, "--project", tmp_path)
    assert ran.code == 7
    assert [line.split()[:3] for line in ran.out.splitlines()] == [
        ["outcome", "series", "files"],
        ["converted", "1", "5"],
        ["refused", "1", "5"],
        ["skipped", "–", "1"],
    ]
    assert sum("refused: 1 slice missing" in line for line in ran.err.splitlines()) == 1
    assert ran.line.startswith(f"error: {export}: 1 of 2 series refused, the first is b/")
    assert len(list((tmp_path / "data").glob("*.nii.gz"))) == 1


def test_json_is_one_document_with_every_file(ctsr, export, tmp_path):
    ran = ctsr("convert", export, "--project", tmp_path, "--json", "-q")
    told = json.loads(ran.out)
    assert (ran.code, told["ok"], told["error"]["code"]) == (7, False, 7)
    assert [row["status"] for row in told["series"]] == ["ok"]
    assert [row["name"] for row in told["skipped"]] == ["c/000.dcm"]
    assert ran.err.count("\n") == 1
    told = json.loads(ctsr("convert", export / "a", "--project", tmp_path, "--json", "--overwrite").out)
    assert told["ok"]
    assert told["summary"] == [{"outcome": "converted", "series": 1, "files": 5, "reason": ""}]


def test_verbose_names_every_file(ctsr, export, tmp_path):
    ran = ctsr("convert", export, "-v", "--dry-run", "--project", tmp_path)
    assert "c/000.dcm: skipped: " in ran.err
    assert "a/000.dcm and 4 more" in ran.out
    assert not (tmp_path / "data").exists()


def test_one_series_becomes_one_file(ctsr, export, tmp_path):
    ran = ctsr("convert", export / "a", tmp_path / "out.nii.gz", "-q")
    assert (ran.code, ran.err) == (0, "")
    assert {p.name for p in tmp_path.iterdir()} == {"export", "out.nii.gz", "out.json"}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["export", "out.nii.gz"], 2, "2 series found, 1 of them refused"),
        (["export/b", "out.nii.gz"], 3, "refused: 1 slice missing"),
        (["export/c", "out.nii.gz"], 3, "no CT volume in it"),
        (["nowhere"], 3, "does not exist"),
        (["export", "--where", "SliceThicknes<2"], 2, "did you mean SliceThickness?"),
        (["export", "--where", "PatientID~1"], 2, "no technical keyword"),
        (["export", "--splits", "80,20"], 2, "--splits"),
        (["export", "--names", "plain"], 2, "'plain' is not one of 'hash', 'patient'"),
        (["export", "--one-per-study", "best"], 2, "'best' is not one of 'thinnest', 'thickest'"),
        (["export", "--link", "data/link.csv"], 2, "lies inside"),
        (["export", "--link", "no/link.csv"], 2, "folder does not exist"),
        (["export", "--shard", "3/2"], 2, "--shard"),
        (["export", "--pad-hu", "inf"], 2, "--pad-hu"),
        (["export", "--pad-hu", "nan"], 2, "--pad-hu"),
        (["export", "--pad-hu", "100"], 2, "--pad-hu"),
        (["export", "--series", "1.2.3"], 2, "--series: 1 of 1 are not in it"),
        (["export", "--overwrite", "--skip-existing"], 2, "exclude each other"),
        (["-", "out.nii.gz"], 2, "standard input"),
    ],
)
def test_what_can_not_be_done_is_one_error_and_leaves_nothing(
    ctsr, export, tmp_path, monkeypatch, words, code, said
):
    monkeypatch.chdir(tmp_path)
    ran = ctsr("convert", *words)
    assert (ran.code, ran.out if code == 2 else "") == (code, "")
    assert ran.line.startswith("error: ")
    assert said in ran.line
    assert {p.name for p in tmp_path.iterdir()} == {"export"}


def test_an_error_names_a_file_once(ctsr, tmp_path):
    series(tmp_path / "x", block(planes(6), put(BurnedInAnnotation="YES"), frames=True))
    file = tmp_path / "x" / "000.dcm"
    for target in ("out.nii.gz", "data"):
        ran = ctsr("convert", file, tmp_path / target)
        assert ran.line.startswith(f"error: {file}: ")
        assert ran.line.count("000.dcm") == 1


def test_a_refusal_names_a_file_of_frames_once(ctsr, tmp_path):
    series(tmp_path / "x", block(planes(6), put(HighBit=3), frames=True))
    ran = ctsr("convert", tmp_path / "x", tmp_path / "data")
    refusal = next(line for line in ran.err.splitlines() if "refused" in line)
    assert refusal.count("000.dcm") == 1
