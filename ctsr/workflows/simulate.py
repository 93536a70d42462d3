"""`simulate`: thin scans in, the thick slices that a scanner would have stored out; or synthetic scans."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ctsr.core.geometry import slice_axis
from ctsr.core.volume import Volume, rounded
from ctsr.data.splits import MANIFEST, SETS, list_path, update_manifest
from ctsr.errors import UsageError
from ctsr.io.atomic import check_output, make_folder
from ctsr.io.lists import read_table, stem, write_table
from ctsr.io.nifti import write_volume
from ctsr.io.provenance import check_image_output
from ctsr.physics.phantom import SHAPE, SPACING, phantom
from ctsr.physics.profile import SliceProfile
from ctsr.physics.simulation import simulate_volume
from ctsr.workflows.folder import Case, Report, about, find_cases, origin, refuse_existing, run_cases
from ctsr.workflows.profiles import read_profile
from ctsr.workflows.requests import Simulation

__all__ = ["phantoms", "simulate"]

PAIRS = "pairs.csv"
PAIR_COLUMNS = ["thin", "thick", "factor", "spacing_mm", "thickness_mm", "profile", "noise_hu", "seed"]


def simulate(
    source: Path,
    target: Path,
    asked: Simulation,
    report: Report = Report(),
) -> list[dict[str, Any]]:
    """Thicken a scan, or all that a folder holds into the same tree with a `pairs.csv`; a row a case.

    A folder's row names its `case`, and a failed one is a row with status `failed`; for a single scan the error rises.
    Raises UsageError before any work where an output is in the way.
    """

    profile_notes: list[str] = []
    profile = read_profile(asked.profile, notes=profile_notes)
    for note in profile_notes:
        report.note(note)

    def work(case: Case) -> Mapping[str, Any]:
        if is_folder:
            make_folder(case.target.parent)
        inputs = [case.source] if case.series is None else []
        check_image_output(case.target, overwrite=asked.overwrite, inputs=inputs)
        notes: list[str] = []
        thin = case.read(form=asked.form, hu_offset=asked.hu_offset, notes=notes).volume
        with about(case.source):
            thick, record = _thickened(thin, asked, profile, case.sha256(), notes)
        for note in notes:
            report.note(f"{case.source}: {note}")
        write_volume(thick, case.target, overwrite=asked.overwrite, record=record)
        row = {"factor": record["factor"], "spacing_mm": record["SpacingBetweenSlices"]}
        row |= {"thickness_mm": record["SliceThickness"]}
        row |= {name: record[name] for name in ("profile", "noise_hu", "seed")}
        axis = slice_axis(thick)[0]
        row |= {"slices_in": thin.shape[axis], "slices_out": thick.shape[axis]}
        return {"status": "ok"} | row

    cases, is_folder = find_cases(source, target, series_suffix=".nii.gz")
    if not is_folder:
        return [dict(work(cases[0]))]
    pairs = target / PAIRS
    if not asked.overwrite:
        refuse_existing([pairs, *(case.target for case in cases)])
    make_folder(target)
    rows = run_cases(cases, work, report)
    made = [
        row | {"thin": _relative(case.source, target), "thick": _relative(case.target, target)}
        for case, row in zip(cases, rows, strict=True)
        if row["status"] == "ok"
    ]
    write_table(pairs, PAIR_COLUMNS, made, overwrite=asked.overwrite)
    return rows


def _thickened(
    thin: Volume, asked: Simulation, profile: SliceProfile, input_sha256: str, notes: list[str]
) -> tuple[Volume, dict[str, Any]]:
    """The thick volume and its record. Its noise is the scan's own, alone and in a folder."""
    factor, spacing = asked.factor, asked.spacing
    if factor is None and spacing is None:
        factor, spacing = (2.0, None) if asked.thickness is None else (None, asked.thickness)
    seeds = np.random.SeedSequence([asked.seed, int(input_sha256[:16], 16)])
    thick, more = simulate_volume(
        thin, factor=factor, spacing=spacing, thickness=asked.thickness, profile=profile, axis=asked.axis,
        noise_sd=asked.noise, seed=int(seeds.generate_state(1, np.uint64)[0]),
    )  # fmt: skip
    notes += more
    axis = slice_axis(thick)[0]
    before, after = float(thin.spacing[axis]), float(thick.spacing[axis])
    return thick, origin("simulate") | {
        "SliceThickness": round(float(thick.slice_thickness or after), 6),
        "SpacingBetweenSlices": round(after, 6),
        "input_spacing_mm": round(before, 6),
        "input_sha256": input_sha256,
        "factor": round(after / before, 6),
        "profile": str(profile.kind),
        "noise_hu": asked.noise,
        "seed": asked.seed,
    }


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def phantoms(
    n: int,
    project: Path,
    *,
    seed: int = 0,
    shape: tuple[int, int, int] = SHAPE,
    spacing: tuple[float, float, float] = SPACING,
    overwrite: bool = False,
    report: Report = Report(),
) -> list[dict[str, Any]]:
    """Write `n` synthetic thin scans and the lists that training reads into `project/data`; a row a scan.

    The record beside each says what is in it. Scans that are there already keep their place in the lists.
    """
    if n < 1:
        raise UsageError(f"--phantoms: {n} is no number of scans")
    data = project / "data"
    manifest, files = data / MANIFEST, [f"phantom-{i + 1:04d}.nii.gz" for i in range(n)]
    if not overwrite:
        lists = [list_path(data, name) for name in (*SETS, "all")]
        refuse_existing([*(data / file for file in files), manifest, *lists])
    make_folder(data)
    check_output(manifest, overwrite=overwrite)
    others = read_table(manifest, columns=["file"]) if manifest.exists() else []
    patients = {row.get("patient") or row["file"] for row in others if row["file"] not in files}
    if n + len(patients) < 3:
        report.note("fewer than 3 patients: val_files.txt and test_files.txt stay empty, training needs them")
    rows = []
    for i, file in enumerate(files):
        own = int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
        volume, record = _phantom(own, shape, spacing)
        write_volume(volume, data / file, overwrite=overwrite, record=record)
        row = {"file": file, "patient": stem(file), "slices": shape[0], "spacing_mm": spacing[0]}
        row |= {"thickness_mm": spacing[0], "pixel_mm": spacing[1]}
        rows.append(row | {"source": f"ctsr simulate --phantoms, seed {seed}"})
        report.progress((i + 1) / n, f"{i + 1} of {n} phantoms")
    return update_manifest(data, rows)


def _phantom(
    seed: int, shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> tuple[Volume, dict[str, Any]]:
    """A synthetic scan and its record. shape, spacing: (D, H, W), voxels and mm."""
    made = phantom(seed, shape=shape, spacing=spacing)
    affine = np.diag([*spacing[::-1], 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * s for n, s in zip(shape[::-1], spacing[::-1], strict=True)]
    nodules = [
        {
            "index": [round(c / s, 2) for c, s in zip(n.centre_mm[::-1], spacing[::-1], strict=True)],
            "diameter_mm": n.diameter_mm,
            "hu": n.hu,
        }
        for n in made.nodules
    ]
    record = origin("simulate --phantoms") | {
        "SliceThickness": spacing[0],
        "SpacingBetweenSlices": spacing[0],
        "seed": seed,
        "noise_hu": round(made.noise_sd, 3),
        "nodules": nodules,
    }
    return Volume(rounded(made.hu, np.dtype(np.int16)).transpose(2, 1, 0), affine, slice_axis=2), record
