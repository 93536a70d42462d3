"""`upsample`: thick files in, thin files and their records out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ctsr.core.volume import Volume
from ctsr.errors import UsageError
from ctsr.io.atomic import check_output, make_folder, write_bytes
from ctsr.io.dicom.records import Stack
from ctsr.io.dicom.write import check_like, check_series, write_series
from ctsr.io.lists import VOLUME_SUFFIXES, write_table
from ctsr.io.nifti import write_slabs, write_volume
from ctsr.io.provenance import check_image_output
from ctsr.io.scans import only_series
from ctsr.workflows.folder import (
    Case,
    Report,
    about,
    agreeing_record,
    find_cases,
    refuse_existing,
    run_cases,
    shard_name,
    take_shard,
)
from ctsr.workflows.job import Job
from ctsr.workflows.requests import FileOptions
from ctsr.workflows.thinner import Thinner

__all__ = ["upsample_files"]

COLUMNS = [
    "case", "status", "code", "reason", "input_spacing_mm", "output_spacing_mm", "slice_thickness_mm", "slices_in",
    "slices_out", "residual_mean_hu", "residual_max_hu", "seconds", "domain",
]  # fmt: skip
_PIECE = 1 << 23  # bytes


def upsample_files(
    source: Path,
    target: Path,
    thinner: Thinner,
    files: FileOptions,
    report: Report = Report(),
    *,
    shard: str | None = None,
) -> list[dict[str, Any]]:
    """Thin a file or a series, or all that a folder holds into the same tree; the rows of a summary.

    DICOM comes out where `target` names no image file. An output that exists stays as it was unless all went well.
    A folder's rows name their `case` and go to `summary.csv`; one that fails there has the status `failed`, for a
    single one the error rises. A share may hold none. Raises UsageError before any work where outputs are in the way.
    """
    cases, is_folder = find_cases(source, target)
    if not is_folder:
        if shard is not None:
            raise UsageError("--shard is for a folder of cases")
        return [_thin(cases[0], thinner, files, report, notes_weights=True)]
    if files.beside or files.like is not None:
        raise UsageError("--preview, --save-added, --save-uncertainty and --like are for one file")
    n, cases = len(cases), take_shard(cases, shard)
    if not cases:  # a task more than there are cases: nothing is wrong
        report.note(f"{source}: {n} cases, none for share {shard}")
        return []
    if not (files.is_dry_run or files.skip_existing or files.overwrite):
        hint = "--overwrite replaces it, --skip-existing leaves it"
        refuse_existing((case.target for case in cases), hint=hint)
    _note_weights(thinner, report)

    def work(case: Case) -> Mapping[str, Any]:
        if not files.is_dry_run:
            make_folder(case.target.parent)
        return _thin(case, thinner, files, report)

    rows = run_cases(cases, work, report)
    if not files.is_dry_run and any(row["status"] != "skipped" for row in rows):
        name = "summary.csv" if shard is None else f"summary-{shard_name(shard)}.csv"
        write_table(target / name, COLUMNS, rows, overwrite=True)
    return rows


def _thin(
    case: Case, thinner: Thinner, files: FileOptions, report: Report, *, notes_weights: bool = False
) -> dict[str, Any]:
    started, source = time.monotonic(), case.source
    is_there = files.skip_existing and case.target.exists()
    like = _lender(case, files)
    if not is_there:
        _check_outputs(case, files, like)
    if notes_weights:
        _note_weights(thinner, report)
    request = _request(thinner, files)
    if is_there:
        for path in files.beside:
            if not path.exists():
                hint = "--overwrite instead of --skip-existing makes both"
                raise UsageError(f"is not there, {case.target} is", path=path, hint=hint)
        asked = request["request"] | {"weights_sha256": request["weights_sha256"]}
        return _row(agreeing_record(case.target, asked | {"input_sha256": case.sha256()})) | {
            "status": "skipped"
        }
    notes: list[str] = []
    is_nearest = thinner.options.model == "nearest"
    read = case.read(form=files.form, hu_offset=files.hu_offset, allow_labels=is_nearest, notes=notes)
    volume = read.volume if case.series or like is None else check_like(read.volume, like)
    keeps = {"keeps_added": bool(files.save_added), "keeps_spread": bool(files.save_uncertainty)}
    with about(source):
        job = thinner.job(volume, is_streamed=True, **keeps)
    for note in [*notes, *job.notes]:
        report.note(f"{source}: {note}")
    for warning in job.warnings:
        report.warn(f"{source}: {warning}")
    report.detail(f"{source}: {_described(job, thinner, files)}")
    if files.is_dry_run:
        return _row(job.record) | {
            "status": "planned",
            "peak_gb": round(job.plan.peak_bytes / 1e9, 3),
            "slabs": len(job.plan.slabs),
            "windows": len(list(job.plan.tiling)),
            "threads": files.threads or 1,
            "estimate_seconds": round(job.plan.seconds(files.threads or 1), 1),
        }
    job.record |= request | {"input_sha256": case.sha256(), "seed": files.seed, "threads": files.threads or 1}
    if tilt := read.technical.get("tilt_removed_deg"):
        job.record["tilt_removed_deg"] = tilt
    _write(job, case.target, files, report, like=like, padding_value=read.padding_value)
    for remark in job.remarks:
        report.warn(f"{source}: {remark}")
    return _row(job.record) | {"status": "ok", "seconds": round(time.monotonic() - started, 3)}


def _lender(case: Case, files: FileOptions) -> Stack | None:
    """The series that lends patient, study and frame to a DICOM result; None for an image file."""
    stack = None if case.series is None else case.stack()
    if case.target.name.lower().endswith(VOLUME_SUFFIXES):
        if files.like is not None:
            raise UsageError("--like is for DICOM out, this names an image file", path=case.target)
        return None
    if stack is not None and files.like is not None:
        raise UsageError("--like is for an image file, this is DICOM", path=case.source)
    if stack is None and files.like is None:
        hint = "--like SERIES lends a patient to a DICOM series"
        raise UsageError("ends in neither .nii nor .nii.gz", path=case.target, hint=hint)
    return stack or only_series(files.like or case.source)


def _check_outputs(case: Case, files: FileOptions, like: Stack | None) -> None:
    """UsageError or ResourceError where an output could not be written at the end."""
    for path in files.beside:
        if path != files.preview and not path.name.lower().endswith(VOLUME_SUFFIXES):
            raise UsageError("ends in neither .nii nor .nii.gz", path=path)
    if files.preview is not None and files.preview.suffix.lower() != ".png":
        raise UsageError("does not end in .png", path=files.preview)
    if files.is_dry_run:
        return
    if like is not None:
        check_series(case.target, overwrite=files.overwrite, like=like)
    else:
        inputs = [case.source] if case.series is None else []
        check_image_output(case.target, overwrite=files.overwrite, inputs=inputs)
    for path in files.beside:
        check_output(path, overwrite=files.overwrite, inputs=[case.source])
    if len({path.resolve() for path in [case.target, *files.beside]}) <= len(files.beside):
        raise UsageError("two outputs have this name", path=files.beside[-1])


def _note_weights(thinner: Thinner, report: Report) -> None:
    if weights := thinner.weights:
        report.note(f"weights: {weights['weights']}, sha256 {weights['weights_sha256'][:12]}")


def _write(
    job: Job,
    target: Path,
    files: FileOptions,
    report: Report,
    *,
    like: Stack | None,
    padding_value: int | None,
) -> None:
    """Compute and write; what was asked for under `target` comes last, so that where it is everything is."""
    _, height, width = job.y.shape
    planes = {"coronal": np.empty((job.pipeline.m, width), job.dtype)}
    planes["sagittal"] = np.empty((job.pipeline.m, height), job.dtype)
    slabs = _slabs(job, planes, lambda share: report.progress(share, target.name))
    if like is not None:
        warnings = write_series(
            target, map(_as_planes, slabs), like, job.affine, job.shape,
            padding_value=padding_value, overwrite=files.overwrite, random_uids=files.random_uids, record=job.record,
        )  # fmt: skip
        for warning in warnings:
            report.warn(f"{target}: {warning}")
        _write_beside(job, files, planes)
        return
    with write_slabs(
        target, job.shape, job.dtype, job.affine, job.source.form_code,
        overwrite=files.overwrite, slice_axis=job.axis, record=job.record,
    ) as writer:  # fmt: skip
        for _, part in slabs:
            # a few slices at a time: each piece is compressed while the next is gathered
            step = max(1, _PIECE // max(1, part[:, :, 0].nbytes))
            for k in range(0, part.shape[2], step):
                writer.write(part[:, :, k : k + step])
            del part  # before the next slab is computed
        _write_beside(job, files, planes)


def _as_planes(slab: tuple[int, np.ndarray]) -> tuple[int, np.ndarray]:
    """(n, rows, columns), as DICOM has them; a function, so that nothing holds a slab while the next is computed."""
    return slab[0], slab[1].transpose(2, 1, 0)


def _slabs(
    job: Job, planes: Mapping[str, np.ndarray], progress: Callable[[float], None]
) -> Iterator[tuple[int, np.ndarray]]:
    """(first slice, (I, J, k)) in the order of the file, as soon as that order allows; fills the middle `planes`."""
    height, width = job.y.shape[1] // 2, job.y.shape[2] // 2
    whole = None if job.can_stream else np.empty(job.shape, job.dtype, order="F")
    at = 0
    for start, part in job.run(progress):
        rows = slice(start, start + len(part))
        planes["coronal"][rows], planes["sagittal"][rows] = part[:, height], part[:, :, width]
        if whole is None:
            yield at, job.turn.undo(part)
        else:
            job.turn.apply(whole)[rows] = part
        at += len(part)
        del part  # before the next slab is computed
    if whole is not None:
        yield 0, whole


def _write_beside(job: Job, files: FileOptions, planes: Mapping[str, np.ndarray]) -> None:
    for path, data in ((files.save_added, job.added), (files.save_uncertainty, job.spread)):
        if path is not None and data is not None:
            made = Volume(
                job.turn.undo(data), job.affine, form_code=job.source.form_code, slice_axis=job.axis
            )
            write_volume(made, path, overwrite=files.overwrite)
    if files.preview is not None:
        from ctsr.workflows.figures import preview

        d, h, w = map(float, job.source.spacing[list(job.turn.order)])
        title = f"{job.recipe.method}, {job.recipe.factor:g} ×"
        picture = preview(job.given, planes, spacing=(d, h, w), title=title)
        write_bytes(files.preview, picture, overwrite=files.overwrite)


def _request(thinner: Thinner, files: FileOptions) -> dict[str, Any]:
    """What decides a result besides its input: what `--skip-existing` compares."""
    o = thinner.options
    asked = {
        "factor": o.factor if o.factor or o.spacing else 2.0,
        "spacing_mm": o.spacing,
        "model": o.model,
        "thickness_mm": o.thickness,
        "out_thickness_mm": o.out_thickness,
        "profile": str(o.profile.kind) if o.profile.table is None else o.profile.table.tolist(),
        "axis": o.axis,
        "consistency": "hard" if o.is_consistent else "off",
        "patch": None if o.patch is None else list(o.patch),
        "overlap": o.overlap,
        "dtype": o.dtype,
        "form": files.form,
        "hu_offset": files.hu_offset,
    }
    asked |= thinner.weights.get("diffusion", {})
    return {"request": asked, "weights_sha256": thinner.weights.get("weights_sha256")}


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a summary says of an output, from its record."""
    names = {
        "input_spacing_mm": "input_spacing_mm", "output_spacing_mm": "SpacingBetweenSlices",
        "slice_thickness_mm": "input_slice_thickness_mm",
        "slices_in": "slices_in", "slices_out": "slices_out",
        "residual_mean_hu": "consistency_residual_mean_hu", "residual_max_hu": "consistency_residual_max_hu",
    }  # fmt: skip
    row = {column: record[key] for column, key in names.items() if key in record}
    outside = "; ".join(record.get("outside_trained_range", ()))
    return row | {"domain": outside or ("within" if record.get("weights_sha256") else "")}


def _described(job: Job, thinner: Thinner, files: FileOptions) -> str:
    r, w, tiling = job.recipe, thinner.weights, job.pipeline.tiling
    network, windows = "", "one matrix along z"
    if w:
        network = f"{w['weights']} on {w['device']}, {w['dtype_reason']}; "
        blended = f"blended: overlap {tiling.overlap} is below the network's reach of {tiling.reach} pixels"
        n = len(list(tiling))
        windows = f"{n} window{'s' if n > 1 else ''} in plane ({'exact' if tiling.is_exact else blended})"
    return (
        f"{r.n} slices of {r.spacing:.4g} mm (thickness {r.thickness:.4g} mm, {r.profile.kind}) → "
        f"{job.pipeline.m} of {r.spacing / r.factor:.4g} mm; {network}{files.threads or 1} thread(s), "
        f"{job.plan.describe()}, {windows}"
    )
