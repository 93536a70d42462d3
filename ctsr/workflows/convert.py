"""`convert`: everything that a folder, an archive or a file of DICOM holds, as NIfTI with records and lists."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctsr.data.manifest import MANIFEST, update_manifest
from ctsr.data.splits import SHARES
from ctsr.errors import CtsrError, InputError, SomeCasesFailed, UsageError
from ctsr.io.atomic import check_output, output_error
from ctsr.io.dicom.elements import text
from ctsr.io.dicom.records import Refused, Scan, Stack
from ctsr.io.lists import VOLUME_SUFFIXES, read_table, write_table
from ctsr.workflows.convert_names import KEY, Naming, content_digest, find_key
from ctsr.workflows.convert_select import Selection, spacing
from ctsr.workflows.convert_series import Task, agreeing_record, converter
from ctsr.workflows.folder import Case, run_cases, take_shard
from ctsr.workflows.nbia import refuse_incomplete

__all__ = ["Conversion", "Outcome", "Report", "convert", "parse_splits"]

SOURCE = "ctsr convert"  # in the manifest: how a scan came about
LINK_COLUMNS = ["file", "patient_id", "study_uid", "series_uid", "stack"]
_BURNED_IN = 0x00280301  # BurnedInAnnotation
_SMALLEST = 3  # patients from which on no list is empty


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What is converted, and how.

    originals_only, split: how files are grouped. keep_tilt, pad_hu: how series are read. names: "hash" or "patient".
    link: where the table from names to UIDs goes. shares, seed: of the split, see `ctsr.data.splits.assign`.
    workers: processes, None for as many as `cpus` and memory allow.
    """

    selection: Selection = field(default_factory=Selection)
    originals_only: bool = False
    split: bool = False
    keep_tilt: bool = False
    pad_hu: float = -1024.0
    names: str = "hash"
    link: Path | None = None
    shares: Mapping[str, float] = field(default_factory=lambda: SHARES)
    seed: int = 0
    workers: int | None = None
    cpus: int = 1
    shard: str | None = None
    overwrite: bool = False
    skip_existing: bool = False
    is_dry_run: bool = False

    def __post_init__(self) -> None:
        if self.names not in ("hash", "patient"):
            raise UsageError(f"--names: {self.names} is not hash or patient")
        if not -32768 <= self.pad_hu <= 0:
            raise UsageError(f"--pad-hu: {self.pad_hu:g} is not in -32768…0")
        if self.overwrite and self.skip_existing:
            raise UsageError("--overwrite and --skip-existing exclude each other")


@dataclass(frozen=True, slots=True)
class Report:
    """Whom to tell: notes, warnings, details, and the share that is done."""

    note: Callable[[str], None] = lambda text: None
    warn: Callable[[str], None] = lambda text: None
    detail: Callable[[str], None] = lambda text: None
    progress: Callable[[float, str], None] = lambda share, words: None


@dataclass(slots=True)
class Outcome:
    """What became of every file: series converted, left out on request or refused, and files skipped.

    Each a list of rows; those of `series` have a status: `ok`, `there` (it agrees, skipped) or `planned`.
    """

    series: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """For JSON."""
        names = ("series", "left_out", "refused", "skipped")
        return {name: getattr(self, name) for name in names} | {"summary": self.table()}

    def table(self) -> list[dict[str, Any]]:
        """A row for each outcome and kind of reason: how many series, and how many files."""
        words = {"ok": "converted", "there": "there already", "planned": "would convert"}
        told = [(words[r["status"]], "", 1, r["files"]) for r in self.series]
        told += [("left out", r["reason"], 1, r["files"]) for r in self.left_out]
        told += [("refused", r["reason"], 1, r["files"]) for r in self.refused]
        told += [("skipped", r["reason"], 0, 1) for r in self.skipped]
        groups: dict[tuple[str, str], list[tuple[str, str, int, int]]] = {}
        for row in told:  # reasons that differ in a number or in a file's name are one kind
            kind = row[1] if row[0] == "left out" else re.sub(r"\S*\d\S*", "…", row[1])
            groups.setdefault((row[0], kind), []).append(row)
        return [
            {
                "outcome": outcome,
                "series": sum(r[2] for r in rows) or None,
                "files": sum(r[3] for r in rows),
                "reason": rows[0][1] if len({r[1] for r in rows}) == 1 else kind,
            }
            for (outcome, kind), rows in groups.items()
        ]

    def raise_for_refusals(self, source: Path) -> None:
        """SomeCasesFailed where a series was refused, InputError where there is no CT volume at all."""
        if self.refused:
            first = self.refused[0]
            n = len(self.refused) + len(self.series) + len(self.left_out)
            reason = (
                f"{len(self.refused)} of {n} series refused, the first is {first['name']}: {first['reason']}"
            )
            raise SomeCasesFailed(reason, path=source, hint=first["hint"], report=self.document())
        if not self.series and not self.left_out:
            kinds = ", ".join(f"{row['files']} × {row['reason']}" for row in self.table()[:4])
            found = f": {kinds}" if kinds else ""
            raise InputError(f"no CT volume in it{found}", path=source, report=self.document())

    def refuse(self, report: Report, name: str, n_files: int, reason: str, hint: str) -> None:
        """Note down a refusal and tell it."""
        self.refused.append({"name": name, "files": n_files, "reason": reason, "hint": hint})
        report.warn(f"{name}: refused: {reason}" + (f" ({hint})" if hint else ""))


def parse_splits(words: str) -> dict[str, float]:
    """Shares of val and test from `80,10,10`: train, val and test in percent."""
    try:
        train, val, test = map(float, words.split(","))
    except ValueError:
        raise UsageError(f"--splits: {words} is not TRAIN,VAL,TEST, as in 80,10,10") from None
    if not (min(train, val, test) >= 0 and abs(train + val + test - 100) < 1e-6):
        raise UsageError(f"--splits: {words} are not three shares in percent that add up to 100")
    return {"val": val / 100, "test": test / 100}


def convert(
    source: Path,
    target: Path | None,
    conversion: Conversion,
    *,
    project: Path | None = None,
    report: Report | None = None,
) -> Outcome:
    """Convert what `source` holds into the folder `target`, with manifest and lists, or into one file.

    target: None for `data` in the project folder; a name in .nii or .nii.gz asks for exactly one series.
    project: where the key of the names lies; None for the folder that `target` is in, else the current one.
    A refused series leaves nothing behind, and the others go on: see `Outcome.raise_for_refusals`.
    Raises UsageError before any work where an output is in the way.
    """
    report, c = report or Report(), conversion
    take_shard([], c.shard)  # a wrong share is told before any work
    if target is not None and target.name.lower().endswith(VOLUME_SUFFIXES) and not target.is_dir():
        return _convert_to_file(source, target, c, report)
    project = project or (Path() if target is None else target.parent)
    data = target or project / "data"
    if data.exists() and not data.is_dir():
        raise UsageError("is a file; scans need a folder, or a name in .nii or .nii.gz", path=data)
    if c.link is not None and c.link.resolve().is_relative_to(data.resolve()):
        reason = f"--link: lies inside {data}, which may be passed on"
        raise UsageError(reason, path=c.link, hint="name a place outside it")
    outcome = Outcome()
    stacks = _wanted(source, c, report, outcome)
    if not stacks:
        return outcome
    naming = _naming(project, data, c, report)
    if naming is None:
        outcome.series += [_planned(stack, "") for stack in stacks]
        return outcome
    tasks = [_task(s, data / f"{naming.file(s)}.nii.gz", c, patient=naming.patient(s)) for s in stacks]
    if twice := [target for target, n in Counter(t.target for t in tasks).items() if n > 1]:
        raise UsageError("two series would have this name", path=twice[0], hint="--series leaves one out")
    tasks = take_shard(tasks, c.shard)
    _check_outputs(tasks, c)
    if not c.is_dry_run:
        _make(data)
    records = _run(tasks, c, report, outcome)
    if c.is_dry_run:
        return outcome
    if c.shard is not None:
        report.note(
            "shares write no lists and no table of --link: when all are done, run once more "
            "with --skip-existing, without --shard"
        )
    else:
        if records:
            _write_lists(data, [t for t in tasks if t.target in records], records, c, report, outcome)
        _write_link([t for t in tasks if t.target in records], c)
    return outcome


def _convert_to_file(source: Path, target: Path, c: Conversion, report: Report) -> Outcome:
    """Exactly one series into `target`; no manifest, no lists, no key."""
    if c.shard is not None:
        raise UsageError("--shard is for a folder of results, not for a file", path=target)
    outcome = Outcome()
    stacks = _wanted(source, c, report, outcome)
    if len(stacks) + len(outcome.refused) > 1:
        told = f", {len(outcome.refused)} of them refused" if outcome.refused else ""
        raise UsageError(
            f"{len(stacks) + len(outcome.refused)} series found{told}; {target.name} asks for exactly one",
            path=source,
            hint="--series or --where picks one, a folder takes all",
            report=outcome.document(),
        )
    tasks = [_task(s, target, c) for s in stacks]
    _check_outputs(tasks, c)
    records = _run(tasks, c, report, outcome)
    if outcome.refused:
        only = outcome.refused[0]
        reason = f"{only['name']}: refused: {only['reason']}"
        raise InputError(reason, path=source, hint=only["hint"], report=outcome.document())
    if not c.is_dry_run:
        _write_link([t for t in tasks if t.target in records], c)
    return outcome


def _wanted(source: Path, c: Conversion, report: Report, outcome: Outcome) -> list[Stack]:
    """The stacks to convert; what is not converted is put into the outcome."""
    if not source.exists():
        raise InputError("does not exist", path=source)
    if c.link is not None and not c.is_dry_run:
        check_output(c.link, overwrite=True, inputs=[source])
        _linked(c.link)
    found = _scan(source, c, report)
    if c.selection.series:
        known = {s.series_uid for s in found.stacks} | {r.series_uid for r in found.refused}
        if absent := sum(uid not in known for uid in c.selection.series):
            reason = f"--series: {absent} of {len(c.selection.series)} are not in it"
            raise UsageError(reason, path=source)
    stacks, left_out = c.selection(found.stacks)
    burned = [s for s in stacks if any(text(x.header, _BURNED_IN).upper() == "YES" for x in s.slices)]
    refused = [r for r in found.refused if not c.selection.series or r.series_uid in c.selection.series]
    refused += [Refused(s.name, s.n_files, "names may be burned into the pixels") for s in burned]
    for r in refused:
        outcome.refuse(report, r.name, r.n_files, r.reason, r.hint)
    for stack, rule in left_out:
        outcome.left_out.append({"name": stack.name, "files": stack.n_files, "reason": rule})
        report.detail(f"{stack.name}: left out: {rule}")
    for s in found.skipped:
        outcome.skipped.append({"name": s.name, "reason": s.reason})
        report.detail(f"{s.name}: skipped: {s.reason}")
    if left_out and not stacks and not refused:
        reason = f"all {len(left_out)} series are left out, the first by {left_out[0][1]}"
        raise UsageError(reason, path=source, report=outcome.document())
    return [s for s in stacks if s not in burned]


def _scan(source: Path, c: Conversion, report: Report) -> Scan:
    from ctsr.io.dicom.scan import scan

    found = scan(
        source,
        originals_only=c.originals_only,
        split=c.split,
        progress=lambda n: report.progress(0.0, f"{n} files looked at"),
    )
    notes: list[str] = []
    found = refuse_incomplete(found, source, notes)
    for note in notes:
        report.warn(note)
    return found


def _naming(project: Path, data: Path, c: Conversion, report: Report) -> Naming | None:
    """How scans are named; None in a dry run of a project that has no key yet."""
    manifest = data / MANIFEST
    rows = read_table(manifest, columns=["file"]) if manifest.exists() else []
    has_key = (project / KEY).exists()
    if not c.is_dry_run:
        _make(project)
    key = find_key(
        project, create=not c.is_dry_run, is_needed=any(row.get("source") == SOURCE for row in rows)
    )
    if key is not None and not has_key:
        report.note(f"{project / KEY}: made; names follow from it, so keep it, and keep it to yourself")
    if c.names == "patient":
        report.note("names hold the patient IDs: for public collections only")
    return None if key is None else Naming(key, c.names)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise output_error(exc, folder) from exc


def _task(stack: Stack, target: Path, c: Conversion, *, patient: str = "") -> Task:
    return Task(
        stack=stack,
        target=target,
        patient=patient,
        input_sha256=content_digest(stack),
        keep_tilt=c.keep_tilt,
        pad_hu=c.pad_hu,
    )


def _check_outputs(tasks: Sequence[Task], c: Conversion) -> None:
    """UsageError where something that is there would be replaced unasked, or is not what this run would make."""
    for task in tasks:
        if c.skip_existing and task.target.exists():
            agreeing_record(task)
        elif task.target.exists() and not c.overwrite:
            hint = "--overwrite replaces it, --skip-existing leaves it"
            raise UsageError("exists already", path=task.target, hint=hint)


def _run(
    tasks: Sequence[Task], c: Conversion, report: Report, outcome: Outcome
) -> dict[Path, dict[str, Any]]:
    """The record of every scan that is there in the end; the outcome gets a row for each task."""
    if c.is_dry_run:
        outcome.series += [_planned(t.stack, t.target.name) for t in tasks]
        return {}
    of_case = {Case(t.stack.name, t.stack.slices[0].file.path, t.target): t for t in tasks}
    records: dict[Path, dict[str, Any]] = {}
    if c.skip_existing:
        records = {t.target: agreeing_record(t) for t in tasks if t.target.exists()}
    left = [t for t in tasks if t.target not in records]
    with converter(left, overwrite=c.overwrite, workers=c.workers, cpus=c.cpus) as converted:

        def work(case: Case) -> dict[str, Any]:
            task, started = of_case[case], time.monotonic()
            status = "there" if task.target in records else "ok"
            if status == "ok":
                records[task.target] = converted(task)
                for warning in records[task.target]["warnings"]:
                    report.warn(f"{task.stack.name}: {warning}")
            seconds = round(time.monotonic() - started, 3)
            row = {"name": task.stack.name, "status": status, "file": task.target.name, "seconds": seconds}
            row["files"] = task.stack.n_files
            outcome.series.append(row | _described(records[task.target]))
            return {}

        def failed(case: Case, error: CtsrError) -> None:
            stack = of_case[case].stack
            reason = f"{error.path}: {error.reason}" if error.path else error.reason
            outcome.refuse(report, stack.name, stack.n_files, reason, error.hint)

        def done(n: int) -> None:
            report.progress(n / len(tasks), f"{n} of {len(tasks)} series")

        run_cases(list(of_case), work, failed=failed, done=done)
    return records


def _planned(stack: Stack, file: str) -> dict[str, Any]:
    return {
        "name": stack.name,
        "status": "planned",
        "file": file,
        "files": stack.n_files,
        "slices": len(stack.slices),
        "spacing_mm": spacing(stack),
        "thickness_mm": stack.slices[0].thickness,
        "pixel_mm": stack.slices[0].pixel_spacing[0],
        "warnings": list(stack.warnings),
    }


def _described(record: Mapping[str, Any]) -> dict[str, Any]:
    """What reports and the manifest say of a scan."""
    return {
        "slices": record["n_slices"],
        "spacing_mm": record["SpacingBetweenSlices"],
        "thickness_mm": record.get("SliceThickness"),
        "pixel_mm": record["spacing_mm"][1],
        "kernel": record.get("ConvolutionKernel"),
        "warnings": record["warnings"],
    }


def _write_lists(
    data: Path,
    tasks: Sequence[Task],
    records: Mapping[Path, Mapping[str, Any]],
    c: Conversion,
    report: Report,
    outcome: Outcome,
) -> None:
    """Manifest and lists; a scan that training must not see stands in the manifest alone."""
    rows = []
    for t in tasks:
        record = records[t.target]
        unlisted = [word for word in ("sheared", "lossy") if record.get(word)]
        row = {k: v for k, v in _described(record).items() if k != "warnings"}
        row |= {"file": t.target.name, "patient": t.patient, "source": SOURCE}
        row |= {"sha256": record["output_sha256"], "unlisted": " ".join(unlisted)}
        rows.append(row)
        if unlisted:
            report.warn(f"{t.target.name}: {' and '.join(unlisted)}: not put into the lists for training")
    first: dict[str, str] = {}
    for row in rows:
        if (twin := first.setdefault(row["sha256"], row["file"])) != row["file"]:
            report.warn(
                f"{row['file']}: holds the same scan as {twin}; what they are of counts as one patient"
            )
    rows = update_manifest(data, rows, shares=c.shares, seed=c.seed)
    sets = {row["file"]: row["set"] for row in rows}
    for row in outcome.series:
        row["set"] = sets[row["file"]]
    if len({row["patient"] for row in rows}) < _SMALLEST:
        report.note("fewer than 3 patients: some lists are empty, and training needs train and val")


def _write_link(tasks: Sequence[Task], c: Conversion) -> None:
    """The way back from names to patients, for those who may know: readable by its owner alone. It only grows."""
    if c.link is None:
        return
    rows: list[dict[str, str]] = [
        {
            "file": t.target.name,
            "patient_id": t.stack.patient_id,
            "study_uid": t.stack.study_uid,
            "series_uid": t.stack.series_uid,
            "stack": t.stack.label,
        }
        for t in tasks
    ]
    own = {row["file"] for row in rows}
    rows = [row for row in _linked(c.link) if row["file"] not in own] + rows
    write_table(c.link, LINK_COLUMNS, rows, overwrite=True, mode=0o600)


def _linked(link: Path) -> list[dict[str, str]]:
    """The rows of a table of `_write_link`; UsageError where the file is another one."""
    if not link.exists():
        return []
    try:
        return read_table(link, columns=LINK_COLUMNS)
    except InputError as exc:
        raise UsageError(
            "--link: is there and is no such table", path=link, hint="name another file"
        ) from exc
