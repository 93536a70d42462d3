"""Rectified flow on the residual, the ablation: the same network and state, straight paths, Heun's method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from ctsr.diffusion.sampler import Denoise, start
from ctsr.diffusion.schedule import Real, noise_level, stratified

__all__ = ["Flow", "heun"]


@dataclass(frozen=True, slots=True)
class Flow:
    """u = (1 − t) r + t·scale·ε (Liu et al. 2023). scale: σ_r, the residual's root mean square."""

    scale: float

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"the residual's size is {self.scale:g}")

    def coefficients(self, level: Real) -> tuple[Real, Real]:
        """a = 1 − t and s = scale·t."""
        return 1 - level, self.scale * level

    def levels(self, n_steps: int) -> np.ndarray:
        """(n_steps,) float64 times t, even, up to 1."""
        if n_steps < 1:
            raise ValueError(f"{n_steps} diffusion steps")
        return np.arange(1, n_steps + 1) / n_steps

    def draw(self, generator: np.random.Generator, n: int) -> np.ndarray:
        """(n,) times in (0, 1]."""
        return 1 - stratified(generator, n)


def heun(
    denoise: Denoise,
    y0: Tensor,
    path: Flow,
    *,
    n_steps: int = 8,
    noise: Callable[[int], Tensor],
    progress: Callable[[int], None] = lambda steps: None,
) -> Tensor:
    """x₀ by Heun's method along du/dt = (u − r̂)/t; arguments and result as of `sample`.

    Two calls of the network a step, one for the last, as in Karras et al. 2022: what it returns is r̂, free of noise.
    """
    levels = [0.0, *(float(level) for level in path.levels(n_steps))]
    u = start(y0, path, levels[-1], noise)

    def slope(u: Tensor, t: float) -> tuple[Tensor, Tensor]:
        r = denoise(u, float(noise_level(t)), t).to(u.dtype)
        return r, (u - r) / t

    for t, q in pairwise(reversed(levels)):
        r, first = slope(u, t)
        if q > 0:
            _, second = slope(u + (q - t) * first, q)
            u = u + (q - t) * (first + second) / 2
        progress(round((1 - q) * n_steps))
    return y0.to(u.dtype) + r
