"""Time and memory of the whole command, as ratios against a peer in the same run.

    python tests/benchmarks/speed.py [--repeats 3]

Needs nothing but ctsr, SciPy and SimpleITK: the input is a synthetic thorax of 512 × 512 × 133. Files lie
on tmpfs where the machine has one. Writes the section `speed` of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import ROOT, markdown, provenance, section

from ctsr.core.volume import Volume
from ctsr.io.nifti import write_volume

SHAPE = (133, 512, 512)  # thick slices, rows, columns


def thick_input(path: Path, slices: int = SHAPE[0]) -> np.ndarray:
    """An int16 thorax phantom on disk; returns its voxels, (I, J, K)."""
    from ctsr.physics.phantom import phantom

    block = phantom(1, shape=(64, 512, 512), spacing=(2.5, 0.7, 0.7)).hu
    hu = np.rint(block[0] if isinstance(block, tuple) else block).astype(np.int16)
    hu = np.concatenate([hu, hu[::-1]] * (slices // 128 + 1))[:slices]
    data = np.asfortranarray(hu.transpose(2, 1, 0))
    affine = np.diag([-0.7, -0.7, 2.5, 1.0])
    write_volume(Volume(data, affine, slice_thickness=2.5), path, overwrite=True)
    return data


def timed(work: Callable[[], object], repeats: int) -> float:
    """Median of `repeats`, seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def command(*arguments: str) -> tuple[float, float]:
    """Seconds and peak resident bytes of one run of the installed command."""
    script = (
        "import resource,subprocess,sys,time\n"
        "t=time.perf_counter(); subprocess.run(sys.argv[1:],check=True,stdout=subprocess.DEVNULL)\n"
        "print(time.perf_counter()-t, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss*1024)"
    )
    ctsr = str(Path(sys.executable).with_name("ctsr"))
    done = subprocess.run(
        [sys.executable, "-c", script, ctsr, *arguments], check=True, capture_output=True, text=True
    )
    seconds, peak = map(float, done.stdout.split())
    return seconds, peak


def bare_forward(data: np.ndarray, repeats: int) -> float:
    """The network over the same voxels with nothing around it, in chunks of 16 whole slices, no halo."""
    import torch

    from ctsr.weights.registry import load_model

    network, _ = load_model("baseline", kind="baseline")
    network = network.to(memory_format=torch.channels_last_3d)
    y = torch.from_numpy(np.ascontiguousarray(data.transpose(2, 1, 0), np.float32))[None, None]
    inverse = y.repeat_interleave(2, dim=2)
    rho = torch.ones(1)

    def work() -> None:
        with torch.inference_mode():
            for a in range(0, y.shape[2], 16):
                network(y[:, :, a : a + 16], inverse[:, :, 2 * a : 2 * a + 32], rho)

    return timed(work, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="also 512 × 512 × 1000 under --max-memory 2G")
    asked = parser.parse_args()
    import SimpleITK as sitk
    from scipy.ndimage import zoom

    from ctsr.cli.machine import keep_freed_memory
    from ctsr.core.zgrid import ZGrid
    from ctsr.physics.operator import apply_along_z
    from ctsr.physics.zmatrix import interpolation_matrix

    keep_freed_memory()  # as the command does
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        source, target = Path(temporary, "thick.nii.gz"), Path(temporary, "thin.nii.gz")
        data = thick_input(source)
        spline = timed(lambda: zoom(data.astype(np.float32), (1, 1, 2), order=3), 1)
        runs = [
            command("upsample", str(source), str(target), "--overwrite", "-q") for _ in range(asked.repeats)
        ]
        spline = (spline + timed(lambda: zoom(data.astype(np.float32), (1, 1, 2), order=3), 1)) / 2
        whole, peak = statistics.median(r[0] for r in runs), max(r[1] for r in runs)
        record = json.loads(target.with_name("thin.json").read_text())
        bare = bare_forward(data, asked.repeats)
        turned = np.ascontiguousarray(data.transpose(2, 1, 0))
        matrix = timed(
            lambda: apply_along_z(interpolation_matrix("cubic", ZGrid(SHAPE[0], 2)), turned), asked.repeats
        )

        image = sitk.GetImageFromArray(turned.astype(np.float32))
        image.SetSpacing((0.7, 0.7, 2.5))
        grid = sitk.Image(512, 512, 266, sitk.sitkFloat32)
        grid.SetSpacing((0.7, 0.7, 1.25))
        grid.SetOrigin((0, 0, -0.625))
        itk = timed(lambda: sitk.Resample(image, grid, sitk.Transform(), sitk.sitkBSpline), asked.repeats)
        itk_threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()

        voxels = int(np.prod(SHAPE))
        allowed = 4 * voxels * 3 + 1.2e9
        rows = [
            row("whole command / SciPy spline in memory", whole, spline, 0.35),
            row("computation / bare forward pass", record["seconds_compute"], bare, 1.3),
            row(f"cubic as a matrix / SimpleITK B-spline ({itk_threads} threads)", matrix, itk, 0.1),
            {
                "what": "peak memory, GB / input + output as float32 + 1.2 GB",
                "ours": peak / 1e9,
                "peer": allowed / 1e9,
            }
            | {"ratio": peak / allowed, "figure": 1.0, "met": verdict(peak <= allowed)},
        ]
        if asked.large:
            thick_input(source, 1000)
            _, peak = command("upsample", str(source), str(target), "--overwrite", "-q", "--max-memory", "2G")
            rows.append(
                {
                    "what": "peak memory, GB, 512 × 512 × 1000 / --max-memory 2G",
                    "ours": peak / 1e9,
                    "peer": 2**31 / 1e9,
                }
                | {"ratio": peak / 2**31, "figure": 1.0, "met": verdict(peak <= 2**31)}
            )
    arguments = " --large" if asked.large else ""
    said = provenance(f"python tests/benchmarks/speed.py{arguments}")
    text = f"Seconds (median of {asked.repeats}) unless a row says GB. {said}\n\n{markdown(rows)}"
    section(ROOT / "docs" / "benchmarks.md", "speed", text)
    print(text)


def row(what: str, ours: float, peer: float, figure: float) -> dict:
    return {
        "what": what,
        "ours": ours,
        "peer": peer,
        "ratio": ours / peer,
        "figure": figure,
        "met": verdict(ours / peer <= figure),
    }


def verdict(is_met: bool) -> str:
    return "yes" if is_met else "**missed**"


if __name__ == "__main__":
    main()
