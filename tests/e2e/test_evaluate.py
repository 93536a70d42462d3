"""`ctsr evaluate` as it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ctsr.cli import signals
from ctsr.cli.main import main
from ctsr.core.volume import Volume
from ctsr.io.nifti import write_volume
from ctsr.physics.simulation import simulate_volume
from ctsr.workflows.thinner import Thinner
from tests.train.tiny import body


def ctsr(*words: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ctsr", "evaluate", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def files(tmp_path) -> Path:
    """thin.nii, thick.nii made of it, and result.nii made of that."""
    data = body(0, (12, 32, 30)).transpose(2, 1, 0)
    thin = Volume(np.asfortranarray(data), np.diag([-0.8, -0.8, 1.25, 1.0]), slice_axis=2)
    thick, _ = simulate_volume(thin, factor=2)
    result = Thinner(model="inverse", factor=2)(thick).volume
    for name, volume in (("thin", thin), ("thick", thick), ("result", result)):
        write_volume(volume, tmp_path / f"{name}.nii")
    return tmp_path


def test_simulate_upsample_and_score_in_one_go(files):
    done = ctsr("--thin", "thin.nii", "--factor", 2, "--model", "inverse,cubic", "--json", cwd=files)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["ok"] is True
    assert [(row["case"], row["method"]) for row in document["rows"]] == [
        ("thin.nii", "inverse"), ("thin.nii", "cubic"),
    ]  # fmt: skip
    assert document["rows"][0]["gain_db"] > 0.5


def test_the_table_names_the_peak_and_a_condition_that_fails_is_exit_9(files):
    words = ["result.nii", "thin.nii", "--thick", "thick.nii", "--thickness", 2.5, "--require", "psnr>=99"]
    done = ctsr(*words, "--against", "nearest,cubic", "--out", "report.csv", "--figure", "f.png", cwd=files)
    assert done.returncode == 9
    assert done.stderr.startswith("error: result.nii: psnr_4095_db is ")
    assert done.stderr.count("\n") == 1
    title, header, *rows = done.stdout.splitlines()
    assert title == "mask: body"
    assert {"psnr_4095_db", "gain_db", "ssim_coronal", "mae_hu"} <= set(header.split())
    assert [row.split()[1] for row in rows] == ["result", "nearest", "cubic"]
    assert len((files / "report.csv").read_text().splitlines()) == 4
    assert (files / "f.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_with_a_bad_case_is_exit_7_and_one_document(files):
    for name in ("results", "truths"):
        (files / name).mkdir()
        (files / name / "bad.nii").write_bytes(b"no image")
    (files / "result.nii").rename(files / "results" / "a.nii")
    (files / "thin.nii").rename(files / "truths" / "a.nii")
    done = ctsr("results", "truths", "--json", "--require", "psnr>=99", cwd=files)
    assert done.returncode == 7
    assert done.stderr.splitlines()[-1].startswith("error: results: 1 of 2 cases failed")
    document = json.loads(done.stdout)
    assert (document["ok"], document["error"]["code"]) == (False, 7)
    assert [row["status"] for row in document["rows"]] == ["ok", "failed"]
    assert document["not_met"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "neither PRED nor --thin"),
        (["result.nii"], 2, "neither REF nor --thick"),
        (["result.nii", "thin.nii", "--against", "cubic"], 2, "--against needs --thick"),
        (["result.nii", "thin.nii", "--factor", "3"], 2, "--factor needs --thin"),
        (["result.nii", "--thin", "thin.nii"], 2, "--thin stands instead of PRED"),
        (["--thin", "thin.nii", "--factor", "two", "--model", "cubic"], 2, "two is not a number"),
        (["result.nii", "thin.nii", "--require", "beauty>=3"], 2, "unknown metric 'beauty'"),
        (["result.nii", "gone.nii"], 3, "gone.nii: does not exist"),
        (["result.nii", "thick.nii"], 3, "has 30 × 32 × 12 voxels, the reference has 30 × 32 × 6"),
    ],
)
def test_what_can_not_be_done_is_one_line_and_leaves_nothing(files, monkeypatch, capfd, words, code, said):
    """In this process: starting another for each would take a minute."""
    before = sorted(p.name for p in files.iterdir())
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "argv", ["ctsr", "evaluate", *words, "--threads", str(torch.get_num_threads())])
    monkeypatch.setattr(signals, "install", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capfd.readouterr()
    assert (ended.value.code, out) == (code, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert sorted(p.name for p in files.iterdir()) == before
