"""The forward process, its posterior, the maps between predictions, and the noise.

u = x − y₀ throughout. In these coordinates y₀ drops out: ResShift is a Gaussian diffusion of the residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ctsr.diffusion.schedule import Path

__all__ = ["diffuse", "eps_of", "noise_source", "posterior", "residual_of"]


def diffuse(path: Path, r: Tensor, eps: Tensor, level: np.ndarray) -> Tensor:
    """u = a r + s ε. r, eps: (B, …); level: (B,), one a sample. For ResShift, the marginal of Yue et al. 2023."""
    a, s = (
        torch.as_tensor(c, dtype=r.dtype, device=r.device).view(-1, *[1] * (r.ndim - 1))
        for c in path.coefficients(np.asarray(level, np.float64))
    )
    return a * r + s * eps


def posterior(path: Path, t: float, q: float, s: float = 1.0) -> tuple[float, float, float]:
    """(m, k, σ) of the step from level t down to q: u_q = m u_t + k r + σ ε, for a known residual r.

    s in [0, 1] is the share of fresh noise: 1 is the posterior q(x_q | x_t, x₀) of Yue et al. 2023, 0 the
    deterministic map, and every s keeps the marginals (as in Song et al. 2021, DDIM). q = 0 is r itself.
    """
    (a_t, s_t), (a_q, s_q) = path.coefficients(t), path.coefficients(q)
    removed = 1 - (s_q / s_t) ** 2
    m = s_q / s_t * math.sqrt(1 - s * s * removed)
    return m, a_q - m * a_t, s * s_q * math.sqrt(removed)


def eps_of(u: Tensor, r: Tensor, path: Path, level: float) -> Tensor:
    """The noise ε that takes the residual r to u."""
    a, s = path.coefficients(level)
    return (u - a * r) / s


def residual_of(u: Tensor, eps: Tensor, path: Path, level: float) -> Tensor:
    """The residual r that ε takes to u. Divides by a, which is 0.02 at ResShift's noisiest level."""
    a, s = path.coefficients(level)
    return (u - s * eps) / a


def noise_source(
    shape: Sequence[int], *, seed: int, samples: Sequence[int], device: str | torch.device = "cpu"
) -> Callable[[int], Tensor]:
    """Noise of a whole volume by step: noise(step) is (len(samples), *shape) float32, the same whenever asked.

    A counter-based generator (Philox) keyed by (seed, sample, step), drawn on the CPU: no tile, no batch, no order
    and no device changes it. seed, samples: integers ≥ 0.
    """

    def noise(step: int) -> Tensor:
        fields = []
        for sample in samples:
            # the step is the counter's highest word: 2¹⁹² draws lie between two steps
            bits = np.random.Philox(key=np.array([seed, sample], np.uint64), counter=[0, 0, 0, step])
            fields.append(np.random.Generator(bits).standard_normal(tuple(shape), np.float32))
        return torch.from_numpy(np.stack(fields)).to(device)

    return noise
