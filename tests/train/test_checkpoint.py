"""`last` and `best` are whole at every instant, whatever ends the process."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

import pytest
import torch

from ctsr.errors import ResourceError
from ctsr.models import zoo
from ctsr.train import checkpoint
from tests.train import tiny


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a copy of this process (which spares it the imports); its pid."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        torch.set_num_threads(1)  # threads do not survive a fork
        work()
        code = 0
    finally:
        os._exit(code)


class _Full:
    """A disk that is full from the n-th write of a file on, for so many writes."""

    def __init__(self, monkeypatch, name: str, *, at: int, n: int = 10**9) -> None:
        self.asked = 0
        write = checkpoint.write_bytes

        def fails(path, data, *, overwrite):
            if path.name == name:
                self.asked += 1
                if at <= self.asked < at + n:
                    raise ResourceError("cannot be written: no space left on device", path=path)
            return write(path, data, overwrite=overwrite)

        monkeypatch.setattr(checkpoint, "write_bytes", fails)


def test_a_full_disk_is_tried_once_more_and_then_the_run_stops(tmp_path, monkeypatch):
    _Full(monkeypatch, "last.safetensors", at=3)  # the first is step 0's, the second step 2's
    told = tiny.Told()
    with pytest.raises(ResourceError, match="no space left") as error:
        tiny.run(tmp_path, told=told, save_every=2, validate_every=20)
    assert error.value.exit_code == 4
    assert told.steps[-1] == 5  # step 4's failed, step 6's too
    assert len(told.notes) == 1
    assert "step 4: not saved, tried once more later" in told.notes[0]
    assert checkpoint.read(tmp_path).card["training"]["step"] == 2


def test_a_disk_that_has_room_again_costs_nothing(tmp_path, monkeypatch):
    tiny.run(tmp_path / "unbroken", save_every=2)
    _Full(monkeypatch, "last.safetensors", at=2, n=1)
    outcome, told = tiny.run(tmp_path / "full", save_every=2)
    assert outcome.step == 8
    assert len(told.notes) == 1
    for name in ("last.safetensors", "best.safetensors", "metrics.jsonl"):
        assert (tmp_path / "full" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_a_file_that_stops_growing_leaves_the_old_one(tmp_path):
    resource = pytest.importorskip("resource")
    tiny.run(tmp_path, stop_at=2)
    half = (tmp_path / "last.safetensors").stat().st_size // 2

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))
        with pytest.raises(ResourceError, match=r"safetensors: cannot be written: file too large"):
            tiny.run(tmp_path)

    assert os.waitpid(fork(limited), 0)[1] == 0
    assert checkpoint.read(tmp_path).card["training"]["step"] == 2
    assert not list(tmp_path.glob(".ctsr-*"))


def test_a_folder_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(Exception, match="is a file, a folder is asked for") as told,
        checkpoint.locked(tmp_path / "file"),
    ):
        pass
    assert told.value.exit_code == 2
    with pytest.raises(Exception, match="not a folder") as told, checkpoint.locked(tmp_path / "file" / "x"):
        pass
    assert told.value.exit_code == 2


@pytest.mark.ci
def test_a_kill_at_any_moment_leaves_a_checkpoint_that_goes_on(tmp_path):
    """A checkpoint every step, and twenty kills."""
    rng = random.Random(0)
    folder, step = tmp_path / "run", 0

    def train():
        tiny.run(folder, max_steps=10**6, save_every=1, validate_every=3)

    def written() -> int:
        path = folder / "last.safetensors"
        return path.stat().st_mtime_ns if path.exists() else 0

    for _ in range(20):
        start, child = written(), fork(train)
        deadline = time.monotonic() + 120
        while written() == start and time.monotonic() < deadline:  # a slow machine gets its first step, too
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.7))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        before, step = step, checkpoint.read(folder).card["training"]["step"]
        assert step > before
        if (best := folder / "best.safetensors").exists():
            assert zoo.unpack(best.read_bytes(), "best").card["training"]["step"] % 3 == 0
    assert [line["step"] for line in tiny.metrics(folder)] == list(range(3, step + 1, 3))[
        : len(tiny.metrics(folder))
    ]
