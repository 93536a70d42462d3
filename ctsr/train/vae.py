"""What a step of the autoencoder is: thin volumes and restored ones, losses in HU, the round trip of whole scans."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ctsr.data.pairs import PairRecipe, PairSource, TrainVolume
from ctsr.data.volumes import fingerprint
from ctsr.errors import InputError
from ctsr.metrics.fidelity import PEAK, Difference, difference, psnr
from ctsr.metrics.masks import Regions
from ctsr.models.vae import CtVae, kl
from ctsr.train.loop import Heed
from ctsr.train.muon import Muon

__all__ = ["BlockTransform", "RoundTrip", "VaeLoss", "VaeTask", "usual_kl_weight"]

RoundTrip = Callable[[CtVae, np.ndarray, Heed], np.ndarray]
"""What the network makes of a scan (D, H, W) in HU through its posterior means."""


@dataclass(frozen=True, slots=True)
class VaeLoss:
    """L1 + L1 of the gradient along z + L1 of block means + KL, all means over elements, in the network's unit.

    No perceptual and no adversarial term: they buy texture with HU.
    """

    kl: float
    gradient: float = 0.5
    bias: float = 1.0
    block: tuple[int, int, int] = (4, 16, 16)  # voxels; noise of 30 HU leaves a mean of 1 HU in so many


def usual_kl_weight(model: CtVae) -> float:
    """The weight that 1e-6 is where KL and error are sums: of means, it is so much for each latent a voxel has."""
    return 1e-6 * model.latent_channels / math.prod(model.strides)


class BlockTransform:
    """The linear autoencoder of the network's size: Karhunen–Loève of blocks, the best few coefficients kept.

    What does not beat it is not trained. Learned on all blocks of the scans that are trained on.
    """

    def __init__(self, volumes: Iterable[np.ndarray], block: tuple[int, int, int], keep: int) -> None:
        self.block = block
        n, total, second = 0, 0.0, 0.0
        for hu in volumes:
            for rows in self._rows(hu):
                n, total, second = n + len(rows), total + rows.sum(axis=0), second + rows.T @ rows
        self.mean = np.asarray(total / n)
        _, vectors = np.linalg.eigh(second / n - np.outer(self.mean, self.mean))
        self.basis = vectors[:, -keep:]

    def round_trip(self, hu: np.ndarray) -> np.ndarray:
        """(D, H, W) in HU → the same, float32."""
        a, b, c = self.block
        out = []
        for rows in self._rows(hu):
            back = self.mean + (rows - self.mean) @ self.basis @ self.basis.T
            across = -(-hu.shape[2] // c)
            slab = back.reshape(-1, across, a, b, c).transpose(2, 0, 3, 1, 4).reshape(a, -1, across * c)
            out.append(slab[:, : hu.shape[1], : hu.shape[2]].astype(np.float32))
        return np.concatenate(out)[: len(hu)]

    def _rows(self, hu: np.ndarray) -> Iterable[np.ndarray]:
        """The blocks (n, a·b·c) float64 of a slab of slices each; the last slices, rows, columns are repeated."""
        a, b, c = self.block
        for start in range(0, len(hu), a):
            slab = hu[start : start + a].astype(np.float64)
            missing = (a - len(slab), -slab.shape[1] % b, -slab.shape[2] % c)
            slab = np.pad(slab, [(0, m) for m in missing], mode="edge")
            d, h, w = slab.shape
            blocks = slab.reshape(d // a, a, h // b, b, w // c, c).transpose(0, 2, 4, 1, 3, 5)
            yield blocks.reshape(-1, a * b * c)


class _Case:
    """A validation scan, where it is measured, and what the linear transform makes of it."""

    def __init__(self, volume: TrainVolume, linear: BlockTransform) -> None:
        try:
            regions = Regions.of(volume.hu)
        except InputError as exc:
            raise InputError(exc.reason, path=volume.name, hint="nothing to validate on in it") from exc
        bands = {name: mask for name, mask in regions.bands.items() if mask.any()}
        self.volume, self.masks = volume, {"body": regions.body} | bands
        self.linear_db = psnr(linear.round_trip(volume.hu), volume.hu, regions.body, peak=PEAK)


class _Patches(Dataset[dict[str, Any]]):
    """A patch in HU and the noise that its latent is sampled with: both functions of (seed, index)."""

    def __init__(self, source: PairSource, latent: tuple[int, ...], restored_share: float) -> None:
        self.source, self.latent, self.restored_share = source, latent, restored_share

    def __getitem__(self, index: int) -> dict[str, Any]:
        hu = self.source.patch(index, restored_share=self.restored_share)
        rng = np.random.default_rng([self.source.seed, index, 1])
        return {"hu": hu[None], "noise": rng.standard_normal(self.latent, np.float32)}


class VaeTask:
    """Patches, loss and validation of the autoencoder."""

    kind = "vae"
    optimizer: type[torch.optim.AdamW] = Muon

    def __init__(
        self,
        model: CtVae,
        train: Sequence[TrainVolume],
        val: Sequence[TrainVolume],
        *,
        recipe: PairRecipe,
        seed: int,
        card: Mapping[str, Any],
        loss: VaeLoss,
        round_trip: RoundTrip,
        restored_share: float = 0.3,
    ) -> None:
        """restored_share: of the patches that are a stage one's work; latents are made of both kinds."""
        self.model: nn.Module = model
        self.weights, self.round_trip = loss, round_trip
        self.config: Mapping[str, Any] = model.config.to_dict()
        self.recipe: Mapping[str, Any] = {
            "patches": asdict(recipe) | {"restored_share": restored_share},
            "loss": asdict(loss),
            "train": fingerprint(train),
            "val": fingerprint(val),
        }
        self.card = card
        self.unit = model.config.hu_scale
        latent = (model.latent_channels, *(n // s for n, s in zip(recipe.patch, model.strides, strict=True)))
        self.dataset: Dataset[dict[str, Any]] = _Patches(
            PairSource(train, recipe, seed=seed), latent, restored_share
        )
        linear = BlockTransform((v.hu for v in train), model.strides, model.latent_channels)
        self.cases = [_Case(volume, linear) for volume in val]

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Of a sample of the posterior, decoded."""
        x = batch["hu"] / self.unit
        back, mean, logvar = model(x, batch["noise"])
        with torch.autocast(x.device.type, enabled=False):
            w, error = self.weights, back.float() - x
            loss: Tensor = error.abs().mean() + w.gradient * error.diff(dim=2).abs().mean()
            loss = loss + w.bias * F.avg_pool3d(error, w.block).abs().mean()
            return loss + w.kl * kl(mean.float(), logvar.float()).mean()

    def validate(self, model: nn.Module, heed: Heed) -> dict[str, float]:
        """Round trips of whole scans through the posterior means: PSNR in the body, MAE and bias a band.

        gain_db is over the linear transform of the same size, on the same voxels. A mean over the scans; of a band,
        over those that have it.
        """
        assert isinstance(model, CtVae)
        found: dict[str, list[Difference]] = {}
        for case in self.cases:
            hu = case.volume.hu.astype(np.float32)
            back = self.round_trip(model, hu, heed)
            for name, mask in case.masks.items():
                found.setdefault(name, []).append(difference(back, hu, mask))
        ours = float(np.mean([d.psnr(PEAK) for d in found["body"]]))
        linear = float(np.mean([case.linear_db for case in self.cases]))
        metrics = {"psnr_4095_db": ours, "linear_psnr_4095_db": linear, "gain_db": ours - linear}
        for name, each in found.items():
            metrics[f"{name}_mae_hu"] = float(np.mean([d.mean_abs for d in each]))
            metrics[f"{name}_bias_hu"] = float(np.mean([d.mean for d in each]))
        return metrics
