"""`download-weights`: names in, checked files with their records in a folder out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ctsr.errors import UsageError, WeightsError
from ctsr.weights import hub
from ctsr.weights.registry import PUBLISHED, SHIPPED, Published, locate

__all__ = ["download_weights", "list_weights", "verify_weights"]

Row = dict[str, Any]


def list_weights(root: Path) -> list[Row]:
    """A row for all weights that have a name, and for what else lies in the folder `root`."""
    known = {str(entry.reference) for entry in PUBLISHED.values()}
    records = (
        json.loads(path.read_text("utf-8")) for path in sorted(root.glob("*/*@*/**/*.safetensors.json"))
    )
    others = [record["reference"] for record in records if record["reference"] not in known]
    return [_row(name, _entry(name), root) for name in [*SHIPPED, *PUBLISHED, *others]]


def download_weights(
    names: Sequence[str],
    root: Path,
    *,
    source: Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    timeout: float = hub.TIMEOUT,
    note: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Bring weights into the folder `root`: from the Hub, or from another such folder, `source`; a row for each.

    What is there and whole is left alone, unless `overwrite`. Raises what `hub.download` and `hub.read` raise.
    """

    def announce(record: Row) -> None:
        pin = "pinned" if record["is_pinned"] else "not pinned: what the hub names"
        size = f"{record['bytes'] / 1e6:.1f} MB"
        note(
            f"{record['reference']}: commit {record['commit']}, {size}, sha256 {record['sha256']} ({pin}),"
            f" licence {record['licence']}"
        )

    entries = [(name, _entry(name, revision)) for name in names]
    for _, entry in entries:
        if entry is None or (not overwrite and _is_whole(entry, root, note)):
            continue
        if source is not None:
            data = hub.read(entry.reference, source, sha256=entry.sha256)
            hub.store(data, entry.reference, root, hub.record_of(entry.reference, source))
        else:
            hub.download(
                entry.reference, root, sha256=entry.sha256, licence=entry.licence, timeout=timeout,
                announce=announce, progress=progress,
            )  # fmt: skip
    return [_row(name, entry, root) for name, entry in entries]


def verify_weights(names: Sequence[str], root: Path) -> list[Row]:
    """Hash what lies in `root`, all of it where no name is given. Raises WeightsError where something is altered."""
    rows = [_row(name, _entry(name), root) for name in names]
    rows = rows or [row for row in list_weights(root) if row["path"]]
    altered = []
    for row in rows:
        row["state"] = "whole"
        if (entry := _entry(row["name"])) is not None:
            try:
                hub.read(entry.reference, root, sha256=entry.sha256)
            except WeightsError as exc:
                row["state"] = exc.reason
                altered.append(exc)
    if altered:
        first = altered[0]
        reason = f"{first.reason}; {len(altered)} of {len(rows)} are not whole"
        raise WeightsError(reason, path=first.path, hint=first.hint, report={"weights": rows})
    return rows


def _is_whole(entry: Published, root: Path, note: Callable[[str], None]) -> bool:
    if not hub.record_of(entry.reference, root):
        return False
    try:
        hub.read(entry.reference, root, sha256=entry.sha256)
    except WeightsError as exc:
        note(f"{exc.path}: {exc.reason}: replaced")
        return False
    return True


def _entry(name: str, revision: str | None = None) -> Published | None:
    """What a name or `hf://…` stands for; None for what is inside the package."""
    if name in SHIPPED and revision is None:
        return None
    if name in SHIPPED:
        raise UsageError("--revision has no meaning for it: it is inside the package", path=name)
    if name.startswith("hf://"):
        reference = hub.Reference.parse(name)
        entry = next((e for e in PUBLISHED.values() if e.reference == reference), None)
        entry = entry or Published("", reference, "not known here", 0)
    elif (found := PUBLISHED.get(name)) is not None:
        entry = found
    else:
        near = get_close_matches(name, [*SHIPPED, *PUBLISHED], 1)
        hint = f"did you mean {near[0]}?" if near else f"{', '.join([*SHIPPED, *PUBLISHED])}, or hf://…"
        raise UsageError("no weights of this name", path=name, hint=hint)
    if revision in (None, entry.reference.revision):
        return entry
    asked = hub.Reference.parse(str(replace(entry.reference, revision=str(revision))))
    return replace(entry, reference=asked, sha256="")


def _row(name: str, entry: Published | None, root: Path) -> Row:
    """What is known of weights: from the file where it is inside the package, else from its record."""
    if entry is None:
        path = locate(name)
        data = path.read_bytes()
        return {
            "name": name, "kind": name, "source": "inside the package", "revision": "", "file": path.name,
            "commit": "", "bytes": len(data), "size": f"{len(data) / 1e6:.1f} MB",
            "sha256": hashlib.sha256(data).hexdigest(), "is_pinned": True, "licence": "Apache-2.0", "path": str(path),
        }  # fmt: skip
    reference, record = entry.reference, hub.record_of(entry.reference, root)
    size = f"{record['bytes'] / 1e6:.1f} MB" if record else f"{entry.size_mb} MB"
    return {
        "name": name, "kind": entry.kind, "source": f"hf://{reference.repo}", "revision": reference.revision,
        "file": reference.file, "commit": record.get("commit", ""), "bytes": record.get("bytes"), "size": size,
        "sha256": record.get("sha256", entry.sha256) or "not pinned", "is_pinned": bool(entry.sha256),
        "licence": entry.licence, "path": str(reference.under(root)) if record else "",
    }  # fmt: skip
