"""A training's state on disk: `last` and `best`, each whole at every instant; and what its last steps were like.

Both are model files that `upsample` reads; the training's own state (raw weights, moments, counters) lies
beside the averaged weights. `best` is the bytes of that step's `last`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ctsr.errors import InputError, UsageError, WeightsError
from ctsr.io.atomic import check_output, input_error, output_error, write_bytes
from ctsr.models import zoo
from ctsr.train.muon import moments

__all__ = ["Progress", "locked", "read", "read_metrics", "restore", "save"]

WINDOW = 200  # steps that "usual" is taken from
SETTLED = 20  # fewer steps than this say nothing yet
CLIP_FACTOR = (
    2.0  # × the running median of the gradient norm: a fixed clip at too high a rate exploded at step 2 300
)
JUMP = 10.0  # × the running median of the loss


@dataclass(slots=True)
class Progress:
    """What a training must remember beside its tensors to go on as if it had never stopped."""

    step: int = 0
    best_db: float | None = None
    best_step: int = 0
    validation_due: bool = False  # a kill between a step and its validation loses neither
    rate_scale: float = 1.0  # halved once when the loss jumps
    idle_validations: int = 0  # running validations in which the network added nothing
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def remember(self, *, loss: float, norm: float) -> None:
        """Add a step to the running window."""
        self.losses, self.norms = [*self.losses, loss][-WINDOW:], [*self.norms, norm][-WINDOW:]

    @property
    def clip_limit(self) -> float:
        """The gradient norm that this step is clipped to."""
        return CLIP_FACTOR * statistics.median(self.norms) if len(self.norms) >= SETTLED else math.inf

    def has_jumped(self, loss: float) -> bool:
        """Whether the loss is an order of magnitude above what it usually is."""
        return len(self.losses) >= SETTLED and loss > JUMP * statistics.median(self.losses)


def save(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    card: Mapping[str, Any],
    progress: Progress,
    *,
    model: nn.Module,
    ema: Mapping[str, Tensor],
    optimizer: Optimizer,
    is_best: bool,
) -> None:
    """Write `last.safetensors`, and before it `best.safetensors` from the same bytes.

    In this order a kill between the two leaves a `last` that comes to the same `best` again.
    """
    training = {f"raw/{name}": t for name, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        training |= {f"{key}/{name}": value.float() for key, value in state.items()}
    data = zoo.pack(kind, config, ema, card={**card, "training": asdict(progress)}, training=training)
    for name in ["best", "last"] if is_best else ["last"]:
        write_bytes(folder / f"{name}.safetensors", data, overwrite=True)


def read(folder: Path, kind: str | None = None) -> zoo.ModelFile:
    """`last.safetensors`, checked as any model file is; UsageError where it is of another training than `kind`."""
    path = folder / "last.safetensors"
    try:
        file = zoo.unpack(path.read_bytes(), str(path))
    except OSError as exc:
        raise WeightsError(input_error(exc, path).reason, path=path) from exc
    if kind not in (None, file.kind):
        raise UsageError(
            f"holds a training of {file.kind}, not of {kind}", path=folder, hint="another --output-dir"
        )
    return file


def restore(
    file: zoo.ModelFile, folder: Path, *, model: nn.Module, ema: dict[str, Tensor], optimizer: Optimizer
) -> Progress:
    """Put a checkpoint into model, ema and optimizer; where it does not fit, WeightsError and no change."""
    foreign = WeightsError(
        "holds no training state of this network",
        path=folder / "last.safetensors",
        hint="--resume no starts afresh",
    )
    try:
        progress = Progress(**file.card["training"])
        trained = dict(model.named_parameters()) if progress.step > 0 else {}
    except (KeyError, TypeError) as exc:
        raise foreign from exc
    expected = {n: t.shape for n, t in ema.items()}
    expected |= {f"raw/{n}": t.shape for n, t in model.state_dict().items()}
    expected |= {f"step/{n}": torch.Size() for n in trained}
    expected |= {f"{key}/{n}": t.shape for n, t in trained.items() for key in moments(optimizer, t)}
    if {n: t.shape for n, t in (file.training | file.tensors).items()} != expected:
        raise foreign
    model.load_state_dict({n: file.training[f"raw/{n}"] for n in ema})
    for name, tensor in file.tensors.items():
        ema[name].copy_(tensor)
    optimizer.state.clear()
    for name, parameter in trained.items():
        # in the parameter's own layout, as the optimiser would have made them
        state = {"step": file.training[f"step/{name}"].clone()}
        for key in moments(optimizer, parameter):
            state[key] = torch.empty_like(parameter.detach()).copy_(file.training[f"{key}/{name}"])
        optimizer.state[parameter] = state
    return progress


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One training a folder, and one that can be written to. The kernel's lock: a killed run leaves none."""
    lock = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_output(lock, overwrite=True)
        handle = open(lock, "a+")  # noqa: SIM115
    except FileExistsError as exc:
        raise UsageError("is a file, a folder is asked for", path=folder) from exc
    except OSError as exc:
        raise output_error(exc, folder) from exc
    with handle:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise UsageError(
                "a training is active in this folder", path=folder, hint="another --output-dir"
            ) from exc
        except (ImportError, OSError):  # Windows, some network disks: a second run is not noticed there
            pass
        yield


def read_metrics(path: Path, *, until: int) -> list[str]:
    """The lines of `metrics.jsonl` up to and including step `until`: what an unbroken run had by then."""
    if not path.exists():
        return []
    try:
        lines = path.read_text("utf-8").splitlines(keepends=True)
        return [line for line in lines if json.loads(line)["step"] <= until]
    except (ValueError, KeyError, TypeError) as exc:
        raise InputError("is not what a training wrote", path=path, hint="move it away to go on") from exc
