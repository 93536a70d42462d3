"""Thin files in, thick files with their records out; and projects of synthetic scans."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ctsr.core.volume import Volume
from ctsr.core.zgrid import ZGrid
from ctsr.data.splits import SETS, list_path
from ctsr.data.volumes import load_volumes
from ctsr.errors import GeometryError, InputError, UsageError
from ctsr.io.lists import read_file_list, read_table
from ctsr.io.nifti import read_volume, write_volume
from ctsr.io.provenance import sha256_of
from ctsr.physics.profile import SliceProfile
from ctsr.physics.simulation import simulate_volume
from ctsr.workflows.folder import Report
from ctsr.workflows.requests import Simulation
from ctsr.workflows.simulate import phantoms, simulate

TINY = {"shape": (6, 32, 40), "spacing": (5.0, 9.0, 9.0)}


def thin_scan(path: Path, seed: int = 0, slices: int = 13) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(seed).integers(-1000, 1000, (8, 7, slices)).astype(np.int16)
    affine = np.diag([-0.7, -0.7, 1.0, 1.0])
    affine[:3, 3] = [100, 120, -300]
    write_volume(Volume(data, affine, slice_axis=2), path)
    return path


def test_a_file_gives_a_file_and_its_record(tmp_path):
    source, target = thin_scan(tmp_path / "thin.nii.gz"), tmp_path / "thick.nii.gz"
    asked = Simulation(spacing=3.0, thickness=4.0, profile="triangle")
    notes: list[str] = []
    (row,) = simulate(source, target, asked, report=Report(note=notes.append))
    thin, thick = read_volume(source), read_volume(target)
    expected, _ = simulate_volume(thin, spacing=3.0, thickness=4.0, profile=SliceProfile("triangle"))
    np.testing.assert_array_equal(thick.data, expected.data)
    np.testing.assert_allclose(ZGrid(4, 3.0).affine(thick.affine, 2), thin.affine, atol=1e-4)  # mm
    assert thick.slice_thickness == 4.0
    assert (row["slices_in"], row["slices_out"]) == (13, 4)
    assert notes == [f"{source}: 1 of 13 thin slices dropped: they fill no whole thick slice"]
    record = json.loads((tmp_path / "thick.json").read_text())
    assert record["SliceThickness"] == 4.0
    assert record["SpacingBetweenSlices"] == 3.0
    assert record["profile"] == "triangle"
    assert record["input_sha256"] == sha256_of(source)
    assert record["output_sha256"] == sha256_of(target)
    assert "research use only" in record["notice"]


@pytest.mark.parametrize(
    ("asked", "spacing", "thickness"),
    [
        ({}, 2, 2),
        ({"thickness": 5.0}, 5, 5),
        ({"factor": 3.0}, 3, 3),
        ({"factor": 2.0, "thickness": 4.0}, 2, 4),
        ({"spacing": 4.0, "thickness": 2.0}, 4, 2),
    ],
)
def test_what_is_not_said_follows_from_what_is(tmp_path, asked, spacing, thickness):
    (row,) = simulate(thin_scan(tmp_path / "a.nii.gz"), tmp_path / "b.nii.gz", Simulation(**asked))
    assert (row["spacing_mm"], row["thickness_mm"]) == (spacing, thickness)


def test_a_folder_gives_the_same_tree_and_the_pairs(tmp_path):
    thin_scan(tmp_path / "in" / "a.nii.gz", 1)
    thin_scan(tmp_path / "in" / "deep" / "b.nii", 2)
    asked = Simulation(factor=2.0, thickness=3.0, noise=10.0, seed=5)
    rows = simulate(tmp_path / "in", tmp_path / "out", asked)
    assert [row["case"] for row in rows] == ["a.nii.gz", "deep/b.nii"]
    pairs = read_table(tmp_path / "out" / "pairs.csv")
    assert list(pairs[0]) == [
        "thin",
        "thick",
        "factor",
        "spacing_mm",
        "thickness_mm",
        "profile",
        "noise_hu",
        "seed",
    ]
    assert [pair["thick"] for pair in pairs] == ["a.nii.gz", "deep/b.nii"]
    for pair in pairs:
        assert (tmp_path / "out" / pair["thin"]).resolve().is_file()
        assert read_volume(tmp_path / "out" / pair["thick"]).slice_thickness == 3.0
    assert (pairs[0]["factor"], pairs[0]["noise_hu"], pairs[0]["seed"]) == ("2.0", "10.0", "5")
    simulate(tmp_path / "in" / "a.nii.gz", tmp_path / "alone.nii.gz", asked)
    assert (tmp_path / "alone.nii.gz").read_bytes() == (tmp_path / "out" / "a.nii.gz").read_bytes()


def test_every_scan_has_a_noise_of_its_own(tmp_path):
    noise = []
    for seed in (1, 2):
        source = thin_scan(tmp_path / f"{seed}.nii.gz", seed)
        for sd in (0.0, 50.0):
            simulate(source, tmp_path / f"{seed}-{sd:g}.nii.gz", Simulation(noise=sd))
        noise.append(
            read_volume(tmp_path / f"{seed}-50.nii.gz").data - read_volume(tmp_path / f"{seed}-0.nii.gz").data
        )
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.3


def test_one_bad_case_does_not_stop_the_rest(tmp_path):
    thin_scan(tmp_path / "in" / "a.nii.gz")
    (tmp_path / "in" / "b.nii.gz").write_bytes(b"no image")
    thin_scan(tmp_path / "in" / "c.nii.gz", slices=1)
    thin_scan(tmp_path / "in" / "d.nii.gz")
    told: list[str] = []
    rows = simulate(tmp_path / "in", tmp_path / "out", Simulation(), report=Report(warn=told.append))
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "ok"]
    assert [row["code"] for row in rows] == [0, 3, 3, 0]
    assert [pair["thick"] for pair in read_table(tmp_path / "out" / "pairs.csv")] == ["a.nii.gz", "d.nii.gz"]
    assert len(told) == 2
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == ["a.nii.gz", "d.nii.gz"]


def test_outputs_that_exist_are_refused_before_any_work(tmp_path):
    thin_scan(tmp_path / "in" / "a.nii.gz")
    thin_scan(tmp_path / "in" / "b.nii.gz")
    thin_scan(tmp_path / "out" / "b.nii.gz")
    with pytest.raises(UsageError, match="exists already"):
        simulate(tmp_path / "in", tmp_path / "out", Simulation())
    assert not (tmp_path / "out" / "a.nii.gz").exists()
    simulate(tmp_path / "in", tmp_path / "out", Simulation(overwrite=True))
    assert read_volume(tmp_path / "out" / "b.nii.gz").shape[2] == 6


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (Simulation(factor=1.0), UsageError),
        (Simulation(thickness=40.0, factor=2.0), GeometryError),
        (Simulation(factor=19.0), GeometryError),
    ],
)
def test_a_refusal_names_the_file_and_leaves_nothing(tmp_path, asked, error):
    source = thin_scan(tmp_path / "a.nii.gz")
    with pytest.raises(error) as caught:
        simulate(source, tmp_path / "b.nii.gz", asked)
    assert caught.value.path == str(source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz"]


def test_a_missing_input_is_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        simulate(tmp_path / "no.nii.gz", tmp_path / "b.nii.gz", Simulation())


def test_phantoms_make_a_project_that_training_reads(tmp_path):
    rows = phantoms(4, tmp_path, seed=2, **TINY)
    data = tmp_path / "data"
    assert [row["file"] for row in rows] == [f"phantom-{i:04d}.nii.gz" for i in (1, 2, 3, 4)]
    assert read_table(data / "manifest.csv", columns=["file", "patient", "set"])[0]["file"] == rows[0]["file"]
    listed = {name: read_file_list(list_path(data, name)) for name in (*SETS, "all")}
    assert [len(listed[name]) for name in (*SETS, "all")] == [2, 1, 1, 4]
    volumes = load_volumes(list_path(data, "all"), data, z_truth_max=5.0)
    assert volumes[0].hu.shape == TINY["shape"]
    assert volumes[0].spacing == TINY["spacing"]
    assert volumes[0].slice_thickness == 5.0
    assert len({v.hu.tobytes() for v in volumes}) == 4
    record = json.loads((data / "phantom-0001.json").read_text())
    assert record["SliceThickness"] == 5.0
    assert isinstance(record["nodules"], list)


def test_a_nodule_lies_at_the_index_in_the_record(tmp_path):
    phantoms(1, tmp_path, seed=1, shape=(32, 110, 150), spacing=(2.0, 1.25, 1.25))
    scan = read_volume(tmp_path / "data" / "phantom-0001.nii.gz")
    nodules = json.loads((tmp_path / "data" / "phantom-0001.json").read_text())["nodules"]
    large = [n for n in nodules if n["diameter_mm"] >= 8]
    assert large
    for nodule in large:
        i, j, k = (round(c) for c in nodule["index"])
        around = scan.data[i - 1 : i + 2, j - 1 : j + 2, k]
        assert abs(around.mean() - nodule["hu"]) < 40  # HU; nine voxels of noise


def test_the_same_seed_gives_the_same_project(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        phantoms(1, tmp_path / name, seed=seed, **TINY)
    a, b, c = ((tmp_path / n / "data" / "phantom-0001.nii.gz").read_bytes() for n in "abc")
    assert a == b
    assert a != c


def test_phantoms_replace_nothing_unasked_and_keep_what_stands_in_the_lists(tmp_path):
    first = phantoms(3, tmp_path, **TINY)
    with pytest.raises(UsageError, match="exists already"):
        phantoms(3, tmp_path, **TINY)
    thin_scan(tmp_path / "data" / "own.nii.gz")
    with list_path(tmp_path / "data", "test").open("a") as file:
        file.write("own.nii.gz\n")
    second = phantoms(5, tmp_path, overwrite=True, **TINY)
    sets = {row["file"]: row["set"] for row in second}
    assert all(sets[row["file"]] == row["set"] for row in first)
    assert tmp_path / "data" / "own.nii.gz" in read_file_list(list_path(tmp_path / "data", "test"))


def test_few_phantoms_say_that_training_needs_more(tmp_path):
    notes: list[str] = []
    phantoms(2, tmp_path, report=Report(note=notes.append), **TINY)
    assert "fewer than 3 patients" in notes[0]
    with pytest.raises(UsageError, match="--phantoms"):
        phantoms(0, tmp_path)
