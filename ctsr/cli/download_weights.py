"""`ctsr download-weights`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ctsr.cli import options as o
from ctsr.errors import UsageError

__all__ = ["register"]

SHOWN = ("name", "kind", "source", "revision", "file", "size", "sha256", "licence")
Names = typer.Argument(metavar="NAME…", help="A name of --list, or hf://org/repo@revision/file.safetensors.")
List = typer.Option("--list", help="Show all names, and what is here; asks no network.")
To = typer.Option("--to", metavar="DIR", help="Where they go; default: the cache (CTSR_CACHE).")
From = typer.Option("--from", metavar="DIR", help="Take them from a folder that --to made: no network.")
Revision = typer.Option("--revision", help="A branch, tag or commit, instead of the listed one.")
Again = typer.Option("--overwrite", help="Fetch again what is here: a branch may have moved.")
Wait = "Seconds without progress to give up after."


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("download-weights")(download_weights)


def download_weights(
    names: Annotated[list[str] | None, Names] = None,
    show: Annotated[bool, List] = False,
    everything: Annotated[bool, typer.Option("--all", help="All names of --list.")] = False,
    to: Annotated[Path | None, To] = None,
    source: Annotated[Path | None, From] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Only hash what is here, and compare.")] = False,
    revision: Annotated[str | None, Revision] = None,
    overwrite: Annotated[bool, Again] = False,
    timeout: Annotated[float, typer.Option(min=1, max=3600, help=Wait, rich_help_panel=o.ADVANCED)] = 60.0,
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
    if not (names or show or everything or verify):
        raise UsageError("no weights named", hint="ctsr download-weights --list shows them")
    from ctsr.weights.hub import cache_folder
    from ctsr.weights.registry import PUBLISHED, SHIPPED
    from ctsr.workflows.download_weights import download_weights as run
    from ctsr.workflows.download_weights import list_weights, verify_weights

    root = to or cache_folder()
    if show or verify:
        rows = list_weights(root) if show else verify_weights(names or [], root)
        console.table([{k: row[k] for k in SHOWN} | {"here": row.get("state", row["path"])} for row in rows])
    else:
        wanted = [*SHIPPED, *PUBLISHED] if everything else names or []
        noted: list[str] = []
        with console.progress("download") as ticker:

            def progress(record: dict[str, Any], done: int) -> None:
                of = f"{record['bytes'] / 1e6:.1f} MB"
                if record["reference"] not in noted:
                    noted.append(record["reference"])
                    pin = "pinned" if record["is_pinned"] else "not pinned: what the hub names"
                    told = "{reference}: commit {commit}, {of}, sha256 {sha256} ({pin}), licence {licence}"
                    console.note(told.format(of=of, pin=pin, **record))
                ticker(done / record["bytes"], f"{done / 1e6:.1f} of {of}")

            rows = run(
                wanted, root, source=source, revision=revision, overwrite=overwrite, timeout=timeout, progress=progress
            )  # fmt: skip
        for row in rows:
            console.result(row["path"])
    console.document({"weights": rows})
