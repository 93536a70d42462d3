"""One DICOM series → one NIfTI file with its record; in this process, or many series in several processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ctsr.errors import CtsrError, InputError, ResourceError
from ctsr.io.atomic import sweep
from ctsr.io.memory import available_bytes
from ctsr.io.nifti import write_volume
from ctsr.io.provenance import check_image_output
from ctsr.workflows.folder import Case, origin

__all__ = ["converter"]

Asked = Mapping[str, Any]

_BYTES_PER_VOXEL = 10  # while a series is converted: stored values, HU, what the removal of a tilt needs


@contextmanager
def converter(
    asked: Mapping[Case, Asked], *, overwrite: bool, workers: int | None, cpus: int
) -> Iterator[Callable[[Case], dict[str, Any]]]:
    """A function from a series to its record. It works here, or only waits for one of several processes.

    asked: all series, each with what decides its result: input_sha256, keep_tilt, pad_hu.
    workers: processes, None for as many as `cpus` and the free memory allow.
    """
    n = min(len(asked), workers or _affordable(list(asked), cpus))
    if n <= 1:
        yield lambda case: _convert(case, asked[case], overwrite, workers or cpus)
        return
    import multiprocessing  # 30 ms that one series does not pay
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), initializer=_begin_worker)

    def result(case: Case) -> dict[str, Any]:
        try:
            return _unpacked(futures[case].result())
        except BrokenProcessPool as exc:
            reason = "a process that converts was ended from outside, as happens where memory runs out"
            raise ResourceError(reason, hint="fewer --workers") from exc

    try:
        with _ctrl_c_held():
            futures = {case: pool.submit(_in_worker, case, asked[case], overwrite) for case in asked}
        yield result
    except BaseException:
        own = [child for child in multiprocessing.active_children() if child not in others]
        for child in own:
            child.terminate()
        pool.shutdown(cancel_futures=True)
        sweep(next(iter(asked)).target.parent, dead=[child.pid for child in own])
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


def _affordable(cases: Sequence[Case], cpus: int) -> int:
    """Processes that there are CPUs and memory for, each with the largest series."""
    slices = [case.stack().slices for case in cases]
    largest = max((len(s) * s[0].shape[0] * s[0].shape[1] for s in slices), default=0)
    free = available_bytes()
    return cpus if free is None else max(1, min(cpus, free // (largest * _BYTES_PER_VOXEL + 1)))


def _begin_worker() -> None:
    """A process that converts ends with its parent, whatever ended that."""
    import multiprocessing
    import threading

    def end_with_parent() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _in_worker(case: Case, asked: Asked, overwrite: bool) -> dict[str, Any] | tuple[CtsrError, int | None]:
    """The record, or the error with the errno behind it: an exception's cause does not travel."""
    try:
        return _convert(case, asked, overwrite, 1)
    except CtsrError as exc:
        return exc, getattr(exc.__cause__, "errno", None)


def _unpacked(found: dict[str, Any] | tuple[CtsrError, int | None]) -> dict[str, Any]:
    if isinstance(found, tuple):
        error, number = found
        raise error from (None if number is None else OSError(number, ""))
    return found


def _convert(case: Case, asked: Asked, overwrite: bool, workers: int) -> dict[str, Any]:
    """Read, write, and the record of it. What goes wrong inside a decoder refuses the series, without its words."""
    from ctsr.io.dicom.read import read_stack

    check_image_output(case.target, overwrite=overwrite)
    stack, how = case.stack(), {"keep_tilt": asked["keep_tilt"], "pad_hu": asked["pad_hu"]}
    try:
        read = read_stack(stack, workers=workers, **how)
    except (CtsrError, MemoryError):
        raise
    except Exception as exc:  # its text may quote the header
        raise InputError(f"can't be read: {type(exc).__name__}") from exc
    record: dict[str, Any] = {
        **read.technical,
        **asked,
        **origin("convert"),
        "SpacingBetweenSlices": round(float(read.volume.spacing[2]), 6),
        "warnings": list(dict.fromkeys([*stack.warnings, *read.warnings])),
    }
    record["output_sha256"] = write_volume(read.volume, case.target, overwrite=overwrite, record=record)
    return record
