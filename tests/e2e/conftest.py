"""A project folder of three small scans."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.io.make import affine_of, nifti, put
from tests.train import tiny


def make_project(folder: Path) -> Path:
    """Two scans to train on, one to validate on, as `convert` leaves them."""
    data = folder / "data"
    data.mkdir(parents=True)
    for seed in (1, 2, 3):
        hu = np.ascontiguousarray(tiny.body(seed).transpose(2, 1, 0))
        put(data, nifti(hu, affine_of((0.8, 0.8, 1.0 if seed < 3 else 1.25))), f"scan{seed}.nii.gz")
    (data / "train_files.txt").write_text("scan1.nii.gz\nscan2.nii.gz\n")
    (data / "val_files.txt").write_text("scan3.nii.gz\n")
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch) -> Iterator[Path]:
    """A project folder, and the state of the process kept from what a command sets."""
    threads = torch.get_num_threads()
    monkeypatch.delenv("RANK", raising=False)
    yield make_project(tmp_path / "p")
    torch.set_num_threads(threads)
