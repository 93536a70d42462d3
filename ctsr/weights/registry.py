"""Which weights a name stands for, and loading them checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from ctsr.errors import WeightsError
from ctsr.io.atomic import input_error
from ctsr.weights import hub

if TYPE_CHECKING:
    from torch import nn

    from ctsr.models.zoo import ModelFile

__all__ = ["PUBLISHED", "SHIPPED", "Published", "load_model", "locate", "read_weights"]


@dataclass(frozen=True, slots=True)
class Published:
    """Weights on the Hub that have a name here. sha256: empty where it is not pinned; size_mb: for the eye."""

    kind: str
    reference: hub.Reference
    licence: str
    size_mb: float = 0.0
    sha256: str = ""


SHIPPED = {"baseline": "baseline.safetensors"}
PUBLISHED = {
    "mri-autoencoder": Published(
        kind="2D autoencoder of MR images, to begin a training from",
        reference=hub.Reference(
            "microsoft/mri-autoencoder-v0.1", "main", "diffusion_pytorch_model.safetensors"
        ),
        licence="MIT",
        size_mb=221,
    )
}


def locate(name: str | os.PathLike[str]) -> Path:
    """The file that a name, a path, or `hf://org/repo@revision/file.safetensors` stands for.

    The last is downloaded where the cache does not hold it. A name is not: without its file, WeightsError.
    """
    text = os.fspath(name)
    if text in SHIPPED:
        return Path(str(files("ctsr.weights") / SHIPPED[text]))
    if text.startswith("hf://"):
        return hub.resolve(text)
    if (entry := PUBLISHED.get(text)) is not None:
        hub.read(entry.reference, hub.cache_folder(), sha256=entry.sha256)
        return entry.reference.under(hub.cache_folder())
    return Path(name)


def load_model(name: str | os.PathLike[str], *, kind: str) -> tuple[nn.Module, ModelFile]:
    """The network that `name` (shipped, or a path) stands for, and its file's card.

    Raises WeightsError where the file is missing, damaged, foreign or of another kind: never random weights.
    """
    from ctsr.models import zoo

    file = zoo.unpack(read_weights(name), os.fspath(name))
    if file.kind != kind:
        raise WeightsError(f"a model of kind {file.kind}, expected {kind}", path=name)
    return zoo.build(file, os.fspath(name)), file


def read_weights(name: str | os.PathLike[str]) -> bytes:
    """The bytes of the file that a name or path stands for, whatever they are; WeightsError where there is none."""
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
    return data
