"""A training's state on disk: `last` and `best`, each whole at every instant.

Both are model files that `upsample` reads; the training's own state (raw weights, moments, counters) lies beside the
averaged weights. `best` is the bytes of that step's `last`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ctsr.errors import UsageError, WeightsError
from ctsr.io.atomic import write_bytes
from ctsr.models import zoo

__all__ = ["Progress", "load", "locked", "save"]


@dataclass(slots=True)
class Progress:
    """What a training must remember beside its tensors to go on as if it had never stopped."""

    step: int = 0
    best_db: float | None = None
    best_step: int = 0
    rate_scale: float = 1.0  # halved once when the loss jumps
    idle_validations: int = 0  # running validations in which the network added nothing
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def save(
    folder: Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    card: Mapping[str, Any],
    model: nn.Module,
    ema: Mapping[str, Tensor],
    optimizer: Optimizer,
    progress: Progress,
    is_best: bool,
) -> None:
    """Write `last.safetensors`, and `best.safetensors` from the same bytes."""
    training = {f"raw/{name}": t for name, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            training[f"{key}/{name}"] = value.float()
    full = dict(card) | {"training": progress.to_dict()}
    data = zoo.pack(kind, config, ema, card=full, training=training)
    write_bytes(folder / "last.safetensors", data, overwrite=True)
    if is_best:
        write_bytes(folder / "best.safetensors", data, overwrite=True)


def load(folder: Path, *, model: nn.Module, ema: dict[str, Tensor], optimizer: Optimizer) -> Progress:
    """Put the state of `last.safetensors` into model, ema and optimizer. Raises WeightsError where it does not fit."""
    path = folder / "last.safetensors"
    file = zoo.unpack(path.read_bytes(), str(path))
    raw = {n.removeprefix("raw/"): t for n, t in file.training.items() if n.startswith("raw/")}
    if raw.keys() != model.state_dict().keys() or "training" not in file.card:
        raise WeightsError(
            "no training state of this network in it", path=path, hint="--resume no starts afresh"
        )
    model.load_state_dict(raw)
    for name, tensor in file.tensors.items():
        ema[name].copy_(tensor)
    for name, parameter in model.named_parameters():
        state = {key: file.training.get(f"{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
        if all(value is not None for value in state.values()):
            optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter.device)  # type: ignore[union-attr]
                for key, value in state.items()
            }
    return Progress(**file.card["training"])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One training a folder. The lock is the kernel's, so a killed run leaves none behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as handle:
        try:
            import fcntl
        except ImportError:  # Windows: a second run is not noticed there
            yield
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise UsageError(
                "a training is active in this folder", path=folder, hint="another --output-dir"
            ) from exc
        yield


def read_metrics(path: Path, *, until: int) -> list[str]:
    """The lines of `metrics.jsonl` up to and including step `until`: what an unbroken run had written by then."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= until]
