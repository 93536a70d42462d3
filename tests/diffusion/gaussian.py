"""A problem whose answer is known: x₀ ~ N(μ, S), y = x₀ + n, n ~ N(0, τ²), with y₀ = y, each element alone.

The best denoiser is then affine, so a sampler is a linear map of its noise, which `response` reads off exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

MU, S, TAU2, Y = 0.3, 0.25, 0.04, 1.0
V = S * TAU2 / (S + TAU2)  # of the posterior: 0.0344827586
M = MU + S / (S + TAU2) * (Y - MU)  # its mean: 0.9034482759


def posterior_mean(y: Tensor) -> Tensor:
    return MU + S / (S + TAU2) * (y - MU)


def oracle(path, mean: Tensor | float, variance: float) -> Callable[[Tensor, float, float], Tensor]:
    """E[r | u] for r ~ N(mean, variance) given y₀."""

    def denoise(u: Tensor, tau: float, level: float) -> Tensor:
        a, s = path.coefficients(level)
        gain = variance * a / (a * a * variance + s * s)
        return mean + gain * (u - a * mean)

    return denoise


def remaining(path, level: float, variance: float) -> float:
    """Variance of r given u."""
    a, s = path.coefficients(level)
    return variance * s * s / (a * a * variance + s * s)


def response(
    sampler,
    path,
    *,
    n_steps: int,
    mean: float = M - Y,
    variance: float = V,
    y: float = Y,
    is_exact=False,
    **options,
):
    """(M, P), mean and variance of what a sampler returns: entry j of a batch gets noise 1 at step j, else 0.

    is_exact: start with the variance that the true marginal has.
    """
    unit = torch.eye(n_steps + 1, dtype=torch.float64)
    if is_exact:
        a, s = path.coefficients(float(path.levels(n_steps)[-1]))
        unit[0] *= math.sqrt(a * a * variance + s * s) / s
    y0 = torch.full((n_steps + 1,), y, dtype=torch.float64)
    denoise = oracle(path, mean, variance)
    made = sampler(denoise, y0, path, n_steps=n_steps, noise=lambda step: unit[step], **options)
    return float(made[-1]), float(((made[:-1] - made[-1]) ** 2).sum())
