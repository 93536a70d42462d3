"""What converted scans are called, and by which key patients are told apart: nothing that names a person.

Names are keyed hashes (HMAC-SHA256), since a plain hash of a short patient ID is reversed by trying them all. The
key is made once per project and stays on this machine; with it, names and splits are the same from run to run.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from ctsr.data.splits import MANIFEST
from ctsr.errors import InputError, UsageError
from ctsr.io.atomic import input_error, output_error, write_text
from ctsr.io.dicom.elements import text
from ctsr.io.dicom.records import Slice, Stack
from ctsr.io.lists import read_table
from ctsr.workflows.folder import Report
from ctsr.workflows.requests import Conversion

__all__ = ["KEY", "SOURCE", "Naming", "content_digest", "naming_of"]

KEY = "subject.key"
SOURCE = "ctsr convert"  # in the manifest: how a scan came about
_FRAME_OF_REFERENCE, _SOP_INSTANCE = 0x00200052, 0x00080018
_LONGEST_ID = 64  # characters of a patient ID, as in the standard


@dataclass(frozen=True, slots=True)
class Naming:
    """key: 32 bytes. style: "hash" or "patient", where the file's name begins with the patient ID."""

    key: bytes
    style: str = "hash"

    def patient(self, stack: Stack) -> str:
        """12 hexadecimal digits, the same for all scans of a person; of a study where no patient ID is given."""
        known = (stack.patient_id, stack.study_uid, text(stack.slices[0].header, _FRAME_OF_REFERENCE))
        return self._hash(next(filter(None, known), "") or content_digest(stack))[:12]

    def file(self, stack: Stack) -> str:
        """The file's name without a suffix: patient, underscore, 8 hexadecimal digits of the series."""
        first = self.patient(stack)
        if self.style == "patient":
            first = re.sub(r"[^A-Za-z0-9._-]+", "-", stack.patient_id[:_LONGEST_ID]).strip("-.") or first
        return f"{first}_{self._hash((stack.series_uid or content_digest(stack)) + stack.label)[:8]}"

    def _hash(self, what: str) -> str:
        return hmac.new(self.key, what.encode("utf-8", errors="surrogateescape"), hashlib.sha256).hexdigest()


def content_digest(stack: Stack) -> str:
    """sha256 over what makes the slices: their SOP instance UIDs, sizes, positions and rescale; no pixel is read."""
    digest = hashlib.sha256()
    for s in stack.slices:
        digest.update(repr((text(s.header, _SOP_INSTANCE), s.frame, _size(s), s.slope, s.intercept)).encode())
        digest.update(s.position.tobytes())
    return digest.hexdigest()


def _size(s: Slice) -> int:
    """Bytes of a plain file; -1 in an archive, whose members may be packed anew."""
    try:
        return s.file.path.stat().st_size if s.file.member is None else -1
    except OSError as exc:
        raise input_error(exc, s.file.name) from exc


def naming_of(project: Path, data: Path, c: Conversion, report: Report) -> Naming | None:
    """How scans are named, by the key of the project; where there is none, it is made, or in a dry run None.

    Makes both folders, but for a dry run. Raises UsageError where scans are there that were named with a key that is
    gone: another one would give their patients a second name.
    """
    path, manifest = project / KEY, data / MANIFEST
    rows = read_table(manifest, columns=["file"]) if manifest.exists() else []
    if c.names == "patient":
        report.note("names hold the patient IDs: for public collections only")
    if not c.is_dry_run:
        try:
            for folder in (project, data):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise output_error(exc, data) from exc
    if not path.exists():
        if any(row.get("source") == SOURCE for row in rows):
            reason = "is not there, but the manifest holds scans that were named with it"
            raise UsageError(reason, path=path, hint="put it back, or convert into another project")
        if c.is_dry_run:
            return None
        try:
            write_text(path, secrets.token_hex(32) + "\n", overwrite=False, mode=0o600)
        except UsageError:
            if not path.is_file():  # else another share of the work was first
                raise
        report.note(f"{path}: made; names follow from it, so keep it, and keep it to yourself")
    try:
        found = path.read_text("ascii", errors="replace").strip()
    except OSError as exc:
        raise input_error(exc, path) from exc
    if not re.fullmatch(r"[0-9a-f]{64}", found):
        raise InputError("is no key of 64 hexadecimal digits", path=path, hint="restore it from a backup")
    return Naming(bytes.fromhex(found), c.names)
