"""Training that notices: what the last steps were like, and what is out of the ordinary.

A loss that explodes and a network that died both look plausible in the log for a long time. Two trials were
lost so: a fixed clip at too high a rate (exploded at step 2 300), and a plain ReLU before a zero head (dead
after 200).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from ctsr.train.checkpoint import Progress

__all__ = ["clip_limit", "has_jumped", "is_idle", "remember"]

WINDOW = 200  # steps that "usual" is taken from
SETTLED = 20  # fewer steps than this say nothing yet
CLIP_FACTOR = 2.0  # × the running median of the gradient norm
JUMP = 10.0  # × the running median of the loss
IDLE_RESIDUAL_HU = 0.1
IDLE_GAIN_DB = 0.01


def remember(progress: Progress, *, loss: float, norm: float) -> None:
    """Add a step to the running window."""
    for window, value in ((progress.losses, loss), (progress.norms, norm)):
        window.append(value)
        del window[:-WINDOW]


def clip_limit(progress: Progress) -> float:
    """The gradient norm that this step is clipped to."""
    return CLIP_FACTOR * statistics.median(progress.norms) if len(progress.norms) >= SETTLED else math.inf


def has_jumped(progress: Progress, loss: float) -> bool:
    """Whether the loss is an order of magnitude above what it usually is."""
    return len(progress.losses) >= SETTLED and loss > JUMP * statistics.median(progress.losses)


def is_idle(metrics: Mapping[str, float]) -> bool:
    """Whether a validated network adds nothing to what it stands on (which is itself better than cubic).

    One that stands on nothing has no such metrics.
    """
    residual, added = (metrics.get(name, math.inf) for name in ("residual_rms_hu", "added_db"))
    return residual < IDLE_RESIDUAL_HU and added < IDLE_GAIN_DB
