"""`ctsr convert` as it is installed: many processes, and what a signal leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.io.dicom.make import block, planes, put, series


@pytest.fixture(scope="module")
def download(tmp_path_factory) -> Path:
    """Six series, large enough to be caught at work."""
    folder = tmp_path_factory.mktemp("download")
    for i in range(6):
        stack = planes(30, 1.0, spacing=(0.2, 0.2), shape=(300, 300), offset=float(i))
        series(folder / str(i), block(stack, put(PatientID=f"p{i}"), series=str(i)))
    return folder


@pytest.mark.ci
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_all", [True, False])  # Ctrl-C reaches the whole group, `kill` one process
def test_a_signal_leaves_whole_scans_and_no_process(download, tmp_path, signum, to_all):
    project = tmp_path / "project"
    project.mkdir()
    command = [sys.executable, "-m", "ctsr", "convert", download, "--project", project, "--workers", "2"]
    run = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while run.poll() is None and not list(project.glob("data/.ctsr-*.part")):
        time.sleep(0.005)
    (os.killpg if to_all else os.kill)(run.pid, signum)
    try:
        _, said = run.communicate(timeout=15)  # its processes hold the pipe: they have ended too
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == -signum
    assert said.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in said
    assert not list(project.glob("data/.ctsr-*.part"))
    scans = {p.name.removesuffix(".nii.gz") for p in project.glob("data/*.nii.gz")}
    records = {p.stem for p in project.glob("data/*.json")}
    assert scans <= records
    assert len(scans) < 6
    again = subprocess.run(
        [*map(str, command), "--skip-existing"], capture_output=True, text=True, timeout=120
    )
    assert (again.returncode, "internal" in again.stderr) == (0, False)
    assert len(list(project.glob("data/*.nii.gz"))) == 6
