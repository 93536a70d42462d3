"""`ctsr simulate` as it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ctsr.core.volume import Volume
from ctsr.io.nifti import read_volume, write_volume
from ctsr.workflows.simulate import phantoms


def ctsr(*words: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ctsr", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def thin(tmp_path) -> Path:
    data = np.random.default_rng(0).integers(-1000, 1000, (9, 8, 30)).astype(np.int16)
    path = tmp_path / "thin.nii.gz"
    write_volume(Volume(data, np.diag([0.7, 0.7, 1.0, 1.0])), path)
    return path


def test_a_thin_file_becomes_a_thick_one(thin, tmp_path):
    done = ctsr(
        "simulate", thin, "thick.nii.gz", "--thickness", 6, "--spacing", 5, "--noise", 4, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "thick.nii.gz: 6 slices of 6 mm, 5 mm apart, from 30\n"
    thick = read_volume(tmp_path / "thick.nii.gz")
    assert thick.shape == (9, 8, 6)
    assert thick.slice_thickness == 6
    again = ctsr("simulate", thin, "thick.nii.gz", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.startswith("error: thick.nii.gz: exists already")


def test_a_folder_with_a_bad_case_is_exit_7_and_json_says_which(thin, tmp_path):
    (tmp_path / "in").mkdir()
    thin.rename(tmp_path / "in" / "a.nii.gz")
    (tmp_path / "in" / "b.nii.gz").write_bytes(b"no image")
    done = ctsr("simulate", "in", "out", "--factor", 2.5, "--profile", "box", cwd=tmp_path)
    assert done.returncode == 7
    assert done.stderr.splitlines()[-1].startswith("error: in: 1 of 2 cases failed")
    assert "a.nii.gz" in done.stdout
    assert (
        (tmp_path / "out" / "pairs.csv")
        .read_text()
        .splitlines()[1]
        .startswith("../in/a.nii.gz,a.nii.gz,2.5,")
    )


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["thin.nii.gz"], 2, "SRC and OUT"),
        (["no.nii.gz", "out.nii.gz"], 3, "does not exist"),
        (["thin.nii.gz", "thin.nii.gz", "--overwrite"], 2, "is the input itself"),
        (["thin.nii.gz", "out.nii.gz", "--factor", "inf"], 2, "not a finite"),
        (["thin.nii.gz", "out.nii.gz", "--factor", "2", "--spacing", "2"], 2, "exclude each other"),
        (["thin.nii.gz", "out.nii.gz", "--profile", "round"], 2, "round is not gaussian"),
        (["thin.nii.gz", "out.nii.gz", "--thickness", "0.5", "--factor", "4"], 3, "ratio 0.125"),
        (["thin.nii.gz", "no/out.nii.gz"], 2, "folder does not exist"),
        (["-", "out.nii.gz"], 2, "standard input"),
        (["thin.nii.gz", "out.nii.gz", "--phantoms", "2"], 2, "--phantoms"),
        (["thin.nii.gz", "out.nii.gz", "--project", "p"], 2, "--project"),
        (["p", "--phantoms", "2", "--project", "q"], 2, "--project"),
    ],
)
def test_what_can_not_be_done_is_one_line_and_leaves_nothing(thin, tmp_path, words, code, said):
    before = thin.read_bytes()
    done = ctsr("simulate", *words, cwd=tmp_path)
    assert done.returncode == code
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thin.nii.gz"]
    assert thin.read_bytes() == before


def test_phantoms_go_into_the_data_folder_of_a_project(tmp_path):
    made = ctsr("simulate", "--phantoms", 1, "project", "--json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["scans"][0]["set"] == "train"
    assert (tmp_path / "project" / "data" / "phantom-0001.nii.gz").is_file()


def test_a_project_of_phantoms_can_be_trained_on(tmp_path):
    project = tmp_path / "project"
    phantoms(3, project, shape=(20, 40, 56), spacing=(1.0, 6.5, 6.5))  # smaller than the command's
    steps = ["--max-steps", 1, "--batch-size", 1, "--patch-size", 16, 32, 32]
    trained = ctsr("train-baseline", *steps, "--threads", 1, "--device", "cpu", cwd=project)
    assert trained.returncode == 0, trained.stderr
    assert (project / "checkpoints" / "baseline" / "best.safetensors").is_file()
