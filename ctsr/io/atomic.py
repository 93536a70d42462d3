"""Files and folders that are whole or not there: a temporary one beside the target, synced, then put in place.

Every step goes through `os` on an unbuffered descriptor, so that a test can fail each call in turn.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator

from ctsr.errors import CtsrError, InputError, ResourceError, UsageError

__all__ = [
    "OutputFile", "PathLike", "atomic_folder", "atomic_write", "check_folder", "check_output", "input_error",
    "make_folder", "output_error", "sweep", "write_bytes", "write_text",
]  # fmt: skip

PathLike = str | os.PathLike[str]

_ORPHAN_AGE = (
    3600.0  # seconds; a pid says nothing about another host on a shared disk, an hour without a write does
)
_TEMPORARY = re.compile(r"\.ctsr-(\d+)-[0-9a-f]{6}\.part")
_PIECE = 1 << 24  # bytes a write call: a signal is answered between two calls
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)  # O_BINARY: Windows

_NAMING_FAULTS = {  # the path is wrong, not the disk
    errno.EEXIST: "exists already",
    errno.ENOENT: "its folder does not exist",
    errno.ENOTDIR: "a part of its path is not a folder",
    errno.EISDIR: "is a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "is a loop of links",
}


def output_error(exc: OSError, path: PathLike) -> CtsrError:
    """The error that a failed write stands for: a wrong path is usage, all else is the disk."""
    if exc.errno in _NAMING_FAULTS:
        hint = "--overwrite replaces it" if exc.errno == errno.EEXIST else ""
        return UsageError(_NAMING_FAULTS[exc.errno], path=path, hint=hint)
    return ResourceError(f"cannot be written: {_words(exc)}", path=path)


def input_error(exc: OSError, path: PathLike) -> InputError:
    """The error that a failed read stands for."""
    found = {errno.ENOENT: "does not exist", errno.EISDIR: "is a folder", errno.ELOOP: "is a loop of links"}
    return InputError(found.get(exc.errno or 0, f"cannot be read: {_words(exc)}"), path=path)


def _words(exc: OSError) -> str:
    return (exc.strerror or type(exc).__name__).lower()


@contextlib.contextmanager
def _as_output_error(path: PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise output_error(exc, path) from exc


class OutputFile:
    """A file being written, front to back, without a buffer. Counts and hashes what passes.

    size: bytes written so far. sha256: of those bytes, hexadecimal.
    """

    def __init__(self, descriptor: int, path: PathLike) -> None:
        self._descriptor = descriptor
        self._path = path
        self._hash = hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        """Close the descriptor, once: a close that fails has closed all the same."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def flush(self) -> None:
        """Nothing is held back; here because a compressor asks for it."""

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of `data`; UsageError or ResourceError where the disk does not take it."""
        if (
            self._descriptor < 0
        ):  # a compressor cleared away late must not reach another file of the same number
            raise ValueError("write to a closed file")
        view = memoryview(data).cast("B")
        total = len(view)
        while view:
            with _as_output_error(self._path):
                written = os.write(self._descriptor, view[:_PIECE])
            self._hash.update(view[:written])
            self.size += written
            view = view[written:]
        return total


@contextlib.contextmanager
def atomic_write(
    path: PathLike,
    *,
    overwrite: bool,
    before_commit: Callable[[OutputFile], None] | None = None,
    mode: int = 0o666,
) -> Iterator[OutputFile]:
    """An output file that appears under its name when the block ends well, and not at all otherwise.

    A symlink is followed: the file it names is replaced and the link stays. Without `overwrite` the name is
    taken by a hard link: of two processes that write it, one gets UsageError.
    before_commit: called when all bytes are on the disk and only the name is missing.
    mode: of the new file, before the umask.
    """
    target = _target(path, overwrite=overwrite)
    temporary = _beside(target)
    sweep(os.path.dirname(target))
    with _as_output_error(path):
        # the kernel takes the umask off this mode: no need to read it, which can't be done without a race
        file = OutputFile(os.open(temporary, _NEW, mode), path)
    try:
        yield file
        with _as_output_error(path):
            os.fsync(file.fileno())
            file.close()
        if before_commit is not None:
            before_commit(file)
        _target(path, overwrite=overwrite)  # somebody may have made it meanwhile
        with _as_output_error(path):
            if overwrite or not _is_linked(temporary, target):
                os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            file.close()
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    _sync_folder(os.path.dirname(target))


def _target(path: PathLike, *, overwrite: bool) -> str:
    """The file that `path` names, links followed; UsageError where none can be written there, or one is there."""
    given, target = os.fspath(path), os.path.realpath(path)
    if given.endswith((os.sep, os.altsep or os.sep)) or os.path.isdir(target):
        raise UsageError("is a folder, a file is asked for", path=path)
    if not os.path.isdir(folder := os.path.dirname(target)):
        raise UsageError(f"its folder does not exist: {os.path.dirname(given) or folder}", path=path)
    with _as_output_error(path), contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(target).st_mode):
            raise UsageError("is a FIFO, a socket or a device, not a file", path=path)
        if not overwrite:
            raise FileExistsError(errno.EEXIST, "")
    return target


def _beside(target: str) -> str:
    """A temporary name in the target's folder, one that `sweep` knows."""
    return os.path.join(os.path.dirname(target), f".ctsr-{os.getpid()}-{secrets.token_hex(3)}.part")


def _is_linked(temporary: str, target: str) -> bool:
    """Whether the name could be taken by a hard link, which never replaces a file."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except (OSError, AttributeError, NotImplementedError):  # a file system or a platform without them
        return False
    return True


@contextlib.contextmanager
def atomic_folder(path: PathLike, *, overwrite: bool, is_ours: Callable[[str], bool]) -> Iterator[str]:
    """A folder that appears under its name, mode 0700, when the block ends well, and not at all otherwise.

    Yields a temporary folder beside it, for files that the block itself syncs. A folder that is there is replaced
    as far as `check_folder` allows it; two renames do that, so for a moment neither has the name.
    """
    target = os.path.realpath(path)
    check_folder(path, overwrite=overwrite, is_ours=is_ours)
    sweep(os.path.dirname(target))
    temporary, aside = _beside(target), _beside(target)
    try:
        with _as_output_error(path):
            os.mkdir(temporary, 0o700)
        yield temporary
        check_folder(path, overwrite=overwrite, is_ours=is_ours)  # somebody may have filled it meanwhile
        with _as_output_error(path):
            _sync_folder(temporary)
            if os.path.lexists(target):
                os.rename(target, aside)
            os.rename(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            if not os.path.lexists(target):
                os.rename(aside, target)
        shutil.rmtree(temporary, ignore_errors=True)
        if os.path.lexists(target):
            shutil.rmtree(aside, ignore_errors=True)
    _sync_folder(os.path.dirname(target))


def _sync_folder(folder: str) -> None:
    """Make the new name last through a power cut. The file is in place: a failure here is no error."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep(folder: PathLike, *, dead: Collection[int | None] = ()) -> None:
    """Remove what killed processes left behind: a dead pid, and no write for an hour.

    dead: processes of this host that have ended for certain: their files go at once.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if (found := _TEMPORARY.fullmatch(entry.name)) and not _is_alive(int(found[1])):
                with contextlib.suppress(OSError):
                    age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                    if int(found[1]) in dead or age > _ORPHAN_AGE:
                        remove = shutil.rmtree if entry.is_dir(follow_symlinks=False) else os.unlink
                        remove(entry.path)


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # on Windows a signal 0 would reach the process
        return pid == os.getpid()
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def write_bytes(
    path: PathLike, data: bytes | bytearray | memoryview, *, overwrite: bool, mode: int = 0o666
) -> str:
    """Write `data` atomically; returns its sha256, hexadecimal."""
    with atomic_write(path, overwrite=overwrite, mode=mode) as file:
        file.write(data)
    return file.sha256


def write_text(path: PathLike, text: str, *, overwrite: bool, mode: int = 0o666) -> str:
    """Write `text` atomically as UTF-8 with the newlines it has; returns the sha256 of the bytes.

    Names that are not UTF-8 (surrogates in a str) come out as the bytes they were.
    """
    return write_bytes(path, text.encode("utf-8", errors="surrogateescape"), overwrite=overwrite, mode=mode)


def check_output(path: PathLike, *, overwrite: bool, inputs: Iterable[PathLike] = ()) -> None:
    """Refuse, before hours of work, an output that could not be written at their end.

    UsageError: no such folder, a folder or a device in the way, there already without `overwrite`, or one of
    `inputs` itself. ResourceError: the folder can't be written to (tried with a temporary file).
    """
    for source in inputs:
        with contextlib.suppress(OSError):  # what can't be looked at is refused where it is read
            if os.path.isfile(path) and os.path.samefile(source, path):
                raise UsageError("is the input itself", path=path, hint="name another output")
    _try_out(_target(path, overwrite=overwrite), path)


def make_folder(path: PathLike) -> None:
    """Make a folder and those above it, where they are not there. UsageError or ResourceError where that can't be."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise UsageError("is a file, a folder is asked for", path=path)
    with _as_output_error(path):
        os.makedirs(path, exist_ok=True)


def check_folder(path: PathLike, *, overwrite: bool, is_ours: Callable[[str], bool]) -> None:
    """Refuse, before hours of work, a folder that could not be put in place at their end.

    An empty folder may be there; one that holds something is replaced under `overwrite`, if `is_ours` says of
    it that we made all of it. UsageError or ResourceError as in `check_output`.
    """
    target = os.path.realpath(path)
    if not os.path.isdir(os.path.dirname(target)):
        raise UsageError(f"its folder does not exist: {os.path.dirname(target)}", path=path)
    with _as_output_error(path):
        if os.path.lexists(target) and not os.path.isdir(target):
            raise UsageError("is a file, a folder is asked for", path=path)
        if os.path.isdir(target) and (count := len(os.listdir(target))):
            if not is_ours(target):
                reason = f"holds {count} files and folders, and not only what ctsr wrote"
                raise UsageError(reason, path=path, hint="name another folder")
            if not overwrite:
                raise FileExistsError(errno.EEXIST, "")
    _try_out(target, path)


def _try_out(target: str, path: PathLike) -> None:
    """Make a file beside the target and remove it again."""
    probe = _beside(target)
    with _as_output_error(path):
        os.close(os.open(probe, _NEW, 0o666))
        os.unlink(probe)
