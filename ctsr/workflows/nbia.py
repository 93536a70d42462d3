"""A download from the NBIA archive: which series it should hold, and how many images each.

`metadata.csv` lies beside the images, one row a series; `*.tcia` is the list that the download was made from. Both
hold UIDs and patients' names, so nothing of them is ever shown.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ctsr.errors import InputError
from ctsr.io.dicom.records import Refused, Scan
from ctsr.io.lists import read_table

__all__ = ["refuse_incomplete"]

_SERIES, _IMAGES, _MODALITY = "Series UID", "Number of Images", "Modality"
_LIST_BEGINS = "ListOfSeriesToDownload="
_HINT = "an incomplete download: fetch it again"


def refuse_incomplete(scan: Scan, source: Path, notes: list[str]) -> Scan:
    """The scan with every CT series refused of which `metadata.csv` says that images are missing.

    notes: gets a line where the two files can't be read, or where series were never downloaded.
    """
    expected = _expected(source, notes)
    if not expected:
        return scan
    present: Counter[str] = Counter()
    for stack in scan.stacks:
        present[stack.series_uid] += len({s.file for s in stack.slices})
    for refused in scan.refused:
        present[refused.series_uid] += refused.n_files
    for skipped in scan.skipped:
        present[skipped.series_uid] += 1
    if absent := sum(not present[uid] for uid in expected):
        notes.append(f"metadata.csv: {absent} of {len(expected)} CT series have no image here")
    named = {s.series_uid: s.name for s in scan.stacks} | {r.series_uid: r.name for r in scan.refused}
    incomplete = tuple(
        Refused(named[uid], present[uid], f"{present[uid]} of {n} images present", _HINT, uid)
        for uid, n in expected.items()
        if uid in named and present[uid] < n
    )
    out = {r.series_uid for r in incomplete}
    return Scan(
        tuple(s for s in scan.stacks if s.series_uid not in out),
        scan.skipped,
        tuple(r for r in scan.refused if r.series_uid not in out) + incomplete,
    )


def _expected(source: Path, notes: list[str]) -> dict[str, int]:
    """Images of each CT series that `metadata.csv` names."""
    rows: dict[str, dict[str, str]] = {}
    for path in _near(source, "metadata.csv"):
        try:
            rows |= {r[_SERIES]: r for r in read_table(path, columns=[_SERIES, _IMAGES, _MODALITY])}
        except InputError as exc:
            notes.append(f"{exc}: incomplete downloads are not noticed")
    if rows:
        for path in _near(source, "*.tcia"):
            wanted = _wanted(path)
            if absent := wanted - rows.keys():
                notes.append(f"{path}: {len(absent)} of {len(wanted)} series were not downloaded")
    numbers = {uid: row[_IMAGES].strip() for uid, row in rows.items() if row[_MODALITY].strip() == "CT"}
    return {uid: int(n) for uid, n in numbers.items() if n.isascii() and n.isdigit()}


def _wanted(path: Path) -> set[str]:
    """The series that a `.tcia` manifest asks for."""
    lines = (line.strip() for line in path.read_text("utf-8", errors="replace").splitlines())
    return set(
        filter(None, itertools.islice(itertools.dropwhile(lambda s: s != _LIST_BEGINS, lines), 1, None))
    )


def _near(source: Path, pattern: str) -> Iterator[Path]:
    """Files of that name in the folder given and in those just below it."""
    if source.is_dir():
        yield from sorted(p for p in {*source.glob(pattern), *source.glob(f"*/{pattern}")} if p.is_file())
