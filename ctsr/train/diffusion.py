"""What a step of the diffusion is: patches of latent pairs under noise, and validation in HU as `upsample` works.

A sample's decoded difference from stage one, through the projection, is its detail; the result is

    stage one + gain · mean of the details of K samples.

The gain that fits the truth best, and the factor from the spread of K samples to their error, are measured at each
validation and stored with its weights; they hold for that sampler, number of steps and K alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ctsr.core.zgrid import ZGrid
from ctsr.data.latents import LatentPair
from ctsr.diffusion.sampler import noise_source
from ctsr.diffusion.schedule import Schedule, diffuse, noise_level
from ctsr.errors import InputError
from ctsr.metrics.fidelity import PEAK, psnr
from ctsr.models.control import ControlledUNet, slice_maps
from ctsr.physics.operator import apply_along_z, grid_operator
from ctsr.physics.profile import SliceProfile
from ctsr.physics.projection import projection_matrix, projector
from ctsr.physics.zmatrix import interpolation_matrix
from ctsr.train.loop import Heed

__all__ = ["Change", "DiffusionTask", "Regression", "residual_rms", "validated_pairs"]

Change = Callable[..., np.ndarray]
"""(stage one (m, H, W), network, *, grid, rho, progress) → what each of K samples adds to it before the projection,
(K, m, H, W) float32, HU."""
STRATIFIED = 64  # successive samples whose noise levels are spread evenly
VALIDATED = 8  # pairs; two cores take some 30 s for each
SMALLEST = 1e-5  # of a residual's size: a channel in which stage one lacks nothing still has one
PROBED = 5  # noise levels at which the error of r̂ is measured


@dataclass(frozen=True, slots=True)
class Regression(Schedule):
    """The noisiest level alone: the network learns the mean of x₀ given y₀, the T = 1 of every schedule."""

    def levels(self, n_steps: int) -> np.ndarray:
        return np.array([self.sqrt_eta_T])

    def draw(self, generator: np.random.Generator, n: int) -> np.ndarray:
        return np.full(n, self.sqrt_eta_T)


class _Patches(Dataset[dict[str, Any]]):
    """Patches of latent voxels (D, H, W) under noise; the one of an index is a function of (seed, index)."""

    def __init__(
        self,
        pairs: Sequence[LatentPair],
        patch: Sequence[int],
        path: Schedule,
        sigma: Tensor,
        dropout: float,
        seed: int,
    ) -> None:
        self.pairs, self.path, self.sigma, self.dropout, self.seed = pairs, path, sigma, dropout, seed
        self.patch = [min(n, *(p.shape[1 + axis] for p in pairs)) for axis, n in enumerate(patch)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, index])
        pair = self.pairs[int(rng.integers(len(self.pairs)))]
        corner = [int(rng.integers(n - p + 1)) for n, p in zip(pair.shape[1:], self.patch, strict=True)]
        y0, r = pair.read(corner, self.patch)
        eps = self.sigma * torch.from_numpy(rng.standard_normal(tuple(y0.shape), np.float32))
        block = np.random.default_rng([self.seed, index // STRATIFIED, 1])
        level = self.path.draw(block, STRATIFIED)[index % STRATIFIED, None]
        return {
            "x_t": y0 + diffuse(self.path, r[None], eps[None], level)[0],
            "y0": y0,
            "r": r,
            "tau": torch.tensor(noise_level(level[0]), dtype=torch.float32),
            "null": torch.tensor(rng.random() < self.dropout),
            **_conditions(pair, corner[0], self.patch[0]),
        }


class _Case:
    """The excerpt of a validation pair; stage one through the projection, and cubic, from the same thick slices."""

    def __init__(self, pair: LatentPair) -> None:
        record = pair.record
        truth, self.stage_one, self.body = pair.excerpt()
        size = [-(-n // s) for n, s in zip(truth.shape, record.strides, strict=True)]
        self.y0, self.r = pair.read(record.corner, size)
        self.conditions = _conditions(pair, record.corner[0], size[0])
        self.grid, self.rho = ZGrid(len(truth) // record.factor, float(record.factor)), record.rho
        spacing = record.factor * record.spacing
        if not self.body.any():
            raise InputError(
                "nothing of the body in its excerpt", path=pair.path, hint="take its scan off the list"
            )
        A = grid_operator(self.grid, SliceProfile(), spacing=spacing, thickness=record.rho * spacing)
        P = projection_matrix(A)
        thick = apply_along_z(A, truth)
        self.null = projector(A, P)
        start = apply_along_z(self.null, self.stage_one) + apply_along_z(P, thick)
        cubic = apply_along_z(interpolation_matrix("cubic", self.grid), thick)
        self.db = [psnr(x, truth, self.body, peak=PEAK) for x in (cubic, start)]
        self.missing = (truth - start)[self.body].astype(np.float64)

    def moments(self, changes: np.ndarray, counts: Sequence[int]) -> list[list[float]]:
        """For each k of counts, means over the body of e², e·m, m², (e − m)² and the variance of k samples.

        e: what stage one lacks; m: the mean of what k samples add to it through the projection. For k = 1 each sample
        counts, not the first alone.
        """
        e = self.missing
        details = np.stack([apply_along_z(self.null, c)[self.body].astype(np.float64) for c in changes])
        found = []
        for k in counts:
            m = details if k == 1 else details[:k].mean(axis=0, keepdims=True)
            variance = details[:k].var(axis=0, ddof=1) if k > 1 else np.zeros(1)
            found.append([float(p.mean()) for p in (e * e, m * e, m * m, (e - m) ** 2, variance)])
        return found


class DiffusionTask:
    """Patches, loss and validation of the diffusion."""

    kind = "diffusion"
    optimizer = torch.optim.AdamW

    def __init__(
        self,
        model: ControlledUNet,
        train: Sequence[LatentPair],
        val: Sequence[LatentPair],
        *,
        path: Schedule,
        sampling: Mapping[str, Any],
        change: Change,
        patch: Sequence[int],
        weights: np.ndarray,
        dropout: float,
        seed: int,
        card: Mapping[str, Any],
    ) -> None:
        """patch: latent voxels (D, H, W), less where the smallest pair is. dropout: share of guidance's null.

        weights: (C,) of a channel's squared error: what it is worth in HU², over the mean of that of the residual.
        sampling: sampler, num_steps and samples, which `change` draws with.
        """
        self.model: nn.Module = model
        self.config: Mapping[str, Any] = model.config.to_dict()
        self.path, self.sampling, self.change, self.card = path, sampling, change, card
        self.weights = torch.as_tensor(weights, dtype=torch.float32).view(-1, 1, 1, 1)
        patches = _Patches(train, patch, path, model.base.sigma[0].cpu(), dropout, seed)
        self.dataset: Dataset[dict[str, Any]] = patches
        self.recipe: Mapping[str, Any] = {
            "patch": patches.patch,
            "guidance_dropout": dropout,
            "schedule": asdict(path),
            "sampling": dict(sampling),
            "train": _fingerprint(train),
            "val": _fingerprint(val),
        }
        self.cases = [_Case(pair) for pair in validated_pairs(val)]

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean square of r̂ − r over that of r, channels by their worth in HU: 1 where nothing is predicted."""
        told = {name: batch[name] for name in ("factor", "rho", "maps", "null")}
        made: Tensor = model(batch["x_t"], batch["y0"], batch["tau"], **told)
        with torch.autocast(made.device.type, enabled=False):
            return self._size(made.float() - batch["r"])

    def validate(self, model: nn.Module, heed: Heed) -> dict[str, float]:
        """PSNR of stage one + gain · mean detail, beside cubic and stage one on the same voxels; gain and spread.

        gain_db is over cubic, added_db over stage one. denoising_error: of r̂ over that of predicting no residual, a
        mean over noise levels.
        """
        assert isinstance(model, ControlledUNet)
        most = self.sampling["samples"]
        counts = sorted({1 << i for i in range(most.bit_length())} | {most})
        errors, moments = [], []
        for number, case in enumerate(self.cases):
            changes = self.change(case.stage_one, model, grid=case.grid, rho=case.rho, progress=heed)
            moments.append(case.moments(changes, counts))
            errors.append(self._denoising_error(model, case, number))
        of = np.array(moments)  # (cases, counts, 5)
        fitted: dict[str, float] = {}
        for k, (_, both, square, error, spread) in zip(counts, of.sum(axis=0), strict=True):
            gain = float(np.clip(both / square, 0, 1)) if square > 0 else 0.0
            fitted[f"detail_gain_{k}"] = gain
            fitted[f"spread_factor_{k}"] = math.sqrt(error / spread) if spread > 0 else 1.0
        cubic, stage_one = np.mean([case.db for case in self.cases], axis=0).tolist()
        ours = _psnr(of[:, -1], gain)
        return {
            "psnr_4095_db": ours,
            "cubic_psnr_4095_db": cubic,
            "stage_one_psnr_4095_db": stage_one,
            "mean_psnr_4095_db": _psnr(of[:, -1], 1.0),
            "sample_psnr_4095_db": _psnr(of[:, 0], 1.0),
            "gain_db": ours - cubic,
            "added_db": ours - stage_one,
            "residual_rms_hu": math.sqrt(float(of[:, -1, 2].mean())),
            "denoising_error": float(np.mean(errors)),
            "detail_gain": gain,
            **fitted,
        }

    def _denoising_error(self, model: ControlledUNet, case: _Case, number: int) -> float:
        device, levels = next(model.parameters()).device, self.path.levels(PROBED)
        n = len(levels)
        y0, r = (t.to(device).expand(n, *t.shape) for t in (case.y0, case.r))
        noise = model.noise(noise_source(case.y0.shape, seed=number, samples=range(n), device=device))
        x_t = y0 + diffuse(self.path, r, noise(0), levels)
        tau = torch.tensor(noise_level(levels), dtype=torch.float32, device=device)
        told = {name: t.to(device).expand(n, *t.shape) for name, t in case.conditions.items()}
        return float(self._size(model(x_t, y0, tau, **told) - r) / self._size(r))

    def _size(self, r: Tensor) -> Tensor:
        """Mean square of (B, C, d, h, w), the channels weighted."""
        return (self.weights.to(r) * r.square()).mean()


def residual_rms(pairs: Sequence[LatentPair]) -> np.ndarray:
    """σ_r: root mean square of the residual over all pairs, by channel, (C,) float64."""
    weights = [math.prod(p.shape) for p in pairs]
    mean_square = np.average([p.record.mean_square for p in pairs], axis=0, weights=weights)
    return np.maximum(np.sqrt(mean_square), SMALLEST)  # type: ignore[no-any-return]


def validated_pairs(pairs: Sequence[LatentPair]) -> list[LatentPair]:
    """At most 8: one of each scan in turn, another factor from scan to scan."""
    of_scan: dict[str, list[LatentPair]] = {}
    for pair in pairs:
        of_scan.setdefault(pair.name, []).append(pair)
    turns = [
        (turn, scan, found[(scan + turn) % len(found)])
        for scan, found in enumerate(of_scan.values())
        for turn in range(len(found))
    ]
    return [pair for *_, pair in sorted(turns, key=lambda t: t[:2])[:VALIDATED]]


def _conditions(pair: LatentPair, start: int, depth: int) -> dict[str, Tensor]:
    record = pair.record
    return {
        "factor": torch.tensor(float(record.factor)),
        "rho": torch.tensor(record.rho, dtype=torch.float32),
        "maps": slice_maps(record.grid, record.strides[0])[:, start : start + depth],
    }


def _psnr(moments: np.ndarray, gain: float) -> float:
    """Mean over the cases, of stage one + gain · m."""
    square = moments[:, 0] - 2 * gain * moments[:, 1] + gain**2 * moments[:, 2]
    square = np.maximum(square, 1e-12)  # HU²; what cancels in full is rounding
    return float(np.mean(20 * np.log10(PEAK) - 10 * np.log10(square)))


def _fingerprint(pairs: Sequence[LatentPair]) -> str:
    facts = [asdict(p.record) for p in pairs]
    return f"{len(pairs)} pairs {hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"
