"""File lists, folders of volumes, and tables."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ctsr.errors import InputError, UsageError
from ctsr.io.atomic import PathLike, input_error, write_text

__all__ = [
    "VOLUME_SUFFIXES",
    "read_file_list",
    "read_table",
    "stem",
    "volumes_in",
    "write_file_list",
    "write_table",
]

VOLUME_SUFFIXES = (".nii.gz", ".nii")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet runs a cell that starts so


def stem(path: PathLike) -> str:
    """The file's name without .nii or .nii.gz; any other name without its last suffix."""
    name = os.path.basename(os.fspath(path))
    for suffix in VOLUME_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return os.path.splitext(name)[0]


def volumes_in(folder: PathLike) -> list[Path]:
    """All NIfTI files under `folder`, sorted, without hidden files and folders; may be empty."""
    if not os.path.isdir(folder):
        raise InputError("is not a folder" if os.path.lexists(folder) else "does not exist", path=folder)
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [
            Path(here, n) for n in names if n.lower().endswith(VOLUME_SUFFIXES) and not n.startswith(".")
        ]
    return sorted(found)


def read_file_list(
    path: PathLike,
    data_dir: PathLike | None = None,
    *,
    notes: list[str] | None = None,
    must_exist: bool = True,
) -> list[Path]:
    """The files that a list names, one a line, in its order.

    data_dir: the folder that names are relative to and must lie in; None: the list's own folder.
    Blank lines and lines that start with # are skipped; a file named twice is taken once, with a note.
    """
    try:
        text = _text(path, errors="surrogateescape")  # a name may hold bytes that are not UTF-8
    except InputError as exc:
        if isinstance(exc.__cause__, FileNotFoundError):  # an option that names nothing, not a damaged input
            raise UsageError(exc.reason, path=path) from exc
        raise
    folder = Path(data_dir) if data_dir is not None else Path(path).parent
    inside = folder.resolve()
    files: dict[Path, Path] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        name = line.strip()
        if not name or name.startswith("#"):
            continue
        where = f"{os.fspath(path)}:{number}"
        if "\0" in name:
            raise InputError("holds a NUL byte", path=where)
        try:
            real = (folder / name).resolve()
            is_there = real.exists()
        except (OSError, RuntimeError) as exc:  # a loop of links, a name too long
            raise InputError(f"{name} cannot be looked at", path=where) from exc
        if not real.is_relative_to(inside):
            raise InputError(f"{name} lies outside the data folder {folder}", path=where)
        if must_exist and not is_there:
            raise InputError(f"{name} does not exist", path=where)
        if real in files and notes is not None:
            notes.append(f"{where}: {name} stands in the list twice, taken once")
        files.setdefault(real, folder / name)
    if not files:
        raise UsageError("names no files", path=path)
    return list(files.values())


def write_file_list(
    path: PathLike, files: Iterable[PathLike], *, overwrite: bool, data_dir: PathLike | None = None
) -> None:
    """Write names relative to `data_dir` (None: the list's folder), as `read_file_list` reads them."""
    folder = Path(data_dir) if data_dir is not None else Path(path).parent
    names = [Path(os.path.relpath(f, folder)).as_posix() for f in files]
    for name in names:
        if name != name.rstrip() or "\n" in name or "\r" in name:
            raise UsageError(
                f"{name!a} can't stand in a list: a line break, or a space at its end", path=path
            )
    lines = (f"./{n}\n" if n.startswith("#") or n != n.strip() else f"{n}\n" for n in names)
    write_text(path, "".join(lines), overwrite=overwrite)


def read_table(path: PathLike, *, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV file, each a dict by column name.

    columns: names that must be there. InputError names the line of a row that is broken.
    """
    text = _text(path)
    if "\0" in text:
        raise InputError(
            "holds a NUL byte", path=f"{os.fspath(path)}:{text[: text.index(chr(0))].count(chr(10)) + 1}"
        )
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[dict[str, str]] = []
    header: list[str] = []
    try:
        for cells in reader:
            where = f"{os.fspath(path)}:{reader.line_num}"
            if not cells:
                continue
            if not header:
                header = [c.strip() for c in cells]
                if missing := [c for c in columns if c not in header]:
                    raise InputError(
                        f"has no column {', '.join(missing)}; found {', '.join(header)}", path=where
                    )
                if len(set(header)) < len(header):
                    raise InputError("names a column twice", path=where)
            elif len(cells) != len(header):
                raise InputError(f"has {len(cells)} cells, {len(header)} expected", path=where)
            else:
                rows.append(dict(zip(header, map(_unquoted, cells), strict=True)))
    except csv.Error as exc:
        raise InputError(f"is no CSV: {exc}", path=f"{os.fspath(path)}:{reader.line_num}") from exc
    if not header:
        raise InputError("is empty, a row of column names is expected", path=path)
    return rows


def write_table(
    path: PathLike,
    columns: Sequence[str],
    rows: Iterable[Mapping[str, object]],
    *,
    overwrite: bool,
    mode: int = 0o666,
) -> None:
    """Write rows as CSV with the given columns; a cell missing in a row is left empty.

    Text that a spreadsheet would run as a formula gets an apostrophe in front; `read_table` takes it off.
    """
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_quoted(row.get(c)) for c in columns])
    write_text(path, out.getvalue(), overwrite=overwrite, mode=mode)


def _quoted(value: object) -> str:
    if value is None:
        return ""
    text = str(value)
    return (
        f"'{text}" if isinstance(value, str) and text.startswith(_FORMULA) and not _is_number(text) else text
    )


def _unquoted(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _text(path: PathLike, *, errors: str = "strict") -> str:
    """A text file's content, without a byte-order mark, newlines as \\n."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise InputError("is a folder" if os.path.isdir(path) else "is not a file", path=path)
    try:
        raw = Path(path).read_bytes()
    except OSError as exc:
        raise input_error(exc, path) from exc
    try:
        text = raw.decode("utf-8-sig", errors=errors)
    except UnicodeDecodeError as exc:
        line = raw[: exc.start].count(b"\n") + 1
        raise InputError(
            "is not UTF-8 text", path=f"{os.fspath(path)}:{line}", hint="save it as UTF-8"
        ) from exc
    return text.replace("\r\n", "\n").replace("\r", "\n")
