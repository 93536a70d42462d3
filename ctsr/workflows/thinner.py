"""A thick volume in, a thin one and its record out; the networks loaded once. No files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ctsr.core.volume import Volume
from ctsr.infer.pipeline import CLASSICAL
from ctsr.workflows.job import Job, Options

if TYPE_CHECKING:
    from ctsr.infer.diffusion import Diffuser
    from ctsr.infer.stage_one import Engine

__all__ = ["Thinner", "Upsampled", "upsample"]


@dataclass(frozen=True, slots=True)
class Upsampled:
    """A thin volume and how it came about. uncertainty: (I, J, K) float32, HU, where a diffusion was asked for it."""

    volume: Volume
    record: dict[str, Any]
    notes: list[str]
    uncertainty: np.ndarray | None = None


class Thinner:
    """Turns thick volumes into thin ones; loads its network at first use and keeps it between calls.

    `ctsr.Upsampler(model="baseline", factor=2)` is this, with the fields of `Options`.
    """

    def __init__(self, **options: Any) -> None:
        self.options = Options(**options)
        self._engine: Engine | None = None
        self._diffuser: Diffuser | None = None
        self._weights: dict[str, Any] = {}

    def __call__(self, volume: Volume, *, keeps_spread: bool = False) -> Upsampled:
        """The thin volume. Raises InputError, GeometryError, UsageError, ResourceError or WeightsError."""
        job = self.job(volume, keeps_spread=keeps_spread)
        data = np.empty(job.shape, job.dtype, order="F")
        turned = job.turn.apply(data)
        for start, part in job.run():
            turned[start : start + len(part)] = part
            del part  # before the next slab is computed
        uncertainty = None if job.spread is None else job.turn.undo(job.spread)
        return Upsampled(job.volume(data), job.record, [*job.notes, *job.warnings, *job.remarks], uncertainty)

    @property
    def weights(self) -> dict[str, Any]:
        """What stands in a record about the network: name, sha256, device, number format; empty without one."""
        if self.options.model not in CLASSICAL and self._engine is None:
            from ctsr.workflows.networks import load

            self._engine, self._diffuser, self._weights = load(self.options)
        return self._weights

    def job(
        self,
        volume: Volume,
        *,
        is_streamed: bool = False,
        keeps_added: bool = False,
        keeps_spread: bool = False,
    ) -> Job:
        """What has to be done for this volume, planned; nothing is computed yet."""
        weights = self.weights
        return Job(
            volume, self.options, self._engine, self._diffuser, weights,
            is_streamed=is_streamed, keeps_added=keeps_added, keeps_spread=keeps_spread,
        )  # fmt: skip


def upsample(volume: Volume, **options: Any) -> Volume:
    """The thin volume that belongs to a thick one: `ctsr.upsample(volume, factor=2)`.

    options: the fields of `Options`. The record of how it came about is what `ctsr.Upsampler` returns beside it.
    """
    return Thinner(**options)(volume).volume
