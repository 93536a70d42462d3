"""`ctsr finetune-vae`."""

from __future__ import annotations

from typing import Any

from ctsr.cli.console import Console
from ctsr.cli.training import carry_out
from ctsr.workflows.requests import FinetuneVae


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

    carry_out(console, request, run, show, yardstick="the linear transform of its size")
