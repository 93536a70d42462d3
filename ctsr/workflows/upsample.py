"""`upsample`: thick files in, thin files and their records out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctsr.core.volume import Volume
from ctsr.errors import CtsrError, InputError, UsageError
from ctsr.io.atomic import check_output, write_bytes
from ctsr.io.lists import write_table
from ctsr.io.nifti import SlabWriter, read_volume, write_slabs, write_volume
from ctsr.io.provenance import read_sidecar, sha256_of
from ctsr.workflows.folder import Case, find_cases, run_cases, take_shard
from ctsr.workflows.thinner import Job, Thinner

__all__ = ["FileOptions", "Report", "upsample_file", "upsample_folder"]

COLUMNS = [
    "case", "status", "code", "reason", "input_spacing_mm", "output_spacing_mm", "slice_thickness_mm", "slices_in",
    "slices_out", "residual_mean_hu", "residual_max_hu", "seconds", "domain",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions:
    """What concerns files, not volumes."""

    overwrite: bool = False
    skip_existing: bool = False
    is_dry_run: bool = False
    preview: Path | None = None
    save_added: Path | None = None
    form: str | None = None
    hu_offset: float = 0.0
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Report:
    """Whom to tell: notes, warnings, details, and the share that is done."""

    note: Callable[[str], None]
    warn: Callable[[str], None]
    detail: Callable[[str], None]
    progress: Callable[[float, str], None]


def upsample_file(
    source: Path, target: Path, thinner: Thinner, files: FileOptions, report: Report
) -> dict[str, Any]:
    """Thin one file; returns the row of a summary. An existing output stays as it was unless all went well.

    Raises UsageError, InputError, ResourceError; nothing is left behind then.
    """
    started = time.monotonic()
    request = _request(thinner, files)
    if not source.exists() and not source.is_symlink():
        raise InputError("does not exist", path=source)
    if files.skip_existing and target.exists():
        _refuse_other_record(source, target, request)
        return {"status": "skipped"}
    for path in (target, files.preview, files.save_added):
        if path is not None and not files.is_dry_run:
            check_output(path, overwrite=files.overwrite, inputs=[source])
    notes: list[str] = []
    volume = read_volume(
        source,
        form=files.form,
        hu_offset=files.hu_offset,
        allow_labels=thinner.options.model == "nearest",
        notes=notes,
    )
    try:
        job = thinner.job(volume, is_streamed=True, keeps_added=files.save_added is not None)
    except CtsrError as exc:
        raise type(exc)(exc.reason, path=exc.path or source, hint=exc.hint) from exc
    for note in [*notes, *job.notes]:
        report.note(f"{source}: {note}")
    for warning in job.warnings:
        report.warn(f"{source}: {warning}")
    report.detail(f"{source}: {_described(job, thinner, files)}")
    row = _row(job)
    if files.is_dry_run:
        return row | {
            "status": "planned",
            "peak_gb": round(job.plan.peak_bytes / 1e9, 3),
            "slabs": len(job.plan.slabs),
            "estimate_seconds": round(job.plan.seconds(files.threads), 1),
        }
    job.record |= request | {"input_sha256": sha256_of(source), "seed": files.seed, "threads": files.threads}
    planes = _write(job, target, files, report)
    seconds = round(time.monotonic() - started, 3)
    if files.save_added is not None:
        _write_added(job, files.save_added, overwrite=files.overwrite)
    if files.preview is not None:
        from ctsr.workflows.figures import preview

        before = job.turn.apply(volume.data)
        data = preview(
            before,
            planes,
            spacing=_turned_spacing(job),
            title=f"{job.recipe.method}, {job.recipe.factor:g} ×",
        )
        write_bytes(files.preview, data, overwrite=files.overwrite)
    return row | {
        "residual_mean_hu": job.record["consistency_residual_mean_hu"],
        "residual_max_hu": job.record["consistency_residual_max_hu"],
        "seconds": seconds,
    }


def upsample_folder(
    source: Path, target: Path, thinner: Thinner, files: FileOptions, report: Report, *, shard: str | None
) -> list[dict[str, Any]]:
    """Thin every NIfTI file below `source` into the same tree below `target`, and write `summary.csv` there.

    Raises SomeCasesFailed at the end where a case failed; UsageError before any work where outputs are in the way.
    """
    if files.preview is not None or files.save_added is not None:
        raise UsageError("--preview and --save-added are for one file")
    cases = take_shard(find_cases(source, target), shard)
    if not files.is_dry_run:
        if not files.skip_existing:
            for case in cases:
                if case.target.exists() and not files.overwrite:
                    raise UsageError(
                        "exists", path=case.target, hint="--overwrite replaces it, --skip-existing leaves it"
                    )
        target.mkdir(parents=True, exist_ok=True)

    def work(case: Case) -> Mapping[str, Any]:
        if not files.is_dry_run:
            case.target.parent.mkdir(parents=True, exist_ok=True)
        return upsample_file(case.source, case.target, thinner, files, report)

    def failed(case: Case, error: CtsrError) -> None:
        report.warn(f"failed: {error}")

    rows = run_cases(
        cases,
        work,
        failed=failed,
        done=lambda n: report.progress(n / len(cases), f"{n} of {len(cases)} cases"),
    )
    if not files.is_dry_run and any(row["status"] != "skipped" for row in rows):
        name = "summary.csv" if shard is None else f"summary-{_shard_name(shard)}.csv"
        table = [{column: row.get(column, "") for column in COLUMNS} for row in rows]
        write_table(target / name, table, overwrite=True)
    return rows


def _write(job: Job, target: Path, files: FileOptions, report: Report) -> dict[str, np.ndarray]:
    """Compute and write; returns the middle coronal and sagittal planes of the result."""
    height, width = job.y.shape[1] // 2, job.y.shape[2] // 2
    planes = {"coronal": np.empty((job.pipeline.m, job.y.shape[2]), job.dtype)}
    planes["sagittal"] = np.empty((job.pipeline.m, job.y.shape[1]), job.dtype)
    words = target.name
    with write_slabs(
        target, job.shape, job.dtype, job.affine, job.source.form_code,
        overwrite=files.overwrite, slice_axis=job.axis, record=job.record,
    ) as writer:  # fmt: skip
        whole = None if job.can_stream else np.empty(job.shape, job.dtype, order="F")
        for start, part in job.run(lambda share: report.progress(share, words)):
            rows = slice(start, start + len(part))
            planes["coronal"][rows], planes["sagittal"][rows] = part[:, height], part[:, :, width]
            if whole is None:
                _pour(writer, job.turn.undo(part))
            else:
                job.turn.apply(whole)[rows] = part
        if whole is not None:
            _pour(writer, whole)
    return planes


def _pour(writer: SlabWriter, data: np.ndarray) -> None:
    """Hand (I, J, K) over a few slices at a time: each piece is compressed while the next is gathered."""
    step = max(1, (1 << 23) // max(1, data[:, :, 0].nbytes))
    for k in range(0, data.shape[2], step):
        writer.write(data[:, :, k : k + step])


def _write_added(job: Job, path: Path, *, overwrite: bool) -> None:
    parts = job.added[::-1] if job.turn.flips[0] else job.added
    added = job.turn.undo(np.concatenate(parts))
    write_volume(
        Volume(added, job.affine, form_code=job.source.form_code, slice_axis=job.axis),
        path,
        overwrite=overwrite,
    )


def _turned_spacing(job: Job) -> tuple[float, float, float]:
    """Thick spacing and pixel sizes in the computing order, mm."""
    d, h, w = job.source.spacing[list(job.turn.order)]
    return float(d), float(h), float(w)


def _request(thinner: Thinner, files: FileOptions) -> dict[str, Any]:
    """What decides a result besides its input: what `--skip-existing` compares."""
    o = thinner.options
    asked = {
        "factor": o.factor if o.factor or o.spacing else 2.0,
        "spacing_mm": o.spacing,
        "model": o.model,
        "thickness_mm": o.thickness,
        "out_thickness_mm": o.out_thickness,
        "profile": str(o.profile.kind),
        "axis": o.axis,
        "consistency": "hard" if o.is_consistent else "off",
        "hu_offset": files.hu_offset,
    }
    return {"request": asked, "weights_sha256": thinner.weights.get("weights_sha256")}


def _refuse_other_record(source: Path, target: Path, request: Mapping[str, Any]) -> None:
    """UsageError where the output that is there was not made by this request from this input."""
    record = read_sidecar(target)
    if not record:
        raise UsageError(
            "exists without a record of how it was made", path=target, hint="--overwrite replaces it"
        )
    wanted = dict(request) | {"input_sha256": sha256_of(source), "output_size_bytes": target.stat().st_size}
    for key, value in wanted.items():
        if record.get(key) != value:
            there = record.get(key)
            if isinstance(value, dict) and isinstance(there, dict):
                key, there, value = next((k, there.get(k), v) for k, v in value.items() if there.get(k) != v)
            raise UsageError(
                f"was made with {key} {there}, asked for is {value}",
                path=target,
                hint="--overwrite replaces it",
            )


def _row(job: Job) -> dict[str, Any]:
    r = job.recipe
    return {
        "status": "ok",
        "input_spacing_mm": round(r.spacing, 4),
        "output_spacing_mm": round(r.spacing / r.factor, 4),
        "slice_thickness_mm": round(r.thickness, 4),
        "slices_in": r.n,
        "slices_out": job.pipeline.m,
        "domain": "; ".join(job.outside) or "within",
    }


def _described(job: Job, thinner: Thinner, files: FileOptions) -> str:
    r, w = job.recipe, thinner.weights
    network = f"{w['weights']} on {w['device']}, {w['dtype_reason']}; " if w else ""
    return (
        f"{r.n} slices of {r.spacing:.4g} mm (thickness {r.thickness:.4g} mm, {r.profile.kind}) → {job.pipeline.m} of "
        f"{r.spacing / r.factor:.4g} mm; {network}{files.threads} threads, {job.plan.describe()}, {_windows(job)}"
    )


def _windows(job: Job) -> str:
    tiling = job.pipeline.tiling
    if job.pipeline.engine is None:
        return "one matrix along z"
    n = len(list(tiling))
    how = (
        "exact"
        if tiling.is_exact
        else f"blended: overlap {tiling.overlap} is below the network's reach of {tiling.reach} pixels"
    )
    return f"{n} window{'s' if n > 1 else ''} in plane ({how})"


def _shard_name(shard: str) -> str:
    """What a share's summary is called, so that shares do not overwrite each other's."""
    if shard != "env":
        return shard.replace("/", "-of-")
    task = next(
        os.environ[k] for k in ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX", "RANK") if k in os.environ
    )
    return f"task-{task}"
