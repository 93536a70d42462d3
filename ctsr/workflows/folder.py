"""Folder in, folder out: its cases, the share of them that is ours, a loop that one bad case does not stop."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ctsr.errors import (
    CtsrError,
    GeometryError,
    NetworkError,
    ResourceError,
    SomeCasesFailed,
    UsageError,
    WeightsError,
)
from ctsr.io.dicom.read import DicomVolume, read_stack
from ctsr.io.dicom.records import Refused, Stack
from ctsr.io.dicom.source import read_bytes
from ctsr.io.lists import VOLUME_SUFFIXES, stem, volumes_in
from ctsr.io.nifti import read_volume
from ctsr.io.provenance import sha256_of
from ctsr.io.scans import find_series, is_dicom, only_series

__all__ = ["Case", "find_cases", "raise_for_failures", "run_cases", "shard_name", "take_shard"]

T = TypeVar("T")

_DISK_GONE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


@dataclass(frozen=True, slots=True)
class Case:
    """One input and where its output goes. name: the input relative to the folder that was given.

    series: where the input is DICOM, the series, or why it is none.
    """

    name: str
    source: Path
    target: Path
    series: Stack | Refused | None = None

    def read(
        self, *, form: str | None = None, hu_offset: float = 0.0, allow_labels: bool = False, notes: list[str]
    ) -> DicomVolume:
        """The scan, padding kept as padding; with facts of its own where it is DICOM."""
        if self.series is None:
            volume = read_volume(
                self.source, form=form, hu_offset=hu_offset, allow_labels=allow_labels, notes=notes
            )
            return DicomVolume(volume, {}, (), None)
        if form is not None or hu_offset:
            raise UsageError("--form and --hu-offset are for NIfTI files", path=self.source)
        read = read_stack(self.stack(), pad_hu=None)
        notes += read.warnings
        return read

    def stack(self) -> Stack:
        """The series; GeometryError where it was refused. For DICOM alone."""
        if isinstance(self.series, Refused):
            raise GeometryError(self.series.reason, path=self.source, hint=self.series.hint)
        assert self.series is not None
        return self.series

    def sha256(self) -> str:
        """Of the file's bytes, or of those of the series' files, in the order of its slices."""
        if not isinstance(self.series, Stack):
            return sha256_of(self.source)
        digest = hashlib.sha256()
        for file in dict.fromkeys(s.file for s in self.series.slices):
            digest.update(hashlib.sha256(read_bytes(file)).digest())
        return digest.hexdigest()


def find_cases(source: Path, target: Path, *, series_suffix: str = "") -> tuple[list[Case], bool]:
    """What `source` holds, each with its place, and whether the target is a folder of results.

    A file is one case. Of a folder, all NIfTI files below it, in the same tree below `target`; without any, every
    DICOM series. A single one goes where `target` says; an image file as target asks for exactly one.
    series_suffix: what the results of several series end in; "" where they are folders.
    Raises UsageError where `target` is a file or lies inside `source`, where two inputs would share an output, or
    where there is nothing to do; InputError where a folder holds no scan.
    """
    names_file = target.name.lower().endswith(VOLUME_SUFFIXES) and not target.is_dir()
    if is_dicom(source):
        if source.is_dir():
            _check_outside(source, target)  # or the next run would find two series, or a NIfTI file instead
        if names_file:
            return [Case(source.name, source, target, only_series(source))], False
        found = find_series(source)
        several: list[Stack | Refused] = [*found.stacks, *found.refused]
        if len(several) == 1 and not series_suffix:
            return [Case(source.name, source, target, several[0])], False
        cases = _series_cases(source, target, several, series_suffix)
    elif source.is_dir():
        cases = [
            Case(str(p.relative_to(source)), p, target / p.relative_to(source)) for p in volumes_in(source)
        ]
    else:
        return [Case(source.name, source, target)], False
    if names_file:
        raise UsageError("names a file; a folder of cases needs a folder for its results", path=target)
    if target.exists() and not target.is_dir():
        raise UsageError("is a file; a folder of cases needs a folder for its results", path=target)
    _check_outside(source, target)
    taken: dict[str, str] = {}
    for case in cases:
        key = str(case.target.with_name(stem(case.target))).lower()  # one record, and some disks know no case
        if key in taken:
            raise UsageError(f"{taken[key]} and {case.name} would share one output", path=source)
        taken[key] = case.name
    return cases, True


def _check_outside(source: Path, target: Path) -> None:
    if target.resolve().is_relative_to(source.resolve()):
        raise UsageError(
            f"lies inside the input folder {source}", path=target, hint="name a place outside it"
        )


def _series_cases(source: Path, target: Path, series: Sequence[Stack | Refused], suffix: str) -> list[Case]:
    """Named by the folder that a series lies in; numbered where a folder holds several."""
    folders = [
        PurePosixPath(s.slices[0].file.name if isinstance(s, Stack) else s.name).parent for s in series
    ]
    counts = Counter(folders)
    numbers: Counter[PurePosixPath] = Counter()
    cases = []
    for one, folder in zip(series, folders, strict=True):
        numbers[folder] += 1
        name = folder.as_posix() if folder.name else stem(source.resolve())
        name += f"-{numbers[folder]}" if counts[folder] > 1 else ""
        cases.append(
            Case(name, source / folder if source.is_dir() else source, target / (name + suffix), one)
        )
    return cases


def take_shard(cases: Sequence[T], shard: str | None) -> list[T]:
    """Every N-th case, from the I-th on (1 ≤ I ≤ N); `env` asks Slurm, Kubernetes or torchrun. None: all."""
    if shard is None:
        return list(cases)
    index, count = _from_environment(os.environ) if shard == "env" else _parse(shard)
    return list(cases[index - 1 :: count])


def shard_name(shard: str) -> str:
    """What a share's own files are called, so that shares do not overwrite each other's: 1-of-3."""
    index, count = _from_environment(os.environ) if shard == "env" else _parse(shard)
    return f"{index}-of-{count}"


def run_cases(
    cases: Sequence[Case],
    work: Callable[[Case], Mapping[str, Any]],
    *,
    failed: Callable[[Case, CtsrError], None],
    done: Callable[[int], None] = lambda n: None,
) -> list[dict[str, Any]]:
    """A row a case: name, status (`ok`, what `work` says, or `failed`), exit code and reason, and what `work` returns.

    A wrong option, refused weights, the network and a full disk stop the run; all else is that case's own failure.
    """
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(cases):
        row: dict[str, Any] = {"case": case.name, "status": "ok", "code": 0, "reason": ""}
        try:
            row |= work(case)
        except Exception as exc:
            error = exc if isinstance(exc, CtsrError) else _internal(exc, case)
            if _stops_the_run(error):
                raise error from exc
            row |= {"status": "failed", "code": error.exit_code, "reason": error.reason}
            failed(case, error)
        rows.append(row)
        done(number + 1)
    return rows


def raise_for_failures(rows: Iterable[Mapping[str, Any]], *, path: Path) -> None:
    """SomeCasesFailed where a row says so; its reason names how many and the first."""
    rows = list(rows)
    bad = [row for row in rows if row["status"] == "failed"]
    if bad:
        reason = f"{len(bad)} of {len(rows)} cases failed, the first is {bad[0]['case']}"
        raise SomeCasesFailed(reason, path=path, report={"cases": rows})


def _stops_the_run(error: CtsrError) -> bool:
    if isinstance(error, UsageError | WeightsError | NetworkError):
        return True
    cause = error.__cause__
    return isinstance(error, ResourceError) and isinstance(cause, OSError) and cause.errno in _DISK_GONE


def _internal(exc: Exception, case: Case) -> CtsrError:
    if isinstance(exc, MemoryError) or "allocate memory" in str(exc) or "out of memory" in str(exc):
        return ResourceError("out of memory", path=case.source, hint="--max-memory bounds what is taken")
    return CtsrError(f"internal: {type(exc).__name__}: {' '.join(str(exc).split())}", path=case.source)


def _parse(shard: str) -> tuple[int, int]:
    index, _, count = shard.partition("/")
    if not (
        index.isascii()
        and index.isdigit()
        and count.isascii()
        and count.isdigit()
        and 1 <= int(index) <= int(count)
    ):
        raise UsageError(f"--shard: {shard} is not I/N with 1 ≤ I ≤ N, nor env")
    return int(index), int(count)


def _from_environment(environ: Mapping[str, str]) -> tuple[int, int]:
    """(I, N), 1-based, from what a scheduler set."""
    if "SLURM_ARRAY_TASK_ID" in environ:
        told = [environ.get(f"SLURM_ARRAY_TASK_{k}", "") for k in ("ID", "MIN", "MAX", "COUNT")]
        task, first, last, count = (int(word) if word.isdecimal() else -1 for word in told)
        if first not in (0, 1) or count != last - first + 1 or count < 2 or not first <= task <= last:
            raise UsageError(
                f"--shard env: task {told[0]} of {told[1]}…{told[2]}, {told[3]} in all, is none of a whole Slurm array "
                "from 0 or 1 on",
                hint="a resubmitted task needs its own share: --shard I/N",
            )
        return task - first + 1, count
    for name, count_name in (("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"), ("RANK", "WORLD_SIZE")):
        if name in environ:
            index, total = environ[name], environ.get(count_name, "")
            if not (index.isdecimal() and total.isdecimal() and int(index) < int(total)):
                raise UsageError(
                    f"--shard env: {name} is {index}, {count_name} is {total or 'not set'}",
                    hint="set both, or --shard I/N",
                )
            return int(index) + 1, int(total)
    raise UsageError(
        "--shard env: neither Slurm, Kubernetes nor torchrun has set a share", hint="--shard I/N"
    )
