"""From noise around y₀ to a sample of x₀: the noise, the posterior of a step, and the samplers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ctsr.diffusion.schedule import Path, noise_level

__all__ = ["Denoise", "guided", "heun", "log_snr", "noise_source", "posterior", "sample"]

Denoise = Callable[[Tensor, float, float], Tensor]  # (u, τ, level) → r̂, the residual that it predicts
Progress = Callable[[int], None]
SHARES = {"multistep": 0.0, "ddim": 0.0, "ancestral": 1.0}  # of fresh noise


def sample(
    denoise: Denoise,
    y0: Tensor,
    path: Path,
    *,
    n_steps: int = 15,
    kind: str = "multistep",
    s: float | None = None,
    error: Callable[[float], float] | None = None,
    noise: Callable[[int], Tensor],
    progress: Progress = lambda steps: None,
) -> Tensor:
    """x₀, one sample for each latent of the batch; the shape of y₀ (B, C, D, H, W), float32.

    denoise is called once a step. One step is the network's regression, x₀ given y₀.
    kind: `multistep` is DPM-Solver++(2M) in u (Lu et al. 2022, algorithm 2); `ancestral` draws from the posterior,
    `ddim` is its deterministic end, and s in [0, 1] what lies between them (`posterior`).
    error: mean square error of r̂ by level, added to the variance of a step that is not multistep (as Bao et al. 2022,
    Analytic-DPM): the spread of a Gaussian is then right for any number of steps.
    noise: noise(0) starts, so that the start is the same for every number of steps; noise(t) enters the state that
    step t is called with. progress: is told the steps done.
    """
    if s is None:
        s = SHARES[kind]
    elif kind == "multistep" or not 0 <= s <= 1:
        raise ValueError(f"s = {s:g}: the share of fresh noise lies in [0, 1], and `multistep` has none")
    levels = [float(level) for level in path.levels(n_steps)]
    u = _start(y0, path, levels[-1], noise)
    before = None  # r̂ and log-SNR of the step before
    for t in range(n_steps, 0, -1):
        level = levels[t - 1]
        r = denoise(u, float(noise_level(level)), level).to(u.dtype)
        progress(n_steps - t + 1)
        if t == 1:
            break
        below = levels[t - 2]
        m, k, sigma = posterior(path, level, below, s)
        target = r
        if kind == "multistep":
            here, there = log_snr(path, level), log_snr(path, below)
            if before is not None:
                target = r + (r - before[0]) * ((there - here) / (2 * (here - before[1])))
            before = r, here
        elif error is not None:
            sigma = math.sqrt(sigma**2 + k**2 * error(level))
        u = m * u + k * target
        if sigma > 0:
            u = u + sigma * noise(t - 1).to(u)
    return y0.to(u.dtype) + r


def heun(
    denoise: Denoise,
    y0: Tensor,
    path: Path,
    *,
    n_steps: int = 8,
    noise: Callable[[int], Tensor],
    progress: Progress = lambda steps: None,
) -> Tensor:
    """x₀ by Heun's method along du/dt = (u − r̂)/t of a `Flow`; arguments and result as of `sample`.

    Two calls of the network a step, one for the last, as in Karras et al. 2022: what it returns is r̂, free of noise.
    """
    levels = [0.0, *(float(level) for level in path.levels(n_steps))]
    u = _start(y0, path, levels[-1], noise)

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


def _start(y0: Tensor, path: Path, level: float, noise: Callable[[int], Tensor]) -> Tensor:
    """u at the noisiest level, in float32 at least: bfloat16 is off by 0.7 where a step divides by the noise.

    The mean a r of the true marginal is not known and left out; at √η = 0.99 it is 2 % of r.
    """
    eps = noise(0)
    if eps.shape != y0.shape:
        raise ValueError(f"noise {tuple(eps.shape)} for a latent {tuple(y0.shape)}")
    return path.coefficients(level)[1] * eps.to(y0.device, torch.promote_types(y0.dtype, torch.float32))


def posterior(path: Path, t: float, q: float, s: float = 1.0) -> tuple[float, float, float]:
    """(m, k, σ) of the step from level t down to q: u_q = m u_t + k r + σ ε, for a known residual r.

    s in [0, 1] is the share of fresh noise: 1 is the posterior q(x_q | x_t, x₀) of Yue et al. 2023, 0 the
    deterministic map, and every s keeps the marginals (as in Song et al. 2021, DDIM). q = 0 is r itself.
    """
    (a_t, s_t), (a_q, s_q) = path.coefficients(t), path.coefficients(q)
    removed = 1 - (s_q / s_t) ** 2
    m = s_q / s_t * math.sqrt(1 - s * s * removed)
    return m, a_q - m * a_t, s * s_q * math.sqrt(removed)


def log_snr(path: Path, level: float) -> float:
    """ln(a/s), the multistep solver's time. −∞ where there is no signal, as at the start of a flow."""
    a, s = path.coefficients(level)
    return math.log(a / s) if a > 0 else -math.inf


def guided(null: Denoise, cond: Denoise, w: float) -> Denoise:
    """Classifier-free guidance on the prediction (Ho and Salimans 2022): null + w (cond − null).

    At w = 1 it is `cond` itself, called once. Only then is the spread of samples one of the posterior.
    """
    if w == 1:
        return cond

    def denoise(u: Tensor, tau: float, level: float) -> Tensor:
        without = null(u, tau, level)
        return without + w * (cond(u, tau, level) - without)

    return denoise


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
