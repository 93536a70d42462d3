"""`ctsr download-weights` as a shell meets it, against a hub on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.models.test_zoo import model
from tests.weights.local_hub import environment, running

TEXT = "hf://org/repo@main/m.safetensors"


@pytest.fixture
def server():
    with running(model()) as server:
        yield server


@pytest.fixture
def ctsr(server, tmp_path):
    """Runs `ctsr WORDS` in an empty folder, with `more` in its environment."""
    (tmp_path / "here").mkdir()

    def start(*words: object, **more: str) -> subprocess.Popen[str]:
        told = environment(server, tmp_path)
        env = {k: v for k, v in os.environ.items() if k not in told} | {k: v for k, v in told.items() if v}
        env |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "TERM": "dumb"} | more
        return subprocess.Popen(
            [sys.executable, "-m", "ctsr", *map(str, words)],
            cwd=tmp_path / "here", env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
        process = start(*words, **more)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    run.start = start
    return run


def left(tmp_path: Path) -> list[str]:
    return sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupted_download_leaves_nothing(ctsr, server, tmp_path):
    server.fail("GET", cut=1000, by="stall")
    process = ctsr.start("download-weights", TEXT)
    deadline = time.monotonic() + 60
    while not server.asked("GET") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err.splitlines()[-1]) == (-signal.SIGINT, "", "error: interrupted")
    assert left(tmp_path) == []


def test_the_hub_is_asked_for_the_file_alone(ctsr, server, tmp_path):
    """The client's own look-ups and its telemetry are off; it writes nothing outside our folder."""
    done = ctsr("download-weights", TEXT, AGENT="x", CLAUDECODE="1")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert {path.split("/")[3] for _, path, _ in server.log} == {"resolve"}
    assert left(tmp_path) == [f"cache/org/repo@main/m.safetensors{end}" for end in ("", ".json")]


def test_a_transfer_that_stands_still_is_given_up(ctsr, server, tmp_path):
    server.fail("GET", cut=1000, by="stall")
    done = ctsr("download-weights", TEXT, "--timeout", 1)
    assert done.returncode == 6
    assert done.stderr.splitlines()[-1] == f"error: {TEXT}: no progress for 1 s at 0.0 of 0.0 MB (try again)"
    assert left(tmp_path) == []
