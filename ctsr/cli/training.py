"""How the trainings tell of themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from ctsr.cli.console import Console, Ticker
from ctsr.cli.machine import n_cpus
from ctsr.cli.signals import Interrupted, orderly
from ctsr.errors import UsageError
from ctsr.workflows.requests import Training

__all__ = ["carry_out"]

LEAST_GAIN = 0.1  # of the detail: below it the diffusion adds nothing


def carry_out(
    console: Console,
    request: Training,
    work: Callable[..., Any],
    show: Callable[[dict[str, Any], dict[str, Any]], None],
    *,
    yardstick: str = "cubic",
) -> None:
    """Run a training, and say how it ended. Raises Interrupted where a signal asked for that.

    show: tells what the validation found of the best, from a document's first entries and from `Result.metrics`.
    yardstick: what `gain_db` is measured against.
    """
    from ctsr.workflows.training import is_first

    if request.workers > 4 * n_cpus():
        raise UsageError(
            f"--workers: {request.workers} is not in 0…{4 * n_cpus()}, four for each of {n_cpus()} CPUs"
        )
    console.quiet = console.quiet or not is_first()
    with console.progress("training") as ticker:
        result = work(request, report=_Told(console, ticker, yardstick), stopping=orderly)
    outcome = result.outcome
    if outcome.stopped_by is not None:
        console.note(f"saved at step {outcome.step}; the same command goes on from there")
        raise Interrupted(outcome.stopped_by)
    if not is_first():
        return
    show({"step": outcome.step, "best_psnr_4095_db": outcome.best_db}, result.metrics)
    if outcome.was_finished:
        console.note(f"this run is finished: {outcome.step} steps are done (--max-steps for more)")
    best = (
        "–"
        if outcome.best_db is None
        else f"{outcome.best_db:.2f} dB (peak 4095) at step {outcome.best_step}"
    )
    console.result(f"{request.folder}: {outcome.step} steps, best {best}")


class _Told:
    """A training's reports, on a console."""

    def __init__(self, console: Console, ticker: Ticker, yardstick: str) -> None:
        self._ticker, self._yardstick, self.note = ticker, yardstick, console.note
        self._gain = ""

    def begin(self, max_steps: int) -> None:
        """How many steps come now; a diffusion's are those of two trainings."""
        self._max = max_steps
        self._start: tuple[int, float] | None = None

    def step(self, step: int, loss: float, rate: float) -> None:
        """A step is done."""
        now = time.monotonic()
        self._start = self._start or (step, now)
        pace = (step - self._start[0]) / max(now - self._start[1], 1e-9)
        left = f", {(self._max - step) / pace / 60:.0f} min left" if pace > 0 else ""
        self._ticker(step / self._max, f"step {step}, {pace:.2f} steps/s, loss {loss:.4f}{self._gain}{left}")

    def validation(self, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        """A validation is done."""
        self._gain = f", {metrics['gain_db']:+.2f} dB over {self._yardstick}" if "gain_db" in metrics else ""
        self.note(f"step {step}: {metrics['psnr_4095_db']:.2f} dB{self._gain}{' (best)' if is_best else ''}")
        if "detail_gain" in metrics:
            words = f"{metrics['added_db']:+.2f} dB over stage one, detail gain {metrics['detail_gain']:.2f}"
            words += " (adds nothing)" if metrics["detail_gain"] < LEAST_GAIN else ""
            self.note(f"{words}; denoising error {metrics['denoising_error']:.2f} of predicting nothing")
