"""The main job in a process of its own: memory as promised, bytes as promised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ctsr.io.nifti import write_slabs
from tests.infer.tiny import checkpoint
from tests.io.make import affine_of, nifti, put
from tests.workflows.test_upsample_diffusion import make_project

MEASURED = """
import atexit, sys

def tell(path):
    lines = open("/proc/self/status").read().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    open(path, "w").write(str(kib * 1024))

atexit.register(tell, sys.argv[1])
sys.argv = ["ctsr", *sys.argv[2:]]
from ctsr.cli.main import main
main()
"""


def run(folder: Path, *arguments: object, threads: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ctsr", "upsample", *map(str, arguments)],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, text=True, capture_output=True, timeout=900,
    )  # fmt: skip


def peak(folder: Path, *arguments: object, threads: int = 1) -> tuple[float, float]:
    """Bytes that the plan says and that the process held at most."""
    planned = run(folder, *arguments, "--dry-run", "--json", threads=threads)
    assert planned.returncode == 0, planned.stderr
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, "hwm", "upsample", *map(str, arguments)],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, text=True, capture_output=True, timeout=900,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return json.loads(planned.stdout)["peak_gb"] * 1e9, float((folder / "hwm").read_text())


def stack(path: Path, side: int, n: int) -> Path:
    """An uncompressed file of noise in a body, written slice by slice."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    body = np.where(x**2 + y**2 < 0.8, 40, -1000) + rng.normal(0, 30, (side, side))
    with write_slabs(path, (side, side, n), np.dtype(np.int16), affine_of((0.7, 0.7, 2.5))) as writer:
        for k in range(n):
            writer.write(np.roll(body, 17 * k, axis=0).astype(np.int16))
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
@pytest.mark.parametrize("model", ["baseline", "inverse", "diffusion"])
def test_the_memory_stays_below_the_plan(tmp_path, model):
    stack(tmp_path / "in.nii", 64, 60)
    network = ["--checkpoint", checkpoint(tmp_path)] if model == "baseline" else []
    if model == "diffusion":
        make_project(tmp_path)
        network = ["--project", ".", "--num-steps", "1", "--max-memory", "600M"]
    plan, held = peak(tmp_path, "in.nii", "out.nii", "--model", model, *network)
    assert held <= plan


@pytest.mark.ci
@pytest.mark.parametrize(
    ("side", "n", "told"),
    [
        (256, 60, []),
        (512, 60, ["--factor", "3"]),
        (512, 133, []),
        (512, 133, ["--dtype", "fp32"]),
        (512, 200, ["--model", "inverse"]),
        (512, 200, ["--model", "cubic", "--max-memory", "500M"]),
    ],
    ids=str,
)
def test_the_memory_is_the_plan_s(tmp_path, side, n, told):
    stack(tmp_path / "in.nii", side, n)
    plan, held = peak(tmp_path, "in.nii", "out.nii", *told, threads=2)
    assert 0.8 * plan - 5e7 <= held <= plan
    if (n, told) == (133, []):
        assert held <= 3 * 133 * side * side * 4 + 1.2e9


def test_two_processes_make_the_same_bytes(tmp_path):
    put(tmp_path, nifti(), "in.nii")
    weights = checkpoint(tmp_path)
    for name in ("a", "b"):
        assert run(tmp_path, "in.nii", f"{name}.nii.gz", "--checkpoint", weights, "--seed", 3).returncode == 0
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert nib.load(tmp_path / "a.nii.gz").shape == (9, 8, 14)
    assert json.loads((tmp_path / "a.json").read_text())["threads"] == 1
