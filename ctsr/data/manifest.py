"""`manifest.csv` of a data folder: a row a scan, and the lists that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctsr.data.splits import SHARES, update_lists
from ctsr.io.lists import read_table, write_table

__all__ = ["MANIFEST", "update_manifest"]

MANIFEST = "manifest.csv"
COLUMNS = ["file", "patient", "set", "slices", "spacing_mm", "thickness_mm", "pixel_mm", "source"]


def update_manifest(
    data: Path, rows: Sequence[Mapping[str, Any]], *, shares: Mapping[str, float] = SHARES, seed: int = 0
) -> list[dict[str, Any]]:
    """Put `rows` into the manifest in place of those of the same files, and write the lists; returns `rows` with sets.

    A row has at least file (relative to `data`, /) and patient. `unlisted` says why a scan is kept out of the lists.
    Files with one `sha256` are one scan, whatever they are called: its patients count as one and share a set.
    Rows of other files, and columns that this version does not know, are kept.
    Raises InputError where the lists, as they are, have a patient in two sets.
    """
    path = data / MANIFEST
    own = {row["file"] for row in rows}
    others = read_table(path, columns=["file"]) if path.exists() else []
    every: list[dict[str, Any]] = [row for row in others if row["file"] not in own] + [dict(r) for r in rows]
    sets = update_lists(data, _persons([r for r in every if not r.get("unlisted")]), shares=shares, seed=seed)
    for row in every:
        row["set"] = sets.get(row["file"], "")
    columns = list(dict.fromkeys([*COLUMNS, *(name for row in every for name in row)]))
    write_table(path, columns, every, overwrite=True)
    return every[len(every) - len(rows) :]


def _persons(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """file → the first of all patients that hold a scan in common with this file's; mostly its own."""
    joined: dict[str, str] = {}

    def first(patient: str) -> str:
        while patient in joined:
            patient = joined[patient]
        return patient

    holder: dict[str, str] = {}
    for row in rows:
        patient = first(row.get("patient") or row["file"])
        if digest := row.get("sha256"):
            other = first(holder.setdefault(digest, patient))
            if other != patient:
                joined[patient] = other
    return {row["file"]: first(row.get("patient") or row["file"]) for row in rows}
