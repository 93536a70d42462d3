"""How diffusion samples are drawn and what is made of them: the choices that a user has. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ctsr.errors import UsageError

__all__ = ["SAMPLERS", "Sampling"]

SAMPLERS = ("multistep", "ddim", "ancestral")
ESTIMATES = ("mean", "sample")
MOST = 1000  # steps, or samples
GUIDANCE_LIMIT = 20


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
        for option, is_possible, words in (
            ("sampler", self.sampler in SAMPLERS, ", ".join(SAMPLERS)),
            ("estimate", self.estimate in ESTIMATES, " or ".join(ESTIMATES)),
            ("num_steps", 1 <= self.num_steps <= MOST, f"in 1…{MOST}"),
            ("samples", 1 <= self.samples <= MOST, f"in 1…{MOST}"),
            ("guidance_scale", 0 <= self.guidance_scale <= GUIDANCE_LIMIT, f"in 0…{GUIDANCE_LIMIT}"),
        ):
            if not is_possible:
                raise UsageError(f"--{option.replace('_', '-')}: {getattr(self, option)} is not {words}")

    @property
    def calls(self) -> int:
        """Of the network for one volume."""
        return self.samples * self.num_steps * (1 if self.guidance_scale == 1 else 2)

    def calibration(self, card: Mapping[str, Any]) -> tuple[float, float] | None:
        """(detail_gain, spread_factor) that validation found for these settings, None where it had others.

        card: of the diffusion. Both numbers hold for that sampler, number of steps and of samples, without guidance.
        ValueError where they can't be such numbers.
        """
        validated, metrics = card.get("sampling", {}), card.get("metrics", {})
        gain = metrics.get(f"detail_gain_{self.samples}")
        is_same = (self.sampler, self.num_steps) == (validated.get("sampler"), validated.get("num_steps"))
        if gain is None or not is_same or self.guidance_scale != 1:
            return None
        gain, factor = float(gain), float(metrics.get(f"spread_factor_{self.samples}", 1.0))
        if not 0 <= gain <= 1 or factor < 0:
            raise ValueError(f"its card holds a detail gain of {gain:g}, a spread factor of {factor:g}")
        return gain, factor
