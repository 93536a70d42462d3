"""The file format of a model: one `.safetensors`, kind, configuration and card in its metadata. Never pickle.

A diffusion's card names the files it was trained for, by sha256: its latents mean nothing to another VAE.

Tensors named `train/…` are a training's own state; whoever wants the network passes them by.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ctsr.errors import WeightsError
from ctsr.models.control import ControlledUNet
from ctsr.models.latent_unet import LatentUNetConfig
from ctsr.models.simple_unet3d import SimpleUNet3D, SimpleUNet3DConfig
from ctsr.models.vae import CtVae, VaeConfig

__all__ = [
    "DEPENDS",
    "FORMAT",
    "TRAINING",
    "ModelFile",
    "build",
    "pack",
    "read_header",
    "read_tensors",
    "unpack",
]

FORMAT = "1"
TRAINING = "train/"
HEADER_LIMIT = 1 << 20  # bytes, some 10,000 tensors; 99 MB of spaces are a legal header too
CHANNELS_LIMIT = 4096
LEVELS_LIMIT = 8

_KINDS: dict[str, tuple[type[nn.Module], type]] = {
    "baseline": (SimpleUNet3D, SimpleUNet3DConfig),
    "diffusion": (ControlledUNet, LatentUNetConfig),
    "vae": (CtVae, VaeConfig),
}
DEPENDS = {"diffusion": ("vae_sha256", "stage_one_sha256")}  # entries that its card must have
_FOREIGN = [
    (b"PK\x03\x04", "a pickle in a zip (torch.save), not safetensors: not opened, it could run code"),
    (b"\x80", "a pickle, not safetensors: not opened, it could run code"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights"),
    (b"<", "a web page, not weights"),
]


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What a model file holds. sha256: of the file's bytes."""

    kind: str
    config: dict[str, Any]
    card: dict[str, Any]
    tensors: dict[str, Tensor]
    training: dict[str, Tensor] = field(default_factory=dict)
    sha256: str = ""


def pack(
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    card: Mapping[str, Any],
    training: Mapping[str, Tensor] | None = None,
) -> bytes:
    """The bytes of a model file; the same content gives the same bytes.

    card: JSON values (trained_on, licence, command, seed, metrics, ranges …); for a diffusion, `DEPENDS` among them.
    """
    if nameless := _nameless(kind, card):
        raise ValueError(f"the card of a {kind} names no {nameless}")
    metadata = {
        "ctsr.format": FORMAT,
        "kind": kind,
        "config": json.dumps(config, sort_keys=True, allow_nan=False),
        "card": json.dumps(card, sort_keys=True, allow_nan=False),
    }
    named = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    named |= {TRAINING + name: t.detach().cpu().contiguous() for name, t in (training or {}).items()}
    data = safetensors.torch.save(named, metadata=metadata)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = metadata  # written in the order of a hash table, another in every process
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def unpack(data: bytes, path: str) -> ModelFile:
    """Check the bytes of a model file and take it apart. Raises WeightsError; `path` is for its message."""
    header = read_header(data, path)
    texts = header.get("__metadata__")
    if not isinstance(texts, dict) or not all(isinstance(v, str) for v in texts.values()):
        texts = {}
    if "ctsr.format" not in texts:
        raise WeightsError("not a ctsr model (no ctsr.format in its header)", path=path)
    if (made_as := texts["ctsr.format"]) != FORMAT:
        hint = "made by another version of ctsr"
        raise WeightsError(f"model format {made_as}, expected {FORMAT}", path=path, hint=hint)
    kind = texts.get("kind", "")
    if kind not in _KINDS:
        raise WeightsError(f"a model of kind {kind!r}, expected one of {', '.join(_KINDS)}", path=path)
    try:
        config, card = (_strict_json(texts.get(key, "{}")) for key in ("config", "card"))
    except (ValueError, RecursionError) as exc:
        raise WeightsError(f"its configuration is not strict JSON: {exc}", path=path) from exc
    if not isinstance(config, dict) or not isinstance(card, dict):
        raise WeightsError("its configuration is no JSON object", path=path)
    if nameless := _nameless(kind, card):
        raise WeightsError(f"its card names no {nameless} (64 hexadecimal digits)", path=path)
    tensors = read_tensors(data, header, path)
    training = {n.removeprefix(TRAINING): tensors.pop(n) for n in list(tensors) if n.startswith(TRAINING)}
    return ModelFile(kind, config, card, tensors, training, hashlib.sha256(data).hexdigest())


def read_tensors(
    data: bytes, header: Mapping[str, Any], path: str, *, dtypes: Sequence[str] = ("F32",)
) -> dict[str, Tensor]:
    """All tensors of the bytes that `header` begins, finite and of the types named; else WeightsError."""
    for name, entry in header.items():
        if name != "__metadata__" and entry.get("dtype") not in dtypes:
            raise WeightsError(
                f"tensor {name} is {entry.get('dtype')}, expected {', '.join(dtypes)}", path=path
            )
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as exc:
        raise WeightsError(f"damaged or truncated weights: {exc}", path=path) from exc
    if broken := [name for name, t in tensors.items() if not torch.isfinite(t).all()]:
        raise WeightsError(f"{len(broken)} tensors are not finite, the first is {broken[0]}", path=path)
    return tensors


def build(file: ModelFile, path: str) -> nn.Module:
    """The network of a model file, weights loaded, in `eval` mode; WeightsError where they do not fit."""
    make, config_type = _KINDS[file.kind]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in file.config.items()}
    lists = [v if isinstance(v, tuple) else (v,) for v in values.values()]
    try:
        if not all(isinstance(n, int | float) and 0 < n <= CHANNELS_LIMIT for v in lists for n in v):
            raise ValueError(f"a value outside 0…{CHANNELS_LIMIT}: {file.config}")
        if not all(1 <= len(v) <= LEVELS_LIMIT for v in lists):
            raise ValueError(f"not 1…{LEVELS_LIMIT} levels: {file.config}")
        config = config_type(**values)
        with torch.device("meta"):  # shapes alone: nothing is allocated before they fit the file
            network = make(config)
            expected = {n: tuple(t.shape) for n, t in network.state_dict().items()}
    except (TypeError, ValueError, RuntimeError) as exc:
        raise WeightsError(f"its configuration makes no network: {exc}", path=path) from exc
    found = {n: tuple(t.shape) for n, t in file.tensors.items()}
    wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    if wrong:
        shown = "; ".join(
            f"{n}: {found.get(n, 'missing')}, expected {expected.get(n, 'none')}" for n in wrong[:3]
        )
        raise WeightsError(f"{len(wrong)} tensors do not fit its configuration: {shown}", path=path)
    network.load_state_dict(file.tensors, strict=True, assign=True)  # no second copy, no random start
    return network.eval()


def _nameless(kind: str, card: Mapping[str, Any]) -> str:
    """The first file that a model of this kind depends on and its card doesn't name; "": none."""
    wanted = DEPENDS.get(kind, ())
    return next((n for n in wanted if not re.fullmatch("[0-9a-f]{64}", str(card.get(n)))), "")


def read_header(data: bytes, path: str) -> dict[str, Any]:
    """The safetensors header, checked before anything is allocated for it."""
    if data[8:9] != b"{":  # else the first bytes are a length, whatever they look like
        for magic, reason in _FOREIGN:
            if data.startswith(magic):
                raise WeightsError(reason, path=path)
    if len(data) < 8:
        raise WeightsError(f"truncated weights: {len(data)} bytes", path=path)
    (length,) = struct.unpack("<Q", data[:8])
    if length > HEADER_LIMIT:
        raise WeightsError(f"not safetensors: its header would have {length:,} bytes", path=path)
    if 8 + length > len(data):
        raise WeightsError(
            f"truncated weights: {len(data):,} bytes, the header alone needs {8 + length:,}", path=path
        )
    try:
        header = _strict_json(data[8 : 8 + length].decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise WeightsError(f"not safetensors: {exc}", path=path) from exc
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise WeightsError("not safetensors: its header is no table of tensors", path=path)
    return header


def _strict_json(text: str) -> Any:
    """JSON without what Python's reader lets through: duplicates (the last wins), NaN, Infinity, 1e999."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(table := dict(pairs)) != len(pairs):
            raise ValueError("a key stands twice")
        return table

    def finite(word: str) -> float:
        if not math.isfinite(value := float(word)):
            raise ValueError(f"{word} is not JSON")
        return value

    return json.loads(text, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
