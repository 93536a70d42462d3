"""Pairs of latents on disk: a file a pair, of what stage one made of thick slices, and of what it lacks.

`FOLDER/SCAN/x3-0.safetensors` is the first pair of that scan at factor 3. Beside the latents lies an excerpt in HU, on
which trainings are validated: they need neither the scans nor stage one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ctsr.core.zgrid import ZGrid
from ctsr.errors import InputError, WeightsError
from ctsr.io.atomic import write_bytes

__all__ = ["LatentPair", "PairRecord", "Stamp", "check_stamps", "excerpt_box", "write_pair"]

FORMAT = 1
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# r = x₀ − y₀: the difference in fp16 would be half rounding where it is a thousandth of y₀
LATENTS = ("y0", "r")
EXCERPT = ("truth", "stage_one", "body")  # int16 HU, int16 HU, a mask; (D, H, W) each
EXCERPT_SIZE = (48, 96, 96)  # voxels at most; 4 samples of 15 steps take two cores some 20 s
Triple = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """Whose latents they are. recipe: a digest that stage ones trained alike, on other scans, share."""

    vae_sha256: str
    stage_one_sha256: str
    recipe: str
    is_out_of_fold: bool  # this stage one was not trained on this scan


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecord:
    """How a pair came about. content: sha256 of the scan's voxels; rho: thickness over spacing of the thick slices."""

    stamp: Stamp
    content: str
    factor: int
    rho: float
    n: int  # thick slices
    spacing: float  # of the thin slices, mm
    pixel: float  # mm
    flips: tuple[bool, bool, bool]
    strides: Triple  # image voxels a latent voxel
    corner: Triple  # the excerpt's, in latent voxels
    dtype: str
    seed: int
    mean_square: tuple[float, ...] = ()  # of the residual, by channel

    @property
    def grid(self) -> ZGrid:
        """The thin slices that belong to the thick ones."""
        return ZGrid(self.n, float(self.factor))

    def difference(self, other: PairRecord) -> str:
        """The first entry in which another pair was made otherwise, with both values; "" where none."""
        a, b = asdict(self), asdict(other)
        return next((f"{k}: {a[k]}, now {b[k]}" for k in a if k != "mean_square" and a[k] != b[k]), "")


@dataclass(frozen=True, slots=True)
class LatentPair:
    """A pair file, of which only the header was read. name: of the scan; shape: (C, d, h, w) of each latent."""

    path: Path
    name: str
    record: PairRecord
    shape: tuple[int, int, int, int]

    @property
    def content(self) -> str:
        """sha256 of the scan's voxels."""
        return self.record.content

    @classmethod
    def open(cls, path: Path, name: str = "") -> LatentPair:
        """Raises InputError where the file is no pair of latents, damaged, or its parts do not fit each other."""
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                told: dict[str, Any] = json.loads((file.metadata() or {})["ctsr.latents"])
                shapes = {k: tuple(file.get_slice(k).get_shape()) for k in (*LATENTS, *EXCERPT)}
            if told.pop("format") != FORMAT:
                raise ValueError("made by another version of ctsr")
            told = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
            record = PairRecord(**{**told, "stamp": Stamp(**told["stamp"])})
            c, d, h, w = shapes["y0"]
            m, (z, y, x) = record.grid.m, record.strides
            ends = [a * s + n for a, s, n in zip(record.corner, record.strides, shapes["truth"], strict=True)]
            if (
                shapes["r"] != (len(record.mean_square), -(-m // z), h, w)
                or shapes["r"] != shapes["y0"]
                or len({shapes[k] for k in EXCERPT}) > 1
                or any(end > n for end, n in zip(ends, (m, h * y, w * x), strict=True))
            ):
                raise ValueError(f"its parts do not fit each other: {shapes}")
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as exc:
            hint = "encode it again"
            raise InputError(f"no pair of latents, or damaged: {exc}", path=path, hint=hint) from exc
        return cls(path, name, record, (c, d, h, w))

    @classmethod
    def find(cls, folder: Path, name: str) -> list[LatentPair]:
        """All pairs of a scan; may be empty."""
        return [cls.open(path, name) for path in sorted((folder / name).glob("x*.safetensors"))]

    def read(self, corner: Sequence[int], size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A part of y₀ and of r, (C, *size) float32 each; InputError where a value is not finite."""
        z, y, x = (slice(c, c + n) for c, n in zip(corner, size, strict=True))
        with safetensors.safe_open(self.path, framework="pt") as file:
            y0, r = (file.get_slice(name)[:, z, y, x].float() for name in LATENTS)
        if not (y0.isfinite().all() and r.isfinite().all()):
            raise InputError("latents that are not finite", path=self.path, hint="encode it again")
        return y0, r

    def excerpt(self) -> list[np.ndarray]:
        """Truth, stage one and the body's mask."""
        with safetensors.safe_open(self.path, framework="pt") as file:
            return [file.get_tensor(name).numpy() for name in EXCERPT]


def excerpt_box(record: PairRecord, body: np.ndarray) -> tuple[Triple, Triple]:
    """Corner, in latent voxels, and size, in voxels, of the excerpt from the middle of a volume.

    body: its mask (D, H, W); where there is none of it in the middle, as between two legs, the excerpt lies about the
    middle one of its voxels. Its borders are borders of thick slices and of latent voxels.
    """
    corner, lengths = _box_about(record, body.shape, [n // 2 for n in body.shape])
    cut = (slice(c * s, c * s + n) for c, s, n in zip(corner, record.strides, lengths, strict=True))
    if not body[*cut].any() and (where := np.flatnonzero(body)).size:
        return _box_about(record, body.shape, np.unravel_index(where[len(where) // 2], body.shape))
    return corner, lengths


def _box_about(
    record: PairRecord, size: Sequence[int], middle: Sequence[SupportsInt]
) -> tuple[Triple, Triple]:
    corner, lengths = [], []
    steps = (record.factor, 1, 1)
    for n, at, most, stride, step in zip(size, middle, EXCERPT_SIZE, record.strides, steps, strict=True):
        unit = math.lcm(stride, step)
        lengths.append(min(n, max(unit, most // unit * unit)))
        start = min(max(0, int(at) - lengths[-1] // 2), n - lengths[-1])
        corner.append(start // unit * unit // stride)
    return (corner[0], corner[1], corner[2]), (lengths[0], lengths[1], lengths[2])


def write_pair(
    path: Path,
    record: PairRecord,
    latents: Sequence[Tensor],
    excerpt: Sequence[np.ndarray],
    *,
    overwrite: bool,
) -> None:
    """Write y₀ and r, and truth, stage one and mask; the same content gives the same bytes."""
    kept = {name: t.to(DTYPES[record.dtype]) for name, t in zip(LATENTS, latents, strict=True)}
    if not all(t.isfinite().all() for t in kept.values()):
        hint = "--dtype bf16 has the range of fp32"
        raise WeightsError(f"the latents are not finite as {record.dtype}", path=path, hint=hint)
    for name, part in zip(EXCERPT, excerpt, strict=True):
        stored = part if part.dtype == bool else np.rint(part).clip(-32768, 32767).astype(np.int16)
        kept[name] = torch.from_numpy(np.ascontiguousarray(stored))
    told = json.dumps(asdict(record) | {"format": FORMAT}, sort_keys=True, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, safetensors.torch.save(kept, metadata={"ctsr.latents": told}), overwrite=overwrite)


def check_stamps(stamps: Iterable[tuple[Path, Stamp]]) -> None:
    """WeightsError where latents do not belong together: all are of one autoencoder, and of one stage one.

    Stage ones may be several where each is of the same recipe and none has seen the scans that it worked on.
    """
    first: tuple[Path, Stamp] | None = None
    for path, stamp in stamps:
        other, one = first = first or (path, stamp)
        are_folds = stamp.recipe == one.recipe and stamp.is_out_of_fold and one.is_out_of_fold
        if stamp.vae_sha256 != one.vae_sha256:
            what, found, expected = "VAE", stamp.vae_sha256, one.vae_sha256
        elif stamp.stage_one_sha256 != one.stage_one_sha256 and not are_folds:
            what, found, expected = "stage one", stamp.stage_one_sha256, one.stage_one_sha256
        else:
            continue
        raise WeightsError(
            f"latents of the {what} {found[:12]}…, those of {other} are of {expected[:12]}…",
            path=path,
            hint="encode all with the same, into another --output-dir",
        )
