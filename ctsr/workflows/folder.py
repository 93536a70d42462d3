"""Folder in, folder out: its cases, the share of them that is ours, a loop that one bad case does not stop."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ctsr import __version__
from ctsr.errors import (
    CtsrError,
    GeometryError,
    InputError,
    NetworkError,
    ResourceError,
    SomeCasesFailed,
    UsageError,
    WeightsError,
)
from ctsr.io.dicom.read import DicomVolume, read_stack
from ctsr.io.dicom.records import Refused, Stack
from ctsr.io.dicom.source import read_bytes
from ctsr.io.dicom.write import RECORD
from ctsr.io.lists import VOLUME_SUFFIXES, stem, volumes_in
from ctsr.io.nifti import read_volume
from ctsr.io.provenance import read_record, read_sidecar, sha256_of
from ctsr.io.scans import find_series, is_dicom, only_series

__all__ = [
    "Case", "Report", "about", "agreeing_record", "find_cases", "names_image", "origin", "raise_for_failures",
    "refuse_existing", "run_cases", "shard_name", "take_shard",
]  # fmt: skip

T = TypeVar("T")
C = TypeVar("C", bound="Case")

_OTHER_FILES = {".nrrd", ".nhdr", ".mha", ".mhd", ".hdr", ".img", ".mgz", ".dcm", ".gz", ".zip"}
_DISK_GONE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


@dataclass(frozen=True, slots=True)
class Report:
    """Whom to tell: notes, warnings, details, and the share that is done."""

    note: Callable[[str], None] = lambda text: None
    warn: Callable[[str], None] = lambda text: None
    detail: Callable[[str], None] = lambda text: None
    progress: Callable[[float, str], None] = lambda share, words: None


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
            how: dict[str, Any] = {"form": form, "hu_offset": hu_offset, "allow_labels": allow_labels}
            return DicomVolume(read_volume(self.source, notes=notes, **how), {}, (), None)
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


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Errors from within that name no file are about this one."""
    try:
        yield
    except CtsrError as exc:
        if exc.path is not None:
            raise
        raise type(exc)(exc.reason, path=path, hint=exc.hint) from exc


def names_image(target: Path) -> bool:
    """Whether an output is one image file: a name in .nii or .nii.gz that is no folder.

    UsageError for a name that asks for another kind of file, or the results would lie in a folder of that name.
    """
    if target.is_dir() or target.name.lower().endswith(VOLUME_SUFFIXES):
        return not target.is_dir()
    if target.suffix.lower() in _OTHER_FILES:
        hint = "ctsr writes NIfTI files, and DICOM into a folder"
        raise UsageError("ends in neither .nii nor .nii.gz", path=target, hint=hint)
    return False


def find_cases(source: Path, target: Path, *, series_suffix: str = "") -> tuple[list[Case], bool]:
    """What `source` holds, each with its place, and whether the target is a folder of results.

    A file is one case. Of a folder, all NIfTI files below it, in the same tree below `target`; without any, every
    DICOM series. A single one goes where `target` says; an image file as target asks for exactly one.
    series_suffix: what the results of several series end in; "" where they are folders.
    Raises UsageError where `target` is a file or lies inside `source`, where two inputs would share an output, or
    where there is nothing to do; InputError where there is no source, or no scan in it.
    """
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        reason = f"lies inside the input folder {source}"  # or the next run would find it there
        raise UsageError(reason, path=target, hint="name a place outside it")
    is_image = names_image(target)
    if is_dicom(source):
        if is_image:
            return [Case(source.name, source, target, only_series(source))], False
        found = find_series(source)
        series: list[Stack | Refused] = [*found.stacks, *found.refused]
        if len(series) == 1 and not series_suffix:
            return [Case(source.name, source, target, series[0])], False
        cases = _series_cases(source, target, series, series_suffix)
    elif source.is_dir():
        names = [path.relative_to(source) for path in volumes_in(source)]
        cases = [Case(str(name), source / name, target / name) for name in names]
    elif is_image or source.exists():
        return [Case(source.name, source, target)], False
    else:  # an image file or a folder of DICOM, so nobody knows whether the target's name is right
        raise InputError("does not exist", path=source)
    if is_image or (target.exists() and not target.is_dir()):
        raise UsageError("names a file; a folder of cases needs a folder for its results", path=target)
    taken: dict[str, str] = {}
    for case in cases:
        key = str(case.target.with_name(stem(case.target))).lower()  # one record, and some disks know no case
        if (twin := taken.setdefault(key, case.name)) != case.name:
            raise UsageError(f"{twin} and {case.name} would share one output", path=source)
    return cases, True


def _series_cases(source: Path, target: Path, series: Sequence[Stack | Refused], suffix: str) -> list[Case]:
    """Named by the folder that a series lies in; numbered where a folder holds several."""
    files = [s.slices[0].file.name if isinstance(s, Stack) else s.name for s in series]
    folders = [PurePosixPath(file).parent for file in files]
    numbers: Counter[PurePosixPath] = Counter()
    cases = []
    for one, folder in zip(series, folders, strict=True):
        numbers[folder] += 1
        name = folder.as_posix() if folder.name else stem(source.resolve())
        name += f"-{numbers[folder]}" if folders.count(folder) > 1 else ""
        place = source / folder if source.is_dir() else source
        cases.append(Case(name, place, target / (name + suffix), one))
    return cases


def take_shard(cases: Sequence[T], shard: str | None) -> list[T]:
    """Every N-th case, from the I-th on (1 ≤ I ≤ N); `env` asks Slurm, Kubernetes or torchrun. None: all."""
    index, count = (1, 1) if shard is None else _share(shard)
    return list(cases[index - 1 :: count])


def shard_name(shard: str) -> str:
    """What a share's own files are called, so that shares do not overwrite each other's: 1-of-3."""
    return "{}-of-{}".format(*_share(shard))


def _share(shard: str) -> tuple[int, int]:
    """(I, N), 1-based."""
    if shard == "env":
        return _from_environment(os.environ)
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"--shard: {shard} is not I/N with 1 ≤ I ≤ N, nor env")
    return int(found[1]), int(found[2])


def _from_environment(environ: Mapping[str, str]) -> tuple[int, int]:
    """(I, N), 1-based, from what a scheduler set."""
    for name, count_name in (
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
        ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),
        ("RANK", "WORLD_SIZE"),
    ):
        if name not in environ:
            continue
        names = [name, count_name]
        if is_array := name.startswith("SLURM"):
            names += ["SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX"]
        told = {n: environ.get(n, "") for n in names}
        if all(word.isdecimal() for word in told.values()):
            index, count = int(told[name]), int(told[count_name])
            first = int(told.get("SLURM_ARRAY_TASK_MIN", 0))
            last = int(told.get("SLURM_ARRAY_TASK_MAX", count - 1))
            is_whole = first in (0, 1) and count == last - first + 1 and not (is_array and count < 2)
            if is_whole and first <= index <= last:
                return index - first + 1, count
        words = ", ".join(f"{n} is {word or 'not set'}" for n, word in told.items())
        hint = "--shard I/N; a task of an array that was handed in again alone has a share of its own"
        raise UsageError(
            f"--shard env: {words}: no share of a whole", hint=hint if is_array else "--shard I/N"
        )
    raise UsageError("--shard env: no Slurm, Kubernetes or torchrun has set a share", hint="--shard I/N")


def run_cases(
    cases: Sequence[C],
    work: Callable[[C], Mapping[str, Any]],
    report: Report = Report(),
    *,
    failed: Callable[[C, CtsrError], None] | None = None,
    things: str = "cases",
) -> list[dict[str, Any]]:
    """A row a case: name, status (`ok`, what `work` says, or `failed`), exit code and reason, and what `work` returns.

    failed: what is done about a case that failed, instead of a warning.
    A wrong option, refused weights, the network and a full disk stop the run; all else is that case's own failure.
    """
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(cases, start=1):
        row: dict[str, Any] = {"case": case.name, "status": "ok", "code": 0, "reason": ""}
        try:
            row |= work(case)
        except Exception as exc:
            error = exc if isinstance(exc, CtsrError) else _internal(exc, case)
            if _stops_the_run(error):
                raise
            row |= {"status": "failed", "code": error.exit_code, "reason": error.reason}
            if failed is None:
                report.warn(f"failed: {error}")
            else:
                failed(case, error)
        rows.append(row)
        report.progress(number / len(cases), f"{number} of {len(cases)} {things}")
    return rows


def raise_for_failures(
    rows: Sequence[Mapping[str, Any]], *, path: Path | None, report: Mapping[str, object] | None = None
) -> None:
    """SomeCasesFailed where a row says so; its reason names how many and the first. report: None for the rows."""
    bad = dict.fromkeys(row["case"] for row in rows if row["status"] == "failed")
    if bad:
        n = len({row["case"] for row in rows})
        reason = f"{len(bad)} of {n} cases failed, the first is {next(iter(bad))}"
        raise SomeCasesFailed(reason, path=path, report=report or {"cases": rows})


def _stops_the_run(error: CtsrError) -> bool:
    if isinstance(error, ResourceError):
        return isinstance(error.__cause__, OSError) and error.__cause__.errno in _DISK_GONE
    return isinstance(error, UsageError | WeightsError | NetworkError)


def _internal(exc: Exception, case: Case) -> CtsrError:
    if isinstance(exc, MemoryError) or "allocate memory" in str(exc) or "out of memory" in str(exc):
        return ResourceError("out of memory", path=case.source, hint="--max-memory bounds what is taken")
    return CtsrError(f"internal: {type(exc).__name__}: {' '.join(str(exc).split())}", path=case.source)


def origin(command: str) -> dict[str, str]:
    """What every record says of how its output came about."""
    notice = "research use only; not a medical device"
    return {"command": command, "ctsr_version": __version__, "notice": notice}


def refuse_existing(paths: Iterable[Path], *, hint: str = "--overwrite replaces it") -> None:
    """UsageError, before any work, where one of the outputs is there."""
    for path in paths:
        if path.exists():
            raise UsageError("exists already", path=path, hint=hint)


def agreeing_record(target: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The record of an output that is there; UsageError where what is asked for would not make it.

    asked: what decides the result, as it stands in a record or in the record's `request`.
    """
    hint = "--overwrite replaces it"
    record = read_record(target / RECORD) if target.is_dir() else read_sidecar(target)
    if not record:
        raise UsageError("exists without a record of how it was made", path=target, hint=hint)
    request = record.get("request")
    there = record | (request if isinstance(request, dict) else {})
    for key, value in asked.items():
        if there.get(key) != value:
            found = f"was made with {key} {there.get(key)}, asked for is {value}"
            raise UsageError(found, path=target, hint=hint)
    images = target.glob("*.dcm") if target.is_dir() else [target]
    if record.get("output_size_bytes") != sum(image.stat().st_size for image in images):
        raise UsageError("is not what its record speaks of", path=target, hint=hint)
    return record
