"""How diffusion samples are drawn and what is made of them: the choices that a user has. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ctsr.errors import UsageError

__all__ = ["SAMPLERS", "Sampling"]

SAMPLERS = ("multistep", "ddim", "ancestral")
ESTIMATES = ("mean", "sample")
STEPS_LIMIT = SAMPLES_LIMIT = 1000
GUIDANCE_LIMIT = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """samples: K, drawn of each volume. estimate: whether the result is their mean or the first of them."""

    num_steps: int = 15
    sampler: str = "multistep"
    guidance_scale: float = 1.0
    samples: int = 4  # a single one costs up to 3 dB, a mean of 4 about 1 dB, and their spread can be told
    estimate: str = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UsageError(f"--sampler: {self.sampler} is not {', '.join(SAMPLERS)}")
        if self.estimate not in ESTIMATES:
            raise UsageError(f"--estimate: {self.estimate} is not {' or '.join(ESTIMATES)}")
        for name, value, most in (
            ("num-steps", self.num_steps, STEPS_LIMIT),
            ("samples", self.samples, SAMPLES_LIMIT),
        ):
            if not 1 <= value <= most:
                raise UsageError(f"--{name}: {value} is not in 1…{most}")
        if not (math.isfinite(self.guidance_scale) and 0 <= self.guidance_scale <= GUIDANCE_LIMIT):
            raise UsageError(f"--guidance-scale: {self.guidance_scale:g} is not in 0…{GUIDANCE_LIMIT:g}")

    @property
    def calls(self) -> int:
        """Of the network for one volume."""
        return self.samples * self.num_steps * (1 if self.guidance_scale == 1 else 2)

    def calibration(self, card: Mapping[str, Any]) -> tuple[float, float] | None:
        """(detail_gain, spread_factor) that validation found for these settings, None where it had others.

        card: of the diffusion. Both numbers hold for that sampler, number of steps and of samples, without guidance.
        """
        validated, metrics = card.get("sampling", {}), card.get("metrics", {})
        gain = metrics.get(f"detail_gain_{self.samples}")
        is_same = (self.sampler, self.num_steps) == (validated.get("sampler"), validated.get("num_steps"))
        if gain is None or not is_same or self.guidance_scale != 1:
            return None
        return float(gain), float(metrics.get(f"spread_factor_{self.samples}", 1.0))
