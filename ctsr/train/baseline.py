"""What a step of SimpleUNet3D is: pairs, the loss through the projection, validation beside cubic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ctsr.core.zgrid import ZGrid, thick_count
from ctsr.data.pairs import PairRecipe, PairSource, TrainVolume
from ctsr.data.volumes import fingerprint
from ctsr.errors import InputError
from ctsr.metrics.fidelity import PEAK, psnr
from ctsr.metrics.masks import body_mask
from ctsr.models.simple_unet3d import SimpleUNet3D
from ctsr.physics.operator import apply_along_z
from ctsr.physics.profile import SliceProfile
from ctsr.physics.projection import doubling
from ctsr.physics.zmatrix import interpolation_matrix
from ctsr.train.loop import Heed
from ctsr.train.muon import Muon

__all__ = ["BaselineTask"]


@dataclass(frozen=True, slots=True)
class _Loss:
    """L1 + SSIM + gradient along z. HU in units of 100."""

    softness: float = 60.0  # HU: below this an error counts by its square, above by its size
    gradient: float = 0.2
    ssim: float = 0.5
    ends: int = 4  # thin slices at either end of a patch, where half of the kernel saw nothing …
    ends_weight: float = 0.25  # … count this much
    ssim_rows: int = 8  # every so many image rows is looked at as a coronal plane


class _Case:
    """A validation volume, where it is measured, and what cubic and `inverse` make of it."""

    def __init__(self, volume: TrainVolume) -> None:
        truth, thick, start, _ = _doubled(volume)
        try:
            self.body = body_mask(truth)
        except InputError as exc:
            raise InputError(exc.reason, path=volume.name, hint="nothing to validate on in it") from exc
        cubic = apply_along_z(interpolation_matrix("cubic", ZGrid(len(thick), 2.0)), thick)
        self.volume, self.db = volume, [psnr(x, truth, self.body, peak=PEAK) for x in (cubic, start)]
        if not math.isfinite(sum(self.db)):
            raise InputError("nothing to validate on: cubic rebuilds it without an error", path=volume.name)


class _Pairs(Dataset[dict[str, Any]]):
    def __init__(self, source: PairSource) -> None:
        self.source = source

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.source.pair(index)
        return {
            "truth": pair.truth[None],
            "thick": pair.thick[None],
            "inverse": pair.inverse[None],
            "null": pair.null,
            "rho": np.float32(pair.rho),
        }


class BaselineTask:
    """Pairs, loss and validation of the slice-doubling network."""

    kind = "baseline"
    optimizer: type[torch.optim.AdamW] = Muon

    def __init__(
        self,
        model: SimpleUNet3D,
        train: Sequence[TrainVolume],
        val: Sequence[TrainVolume],
        *,
        recipe: PairRecipe,
        seed: int,
        card: Mapping[str, Any],
    ) -> None:
        self.model: nn.Module = model
        self.card = card
        self.config: Mapping[str, Any] = model.config.to_dict()
        scans = {"train": fingerprint(train), "val": fingerprint(val)}
        self.recipe: Mapping[str, Any] = {"pairs": asdict(recipe), "loss": asdict(_Loss()), **scans}
        self.source = PairSource(train, recipe, seed=seed)
        self.dataset: Dataset[dict[str, Any]] = _Pairs(self.source)
        self.cases = [_Case(volume) for volume in val]

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Of the projected result: what the measurement determines is no business of the network."""
        residual = model(batch["thick"], batch["inverse"], batch["rho"])
        with torch.autocast(residual.device.type, enabled=False):
            result = batch["inverse"] + _along_z(batch["null"], residual.float())
            return _distance(result / 100, batch["truth"] / 100)

    def validate(self, model: nn.Module, heed: Heed) -> dict[str, float]:
        """Doubling at t/s = 1 over the validation set: mean PSNR, what it gains, RMS of the residual.

        gain_db is over cubic, added_db over `inverse`, which the network stands on; all on the same voxels.
        """
        scores, residuals = [], []
        for case in self.cases:
            truth, thick, start, null = _doubled(case.volume)
            pieces = []
            for piece in model.stream(thick, start, 1.0, chunk=16):  # type: ignore[operator]
                heed()
                pieces.append(piece)
            change = apply_along_z(null, np.concatenate(pieces))
            scores.append(psnr(start + change, truth, case.body, peak=PEAK))
            residuals.append(float(np.sqrt(np.mean(np.square(change[case.body], dtype=np.float64)))))
        ours = float(np.mean(scores))
        cubic, inverse = np.mean([case.db for case in self.cases], axis=0).tolist()
        return {
            "psnr_4095_db": ours,
            "cubic_psnr_4095_db": cubic,
            "gain_db": ours - cubic,
            "added_db": ours - inverse,
            "residual_rms_hu": float(np.mean(residuals)),
        }


def _doubled(volume: TrainVolume) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Truth (2n, H, W), thick (n, H, W), `inverse` (2n, H, W) and I − P A at t/s = 1."""
    n, spacing = thick_count(len(volume.hu), 2.0), 2 * volume.spacing[0]
    truth = volume.hu[: 2 * n].astype(np.float32)
    A, inverse, null = doubling(n, SliceProfile(), spacing=spacing, thickness=spacing)
    thick = apply_along_z(A, truth)
    return truth, thick, apply_along_z(inverse, thick), null


def _distance(result: Tensor, truth: Tensor) -> Tensor:
    w = _Loss()
    share = torch.ones(truth.shape[2], device=truth.device)
    share[: w.ends] = share[-w.ends :] = w.ends_weight
    share = share.view(1, 1, -1, 1, 1) / share.mean()
    error = result - truth
    loss = (_soft(error, w.softness / 100) * share).mean()
    loss = loss + w.gradient * (_soft(error.diff(dim=2), w.softness / 100) * share[:, :, 1:]).mean()
    planes = (t[:, 0, :, :: w.ssim_rows].transpose(1, 2).flatten(0, 1)[:, None] for t in (result, truth))
    return loss + w.ssim * (1 - _ssim(*planes, data_range=PEAK / 100))


def _along_z(matrix: Tensor, x: Tensor) -> Tensor:
    """(B, m, m) times (B, 1, m, H, W)."""
    return torch.bmm(matrix, x.reshape(len(x), x.shape[2], -1)).view_as(x)


def _soft(error: Tensor, softness: float) -> Tensor:
    """√(e² + s²) − s: the L1 distance, rounded off below s."""
    return torch.sqrt(error.square() + softness**2) - softness


def _ssim(x: Tensor, y: Tensor, *, data_range: float) -> Tensor:
    """Mean SSIM of (B, 1, H, W); Wang 2004: Gaussian σ = 1.5, 11 taps, K1 = .01, K2 = .03."""
    taps = torch.exp(-0.5 * ((torch.arange(11, device=x.device) - 5) / 1.5) ** 2)
    taps = (taps / taps.sum()).to(x.dtype)

    def blur(t: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(t, taps.view(1, 1, 1, 11)), taps.view(1, 1, 11, 1))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (numerator / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean()
