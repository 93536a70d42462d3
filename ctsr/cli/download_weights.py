"""`ctsr download-weights`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctsr.cli import options as o
from ctsr.errors import UsageError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("download-weights")(download_weights)


def download_weights(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME…", help="A name of --list, or hf://org/repo@revision/file.safetensors."),
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="Show all names, and what is here; asks no network.")
    ] = False,
    all_: Annotated[bool, typer.Option("--all", help="All names of --list.")] = False,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="Where they go; default: the cache (CTSR_CACHE)."),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", metavar="DIR", help="Take them from a folder that --to made: no network."),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Only hash what is here, and compare.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="A branch, tag or commit, instead of the listed one.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Download again what is here, as a branch may have moved.")
    ] = False,
    timeout: Annotated[
        float,
        typer.Option(
            min=1,
            callback=o.finite,
            help="Seconds without progress to give up after.",
            rich_help_panel=o.ADVANCED,
        ),
    ] = 60.0,
    config: o.Config = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
    as_json: o.Json = False,
) -> None:
    """Fetch weights to begin a training from, or that somebody published; the default model needs none.

    The sha256 of every file is checked. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are respected.
    """
    console = o.console_of(quiet, verbose, as_json)
    if not (names or list_ or all_ or verify):
        raise UsageError("no weights named", hint="ctsr download-weights --list shows them")
    from ctsr.weights.hub import cache_folder
    from ctsr.weights.registry import PUBLISHED, SHIPPED
    from ctsr.workflows.download_weights import download_weights as run
    from ctsr.workflows.download_weights import list_weights, verify_weights

    root = to or cache_folder()
    if list_ or verify:
        rows = list_weights(root) if list_ else verify_weights(names or [], root)
        shown = ("name", "kind", "source", "revision", "file", "size", "sha256", "licence")
        console.table([{k: row[k] for k in shown} | {"here": row.get("state", row["path"])} for row in rows])
    else:
        with console.progress("download") as ticker:
            rows = run(
                [*SHIPPED, *PUBLISHED] if all_ else names or [], root, source=from_, revision=revision,
                overwrite=overwrite, timeout=timeout, note=console.note,
                progress=lambda done, total: ticker(done / total, f"{done / 1e6:.1f} of {total / 1e6:.1f} MB"),
            )  # fmt: skip
        for row in rows:
            console.result(row["path"])
    console.document({"weights": rows})
