"""The three trainings, and `ctsr encode-latents` between them: what they say of themselves and of their results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from ctsr.cli.console import Console, Ticker
from ctsr.cli.machine import n_cpus
from ctsr.cli.signals import Interrupted, orderly
from ctsr.errors import UsageError
from ctsr.workflows.requests import EncodeLatents, FinetuneVae, TrainBaseline, TrainDiffusion, Training

__all__ = ["encode_latents", "finetune_vae", "train_baseline", "train_diffusion"]

METHODS = {"cubic": "cubic_", "stage one": "stage_one_", "diffusion": "", "one sample": "sample_"}
LEAST_GAIN = 0.1  # of the detail: below it the diffusion adds nothing


def train_baseline(console: Console, request: TrainBaseline) -> None:
    """Train the network that doubles slices on your own thin scans.

    Stop it with Ctrl-C and run the same command again to go on. Several GPUs: `torchrun -m ctsr …`.
    With --init baseline it fine-tunes the shipped weights.
    """
    from ctsr.workflows.train_baseline import train_baseline as run

    def show(facts: dict[str, Any], comparison: dict[str, Any]) -> None:
        console.document(facts | {"comparison": comparison})
        rows = [{"weights": name} | row for name, row in comparison.items()]
        console.table(rows, title="on the validation set")

    _carry_out(console, request, run, show)


def finetune_vae(console: Console, request: FinetuneVae) -> None:
    """This leaves the default model as it is: `ctsr train-baseline --init baseline` fine-tunes that one.

    Here the autoencoder is trained that the diffusion works in, on your own thin scans.
    Stop it with Ctrl-C and run the same command again to go on. Several GPUs: `torchrun -m ctsr …`.
    """
    from ctsr.workflows.finetune_vae import finetune_vae as run

    def show(facts: dict[str, Any], metrics: dict[str, Any]) -> None:
        console.document(facts | {"best": metrics})
        regions = [name.removesuffix("_mae_hu") for name in metrics if name.endswith("_mae_hu")]
        rows = [{"": r} | {k: metrics[f"{r}_{k}"] for k in ("mae_hu", "bias_hu")} for r in regions]
        console.table(rows, title="round trip of the validation set")

    _carry_out(console, request, run, show, yardstick="the linear transform of its size")


def train_diffusion(console: Console, request: TrainDiffusion) -> None:
    """Train the diffusion that refines stage one, on the latents that encode-latents made.

    Stop it with Ctrl-C and run the same command again to go on. Several GPUs: `torchrun -m ctsr …`.
    """
    from ctsr.workflows.train_diffusion import train_diffusion as run

    def show(facts: dict[str, Any], metrics: dict[str, Any]) -> None:
        console.document(facts | metrics)
        rows = [{"method": name, "PSNR, dB": metrics[f"{key}psnr_4095_db"]} for name, key in METHODS.items()]
        console.table(rows, title="on the validation set")

    _carry_out(console, request, run, show)


def encode_latents(console: Console, request: EncodeLatents) -> None:
    """Encode thin scans, and what stage one restores from their simulated thick slices, for train-diffusion.

    Stop it when you like: the same command with --skip-existing goes on. A folder holds latents of one autoencoder and
    one stage one; of several stage ones only where none has seen the scans that it restored.
    """
    from ctsr.workflows.encode_latents import encode_latents as run
    from ctsr.workflows.folder import Report, raise_for_failures

    with console.progress("encoding") as ticker:
        rows = run(request, report=Report(console.note, console.warn, progress=ticker))
    console.table(rows, "case", "status", "reason", "pairs", "skipped")
    raise_for_failures(rows, path=request.latents)
    console.document({"cases": rows})
    pairs = sum(row["pairs"] for row in rows)
    console.result(f"{request.latents}: {pairs} pairs of {len(rows)} scans encoded")


def _carry_out(
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

    if request.workers > (most := 4 * n_cpus()):
        raise UsageError(f"--workers: {request.workers} is not in 0…{most}, four for each CPU")
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
    best = "–"
    if outcome.best_db is not None:
        best = f"{outcome.best_db:.2f} dB (peak 4095) at step {outcome.best_step}"
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
