"""`convert`: everything that a folder, an archive or a file of DICOM holds, as NIfTI with records and lists."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctsr.data.splits import SMALLEST, update_manifest
from ctsr.errors import CtsrError, InputError, SomeCasesFailed, UsageError
from ctsr.io.atomic import check_output
from ctsr.io.dicom.elements import text
from ctsr.io.dicom.records import Refused, Stack
from ctsr.io.dicom.scan import scan
from ctsr.io.lists import read_table, write_table
from ctsr.workflows.convert_names import SOURCE, Naming, content_digest, naming_of
from ctsr.workflows.convert_select import refuse_incomplete, select, spacing
from ctsr.workflows.convert_series import converter
from ctsr.workflows.folder import (
    Case,
    Report,
    agreeing_record,
    names_image,
    refuse_existing,
    run_cases,
    take_shard,
)
from ctsr.workflows.requests import Conversion

__all__ = ["Outcome", "convert", "parse_splits"]

LINK_COLUMNS = ["file", "patient_id", "study_uid", "series_uid", "stack"]
_BURNED_IN = 0x00280301  # BurnedInAnnotation


@dataclass(slots=True)
class Outcome:
    """What became of every file: series converted, left out on request or refused, and files skipped.

    Each a list of rows; those of `series` have a status: `ok`, `there` (it agrees, skipped) or `planned`.
    n_others: series that other shares convert.
    """

    series: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    n_others: int = 0

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
        groups: dict[tuple[str, str], dict[str, Any]] = {}
        for outcome, reason, series, files in told:
            # reasons that differ in a number or in a file's name are one kind
            kind = reason if outcome == "left out" else re.sub(r"\S*\d\S*", "…", reason)
            first = {"outcome": outcome, "series": None, "files": 0, "reason": reason}
            row = groups.setdefault((outcome, kind), first)
            row["series"] = (row["series"] or 0) + series or None
            row["files"] += files
            row["reason"] = reason if row["reason"] == reason else kind
        return list(groups.values())

    def refuse(self, report: Report, refused: Refused) -> None:
        """Note down a refusal and tell it; of a series that is one file, the reason may name that again."""
        name, hint, reason = refused.name, refused.hint, refused.reason.removeprefix(f"{refused.name}: ")
        self.refused.append({"name": name, "files": refused.n_files, "reason": reason, "hint": hint})
        report.warn(f"{name}: refused: {reason}" + (f" ({hint})" if hint else ""))

    def raise_for_refusals(self, source: Path) -> None:
        """SomeCasesFailed where a series was refused, InputError where there is no CT volume at all."""
        if self.refused:
            first = self.refused[0]
            n = len(self.refused) + len(self.series) + len(self.left_out) + self.n_others
            which = "" if first["name"] == source.name else f", the first is {first['name']}"
            reason = f"{len(self.refused)} of {n} series refused{which}: {first['reason']}"
            raise SomeCasesFailed(reason, path=source, hint=first["hint"], report=self.document())
        if not (self.series or self.left_out or self.n_others):
            kinds = ", ".join(f"{row['files']} × {row['reason']}" for row in self.table()[:4])
            found = f": {kinds}" if kinds else ""
            raise InputError(f"no CT volume in it{found}", path=source, report=self.document())


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
    c: Conversion,
    *,
    report: Report = Report(),
) -> Outcome:
    """Convert what `source` holds into the folder `target`, with manifest and lists, or into one file.

    target: None for `data` in the project folder; a name in .nii or .nii.gz asks for exactly one series.
    The key of the names lies in the project; without one, in the folder that `target` is in, else in the current one.
    A refused series leaves nothing behind, and the others go on: see `Outcome.raise_for_refusals`.
    Raises UsageError before any work where an output is in the way.
    """
    outcome = Outcome()
    parse_splits(c.splits)  # wrong ones, like a wrong share or condition, are told before any work
    take_shard([], c.shard)
    select([], c)
    if target is not None and names_image(target):
        if c.shard is not None:
            raise UsageError("--shard is for a folder of results, not for a file", path=target)
        stacks = _wanted(source, c, report, outcome)
        if (n := len(stacks) + len(outcome.refused)) > 1:
            told = f", {len(outcome.refused)} of them refused" if outcome.refused else ""
            reason = f"{n} series found{told}; {target.name} asks for exactly one"
            hint = "--series or --where picks one, a folder takes all"
            raise UsageError(reason, path=source, hint=hint, report=outcome.document())
        records = _run([_case(stack, target) for stack in stacks], c, report, outcome)
        if outcome.refused:
            only = outcome.refused[0]
            name = "" if only["name"] == source.name else f"{only['name']}: "
            reason = f"{name}refused: {only['reason']}"
            raise InputError(reason, path=source, hint=only["hint"], report=outcome.document())
        _write_link(list(records), c)
        return outcome
    project = c.project or (Path() if target is None else target.parent)
    data = target or project / "data"
    if data.exists() and not data.is_dir():
        raise UsageError("is a file; scans need a folder, or a name in .nii or .nii.gz", path=data)
    if c.link is not None and c.link.resolve().is_relative_to(data.resolve()):
        reason = f"--link: lies inside {data}, which may be passed on"
        raise UsageError(reason, path=c.link, hint="name a place outside it")
    stacks = _wanted(source, c, report, outcome)
    if not stacks:
        return outcome
    naming = naming_of(project, data, c, report)
    if naming is None:
        outcome.series += [_planned(stack, "") for stack in stacks]
        return outcome
    cases = [_case(stack, data / f"{naming.file(stack)}.nii.gz") for stack in stacks]
    if twice := [target for target, n in Counter(case.target for case in cases).items() if n > 1]:
        raise UsageError("two series would have this name", path=twice[0], hint="--series leaves one out")
    share = take_shard(cases, c.shard)
    outcome.n_others = len(cases) - len(share)
    records = _run(share, c, report, outcome)
    if c.shard is None:
        if records:
            _write_lists(data, records, naming, c, report, outcome)
        _write_link(list(records), c)
    elif not c.is_dry_run:
        report.note(
            "shares write no lists and no table of --link: when all are done, run once more "
            "with --skip-existing, without --shard"
        )
    return outcome


def _case(stack: Stack, target: Path) -> Case:
    return Case(stack.name, stack.slices[0].file.path, target, stack)


def _wanted(source: Path, c: Conversion, report: Report, outcome: Outcome) -> list[Stack]:
    """The stacks to convert; what is not converted is put into the outcome."""
    if not source.exists():
        raise InputError("does not exist", path=source)
    if c.link is not None and not c.is_dry_run:
        check_output(c.link, overwrite=True, inputs=[source])
        _linked(c.link)
    found = scan(
        source,
        originals_only=c.originals_only,
        split=c.split,
        progress=lambda n: report.progress(0.0, f"{n} files looked at"),
    )
    found = refuse_incomplete(found, source, report.warn)
    asked = c.series or ()
    known = {s.series_uid for s in found.stacks} | {r.series_uid for r in found.refused}
    if absent := sum(uid not in known for uid in asked):
        raise UsageError(f"--series: {absent} of {len(asked)} are not in it", path=source)
    stacks, left_out = select(found.stacks, c)
    burned = [s for s in stacks if any(text(x.header, _BURNED_IN).upper() == "YES" for x in s.slices)]
    refused = [r for r in found.refused if not asked or r.series_uid in asked]
    for r in [*refused, *(Refused(s.name, s.n_files, "names may be burned into the pixels") for s in burned)]:
        outcome.refuse(report, r)
    for stack, rule in left_out:
        outcome.left_out.append({"name": stack.name, "files": stack.n_files, "reason": rule})
        report.detail(f"{stack.name}: left out: {rule}")
    for skipped in found.skipped:
        outcome.skipped.append({"name": skipped.name, "reason": skipped.reason})
        report.detail(f"{skipped.name}: skipped: {skipped.reason}")
    if left_out and not stacks and not refused:
        reason = f"all {len(left_out)} series are left out, the first by {left_out[0][1]}"
        raise UsageError(reason, path=source, report=outcome.document())
    return [s for s in stacks if s not in burned]


def _run(
    cases: Sequence[Case], c: Conversion, report: Report, outcome: Outcome
) -> dict[Case, dict[str, Any]]:
    """The record of every scan that is there in the end; the outcome gets a row for each. None in a dry run.

    UsageError where something that is there would be replaced unasked, or is not what this run would make.
    """
    asked = {
        case: {"input_sha256": content_digest(case.stack()), "keep_tilt": c.keep_tilt, "pad_hu": c.pad_hu}
        for case in cases
    }
    records: dict[Case, dict[str, Any]] = {}
    if c.skip_existing:
        there = [case for case in cases if case.target.exists()]
        records = {case: agreeing_record(case.target, asked[case]) for case in there}
    elif not c.overwrite:
        hint = "--overwrite replaces it, --skip-existing leaves it"
        refuse_existing((case.target for case in cases), hint=hint)
    if c.is_dry_run:
        outcome.series += [_planned(case.stack(), case.target.name) for case in cases]
        return {}
    left = {case: request for case, request in asked.items() if case not in records}
    with converter(left, overwrite=c.overwrite, workers=c.workers, cpus=c.cpus) as converted:

        def work(case: Case) -> dict[str, Any]:
            started, status = time.monotonic(), "there" if case in records else "ok"
            if status == "ok":
                records[case] = converted(case)
                for warning in records[case]["warnings"]:
                    report.warn(f"{case.name}: {warning}")
            seconds = round(time.monotonic() - started, 3)
            row = {"name": case.name, "status": status, "file": case.target.name, "seconds": seconds}
            outcome.series.append(row | {"files": case.stack().n_files} | _described(records[case]))
            return {}

        def failed(case: Case, error: CtsrError) -> None:
            where = "" if error.path is None else f"{error.path}: "
            refused = Refused(case.name, case.stack().n_files, where + error.reason, error.hint)
            outcome.refuse(report, refused)

        run_cases(cases, work, report, failed=failed, things="series")
    return {case: records[case] for case in cases if case in records}


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
    records: Mapping[Case, Mapping[str, Any]],
    naming: Naming,
    c: Conversion,
    report: Report,
    outcome: Outcome,
) -> None:
    """Manifest and lists; a scan that training must not see stands in the manifest alone."""
    rows: list[dict[str, Any]] = []
    first: dict[str, str] = {}
    for case, record in records.items():
        file, digest = case.target.name, record["output_sha256"]
        unlisted = [word for word in ("sheared", "lossy") if record.get(word)]
        row = {k: v for k, v in _described(record).items() if k != "warnings"}
        row |= {"file": file, "patient": naming.patient(case.stack()), "source": SOURCE}
        rows.append(row | {"sha256": digest, "unlisted": " ".join(unlisted)})
        if unlisted:
            report.warn(f"{file}: {' and '.join(unlisted)}: not put into the lists for training")
        if (twin := first.setdefault(digest, file)) != file:
            report.warn(f"{file}: holds the same scan as {twin}; what they are of counts as one patient")
    rows = update_manifest(data, rows, shares=parse_splits(c.splits), seed=c.seed)
    sets = {row["file"]: row["set"] for row in rows}
    for row in outcome.series:
        row["set"] = sets[row["file"]]
    if len({row["patient"] for row in rows}) < SMALLEST:
        report.note("fewer than 3 patients: some lists are empty, and training needs train and val")


def _write_link(cases: Sequence[Case], c: Conversion) -> None:
    """The way back from names to patients, for those who may know: readable by its owner alone. It only grows."""
    if c.link is None or c.is_dry_run:
        return
    rows = {row["file"]: row for row in _linked(c.link)}
    for case in cases:
        s = case.stack()
        rows.pop(case.target.name, None)
        values = (case.target.name, s.patient_id, s.study_uid, s.series_uid, s.label)
        rows[case.target.name] = dict(zip(LINK_COLUMNS, values, strict=True))
    write_table(c.link, LINK_COLUMNS, rows.values(), overwrite=True, mode=0o600)


def _linked(link: Path) -> list[dict[str, str]]:
    """The rows of a table of `_write_link`; UsageError where the file is another one."""
    if not link.exists():
        return []
    try:
        return read_table(link, columns=LINK_COLUMNS)
    except InputError as exc:
        reason = "--link: is there and is no such table"
        raise UsageError(reason, path=link, hint="name another file") from exc
