"""One DICOM series → one NIfTI file with its record; in this process, or many series in several processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctsr import __version__
from ctsr.errors import CtsrError, InputError, ResourceError, UsageError
from ctsr.io.atomic import sweep
from ctsr.io.dicom.records import Stack
from ctsr.io.memory import available_bytes
from ctsr.io.nifti import write_volume
from ctsr.io.provenance import check_image_output, read_sidecar

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["Task", "agreeing_record", "converter"]

NOTICE = "research use only; not a medical device"
_BYTES_PER_VOXEL = 10  # while a series is converted: stored values, HU, what the removal of a tilt needs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """A series, where it goes, and what decides the result.

    patient: its key in the manifest. input_sha256: of what the scan found, see `content_digest`.
    """

    stack: Stack
    target: Path
    patient: str
    input_sha256: str
    keep_tilt: bool
    pad_hu: float

    @property
    def request(self) -> dict[str, Any]:
        """What `--skip-existing` compares."""
        return {"input_sha256": self.input_sha256, "keep_tilt": self.keep_tilt, "pad_hu": self.pad_hu}


def agreeing_record(task: Task) -> dict[str, Any]:
    """The record of the scan that is there; UsageError where this task would not make it."""
    record, hint = read_sidecar(task.target), "--overwrite replaces it"
    if not record:
        raise UsageError("exists without a record of how it was made", path=task.target, hint=hint)
    for key, value in task.request.items():
        if record.get(key) != value:
            found = f"was made with {key} {record.get(key)}, asked for is {value}"
            raise UsageError(found, path=task.target, hint=hint)
    if record.get("output_size_bytes") != task.target.stat().st_size:
        raise UsageError("is not the file that its record speaks of", path=task.target, hint=hint)
    return record


@contextmanager
def converter(
    tasks: Sequence[Task], *, overwrite: bool, workers: int | None, cpus: int
) -> Iterator[Callable[[Task], dict[str, Any]]]:
    """A function from a task to its record. It works here, or only waits for one of several processes.

    workers: processes, None for as many as `cpus` and the free memory allow.
    """
    n = min(len(tasks), workers or _affordable(tasks, cpus))
    if n <= 1:
        yield lambda task: _convert(task, overwrite, workers or cpus)
        return
    import multiprocessing  # 30 ms that one series does not pay
    from concurrent.futures import ProcessPoolExecutor

    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), initializer=_begin_worker)
    try:
        with _ctrl_c_held():
            futures = {t.target: pool.submit(_in_worker, t, overwrite) for t in tasks}
        yield lambda task: _result(futures[task.target])
    except BaseException:
        own = [child for child in multiprocessing.active_children() if child not in others]
        for child in own:
            child.terminate()
        pool.shutdown(cancel_futures=True)
        sweep(tasks[0].target.parent, dead=[child.pid for child in own])
        raise
    pool.shutdown()


@contextmanager
def _ctrl_c_held() -> Iterator[None]:
    """Processes that begin in here never see Ctrl-C, which reaches all of a terminal: their parent answers it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _affordable(tasks: Sequence[Task], cpus: int) -> int:
    """Processes that there are CPUs and memory for, each with the largest series."""
    sizes = [len(t.stack.slices) * t.stack.slices[0].shape[0] * t.stack.slices[0].shape[1] for t in tasks]
    free = available_bytes()
    return cpus if free is None else max(1, min(cpus, free // (max(sizes, default=0) * _BYTES_PER_VOXEL + 1)))


def _begin_worker() -> None:
    """A process that converts ends with its parent, whatever ended that."""
    import multiprocessing
    import threading

    def end_with_parent() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _in_worker(task: Task, overwrite: bool) -> dict[str, Any] | tuple[CtsrError, int | None]:
    """The record, or the error with the errno behind it: an exception's cause does not travel."""
    try:
        return _convert(task, overwrite, 1)
    except CtsrError as exc:
        return exc, getattr(exc.__cause__, "errno", None)


def _result(future: Future[Any]) -> dict[str, Any]:
    from concurrent.futures.process import BrokenProcessPool

    try:
        found = future.result()
    except BrokenProcessPool as exc:
        reason = "a process that converts was ended from outside, as happens where memory runs out"
        raise ResourceError(reason, hint="fewer --workers") from exc
    if isinstance(found, tuple):
        error, number = found
        raise error from (None if number is None else OSError(number, ""))
    record: dict[str, Any] = found
    return record


def _convert(task: Task, overwrite: bool, workers: int) -> dict[str, Any]:
    """Read, write, and the record of it. What goes wrong inside a decoder refuses the series, without its words."""
    from ctsr.io.dicom.read import read_stack

    check_image_output(task.target, overwrite=overwrite)
    try:
        read = read_stack(task.stack, keep_tilt=task.keep_tilt, pad_hu=task.pad_hu, workers=workers)
    except (CtsrError, MemoryError):
        raise
    except Exception as exc:  # its text may quote the header
        raise InputError(f"can't be read: {type(exc).__name__}") from exc
    record: dict[str, Any] = {
        **read.technical,
        **task.request,
        "command": "convert",
        "ctsr_version": __version__,
        "notice": NOTICE,
        "SpacingBetweenSlices": round(float(read.volume.spacing[2]), 6),
        "warnings": list(dict.fromkeys([*task.stack.warnings, *read.warnings])),
    }
    record["output_sha256"] = write_volume(read.volume, task.target, overwrite=overwrite, record=record)
    return record
