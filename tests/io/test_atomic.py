"""A file is whole or not there, whatever fails and whenever the process dies."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ctsr.core.volume import Volume
from ctsr.errors import InputError, ResourceError, UsageError
from ctsr.io.atomic import (
    OutputFile,
    atomic_write,
    check_output,
    input_error,
    output_error,
    sweep,
    write_bytes,
    write_text,
)
from ctsr.io.nifti import write_volume
from ctsr.io.provenance import write_record
from tests.io.make import affine_of, ct


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("taken", [7, 1 << 20])
def test_a_new_file_appears_whole_and_alone_however_many_bytes_the_disk_takes(tmp_path, monkeypatch, taken):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:taken]))
    digest = write_bytes(tmp_path / "x", b"abc" * 1000, overwrite=False)
    assert (tmp_path / "x").read_bytes() == b"abc" * 1000
    assert digest == hashlib.sha256(b"abc" * 1000).hexdigest()
    assert os.listdir(tmp_path) == ["x"]


def test_text_is_utf_8_and_gives_back_names_that_are_not(tmp_path):
    write_text(tmp_path / "x", "é日\n" + os.fsdecode(b"\xff"), overwrite=False)
    assert (tmp_path / "x").read_bytes() == "é日\n".encode() + b"\xff"


def test_nothing_shows_before_the_end(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with atomic_write(tmp_path / "x", overwrite=True) as file:
        file.write(b"new")
        assert (tmp_path / "x").read_bytes() == b"old"
        assert file.size == 3
    assert (tmp_path / "x").read_bytes() == b"new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError, SystemExit])
def test_an_error_inside_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(error), atomic_write(tmp_path / "x", overwrite=True) as file:
        _write_and_raise(file, error)
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def _write_and_lose(file: OutputFile, path: Path) -> None:
    file.write(b"late")
    path.write_bytes(b"first")


def _write_and_raise(file: OutputFile, error: type[BaseException]) -> None:
    file.write(b"new")
    raise error


def test_an_existing_file_is_kept_unless_overwriting_was_asked_for(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(UsageError, match=r"exists already \(--overwrite"):
        write_bytes(tmp_path / "x", b"new", overwrite=False)
    assert (tmp_path / "x").read_bytes() == b"old"
    write_bytes(tmp_path / "x", b"new", overwrite=True)
    assert (tmp_path / "x").read_bytes() == b"new"


def test_a_file_that_appears_while_one_is_written_is_kept(tmp_path):
    with (
        pytest.raises(UsageError, match="exists already"),
        atomic_write(tmp_path / "x", overwrite=False) as file,
    ):
        _write_and_lose(file, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("fault", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, None])
def test_a_file_system_without_hard_links_gets_check_then_replace(tmp_path, monkeypatch, fault):
    def no_link(*_: object) -> None:
        raise OSError(fault, "") if fault else NotImplementedError

    monkeypatch.setattr(os, "link", no_link)
    write_bytes(tmp_path / "x", b"new", overwrite=False)
    assert (tmp_path / "x").read_bytes() == b"new"
    with pytest.raises(UsageError), atomic_write(tmp_path / "y", overwrite=False):
        (tmp_path / "y").write_bytes(b"first")
    assert (tmp_path / "y").read_bytes() == b"first"


def test_of_many_writers_of_one_name_one_wins_and_its_file_is_whole(tmp_path):
    for i in range(20):
        target, won, lost = tmp_path / str(i), [], []
        start = threading.Barrier(4)

        def write(who: int, target: Path = target, won: list = won, lost: list = lost, start=start) -> None:
            start.wait()
            try:
                write_bytes(target, bytes([who]) * 50_000, overwrite=False)
                won.append(who)
            except UsageError:
                lost.append(who)

        threads = [threading.Thread(target=write, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 3)
        assert target.read_bytes() == bytes(won) * 50_000


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o000])
def test_the_mode_is_what_the_umask_leaves(tmp_path, umask, mask):
    umask(mask)
    (tmp_path / "old").write_bytes(b"")
    (tmp_path / "old").chmod(0o600)
    for name in ("new", "old"):
        write_bytes(tmp_path / name, b"x", overwrite=True)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~mask


def test_a_symlink_stays_and_the_file_it_names_is_written(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_bytes(b"old")
    (tmp_path / "link").symlink_to(Path("real") / "x")
    write_bytes(tmp_path / "link", b"new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "x").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]
    (tmp_path / "dangling").symlink_to(Path("real") / "y")
    write_bytes(tmp_path / "dangling", b"y", overwrite=False)
    assert (tmp_path / "real" / "y").read_bytes() == b"y"


@pytest.mark.parametrize(
    "name", ["n" * 254, "n" * 255, os.fsdecode(b"a\xff\xfeb"), "new\nline", "-x", ".ctsr-x"]
)
def test_any_legal_name_is_written(tmp_path, name):
    check_output(tmp_path / name, overwrite=False)
    write_bytes(tmp_path / name, b"x", overwrite=False)
    assert os.listdir(os.fsencode(tmp_path)) == [os.fsencode(name)]


def test_what_killed_processes_left_is_swept_when_it_is_old(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    old, young = f".ctsr-{gone.pid}-0123ab.part", f".ctsr-{gone.pid}-0123cd.part"
    alive, foreign = f".ctsr-{os.getpid()}-0123ab.part", f".ctsr-{gone.pid}-0123ab.part.txt"
    for name in (old, young, alive, foreign):
        (tmp_path / name).write_bytes(b"x")
        if name != young:
            os.utime(tmp_path / name, (time.time() - 4000,) * 2)
    write_bytes(tmp_path / "x", b"x", overwrite=False)
    assert sorted(os.listdir(tmp_path)) == sorted([young, alive, foreign, "x"])


def test_the_bytes_are_on_the_disk_before_the_name_is_taken(tmp_path, monkeypatch):
    calls: list[str] = []
    for name in ("write", "fsync", "replace", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _n=name, _r=real, **k: (calls.append(_n), _r(*a, **k))[1])
    write_bytes(tmp_path / "x", b"x", overwrite=True)
    write_bytes(tmp_path / "y", b"x", overwrite=False)
    assert calls == ["write", "fsync", "replace", "fsync", "write", "fsync", "link", "fsync"]


# Errors and what they stand for


def test_a_wrong_path_is_a_matter_of_usage_a_full_disk_one_of_resources_and_what_is_read_one_of_the_input():
    for code in (errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
        error = output_error(OSError(code, os.strerror(code)), "out.nii")
        assert isinstance(error, UsageError)
        assert str(error).startswith("out.nii: ")
    for name in ("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EIO"):
        code = getattr(errno, name)
        error = output_error(OSError(code, os.strerror(code)), "out.nii")
        assert isinstance(error, ResourceError)
        assert error.reason == f"cannot be written: {os.strerror(code).lower()}"
    for name in ("ENOENT", "EACCES", "EISDIR", "ELOOP", "ENAMETOOLONG", "EIO", "ESTALE"):
        assert isinstance(input_error(OSError(getattr(errno, name), "words"), "in.nii"), InputError)


def test_an_output_that_could_not_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "hard").hardlink_to(tmp_path / "file")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    refused: list[tuple[str | Path, dict, str]] = [
        (tmp_path / "none" / "x", {}, "its folder does not exist"),
        (tmp_path / "file" / "x", {}, "its folder does not exist"),
        (tmp_path / "file", {}, "exists already"),
        (tmp_path, {"overwrite": True}, "is a folder"),
        (f"{tmp_path}/new/", {"overwrite": True}, "is a folder"),
        (tmp_path / "fifo", {"overwrite": True}, "is a FIFO"),
        ("/dev/null", {"overwrite": True}, "is a FIFO, a socket or a device"),
        (tmp_path / "loop", {"overwrite": True}, "loop of links"),
        (tmp_path / ("x" * 256), {}, "name is too long"),
        (
            tmp_path / "file",
            {"overwrite": True, "inputs": [tmp_path / "none", tmp_path / "file"]},
            "is the input itself",
        ),
        (tmp_path / "link", {"overwrite": True, "inputs": [tmp_path / "file"]}, "is the input itself"),
        (tmp_path / "hard", {"overwrite": True, "inputs": [tmp_path / "link"]}, "is the input itself"),
    ]
    before = {p.name: p.lstat().st_mtime_ns for p in tmp_path.iterdir()}
    for path, options, words in refused:
        with pytest.raises(UsageError) as error:
            check_output(path, **{"overwrite": False, **options})
        assert words in str(error.value)
    check_output(tmp_path / "file", overwrite=True, inputs=[tmp_path / "none"])
    check_output(tmp_path / "new", overwrite=False, inputs=[tmp_path / "file"])
    assert {p.name: p.lstat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_a_folder_that_can_not_be_written_to_is_noticed_before_the_work(tmp_path, monkeypatch):
    def read_only(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(ResourceError, match="read-only file system"):
        check_output(tmp_path / "x", overwrite=False)


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_a_folder_or_a_device_is_never_replaced(tmp_path, kind):
    if kind == "folder":
        (tmp_path / "x").mkdir()
    else:
        os.mkfifo(tmp_path / "x")
    with pytest.raises(UsageError):
        write_bytes(tmp_path / "x", b"new", overwrite=True)
    assert os.listdir(tmp_path) == ["x"]
    assert not (tmp_path / "x").is_file()


# The n-th failure


def nifti_writer(suffix: str) -> Callable[[Path, int], None]:
    def write(path: Path, seed: int) -> None:
        write_volume(Volume(ct((40, 40, 30), seed), affine_of()), path.with_suffix(suffix), overwrite=True)

    return write


WRITERS: dict[str, Callable[[Path, int], None]] = {
    ".nii": nifti_writer(".nii"),
    ".nii.gz": nifti_writer(".nii.gz"),
    ".bin": lambda path, seed: (
        write_bytes(path.with_suffix(".bin"), bytes([seed]) * 3000, overwrite=True) and None
    ),
    ".json": lambda path, seed: write_record(path.with_suffix(".json"), {"seed": seed}, overwrite=True),
}


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("is_there", [True, False])
def test_whichever_call_fails_the_output_is_the_old_or_the_new_one(
    tmp_path, monkeypatch, kind, fault, is_there
):
    target = (tmp_path / "x").with_suffix(kind)
    WRITERS[kind](tmp_path / "x", 2)
    new = target.read_bytes()
    target.unlink()
    if is_there:
        WRITERS[kind](tmp_path / "x", 1)
    old = target.read_bytes() if is_there else None
    for n in range(1, 100):
        calls = 0

        def failing(real: Callable, closes: bool, n: int = n) -> Callable:
            def call(*args: object, **options: object) -> object:
                nonlocal calls
                calls += 1
                if calls == n:
                    if closes:
                        real(*args)
                    raise OSError(fault, os.strerror(fault))
                return real(*args, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("open", "write", "fsync", "fchmod", "replace", "link", "close", "ftruncate"):
                patch.setattr(os, name, failing(getattr(os, name), name == "close"))
            try:
                WRITERS[kind](tmp_path / "x", 2)
                is_ok = True
            except ResourceError:
                is_ok = False
        found = target.read_bytes() if target.exists() else None
        assert found == (new if is_ok else old)
        assert os.listdir(tmp_path) == ([target.name] if found is not None else [])
        if calls < n:
            break
        if is_ok:  # only the folder's fsync may fail without an error
            target.unlink()
            if old is not None:
                target.write_bytes(old)
    assert n > 6


def test_a_compressor_that_failed_writes_nothing_later(tmp_path, monkeypatch):
    """Its destructor ends the stream; by then the descriptor's number may belong to another file."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "")

    real = os.write
    for fails_at in (1, 2):
        calls: list[int] = []

        def write(fd: int, data: bytes, fails_at: int = fails_at, calls: list = calls) -> int:
            calls.append(fd)
            return full() if len(calls) == fails_at else real(fd, data)

        monkeypatch.setattr(os, "write", write)
        with pytest.raises(ResourceError):
            write_volume(Volume(ct(), affine_of()), tmp_path / "x.nii.gz")
        monkeypatch.undo()
        others = [os.open(tmp_path / str(i), os.O_WRONLY | os.O_CREAT) for i in range(9)]
        gc.collect()
        assert all(os.fstat(fd).st_size == 0 for fd in others)
        for fd in others:
            os.close(fd)


def test_a_record_is_in_place_before_its_image_and_not_without_it(tmp_path, monkeypatch):
    volume, image = Volume(ct(), affine_of()), tmp_path / "x.nii.gz"
    names: list[str] = []
    real = os.link
    monkeypatch.setattr(os, "link", lambda a, b: (names.append(os.path.basename(b)), real(a, b))[1])
    write_volume(volume, image, record={"factor": 2})
    assert names == ["x.json", "x.nii.gz"]
    with pytest.raises(UsageError):
        write_volume(
            volume, tmp_path / "x.nii", record={"factor": 3}
        )  # x.json is taken: the image must not appear
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.nii.gz"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """RLIMIT_FSIZE in a child: the real errno from the kernel, in the compressing thread too."""
    code = f"""
import resource, sys, numpy as np
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from ctsr.core.volume import Volume
from ctsr.errors import ResourceError
from ctsr.io.nifti import write_volume
data = np.random.default_rng(0).integers(-1000, 1000, (200, 200, 60)).astype(np.int16)
volume = Volume(data, np.diag([-1., -1, 2, 1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
for name in ("x.nii", "x.nii.gz"):
    try:
        write_volume(volume, {str(tmp_path)!r} + "/" + name, overwrite=True)
    except ResourceError as error:
        print(error)
"""
    for name in ("x.nii", "x.nii.gz"):
        (tmp_path / name).write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("cannot be written: file too large") == 2
    assert sorted(os.listdir(tmp_path)) == ["x.nii", "x.nii.gz"]
    assert {p.read_bytes() for p in tmp_path.iterdir()} == {b"old"}


# The kill


KILLED = """
import sys, numpy as np
sys.path.insert(0, sys.argv[2])
from ctsr.core.volume import Volume
from ctsr.io.nifti import write_volume
rng = np.random.default_rng(0)
data = [rng.integers(-1000, 1000, (128, 128, 40)).astype(np.int16) for _ in range(3)]
volumes = [Volume(d, np.diag([-1., -1, 2, 1])) for d in data]
print("ready", flush=True)
while True:
    for volume in volumes:
        print(write_volume(volume, sys.argv[1], overwrite=True), flush=True)
"""


@pytest.mark.ci
@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_a_killed_writer_leaves_a_whole_file(tmp_path, name):
    rng = random.Random(0)
    history: set[str] = set()
    for _ in range(20):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / name), str(Path(__file__).parents[2])],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        history |= {child.stdout.readline().strip() for _ in range(3)}
        time.sleep(rng.uniform(0, 0.2))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() in history
    assert len(history) == 3


def test_importing_needs_nothing_that_windows_lacks(tmp_path):
    code = (
        "import os, sys\n"
        "for name in ('fchmod', 'link', 'umask', 'mkfifo', 'O_CLOEXEC', 'sched_getaffinity'):\n"
        "    vars(os).pop(name, None)\n"
        "for name in ('fcntl', 'resource', 'grp', 'pwd'):\n"
        "    sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "import ctsr.io.nifti, ctsr.io.lists, ctsr.io.provenance, ctsr.io.images, ctsr.io.atomic as atomic\n"
        f"atomic.write_bytes({str(tmp_path / 'x')!r}, b'x', overwrite=False)\n"
        "assert not {'torch', 'nibabel', 'SimpleITK', 'rich', 'typer', 'scipy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "x").read_bytes() == b"x"


def test_a_folder_that_is_not_there_is_told_and_has_nothing_to_sweep(tmp_path):
    with pytest.raises(UsageError, match="its folder does not exist"):
        write_bytes(tmp_path / "none" / "x", b"x", overwrite=True)
    sweep(tmp_path / "none")


def test_a_secret_is_never_readable_by_others(tmp_path, umask):
    umask(0o000)
    write_text(tmp_path / "key", "secret", overwrite=False, mode=0o600)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
