"""Which weights a name stands for, and loading them checked."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from ctsr.errors import WeightsError
from ctsr.io.atomic import input_error

if TYPE_CHECKING:
    from torch import nn

    from ctsr.models.zoo import ModelFile

__all__ = ["SHIPPED", "load_model", "locate"]

SHIPPED = {"baseline": "baseline.safetensors"}


def locate(name: str | os.PathLike[str]) -> Path:
    """The file that a name of shipped weights, or a path, stands for."""
    if os.fspath(name) in SHIPPED:
        return Path(str(files("ctsr.weights") / SHIPPED[os.fspath(name)]))
    return Path(name)


def load_model(name: str | os.PathLike[str], *, kind: str) -> tuple[nn.Module, ModelFile]:
    """The network that `name` (shipped, or a path) stands for, and its file's card.

    Raises WeightsError where the file is missing, damaged, foreign or of another kind: never random weights.
    """
    from ctsr.models import zoo

    path = locate(name)
    if path.is_dir():
        raise WeightsError("a folder, not a model file", path=name, hint="give the .safetensors file in it")
    try:
        data = path.read_bytes() if path.is_file() else None
    except OSError as exc:
        raise WeightsError(input_error(exc, name).reason, path=name) from exc
    if data is None:
        names = ", ".join(SHIPPED)
        raise WeightsError("no such model file", path=name, hint=f"a path, or one of the shipped: {names}")
    file = zoo.unpack(data, os.fspath(name))
    if file.kind != kind:
        raise WeightsError(f"a model of kind {file.kind}, expected {kind}", path=name)
    return zoo.build(file, os.fspath(name)), file
