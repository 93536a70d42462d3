"""File lists, folders of volumes and tables: what is named is found, what is wrong is named by its line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctsr.errors import InputError, UsageError
from ctsr.io.lists import read_file_list, read_table, stem, volumes_in, write_file_list, write_table


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    for name in (
        "a.nii.gz",
        "sub/b.nii",
        "with space.nii",
        " d.nii",
        "#c.nii",
        "u\u2028v.nii",
        os.fsdecode(b"d\xff.nii"),
        "é.nii",
    ):
        (folder / name).write_bytes(b"")
    (tmp_path / "outside.nii").write_bytes(b"")
    return folder


def listed(folder: Path, text: bytes, name: str = "list.txt") -> Path:
    path = folder / name
    path.write_bytes(text)
    return path


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b"a.nii.gz\nsub/b.nii\n", ["a.nii.gz", "sub/b.nii"]),
        (b"sub/b.nii\r\na.nii.gz\r\n", ["sub/b.nii", "a.nii.gz"]),
        (b"\xef\xbb\xbfa.nii.gz", ["a.nii.gz"]),
        (b"# comment\n\n   \na.nii.gz  \n", ["a.nii.gz"]),
        (b"./#c.nii\nwith space.nii\n", ["#c.nii", "with space.nii"]),
        (b"d\xff.nii\n\xc3\xa9.nii\n", [os.fsdecode(b"d\xff.nii"), "é.nii"]),
        (b"sub/../a.nii.gz", ["sub/../a.nii.gz"]),
    ],
)
def test_a_list_names_files_relative_to_its_folder(data, text, names):
    assert read_file_list(listed(data, text)) == [data / n for n in names]


def test_a_list_may_lie_elsewhere_and_name_the_data_folder(data, tmp_path):
    path = listed(tmp_path, b"a.nii.gz\n" + os.fsencode(data / "sub" / "b.nii"))
    assert read_file_list(path, data) == [data / "a.nii.gz", data / "sub" / "b.nii"]


def test_a_file_named_twice_is_taken_once_with_a_note(data):
    (data / "link.nii").symlink_to("sub/b.nii")
    notes: list[str] = []
    path = listed(data, b"sub/b.nii\na.nii.gz\n./sub//b.nii\nlink.nii\n")
    assert read_file_list(path, notes=notes) == [data / "sub/b.nii", data / "a.nii.gz"]
    assert [n.split(": ")[0] for n in notes] == [f"{path}:3", f"{path}:4"]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (b"a.nii.gz\n\nmissing.nii\n", 3, "missing.nii does not exist"),
        (b"../outside.nii", 1, "outside the data folder"),
        (b"a.nii.gz\n/etc/hosts", 2, "outside the data folder"),
        (b"leading.nii", 1, "outside the data folder"),
        (b"loop.nii", 1, "loop.nii"),
        (b"x" * 300, 1, "does not exist"),
        (b"a\0.nii", 1, "NUL"),
    ],
)
def test_a_wrong_line_is_named(data, text, line, words):
    (data / "leading.nii").symlink_to("../outside.nii")
    (data / "loop.nii").symlink_to("loop.nii")
    path = listed(data, text)
    with pytest.raises(InputError) as refused:
        read_file_list(path)
    assert words in refused.value.reason
    assert refused.value.path == f"{path}:{line}"


@pytest.mark.parametrize("text", [b"", b"\n\n", b"# only\n# comments", b"\xef\xbb\xbf"])
def test_an_empty_list_is_a_matter_of_usage(data, text):
    with pytest.raises(UsageError, match="names no files"):
        read_file_list(listed(data, text))
    with pytest.raises(UsageError, match="does not exist"):
        read_file_list(data / "none.txt")
    with pytest.raises(InputError, match="is a folder"):
        read_file_list(data)


def test_a_written_list_is_read_back(data, tmp_path):
    files = volumes_in(data)
    for folder, data_dir in ((data, None), (tmp_path, data)):
        path = folder / "written.txt"
        write_file_list(path, files, overwrite=True, data_dir=data_dir)
        assert read_file_list(path, data_dir) == files
    assert b"\nsub/b.nii\n" in path.read_bytes()
    for name in ("a ", "a\nb", "a\r"):
        with pytest.raises(UsageError, match="can't stand in a list"):
            write_file_list(path, [data / name], overwrite=True)


def test_volumes_are_found_below_a_folder_in_order(data):
    for name in (
        ".hidden.nii",
        "x.part",
        "notes.txt",
        "X.NII.GZ",
        "nii",
        "y.nii.gz.part",
        ".ctsr-1-abcdef.part",
    ):
        (data / name).write_bytes(b"")
    (data / ".git").mkdir()
    (data / ".git" / "z.nii").write_bytes(b"")
    found = [str(p.relative_to(data)) for p in volumes_in(data)]
    names = ["X.NII.GZ", "a.nii.gz", "sub/b.nii", "with space.nii", " d.nii", "#c.nii", "é.nii"]
    names += ["u\u2028v.nii", os.fsdecode(b"d\xff.nii")]
    assert found == sorted(names)
    assert volumes_in(data / ".git") == [data / ".git" / "z.nii"]
    with pytest.raises(InputError, match="does not exist"):
        volumes_in(data / "none")
    with pytest.raises(InputError, match="is not a folder"):
        volumes_in(data / "a.nii.gz")


def test_links_to_folders_are_followed_and_never_in_a_circle(data, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "e.nii").write_bytes(b"")
    (elsewhere / "back").symlink_to(data)
    (data / "sub" / "up").symlink_to("..")
    (data / "above").symlink_to(tmp_path)
    (data / "nowhere").symlink_to("none")
    before = volumes_in(data)
    (data / "patient").symlink_to(elsewhere)
    assert [p for p in volumes_in(data) if p not in before] == [data / "patient" / "deep" / "e.nii"]


def test_a_folder_that_can_not_be_read_is_refused_by_name(data, monkeypatch):
    scandir = os.scandir

    def denied(path):  # a mode bit does not stop root
        if os.fspath(path).endswith("sub"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InputError, match="permission denied") as refused:
        volumes_in(data)
    assert refused.value.path == str(data / "sub")


def test_what_a_disk_keeps_at_its_root_for_itself_is_no_folder_of_scans(data):
    before = volumes_in(data)
    (data / "lost+found").mkdir()
    (data / "lost+found" / "e.nii").write_bytes(b"")
    assert volumes_in(data) == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.nii.gz", "b"), ("b.nii", "b"), ("B.NII.GZ", "B"), ("b.1.nii", "b.1"), ("b.json", "b"),
        ("b", "b"), (".nii", ""),
    ],
)  # fmt: skip
def test_the_stem_is_the_name_without_the_format(name, expected):
    assert stem(name) == expected


# Tables

CELLS = st.text(
    alphabet=st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\r"), max_size=12
)


@given(rows=st.lists(st.fixed_dictionaries({"file": CELLS, "a b": CELLS}), max_size=5))
def test_a_written_table_is_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("table") / "t.csv"
    write_table(path, ["file", "a b"], rows, overwrite=True)
    assert read_table(path, columns=["a b", "file"]) == rows


def test_numbers_stay_numbers_and_formulas_become_text(tmp_path):
    path = tmp_path / "t.csv"
    row = {"a": -3.5, "b": "=cmd()", "c": "-2", "d": "@x", "e": None, "f": 1}
    write_table(path, list(row), [row, {}], overwrite=False)
    assert path.read_text() == "a,b,c,d,e,f\n-3.5,'=cmd(),-2,'@x,,1\n,,,,,\n"
    assert read_table(path)[0]["b"] == "=cmd()"


@pytest.mark.parametrize(
    ("raw", "line", "words"),
    [
        (b"", None, "is empty"),
        (b"\n\n", None, "is empty"),
        (b"file,case\nx,1\n", 1, "has no column patient; found file, case"),
        (b"file;patient\nx;1\n", 1, "has no column file, patient; found file;patient"),
        (b"file,patient\nx,1\ny\n", 3, "has 1 cells, 2 expected"),
        (b"file,patient\nx,1\ny,2,3\n", 3, "has 3 cells, 2 expected"),
        (b"file,patient,file\n", 1, "names a column twice"),
        (b"file,patient\nx,\0\n", 2, "NUL"),
        (b"file,patient\nx,caf\xe9\n", 2, "is not UTF-8"),
        (b"file,patient\nx,1\n" + b"y" * 200_000 + b",2\n", 3, "field larger"),
        (b'file,patient\nx,"open\n', 2, "unexpected end"),
    ],
)
def test_a_broken_table_is_refused_by_line(tmp_path, raw, line, words):
    path = listed(tmp_path, raw, "t.csv")
    with pytest.raises(InputError) as refused:
        read_table(path, columns=["file", "patient"])
    assert words in refused.value.reason
    assert refused.value.path == (f"{path}:{line}" if line else str(path))


def test_a_byte_order_mark_and_blank_lines_are_no_content(tmp_path):
    path = listed(tmp_path, b"\xef\xbb\xbf\r\nfile,patient\r\n\r\nx,1\r\n", "t.csv")
    assert read_table(path, columns=["file"]) == [{"file": "x", "patient": "1"}]
    with pytest.raises(InputError, match="does not exist"):
        read_table(tmp_path / "none.csv")
