"""`ctsr train-baseline`."""

from __future__ import annotations

from typing import Any

from ctsr.cli.console import Console
from ctsr.cli.training import carry_out
from ctsr.workflows.requests import TrainBaseline


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

    carry_out(console, request, run, show)
