"""`ctsr train-baseline`: what it refuses at once, how it ends, and that the same command goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from ctsr.cli.main import app
from ctsr.errors import CtsrError
from ctsr.train import checkpoint
from ctsr.train.loop import Outcome
from ctsr.weights.registry import load_model
from ctsr.workflows import train_baseline as workflow
from ctsr.workflows import training
from tests.e2e.conftest import make_project

SMALL = ["--patch-size", "16", "16", "16", "--batch-size", "1", "--device", "cpu", "--threads", "1"]


def train(project: Path, *options: str) -> None:
    """The command in this process."""
    app(["train-baseline", "--project", str(project), *SMALL, *options], standalone_mode=False)


def installed(project: Path, *options: str) -> subprocess.Popen[str]:
    """The command as a user runs it."""
    command = shutil.which("ctsr", path=os.path.dirname(sys.executable)) or shutil.which("ctsr")
    assert command is not None
    call = [command, *options, "--project", str(project), *SMALL]
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("command", "kind"), [("train-baseline", "baseline"), ("finetune-vae --preset tiny", "vae")]
)
def test_a_signal_saves_first_and_the_same_command_goes_on(tmp_path, command, kind):
    project, last = make_project(tmp_path / "p"), 0
    call = [*command.split(), "--validate-every", "2", "--warmup-steps", "100000", "--max-steps"]
    for signum in (signal.SIGTERM, signal.SIGINT):
        child = installed(project, *call, "1000000")
        assert child.stderr is not None
        lines = []
        for line in child.stderr:  # until it has validated twice
            lines.append(line)
            if sum(bool(re.match(r"note: step \d+: ", x)) for x in lines) == 2:
                break
        start = time.monotonic()
        child.send_signal(signum)
        out, rest = child.communicate(timeout=60)
        took = time.monotonic() - start
        err = "".join(lines) + rest
        assert child.returncode in (-signum, 128 + signum), err
        assert took < 10, err
        assert (out, err.splitlines()[-1]) == ("", "error: interrupted")
        assert "Traceback" not in err
        if last:
            assert f"note: going on from step {last}\n" in err
        found = re.search(r"note: saved at step (\d+); the same command goes on from there", err)
        assert found is not None, err
        assert int(found[1]) > last
        last = int(found[1])
        assert checkpoint.read(project / "checkpoints" / kind).card["training"]["step"] == last
    out, err = installed(project, *call, str(last + 1)).communicate(timeout=60)
    assert f"note: going on from step {last}\n" in err
    assert f": {last + 1} steps, best " in out


def test_a_project_is_all_it_needs_and_gets(project, capsys):
    train(project, "--max-steps", "2")
    folder = project / "checkpoints/baseline"
    names = {p.name for p in folder.iterdir()}
    assert names >= {"best.safetensors", "last.safetensors", "metrics.jsonl", "config.json"}
    out, err = capsys.readouterr()
    assert out.startswith(f"{folder}: 2 steps, best ")
    assert "note: train scan1.nii.gz: 16 slices of 1 mm, along z and in plane\n" in err
    assert "note: val scan3.nii.gz: 16 slices of 1.25 mm, validates\n" in err
    shares = re.search(r"note: input spacing of the pairs: (.*)\n", err)
    assert shares is not None
    assert sum(int(s) for s in re.findall(r"(\d+)%", shares[1])) == pytest.approx(100, abs=3)
    model, file = load_model(folder / "best.safetensors", kind="baseline")
    assert sum(p.numel() for p in model.parameters()) == 371_416
    assert file.card["trained_on"] == ["scan1.nii.gz", "scan2.nii.gz"]
    assert file.card["ranges"] == {"input_spacing_mm": [1.0, 6.5], "relative_width": [0.75, 2.1]}
    assert file.card["metrics"]["step"] == 2
    assert str(project) not in json.dumps(file.card["trained_on"])
    train(project, "--max-steps", "2", "--json")
    out, err = capsys.readouterr()
    assert json.loads(out)["step"] == 2
    assert "this run is finished: 2 steps are done (--max-steps for more)" in err


def test_fine_tuning_ends_with_a_comparison(project, capsys):
    train(project, "--max-steps", "1")
    first = project / "checkpoints/baseline/best.safetensors"
    capsys.readouterr()
    options = ["--init", str(first), "--output-dir", str(project / "fine"), "--max-steps", "1"]
    train(project, *options)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[:4]] == ["on", "weights", "cubic", "before"]
    assert rows[4][0] == "after"
    before = load_model(first, kind="baseline")[1]
    after = load_model(project / "fine/best.safetensors", kind="baseline")[1]
    assert after.card["init"] == {"name": "best.safetensors", "sha256": before.sha256}
    assert float(rows[3][1]) == pytest.approx(before.card["metrics"]["psnr_4095_db"], rel=1e-3)
    assert float(rows[4][1]) == pytest.approx(after.card["metrics"]["psnr_4095_db"], rel=1e-3)


def test_epochs_count_pairs_whoever_makes_them(project, monkeypatch):
    asked = {}

    def records(task, loop, folder, **_):
        asked[loop.batch_size, os.environ.get("WORLD_SIZE")] = loop.max_steps
        return Outcome(0, None, 0)

    monkeypatch.setattr(workflow, "train", records)
    train(project, "--epochs", "3", "--batch-size", "4")
    train(project, "--epochs", "3", "--batch-size", "5")
    monkeypatch.setenv("WORLD_SIZE", "4")
    train(project, "--epochs", "3", "--batch-size", "4")
    assert list(asked.values()) == [3 * 2 * 256 / 4, 308, 3 * 2 * 256 / 16]  # 1536 / 5 = 307.2


def test_only_one_process_of_several_speaks(project, capsys, monkeypatch):
    monkeypatch.setattr(workflow, "train", lambda *a, **k: Outcome(2, 50.0, 2))
    monkeypatch.setenv("RANK", "1")
    train(project, "--max-steps", "2")
    assert capsys.readouterr() == ("", "")


def _leak(project: Path) -> list[str]:
    shutil.copy(project / "data/scan1.nii.gz", project / "data/renamed.nii.gz")
    (project / "data/val_files.txt").write_text("renamed.nii.gz\n")
    return []


def _file_in_the_way(project: Path) -> list[str]:
    (project / "checkpoints").write_text("")
    return []


def _damaged(project: Path) -> list[str]:
    path = project / "data/scan2.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])
    return []


def _gone(project: Path) -> list[str]:
    (project / "data/scan2.nii.gz").unlink()
    return []


def _empty(project: Path) -> list[str]:
    (project / "data/train_files.txt").write_text("# nothing\n")
    return []


def _busy(project: Path) -> list[str]:
    held.append(checkpoint.locked(project / "checkpoints/baseline"))
    held[-1].__enter__()
    return []


held: list = []

REFUSED = [
    (lambda p: ["--epochs", "1", "--max-steps", "1"], 2, "exclude each other"),
    (lambda p: ["--patch-size", "17", "16", "16"], 2, "even number of slices"),
    (lambda p: ["--patch-size", "16", "20", "16"], 2, r"\(16, 20, 16\) is not a multiple of 8 in plane"),
    (lambda p: ["--resume", "maybe"], 2, "is not one of .auto., .no."),
    (lambda p: ["--workers", "1000000"], 2, "--workers: 1000000 is not in 0…"),
    (lambda p: ["--train-split", str(p / "none.txt")], 2, "none.txt: does not exist"),
    (_empty, 2, "train_files.txt: names no files"),
    (_file_in_the_way, 2, "not a folder|is a file"),
    (_busy, 2, "a training is active in this folder"),
    (_gone, 3, "train_files.txt:2: scan2.nii.gz does not exist"),
    (_damaged, 3, "scan2.nii.gz: truncated gzip"),
    (_leak, 3, "renamed.nii.gz: holds the same voxels as .*scan1.nii.gz"),
    (lambda p: ["--device", "cuda:7"], 4, "--device cuda:7: this machine has"),
    (lambda p: ["--init", str(p / "none.safetensors")], 5, "no such model file"),
]


@pytest.mark.parametrize(("spoil", "code", "words"), REFUSED, ids=[words for _, _, words in REFUSED])
def test_what_cannot_be_trained_is_refused_before_a_step(project, monkeypatch, spoil, code, words):
    monkeypatch.setattr(workflow, "train", lambda *a, **k: pytest.fail("a step was made"))
    try:
        with pytest.raises((CtsrError, typer.BadParameter), match=words) as told:
            train(project, *spoil(project))
    finally:
        while held:
            held.pop().__exit__(None, None, None)
    assert told.value.exit_code == code


def test_a_folder_that_cannot_be_written_is_refused_before_the_scans_are_read(project, monkeypatch):
    monkeypatch.setattr(training, "load_volumes", lambda *a, **k: pytest.fail("scans were read"))
    with pytest.raises(CtsrError) as told:
        train(project, "--output-dir", "/proc/ctsr")
    assert told.value.exit_code in (2, 4)


def test_help_shows_its_defaults(capsys):
    app(["train-baseline", "--help"], standalone_mode=False)
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert "20000 where neither" in words
    for text in ("[default: 4]", "[default: auto]", "train_files.txt of the data", "checkpoints/baseline/"):
        assert text in words
