"""The training loop of all networks, readable from top to bottom.

A task says what a sample, a loss and a validation are; everything else is here: warm-up and cosine, EMA,
clipping to what is usual, mixed precision, DDP from what `torchrun` sets, checkpoints, resume bit for
bit on a CPU, stopping on a signal, and noticing when a run has gone wrong. Nothing here looks at the clock.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ctsr.errors import CtsrError, ResourceError, TrainingDiverged, UsageError, WeightsError
from ctsr.io.atomic import write_text
from ctsr.train import checkpoint
from ctsr.train.checkpoint import Progress

__all__ = [
    "Heed",
    "LoopConfig",
    "Outcome",
    "Report",
    "Stopped",
    "Task",
    "heeding",
    "is_idle",
    "processes",
    "train",
]


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """How long and how fast; the same for every network."""

    max_steps: int
    batch_size: int = 4  # a process
    learning_rate: float = 8e-4
    warmup_steps: int = 300
    weight_decay: float = 1e-4
    ema_decay: float = 0.999
    seed: int = 0
    validate_every: int = 500
    save_every: int = 100
    use_amp: bool = False  # bfloat16
    workers: int = 0
    device: str = "cpu"
    log: str = "none"


# what a run of a folder keeps, beside network and recipe; pairs a step (batch × processes) are compared as one number
KEPT = {"warmup_steps", "weight_decay", "ema_decay", "seed", "use_amp"}
WORKER_TIMEOUT_SECONDS = 300.0  # a batch takes a second or two; a worker that hangs says nothing
Stop = Callable[[], int | None]
Heed = Callable[..., None]
IDLE_RESIDUAL_HU, IDLE_GAIN_DB = 0.1, 0.01


class Stopped(Exception):
    """A signal asks for an orderly end; `signum` names it."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


def heeding(stop: Stop) -> Heed:
    """What raises Stopped as soon as `stop` names a signal: a report of progress, or called without a word."""

    def heed(*done: object) -> None:
        if (signum := stop()) is not None:
            raise Stopped(signum)

    return heed


class Task(Protocol):
    """What one network's training consists of."""

    kind: str
    model: nn.Module
    config: Mapping[str, Any]  # of the network
    recipe: Mapping[str, Any]  # what decides the samples: a resumed run must agree
    card: Mapping[str, Any]
    optimizer: type[torch.optim.AdamW]
    dataset: Dataset[dict[str, Any]]  # takes any index ≥ 0; (seed, index) decides the sample

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss of a batch."""

    def validate(self, model: nn.Module, heed: Heed) -> dict[str, float]:
        """Metrics on the validation set; `heed` is called often, and ends it by an exception where a signal has come.

        `psnr_4095_db` chooses the best; `residual_rms_hu` and `added_db` are watched where they are given.
        """


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: all steps done, already done before, or stopped by a signal."""

    step: int
    best_db: float | None
    best_step: int
    stopped_by: int | None = None
    was_finished: bool = False


class Report(Protocol):
    """What the loop tells while it runs."""

    def step(self, step: int, loss: float, rate: float) -> None: ...
    def validation(self, step: int, metrics: Mapping[str, float], is_best: bool) -> None: ...
    def note(self, text: str) -> None: ...


def train(
    task: Task,
    config: LoopConfig,
    folder: Path,
    *,
    report: Report,
    resume: bool = True,
    stop: Stop = lambda: None,
) -> Outcome:
    """Train until `max_steps`, or until `stop()` names a signal; the state is in `folder` either way.

    Raises TrainingDiverged for a loss that is not finite, one that jumped twice, or a network that adds
    nothing; `last` is then the last good state. UsageError where the folder belongs to a run of another
    recipe. ResourceError for a full disk, too little memory, a worker that died.
    """
    with (
        processes(config) as (rank, world),
        checkpoint.locked(folder) if rank == 0 else nullcontext(),
        _resource_errors(config),
    ):
        return _Run(task, config, folder, report, stop, rank, world).run(resume)


def is_idle(metrics: Mapping[str, float]) -> bool:
    """Whether a validated network adds nothing to what it stands on (which is itself better than cubic).

    A plain ReLU before a zero head was dead after 200 steps. One that stands on nothing has no such metrics.
    """
    residual, added = (metrics.get(name, math.inf) for name in ("residual_rms_hu", "added_db"))
    return residual < IDLE_RESIDUAL_HU and added < IDLE_GAIN_DB


class _Run:
    def __init__(
        self, task: Task, config: LoopConfig, folder: Path, report: Report, stop: Stop, rank: int, world: int
    ) -> None:
        self.task, self.config, self.folder, self.report, self.stop = task, config, folder, report, stop
        self.rank, self.world = rank, world
        self.device = torch.device(config.device)
        if world > 1 and self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        is_3d = any(p.ndim == 5 for p in task.model.parameters())
        layout = torch.channels_last_3d if is_3d else torch.contiguous_format
        self.model = task.model.to(self.device).to(memory_format=layout)  # type: ignore[call-overload]
        self.ema = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.optimizer = task.optimizer(
            self.model.parameters(), config.learning_rate, (0.9, 0.99), weight_decay=config.weight_decay
        )
        self.progress = Progress()
        self.metrics: list[str] = []
        self.saved_step, self.save_failed = 0, False

    def run(self, resume: bool) -> Outcome:
        config = self.config
        goes_on = resume and (self.folder / "last.safetensors").exists()
        if goes_on:
            self._restore()
            if self.progress.step >= config.max_steps and not self.progress.validation_due:
                return self._outcome(was_finished=True)
            if self.rank == 0:
                self.report.note(f"going on from step {self.progress.step}")
        if self.world > 1:
            dist.barrier()  # all have read what rank 0 may now replace
        with self._tensorboard() as self.board:
            if self.rank == 0:
                text = json.dumps(self._resolved(), indent=2) + "\n"
                write_text(self.folder / "config.json", text, overwrite=True)
            if not goes_on:  # nothing of an earlier run may be taken for this one's
                self._write_metrics()
                self._save()
            network: nn.Module = self.model
            if self.world > 1:
                network = nn.parallel.DistributedDataParallel(self.model)
            while self.progress.step < config.max_steps or self.progress.validation_due:
                if (signal := self._signal()) is not None:
                    self._save()
                    return self._outcome(stopped_by=signal)
                if self.progress.validation_due:
                    self._validate()
                else:
                    self._steps(network)
        return self._outcome()

    def _restore(self) -> None:
        file = checkpoint.read(self.folder, self.task.kind)
        self._refuse_another_recipe(file.card.get("run"))
        self.progress = checkpoint.restore(
            file, self.folder, model=self.model, ema=self.ema, optimizer=self.optimizer
        )
        self.saved_step = self.progress.step
        until = self.saved_step - self.progress.validation_due
        self.metrics = checkpoint.read_metrics(self.folder / "metrics.jsonl", until=until)

    def _steps(self, network: nn.Module) -> None:
        """Train to the next validation; less where a signal comes, or the last good state is taken back."""
        config, progress = self.config, self.progress
        until = min((progress.step // config.validate_every + 1) * config.validate_every, config.max_steps)
        network.train()
        for batch in self._batches(progress.step, until):
            if self._signal() is not None:
                return
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.use_amp):
                loss = self.task.loss(network, batch)
            value = self._mean(loss.detach())
            ids = f"pairs {progress.step * self.world * config.batch_size} and on"
            if not math.isfinite(value):
                raise self._diverged(f"loss is not finite ({ids})")
            if progress.has_jumped(value):
                self._back_to_last_good(value)
                return
            loss.backward()  # type: ignore[no-untyped-call]
            norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), progress.clip_limit))
            if not math.isfinite(norm):
                raise self._diverged(f"gradient is not finite ({ids})")
            rate = self._rate(progress.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            progress.step += 1
            progress.validation_due = progress.step == until
            decay = min(config.ema_decay, (1 + progress.step) / (10 + progress.step))
            for name, tensor in self.model.state_dict().items():
                self.ema[name].lerp_(tensor, 1 - decay)
            progress.remember(loss=value, norm=norm)
            if progress.step % config.save_every == 0:
                self._save(may_fail=not self.save_failed)
            if self.rank == 0:
                self.report.step(progress.step, value, rate)
                if self.board is not None:
                    self.board.add_scalar("train/loss", value, progress.step)

    def _batches(self, start: int, end: int) -> Iterator[dict[str, Tensor]]:
        """The batches of steps start…end − 1 for this process; a sample's index says all about it."""
        size = self.config.batch_size
        first = [(step * self.world + self.rank) * size for step in range(start, end)]
        loader = DataLoader(
            self.task.dataset,
            batch_sampler=[list(range(i, i + size)) for i in first],
            num_workers=self.config.workers,
            timeout=WORKER_TIMEOUT_SECONDS if self.config.workers else 0,
        )
        for batch in loader:
            yield {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _rate(self, step: int) -> float:
        """Warm-up, then a cosine to a hundredth."""
        c = self.config
        warm = min(1.0, (step + 1) / max(1, c.warmup_steps))
        done = min(1.0, max(0, step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps))
        cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2
        return c.learning_rate * self.progress.rate_scale * warm * cosine

    def _validate(self) -> None:
        """Score the averaged weights, write a line of metrics and both checkpoints; still due after a signal.

        Rank 0 works, the rest wait for what it found.
        """
        if self.rank == 0:
            raw = {name: t.clone() for name, t in self.model.state_dict().items()}
            self.model.load_state_dict(self.ema)
            self.model.eval()
            metrics = None
            with torch.inference_mode(), suppress(Stopped):
                metrics = self.task.validate(self.model, heeding(self.stop))
            self.model.load_state_dict(raw)
            if metrics is not None:
                self._take(metrics)
        if self.world > 1:
            told = [self.progress]
            dist.broadcast_object_list(told)
            self.progress = told[0]
        if self.progress.idle_validations >= 2:
            raise TrainingDiverged(
                f"step {self.progress.step}: the network adds nothing (residual below "
                f"{IDLE_RESIDUAL_HU} HU, gain below {IDLE_GAIN_DB} dB in two validations)",
                path=self.folder,
                hint="another --seed, or a lower --lr",
            )

    def _take(self, metrics: dict[str, float]) -> None:
        """What a validation changes: the best, the count of idle ones, the files."""
        progress = self.progress
        is_best = progress.best_db is None or metrics["psnr_4095_db"] > progress.best_db
        if is_best:
            progress.best_db, progress.best_step = metrics["psnr_4095_db"], progress.step
        is_settled = progress.step >= max(500, 2 * self.config.warmup_steps)
        progress.idle_validations = progress.idle_validations + 1 if is_settled and is_idle(metrics) else 0
        progress.validation_due = False
        line = {"step": progress.step, "loss": sum(progress.losses) / len(progress.losses)} | metrics
        self.metrics.append(json.dumps(line, allow_nan=False) + "\n")
        self._write_metrics()
        for name, value in metrics.items() if self.board is not None else ():
            self.board.add_scalar(f"validation/{name}", value, progress.step)
        self._save(is_best=is_best)
        self.report.validation(progress.step, metrics, is_best)

    def _write_metrics(self) -> None:
        if self.rank == 0:
            write_text(self.folder / "metrics.jsonl", "".join(self.metrics), overwrite=True)

    def _save(self, *, is_best: bool = False, may_fail: bool = False) -> None:
        """Write the state. may_fail: where the disk is full, go on and leave it to the next time."""
        metrics = json.loads(self.metrics[-1]) if self.metrics else None
        card = {**self.task.card, "run": self._resolved(), "metrics": metrics}
        state: dict[str, Any] = {"model": self.model, "ema": self.ema, "optimizer": self.optimizer}
        task, progress = self.task, self.progress
        try:
            if self.rank == 0:
                checkpoint.save(self.folder, task.kind, task.config, card, progress, is_best=is_best, **state)
        except CtsrError as exc:
            if not may_fail:
                raise
            self.save_failed = True
            self.report.note(f"step {progress.step}: not saved, tried once more later: {exc}")
            return
        self.saved_step, self.save_failed = progress.step, False

    def _back_to_last_good(self, loss: float) -> None:
        at = self.progress.step
        if self.progress.rate_scale < 1:
            raise self._diverged(f"loss jumped to {loss:.3g}")
        self._restore()
        self.progress.rate_scale = 0.5
        if self.rank == 0:
            self.report.note(
                f"step {at}: loss jumped to {loss:.3g}; back to step {self.saved_step} with half the rate"
            )

    def _diverged(self, finding: str) -> TrainingDiverged:
        hint = f"last good checkpoint: step {self.saved_step}; lower --lr"
        return TrainingDiverged(f"step {self.progress.step}: {finding}", path=self.folder, hint=hint)

    def _resolved(self) -> dict[str, Any]:
        together = self.config.batch_size * self.world
        return {
            "loop": asdict(self.config),
            "network": dict(self.task.config),
            "recipe": {
                **self.task.recipe,
                "optimizer": self.task.optimizer.__name__,
                "pairs a step": together,
            },
            "processes": self.world,
        }

    def _refuse_another_recipe(self, before: Any) -> None:
        """UsageError where a setting that the folder's run was made with is another one now."""
        if not isinstance(before, dict):
            raise WeightsError("does not say how it was trained", path=self.folder / "last.safetensors")
        now = json.loads(json.dumps(self._resolved()))
        changed = [
            f"{part}.{key}: {value} → {now[part].get(key)}"
            for part in ("network", "recipe", "loop")
            for key, value in sorted(before.get(part, {}).items())
            if now[part].get(key) != value and not (part == "loop" and key not in KEPT)
        ]
        if changed:
            raise UsageError(
                f"was trained with other settings: {'; '.join(changed[:4])}",
                path=self.folder,
                hint="another --output-dir, or --resume no to start afresh",
            )

    def _outcome(self, *, stopped_by: int | None = None, was_finished: bool = False) -> Outcome:
        p = self.progress
        return Outcome(p.step, p.best_db, p.best_step, stopped_by, was_finished)

    def _mean(self, value: Tensor) -> float:
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world
        return float(value)

    def _signal(self) -> int | None:
        """The signal that any process got: all stop at the same step."""
        signal = self.stop()
        if self.world == 1:
            return signal
        found = torch.tensor([signal or 0], device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found) or None

    def _tensorboard(self) -> AbstractContextManager[Any]:
        if self.config.log == "none" or self.rank != 0:
            return nullcontext()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as exc:
            raise ResourceError(
                "TensorBoard is not installed", hint="pip install 'ctsr[tensorboard]'"
            ) from exc
        writer: AbstractContextManager[Any] = SummaryWriter(
            str(self.folder / "runs"), purge_step=self.progress.step
        )
        return writer


@contextmanager
def processes(config: LoopConfig) -> Iterator[tuple[int, int]]:
    """(rank, world size), from what `torchrun` sets.

    Two trainings in one process are within one: the meeting place of a group can't be used a second time.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        yield (dist.get_rank() if world > 1 else 0), world
        return
    # the others wait while rank 0 validates; a process that died is torchrun's to notice
    backend = "nccl" if config.device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=6))
    try:
        yield dist.get_rank(), world
    finally:
        dist.destroy_process_group()


@contextmanager
def _resource_errors(config: LoopConfig) -> Iterator[None]:
    """torch's own words for too little memory and for a dead worker are RuntimeErrors like any other."""
    try:
        yield
    except (RuntimeError, MemoryError) as exc:
        words = " ".join(str(exc).split())
        if isinstance(exc, MemoryError) or "out of memory" in words or "can't allocate memory" in words:
            raise ResourceError(
                f"out of memory on {config.device}",
                hint="a smaller --batch-size or --patch-size, or --gradient-checkpointing",
            ) from exc
        if words.startswith("DataLoader") or "shared memory" in words:
            raise ResourceError(
                f"a process that prepares data has ended: {words}",
                hint="too little memory, or too little room in /dev/shm: fewer --workers, or 0",
            ) from exc
        raise
