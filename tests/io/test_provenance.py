"""The record beside an image speaks of exactly these bytes; a sidecar is read strictly."""

from __future__ import annotations

import hashlib
import json
import math

import pytest

from ctsr.core.volume import Volume
from ctsr.errors import InputError, UsageError
from ctsr.io.nifti import read_volume, write_volume
from ctsr.io.provenance import (
    check_image_output,
    read_sidecar,
    sha256_of,
    sidecar_length,
    sidecar_path,
    write_record,
)
from tests.io.make import affine_of, ct


@pytest.mark.parametrize("name", ["out.nii.gz", "out.nii", "OUT.NII.GZ", "a.b.nii.gz"])
def test_the_record_lies_beside_its_image(tmp_path, name):
    expected = {"out.nii.gz": "out", "out.nii": "out", "OUT.NII.GZ": "OUT", "a.b.nii.gz": "a.b"}[name]
    assert sidecar_path(tmp_path / name) == tmp_path / f"{expected}.json"


def test_the_record_holds_the_images_hash_and_size(tmp_path):
    image = tmp_path / "x.nii.gz"
    record: dict[str, object] = {"factor": 2.0, "SliceThickness": 2.5}
    digest = write_volume(Volume(ct(), affine_of()), image, record=record)
    written = read_sidecar(image)
    assert written == {**record, "output_sha256": digest, "output_size_bytes": image.stat().st_size}
    assert digest == sha256_of(image) == hashlib.sha256(image.read_bytes()).hexdigest()
    assert "output_sha256" not in record
    assert read_volume(image).slice_thickness == 2.5  # our own output is the next input


def test_a_record_that_can_not_be_written_leaves_no_image(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_volume(Volume(ct(), affine_of()), tmp_path / "x.nii", record={"residual": math.nan})
    assert list(tmp_path.iterdir()) == []


def test_two_records_can_be_compared_by_line(tmp_path):
    write_record(tmp_path / "x.json", {"b": [1], "a": "é"}, overwrite=False)
    assert (tmp_path / "x.json").read_text() == '{\n  "a": "\\u00e9",\n  "b": [\n    1\n  ]\n}\n'
    with pytest.raises(UsageError, match="exists already"):
        write_record(tmp_path / "x.json", {}, overwrite=False)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1]",
        b'{"SliceThickness": NaN}',
        b'{"a": Infinity}',
        b"\xff\xfe{\0}\0",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b"x" * ((1 << 24) + 1),
    ],
    ids=["empty", "cut", "list", "nan", "infinity", "utf-16", "deep", "long", "large"],
)
def test_a_damaged_sidecar_is_refused(tmp_path, raw):
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(InputError) as refused:
        read_sidecar(tmp_path / "x.nii.gz")
    assert refused.value.path == str(tmp_path / "x.json")


def test_a_sidecar_may_be_absent_or_start_with_a_byte_order_mark(tmp_path):
    assert read_sidecar(tmp_path / "x.nii") == {}
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"SliceThickness": 3}).encode())
    assert read_sidecar(tmp_path / "x.nii") == {"SliceThickness": 3}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (5, 5.0), (1.25, 1.25), (0, None), (-1, None), ("5", None), (True, None), (None, None), (1e4, None),
        (10**400, None), (math.nan, None),
    ],
)  # fmt: skip
def test_a_length_is_a_number_of_mm_above_0(value, expected):
    assert sidecar_length({"SliceThickness": value}, "SliceThickness") == expected
    assert sidecar_length({}, "SliceThickness") is None


def test_the_hash_of_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        sha256_of(tmp_path / "none")


def test_a_record_left_by_a_killed_run_does_not_block_the_next_one(tmp_path):
    image = tmp_path / "x.nii.gz"
    write_volume(Volume(ct(), affine_of()), image, record={"factor": 2})
    image.unlink()
    check_image_output(image, overwrite=False)
    write_volume(Volume(ct(), affine_of()), image, record={"factor": 3})
    assert read_sidecar(image)["factor"] == 3
    with pytest.raises(UsageError):
        check_image_output(image, overwrite=False)


def test_a_foreign_record_is_noticed_before_the_work(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    for image in ("x.nii.gz", "x.nii"):
        with pytest.raises(UsageError, match=r"x\.json: exists already"):
            check_image_output(tmp_path / image, overwrite=False)
        check_image_output(tmp_path / image, overwrite=True)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UsageError):
        check_image_output(tmp_path / "x.nii", overwrite=False)
    with pytest.raises(UsageError, match=r"x\.json: is the place of the input's sidecar"):
        check_image_output(tmp_path / "x.nii", overwrite=True, inputs=[tmp_path / "x.nii.gz"])
    check_image_output(tmp_path / "y.nii", overwrite=False, inputs=[tmp_path / "x.nii.gz"])
    with pytest.raises(UsageError, match="the input's sidecar"):  # though it is not there
        check_image_output(tmp_path / "z.nii", overwrite=False, inputs=[tmp_path / "z.nii.gz"])


def test_a_name_as_long_as_names_can_be_has_no_sidecar(tmp_path):
    assert read_sidecar(tmp_path / ("x" * 255)) == {}
