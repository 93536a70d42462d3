"""Folder in, folder out: the same bytes as file by file, in any share, whatever a neighbour does."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from ctsr.errors import InputError, ResourceError, SomeCasesFailed, UsageError, WeightsError
from ctsr.workflows.folder import (
    Case,
    Report,
    find_cases,
    raise_for_failures,
    run_cases,
    shard_name,
    take_shard,
)
from ctsr.workflows.requests import FileOptions
from ctsr.workflows.thinner import Thinner
from ctsr.workflows.upsample import upsample_files
from tests.infer.tiny import checkpoint
from tests.io.make import affine_of, ct, nifti, put

NAMES = ["a.nii.gz", "deep/er/b.nii", "deep/c.nii.gz", "d [x].nii", "e.nii.gz"]


@pytest.fixture
def cases(tmp_path) -> Path:
    """Five different volumes in a tree, and things that are none."""
    folder = tmp_path / "in"
    for seed, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        put(folder, nifti(ct(seed=seed), affine_of((0.7, 0.8, 2.0 + seed))), name)
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden.nii").write_text("x")
    return folder


def thin(source, target, *, model="cubic", shard=None, report=Report(), weights=None, **files):
    thinner = Thinner(model=model, checkpoint=weights)
    return upsample_files(source, target, thinner, FileOptions(**files), report, shard=shard)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def images(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name.endswith((".nii", ".nii.gz"))}


def summary(folder: Path, name="summary.csv") -> list[dict[str, str]]:
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("model", ["baseline", "cubic"])
def test_a_folder_gives_the_bytes_of_its_files(tmp_path, cases, model):
    weights = str(checkpoint(tmp_path)) if model == "baseline" else None
    rows = thin(cases, tmp_path / "out", model=model, weights=weights)
    made = images(tmp_path / "out")
    assert sorted(made) == sorted(NAMES)
    for name in NAMES:
        alone = tmp_path / "alone" / name
        alone.parent.mkdir(parents=True, exist_ok=True)
        upsample_files(cases / name, alone, Thinner(model=model, checkpoint=weights), FileOptions())
        assert alone.read_bytes() == made[name]
    assert [row["status"] for row in rows] == ["ok"] * 5


def test_a_summary_has_a_row_a_case(tmp_path, cases):
    thin(cases, tmp_path / "out", model="inverse")
    rows = summary(tmp_path / "out")
    assert [row["case"] for row in rows] == sorted(NAMES)
    first = rows[0]
    assert (first["status"], first["code"], first["slices_in"], first["slices_out"]) == ("ok", "0", "7", "14")
    assert (float(first["input_spacing_mm"]), float(first["output_spacing_mm"])) == (2.0, 1.0)
    assert float(first["residual_max_hu"]) <= 0.75
    assert float(first["seconds"]) >= 0


def test_shares_together_are_the_whole(tmp_path, cases):
    thin(cases, tmp_path / "whole")
    for i in (2, 3, 1):
        thin(cases, tmp_path / "shares", shard=f"{i}/3")
    assert images(tmp_path / "shares") == images(tmp_path / "whole")
    rows = [row for i in (1, 2, 3) for row in summary(tmp_path / "shares", f"summary-{i}-of-3.csv")]
    assert sorted(row["case"] for row in rows) == sorted(NAMES)


def test_one_bad_case_does_not_stop_the_rest(tmp_path, cases):
    thin(cases, tmp_path / "good")
    (cases / "deep" / "c.nii.gz").write_bytes(b"no volume")
    (cases / "deep" / "flat.nii").write_bytes(nifti(ct((9, 8, 1))))
    told: list[str] = []
    rows = thin(cases, tmp_path / "out", report=Report(warn=told.append))
    status = {row["case"]: row["status"] for row in rows}
    assert [n for n, s in status.items() if s == "failed"] == ["deep/c.nii.gz", "deep/flat.nii"]
    expected = images(tmp_path / "good")
    del expected["deep/c.nii.gz"]
    assert images(tmp_path / "out") == expected
    bad = next(row for row in summary(tmp_path / "out") if row["case"] == "deep/flat.nii")
    assert (bad["status"], bad["code"]) == ("failed", "3")
    assert "1 slice" in bad["reason"]
    assert any("flat.nii" in line for line in told)
    with pytest.raises(SomeCasesFailed, match="2 of 6 cases failed") as caught:
        raise_for_failures(rows, path=cases)
    assert caught.value.report == {"cases": rows}


def test_a_second_run_finishes_the_first_and_touches_nothing_else(tmp_path, cases):
    out = tmp_path / "out"
    thin(cases, out)
    whole = images(out)
    (out / "deep/c.nii.gz").unlink()
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.nii*")}
    rows = thin(cases, out, skip_existing=True)
    assert images(out) == whole
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    assert sorted(row["status"] for row in rows) == ["ok"] + ["skipped"] * 4
    assert all(row["slices_out"] == 14 for row in rows)  # a skipped case has its numbers from its record
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    thin(cases, out, skip_existing=True)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == stamps


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s, t: (s, {"factor": 3.0}), "made with factor 2.0, asked for is 3.0"),
        (lambda s, t: (s, {"model": "linear"}), "made with model cubic, asked for is linear"),
        (lambda s, t: (s, {"thickness": 3.0}), "thickness_mm None, asked for is 3.0"),
        (lambda s, t: (s, {"dtype": "fp32"}), "made with dtype auto, asked for is fp32"),
        (lambda s, t: (put(s.parent, nifti(ct(seed=9)), s.name), {}), "input_sha256"),
        (lambda s, t: (t.write_bytes(t.read_bytes() + b"x") and s, {}), "not what its record"),
        (lambda s, t: (t.with_suffix(".json").unlink() or s, {}), "without a record"),
    ],
)
def test_what_was_made_otherwise_is_not_skipped(tmp_path, change, words):
    source, target = put(tmp_path, nifti()), tmp_path / "out.nii"
    upsample_files(source, target, Thinner(model="cubic"), FileOptions())
    source, options = change(source, target)
    before = tree(tmp_path)
    thinner = Thinner(**({"model": "cubic"} | options))
    with pytest.raises(UsageError, match=words):
        upsample_files(source, target, thinner, FileOptions(skip_existing=True))
    assert tree(tmp_path) == before


def test_outputs_in_the_way_are_found_before_any_work(tmp_path, cases):
    (tmp_path / "out/deep").mkdir(parents=True)
    (tmp_path / "out/deep/c.nii.gz").write_bytes(b"old")
    with pytest.raises(UsageError, match=r"c\.nii\.gz: exists"):
        thin(cases, tmp_path / "out")
    assert tree(tmp_path / "out") == {"deep/c.nii.gz": b"old"}


def test_refused_weights_leave_no_folder(tmp_path, cases):
    (tmp_path / "w.safetensors").write_bytes(b"<html>")
    with pytest.raises(WeightsError, match="web page"):
        thin(cases, tmp_path / "out", model="baseline", weights=str(tmp_path / "w.safetensors"))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_a_folder_writes_nothing(tmp_path, cases):
    rows = thin(cases, tmp_path / "out", is_dry_run=True)
    assert not (tmp_path / "out").exists()
    assert {row["status"] for row in rows} == {"planned"}


def test_folders_that_can_not_be_are_refused(tmp_path, cases):
    (tmp_path / "file").write_text("")
    for target, words in [
        (tmp_path / "file", "names a file"),
        (cases, "inside the input folder"),
        (cases / "deep" / "out", "inside the input folder"),
        (tmp_path / "out.nii.gz", "names a file"),
    ]:
        with pytest.raises(UsageError, match=words):
            find_cases(cases, target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no files"):
        find_cases(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UsageError, match="one file"):
        thin(cases, tmp_path / "out", preview=tmp_path / "p.png")


@pytest.mark.parametrize("twin", ["a.nii", "A.nii.gz"])
def test_two_inputs_that_share_an_output_are_refused(tmp_path, cases, twin):
    shutil.copy(cases / "a.nii.gz", cases / twin)
    with pytest.raises(UsageError, match="would share one output") as caught:
        find_cases(cases, tmp_path / "out")
    assert "a.nii.gz" in caught.value.reason
    assert twin in caught.value.reason


CASES = [Case(str(i), Path(f"{i}.nii"), Path(f"out/{i}.nii")) for i in range(10)]


def test_shares_part_the_cases():
    for count in (1, 2, 3, 7, 12):
        shares = [take_shard(CASES, f"{i}/{count}") for i in range(1, count + 1)]
        assert sorted((c for share in shares for c in share), key=lambda c: int(c.name)) == CASES
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert take_shard(CASES, None) == CASES


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1/0", "-1/3", "1", "1/", "/3", "a/b", "1/3/5", "¹/3", ""])
def test_a_share_that_is_none_is_refused(shard):
    with pytest.raises(UsageError, match="--shard"):
        take_shard(CASES, shard)


def slurm(task, first, last, count):
    told = {"ID": task, "MIN": first, "MAX": last, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{key}": str(value) for key, value in told.items()}


@pytest.mark.parametrize(
    ("environ", "share"),
    [
        (slurm(0, 0, 2, 3), "1-of-3"),
        (slurm(3, 1, 3, 3), "3-of-3"),
        ({"JOB_COMPLETION_INDEX": "1", "JOB_COMPLETIONS": "4"}, "2-of-4"),
        ({"RANK": "3", "WORLD_SIZE": "4"}, "4-of-4"),
        (slurm(7, 7, 7, 1), None),  # a task that was handed in again alone
        (slurm(5, 1, 9, 3), None),  # an array with holes
        (slurm("x", 1, 9, 9), None),
        ({"JOB_COMPLETION_INDEX": "1"}, None),
        ({"RANK": "4", "WORLD_SIZE": "4"}, None),
        ({}, None),
    ],
)
def test_a_scheduler_tells_the_share_or_is_refused(monkeypatch, environ, share):
    for name in ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX", "RANK", "WORLD_SIZE", "JOB_COMPLETIONS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    if share is None:
        with pytest.raises(UsageError, match="--shard env"):
            take_shard(CASES, "env")
    else:
        assert shard_name("env") == share
        assert take_shard(CASES, "env") == take_shard(CASES, share.replace("-of-", "/"))


def raising(error):
    def work(case):
        if case.name == "3":
            raise error
        return {}

    return work


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("damaged"), 3),
        (ResourceError("too large"), 4),
        (MemoryError(), 4),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 4),
        (KeyError("w"), 1),
    ],
)
def test_a_case_fails_alone(error, code):
    told = []
    rows = run_cases(CASES, raising(error), failed=lambda case, exc: told.append(case.name))
    assert [row["code"] for row in rows] == [0] * 3 + [code] + [0] * 6
    assert told == ["3"]


def full_disk():
    try:
        raise ResourceError("cannot be written: no space left on device") from OSError(28, "No space")
    except ResourceError as exc:
        return exc


@pytest.mark.parametrize("error", [UsageError("x"), WeightsError("x"), full_disk(), KeyboardInterrupt()])
def test_what_would_fail_every_case_stops_the_run(error):
    with pytest.raises(type(error)):
        run_cases(CASES, raising(error), failed=lambda case, exc: None)


def test_a_folder_that_can_not_be_made_stops_the_run(tmp_path, cases, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "deep").write_text("a file in the way")
    with pytest.raises(UsageError, match="is a file, a folder is asked for"):
        thin(cases, tmp_path / "out")

    def mkdir(path, mode=0o777):
        raise OSError(errno.EROFS, "Read-only file system", path)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(ResourceError, match="read-only file system"):
        thin(cases, tmp_path / "other")


def test_a_record_lies_beside_every_output(tmp_path, cases):
    thin(cases, tmp_path / "out")
    for name in NAMES:
        stem = name.removesuffix(".gz").removesuffix(".nii")
        record = json.loads((tmp_path / "out" / f"{stem}.json").read_text())
        assert record["output_size_bytes"] == (tmp_path / "out" / name).stat().st_size


def test_a_poisoned_neighbour_changes_no_byte(tmp_path, cases):
    thin(cases, tmp_path / "before")
    poison = np.full((9, 8, 7), np.nan, np.float32)
    put(cases, nifti(poison), "aa.nii")
    thin(cases, tmp_path / "after")
    assert images(tmp_path / "after") == images(tmp_path / "before")
