"""How much signal and how much noise there is at each level, a number in (0, 1]; and how a network is told of it.

A path gives the shares of the state u = a r + s ε. ResShift (`Schedule`): level √η, a = 1 − η, s = κ √η. Rectified flow
on the residual, the ablation (`Flow`): level t, a = 1 − t, s = scale·t. All else is the same for both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["Flow", "Path", "Schedule", "diffuse", "kappa_for", "noise_level"]

Real = TypeVar("Real", float, np.ndarray)

LOWEST = 0.003  # the level that `noise_level` calls 0; fixed, so that a network outlives its schedule
FINAL_NOISE = 0.1  # of √V: what noise the last step of the `ctsr` preset still has to remove
LEAST_SHARE = 1 / 15  # of the training at √η₁, where one of 15 steps is
KAPPA_PER_ROOT_V = 3.0  # 2…4 keep the spread of 15 steps; below the residual's own size x_T would not hide it


@dataclass(frozen=True, slots=True)
class Schedule:
    """ResShift's noise schedule (Yue et al. 2023, “Noise Schedule”), a curve √η over a position in [0, 1].

    sqrt_eta_1, sqrt_eta_T: its ends. power: p, the share of small noise grows with it. kappa: κ, the noise of a
    level is κ √η, in units of a standardised latent. Raises ValueError on what is no schedule.
    """

    sqrt_eta_1: float
    sqrt_eta_T: float
    power: float
    kappa: float

    def __post_init__(self) -> None:
        rises = 0 < self.sqrt_eta_1 < self.sqrt_eta_T < 1
        if not (rises and 0 < self.power < math.inf and 0 < self.kappa < math.inf):
            raise ValueError(f"0 < sqrt_eta_1 < sqrt_eta_T < 1, power > 0 and kappa > 0 do not hold: {self}")

    @classmethod
    def published(cls, n_steps: int = 15) -> Schedule:
        """The constants of the ResShift papers: the 15 steps of 2023, or the 4 steps of 2024 for 4 and fewer."""
        return cls(0.02 if n_steps > 4 else 0.1, 0.99, 0.3, 2.0)

    @classmethod
    def ctsr(cls, kappa: float, variance: float | None = None) -> Schedule:
        """A schedule whose 15 steps keep the posterior's spread where the residual is small.

        kappa: see `kappa_for`. variance: V, mean square error of the best regression of x₀ on y₀; (κ/3)² unless given.
        """
        root = kappa / KAPPA_PER_ROOT_V if variance is None else math.sqrt(variance)
        return cls(max(FINAL_NOISE * root / kappa, LOWEST), 0.99, 0.5, kappa)

    def curve(self, position: Real) -> Real:
        """√η at a position in [0, 1], 0 the least noise."""
        share = position**self.power
        root: Real = self.sqrt_eta_1 ** (1 - share) * self.sqrt_eta_T**share
        return root

    def levels(self, n_steps: int) -> np.ndarray:
        """(n_steps,) float64 √η where a sampler calls the network, rising, both ends included; one is the noisiest."""
        _check_steps(n_steps)
        return self.curve(np.linspace(0.0, 1.0, n_steps)) if n_steps > 1 else np.array([self.sqrt_eta_T])

    def coefficients(self, level: Real) -> tuple[Real, Real]:
        """Signal share a and noise share s of the state u = a r + s ε."""
        return 1 - level * level, self.kappa * level

    def draw(self, generator: np.random.Generator, n: int) -> np.ndarray:
        """(n,) float64 levels to train on, stratified over the batch.

        One in 15 is √η₁: for p < 1 the curve leaves its start too fast for even positions to come near it.
        """
        position = _stratified(generator, n)
        return self.curve(np.where(generator.random(n) < LEAST_SHARE, 0.0, position))


@dataclass(frozen=True, slots=True)
class Flow:
    """u = (1 − t) r + t·scale·ε (Liu et al. 2023), times t even up to 1. scale: σ_r, the residual's rms.

    Methods as of `Schedule`.
    """

    scale: float

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"the residual's size is {self.scale:g}")

    def levels(self, n_steps: int) -> np.ndarray:
        _check_steps(n_steps)
        return np.arange(1, n_steps + 1) / n_steps

    def coefficients(self, level: Real) -> tuple[Real, Real]:
        return 1 - level, self.scale * level

    def draw(self, generator: np.random.Generator, n: int) -> np.ndarray:
        return 1 - _stratified(generator, n)


Path = Schedule | Flow


def diffuse(path: Path, r: Tensor, eps: Tensor, level: np.ndarray) -> Tensor:
    """u = a r + s ε. r, eps: (B, …); level: (B,), one a sample. For ResShift, the marginal of Yue et al. 2023."""
    a, s = (
        torch.as_tensor(c, dtype=r.dtype, device=r.device).view(-1, *[1] * (r.ndim - 1))
        for c in path.coefficients(np.asarray(level, np.float64))
    )
    return a * r + s * eps


def kappa_for(residual_rms: float, variance: float) -> float:
    """κ of the `ctsr` preset: max(σ_r, 3 √V), both of standardised latents."""
    return max(residual_rms, KAPPA_PER_ROOT_V * math.sqrt(variance))


def noise_level(level: Real) -> Real:
    """τ in [0, 1] for a network's embedding: the logarithm of the level between fixed bounds.

    A level is told, not the number of a step, so that the number of steps is free at inference.
    """
    tau: Real = np.clip(np.log(np.maximum(level, LOWEST) / LOWEST) / math.log(1 / LOWEST), 0.0, 1.0)
    return tau


def _check_steps(n_steps: int) -> None:
    if n_steps < 1:
        raise ValueError(f"{n_steps} diffusion steps")


def _stratified(generator: np.random.Generator, n: int) -> np.ndarray:
    """(n,) numbers in [0, 1), each uniform, one in every n-th part, in random order."""
    return (generator.permutation(n) + generator.random(n)) / n
