"""`ctsr train-diffusion`."""

from __future__ import annotations

from typing import Any

from ctsr.cli.console import Console
from ctsr.cli.training import carry_out
from ctsr.workflows.requests import TrainDiffusion

METHODS = {"cubic": "cubic_", "stage one": "stage_one_", "diffusion": "", "one sample": "sample_"}


def train_diffusion(console: Console, request: TrainDiffusion) -> None:
    """Train the diffusion that refines stage one, on the latents that encode-latents made.

    Stop it with Ctrl-C and run the same command again to go on. Several GPUs: `torchrun -m ctsr …`.
    """
    from ctsr.workflows.train_diffusion import train_diffusion as run

    def show(facts: dict[str, Any], metrics: dict[str, Any]) -> None:
        console.document(facts | metrics)
        rows = [{"method": name, "PSNR, dB": metrics[f"{key}psnr_4095_db"]} for name, key in METHODS.items()]
        console.table(rows, title="on the validation set")

    carry_out(console, request, run, show)
