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
    "VOLUME_SUFFIXES", "read_file_list", "read_table", "stem", "volumes_in", "write_file_list", "write_table",
]  # fmt: skip

VOLUME_SUFFIXES = (".nii.gz", ".nii")
LOST = "lost+found"  # at the root of a disk, which its owner alone reads
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet runs a cell that starts so


def stem(path: PathLike) -> str:
    """The file's name without .nii or .nii.gz; any other name without its last suffix."""
    name = os.path.basename(os.fspath(path))
    for suffix in VOLUME_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return os.path.splitext(name)[0]


def volumes_in(folder: PathLike) -> list[Path]:
    """All NIfTI files under `folder`, sorted, without hidden files and folders, and `lost+found`; may be empty.

    Links to folders are followed, but for those that lead back to a folder they lie in. A folder that can't be read
    is an InputError: its files would be missing without a word.
    """
    if not os.path.isdir(folder):
        raise InputError("is not a folder" if os.path.lexists(folder) else "does not exist", path=folder)
    found: list[Path] = []

    def refuse(exc: OSError) -> None:
        raise input_error(exc, exc.filename) from exc

    def leads_back(path: Path) -> bool:
        return path.resolve() in {above.resolve() for above in path.absolute().parents}

    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [f for f in folders if not (f.startswith(".") or f == LOST or leads_back(Path(here, f)))]
        names = [n for n in names if n.lower().endswith(VOLUME_SUFFIXES) and not n.startswith(".")]
        found += (Path(here, name) for name in names)
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
    if not os.path.exists(path):  # an option that names nothing, not a damaged input
        raise UsageError("does not exist", path=path)
    folder = Path(path).parent if data_dir is None else Path(data_dir)
    inside = os.path.realpath(folder)
    files: dict[str, Path] = {}
    for number, line in enumerate(_text(path, errors="surrogateescape").split("\n"), start=1):
        name = line.strip()
        if not name or name.startswith("#"):
            continue
        where = f"{os.fspath(path)}:{number}"
        real = os.path.realpath(folder / name)
        if not Path(real).is_relative_to(inside):
            raise InputError(f"{name} lies outside the data folder {folder}", path=where)
        if must_exist and not os.path.exists(real):
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
    folder = Path(path).parent if data_dir is None else Path(data_dir)
    lines = []
    for name in (Path(os.path.relpath(f, folder)).as_posix() for f in files):
        if name != name.rstrip() or "\n" in name or "\r" in name:
            raise UsageError(
                f"{name!a} can't stand in a list: it has a line break or ends in a space", path=path
            )
        lines.append(f"./{name}\n" if name.startswith("#") or name != name.lstrip() else f"{name}\n")
    write_text(path, "".join(lines), overwrite=overwrite)


def read_table(path: PathLike, *, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV file, each a dict by column name.

    columns: names that must be there. InputError names the line of a row that is broken.
    """
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)

    def broken(reason: str) -> InputError:
        return InputError(reason, path=f"{os.fspath(path)}:{reader.line_num}")

    try:
        header = [cell.strip() for cell in next(filter(None, reader), [])]
        if not header:
            raise InputError("is empty, a row of column names is expected", path=path)
        if missing := [c for c in columns if c not in header]:
            raise broken(f"has no column {', '.join(missing)}; found {', '.join(header)}")
        if len(set(header)) < len(header):
            raise broken("names a column twice")
        rows = []
        for cells in filter(None, reader):
            if len(cells) != len(header):
                raise broken(f"has {len(cells)} cells, {len(header)} expected")
            rows.append(dict(zip(header, map(_unquoted, cells), strict=True)))
        return rows
    except csv.Error as exc:
        raise broken(f"is no CSV: {exc}") from exc


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
    writer.writerows([_quoted(row.get(c)) for c in columns] for row in rows)
    write_text(path, out.getvalue(), overwrite=overwrite, mode=mode)


def _quoted(value: object) -> object:
    if not isinstance(value, str) or not value.startswith(_FORMULA):
        return value  # csv writes None as nothing
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def _unquoted(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell


def _text(path: PathLike, *, errors: str = "strict") -> str:
    """A text file's content, without a byte-order mark, newlines as \\n; InputError names a line that is no text."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise InputError("is a folder" if os.path.isdir(path) else "is not a file", path=path)
    try:
        raw = Path(path).read_bytes()
    except OSError as exc:
        raise input_error(exc, path) from exc
    reason, at = "holds a NUL byte", raw.find(b"\0")
    try:
        text = raw.decode("utf-8-sig", errors=errors)
    except UnicodeDecodeError as exc:
        reason, at = "is not UTF-8 text", exc.start
    if at >= 0:
        line = raw[:at].count(b"\n") + 1
        raise InputError(reason, path=f"{os.fspath(path)}:{line}", hint="save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")
