"""A name or a path becomes a checked network, never random weights."""

from __future__ import annotations

import os

import pytest
import torch

from ctsr.errors import WeightsError
from ctsr.weights.registry import SHIPPED, load_model, locate
from tests.models.test_zoo import CONFIG, model


def test_a_file_is_loaded_and_checked(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(model())
    network, file = load_model(path, kind="baseline")
    assert network.config == CONFIG
    assert not network.training
    assert len(file.sha256) == 64
    with torch.inference_mode():
        assert network(torch.zeros(1, 1, 2, 4, 4), torch.zeros(1, 1, 4, 4, 4), torch.ones(1)).shape[2] == 4


def test_a_shipped_name_is_a_file_of_the_package():
    assert locate("baseline").name == SHIPPED["baseline"]
    assert locate("baseline").parent.name == "weights"
    assert locate("some/file").as_posix() == "some/file"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, r"no such model file \(a path, or one of the shipped: baseline"),
        (lambda p: p.mkdir(), "a folder, not a model file"),
        (os.mkfifo, "no such model file"),
        (lambda p: p.write_bytes(b""), "truncated weights"),
        (lambda p: p.symlink_to("gone"), "no such model file"),
    ],
    ids=["missing", "folder", "FIFO", "empty", "dangling link"],
)
def test_what_is_no_model_file_is_refused(tmp_path, make, words):
    make(tmp_path / "x")
    with pytest.raises(WeightsError, match=words) as told:
        load_model(tmp_path / "x", kind="baseline")
    assert told.value.exit_code == 5


def test_another_kind_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(model())
    with pytest.raises(WeightsError, match="a model of kind baseline, expected diffusion"):
        load_model(path, kind="diffusion")
