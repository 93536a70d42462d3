"""Which patient trains, validates or tests: by the patient's hash, and for good once it stands in a list.

`manifest.csv` of a data folder has a row a scan; the lists follow from it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctsr.errors import InputError
from ctsr.io.lists import read_file_list, read_table, write_file_list, write_table

__all__ = ["MANIFEST", "SETS", "SHARES", "assign", "list_path", "update_lists", "update_manifest"]

MANIFEST = "manifest.csv"
COLUMNS = ["file", "patient", "set", "slices", "spacing_mm", "thickness_mm", "pixel_mm", "source"]
SETS = ("train", "val", "test")
SHARES = {"val": 0.1, "test": 0.1}  # of the patients; the rest trains
SMALLEST = 3  # patients from which on no set is empty


def list_path(data_dir: Path, name: str) -> Path:
    """Where the list of a set lies; `all` names every file."""
    return data_dir / f"{name}_files.txt"


def assign(
    patients: Iterable[str],
    *,
    kept: Mapping[str, str] | None = None,
    shares: Mapping[str, float] = SHARES,
    seed: int = 0,
) -> dict[str, str]:
    """The set of each patient: sorted by hash, cut at rounded shares; from three patients on none is empty.

    kept: patients that stand in a set already and stay there; they count towards its share.
    shares: of val and test, 0…1; the rest trains. A share of 0 asks for an empty set. seed: another one, another order.
    """
    kept = dict(kept or {})
    salt = f"{seed}:" if seed else ""
    new = sorted(
        set(patients) - set(kept),
        key=lambda p: hashlib.sha256(f"{salt}{p}".encode(errors="surrogateescape")).digest(),
    )
    total = len(new) + len(kept)
    sets = dict(kept)
    wanted = {
        name: max(math.floor(total * share + 0.5), int(total >= SMALLEST and share > 0))
        for name, share in shares.items()
    }
    while sum(shares.values()) < 1 and total >= SMALLEST and sum(wanted.values()) >= total:
        wanted[max(wanted, key=lambda name: wanted[name])] -= 1  # they were rounded up: one must train
    for name, n in wanted.items():
        missing = max(0, n - sum(s == name for s in kept.values()))
        sets |= dict.fromkeys(new[:missing], name)
        new = new[missing:]
    return sets | dict.fromkeys(new, "train")


def update_lists(
    data_dir: Path, patient_of: Mapping[str, str], *, shares: Mapping[str, float] = SHARES, seed: int = 0
) -> dict[str, str]:
    """Write train, val, test and all lists of a data folder; returns the set of each file.

    patient_of: file (relative to data_dir, /) → patient, of all that should stand in the lists. What stands
    in one already keeps its place, and takes its patient's other files there. shares, seed: see `assign`.
    Raises InputError where a patient stands in two lists.
    """
    sets = _listed(data_dir)
    kept: dict[str, str] = {}
    for file, name in sets.items():
        patient = patient_of.get(file, file)
        if kept.setdefault(patient, name) != name:
            raise InputError(
                f"a patient's files stand in {kept[patient]}_files.txt and in {name}_files.txt",
                path=data_dir / file,
                hint="take them out of one",
            )
    of_patient = assign(patient_of.values(), kept=kept, shares=shares, seed=seed)
    sets |= {file: of_patient[patient] for file, patient in patient_of.items()}
    for name in SETS:
        files = sorted(f for f, s in sets.items() if s == name)
        write_file_list(list_path(data_dir, name), [data_dir / f for f in files], overwrite=True)
    write_file_list(list_path(data_dir, "all"), [data_dir / f for f in sorted(sets)], overwrite=True)
    return sets


def _listed(data_dir: Path) -> dict[str, str]:
    """file → set, of the lists that are there."""
    listed: dict[str, str] = {}
    for name in SETS:
        path = list_path(data_dir, name)
        if not path.is_file() or not path.read_bytes().strip():
            continue
        for file in read_file_list(path, data_dir):
            relative = file.relative_to(data_dir).as_posix()
            if listed.setdefault(relative, name) != name:
                raise InputError(f"stands in {listed[relative]}_files.txt too", path=f"{path}: {relative}")
    return listed


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
