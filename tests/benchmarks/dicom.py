"""DICOM CT to NIfTI: how often right, refused or silently wrong, and how fast, beside three peers.

    pip install dcm2niix dicom2nifti
    python tests/benchmarks/dicom.py quality|speed [--write] [--repeats 5]

quality: the synthetic series of tests/io/dicom/cases.py, every voxel held against an analytic answer. A peer that
is absent is left out.
speed: 300 × 512 × 512 beside dcm2niix, which must be there; on tmpfs where the machine has one.
With --write the section `dicom` or `dicom-speed` of docs/benchmarks.md is replaced.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from machine import ROOT, markdown, provenance, section
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLosslessSV1

sys.path.insert(0, str(ROOT))
from tests.io.dicom.cases import CASES
from tests.io.dicom.make import Case, classic, judge, planes, save, write_case

PAGE = ROOT / "docs" / "benchmarks.md"
FASTEST = "/dev/shm" if os.path.isdir("/dev/shm") else None
SCRIPTS = Path(sys.executable).parent
PATIENCE = 60.0  # s for one series of at most 200 small images
LENIENT = 1.51  # HU: integers in, one resampling, truncated instead of rounded; a pixel is more than 2 HU
N_SLICES = 300
VERDICTS = ("right", "refused", "wrong with a warning", "silently wrong")


# What a user of each tool types, from a folder of files to NIfTI files in another folder.


def by_ctsr(source: Path, target: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "ctsr", "convert", source, target], check=False)
    assert done.returncode in (0, 3, 7), "neither done nor refused"


def by_dcm2niix(source: Path, target: Path) -> None:
    subprocess.run([SCRIPTS / "dcm2niix", "-z", "n", "-o", target, source], check=True)


def by_simpleitk(source: Path, target: Path) -> None:
    import SimpleITK as sitk

    find = sitk.ImageSeriesReader
    folders = [source, *(path for path in source.rglob("*") if path.is_dir())]
    for n, uid in enumerate(dict.fromkeys(uid for f in folders for uid in find.GetGDCMSeriesIDs(str(f)))):
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(find.GetGDCMSeriesFileNames(str(source), uid, False, True))
        sitk.WriteImage(reader.Execute(), str(target / f"{n}.nii"))


def by_dicom2nifti(source: Path, target: Path) -> None:
    import dicom2nifti

    dicom2nifti.convert_directory(str(source), str(target), compression=False, reorient=False)


TOOLS: dict[str, Callable[[Path, Path], None]] = {
    "ctsr": by_ctsr,
    "dcm2niix": by_dcm2niix,
    "SimpleITK": by_simpleitk,
    "dicom2nifti": by_dicom2nifti,
}


def present() -> list[str]:
    """The tools that are installed."""
    return [name for name in TOOLS if importlib.util.find_spec(name) is not None]


def versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in (*present(), "pydicom"))


def apart(work: Callable[[], None], log: Path) -> int | None:
    """Run in a process of its own, as a crash or a hang of a tool must not end the comparison; its exit code."""

    def child() -> None:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        work()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def volumes(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every grey volume that a tool wrote, as a reader of NIfTI sees it; a 4-D file is several.

    Where dcm2niix corrects a volume it leaves the raw one beside it: the correction is what counts. A file of
    one or two slices beside a volume is a picture (a localizer, a dose screen), and does no harm.
    """
    import nibabel as nib

    paths = [path for path in folder.rglob("*") if path.name.endswith((".nii", ".nii.gz"))]
    names = {path.name.split(".nii")[0] for path in paths}
    raw = {name for name in names if any(re.match(re.escape(name) + "_(Tilt|Eq)", n) for n in names)}
    images = [nib.load(path) for path in paths if path.name.split(".nii")[0] not in raw]
    largest = max((image.shape[2] for image in images if len(image.shape) > 2), default=0)
    for image in images:
        is_colour = image.get_data_dtype().names or len(image.shape) > 4
        if is_colour or len(image.shape) < 3 or image.shape[2] < 3 <= largest:
            continue
        data = image.get_fdata(dtype=np.float32)
        for one in np.moveaxis(data, 3, 0) if data.ndim == 4 else [data]:
            yield one, image.affine


def verdict(tool: str, case: Case, source: Path, folder: Path) -> tuple[str, str]:
    """One of VERDICTS, and what was wrong."""
    folder.mkdir()
    log = folder.with_suffix(".log")
    code = apart(lambda: TOOLS[tool](source, folder), log)
    said = log.read_text("utf-8", "replace")
    if tool == "ctsr" and code:
        raise RuntimeError(f"not a verdict but a fault of ours:\n{said}")
    found = list(volumes(folder))
    if not found:
        return "refused", said.strip().split("\n")[-1]
    wrong = judge(found, case.parts, max(case.tolerance, LENIENT))
    if not wrong:
        return "right", ""
    return ("wrong with a warning" if re.search("warn|error", said, re.I) else "silently wrong"), wrong


def quality() -> dict[str, str]:
    """The table and the lists, by section."""
    import SimpleITK  # noqa: F401  (loaded once: the processes are forks)

    rows = []
    with tempfile.TemporaryDirectory(dir=FASTEST) as temporary:
        for n, (name, case) in enumerate(CASES.items()):
            source = write_case(case, Path(temporary, str(n)))
            row = {"series": name, "asked": "right" if case.expect == "right" else "refused"}
            for tool in present():
                row[tool], text = verdict(tool, case, source, Path(temporary, f"{n}-{tool}"))
                print(f"{name}: {tool}: {row[tool]} {text[:150]}", flush=True)
            rows.append(row)
    asked = {"tool": "asked for"} | {v: sum(row["asked"] == v for row in rows) for v in VERDICTS}
    counts = [
        {"tool": tool} | {v: sum(row[tool] == v for row in rows) for v in VERDICTS} for tool in present()
    ]
    lists = [
        f"- {tool}, {v}: {'; '.join(names)}."
        for tool in present()
        for v in VERDICTS[2:]
        if (names := [row["series"] for row in rows if row[tool] == v])
    ]
    head = (
        f"{len(rows)} series. {versions()}. {provenance('python tests/benchmarks/dicom.py quality --write')}"
    )
    return {"dicom": "\n\n".join([head, markdown([asked, *counts]), "\n".join(lists)])}


# Speed: the same files, tools in turn, so that what else runs on the machine meets them alike.


def slices(folder: Path, syntax: str) -> Path:
    """300 slices of a noisy thorax phantom, 512 × 512, int16."""
    from ctsr.physics.phantom import phantom

    block = phantom(1, shape=(64, 512, 512), spacing=(1.0, 0.7, 0.7)).hu
    noise = np.random.default_rng(0).normal(0, 20, block.shape)
    hu = np.rint(np.clip(block + noise, -1024, 3000)).astype(np.int16)
    folder.mkdir()
    stack = planes(N_SLICES, 1.0, shape=(512, 512), spacing=(0.7, 0.7))
    turn = np.abs((np.arange(N_SLICES) + 63) % 126 - 63)  # up and down the phantom
    for k, plane in enumerate(stack):
        data = classic(replace(plane, shape=(16, 16)), k, "1")
        data.Rows = data.Columns = 512
        data.PixelData = (hu[turn[k]] + 1024).tobytes()
        save(data, folder / f"{k:03d}.dcm", syntax)
    return folder


def seconds(command: list[object]) -> float:
    start = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def whole(source: Path, target: Path) -> float:
    """The command as a user starts it."""
    return seconds([sys.executable, "-m", "ctsr", "convert", source, target, "--overwrite", "-q"])


def bare(source: Path, target: Path) -> float:
    """Scan, read and write in a process of its own, without its start and its imports."""
    script = (
        "import os, sys, time; from pathlib import Path; import nibabel, pydicom, SimpleITK\n"
        "from ctsr.cli.machine import keep_freed_memory; keep_freed_memory()\n"
        "from ctsr.io.dicom.read import read_stack; from ctsr.io.dicom.scan import scan\n"
        "from ctsr.io.nifti import write_volume\n"
        "start = time.perf_counter()\n"
        "volume = read_stack(scan(Path(sys.argv[1])).stacks[0], workers=len(os.sched_getaffinity(0))).volume\n"
        "write_volume(volume, sys.argv[2], overwrite=True); print(time.perf_counter() - start)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, source, target], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def peer(source: Path, target: Path) -> float:
    """dcm2niix's own program, not its Python wrapper."""
    import dcm2niix

    packing = ["i", "-1"] if target.name.endswith(".gz") else ["n"]
    return seconds([dcm2niix.bin, "-z", *packing, "-w", "1", "-f", "peer", "-o", target.parent, source])


def flushed(path: Path) -> float:
    """Seconds until a copy of the file has reached the disk of the temporary folder."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(path.read_bytes())
        file.flush()
        start = time.perf_counter()
        os.fsync(file.fileno())
        return time.perf_counter() - start


def speed(repeats: int) -> dict[str, str]:
    """The table, by section: medians of the seconds, and of the ratios of neighbouring runs."""
    rows = []
    with tempfile.TemporaryDirectory(dir=FASTEST) as temporary:
        folder = Path(temporary)
        for name, syntax, ending, ours, figure in (
            ("uncompressed → .nii, reading and writing", ExplicitVRLittleEndian, ".nii", bare, 0.9),
            ("uncompressed → .nii, whole command", ExplicitVRLittleEndian, ".nii", whole, 2.0),
            ("uncompressed → .nii.gz, whole command", ExplicitVRLittleEndian, ".nii.gz", whole, 0.7),
            ("JPEG 2000 lossless → .nii, whole command", JPEG2000Lossless, ".nii", whole, 1.0),
            ("JPEG lossless → .nii, whole command", JPEGLosslessSV1, ".nii", whole, 1.0),
        ):
            source = folder / syntax
            if not source.exists():
                slices(source, syntax)
            (folder / "out").mkdir()
            target = folder / "out" / f"ours{ending}"
            ours(source, target)  # everything is in memory from here on
            pairs = [(ours(source, target), peer(source, target)) for _ in range(repeats)]
            ratio = statistics.median(a / b for a, b in pairs)
            size = target.stat().st_size / 1e6, next(target.parent.glob("peer*.nii*")).stat().st_size / 1e6
            rows.append(
                {
                    "what": name,
                    "ctsr s": statistics.median(a for a, _ in pairs),
                    "dcm2niix s": statistics.median(b for _, b in pairs),
                    "ratio": ratio,
                    "figure": figure,
                    "met": "yes" if ratio <= figure else "**missed**",
                    "ctsr MB": round(size[0]),
                    "dcm2niix MB": round(size[1]),
                }
            )
            print(rows[-1], flush=True)
            if len(rows) == 1:
                flush = flushed(target)
            shutil.rmtree(folder / "out")
    where = "tmpfs" if FASTEST else "the disk"
    text = (
        f"{N_SLICES} × 512 × 512 on {where}, median of {repeats} runs in turn. Flushing the .nii to this machine's "
        f"disk, which no row holds, takes {flush:.1f} s more. {versions()}. "
        f"{provenance('python tests/benchmarks/dicom.py speed --write')}"
    )
    return {"dicom-speed": f"{text}\n\n{markdown(rows)}"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("quality", "speed"))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    for name, text in (quality() if asked.part == "quality" else speed(asked.repeats)).items():
        print(f"\n{name}\n{text}")
        if asked.write:
            section(PAGE, name, text)


if __name__ == "__main__":
    main()
