"""`simulate`: thin scans in, the thick slices that a scanner would have stored out; or synthetic scans."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ctsr import __version__
from ctsr.core.geometry import slice_axis
from ctsr.core.storage import rounded
from ctsr.core.volume import Volume
from ctsr.data.manifest import MANIFEST, update_manifest
from ctsr.data.splits import SETS, list_path
from ctsr.errors import CtsrError, UsageError
from ctsr.io.atomic import check_output
from ctsr.io.lists import read_table, write_table
from ctsr.io.nifti import write_volume
from ctsr.io.provenance import check_image_output
from ctsr.physics.phantom import SHAPE, SPACING, phantom
from ctsr.physics.profile import SliceProfile
from ctsr.physics.simulation import simulate_volume
from ctsr.workflows.folder import Case, find_cases, run_cases

__all__ = ["Report", "Simulation", "phantoms", "simulate"]

PAIRS = "pairs.csv"
PAIR_COLUMNS = ["thin", "thick", "factor", "spacing_mm", "thickness_mm", "profile", "noise_hu", "seed"]
NOTICE = "research use only; not a medical device"


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What is simulated. Lengths in mm, of the thick slices.

    factor, spacing: one of them; with neither, `thickness` is the spacing too; with none of them, factor 2.
    thickness: None for the spacing. noise: HU, standard deviation.
    """

    factor: float | None = None
    spacing: float | None = None
    thickness: float | None = None
    profile: SliceProfile = field(default_factory=SliceProfile)
    noise: float = 0.0
    seed: int = 0
    axis: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Whom to tell: notes, warnings, and the share that is done."""

    note: Callable[[str], None] = lambda text: None
    warn: Callable[[str], None] = lambda text: None
    progress: Callable[[float, str], None] = lambda share, words: None


def simulate(
    source: Path,
    target: Path,
    simulation: Simulation,
    *,
    overwrite: bool = False,
    form: str | None = None,
    hu_offset: float = 0.0,
    report: Report | None = None,
) -> list[dict[str, Any]]:
    """Thicken a scan, or all that a folder holds into the same tree with a `pairs.csv`; a row a case.

    A folder's row names its `case`, and a failed one is a row with status `failed`; for a single scan the error rises.
    Raises UsageError before any work where an output is in the way.
    """
    report = report or Report()
    cases, is_folder = find_cases(source, target, series_suffix=".nii.gz")
    if not is_folder:
        return [_simulate_case(cases[0], simulation, overwrite, form, hu_offset, report)]
    pairs = target / PAIRS
    for path in [pairs, *(case.target for case in cases)]:
        if path.exists() and not overwrite:
            raise UsageError("exists already", path=path, hint="--overwrite replaces it")
    target.mkdir(parents=True, exist_ok=True)

    def work(case: Case) -> Mapping[str, Any]:
        case.target.parent.mkdir(parents=True, exist_ok=True)
        return _simulate_case(case, simulation, overwrite, form, hu_offset, report)

    def failed(case: Case, error: CtsrError) -> None:
        report.warn(f"failed: {error}")

    def done(n: int) -> None:
        report.progress(n / len(cases), f"{n} of {len(cases)} cases")

    rows = run_cases(cases, work, failed=failed, done=done)
    table = [
        row | {"thin": _relative(case.source, target), "thick": _relative(case.target, target)}
        for case, row in zip(cases, rows, strict=True)
        if row["status"] == "ok"
    ]
    write_table(pairs, PAIR_COLUMNS, table, overwrite=overwrite)
    return rows


def _simulate_case(
    case: Case, simulation: Simulation, overwrite: bool, form: str | None, hu_offset: float, report: Report
) -> dict[str, Any]:
    s = simulation
    check_image_output(case.target, overwrite=overwrite, inputs=[case.source] if case.series is None else [])
    notes: list[str] = []
    thin = case.read(form=form, hu_offset=hu_offset, notes=notes).volume
    sha256 = case.sha256()
    factor, spacing = s.factor, s.spacing
    if factor is None and spacing is None:
        factor, spacing = (2.0, None) if s.thickness is None else (None, s.thickness)
    try:
        thick, more = simulate_volume(
            thin,
            factor=factor,
            spacing=spacing,
            thickness=s.thickness,
            profile=s.profile,
            axis=s.axis,
            noise_sd=s.noise,
            seed=_seed(s.seed, sha256),
        )
    except CtsrError as exc:
        raise type(exc)(exc.reason, path=exc.path or case.source, hint=exc.hint) from exc
    for note in [*notes, *more]:
        report.note(f"{case.source}: {note}")
    axis = slice_axis(thick)[0]
    row = {
        "factor": round(float(thick.spacing[axis] / thin.spacing[axis]), 6),
        "spacing_mm": round(float(thick.spacing[axis]), 6),
        "thickness_mm": round(float(thick.slice_thickness or thick.spacing[axis]), 6),
        "profile": str(s.profile.kind),
        "noise_hu": s.noise,
        "seed": s.seed,
        "slices_in": thin.shape[axis],
        "slices_out": thick.shape[axis],
    }
    record = {
        "command": "simulate",
        "ctsr_version": __version__,
        "SliceThickness": row["thickness_mm"],
        "SpacingBetweenSlices": row["spacing_mm"],
        "input_spacing_mm": round(float(thin.spacing[axis]), 6),
        "input_sha256": sha256,
        "notice": NOTICE,
    } | {k: row[k] for k in ("factor", "profile", "noise_hu", "seed")}
    write_volume(thick, case.target, overwrite=overwrite, record=record)
    return {"status": "ok"} | row


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _seed(seed: int, sha256: str) -> int:
    """Another noise for every scan, the same whether it is simulated alone or in a folder."""
    return int(np.random.SeedSequence([seed, int(sha256[:16], 16)]).generate_state(1, np.uint64)[0])


def phantoms(
    n: int,
    project: Path,
    *,
    seed: int = 0,
    shape: tuple[int, int, int] = SHAPE,
    spacing: tuple[float, float, float] = SPACING,
    overwrite: bool = False,
    report: Report | None = None,
) -> list[dict[str, Any]]:
    """Write `n` synthetic thin scans and the lists that training reads into `project/data`; a row a scan.

    The record beside each says what is in it. Scans that are there already keep their place in the lists.
    """
    report = report or Report()
    if n < 1:
        raise UsageError(f"--phantoms: {n} is no number of scans")
    data = project / "data"
    names = [f"phantom-{i + 1:04d}" for i in range(n)]
    files = {f"{name}.nii.gz": name for name in names}
    outputs = [data / MANIFEST, *(list_path(data, name) for name in (*SETS, "all"))]
    for path in [*(data / f for f in files), *outputs]:
        if path.exists() and not overwrite:
            raise UsageError("exists already", path=path, hint="--overwrite replaces it")
    if data.exists() and not data.is_dir():
        raise UsageError("is a file; the scans need a folder", path=data)
    data.mkdir(parents=True, exist_ok=True)
    check_output(data / MANIFEST, overwrite=overwrite)
    others = read_table(data / MANIFEST, columns=["file"]) if (data / MANIFEST).exists() else []
    others = [row for row in others if row["file"] not in files]
    if n + len({row.get("patient") or row["file"] for row in others}) < 3:
        report.note("fewer than 3 patients: val_files.txt and test_files.txt stay empty, training needs them")
    for i, file in enumerate(files):
        _write_phantom(data / file, seed=seed, number=i, shape=shape, spacing=spacing, overwrite=overwrite)
        report.progress((i + 1) / n, f"{i + 1} of {n} phantoms")
    common = {
        "slices": shape[0],
        "spacing_mm": spacing[0],
        "thickness_mm": spacing[0],
        "pixel_mm": spacing[1],
        "source": f"ctsr simulate --phantoms, seed {seed}",
    }
    return update_manifest(
        data, [{"file": file, "patient": patient} | common for file, patient in files.items()]
    )


def _write_phantom(
    path: Path,
    *,
    seed: int,
    number: int,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    overwrite: bool,
) -> None:
    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    made = phantom(own, shape=shape, spacing=spacing)
    affine = np.diag([spacing[2], spacing[1], spacing[0], 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * s for n, s in zip(shape[::-1], spacing[::-1], strict=True)]
    volume = Volume(rounded(made.hu, np.dtype(np.int16)).transpose(2, 1, 0), affine, slice_axis=2)
    record = {
        "command": "simulate --phantoms",
        "ctsr_version": __version__,
        "SliceThickness": spacing[0],
        "SpacingBetweenSlices": spacing[0],
        "seed": own,
        "noise_hu": round(made.noise_sd, 3),
        "nodules": [
            {
                "index": [round(c / s, 2) for c, s in zip(n.centre_mm[::-1], spacing[::-1], strict=True)],
                "diameter_mm": n.diameter_mm,
                "hu": n.hu,
            }
            for n in made.nodules
        ],
        "notice": NOTICE,
    }
    write_volume(volume, path, overwrite=overwrite, record=record)
