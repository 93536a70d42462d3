"""The installed command as a shell meets it: streams, signals, terminals, imports."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ctsr.cli.main import app
from tests.infer.tiny import checkpoint
from tests.io.make import affine_of, nifti, put

if sys.platform == "win32":
    pytest.skip("signals and terminals of POSIX", allow_module_level=True)

import typer.main

CTSR = [sys.executable, "-m", "ctsr"]
QUIET = {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
HEAVY = ("torch", "nibabel", "SimpleITK", "matplotlib", "scipy", "numpy", "huggingface_hub", "tensorboard")
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "VIRTUAL_ENV", "PYTHONPATH", "TMPDIR")}
    return kept | QUIET | {"PYTHONPATH": str(Path(__file__).parents[2])} | more


def run(*arguments: object, **told) -> subprocess.CompletedProcess[str]:
    told = {"capture_output": True, "env": environment(), "timeout": 300} | told
    return subprocess.run([*CTSR, *map(str, arguments)], text=True, **told)


def shell(script: str, folder: Path, **told) -> subprocess.CompletedProcess[str]:
    script = script.replace("ctsr ", f"'{sys.executable}' -m ctsr ")
    return subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=300,
        **told,
    )


@pytest.fixture
def here(tmp_path) -> Path:
    put(tmp_path, nifti(), "in.nii")
    return tmp_path


@pytest.fixture
def slow(tmp_path) -> Path:
    """A folder where `ctsr upsample in.nii out.nii --checkpoint tiny.safetensors` takes many seconds."""
    data = np.random.default_rng(0).integers(-1000, 1000, (160, 160, 400)).astype(np.int16)
    put(tmp_path, nifti(data, affine_of((0.7, 0.7, 2.5))), "in.nii")
    checkpoint(tmp_path)
    return tmp_path


SLOW = ("in.nii", "out.nii.gz", "--checkpoint", "tiny.safetensors")

LOADED = """
import sys
sys.argv = ["ctsr", *sys.argv[1:]]
try:
    from ctsr.cli.main import main
    main()
except SystemExit:
    pass
print(*sorted({name.split(".")[0] for name in sys.modules}), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], *([c, "--help"] for c in COMMANDS), ["upsample", "x"]], ids=" ".join
)
def test_help_and_refusals_load_nothing_heavy(arguments):
    """And work without a home. Half a second of start-up lies in these modules."""
    ran = subprocess.run(
        [sys.executable, "-c", LOADED, *arguments],
        text=True,
        capture_output=True,
        env=environment(),
        timeout=300,
    )
    assert "Usage:" in ran.stdout or arguments[-1] == "x"
    loaded = ran.stderr.splitlines()[-1].split()
    assert not set(HEAVY) & set(loaded)
    assert "HOME" not in environment()


def test_streams_may_be_closed_full_or_left_by_their_reader(here):
    """Files are complete all the same; only a full disk is an error, in one line."""
    upsample = "ctsr upsample in.nii out.nii --model cubic --overwrite -q"
    for script, code, err in [
        (f"{upsample} >&-", 0, ""),
        (f"{upsample} 2>&-", 0, ""),
        (f"{upsample} >&- 2>&-", 0, ""),
        ("ctsr upsample none.nii out.nii --model cubic >&- 2>&-", 3, ""),
        (f"{upsample} | true; exit ${{PIPESTATUS[0]}}", 0, ""),
        (f"{upsample} > /dev/full", 4, "error: no space left on device\n"),
        (f"{upsample} --json > /dev/full", 4, "error: no space left on device\n"),
        ("ctsr --version > /dev/full", 4, "error: no space left on device\n"),
        ("ctsr upsample --help > /dev/full", 4, "error: no space left on device\n"),
        ("ctsr upsample --help | true; exit ${PIPESTATUS[0]}", 0, ""),
    ]:
        (here / "out.nii").unlink(missing_ok=True)
        ran = shell(script, here)
        assert (ran.returncode, ran.stderr) == (code, err), script
        assert (here / "out.nii").exists() == ("--overwrite" in script), script


def test_json_is_on_stdout_and_talk_on_stderr(here):
    ran = run("upsample", "in.nii", "out.nii", "--model", "cubic", "--json", "-v", cwd=here)
    assert json.loads(ran.stdout)["ok"] is True
    assert "one matrix along z" in ran.stderr
    ran = run("upsample", "none.nii", "x.nii", "--model", "cubic", "--json", cwd=here)
    assert ran.returncode == json.loads(ran.stdout)["error"]["code"] == 3
    assert ran.stderr.splitlines()[-1] == "error: none.nii: does not exist"


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0"}]
)
def test_any_name_can_be_told_in_any_encoding(here, locale):
    name = os.fsdecode(b"\xe6\x97\xa5\xff.nii")
    ran = run(
        "upsample", name, "out.nii", "--model", "cubic", cwd=here, env=environment(**locale), errors="replace"
    )
    assert ran.returncode == 3
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1


def started(folder: Path, *arguments: str, **told) -> subprocess.Popen[str]:
    """The command, when it computes: its temporary file stays for a while."""
    process = subprocess.Popen(
        [*CTSR, "upsample", *arguments],
        cwd=folder,
        env=environment(),
        text=True,
        stderr=subprocess.PIPE,
        **told,
    )
    wait_for_work(folder, process)
    return process


def wait_for_work(folder: Path, process: subprocess.Popen[str]) -> None:
    since = None
    for _ in range(2400):
        assert process.poll() is None, process.communicate()
        parts = list(folder.glob(".ctsr-*.part"))
        since = (since or time.monotonic()) if parts else None
        if since and time.monotonic() - since > 0.5:
            return
        time.sleep(0.05)
    raise AssertionError("never began to compute")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_work_and_leaves_nothing(slow, signum):
    before = sorted(p.name for p in slow.iterdir())
    process = started(slow, *SLOW, "--json", stdout=subprocess.PIPE)
    sent = time.monotonic()
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    took = time.monotonic() - sent
    assert process.returncode == -signum
    assert json.loads(out)["error"]["code"] == 128 + signum
    assert err.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in err
    assert sorted(p.name for p in slow.iterdir()) == before
    assert took < 20  # 2 s on a quiet machine


def test_ctrl_c_stops_a_shell_loop(slow):
    script = f"for i in 1 2 3; do '{sys.executable}' -m ctsr upsample {' '.join(SLOW)} --overwrite; echo went on; done"
    loop = subprocess.Popen(
        ["bash", "-c", script], cwd=slow, env=environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for_work(slow, loop)
    os.killpg(loop.pid, signal.SIGINT)  # as a terminal does
    out, err = loop.communicate(timeout=60)
    assert loop.returncode == -signal.SIGINT
    assert "went on" not in out
    assert err.count("error: interrupted") == 1


@pytest.mark.parametrize(("term", "has_bar"), [("xterm", True), ("dumb", False)])
def test_a_terminal_shows_a_bar_and_a_dumb_one_lines(here, term, has_bar):
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*CTSR, "upsample", "in.nii", "out.nii", "--model", "cubic"],
        cwd=here, env=environment(TERM=term), stdout=subprocess.PIPE, stderr=follower,
    )  # fmt: skip
    os.close(follower)
    shown = b""
    try:
        while piece := os.read(leader, 65536):
            shown += piece
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(leader)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert (b"\x1b[" in shown) == has_bar
    assert ("━".encode() in shown) == has_bar
    assert b"note: in.nii: slice thickness" in shown
    assert b"\x1b" not in out


def test_a_run_writes_only_what_is_named(here):
    home = here / "home"
    home.mkdir()
    run("upsample", "in.nii", "out.nii.gz", "--model", "cubic", cwd=here, env=environment(HOME=str(home)))
    assert sorted(p.name for p in here.iterdir()) == ["home", "in.nii", "out.json", "out.nii.gz"]
    assert list(home.iterdir()) == []
