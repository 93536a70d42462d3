"""Trainings that take a second: a small network, small patches, small bodies."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from ctsr.data.pairs import PairRecipe, TrainVolume
from ctsr.models.simple_unet3d import SimpleUNet3D, SimpleUNet3DConfig
from ctsr.train.baseline import BaselineTask
from ctsr.train.loop import LoopConfig, Outcome, train

NETWORK = SimpleUNet3DConfig(channels=(8, 8))
RECIPE = PairRecipe(patch=(12, 16, 16))
LOOP = LoopConfig(
    max_steps=8, batch_size=2, learning_rate=1e-3, warmup_steps=2, validate_every=4, save_every=3
)


def body(seed: int, shape: tuple[int, int, int] = (16, 24, 24)) -> np.ndarray:
    """Tissue with lumps in it, in air; int16 HU, (D, H, W)."""
    rng = np.random.default_rng(seed)
    lumps = ndimage.gaussian_filter(rng.normal(0, 1, shape), 1.2)
    _, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    hu = np.where(y**2 + x**2 < 0.8, 40 + 400 * lumps, -1000)
    return hu.clip(-1024, 3071).astype(np.int16)


def volume(seed: int, *, spacing: float = 1.0, name: str | None = None) -> TrainVolume:
    """A scan of `body(seed)`; its name and its content tell the seed."""
    along_z = spacing <= 1.5
    return TrainVolume(
        name or f"scan{seed}.nii", body(seed), (spacing, 0.8, 0.8), spacing, along_z, content=f"{seed}"
    )


def task(
    *, seed: int = 0, recipe: PairRecipe = RECIPE, card: Mapping[str, object] | None = None
) -> BaselineTask:
    """Two scans to train on, one to validate on, an untrained network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SimpleUNet3D(NETWORK)
    scans = [volume(1), volume(2, spacing=3.0)]
    return BaselineTask(model, scans, [volume(3)], recipe=recipe, seed=seed, card=card or {"seed": seed})


class Told:
    """A report that remembers, and a stop that comes when a step has been told."""

    def __init__(self, stop_at: int | None = None, signum: int = 15) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.notes: list[str] = []
        self.validations: list[int] = []
        self._stop_at, self._signum = stop_at, signum

    def step(self, step: int, loss: float, rate: float) -> None:
        self.steps.append(step)
        self.losses.append(loss)
        self.rates.append(rate)

    def validation(self, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        self.validations.append(step)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stop(self) -> int | None:
        return self._signum if self._stop_at is not None and self._stop_at in self.steps else None


def run(
    folder: Path,
    *,
    stop_at: int | None = None,
    make: Callable[[], BaselineTask] = task,
    resume: bool = True,
    told: Told | None = None,
    **loop: object,
) -> tuple[Outcome, Told]:
    """Train in `folder`, from whatever state it holds."""
    told = told or Told(stop_at)
    config = replace(LOOP, **loop)  # type: ignore[arg-type]
    return train(make(), config, folder, report=told, resume=resume, stop=told.stop), told


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
