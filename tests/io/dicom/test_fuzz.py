"""Whatever the bytes are, the reader ends in time: a volume, a skipped file or a refusal; never another exception."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from tests.io.dicom.make import block, planes, series
from tests.io.dicom.mutate import series_from, try_source, write

SLOWEST = 5.0  # seconds a source may take; the usual is a hundredth


def fuzz(files: list[list[bytes]], folder: Path, n: int, seed: int) -> Counter[str]:
    ends: Counter[str] = Counter()
    for k in range(n):
        rng = random.Random(seed * 1_000_003 + k)
        of_series = rng.choice(files)
        source = write(of_series, folder / "source", rng)
        outcome = try_source(source, len(of_series) if source.is_dir() else None)
        assert outcome.seconds < SLOWEST, f"input {k} took {outcome.seconds:.1f} s"
        ends["read"] += outcome.read
        ends["refused"] += outcome.refused
        ends["skipped"] += outcome.skipped
    return ends


@pytest.mark.parametrize(
    "syntax",
    [
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        None,
    ],
)
def test_a_damaged_series_ends_in_a_volume_or_a_reason(syntax: str | None, tmp_path: Path) -> None:
    series(tmp_path / "whole", block(planes(4, shape=(16, 20)), syntax=syntax))
    files = [path.read_bytes() for path in sorted((tmp_path / "whole").iterdir())]
    ends = fuzz([files], tmp_path, 60, seed=1)
    assert min(ends["read"], ends["refused"], ends["skipped"]) > 0  # the damage reaches every stage


def test_a_damaged_multiframe_object_ends_in_a_volume_or_a_reason(tmp_path: Path) -> None:
    series(tmp_path / "whole", block(planes(4, shape=(16, 20)), frames=True))
    (path,) = (tmp_path / "whole").iterdir()
    ends = fuzz([[path.read_bytes()]], tmp_path, 120, seed=2)
    assert min(ends["read"], ends["refused"], ends["skipped"]) > 0


@pytest.mark.ci
def test_damaged_real_files_end_in_a_volume_or_a_reason(reference_data: Path, tmp_path: Path) -> None:
    found = [path for path in sorted((reference_data.parent / "dicom").rglob("*")) if path.is_file()]
    files = [series_from(path) for path in found if path.stat().st_size < 400_000]
    assert len(files) > 100
    ends = fuzz(files, tmp_path, 1000, seed=3)
    assert min(ends["read"], ends["refused"], ends["skipped"]) > 10
