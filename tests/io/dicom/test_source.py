"""What a source holds: every file once, nothing outside it, and no byte sequence that takes memory or time."""

from __future__ import annotations

import io
import os
import resource
import time
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from ctsr.errors import InputError
from ctsr.io.dicom import source as module
from ctsr.io.dicom.elements import text
from ctsr.io.dicom.header import DIRECTORY
from ctsr.io.dicom.records import DicomFile, Skipped
from ctsr.io.dicom.scan import scan
from ctsr.io.dicom.source import Header, find, read_bytes
from tests.io.dicom.make import block, planes, series

SMALL = planes(3, shape=(16, 20))
MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three slices, 000.dcm to 002.dcm."""
    series(tmp_path / "study", block(SMALL))
    return tmp_path / "study"


def headers(source: Path) -> dict[str, Header]:
    return {found.file.name: found for found in find(source) if isinstance(found, Header)}


def reasons(source: Path) -> dict[str, str]:
    return {found.name: found.reason for found in find(source) if isinstance(found, Skipped)}


def packed(target: Path, folder: Path, **more: bytes) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"a/{path.name}")
        for name, data in more.items():
            archive.writestr(name, data)
    return target


def object_with(elements: bytes, *, syntax: str = ExplicitVRLittleEndian) -> bytes:
    """A CT Image whose data set is its SOP class and then `elements`."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = syntax, CTImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    out = io.BytesIO()
    data = Dataset()
    data.file_meta, data.SOPClassUID, data.SOPInstanceUID = meta, CTImageStorage, "1.2.3"
    dcmwrite(out, data, enforce_file_format=True)
    whole = out.getvalue()
    if syntax != DeflatedExplicitVRLittleEndian:
        return whole + elements
    start = 144 + int.from_bytes(whole[140:144], "little")
    squeeze = zlib.compressobj(9, wbits=-15)
    return whole[:start] + squeeze.compress(zlib.decompress(whole[start:], -15) + elements) + squeeze.flush()


def long(tag: int, vr: bytes, size: int) -> bytes:
    """The head of an element with a length of four bytes."""
    return (
        (tag >> 16).to_bytes(2, "little")
        + (tag & 0xFFFF).to_bytes(2, "little")
        + vr
        + b"\0\0"
        + size.to_bytes(4, "little")
    )


# the same header, however it is stored


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, None]
)
@pytest.mark.parametrize("is_zipped", [False, True])
def test_every_encoding_gives_the_elements_that_pydicom_reads(
    folder: Path, tmp_path: Path, syntax: str | None, is_zipped: bool
) -> None:
    series(tmp_path / "other", block(SMALL, syntax=syntax))
    source = packed(tmp_path / "other.zip", tmp_path / "other") if is_zipped else tmp_path / "other"
    found = headers(source)
    plain = {path.name: dcmread(path) for path in folder.iterdir()}
    assert sorted(Path(name).name for name in found) == sorted(plain)
    for name, header in found.items():
        expected = plain[Path(name).name]
        pixels = expected.PixelData
        del expected.PixelData
        assert {e.tag: e.value for e in header.dataset} == {e.tag: e.value for e in expected}
        start, length = header.pixels or (0, 0)
        stored = read_bytes(header.file)[start : start + (length or 0)]
        swapped = bytes(b for k in range(0, len(stored), 2) for b in (stored[k + 1], stored[k]))
        assert (swapped if syntax == ExplicitVRBigEndian else stored) == pixels
        assert header.has_meta == (syntax is not None)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_a_data_set_alone_shows_its_encoding(tmp_path: Path, syntax: str) -> None:
    series(tmp_path, block(SMALL[:1], syntax=syntax))
    path = tmp_path / "000.dcm"
    raw = path.read_bytes()
    path.write_bytes(raw[144 + int.from_bytes(raw[140:144], "little") :])
    (header,) = headers(path).values()
    assert (header.transfer_syntax, header.has_meta) == (syntax, False)
    assert text(header.dataset, 0x00080060) == "CT"


def test_deflated_bytes_come_as_plain_ones_that_pydicom_reads(folder: Path, tmp_path: Path) -> None:
    series(tmp_path / "deflated", block(SMALL, syntax=DeflatedExplicitVRLittleEndian))
    path = tmp_path / "deflated" / "001.dcm"
    inflated = dcmread(io.BytesIO(read_bytes(DicomFile("x", path))))
    assert inflated.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert inflated.PixelData == dcmread(folder / "001.dcm").PixelData


def test_private_groups_overlays_and_long_values_are_left_out(folder: Path) -> None:
    data = dcmread(folder / "000.dcm")
    data.add_new(0x00091001, "OB", bytes(100))
    data.add_new(0x60003000, "OW", bytes(100))
    data.add_new(0x00204000, "LT", "x" * 100_000)
    data.save_as(folder / "000.dcm")
    first, second = (header.dataset for name, header in sorted(headers(folder).items())[:2])
    assert {e.tag for e in first} == {e.tag for e in second}


def test_a_header_longer_than_the_first_piece_is_read_to_its_end(folder: Path) -> None:
    data = dcmread(folder / "000.dcm")
    data.add_new(0x00091001, "OB", bytes(3 * MIB))
    data.save_as(folder / "000.dcm")
    header = headers(folder)["000.dcm"]
    start, length = header.pixels or (0, 0)
    assert start > 3 * MIB
    assert read_bytes(header.file)[start:] == data.PixelData
    assert length == len(data.PixelData)


# which files


def test_every_file_below_a_folder_is_found_once_in_the_order_of_names(folder: Path) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "000.dcm").rename(folder / "deep" / "er" / "IM 1")
    (folder / "notes.txt").write_text("no image")
    (folder / "empty").touch()
    names = [found.file.name if isinstance(found, Header) else found.name for found in find(folder)]
    assert names == ["001.dcm", "002.dcm", "empty", "notes.txt", "deep/er/IM 1"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_dicomdir_stands_for_the_folder_it_lies_in(folder: Path, is_folder: bool) -> None:
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = DIRECTORY
    data.file_meta.MediaStorageSOPInstanceUID, data.file_meta.TransferSyntaxUID = (
        "1.2",
        ExplicitVRLittleEndian,
    )
    data.FileSetID = "X"
    dcmwrite(folder / "DICOMDIR", data, enforce_file_format=True)
    found = scan(folder if is_folder else folder / "DICOMDIR")
    assert [len(stack.slices) for stack in found.stacks] == [3]
    assert [(s.name, s.reason) for s in found.skipped] == [("DICOMDIR", "DICOMDIR")]


def test_a_single_file_is_itself_alone(folder: Path) -> None:
    assert list(headers(folder / "001.dcm")) == ["001.dcm"]


def test_links_are_followed_only_within_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.dcm").write_bytes((folder / "000.dcm").read_bytes())
    (folder / "inside").symlink_to(folder / "000.dcm")
    (folder / "outside").symlink_to(tmp_path / "out.dcm")
    (folder / "up").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    assert "inside" in headers(folder)
    assert reasons(folder) == {
        "outside": "a link that leaves the folder",
        "up": "a link to a folder",
        "loop": "a link that leads nowhere",
    }


def test_hidden_files_and_what_is_no_file_have_their_reasons(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / "._000.dcm").write_bytes((folder / "000.dcm").read_bytes())
    (folder / "__MACOSX").mkdir()
    os.mkfifo(folder / "pipe")
    found = reasons(folder)
    assert {found.pop(name) for name in (".git", "._000.dcm", "__MACOSX")} == {"hidden"}
    assert list(found) == ["pipe"]


@pytest.mark.parametrize("kind", ["absent", "fifo", "damaged", "empty archive"])
def test_a_source_that_is_none_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "source"
    make: dict[str, Callable[[], object]] = {
        "absent": lambda: None,
        "fifo": lambda: os.mkfifo(path),
        "damaged": lambda: path.write_bytes(b"PK\x03\x04" + bytes(100)),
        "empty archive": lambda: path.write_bytes(b"PK\x05\x06" + bytes(10)),
    }
    make[kind]()
    with pytest.raises(InputError):
        list(find(path))


# archives


def test_members_that_leave_the_archive_or_hide_in_it_are_not_opened(folder: Path, tmp_path: Path) -> None:
    data = (folder / "000.dcm").read_bytes()
    bad = ["../up.dcm", "/etc/x.dcm", "C:/x.dcm", "a/../../x.dcm", "__MACOSX/x.dcm", "a/.x.dcm"]
    path = packed(tmp_path / "s.zip", folder, **dict.fromkeys([*bad, "back/slash.dcm"], data))
    path.write_bytes(path.read_bytes().replace(b"back/slash", b"back\\slash"))
    link = zipfile.ZipInfo("a/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "../../secret")
    assert sorted(headers(path)) == ["a/000.dcm", "a/001.dcm", "a/002.dcm"]
    found = list(reasons(path).values())
    assert found.count("its name in the archive leaves the archive") == 5
    assert found.count("hidden") == 2
    assert found.count("a link in an archive") == 1
    assert sorted(tmp_path.iterdir()) == [path, folder]  # nothing was unpacked


def test_an_archive_in_an_archive_stays_closed(folder: Path, tmp_path: Path) -> None:
    inner = packed(tmp_path / "inner.zip", folder).read_bytes()
    assert reasons(packed(tmp_path / "outer.zip", folder, **{"inner.zip": inner})) == {
        "inner.zip": "not DICOM"
    }


def test_a_member_that_inflates_without_bounds_is_left_out(folder: Path, tmp_path: Path) -> None:
    path = packed(tmp_path / "bomb.zip", folder, bomb=bytes(60_000_000))
    assert "inflate to 60,000,000" in reasons(path)["bomb"]


def test_an_archive_over_the_limits_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packed(tmp_path / "s.zip", folder)
    for name, value, words in (
        ("_MEMBERS", 2, "3 files"),
        ("_ARCHIVE", 100, "GiB in all"),
        ("_TABLE", 50, "takes"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            module._archive.cache_clear()
            with pytest.raises(InputError, match=words):
                list(find(path))
    module._archive.cache_clear()


def test_a_folder_with_too_many_files_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FILES", 2)
    with pytest.raises(InputError, match="more than 2 files"):
        list(find(folder))


# bytes that take memory or time

BOMBS = {
    "deflated, 80 MiB of zeros": (
        lambda: object_with(
            long(0x7FE00010, b"OW", 80 * MIB) + bytes(80 * MIB), syntax=DeflatedExplicitVRLittleEndian
        ),
        "inflates to more than 64 MiB",
    ),
    "20,000 levels of sequences": (
        lambda: object_with(
            (long(0x00081140, b"SQ", 0xFFFFFFFF) + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * 20_000
        ),
        "nested too deep",
    ),
    "a million empty items": (
        lambda: object_with(long(0x00081140, b"SQ", 0xFFFFFFFF) + b"\xfe\xff\x00\xe0\0\0\0\0" * 1_000_000),
        "sequence items",
    ),
    "a million empty elements": (
        lambda: object_with(
            b"".join(
                k.to_bytes(3, "little")[1:] + b"\x10" + bytes([k % 256]) + b"LO\0\0" for k in range(1_000_000)
            )
        ),
        "elements in its header",
    ),
    "a million empty elements in an item": (
        lambda: object_with(
            long(0x00081140, b"SQ", 0xFFFFFFFF)
            + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
            + b"".join(b"\x08" + k.to_bytes(3, "little") + b"LO\0\0" for k in range(1_000_000))
        ),
        "",
    ),
    "450,000 empty elements in a functional group's place": (
        lambda: object_with(
            b"\x08\0\x16\0UI"
            + len(EnhancedCTImageStorage).to_bytes(2, "little")
            + EnhancedCTImageStorage.encode()
            + long(0x52009230, b"SQ", 8 + 8 * 450_000)
            + b"\xfe\xff\x00\xe0"
            + (8 * 450_000).to_bytes(4, "little")
            + b"".join(
                (0x19 + 2 * (k >> 16)).to_bytes(2, "little") + (k & 0xFFFF).to_bytes(2, "little") + b"LO\0\0"
                for k in range(450_000)
            )
        ),
        "unknown colours",
    ),
    "an element of 4 GiB": (lambda: object_with(long(0x00204000, b"UT", 0xFFFFFFF0)), ""),
    "a header of 20 MiB": (
        lambda: object_with(long(0x00091001, b"OB", 20 * MIB) + bytes(20 * MIB)),
        "header of more than 4 MiB",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_left_out_in_little_time_and_memory(name: str, tmp_path: Path) -> None:
    make, words = BOMBS[name]
    (tmp_path / "bomb.dcm").write_bytes(make())
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = scan(tmp_path)
    assert time.process_time() - start < 5  # seconds of the processor: other work on the machine is no fault
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB
    told = [s.reason for s in found.skipped] + [r.reason for r in found.refused]
    assert len(told) == 1
    assert words in told[0]


def test_equal_elements_of_a_series_are_held_once(tmp_path: Path) -> None:
    series(tmp_path / "long", block(planes(60, shape=(16, 20))))
    list(find(tmp_path / "long"))
    tracemalloc.start()
    found = list(find(tmp_path / "long"))
    size = tracemalloc.get_traced_memory()[0] / len(found)
    tracemalloc.stop()
    assert size < 12_000  # bytes a slice; 25,000 where each has its own


def test_pydicom_says_nothing_on_the_terminal(
    folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    raw = (folder / "000.dcm").read_bytes()
    (folder / "000.dcm").write_bytes(raw.replace(b"2.5 ", b"2,5x").replace(b"ISO_IR 100", b"ISO_IR 9x9"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scan(folder)
    assert not caught
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_text_is_read_as_utf_8_or_latin_1_and_stripped() -> None:
    data = Dataset()
    data.add_new(0x00100020, "LO", "x")
    for raw, expected in ((b"A1\0 ", "A1"), ("é".encode(), "é"), (b"\xe9 ", "é"), (b"", "")):
        data[0x00100020]._value = raw
        assert text(data, 0x00100020) == expected
