"""`download-weights`: names in, checked files with their records in a folder out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
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
    known = [entry.reference for entry in PUBLISHED.values()]
    others = [str(reference) for reference in hub.stored(root) if reference not in known]
    return [_row(name, _entry(name), root) for name in [*SHIPPED, *PUBLISHED, *others]]


def verify_weights(names: Sequence[str], root: Path) -> list[Row]:
    """Hash what lies in `root`, all of it where no name is given. Raises WeightsError where something is altered."""
    rows = [_row(name, _entry(name), root) for name in names]
    rows = rows or [row for row in list_weights(root) if row["path"]]
    altered = []
    for row in rows:
        row["state"], entry = "whole", _entry(row["name"])
        try:
            if entry.reference.repo:
                hub.read(entry.reference, root, sha256=entry.sha256)
        except WeightsError as exc:
            row["state"] = exc.reason
            altered.append(exc)
    if altered:
        reason = f"{altered[0].reason}; {len(altered)} of {len(rows)} are not whole"
        raise WeightsError(reason, path=altered[0].path, hint=altered[0].hint, report={"weights": rows})
    return rows


def download_weights(
    names: Sequence[str],
    root: Path,
    *,
    source: Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    timeout: float = hub.TIMEOUT,
    progress: hub.Progress = lambda record, done: None,
) -> list[Row]:
    """Bring weights into the folder `root`: from the Hub, or from another such folder, `source`; a row for each.

    What is there and whole is left alone, unless `overwrite`. Raises what `hub.download` and `hub.read` raise.
    """
    entries = [(name, _entry(name, revision)) for name in names]
    for entry in (entry for _, entry in entries if entry.reference.repo):
        of = entry.reference
        with suppress(WeightsError):  # not here, or altered
            if not overwrite:
                hub.read(of, root, sha256=entry.sha256)
                continue
        if source is not None:
            hub.store(hub.read(of, source, sha256=entry.sha256), of, root, hub.record_of(of, source))
        else:
            known = {"sha256": entry.sha256, "licence": entry.licence}
            hub.download(of, root, **known, timeout=timeout, progress=progress)
    return [_row(name, entry, root) for name, entry in entries]


def _entry(name: str, revision: str | None = None) -> Published:
    """What a name or `hf://…` stands for; of what is inside the package the reference has no repository."""
    if name in SHIPPED:
        if revision is not None:
            raise UsageError("--revision has no meaning for it: it is inside the package", path=name)
        return Published(name, hub.Reference("", "", SHIPPED[name]), "Apache-2.0")
    if name.startswith("hf://"):
        reference = hub.Reference.parse(name)
        known = [entry for entry in PUBLISHED.values() if entry.reference == reference]
        entry = known[0] if known else Published("", reference, "not known here")
    elif name in PUBLISHED:
        entry = PUBLISHED[name]
    else:
        near = get_close_matches(name, [*SHIPPED, *PUBLISHED], 1)
        hint = f"did you mean {near[0]}?" if near else f"{', '.join([*SHIPPED, *PUBLISHED])}, or hf://…"
        raise UsageError("no weights of this name", path=name, hint=hint)
    if revision in (None, entry.reference.revision):
        return entry
    asked = hub.Reference.parse(str(replace(entry.reference, revision=str(revision))))
    return replace(entry, reference=asked, sha256="")


def _row(name: str, entry: Published, root: Path) -> Row:
    """What is known of weights: from the file where it is inside the package, else from its record in `root`."""
    of = entry.reference
    known, path = hub.record_of(of, root) if of.repo else {}, of.under(root)
    if not of.repo:
        path = locate(name)
        data = path.read_bytes()
        known = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "is_pinned": True}
    return {
        "name": name, "kind": entry.kind, "source": f"hf://{of.repo}" if of.repo else "inside the package",
        "revision": of.revision, "commit": known.get("commit", ""), "file": of.file, "bytes": known.get("bytes"),
        "size": f"{known.get('bytes', entry.size_mb * 1e6) / 1e6:.3g} MB",
        "sha256": known.get("sha256", entry.sha256) or "not pinned", "is_pinned": known.get("is_pinned", False),
        "licence": entry.licence, "path": str(path) if known else "",
    }  # fmt: skip
