"""`ctsr encode-latents`."""

from __future__ import annotations

from ctsr.cli.console import Console
from ctsr.workflows.requests import EncodeLatents


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
    console.result(
        f"{request.latents}: {sum(row['pairs'] for row in rows)} pairs of {len(rows)} scans encoded"
    )
