"""From noise around y₀ to a sample of x₀, one call of the network a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ctsr.diffusion.process import posterior
from ctsr.diffusion.schedule import Path, noise_level

__all__ = ["Denoise", "Kind", "guided", "sample", "start"]

Denoise = Callable[[Tensor, float, float], Tensor]  # (u, τ, level) → r̂, the residual that it predicts
Kind = Literal["multistep", "ddim", "ancestral"]

SHARES: dict[Kind, float] = {"multistep": 0.0, "ddim": 0.0, "ancestral": 1.0}  # of fresh noise


def sample(
    denoise: Denoise,
    y0: Tensor,
    path: Path,
    *,
    n_steps: int = 15,
    kind: Kind = "multistep",
    s: float | None = None,
    error: Callable[[float], float] | None = None,
    noise: Callable[[int], Tensor],
    progress: Callable[[int], None] = lambda steps: None,
) -> Tensor:
    """x₀, one sample for each latent of the batch; the shape of y₀ (B, C, D, H, W), float32.

    denoise: (u, τ, level) → r̂; u = x_t − y₀. One step is the network's regression, x₀ given y₀.
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
    u = start(y0, path, levels[-1], noise)
    before = None  # r̂ and log-SNR of the step before
    for t in range(n_steps, 0, -1):
        level = levels[t - 1]
        r = denoise(u, float(noise_level(level)), level).to(u.dtype)
        progress(n_steps - t + 1)
        if t == 1:
            break
        below = levels[t - 2]
        m, k, sigma = posterior(path, level, below, s)
        if kind == "multistep":
            here, there = log_snr(path, level), log_snr(path, below)
            target = (
                r if before is None else r + (r - before[0]) * ((there - here) / (2 * (here - before[1])))
            )
            before = r, here
            u = m * u + k * target
            continue
        u = m * u + k * r
        if error is not None:
            sigma = math.sqrt(sigma**2 + k**2 * error(level))
        if sigma > 0:
            u = u + sigma * noise(t - 1).to(u)
    return y0.to(u.dtype) + r


def start(y0: Tensor, path: Path, level: float, noise: Callable[[int], Tensor]) -> Tensor:
    """u at the noisiest level, in float32 at least: bfloat16 is off by 0.7 where a step divides by the noise.

    The mean a r of the true marginal is not known and left out; at √η = 0.99 it is 2 % of r.
    """
    eps = noise(0)
    if eps.shape != y0.shape:
        raise ValueError(f"noise {tuple(eps.shape)} for a latent {tuple(y0.shape)}")
    return path.coefficients(level)[1] * eps.to(y0.device, torch.promote_types(y0.dtype, torch.float32))


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
